"""ModelProto -> graph: every field that the IR does not model is carried along."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from graphopt.elements import (
    Buffer,
    Constant,
    Dim,
    Function,
    Graph,
    Node,
    Shape,
    SparseStoredValues,
    StoredValues,
    Variable,
    numpy_dtype,
    stored_bytes,
)
from graphopt.errors import InvalidModel
from graphopt.wire import map_beside


def domain_of(text: str | None) -> str:
    """The one spelling of a domain: the default one is ``""``."""
    return "" if text in (None, "ai.onnx") else str(text)


class Reader:
    """Builds the graph of one ModelProto; use once."""

    def __init__(self, proto: onnx.ModelProto, source: Path | None, raws: dict[int, Buffer]) -> None:
        self.proto = proto
        self.source = source
        self.raws = raws
        self.maps: dict[str, memoryview] = {}

    def read(self) -> tuple[Graph, onnx.ModelProto]:
        """The graph, and the ModelProto without graph and functions."""
        functions = [self._function(f) for f in self.proto.functions]
        graph = self._graph(self.proto.graph, {}, self.raws)
        graph.opset = next((o.version for o in self.proto.opset_import if domain_of(o.domain) == ""), 0)
        graph.import_domains = self.proto.opset_import
        graph._functions = functions
        carried = onnx.ModelProto()
        carried.CopyFrom(without(self.proto, "graph", "functions"))
        graph.ir_version = carried.ir_version
        graph.producer_name, graph.producer_version = carried.producer_name, carried.producer_version
        return graph, carried

    def _graph(self, proto: onnx.GraphProto, outer: dict[str, gs.Tensor], raws: dict[int, Buffer]) -> Graph:
        graph = Graph(name=proto.name)
        graph.carried = without(proto, "node", "initializer", "sparse_initializer", "input", "output", "value_info")
        known: dict[str, gs.Tensor] = {}  # declared or produced here
        where = f"graph {proto.name!r}"

        def declare(tensor: gs.Tensor, what: str) -> None:
            if tensor.name in known:
                raise InvalidModel(f"{where}: {what} {tensor.name!r} is defined twice; every value needs one name")
            known[tensor.name] = tensor

        for index, initializer in enumerate(proto.initializer):
            constant = Constant(initializer.name, self._values(initializer, raws.get(index)))
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
            variable = self._variable(info)
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
                pending[name] = tensor = self._variable(infos.get(name) or onnx.ValueInfoProto(name=name))
            return tensor

        def define(name: str, node: onnx.NodeProto) -> gs.Tensor:
            if not name:
                return Variable("")
            if name in produced or name in known:
                raise InvalidModel(f"{where}: {name!r} is defined twice, the second time by node {_node_name(node)}")
            produced.add(name)
            tensor = pending.pop(name, None) or self._variable(infos.get(name) or onnx.ValueInfoProto(name=name))
            known[name] = tensor
            return tensor

        # Bodies capture values of this graph, so all names must exist before the first body is read.
        order = proto.node
        later: list[tuple[Node, onnx.NodeProto]] = []
        for proto_node in order:
            inputs = [lookup(name) for name in proto_node.input]
            outputs = [define(name, proto_node) for name in proto_node.output]
            node = Node(proto_node.op_type, proto_node.name, None, inputs, outputs, proto_node.domain)
            node.carried = without(proto_node, "input", "output", "attribute")
            node.origin = (proto_node.name or (proto_node.output[0] if proto_node.output else proto_node.op_type),)
            later.append((node, proto_node))
            graph.nodes.append(node)

        scope = {**outer, **known}
        for node, proto_node in later:
            for attribute in proto_node.attribute:
                node.attrs[attribute.name] = self._attribute(attribute, scope)
                node.attr_types[attribute.name] = attribute.type

        for info in proto.output:
            tensor = known.get(info.name) or outer.get(info.name)
            if tensor is None:
                raise InvalidModel(
                    f"{where}: output {info.name!r} is produced by no node; name one of its nodes' outputs"
                )
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

    def _function(self, proto: onnx.FunctionProto) -> Function:
        function = Function(proto.name, proto.domain, nodes=[], inputs=[], outputs=[], opset=None, attrs={})
        function.carried = proto
        return function

    def _attribute(self, proto: onnx.AttributeProto, scope: dict[str, gs.Tensor]) -> Any:
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
                return Constant(proto.t.name, self._values(proto.t, None))
            case onnx.AttributeProto.GRAPH:
                return self._graph(proto.g, scope, {})
            case onnx.AttributeProto.GRAPHS:
                return [self._graph(g, scope, {}) for g in proto.graphs]
            case _:
                return proto

    def _variable(self, info: onnx.ValueInfoProto) -> Variable:
        variable = Variable(info.name)
        variable.carried = info
        kind = info.type.WhichOneof("value")
        variable.type = kind or "tensor_type"
        if kind == "tensor_type":
            tensor = info.type.tensor_type
            variable.dtype = numpy_dtype(tensor.elem_type) if tensor.elem_type else None
            if tensor.HasField("shape"):
                variable.shape = shape_of(tensor.shape)
        return variable

    def _values(self, proto: onnx.TensorProto, raw: Buffer | None) -> StoredValues:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raw = self._external(proto)
        values = StoredValues(proto, raw)
        if raw is not None or proto.HasField("raw_data"):
            size, expected = len(raw if raw is not None else proto.raw_data), stored_bytes(values.dtype, values.shape)
            if size != expected:
                raise InvalidModel(
                    f"initializer {proto.name!r}: {size} bytes of data, {expected} expected for "
                    f"{values.dtype.name}[{','.join(map(str, values.shape))}]; the file is damaged"
                )
        return values

    def _external(self, proto: onnx.TensorProto) -> Buffer:
        """The mapped bytes of an external tensor.

        Raises:
            InvalidModel: the file is missing, too short, or outside the model's folder.
        """
        entries = {e.key: e.value for e in proto.external_data}
        location = entries.get("location", "")
        if self.source is None:
            raise InvalidModel(
                f"initializer {proto.name!r} lies in {location!r}, but the model came without a folder; load it by path"
            )
        view = self.maps.get(location)
        if view is None:
            self.maps[location] = view = map_beside(self.source, location, proto.name)
        try:
            offset = int(entries.get("offset") or 0)
            expected = stored_bytes(numpy_dtype(proto.data_type), proto.dims)
            length = int(entries.get("length") or expected)
        except ValueError:
            raise InvalidModel(
                f"initializer {proto.name!r}: offset or length of its external data is no number"
            ) from None
        if offset < 0 or length < 0 or offset + length > len(view):
            raise InvalidModel(
                f"initializer {proto.name!r} needs bytes {offset} to {offset + length} of {location!r}, which has {len(view)}; "
                "copy the file again"
            )
        return view[offset : offset + length]


def without(proto: Any, *fields: str) -> Any:
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


def shape_of(proto: onnx.TensorShapeProto) -> Shape:
    """Dimensions as int, symbol, or None where nothing is said."""
    dims: list[Dim] = []
    for dim in proto.dim:
        kind = dim.WhichOneof("value")
        dims.append(dim.dim_value if kind == "dim_value" else (dim.dim_param or None) if kind == "dim_param" else None)
    return tuple(dims)


def _node_name(node: onnx.NodeProto) -> str:
    return f"{node.name!r} ({node.op_type})"
