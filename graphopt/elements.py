"""The elements of a graph: graphsurgeon's nodes and tensors, compared by identity, and weights that stay in their file."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphopt.errors import UnsupportedModel

Array = np.ndarray[Any, Any]
Dim = int | str | None
Shape = tuple[Dim, ...]
Buffer = memoryview | bytes


def numpy_dtype(onnx_type: int) -> np.dtype[Any]:
    """The NumPy dtype (ml_dtypes for bfloat16, float8, int4 and the like) of an ONNX element type.

    Raises:
        UnsupportedModel: this version of onnx knows no such element type.
    """
    try:
        dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))
        return dtype
    except (KeyError, ValueError):
        raise UnsupportedModel(f"element type {onnx_type} is not known to onnx {onnx.__version__}") from None


def onnx_dtype(dtype: np.dtype[Any]) -> int:
    """The ONNX element type of a NumPy dtype.

    Raises:
        UnsupportedModel: ONNX has none for it.
    """
    if dtype.kind in "OU":
        return int(onnx.TensorProto.STRING)
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
    except ValueError:
        raise UnsupportedModel(f"ONNX has no element type for {dtype}; cast the array first") from None


class StoredValues(LazyValues):  # type: ignore[misc]  # graphsurgeon is untyped
    """The values of a constant as they lie in a file or a TensorProto; nothing is decoded until `load`."""

    def __init__(self, tensor: onnx.TensorProto, raw: Buffer | None = None) -> None:
        """`tensor` describes the values and holds them too, unless `raw` (a view into a mapped file) does."""
        self.tensor = tensor
        self.raw = raw
        self.shape = tuple(tensor.dims)
        self.dtype = numpy_dtype(tensor.data_type)

    def load(self) -> Array:
        """Decode the values into a read-only array; a view of the file where the format allows it."""
        if self.tensor.data_type == onnx.TensorProto.STRING:
            array = np.array([decode(s) for s in self.tensor.string_data], object).reshape(self.shape)
        elif self.raw is None:
            array = onnx.numpy_helper.to_array(self.tensor)
        elif packed_bits(self.tensor.data_type):
            proto = onnx.TensorProto()
            proto.data_type = self.tensor.data_type
            proto.dims.extend(self.shape)
            proto.raw_data = bytes(self.raw)
            array = onnx.numpy_helper.to_array(proto)
        else:
            array = np.frombuffer(self.raw, dtype=self.dtype).reshape(self.shape)
            if not array.flags.aligned:
                array = array.copy()
        array = np.asarray(array)
        if array.flags.writeable:
            array.flags.writeable = False
        return array

    @property
    def nbytes(self) -> int:
        """Bytes of the values as stored."""
        return len(self.raw) if self.raw is not None else stored_bytes(self.dtype, self.shape)


MOST_DENSE: Final = 1 << 31  # bytes of a sparse initializer made dense; no denser one fits a protobuf either


class SparseStoredValues(StoredValues):
    """A sparse initializer; carried as it is, decoded to a dense array on demand."""

    def __init__(self, sparse: onnx.SparseTensorProto) -> None:
        super().__init__(sparse.values)
        self.sparse = sparse
        self.shape = tuple(sparse.dims)

    def load(self) -> Array:
        """Decode into a dense read-only array.

        Raises:
            UnsupportedModel: it does not fit into memory.
        """
        try:
            if math.prod(self.shape) * self.dtype.itemsize > MOST_DENSE:
                raise MemoryError
            dense = np.full(self.shape, "" if self.dtype.kind == "O" else 0, self.dtype)
        except (MemoryError, ValueError):
            raise UnsupportedModel(
                f"sparse initializer {self.tensor.name!r} of shape {list(self.shape)} does not fit into memory when dense"
            ) from None
        values = StoredValues(self.sparse.values).load()
        indices = StoredValues(self.sparse.indices).load()
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        dense.flags.writeable = False
        return dense

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        return StoredValues(self.sparse.values).nbytes + StoredValues(self.sparse.indices).nbytes


class CastValues(StoredValues):
    """The values of a floating-point constant in another floating-point type: rounded each time they are asked for, held nowhere."""

    def __init__(self, source: Constant, dtype: np.dtype[Any], bound: float | None = None) -> None:
        """Finite values are clipped to `bound` (in magnitude, None: not at all) before they are rounded; infinities stay."""
        self._source, self._bound = source, bound
        super().__init__(onnx.TensorProto(data_type=onnx_dtype(dtype), dims=source.shape))

    @property
    def raw(self) -> Buffer | None:
        """The rounded values as bytes."""
        return self.load().reshape(-1).view(np.uint8).data

    @raw.setter
    def raw(self, value: Buffer | None) -> None:
        """There is nothing to keep."""

    def load(self) -> Array:
        """Round the values to nearest, ties to even, into a read-only array."""
        values = self._source.values
        if self._bound is not None:
            values = np.where(np.isinf(values), values, np.clip(values, -self._bound, self._bound))
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.ascontiguousarray(values.astype(self.dtype)).reshape(self.shape)
        array.flags.writeable = False
        return array

    @property
    def nbytes(self) -> int:
        """Bytes of the rounded values."""
        return stored_bytes(self.dtype, self.shape)


def decode(raw: bytes) -> str | bytes:
    """The text of an ONNX string; the bytes themselves where they are no UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


@functools.cache
def packed_bits(onnx_type: int) -> int:
    """Bits per element for types that ONNX packs several to a byte, else 0."""
    name = onnx.TensorProto.DataType.Name(onnx_type)
    if name in ("FLOAT6E2M3", "FLOAT6E3M2"):
        return 6
    return {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}.get(name, 0)


def stored_bytes(dtype: np.dtype[Any], shape: Iterable[int]) -> int:
    """Bytes that a tensor takes in a file; for strings an estimate."""
    count = math.prod(shape)  # Python's integers: a damaged file may declare 2**63 elements and more
    if dtype.kind in "OU":
        return count * 16
    bits = packed_bits(onnx_dtype(dtype))
    return -(-count * bits // 8) if bits else count * dtype.itemsize


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name users know: ``float32``, ``bfloat16``, ``string``."""
    return "string" if dtype.kind in "OU" else str(np.dtype(dtype).name)


class _ByIdentity:
    """Equality and hash by identity, against graphsurgeon's comparison by value or name."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Variable(_ByIdentity, gs.Variable):  # type: ignore[misc]
    """A value computed at run time or fed by the user.

    `dtype` is a NumPy dtype or None, `shape` a tuple of int, str (a symbol) and None (unknown), or None. Types other than dense
    tensors (`type` is then not ``"tensor_type"``) live in `carried.type` alone.
    """

    carried: onnx.ValueInfoProto | None = None

    def __init__(self, name: str, dtype: np.dtype[Any] | None = None, shape: Shape | None = None) -> None:
        super().__init__(name, dtype, None)
        self.shape = shape


class Constant(_ByIdentity, gs.Constant):  # type: ignore[misc]
    """An initializer; `values` decodes on each access and keeps nothing in memory that lies in a file."""

    carried: onnx.ValueInfoProto | None = (
        None  # what the file declares of it as graph input, output or value, if anything
    )

    def __init__(self, name: str, values: Array | StoredValues) -> None:
        if isinstance(values, np.ndarray):
            if values.dtype.kind == "U":
                values = values.astype(object)
            elif not values.dtype.isnative:
                values = values.astype(values.dtype.newbyteorder("="))
            try:
                onnx_dtype(values.dtype)
            except UnsupportedModel as error:
                raise UnsupportedModel(f"constant {name!r}: {error}") from None
            if values.flags.writeable:
                values = values.view()
                values.flags.writeable = False
        super().__init__(name, values)

    @property
    def values(self) -> Array:
        """The values as a read-only array; write a new `Constant` instead of changing them."""
        stored: Any = self._values
        array: Array = stored.load() if isinstance(stored, LazyValues) else stored
        return array

    @property
    def nbytes(self) -> int:
        """Bytes of the values as stored in a file."""
        stored = self._values
        return stored.nbytes if isinstance(stored, StoredValues) else stored_bytes(stored.dtype, stored.shape)


class Node(_ByIdentity, gs.Node):  # type: ignore[misc]
    """One operator call. Attributes are Python values, `Constant` (tensors), `Graph` (bodies), and the proto itself for the
    rest (references of function attributes, types, sparse tensors)."""

    carried: onnx.NodeProto | None = None
    attr_types: dict[str, int]  # as read, so that [] and 1.0 are written with the type they came with
    attr_docs: dict[str, str]  # doc strings of attributes
    origin: tuple[str, ...]  # names of the nodes of the loaded model that this one stands for

    def __init__(
        self,
        op: str,
        name: str = "",
        attrs: dict[str, Any] | None = None,
        inputs: list[Any] | None = None,
        outputs: list[Any] | None = None,
        domain: str = "",
    ) -> None:
        super().__init__(op, name, dict(attrs or {}), inputs or [], outputs or [], domain)
        self.attr_types = {}
        self.attr_docs = {}
        self.origin = ()

    @property
    def is_onnx(self) -> bool:
        """Whether the operator is of the default domain."""
        return (self.domain or "") in ("", "ai.onnx")


class Graph(_ByIdentity, gs.Graph):  # type: ignore[misc]
    """Nodes, inputs, outputs and the initializers declared here, in order; a `Constant` made by a pass belongs to the root."""

    carried: onnx.GraphProto
    initializers: list[Constant]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.carried = onnx.GraphProto()
        self.initializers = []


class Function(_ByIdentity, gs.Function):  # type: ignore[misc]
    """A model-local function; its body is carried and may be inlined, passes do not look into it."""

    carried: onnx.FunctionProto


_PLAIN: Final = frozenset({int, float, str, bytes, Constant})


def subgraphs(node: gs.Node) -> list[Graph]:
    """The bodies of a control-flow node, in attribute order."""
    found: list[Graph] = []
    for value in node.attrs.values():
        kind = type(value)
        if kind in _PLAIN:
            continue  # nearly all attributes; this runs for every node in every walk
        if kind is list:
            if value and isinstance(value[0], gs.Graph):  # ONNX has no mixed lists
                found.extend(value)
        elif isinstance(value, gs.Graph):
            found.append(value)
    return found


def walk(graph: Graph) -> Iterator[Graph]:
    """`graph` and every graph nested in it, outer before inner."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        for node in reversed(current.nodes):
            pending.extend(reversed(subgraphs(node)))


@dataclass(frozen=True)
class TensorSpec:
    """What a graph promises of an input or output."""

    name: str
    dtype: str | None  # NumPy's or ml_dtypes' name, as in "float32"; None for a type that is no dense tensor
    shape: Shape | None  # None: unknown rank

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.dtype or 'non-tensor'}[{dims}] {self.name}"
