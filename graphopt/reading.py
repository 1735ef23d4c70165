"""ModelProto -> graph: every field that the IR does not model is carried along."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.unknown_fields import UnknownFieldSet

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
    decode,
    dtype_name,
    numpy_dtype,
    packed_bits,
    stored_bytes,
)
from graphopt.errors import InvalidModel, UnsupportedModel, closest
from graphopt.wire import encode_varint, map_beside

MOST_NESTED: Final = 33  # bodies in bodies: protobuf admits 100 messages in one another, and a body takes three
MOST_NODES: Final = 500_000  # with bodies and functions; the largest exports have a fifth of it
_MOST_CLAIMS: Final = 16  # times that tensors may share the bytes of an external file, as tied weights do
_FREE_CLAIMS: Final = 1 << 28  # bytes up to which nobody counts
_MOST_AXES: Final = 64  # NumPy's limit

Scope = ChainMap[str, gs.Tensor]


def domain_of(text: str | bytes | None) -> str:
    """The one spelling of a domain: the default one is ``""``."""
    return "" if text in (None, "ai.onnx") else _text(text, "a domain")


class Reader:
    """Builds the graph of one ModelProto; use once."""

    def __init__(self, proto: onnx.ModelProto, source: Path | None, raws: dict[int, Buffer]) -> None:
        self.proto = proto
        self.source = source
        self.raws = raws
        self.maps: dict[str, memoryview] = {}
        self.depth = 0
        self.nodes = 0
        self.claimed: dict[str, int] = {}  # bytes of a file that tensors name as theirs

    def read(self) -> tuple[Graph, onnx.ModelProto]:
        """The graph, and the ModelProto without graph and functions."""
        known: set[tuple[str, str, str]] = set()
        for function in self.proto.functions:
            self._count(function.node)
            key = (domain_of(function.domain), function.name, getattr(function, "overload", ""))
            if key in known:
                raise InvalidModel(f"function {function.name!r} is defined twice; keep one")
            known.add(key)
        functions = [_function(f) for f in self.proto.functions]
        graph = self._graph(self.proto.graph, ChainMap(), self.raws)
        graph.opset = next((o.version for o in self.proto.opset_import if domain_of(o.domain) == ""), 0)
        graph.import_domains = self.proto.opset_import
        graph._functions = functions
        carried = without(self.proto, "graph", "functions")
        graph.ir_version = carried.ir_version
        graph.producer_name, graph.producer_version = carried.producer_name, carried.producer_version
        return graph, carried

    def _count(self, nodes: Sized) -> None:
        self.nodes += len(nodes)
        if self.nodes > MOST_NODES:
            raise UnsupportedModel(f"more than {MOST_NODES:,} nodes, which is what graphopt admits: split the model")

    def _graph(self, proto: onnx.GraphProto, outer: Scope, raws: dict[int, Buffer]) -> Graph:
        if self.depth > MOST_NESTED:
            raise UnsupportedModel(
                f"graph {proto.name!r} lies {self.depth} bodies deep; protobuf admits {MOST_NESTED}: flatten the model's control flow"
            )
        self._count(proto.node)
        graph = Graph(name=_text(proto.name, "a graph"))
        graph.carried = without(proto, "node", "initializer", "sparse_initializer", "input", "output", "value_info")
        where = f"graph {proto.name!r}"
        known = self._declarations(proto, graph, raws)  # declared or produced here
        infos = {_text(info.name, "a value"): info for info in proto.value_info}
        infos.update((_text(info.name, "an output"), info) for info in proto.output)
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
            if name in known:
                raise InvalidModel(
                    f"{where}: {name!r} is defined twice, the second time by node {node.name!r} ({node.op_type}); rename one"
                )
            known[name] = pending.pop(name, None) or self._variable(infos.get(name) or onnx.ValueInfoProto(name=name))
            return known[name]

        # Bodies capture values of this graph, whatever the order of the nodes: all names must exist before the first is read.
        later: list[tuple[Node, onnx.NodeProto]] = []
        for source in proto.node:
            for name in (source.name, *source.input, *source.output):
                _text(name, "a node")
            for word in (source.op_type, source.domain):
                _word(word, "a node")
            inputs = [lookup(name) for name in source.input]
            outputs = [define(name, source) for name in source.output]
            node = Node(source.op_type, source.name, None, inputs, outputs, source.domain)
            node.carried = without(source, "input", "output", "attribute")
            node.origin = (source.name or (source.output[0] if source.output else source.op_type),)
            later.append((node, source))
            graph.nodes.append(node)

        scope = outer.new_child(known)
        for node, source in later:
            for attribute in source.attribute:
                self._attribute(node, attribute, scope)

        for info in proto.output:
            tensor = scope.get(info.name)
            if tensor is None:
                raise InvalidModel(
                    f"{where}: output {info.name!r} is produced by no node{_nearest(info.name, scope)}; export the model again"
                )
            if isinstance(tensor, Constant) or any(tensor is t for t in graph.inputs):
                tensor.carried = tensor.carried or info
            graph.outputs.append(tensor)
        for name, tensor in pending.items():
            user = tensor.outputs[0]
            raise InvalidModel(
                f"{where}: node {user.name!r} ({user.op}) reads {name!r}, which nothing defines{_nearest(name, scope)}"
            )
        for info in proto.value_info:
            tensor = known.get(info.name)
            if tensor is None:  # of the inside of a function, by a naming scheme, say
                graph.carried.value_info.append(info)
            elif isinstance(tensor, Constant):
                tensor.carried = tensor.carried or info
        return graph

    def _declarations(self, proto: onnx.GraphProto, graph: Graph, raws: dict[int, Buffer]) -> dict[str, gs.Tensor]:
        """Fill in initializers and inputs; returns them by name."""
        known: dict[str, gs.Tensor] = {}

        def declare(tensor: gs.Tensor, what: str) -> None:
            if tensor.name in known:
                raise InvalidModel(
                    f"graph {graph.name!r}: {what} {tensor.name!r} is defined twice; every value needs a name of its own"
                )
            known[tensor.name] = tensor

        for index, initializer in enumerate(proto.initializer):
            what = f"initializer {initializer.name!r}"
            name = _text(initializer.name, what)
            graph.initializers.append(Constant(name, self._values(initializer, raws.get(index), what)))
        for sparse in proto.sparse_initializer:
            name = _text(sparse.values.name, "a sparse initializer")
            graph.initializers.append(Constant(name, self._sparse_values(sparse)))
        for constant in graph.initializers:
            declare(constant, "initializer")
        for info in proto.input:
            present = known.get(_text(info.name, "an input"))
            if isinstance(present, Constant) and present.carried is None:
                present.carried = info
                graph.inputs.append(present)
            else:
                graph.inputs.append(self._variable(info))
                declare(graph.inputs[-1], "input")
        return known

    def _attribute(self, node: Node, proto: onnx.AttributeProto, scope: Scope) -> None:
        where = f"node {node.name!r} ({node.op})"
        name = _text(proto.name, where)
        if name in node.attrs:
            raise InvalidModel(f"{where}: attribute {name!r} is given twice; keep one")
        node.attrs[name] = self._attribute_value(proto, scope, f"{where}: attribute {name!r}")
        node.attr_types[name] = proto.type
        if proto.doc_string:
            node.attr_docs[name] = proto.doc_string

    def _attribute_value(self, proto: onnx.AttributeProto, scope: Scope, what: str) -> Any:
        if proto.ref_attr_name:
            return proto
        match proto.type:
            case onnx.AttributeProto.FLOAT:
                return proto.f
            case onnx.AttributeProto.INT:
                return proto.i
            case onnx.AttributeProto.STRING:
                return decode(proto.s)
            case onnx.AttributeProto.FLOATS:
                return list(proto.floats)
            case onnx.AttributeProto.INTS:
                return list(proto.ints)
            case onnx.AttributeProto.STRINGS:
                return [decode(s) for s in proto.strings]
            case onnx.AttributeProto.TENSOR:
                return Constant(_text(proto.t.name, what), self._values(proto.t, None, what))
            case onnx.AttributeProto.GRAPH:
                return self._body(proto.g, scope)
            case onnx.AttributeProto.GRAPHS:
                return [self._body(g, scope) for g in proto.graphs]
            case onnx.AttributeProto.UNDEFINED:
                raise InvalidModel(
                    f"{what} has no type that onnx {onnx.__version__} knows; upgrade onnx, or export the model again"
                )
            case _:
                _refuse_external([proto], what)
                return proto

    def _body(self, proto: onnx.GraphProto, scope: Scope) -> Graph:
        self.depth += 1
        body = self._graph(proto, scope, {})
        self.depth -= 1
        return body

    def _variable(self, info: onnx.ValueInfoProto) -> Variable:
        variable = Variable(info.name)
        variable.carried = info
        kind = info.type.WhichOneof("value")
        variable.type = kind or "tensor_type"
        if kind == "tensor_type":
            tensor = info.type.tensor_type
            variable.dtype = _dtype(tensor.elem_type, f"value {info.name!r}") if tensor.elem_type else None
            if tensor.HasField("shape"):
                variable.shape = shape_of(tensor.shape)
        return variable

    def _values(self, proto: onnx.TensorProto, raw: Buffer | None, what: str) -> StoredValues:
        """The values of a tensor where they lie; that there are as many as it declares is checked."""
        dtype, shape = _dtype(proto.data_type, what), tuple(proto.dims)
        declared = f"{dtype_name(dtype)}[{','.join(map(str, shape))}]"
        if any(d < 0 for d in shape):
            raise InvalidModel(f"{what} declares {declared}; a dimension cannot be negative: the file is damaged")
        if len(shape) > _MOST_AXES or math.prod(d for d in shape if d) * dtype.itemsize >= 1 << 63:
            raise InvalidModel(f"{what} declares {declared}, more than any machine can address: the file is damaged")
        external = proto.data_location == onnx.TensorProto.EXTERNAL
        if dtype.kind == "O" and (external or raw is not None or proto.HasField("raw_data")):
            raise InvalidModel(f"{what}: strings cannot lie in raw or external data; the file is damaged")
        if external:
            raw = self._external(proto, stored_bytes(dtype, shape), what)
        values = StoredValues(proto, raw)
        if raw is not None or proto.HasField("raw_data"):
            unit, found, expected = "bytes", len(raw if raw is not None else proto.raw_data), stored_bytes(dtype, shape)
        else:
            unit, found = "elements", len(getattr(proto, onnx.helper.tensor_dtype_to_field(proto.data_type)))
            expected = _typed_length(proto.data_type, math.prod(shape))
        if found != expected:
            raise InvalidModel(
                f"{what} holds {found} {unit}, but {declared} takes {expected}; the file is damaged: copy or export it again"
            )
        return values

    def _sparse_values(self, proto: onnx.SparseTensorProto) -> SparseStoredValues:
        what = f"sparse initializer {proto.values.name!r}"
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in (proto.values, proto.indices)):
            raise UnsupportedModel(
                f"{what} lies in external data, which graphopt does not read; save it inside the model"
            )
        self._values(proto.values, None, what)
        indices = self._values(proto.indices, None, f"{what}, its indices,")
        shape, count = tuple(proto.dims), tuple(proto.values.dims)
        fits = len(count) == 1 and indices.dtype == np.int64 and indices.shape in (count, (*count, len(shape)))
        if fits and all(d >= 0 for d in shape):
            bounds = [math.prod(shape)] if len(indices.shape) == 1 else shape
            columns = indices.load().reshape(count[0], len(bounds)).T
            fits = all(
                not len(c) or (c.min() >= 0 and int(c.max()) < bound) for c, bound in zip(columns, bounds, strict=True)
            )
        else:
            fits = False
        if not fits:
            raise InvalidModel(f"{what}: its indices do not lie in shape {list(shape)}; the file is damaged")
        return SparseStoredValues(proto)

    def _external(self, proto: onnx.TensorProto, expected: int, what: str) -> Buffer:
        """The mapped bytes of an external tensor.

        Raises:
            InvalidModel: the file is missing, too short, or outside the model's folder.
        """
        entries = {e.key: _text(e.value, what) for e in proto.external_data}
        location = entries.get("location", "")
        if self.source is None:
            raise InvalidModel(f"{what} lies in {location!r}, but the model came without a folder; load it by path")
        view = self.maps.get(location)
        if view is None:
            self.maps[location] = view = map_beside(self.source, location, what)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or expected)
        except ValueError:
            raise InvalidModel(
                f"{what}: offset or length of its external data is no number; export the model again"
            ) from None
        if offset < 0 or length < 0 or offset + length > len(view):
            raise InvalidModel(
                f"{what} needs bytes {offset} to {offset + length} of {location!r}, which has {len(view)}; copy the file again"
            )
        self.claimed[location] = self.claimed.get(location, 0) + length
        if self.claimed[location] > max(_FREE_CLAIMS, _MOST_CLAIMS * len(view)):
            raise InvalidModel(
                f"{what} and others claim more than {_MOST_CLAIMS} times the {len(view):,} bytes of {location!r}; export the model again"
            )
        return view[offset : offset + length]


def _function(proto: onnx.FunctionProto) -> Function:
    what = f"function {proto.name!r}"
    _text(proto.name, what)
    _text(proto.domain, what)
    for node in nodes_of(proto.node):
        for name in (node.op_type, node.domain):
            _word(name, f"{what}, a node")
        _refuse_external(node.attribute, what)
    function = Function(proto.name, proto.domain, nodes=[], inputs=[], outputs=[], opset=None, attrs={})
    function.carried = proto
    return function


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """`nodes` and those of the bodies in them."""
    pending = [*nodes][::-1]
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                pending.extend(body.node)


def _refuse_external(attributes: Iterable[onnx.AttributeProto], what: str) -> None:
    """What is carried unread must not point into a file: it would point nowhere once the model is saved elsewhere."""
    for a in attributes:
        sparse = [a.sparse_tensor, *a.sparse_tensors]
        tensors = [a.t, *a.tensors, *(t.values for t in sparse), *(t.indices for t in sparse)]
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors):
            raise UnsupportedModel(f"{what}: a tensor in {a.name!r} lies in external data; save it inside the model")


def _dtype(onnx_type: int, what: str) -> np.dtype[Any]:
    try:
        return numpy_dtype(onnx_type)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{what}: {error}; upgrade onnx, or export the model again") from None


def _typed_length(onnx_type: int, count: int) -> int:
    """How many entries of a typed field (``float_data`` and the like) hold `count` elements."""
    if onnx_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return 2 * count
    bits = packed_bits(onnx_type)
    return -(-count * bits // 8) if bits in (2, 4) else count


def _text(text: str | bytes, what: str) -> str:
    """`text`, which protobuf gives as bytes where the file holds no UTF-8."""
    if isinstance(text, bytes):
        raise InvalidModel(f"{what}: the name {text!r} is not UTF-8; the file is damaged: copy or export it again")
    return text


def _word(text: str | bytes, what: str) -> None:
    """Check the name of an operator or domain, which onnx.proto wants to be an identifier: no exporter puts a control character there."""
    if not _text(text, what).isprintable():
        raise InvalidModel(f"{what}: {text!r} cannot be the name of an operator or domain; the file is damaged")


def _nearest(name: str, scope: Iterable[str]) -> str:
    near = closest(name, scope)
    return f"; did you mean {near!r}?" if near is not None else ""


def without(proto: Any, *fields: str) -> Any:
    """A copy of a message without `fields`; those are not copied first, however large they are."""
    copy = type(proto)()
    if len(UnknownFieldSet(proto)):  # a newer onnx, a vendor's extension: these can only be copied with all the rest
        copy.CopyFrom(proto)
        for field in fields:
            copy.ClearField(field)
        return copy
    for descriptor, value in proto.ListFields():
        if descriptor.name in fields:
            continue
        if isinstance(value, bytes) and descriptor.type == descriptor.TYPE_STRING:
            copy.MergeFromString(_string_field(descriptor.number, value))
        elif isinstance(value, str | bytes | int | float):
            setattr(copy, descriptor.name, value)
        elif hasattr(value, "CopyFrom"):
            getattr(copy, descriptor.name).CopyFrom(value)
        else:
            getattr(copy, descriptor.name).extend(value)
    return copy


def _string_field(number: int, text: bytes) -> bytes:
    """A serialized string field; the way to set one that is no UTF-8."""
    return encode_varint(number << 3 | 2) + encode_varint(len(text)) + text


def shape_of(proto: onnx.TensorShapeProto) -> Shape:
    """Dimensions as int, symbol, or None where nothing is said (some exporters write that as -1)."""
    dims: list[Dim] = []
    for dim in proto.dim:
        kind = dim.WhichOneof("value")
        if kind == "dim_value":
            dims.append(dim.dim_value if dim.dim_value >= 0 else None)
        else:
            dims.append(_text(dim.dim_param, "a dimension") or None)
    return tuple(dims)
