"""Is a model valid? `structure` in O(n) after each pass, `full` through onnx.checker, `operators` for names nobody knows."""

from __future__ import annotations

import tempfile
from collections import ChainMap, Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_graphsurgeon as gs

from graphopt import isolation
from graphopt.analyses.calls import callees_first
from graphopt.edit import cycle_text, sort
from graphopt.errors import InvalidModel, UnsupportedModel, closest
from graphopt.ir import EXTERNAL_ABOVE, Constant, Graph, Model, Node, TensorSpec, save, saves, subgraphs
from graphopt.reading import MOST_NODES, Scope, domain_of, nodes_of
from graphopt.writing import homeless

_MOST_CALLS: Final = 100  # functions that call one another; onnx's shape inference goes down this chain on the C stack

KNOWN_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training"})
_FLOATS = ("float16", "bfloat16", "float32")
_NEWEST = (1 << 31) - 1  # of any opset: more, which a damaged file may state, onnx does not take


def structure(model: Model) -> list[str]:
    """Breaches of the structural rules of the ONNX IR (docs/IR.md), as texts; empty when there are none.

    One definition for each name in scope, nodes in topological order, every operand and output defined, and links between nodes
    and tensors intact in both directions.
    """
    check = _Structure()
    check.graph(model.graph, ChainMap(), homeless(model))
    check.links()
    return check.faults


class _Structure:
    """Collects the faults of one model, in time linear in its size."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.tensors: dict[int, gs.Tensor] = {}
        self.nodes: dict[int, gs.Node] = {}
        self.readers: dict[int, list[int]] = defaultdict(
            list
        )  # by id of the tensor: ids of nodes, one for each reading
        self.producers: dict[int, gs.Node] = {}  # by id of the tensor

    def graph(self, graph: Graph, outer: Scope, extra: list[Constant]) -> None:
        where = f"graph {graph.name!r}"
        local: dict[str, gs.Tensor] = {}
        scope = outer.new_child(local)

        def define(tensor: gs.Tensor, by: str | gs.Node) -> None:
            if tensor.name in local:
                label = by if isinstance(by, str) else _label(by)
                self.faults.append(f"{where}: {tensor.name!r} is defined twice, the second time by {label}")
            local[tensor.name] = tensor

        inputs = {id(t) for t in graph.inputs}
        for tensor in graph.inputs:
            define(tensor, "an input")
        for constant in [*graph.initializers, *extra]:
            if id(constant) in inputs:
                inputs.remove(id(constant))  # the default of that input
            else:
                define(constant, "an initializer")
        for node in graph.nodes:
            self.nodes[id(node)] = node
            for tensor in node.inputs:
                self.tensors[id(tensor)] = tensor
                self.readers[id(tensor)].append(id(node))
                name = tensor.name
                if not name or local.get(name) is tensor:
                    continue
                known = scope.get(name)
                if known is None:
                    self.faults.append(f"{where}: {_label(node)} reads {name!r} before it is defined")
                elif known is not tensor:
                    self.faults.append(f"{where}: {_label(node)} reads {name!r}, but another tensor has that name")
            for body in subgraphs(node):
                self.graph(body, scope, [])
            for tensor in node.outputs:
                self.tensors[id(tensor)] = tensor
                if tensor.name:
                    define(tensor, node)
                if id(tensor) in self.producers:
                    self.faults.append(f"{where}: {tensor.name!r} is an output of {_label(node)} and of another node")
                self.producers[id(tensor)] = node
        for tensor in graph.outputs:
            if scope.get(tensor.name) is not tensor:
                self.faults.append(f"{where}: output {tensor.name!r} is produced by no node")

    def links(self) -> None:
        """Compare what the nodes hold with what the tensors know of it."""
        for key, tensor in self.tensors.items():
            known, actual = list(map(id, tensor.outputs)), self.readers.get(key, [])
            if known != actual:
                self.readings(tensor, Counter(known), Counter(actual))
            producer = self.producers.get(key)
            if list(map(id, tensor.inputs)) != ([] if producer is None else [id(producer)]):
                label = "none" if producer is None else _label(producer)
                self.faults.append(f"{tensor.name!r} does not know its producer, {label}")

    def readings(self, tensor: gs.Tensor, known: Counter[int], actual: Counter[int]) -> None:
        for key in actual - known:
            self.faults.append(f"{_label(self.nodes[key])} is not among the readers of {tensor.name!r}")
        for key in known - actual:
            label = _label(self.nodes[key]) if key in self.nodes else "a node of no graph"
            self.faults.append(f"{tensor.name!r} counts {label} among its readers, which does not read it so often")


def _label(node: gs.Node) -> str:
    return f"node {node.name!r} ({node.op})"


def cycles(model: Model) -> None:
    """Bring all graphs into topological order.

    Raises:
        InvalidModel: a graph has a cycle; the message names nodes on it.
    """
    for graph in model.graphs():
        cycle = sort(graph)
        if cycle:
            raise InvalidModel(
                f"graph {graph.name!r} has a cycle through {cycle_text(cycle)}; ONNX graphs are acyclic: export the model again"
            )


def operators(model: Model, allowed_domains: Iterable[str] = ()) -> None:
    """Check that every operator exists at the opset that the model imports and is used as its schema says: number of operands and results,
    types of attributes; and that functions do not call themselves. Passes rely on all of this.

    Args:
        model: what to check, functions' bodies included.
        allowed_domains: custom domains that are carried unread.

    Raises:
        InvalidModel: an unknown operator or one used against its schema, a domain without an opset import, or recursive functions.
        UnsupportedModel: a domain that graphopt does not know, or functions that stand for too much.
    """
    functions = {(domain_of(f.carried.domain), f.carried.name): f.carried for f in model.functions}
    allowed = {"com.microsoft", *allowed_domains}
    _operators(((n.op, n.domain, n.name) for n in model.nodes()), model.opsets, functions, allowed)
    for function in functions.values():
        opsets = {domain_of(o.domain): int(o.version) for o in function.opset_import}
        nodes = ((n.op_type, n.domain, n.name) for n in nodes_of(function.node))
        _operators(nodes, opsets, functions, allowed)
    _forms(map(_form_of, model.nodes()), model.opsets, functions)
    for function in functions.values():
        opsets = {domain_of(o.domain): int(o.version) for o in function.opset_import}
        _forms(map(_form_of_proto, nodes_of(function.node)), opsets, functions)
    _expansion(model, functions)


def _operators(
    nodes: Iterable[tuple[str, str | None, str]],
    opsets: dict[str, int],
    functions: Collection[tuple[str, str]],
    allowed: Collection[str],
) -> None:
    checked: set[tuple[str, str]] = set()
    for op, written_domain, name in nodes:
        domain = domain_of(written_domain)
        if (domain, op) in checked or (domain, op) in functions:
            continue
        checked.add((domain, op))
        where = f"node {name!r} ({f'{domain}.' if domain else ''}{op})"
        if domain not in KNOWN_DOMAINS and domain not in allowed:
            raise UnsupportedModel(
                f"{where}: unknown domain {domain!r}; if a plug-in of your runtime serves it, allow it with --allow-domain {domain}"
            )
        if domain not in opsets:
            raise InvalidModel(
                f"{where}: domain {domain or 'ai.onnx'!r} is not among the model's opset imports; add it"
            )
        version = max(0, min(opsets[domain], _NEWEST))
        if domain not in allowed and not onnx.defs.has(op, version, domain):
            raise InvalidModel(
                f"{where}: no such operator in opset {opsets[domain]}; {_operator_hint(op, domain, opsets[domain])}"
            )


@dataclass(frozen=True)
class _Form:
    """How a node uses its operator."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: int
    attributes: Mapping[str, int]  # name -> type, of those whose type is known
    bodies: Mapping[str, tuple[int, int]]  # attribute -> inputs and results of the graph in it

    def against(self, schema: Any) -> str | None:
        """What is wrong with it under `schema`, if anything."""
        given = len(self.inputs)
        while given and not self.inputs[given - 1]:
            given -= 1
        for what, count, most in (("operands", given, schema.max_input), ("results", self.outputs, schema.max_output)):
            if count > most:
                return f"has {count} {what}, the operator takes at most {most}"
        if len(self.inputs) < schema.min_input:
            return f"has {len(self.inputs)} operands, the operator needs {schema.min_input}"
        if self.outputs < schema.min_output:
            return f"has {self.outputs} results, the operator gives at least {schema.min_output}"
        for formal, name in zip(schema.inputs, self.inputs, strict=False):
            if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single and not name:
                return f"lacks its operand {formal.name!r}"
        for name, attribute in schema.attributes.items():
            if name not in self.attributes:
                if attribute.required:
                    return f"lacks its attribute {name!r}"
            elif self.attributes[name] and self.attributes[name] != attribute.type.value:
                wanted = onnx.AttributeProto.AttributeType.Name(attribute.type.value)
                return f"has an attribute {name!r} of another type than {wanted}"
        return next(
            (fault for name, body in self.bodies.items() if (fault := self.unfit(schema.since_version, name, *body))),
            None,
        )

    def unfit(self, since: int, name: str, inputs: int, results: int) -> str | None:
        """Why a body does not fit its node: it takes what the node does, and gives what the node does, a Loop's a condition more."""
        match self.domain, self.op:
            case "", "If":
                wanted = 0, self.outputs
            case "", "Loop":
                wanted = max(len(self.inputs), 2), self.outputs + 1
            case "", "Scan" if since > 8:  # before, it also takes lengths
                wanted = len(self.inputs), self.outputs
            case _:
                return None
        if (inputs, results) == wanted:
            return None
        return f"has a body {name!r} of {inputs} inputs and {results} results in place of {wanted[0]} and {wanted[1]}"


def _form_of(node: Node) -> _Form:
    types = {name: getattr(node, "attr_types", {}).get(name, 0) for name in node.attrs}
    outputs = len(node.outputs)
    bodies = {k: (len(v.inputs), len(v.outputs)) for k, v in node.attrs.items() if isinstance(v, Graph)}
    return _Form(node.op, domain_of(node.domain), node.name, tuple(t.name for t in node.inputs), outputs, types, bodies)


def _form_of_proto(node: onnx.NodeProto) -> _Form:
    types = {a.name: a.type for a in node.attribute}
    graphs = [a for a in node.attribute if a.type == onnx.AttributeProto.GRAPH and not a.ref_attr_name]
    bodies = {a.name: (len(a.g.input), len(a.g.output)) for a in graphs}
    return _Form(node.op_type, domain_of(node.domain), node.name, tuple(node.input), len(node.output), types, bodies)


def _forms(forms: Iterable[_Form], opsets: dict[str, int], functions: Collection[tuple[str, str]]) -> None:
    schemas: dict[tuple[str, str], Any] = {}
    for form in forms:
        key = (form.domain, form.op)
        if key not in schemas:
            version = max(0, min(opsets.get(form.domain, 0), _NEWEST))
            known = key not in functions and onnx.defs.has(form.op, version, form.domain)
            schemas[key] = onnx.defs.get_schema(form.op, version, form.domain) if known else None
        fault = schemas[key] and form.against(schemas[key])
        if fault:
            label = f"{form.domain}." if form.domain else ""
            raise InvalidModel(
                f"node {form.name!r} ({label}{form.op}) {fault} in opset {opsets[form.domain]}; export the model again"
            )


def _operator_hint(op: str, domain: str, opset: int) -> str:
    since = [s.since_version for s in onnx.defs.get_all_schemas_with_history() if (s.name, s.domain) == (op, domain)]
    if since:
        return f"it came with opset {min(since)}: convert the model with onnx.version_converter"
    every = sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == domain})
    near = closest(op, every)
    return f"did you mean {near!r}?" if near is not None else f"check the opset (it is {opset}) or the name"


def _expansion(model: Model, functions: dict[tuple[str, str], onnx.FunctionProto]) -> None:
    """Functions stand for their bodies, which must therefore end, and not be too many.

    Raises:
        InvalidModel: functions call themselves.
        UnsupportedModel: calls nest too deep, or stand for too many nodes.
    """
    calls = {
        key: Counter(call for n in nodes_of(f.node) if (call := (domain_of(n.domain), n.op_type)) in functions)
        for key, f in functions.items()
    }
    size: dict[tuple[str, str], int] = {}  # nodes that a call stands for
    depth: dict[tuple[str, str], int] = {}
    for key in callees_first(calls):
        own = sum(1 for _ in nodes_of(functions[key].node))
        size[key] = own + sum(count * size[call] for call, count in calls[key].items())
        depth[key] = 1 + max((depth[call] for call in calls[key]), default=0)
    left = [key[1] for key in calls if key not in size]
    if left:
        raise InvalidModel(
            f"functions {', '.join(map(repr, left[:4]))} call themselves, directly or through each other; "
            "a function has to end: export the model again"
        )
    deepest = max(depth, key=lambda key: depth[key], default=None)
    if deepest is not None and depth[deepest] > _MOST_CALLS:
        raise UnsupportedModel(
            f"function {deepest[1]!r} calls functions {depth[deepest]} deep; onnx descends once for each, and graphopt "
            f"admits {_MOST_CALLS}: inline some when exporting"
        )
    total = sum(size.get((domain_of(n.domain), n.op), 0) for n in model.nodes())
    total = max([total, *size.values()])
    if total > MOST_NODES:
        raise UnsupportedModel(
            f"calls of functions stand for {total:,} nodes, more than the {MOST_NODES:,} that graphopt admits: export a smaller model"
        )


def full(model: Model) -> None:
    """Run onnx.checker with full_check (shape inference in strict mode) on what would be written.

    Raises:
        InvalidModel: with the checker's first words.
    """
    try:
        with isolation.step("onnx.checker"):
            if model.nbytes > EXTERNAL_ABOVE:
                with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
                    path = Path(folder) / "model.onnx"
                    save(model, path)
                    onnx.checker.check_model(str(path), full_check=True)
            else:
                onnx.checker.check_model(saves(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InvalidModel(f"onnx.checker: {' '.join(lines)[:400]}") from None


def interface(before: Model, after: Model, retyped: bool = False) -> list[str]:
    """Differences between two models in the `contract` with callers."""
    return contract(before.inputs, before.outputs, after, retyped)


def contract(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], after: Model, retyped: bool = False
) -> list[str]:
    """Differences in the contract with callers: names, order, dtypes and shapes of inputs and outputs.

    With `retyped`, one floating-point type is as good as another.
    """

    def seen(spec: TensorSpec) -> TensorSpec:
        return replace(spec, dtype="float") if retyped and spec.dtype in _FLOATS else spec

    def differences(kind: str, old: tuple[TensorSpec, ...], new: tuple[TensorSpec, ...]) -> list[str]:
        if [s.name for s in old] != [s.name for s in new]:
            return [f"{kind}s changed from {[s.name for s in old]} to {[s.name for s in new]}"]
        pairs = zip(old, new, strict=True)
        return [f"{kind} {a.name!r} changed from {a} to {b}" for a, b in pairs if seen(a) != seen(b)]

    return differences("input", inputs, after.inputs) + differences("output", outputs, after.outputs)
