"""Graph -> ModelProto and file; large weights stream from map to file and are held nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
    SparseStoredValues,
    StoredValues,
    onnx_dtype,
    packed_bits,
)
from graphopt.errors import UnsupportedModel
from graphopt.reading import shape_of, without
from graphopt.wire import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA, encode_varint, replacing

if TYPE_CHECKING:
    from graphopt.ir import Model


def referenced(graph: Graph) -> Iterator[gs.Tensor]:
    """Every tensor that a node of `graph` reads or the graph returns; bodies are not entered."""
    for node in graph.nodes:
        yield from node.inputs
    yield from graph.outputs


class Writer:
    """Writes one Model as a ModelProto; use once."""

    def __init__(self, model: Model, embed: Callable[[Constant], bool]) -> None:
        self.source = model
        self.embed = embed
        declared = {id(c) for g in model.graphs() for c in g.initializers}
        # A constant made by a pass has no home yet: the root graph is visible from everywhere.
        self.homeless: dict[int, Constant] = {}
        for graph in model.graphs():
            for tensor in referenced(graph):
                if isinstance(tensor, gs.Constant) and id(tensor) not in declared:
                    self.homeless.setdefault(id(tensor), tensor)

    def write(self) -> onnx.ModelProto:
        """The whole model."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.source.carried)
        self._graph(self.source.graph, proto.graph, list(self.homeless.values()))
        for function in self.source.functions:
            proto.functions.append(function.carried)
        return proto

    def _graph(self, graph: Graph, proto: onnx.GraphProto, extra: list[Constant]) -> None:
        proto.CopyFrom(getattr(graph, "carried", None) or onnx.GraphProto())
        _set(proto, "name", graph.name or "")
        for constant in [*getattr(graph, "initializers", ()), *extra]:
            if isinstance(constant._values, SparseStoredValues):
                proto.sparse_initializer.add().CopyFrom(constant._values.sparse)
            else:
                self._tensor(constant, proto.initializer.add())
        border: set[int] = set()
        for tensor in graph.inputs:
            border.add(id(tensor))
            self._value_info(tensor, proto.input.add())
        for tensor in graph.outputs:
            border.add(id(tensor))
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
        types = getattr(node, "attr_types", {})
        for name, value in node.attrs.items():
            self._attribute(node, name, value, types.get(name), proto.attribute.add())

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
        if isinstance(values, StoredValues):
            for_copy = (
                without(values.tensor, "raw_data", "external_data", "data_location")
                if values.raw is not None
                else values.tensor
            )
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

    def _value_info(self, tensor: gs.Tensor, proto: onnx.ValueInfoProto) -> None:
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
        elif not described.HasField("shape") or shape_of(described.shape) != shape:
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
    return (
        tensor.dtype is not None or tensor.shape is not None or (carried is not None and len(carried.ListFields()) > 1)
    )


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


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                yield from _initializers(body)


def serialize(proto: onnx.ModelProto) -> bytes:
    """The bytes of a ModelProto, the same for equal protos.

    Raises:
        UnsupportedModel: more than protobuf's 2 GiB.
    """
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (EncodeError, ValueError):
        raise UnsupportedModel("the model exceeds protobuf's 2 GiB; save it with external data") from None


def write_inline(model: Model, large: list[Constant], file: IO[bytes]) -> None:
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
            file.write(raw_bytes(constant))


def write_external(model: Model, large: list[Constant], target: Path) -> Path:
    """Write the model and, page by page, its large constants into ``NAME.onnx.data`` beside it; returns that path."""
    data = target.with_name(target.name + ".data")
    places: dict[str, tuple[int, int]] = {}
    with replacing(target) as model_file, replacing(data) as data_file:
        for constant in large:
            offset = -(-data_file.tell() // 4096) * 4096  # whole pages, so that runtimes can map each tensor
            data_file.truncate(offset)
            data_file.seek(offset)
            places[constant.name] = (offset, data_file.write(raw_bytes(constant)))
        moved = {id(c) for c in large}
        proto = model.to_proto(lambda c: id(c) not in moved)
        for tensor in _initializers(proto.graph):
            if tensor.name in places and tensor.data_location == onnx.TensorProto.EXTERNAL:
                offset, length = places[tensor.name]
                for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
                    tensor.external_data.add(key=key, value=value)
        model_file.write(serialize(proto))
    return data
