"""The IR: a `Model` over one onnx-graphsurgeon graph, with everything that graphsurgeon itself would drop.

Three decisions carry this file:

* **We read and write the protobuf ourselves** and use graphsurgeon's `Graph`, `Node`, `Variable` and `Constant` as data
  structures only. Whatever field of a proto the IR does not model (doc strings, metadata, overloads, device
  configurations, fields of a newer onnx) stays in `carried`, a copy of that proto without the modelled fields, and is
  written back.
* **Weights stay in the file.** `load` scans the wire format and maps `raw_data` of large initializers, inline or external;
  `save` streams them from map to file. A model of many gigabytes opens in milliseconds and is never held in memory.
* **Nodes and tensors compare and hash by identity**, so that ``list.remove`` cannot hit a twin and dicts can be keyed by them.

Format reference: https://github.com/onnx/onnx/blob/main/docs/IR.md
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphopt.errors import InvalidModel, OutputError, UnsupportedModel, UserError

Array = np.ndarray[Any, Any]
Dim = int | str | None
Shape = tuple[Dim, ...]
Buffer = memoryview | bytes

EXTERNAL_ABOVE: Final = 1_500_000_000  # bytes of weights from which `save` writes them beside the model (protobuf ends at 2 GiB)
_TEXT_OPSET: Final = 23  # of a graph text without a header: every runtime we emit for reads it
_TEXT_IR_VERSION: Final = 11
_MAP_ABOVE: Final = 1024  # bytes of raw_data from which an initializer stays in the file


# --------------------------------------------------------------------------------------------------------- values


def numpy_dtype(onnx_type: int) -> np.dtype[Any]:
    """The NumPy dtype (ml_dtypes for bfloat16, float8, int4 and the like) of an ONNX element type.

    Raises:
        UnsupportedModel: this version of onnx knows no such element type.
    """
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))
    except (KeyError, ValueError):
        raise UnsupportedModel(f"element type {onnx_type} is not known to onnx {onnx.__version__}") from None


def onnx_dtype(dtype: np.dtype[Any]) -> int:
    """The ONNX element type of a NumPy dtype."""
    return int(onnx.TensorProto.STRING) if dtype == object else int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


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
        if self.raw is None:
            array = onnx.numpy_helper.to_array(self.tensor)
        elif packed_bits(self.tensor.data_type):
            proto = onnx.TensorProto()
            proto.CopyFrom(self.tensor)
            proto.ClearField("external_data")
            proto.ClearField("data_location")
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
        return len(self.raw) if self.raw is not None else _stored_bytes(self.dtype, self.shape)


class SparseStoredValues(StoredValues):
    """A sparse initializer; carried as it is, decoded to a dense array on demand."""

    def __init__(self, sparse: onnx.SparseTensorProto) -> None:
        super().__init__(sparse.values)
        self.sparse = sparse
        self.shape = tuple(sparse.dims)

    def load(self) -> Array:
        """Decode into a dense read-only array."""
        dense = np.zeros(self.shape, self.dtype)
        values = onnx.numpy_helper.to_array(self.sparse.values)
        indices = onnx.numpy_helper.to_array(self.sparse.indices)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        dense.flags.writeable = False
        return dense


def packed_bits(onnx_type: int) -> int:
    """Bits per element for types that ONNX packs several to a byte, else 0."""
    name = onnx.TensorProto.DataType.Name(onnx_type)
    if name in ("FLOAT6E2M3", "FLOAT6E3M2"):
        return 6
    return {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}.get(name, 0)


def _stored_bytes(dtype: np.dtype[Any], shape: Iterable[int]) -> int:
    count = int(np.prod([*shape], dtype=np.int64))
    if dtype == object:
        return count * 16  # strings: an estimate
    bits = packed_bits(onnx_dtype(dtype))
    return -(-count * bits // 8) if bits else count * dtype.itemsize


# ------------------------------------------------------------------------------------------------------- elements


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

    carried: onnx.ValueInfoProto | None = None  # its graph input, when it is one

    def __init__(self, name: str, values: Array | StoredValues) -> None:
        if isinstance(values, np.ndarray) and values.flags.writeable:
            values = values.view()
            values.flags.writeable = False
        super().__init__(name, values)

    @property
    def values(self) -> Array:
        """The values as a read-only array; write a new `Constant` instead of changing them."""
        stored = self._values
        return stored.load() if isinstance(stored, LazyValues) else stored

    @property
    def nbytes(self) -> int:
        """Bytes of the values as stored in a file."""
        stored = self._values
        return stored.nbytes if isinstance(stored, StoredValues) else _stored_bytes(stored.dtype, stored.shape)


class Node(_ByIdentity, gs.Node):  # type: ignore[misc]
    """One operator call. Attributes are Python values, `Constant` (tensors), `Graph` (bodies), and the proto itself for the
    rest (references of function attributes, types, sparse tensors)."""

    carried: onnx.NodeProto | None = None
    attr_types: dict[str, int]  # as read, so that [] and 1.0 are written with the type they came with
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


def subgraphs(node: gs.Node) -> list[Graph]:
    """The bodies of a control-flow node, in attribute order."""
    found: list[Graph] = []
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            found.append(value)
        elif isinstance(value, list):
            found.extend(v for v in value if isinstance(v, gs.Graph))
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


# ---------------------------------------------------------------------------------------------------------- model


class Model:
    """An ONNX model under optimization.

    Attributes:
        graph: the root graph.
        carried: the ModelProto without graph and functions (IR version, opset imports, producer, metadata, ...).
        source: the file it came from, if any.
    """

    def __init__(self, graph: Graph, carried: onnx.ModelProto, source: Path | None = None) -> None:
        self.graph = graph
        self.carried = carried
        self.source = source

    @property
    def functions(self) -> list[Function]:
        """The model-local functions."""
        return list(self.graph.functions)

    @property
    def ir_version(self) -> int:
        """The version of the ONNX IR that the file declares."""
        return int(self.carried.ir_version)

    @property
    def opsets(self) -> dict[str, int]:
        """Domain -> version; the default domain is ``""``."""
        return {_domain(o.domain): int(o.version) for o in self.carried.opset_import}

    @property
    def opset(self) -> int:
        """Version of the default domain; 0 when the model does not import it."""
        return self.opsets.get("", 0)

    def set_opset(self, domain: str, version: int) -> None:
        """Import `domain` at `version`."""
        for entry in self.carried.opset_import:
            if _domain(entry.domain) == _domain(domain):
                entry.version = version
                return
        self.carried.opset_import.append(onnx.helper.make_opsetid(domain, version))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What must be fed: the graph inputs that have no initializer."""
        return tuple(_spec(t) for t in self.graph.inputs if not isinstance(t, gs.Constant))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph outputs."""
        return tuple(_spec(t) for t in self.graph.outputs)

    def graphs(self) -> Iterator[Graph]:
        """The root graph and all bodies nested in it, outer before inner."""
        return walk(self.graph)

    def nodes(self) -> Iterator[Node]:
        """Every node of every graph; functions excluded."""
        for graph in self.graphs():
            yield from graph.nodes

    def constants(self) -> list[Constant]:
        """Every initializer that will be written, each once."""
        seen: dict[int, Constant] = {}
        for graph in self.graphs():
            for constant in graph.initializers:
                seen.setdefault(id(constant), constant)
            for tensor in _referenced(graph):
                if isinstance(tensor, gs.Constant):
                    seen.setdefault(id(tensor), tensor)
        return list(seen.values())

    def is_fixed(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is a constant that no caller can override (an initializer that is no graph input)."""
        return isinstance(tensor, gs.Constant) and not any(tensor is t for t in self.graph.inputs)

    def modernize(self) -> None:
        """Raise the IR version to 4 at least, since below it every initializer has to be a graph input.

        IR 3 gives no other way to state a weight, so its initializers are constants to us; from IR 4 on an initializer that
        is a graph input is a default that callers may override, and is left alone.
        """
        if self.ir_version < 4:
            self.graph.inputs = [t for t in self.graph.inputs if not isinstance(t, gs.Constant)]
            self.carried.ir_version = 4

    def clone(self) -> Model:
        """A copy that shares constant values and nothing else."""
        carried = onnx.ModelProto()
        carried.CopyFrom(self.carried)
        copies: dict[int, Any] = {}
        functions = list(self.graph.functions)  # never edited in place, so shared
        graph = _clone_graph(self.graph, copies)
        graph._functions = functions
        return Model(graph, carried, self.source)

    def to_proto(self, embed: Callable[[Constant], bool] = lambda constant: True) -> onnx.ModelProto:
        """The ModelProto; constants for which `embed` is false are written as external data without a location.

        Raises:
            UnsupportedModel: an element type or attribute that ONNX cannot express.
        """
        return _Writer(self, embed).model()

    def text(self) -> str:
        """ONNX's own text form (`parse` reads it back)."""
        return str(onnx.printer.to_text(self.to_proto()))

    def fingerprint(self) -> str:
        """sha256 of what `save` would write in one file: equal models have equal fingerprints, across processes."""
        digest = hashlib.sha256(self.to_proto(lambda c: c.nbytes <= _MAP_ABOVE).SerializeToString(deterministic=True))
        for constant in self.constants():
            if constant.nbytes > _MAP_ABOVE:
                digest.update(constant.name.encode())
                digest.update(_raw(constant))
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all initializers as stored."""
        return sum(c.nbytes for c in self.constants())


def _domain(text: str | None) -> str:
    return "" if text in (None, "ai.onnx") else str(text)


def _spec(tensor: gs.Tensor) -> TensorSpec:
    if getattr(tensor, "type", "tensor_type") not in ("tensor_type", None):
        return TensorSpec(tensor.name, None, None)
    dtype = None if tensor.dtype is None else dtype_name(tensor.dtype)
    return TensorSpec(tensor.name, dtype, None if tensor.shape is None else tuple(tensor.shape))


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name users know: ``float32``, ``bfloat16``, ``string``."""
    return "string" if dtype == object else str(np.dtype(dtype).name)


def _referenced(graph: Graph) -> Iterator[gs.Tensor]:
    for node in graph.nodes:
        yield from node.inputs
    yield from graph.outputs


def _clone_graph(graph: Graph, copies: dict[int, Any]) -> Graph:
    """Copy `graph`; `copies` maps id(tensor) -> its copy for everything in scope."""

    def tensor(old: gs.Tensor) -> gs.Tensor:
        new = copies.get(id(old))
        if new is None:
            if isinstance(old, gs.Constant):
                new = Constant(old.name, old._values)
            else:
                new = Variable(old.name, old.dtype, None if old.shape is None else tuple(old.shape))
                new.type = old.type
            new.carried = getattr(old, "carried", None)
            copies[id(old)] = new
        return new

    def attribute(value: Any) -> Any:
        if isinstance(value, gs.Graph):
            return _clone_graph(value, copies)
        if isinstance(value, list):
            return [attribute(v) for v in value]
        return value

    new_graph = Graph(name=graph.name, opset=graph.opset, import_domains=graph.import_domains)
    new_graph.carried = graph.carried
    new_graph.inputs = [tensor(t) for t in graph.inputs]
    new_graph.initializers = [tensor(t) for t in graph.initializers]
    for node in graph.nodes:
        inputs = [tensor(t) for t in node.inputs]
        copy = Node(node.op, node.name, None, inputs, [tensor(t) for t in node.outputs], node.domain or "")
        copy.attrs = {name: attribute(value) for name, value in node.attrs.items()}
        copy.carried = getattr(node, "carried", None)
        copy.attr_types = dict(getattr(node, "attr_types", {}))
        copy.origin = getattr(node, "origin", ())
        new_graph.nodes.append(copy)
    new_graph.outputs = [tensor(t) for t in graph.outputs]
    return new_graph


# ----------------------------------------------------------------------------------------------------------- load


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model from ``.onnx`` (protobuf) or ``.onnxtxt`` (ONNX text).

    Weights stay in the file, mapped, inline or external.

    Raises:
        InvalidModel: no such file, not ONNX, truncated, breaks a rule of the format, or external data is missing.
        UnsupportedModel: uses what graphopt cannot carry.
    """
    source = Path(path)
    if source.is_dir():
        raise InvalidModel(f"{str(source)!r} is a folder; name the .onnx file in it")
    try:
        size = source.stat().st_size
        if size == 0:
            raise InvalidModel(f"{str(source)!r} is empty (0 bytes); export or copy the model again")
        if source.suffix == ".onnxtxt":
            return parse(source.read_text(), source)
        with source.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except UnicodeDecodeError:
        raise InvalidModel(f"{str(source)!r} is not text; a protobuf model is named .onnx") from None
    except OSError as error:
        raise InvalidModel(f"cannot read {str(source)!r}: {error.strerror}; check the path") from None
    return _read(memoryview(data), str(source), source)


def loads(data: bytes, name: str = "<bytes>") -> Model:
    """Read a model from the bytes of an ``.onnx`` file; raises as `load` does. External data is looked for nowhere."""
    if not data:
        raise InvalidModel(f"{name} is empty (0 bytes)")
    return _read(memoryview(data), name, None)


def _read(view: memoryview, name: str, source: Path | None) -> Model:
    try:
        slim, raws = _scan(view)
        proto = onnx.ModelProto.FromString(slim)
    except (DecodeError, _WireError):
        raise InvalidModel(f"{name!r} is not an ONNX model, or is truncated ({len(view)} bytes)") from None
    return from_proto(proto, source, raws)


def parse(text: str, source: Path | None = None) -> Model:
    """Read a model from ONNX text: a model, or a graph alone (which gets opset 23 and IR version 11).

    Raises:
        InvalidModel: the text does not parse; the message holds line and column.
    """
    try:
        if text.lstrip().startswith("<"):
            return from_proto(onnx.parser.parse_model(text), source)
        graph = onnx.parser.parse_graph(text)
    except onnx.parser.ParseError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InvalidModel(f"{source or 'text'} does not parse: {' | '.join(lines)[:500]}") from None
    domains = {_domain(n.domain) for n in graph.node} | {""}
    imports = [onnx.helper.make_opsetid(d, 1 if d else _TEXT_OPSET) for d in sorted(domains)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=_TEXT_IR_VERSION)
    return from_proto(proto, source)


def from_proto(proto: onnx.ModelProto, source: Path | None = None, raws: dict[int, Buffer] | None = None) -> Model:
    """Build a `Model` from a ModelProto; `raws` holds, by index, the raw_data of root initializers left out of it.

    Raises:
        InvalidModel: a rule of the format is broken.
        UnsupportedModel: an opset or an IR version newer than onnx knows, or an IR version before 3.
    """
    where = str(source) if source else "the model"
    if not proto.HasField("graph") or not proto.opset_import:
        raise InvalidModel(f"{where!r} holds no graph or no opset import: not an ONNX model, or truncated")
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if _domain(entry.domain) == "" and not 1 <= entry.version <= newest:
            raise UnsupportedModel(
                f"{where!r} uses opset {entry.version}; onnx {onnx.__version__} knows 1 to {newest}: upgrade onnx, "
                "or convert the model with onnx.version_converter"
            )
    if not 3 <= proto.ir_version <= onnx.IR_VERSION:
        raise UnsupportedModel(f"{where!r} has IR version {proto.ir_version}; graphopt reads 3 to {onnx.IR_VERSION}: upgrade onnx")
    return _Reader(proto, source, raws or {}).model()


class _WireError(ValueError):
    pass


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _WireError("varint runs over the end")


def _fields(view: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Field number, start of the field, start and end of its payload (protobuf encoding, https://protobuf.dev)."""
    at = 0
    while at < len(view):
        start = at
        key, at = _varint(view, at)
        match key & 7:
            case 0:
                begin = at
                _, at = _varint(view, at)
            case 1:
                begin, at = at, at + 8
            case 2:
                size, begin = _varint(view, at)
                at = begin + size
            case 5:
                begin, at = at, at + 4
            case _:
                raise _WireError(f"wire type {key & 7}")
        if at > len(view) or key >> 3 == 0:
            raise _WireError("field runs over the end")
        yield key >> 3, start, begin, at


_MODEL_GRAPH: Final = 7
_GRAPH_INITIALIZER: Final = 5
_TENSOR_RAW_DATA: Final = 9


def _scan(view: memoryview) -> tuple[bytes, dict[int, Buffer]]:
    """Split a serialized model into its bytes without the large raw_data of root initializers, and views of those."""
    raws: dict[int, Buffer] = {}
    model: list[Buffer] = []
    for number, start, begin, end in _fields(view):
        if number != _MODEL_GRAPH:
            model.append(view[start:end])
            continue
        graph, index, body = view[begin:end], 0, list[Buffer]()
        for field, field_start, field_begin, field_end in _fields(graph):
            piece: Buffer = graph[field_start:field_end]
            if field == _GRAPH_INITIALIZER:
                if field_end - field_begin > _MAP_ABOVE:
                    tensor = graph[field_begin:field_end]
                    kept = list[Buffer]()
                    for part, part_start, part_begin, part_end in _fields(tensor):
                        if part == _TENSOR_RAW_DATA and part_end - part_begin > _MAP_ABOVE:
                            raws[index] = tensor[part_begin:part_end]
                        else:
                            kept.append(tensor[part_start:part_end])
                    piece = _message(_GRAPH_INITIALIZER, b"".join(kept))
                index += 1
            body.append(piece)
        model.append(_message(_MODEL_GRAPH, b"".join(body)))
    return b"".join(model), raws


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, payload: Buffer) -> bytes:
    return b"".join((_encode_varint(number << 3 | 2), _encode_varint(len(payload)), payload))


class _Reader:
    """ModelProto -> Model."""

    def __init__(self, proto: onnx.ModelProto, source: Path | None, raws: dict[int, Buffer]) -> None:
        self.proto = proto
        self.source = source
        self.raws = raws
        self.maps: dict[str, memoryview] = {}
        self.initializer_depth = 0

    def model(self) -> Model:
        functions = [self.function(f) for f in self.proto.functions]
        graph = self.graph(self.proto.graph, {}, self.raws)
        graph.opset = next((o.version for o in self.proto.opset_import if _domain(o.domain) == ""), 0)
        graph.import_domains = self.proto.opset_import
        graph._functions = functions
        carried = onnx.ModelProto()
        carried.CopyFrom(_without(self.proto, "graph", "functions"))
        graph.ir_version = carried.ir_version
        graph.producer_name, graph.producer_version = carried.producer_name, carried.producer_version
        return Model(graph, carried, self.source)

    def graph(self, proto: onnx.GraphProto, outer: dict[str, gs.Tensor], raws: dict[int, Buffer]) -> Graph:
        graph = Graph(name=proto.name)
        graph.carried = _without(proto, "node", "initializer", "sparse_initializer", "input", "output", "value_info")
        known: dict[str, gs.Tensor] = {}  # declared or produced here
        where = f"graph {proto.name!r}"

        def declare(tensor: gs.Tensor, what: str) -> None:
            if tensor.name in known:
                raise InvalidModel(f"{where}: {what} {tensor.name!r} is defined twice; every value needs one name")
            known[tensor.name] = tensor

        for index, initializer in enumerate(proto.initializer):
            constant = Constant(initializer.name, self.values(initializer, raws.get(index)))
            declare(constant, "initializer")
            graph.initializers.append(constant)
        for sparse in proto.sparse_initializer:
            constant = Constant(sparse.values.name, SparseStoredValues(sparse))
            declare(constant, "initializer")
            graph.initializers.append(constant)

        for info in proto.input:
            present = known.get(info.name)
            if isinstance(present, Constant) and present.carried is None:
                present.carried = info
                graph.inputs.append(present)
                continue
            variable = self.variable(info)
            declare(variable, "input")
            graph.inputs.append(variable)

        infos = {info.name: info for info in proto.value_info}
        infos.update((info.name, info) for info in proto.output)
        produced: set[str] = set()
        pending: dict[str, Variable] = {}  # used before it is produced: unsorted input, or a name that nobody defines

        def lookup(name: str) -> gs.Tensor:
            if not name:
                return Variable("")
            tensor = known.get(name) or pending.get(name) or outer.get(name)
            if tensor is None:
                pending[name] = tensor = self.variable(infos.get(name) or onnx.ValueInfoProto(name=name))
            return tensor

        def define(name: str, node: onnx.NodeProto) -> gs.Tensor:
            if not name:
                return Variable("")
            if name in produced or name in known:
                raise InvalidModel(f"{where}: {name!r} is defined twice, the second time by node {_node_name(node)}")
            produced.add(name)
            tensor = pending.pop(name, None) or self.variable(infos.get(name) or onnx.ValueInfoProto(name=name))
            known[name] = tensor
            return tensor

        # Bodies capture values of this graph, so all names must exist before the first body is read.
        order = proto.node
        later: list[tuple[Node, onnx.NodeProto]] = []
        for proto_node in order:
            inputs = [lookup(name) for name in proto_node.input]
            outputs = [define(name, proto_node) for name in proto_node.output]
            node = Node(proto_node.op_type, proto_node.name, None, inputs, outputs, proto_node.domain)
            node.carried = _without(proto_node, "input", "output", "attribute")
            node.origin = (proto_node.name or (proto_node.output[0] if proto_node.output else proto_node.op_type),)
            later.append((node, proto_node))
            graph.nodes.append(node)

        scope = {**outer, **known}
        for node, proto_node in later:
            for attribute in proto_node.attribute:
                node.attrs[attribute.name] = self.attribute(attribute, scope)
                node.attr_types[attribute.name] = attribute.type

        for info in proto.output:
            tensor = known.get(info.name) or outer.get(info.name)
            if tensor is None:
                raise InvalidModel(f"{where}: output {info.name!r} is produced by no node; name one of its nodes' outputs")
            if isinstance(tensor, Constant) or any(tensor is t for t in graph.inputs):
                tensor.carried = tensor.carried or info
            graph.outputs.append(tensor)
        if pending:
            name, tensor = next(iter(pending.items()))
            user = tensor.outputs[0]
            near = difflib.get_close_matches(name, scope, n=1)
            raise InvalidModel(
                f"{where}: node {user.name!r} ({user.op}) reads {name!r}, which nothing defines"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        return graph

    def function(self, proto: onnx.FunctionProto) -> Function:
        function = Function(proto.name, proto.domain, nodes=[], inputs=[], outputs=[], opset=None, attrs={})
        function.carried = proto
        return function

    def attribute(self, proto: onnx.AttributeProto, scope: dict[str, gs.Tensor]) -> Any:
        if proto.ref_attr_name:
            return proto
        match proto.type:
            case onnx.AttributeProto.FLOAT:
                return proto.f
            case onnx.AttributeProto.INT:
                return proto.i
            case onnx.AttributeProto.STRING:
                return _decode(proto.s)
            case onnx.AttributeProto.FLOATS:
                return list(proto.floats)
            case onnx.AttributeProto.INTS:
                return list(proto.ints)
            case onnx.AttributeProto.STRINGS:
                return [_decode(s) for s in proto.strings]
            case onnx.AttributeProto.TENSOR:
                return Constant(proto.t.name, self.values(proto.t, None))
            case onnx.AttributeProto.GRAPH:
                return self.graph(proto.g, scope, {})
            case onnx.AttributeProto.GRAPHS:
                return [self.graph(g, scope, {}) for g in proto.graphs]
            case _:
                return proto

    def variable(self, info: onnx.ValueInfoProto) -> Variable:
        variable = Variable(info.name)
        variable.carried = info
        kind = info.type.WhichOneof("value")
        variable.type = kind or "tensor_type"
        if kind == "tensor_type":
            tensor = info.type.tensor_type
            variable.dtype = numpy_dtype(tensor.elem_type) if tensor.elem_type else None
            if tensor.HasField("shape"):
                variable.shape = _shape_of(tensor.shape)
        return variable

    def values(self, proto: onnx.TensorProto, raw: Buffer | None) -> StoredValues:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raw = self.external(proto)
        values = StoredValues(proto, raw)
        if raw is not None or proto.HasField("raw_data"):
            size, expected = len(raw if raw is not None else proto.raw_data), _stored_bytes(values.dtype, values.shape)
            if size != expected:
                raise InvalidModel(
                    f"initializer {proto.name!r}: {size} bytes of data, {expected} expected for "
                    f"{values.dtype.name}[{','.join(map(str, values.shape))}]; the file is damaged"
                )
        return values

    def external(self, proto: onnx.TensorProto) -> Buffer:
        """The mapped bytes of an external tensor.

        Raises:
            InvalidModel: the file is missing, too short, or outside the model's folder.
        """
        entries = {e.key: e.value for e in proto.external_data}
        location = entries.get("location", "")
        if self.source is None:
            raise InvalidModel(f"initializer {proto.name!r} lies in {location!r}, but the model came without a folder; load it by path")
        view = self.maps.get(location)
        if view is None:
            self.maps[location] = view = _map_beside(self.source, location, proto.name)
        try:
            offset = int(entries.get("offset") or 0)
            expected = _stored_bytes(numpy_dtype(proto.data_type), proto.dims)
            length = int(entries.get("length") or expected)
        except ValueError:
            raise InvalidModel(f"initializer {proto.name!r}: offset or length of its external data is no number") from None
        if offset < 0 or length < 0 or offset + length > len(view):
            raise InvalidModel(
                f"initializer {proto.name!r} needs bytes {offset} to {offset + length} of {location!r}, which has {len(view)}; "
                "copy the file again"
            )
        return view[offset : offset + length]


def _map_beside(model: Path, location: str, tensor: str) -> memoryview:
    folders = {model.parent.resolve(), model.resolve().parent}
    path = model.parent / location
    resolved = path.resolve()
    if not location or Path(location).is_absolute() or "://" in location or not any(resolved.is_relative_to(f) for f in folders):
        raise InvalidModel(
            f"initializer {tensor!r} points at {location!r}, outside the model's folder; refused: put the file beside the model"
        )
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidModel(
            f"initializer {tensor!r}: external data {location!r} cannot be read ({reason}); it belongs beside {str(model)!r}"
        ) from None


def _without(proto: Any, *fields: str) -> Any:
    """A copy of a message without `fields`; those are never copied, however large they are."""
    copy = type(proto)()
    for descriptor, value in proto.ListFields():
        if descriptor.name in fields:
            continue
        if isinstance(value, str | bytes | int | float):
            setattr(copy, descriptor.name, value)
        elif hasattr(value, "CopyFrom"):
            getattr(copy, descriptor.name).CopyFrom(value)
        else:
            getattr(copy, descriptor.name).extend(value)
    return copy


def _decode(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _shape_of(proto: onnx.TensorShapeProto) -> Shape:
    dims: list[Dim] = []
    for dim in proto.dim:
        kind = dim.WhichOneof("value")
        dims.append(dim.dim_value if kind == "dim_value" else (dim.dim_param or None) if kind == "dim_param" else None)
    return tuple(dims)


def _node_name(node: onnx.NodeProto) -> str:
    return f"{node.name!r} ({node.op_type})"


# ----------------------------------------------------------------------------------------------------------- save


class _Writer:
    """Model -> ModelProto."""

    def __init__(self, model: Model, embed: Callable[[Constant], bool]) -> None:
        self.source = model
        self.embed = embed
        declared = {id(c) for g in model.graphs() for c in g.initializers}
        # A constant made by a pass has no home yet: the root graph is visible from everywhere.
        self.homeless: dict[int, Constant] = {}
        for graph in model.graphs():
            for tensor in _referenced(graph):
                if isinstance(tensor, gs.Constant) and id(tensor) not in declared:
                    self.homeless.setdefault(id(tensor), tensor)

    def model(self) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.source.carried)
        self.graph(self.source.graph, proto.graph, list(self.homeless.values()))
        for function in self.source.functions:
            proto.functions.append(function.carried)
        return proto

    def graph(self, graph: Graph, proto: onnx.GraphProto, extra: list[Constant]) -> None:
        proto.CopyFrom(getattr(graph, "carried", None) or onnx.GraphProto())
        _set(proto, "name", graph.name or "")
        for constant in [*getattr(graph, "initializers", ()), *extra]:
            if isinstance(constant._values, SparseStoredValues):
                proto.sparse_initializer.add().CopyFrom(constant._values.sparse)
            else:
                self.tensor(constant, proto.initializer.add())
        border: set[int] = set()
        for tensor in graph.inputs:
            border.add(id(tensor))
            self.value_info(tensor, proto.input.add())
        for tensor in graph.outputs:
            border.add(id(tensor))
            self.value_info(tensor, proto.output.add())
        for node in graph.nodes:
            self.node(node, proto.node.add())
            for tensor in node.outputs:
                if id(tensor) not in border and tensor.name and _has_info(tensor):
                    self.value_info(tensor, proto.value_info.add())

    def node(self, node: gs.Node, proto: onnx.NodeProto) -> None:
        carried = getattr(node, "carried", None)
        if carried is not None:
            proto.CopyFrom(carried)
        for field, value in (("op_type", node.op), ("name", node.name or ""), ("domain", node.domain or "")):
            _set(proto, field, value)
        proto.input.extend(t.name for t in node.inputs)
        proto.output.extend(t.name for t in node.outputs)
        types = getattr(node, "attr_types", {})
        for name, value in node.attrs.items():
            self.attribute(node, name, value, types.get(name), proto.attribute.add())

    def attribute(self, node: gs.Node, name: str, value: Any, kind: int | None, proto: onnx.AttributeProto) -> None:
        if isinstance(value, onnx.AttributeProto):
            proto.CopyFrom(value)
            proto.name = name
            return
        kind = _attribute_type(node, name, value, kind)
        proto.name = name
        proto.type = kind
        match kind:
            case onnx.AttributeProto.FLOAT:
                proto.f = float(value)
            case onnx.AttributeProto.INT:
                proto.i = int(value)
            case onnx.AttributeProto.STRING:
                proto.s = value if isinstance(value, bytes) else value.encode()
            case onnx.AttributeProto.FLOATS:
                proto.floats.extend(float(v) for v in value)
            case onnx.AttributeProto.INTS:
                proto.ints.extend(int(v) for v in value)
            case onnx.AttributeProto.STRINGS:
                proto.strings.extend(v if isinstance(v, bytes) else v.encode() for v in value)
            case onnx.AttributeProto.TENSOR:
                self.tensor(value, proto.t, inline=True)
            case onnx.AttributeProto.GRAPH:
                self.graph(value, proto.g, [])
            case onnx.AttributeProto.GRAPHS:
                for graph in value:
                    self.graph(graph, proto.graphs.add(), [])

    def tensor(self, constant: gs.Constant, proto: onnx.TensorProto, inline: bool = False) -> None:
        values = constant._values
        if isinstance(values, StoredValues):
            for_copy = _without(values.tensor, "raw_data", "external_data", "data_location") if values.raw is not None else values.tensor
            proto.CopyFrom(for_copy)
        elif not inline and not self.embed(constant):
            proto.dims.extend(values.shape)
            proto.data_type = onnx_dtype(values.dtype)
        else:
            proto.CopyFrom(_tensor_proto(values))
        _set(proto, "name", constant.name or "")
        if not inline and not self.embed(constant):
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                proto.ClearField(field)
            proto.data_location = onnx.TensorProto.EXTERNAL
        elif isinstance(values, StoredValues) and values.raw is not None:
            proto.raw_data = bytes(values.raw)

    def value_info(self, tensor: gs.Tensor, proto: onnx.ValueInfoProto) -> None:
        carried = getattr(tensor, "carried", None)
        if carried is not None:
            proto.CopyFrom(carried)
        _set(proto, "name", tensor.name or "")
        if (getattr(tensor, "type", None) or "tensor_type") != "tensor_type":
            return
        described = proto.type.tensor_type
        if tensor.dtype is not None and described.elem_type != onnx_dtype(tensor.dtype):
            described.elem_type = onnx_dtype(tensor.dtype)
        shape = None if tensor.shape is None else tuple(tensor.shape)
        if shape is None:
            described.ClearField("shape")
        elif not described.HasField("shape") or _shape_of(described.shape) != shape:
            old = onnx.TensorShapeProto()
            old.CopyFrom(described.shape)
            described.shape.Clear()
            described.shape.SetInParent()
            for axis, dim in enumerate(shape):
                new = described.shape.dim.add()
                if len(old.dim) == len(shape):
                    new.denotation = old.dim[axis].denotation
                if isinstance(dim, str):
                    new.dim_param = dim
                elif dim is not None:
                    new.dim_value = int(dim)
        if not described.ListFields():
            proto.ClearField("type")


def _set(proto: Any, field: str, value: str) -> None:
    """Set a string field only where it differs: proto2 tells an empty string from an absent one, and we keep what was read."""
    if getattr(proto, field) != value:
        setattr(proto, field, value)


def _has_info(tensor: gs.Tensor) -> bool:
    carried = getattr(tensor, "carried", None)
    return tensor.dtype is not None or tensor.shape is not None or (carried is not None and len(carried.ListFields()) > 1)


def _attribute_type(node: gs.Node, name: str, value: Any, kind: int | None) -> int:
    """The AttributeProto type of a Python value; the one it was read with or the schema's where the value leaves it open."""
    kinds = onnx.AttributeProto
    if isinstance(value, gs.Graph):
        return int(kinds.GRAPH)
    if isinstance(value, gs.Constant):
        return int(kinds.TENSOR)
    if isinstance(value, str | bytes):
        return int(kinds.STRING)
    if isinstance(value, bool | int | np.integer):
        return int(kinds.FLOAT) if kind == kinds.FLOAT else int(kinds.INT)
    if isinstance(value, float | np.floating):
        return int(kinds.FLOAT)
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) == 0:
            if kind is not None:
                return kind
            with suppress(onnx.defs.SchemaError, KeyError):
                return int(onnx.defs.get_schema(node.op, node.domain or "").attributes[name].type.value)
            return int(kinds.INTS)
        first = value[0]
        if isinstance(first, gs.Graph):
            return int(kinds.GRAPHS)
        if isinstance(first, str | bytes):
            return int(kinds.STRINGS)
        if kind == kinds.FLOATS or any(isinstance(v, float | np.floating) for v in value):
            return int(kinds.FLOATS)
        return int(kinds.INTS)
    raise UnsupportedModel(f"node {node.name!r} ({node.op}): attribute {name!r} has no ONNX form ({type(value).__name__})")


def _tensor_proto(values: Array) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape))


def _raw(constant: Constant) -> Buffer:
    """The bytes of a constant as ONNX lays them out (little-endian, sub-byte types packed)."""
    values = constant._values
    if isinstance(values, StoredValues):
        if values.raw is not None:
            return values.raw
        if values.tensor.HasField("raw_data"):
            return bytes(values.tensor.raw_data)
        values = values.load()
    if values.dtype == object:
        return _tensor_proto(values).SerializeToString(deterministic=True)
    if packed_bits(onnx_dtype(values.dtype)):
        return bytes(_tensor_proto(values).raw_data)
    if sys.byteorder == "big":
        values = values.byteswap()
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def save(model: Model, path: str | os.PathLike[str], external: bool | None = None) -> list[Path]:
    """Write ``.onnx`` or, by that suffix, ``.onnxtxt``; returns the files written.

    Args:
        model: what to write.
        path: where; written beside and renamed, so that a failure leaves no partial file.
        external: weights into ``NAME.onnx.data`` beside the model; None: when they exceed 1.5 GB.

    Raises:
        OutputError: the place cannot be written or the disk is full.
        UnsupportedModel: the model does not fit protobuf's 2 GiB without its weights.
    """
    target = Path(path)
    if target.suffix == ".onnxtxt":
        with replacing(target) as file:
            file.write(model.text().encode())
        return [target]
    large = [c for c in model.constants() if c.nbytes > _MAP_ABOVE and not _is_sparse(c) and c.dtype != object]
    if external is None:
        external = sum(c.nbytes for c in large) > EXTERNAL_ABOVE
    if not external:
        with replacing(target) as file:
            _write_inline(model, large, file)
        return [target]
    data = target.with_name(target.name + ".data")
    places: dict[str, tuple[int, int]] = {}
    with replacing(target) as model_file, replacing(data) as data_file:
        for constant in large:
            offset = -(-data_file.tell() // 4096) * 4096  # pages, so that runtimes can map each tensor
            data_file.truncate(offset)
            data_file.seek(offset)
            places[constant.name] = (offset, data_file.write(_raw(constant)))
        moved = {id(c) for c in large}
        proto = model.to_proto(lambda c: id(c) not in moved)
        for tensor in _initializers(proto.graph):
            if tensor.name in places and tensor.data_location == onnx.TensorProto.EXTERNAL:
                offset, length = places[tensor.name]
                for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
                    tensor.external_data.add(key=key, value=value)
        model_file.write(_serialize(proto))
    return [target, data]


def saves(model: Model) -> bytes:
    """The bytes of a one-file ``.onnx``.

    Raises:
        UnsupportedModel: it would exceed protobuf's 2 GiB.
    """
    return _serialize(model.to_proto())


def _is_sparse(constant: Constant) -> bool:
    return isinstance(constant._values, SparseStoredValues)


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                yield from _initializers(body)


def _serialize(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (EncodeError, ValueError):
        raise UnsupportedModel("the model exceeds protobuf's 2 GiB; save it with external data") from None


def _write_inline(model: Model, large: list[Constant], file: IO[bytes]) -> None:
    """Write one file, streaming the large root initializers: their bytes pass from map to file and are held nowhere."""
    nested = {id(c) for g in list(model.graphs())[1:] for c in g.initializers}
    streamed = {c.name: c for c in large if id(c) not in nested}
    proto = model.to_proto(lambda c: c.name not in streamed or streamed[c.name] is not c)
    heads: list[tuple[bytes, Constant | None]] = []
    for tensor in proto.graph.initializer:
        constant = streamed.get(tensor.name)
        if constant is not None:
            tensor.ClearField("data_location")
        heads.append((tensor.SerializeToString(deterministic=True), constant))
    proto.graph.ClearField("initializer")
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")

    frames: list[tuple[bytes, Constant | None]] = []
    total = len(graph)
    for head, constant in heads:
        size = 0 if constant is None else constant.nbytes
        field = b"" if constant is None else _encode_varint(_TENSOR_RAW_DATA << 3 | 2) + _encode_varint(size)
        length = len(head) + len(field) + size
        frame = _encode_varint(_GRAPH_INITIALIZER << 3 | 2) + _encode_varint(length) + head + field
        frames.append((frame, constant))
        total += len(frame) + size
    if total >= 1 << 31:
        raise UnsupportedModel("the model exceeds protobuf's 2 GiB in one file; save it with external data")
    file.write(_serialize(proto))
    file.write(_encode_varint(_MODEL_GRAPH << 3 | 2) + _encode_varint(total) + graph)
    for frame, constant in frames:
        file.write(frame)
        if constant is not None:
            file.write(_raw(constant))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: it is a folder")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file  # type: ignore[misc]  # the wrapper has every method of IO
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "check the folder and its permissions"
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}; {advice}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_SAFE = re.compile(r"[^\w./:-]+")


def fresh_names(model: Model) -> Callable[[str], str]:
    """A function that turns a wish into a tensor or node name that the model does not use yet."""
    taken = {t.name for g in model.graphs() for t in [*g.inputs, *g.initializers]}
    for node in model.nodes():
        taken.add(node.name)
        taken.update(t.name for t in node.inputs)
        taken.update(t.name for t in node.outputs)

    def fresh(wish: str) -> str:
        base = _SAFE.sub("_", wish) or "value"
        name, number = base, 0
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        return name

    return fresh


__all__ = [
    "Constant",
    "Function",
    "Graph",
    "Model",
    "Node",
    "TensorSpec",
    "UserError",
    "Variable",
    "load",
    "loads",
    "parse",
    "save",
    "saves",
]
