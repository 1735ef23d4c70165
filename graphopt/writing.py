"""Graph -> ModelProto and file; large weights stream from map to file and are held nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from google.protobuf.message import EncodeError

from graphopt.elements import (
    Array,
    Buffer,
    Constant,
    Graph,
    Shape,
    SparseStoredValues,
    StoredValues,
    onnx_dtype,
    packed_bits,
)
from graphopt.errors import UnsupportedModel
from graphopt.reading import shape_of, without
from graphopt.wire import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA, encode_varint, pieces, replacing, settle

if TYPE_CHECKING:
    from graphopt.ir import Model

PAGE: Final = 4096
_VALUES: Final = (
    "raw_data",
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "external_data",
    "data_location",
)


def referenced(graph: Graph) -> Iterator[gs.Tensor]:
    """Every tensor that a node of `graph` reads or the graph returns; bodies are not entered."""
    for node in graph.nodes:
        yield from node.inputs
    yield from graph.outputs


class Writer:
    """Writes one Model as a ModelProto; use once.

    Attributes:
        left_out: the constants written without values, as `embed` asked, and their protos.
    """

    def __init__(self, model: Model, embed: Callable[[Constant], bool]) -> None:
        self.source = model
        self.embed = embed
        self.left_out: list[tuple[Constant, onnx.TensorProto]] = []

    def write(self) -> onnx.ModelProto:
        """The whole model.

        Raises:
            UnsupportedModel: an element type or attribute that ONNX cannot express.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.source.carried)
        self._graph(self.source.graph, proto.graph, homeless(self.source))
        for function in self.source.functions:
            proto.functions.append(function.carried)
        return proto

    def _graph(self, graph: Graph, proto: onnx.GraphProto, extra: list[Constant]) -> None:
        proto.CopyFrom(getattr(graph, "carried", None) or onnx.GraphProto())
        _set(proto, "name", graph.name or "")
        if proto.value_info:  # carried: of names that no tensor had when the file was read
            made = {t.name for node in graph.nodes for t in node.outputs}
            del proto.value_info[:]
            proto.value_info.extend(info for info in graph.carried.value_info if info.name not in made)
        border = {id(t) for t in [*graph.inputs, *graph.outputs]}
        for constant in [*getattr(graph, "initializers", ()), *extra]:
            if isinstance(constant._values, SparseStoredValues):
                proto.sparse_initializer.add().CopyFrom(constant._values.sparse)
                _set(proto.sparse_initializer[-1].values, "name", constant.name)
            else:
                self._tensor(constant, proto.initializer.add())
            if getattr(constant, "carried", None) is not None and id(constant) not in border:
                self._value_info(constant, proto.value_info.add())
        for tensor in graph.inputs:
            self._value_info(tensor, proto.input.add())
        for tensor in graph.outputs:
            self._value_info(tensor, proto.output.add())
        for node in graph.nodes:
            self._node(node, proto.node.add())
            for tensor in node.outputs:
                if id(tensor) not in border and tensor.name and _has_info(tensor):
                    self._value_info(tensor, proto.value_info.add())

    def _node(self, node: gs.Node, proto: onnx.NodeProto) -> None:
        carried = getattr(node, "carried", None)
        if carried is not None:
            proto.CopyFrom(carried)
        for field, value in (("op_type", node.op), ("name", node.name or ""), ("domain", node.domain or "")):
            _set(proto, field, value)
        proto.input.extend(t.name for t in node.inputs)
        proto.output.extend(t.name for t in node.outputs)
        types, docs = getattr(node, "attr_types", {}), getattr(node, "attr_docs", {})
        for name, value in node.attrs.items():
            attribute = proto.attribute.add()
            self._attribute(node, name, value, types.get(name), attribute)
            if name in docs:
                attribute.MergeFrom(onnx.AttributeProto(doc_string=docs[name]))

    def _attribute(self, node: gs.Node, name: str, value: Any, kind: int | None, proto: onnx.AttributeProto) -> None:
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
                self._tensor(value, proto.t, inline=True)
            case onnx.AttributeProto.GRAPH:
                self._graph(value, proto.g, [])
            case onnx.AttributeProto.GRAPHS:
                for graph in value:
                    self._graph(graph, proto.graphs.add(), [])

    def _tensor(self, constant: gs.Constant, proto: onnx.TensorProto, inline: bool = False) -> None:
        values = constant._values
        inline = inline or self.embed(constant)
        if isinstance(values, StoredValues):
            proto.CopyFrom(values.tensor if inline and values.raw is None else without(values.tensor, *_VALUES))
            if inline and values.raw is not None:
                proto.raw_data = bytes(values.raw)
        elif inline:
            proto.CopyFrom(_tensor_proto(values))
        else:
            proto.dims.extend(values.shape)
            proto.data_type = onnx_dtype(values.dtype)
        _set(proto, "name", constant.name or "")
        if not inline:
            proto.data_location = onnx.TensorProto.EXTERNAL
            self.left_out.append((constant, proto))

    def _value_info(self, tensor: gs.Tensor, proto: onnx.ValueInfoProto) -> None:
        carried = getattr(tensor, "carried", None)
        if carried is not None:
            proto.CopyFrom(carried)
        _set(proto, "name", tensor.name or "")
        if (getattr(tensor, "type", None) or "tensor_type") != "tensor_type":
            return
        known = proto.type.tensor_type
        kind = 0 if tensor.dtype is None else onnx_dtype(tensor.dtype)
        if kind:
            _set(proto.type.tensor_type, "elem_type", kind)
        elif known.elem_type:
            known.ClearField("elem_type")
        if isinstance(tensor, gs.Constant) and known.HasField("shape"):
            return  # the default of an input may be one of the shapes that the input admits
        if tensor.shape is None:
            if known.HasField("shape"):
                known.ClearField("shape")
        elif not known.HasField("shape") or shape_of(known.shape) != tuple(tensor.shape):
            _write_shape(tuple(tensor.shape), proto.type.tensor_type.shape)


def _set(proto: Any, field: str, value: str | int) -> None:
    """Set a field only where it differs: proto2 tells an empty string from an absent one, and we keep what was read."""
    if getattr(proto, field) != value:
        setattr(proto, field, value)


def _write_shape(shape: Shape, proto: onnx.TensorShapeProto) -> None:
    """Put `shape` in place of the one in `proto`, whose denotations stay where the rank does."""
    denotations = [d.denotation for d in proto.dim]
    proto.ClearField("dim")
    proto.SetInParent()  # rank 0 is a shape, too
    for axis, dim in enumerate(shape):
        new = proto.dim.add()
        if isinstance(dim, str):
            new.dim_param = dim
        elif dim is not None:
            new.dim_value = int(dim)
        if len(denotations) == len(shape) and denotations[axis]:
            new.denotation = denotations[axis]


def _has_info(tensor: gs.Tensor) -> bool:
    carried = getattr(tensor, "carried", None)
    return (
        tensor.dtype is not None or tensor.shape is not None or (carried is not None and len(carried.ListFields()) > 1)
    )


def homeless(model: Model) -> list[Constant]:
    """Constants that passes made and no graph declares; they are written into the root graph, visible from everywhere."""
    declared = {id(c) for g in model.graphs() for c in g.initializers}
    found: dict[int, Constant] = {}
    for graph in model.graphs():
        for tensor in referenced(graph):
            if isinstance(tensor, gs.Constant) and id(tensor) not in declared:
                found.setdefault(id(tensor), tensor)
    return list(found.values())


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
    raise UnsupportedModel(
        f"node {node.name!r} ({node.op}): attribute {name!r} has no ONNX form ({type(value).__name__})"
    )


def _tensor_proto(values: Array) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape))


def raw_bytes(constant: Constant) -> Buffer:
    """The bytes of a constant as ONNX lays them out (little-endian, sub-byte types packed)."""
    values: Any = constant._values
    if isinstance(values, StoredValues):
        if values.raw is not None:
            return values.raw
        if values.tensor.HasField("raw_data"):
            return bytes(values.tensor.raw_data)
        values = values.load()
    if values.dtype.kind == "O":
        return bytes(_tensor_proto(values).SerializeToString(deterministic=True))
    if packed_bits(onnx_dtype(values.dtype)):
        return bytes(_tensor_proto(values).raw_data)
    if sys.byteorder == "big":
        values = values.byteswap()
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def is_sparse(constant: Constant) -> bool:
    """Whether it is a sparse initializer."""
    return isinstance(constant._values, SparseStoredValues)


def serialize(proto: Any) -> bytes:
    """The bytes of a message, the same for equal messages.

    Raises:
        UnsupportedModel: more than protobuf's 2 GiB.
    """
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (EncodeError, ValueError):
        raise UnsupportedModel("the model exceeds protobuf's 2 GiB; save it with external data") from None


def write_inline(model: Model, large: list[Constant], file: IO[bytes]) -> None:
    """Write one file, streaming the `large` root initializers: their bytes pass from map to file and are held nowhere.

    Raises:
        UnsupportedModel: more than protobuf's 2 GiB.
    """
    nested = {id(c) for g in list(model.graphs())[1:] for c in g.initializers}
    streamed = {id(c) for c in large if id(c) not in nested}
    writer = Writer(model, lambda c: id(c) not in streamed)
    proto = writer.write()
    left_out = iter([constant for constant, _ in writer.left_out])
    heads: list[tuple[bytes, Constant | None]] = []
    for tensor in proto.graph.initializer:
        constant = next(left_out) if tensor.data_location == onnx.TensorProto.EXTERNAL else None
        tensor.ClearField("data_location")
        heads.append((serialize(tensor), constant))
    proto.graph.ClearField("initializer")
    graph = serialize(proto.graph)
    proto.ClearField("graph")

    frames: list[tuple[bytes, Constant | None]] = []
    total = len(graph)
    for head, constant in heads:
        size = 0 if constant is None else constant.nbytes
        field = b"" if constant is None else encode_varint(TENSOR_RAW_DATA << 3 | 2) + encode_varint(size)
        length = len(head) + len(field) + size
        frame = encode_varint(GRAPH_INITIALIZER << 3 | 2) + encode_varint(length) + head + field
        frames.append((frame, constant))
        total += len(frame) + size
    if total >= 1 << 31:
        raise UnsupportedModel("the model exceeds protobuf's 2 GiB in one file; save it with external data")
    file.write(serialize(proto))
    file.write(encode_varint(MODEL_GRAPH << 3 | 2) + encode_varint(total) + graph)
    for frame, constant in frames:
        file.write(frame)
        if constant is not None:
            file.writelines(pieces(raw_bytes(constant)))


def write_external(model: Model, large: list[Constant], target: Path) -> Path:
    """Write the model and, page by page, its `large` constants into ``NAME.onnx.data`` beside it; returns that path.

    Raises:
        OutputError: as `replacing`; neither file is touched then.
        UnsupportedModel: the model does not fit protobuf's 2 GiB without its weights.
    """
    data = target.with_name(target.name + ".data")
    places: dict[int, tuple[int, int]] = {}
    moved = {id(c) for c in large}
    with replacing(target) as model_file, replacing(data) as data_file:
        for constant in large:
            offset = -(-data_file.tell() // PAGE) * PAGE  # whole pages, so that runtimes can map each tensor
            data_file.seek(offset)
            data_file.writelines(pieces(raw_bytes(constant)))
            places[id(constant)] = (offset, constant.nbytes)
        writer = Writer(model, lambda c: id(c) not in moved)
        proto = writer.write()
        for constant, tensor in writer.left_out:
            offset, length = places[id(constant)]
            for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
                tensor.external_data.add(key=key, value=value)
        model_file.write(serialize(proto))
        settle(model_file)  # before either file takes its place: a model never meets the data of another
    return data
