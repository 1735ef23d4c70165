"""Calls of model-local functions replaced with the functions' bodies, the call's operands for inputs and the call's attributes in them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import onnx
import onnx_graphsurgeon as gs

from graphopt.analyses.calls import callees_first
from graphopt.edit import Editor, copy_body
from graphopt.errors import GraphoptError
from graphopt.ir import Function, Graph, Model, Node, Variable, from_proto, walk
from graphopt.pass_base import Context
from graphopt.reading import domain_of, nodes_of

_Key = tuple[str, str, str]  # domain, name, overload
_DEFAULTS: Final = "graphopt.defaults"  # operator of the node that carries default attributes through reading


def inline_calls(model: Model, ctx: Context) -> int:
    """Inline until no call is left that can be; a remark says why one cannot, and `ctx` admits each.

    Returns:
        The number of calls replaced.
    """
    functions = {_key_of(f.carried): f for f in model.functions}
    if not functions:
        return 0
    library = _Library(model, functions)
    edit = Editor(model)
    inlined = 0
    work = deque(model.nodes())
    while work:
        node = work.popleft()
        key = (domain_of(node.domain), node.op, getattr(node.carried, "overload", ""))
        if key not in functions:
            continue
        reason = library.objection(key) or _misfit(node, functions[key].carried)
        if reason:
            ctx.remark(node, reason)
            continue
        if not ctx.admit():
            break
        body = library.body(key, node)
        work.extend(n for g in walk(body) for n in g.nodes)
        arguments = list(node.inputs)
        arguments += [Variable("") for _ in range(len(body.inputs) - len(arguments))]
        edit.replace_node(node, edit.unpack(node, body, arguments))
        for domain, version in library.imports(key).items():
            if domain not in model.opsets:
                model.set_opset(domain, version)
        inlined += 1
    edit.commit()
    return inlined


def called_functions(model: Model) -> set[int]:
    """The functions, by id, that a node calls, directly or through others."""
    functions = {_key_of(f.carried): f for f in model.functions}
    pending = [(domain_of(n.domain), n.op, getattr(n.carried, "overload", "")) for n in model.nodes()]
    found: set[int] = set()
    while pending:
        function = functions.get(pending.pop())
        if function is not None and id(function) not in found:
            found.add(id(function))
            nodes = nodes_of(function.carried.node)
            pending += [(domain_of(n.domain), n.op_type, getattr(n, "overload", "")) for n in nodes]
    return found


def _key_of(function: onnx.FunctionProto) -> _Key:
    return domain_of(function.domain), function.name, getattr(function, "overload", "")


def _misfit(node: Node, function: onnx.FunctionProto) -> str | None:
    if len(node.inputs) > len(function.input) or len(node.outputs) > len(function.output):
        return "has more operands or results than the function"
    given = {name: bool(t.name) for name, t in zip(function.input, node.inputs, strict=False)}
    if any(
        t.name and not given.get(name, name not in function.input)
        for name, t in zip(function.output, node.outputs, strict=False)
    ):
        return "returns an operand that is absent"
    bodies = [name for name, value in node.attrs.items() if isinstance(value, gs.Graph | list) and _holds_graph(value)]
    if bodies:
        return f"its attribute {bodies[0]!r} is a body, which may capture"
    return None


def _holds_graph(value: Any) -> bool:
    return isinstance(value, gs.Graph) or (isinstance(value, list) and any(isinstance(v, gs.Graph) for v in value))


@dataclass
class _Template:
    """A function's body as a graph, and its default attributes."""

    graph: Graph
    defaults: Node


@dataclass
class _Library:
    """The functions of one model."""

    model: Model
    functions: dict[_Key, Function]
    templates: dict[_Key, _Template | str] = field(default_factory=dict)
    objections: dict[_Key, str | None] = field(default_factory=dict)
    ending: set[_Key] = field(default_factory=set)  # that call only functions that end

    def __post_init__(self) -> None:
        self.ending = set(callees_first({key: self._calls(key) for key in self.functions}))

    def _calls(self, key: _Key) -> set[_Key]:
        nodes = nodes_of(self.functions[key].carried.node)
        called = {(domain_of(n.domain), n.op_type, getattr(n, "overload", "")) for n in nodes}
        return called & self.functions.keys()

    def imports(self, key: _Key) -> dict[str, int]:
        """The opsets that the function's body uses."""
        proto = self.functions[key].carried
        versions = {domain_of(o.domain): int(o.version) for o in proto.opset_import}
        return {d: versions[d] for d in {domain_of(n.domain): None for n in nodes_of(proto.node)} if d in versions}

    def objection(self, key: _Key) -> str | None:
        """Why the function cannot be inlined."""
        if key not in self.objections:
            self.objections[key] = self._objection(key)
        return self.objections[key]

    def _objection(self, key: _Key) -> str | None:
        if key not in self.ending:
            return f"function {key[1]!r} calls itself, or one that does"
        proto = self.functions[key].carried
        versions = {domain_of(o.domain): int(o.version) for o in proto.opset_import}
        for node in nodes_of(proto.node):
            domain = domain_of(node.domain)
            called = (domain, node.op_type, getattr(node, "overload", ""))
            if called in self.functions:
                continue
            mine, wanted = self.model.opsets.get(domain), versions.get(domain)
            if wanted is None:
                return f"function {key[1]!r} uses domain {domain!r} without an opset import"
            if mine is None or mine == wanted:
                continue
            if _since(node.op_type, mine, domain) is None or _since(node.op_type, mine, domain) != _since(
                node.op_type, wanted, domain
            ):
                return f"function {key[1]!r} uses {node.op_type} of opset {wanted}, the model imports {mine}, where it differs"
        template = self._template(key)
        return template if isinstance(template, str) else None

    def _template(self, key: _Key) -> _Template | str:
        if key not in self.templates:
            self.templates[key] = self._read(self.functions[key].carried)
        return self.templates[key]

    def _read(self, function: onnx.FunctionProto) -> _Template | str:
        """Read the body as that of a model: one that has the function's inputs and outputs, of unknown type."""
        proto = onnx.ModelProto(ir_version=max(self.model.ir_version, 8))
        proto.opset_import.add(domain="", version=self.model.opset or 1)
        proto.graph.name = function.name
        proto.graph.node.add(op_type=_DEFAULTS, attribute=function.attribute_proto)
        proto.graph.node.extend(function.node)
        proto.graph.input.extend(onnx.ValueInfoProto(name=name) for name in function.input)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
        try:
            graph = from_proto(proto).graph
        except GraphoptError as error:
            return f"function {function.name!r} cannot be read: {error}"
        defaults = graph.nodes.pop(0)
        return _Template(graph, defaults)

    def body(self, key: _Key, call: Node) -> Graph:
        """A copy of the function's body with the attributes of `call` in it."""
        template = self._template(key)
        assert isinstance(template, _Template)
        body = copy_body(template.graph)
        for graph in walk(body):
            for node in graph.nodes:
                node.origin = call.origin or (call.name,)
                for name, value in list(node.attrs.items()):
                    if isinstance(value, onnx.AttributeProto) and value.ref_attr_name:
                        _resolve(node, name, value, call, template.defaults)
        return body


def _resolve(node: Node, name: str, reference: onnx.AttributeProto, call: Node, defaults: Node) -> None:
    wanted = reference.ref_attr_name
    source = call if wanted in call.attrs else defaults
    if wanted not in source.attrs:
        del node.attrs[name]
        node.attr_types.pop(name, None)
        return
    value = source.attrs[wanted]
    if isinstance(value, onnx.AttributeProto):
        copy = onnx.AttributeProto()
        copy.CopyFrom(value)
        copy.name = name
        value = copy
    node.attrs[name] = list(value) if isinstance(value, list) else value
    node.attr_types[name] = source.attr_types.get(wanted, reference.type)


def _since(op: str, version: int, domain: str) -> int | None:
    """The opset in which `op` got the definition that it has at `version`."""
    if not onnx.defs.has(op, version, domain):
        return None
    return int(onnx.defs.get_schema(op, version, domain).since_version)
