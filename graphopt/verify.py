"""Is a model valid? `structure` in O(n) after each pass, `full` through onnx.checker, `operators` for names nobody knows."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import reads, sort
from graphopt.errors import InvalidModel, UnsupportedModel
from graphopt.ir import EXTERNAL_ABOVE, Graph, Model, TensorSpec, save, saves, subgraphs

KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training", "com.microsoft"}
)


def structure(model: Model) -> list[str]:
    """Breaches of the structural rules of the ONNX IR (docs/IR.md), as texts; empty when there are none.

    One definition for each name in scope, nodes in topological order, every operand defined, links between nodes and tensors
    intact in both directions, constants of the shape and dtype they declare.
    """
    faults: list[str] = []
    _graph(model.graph, {}, faults)
    return faults


def _graph(graph: Graph, outer: dict[str, gs.Tensor], faults: list[str]) -> None:
    where = f"graph {graph.name!r}"
    scope = dict(outer)
    local: dict[str, gs.Tensor] = {}

    def define(tensor: gs.Tensor, by: str) -> None:
        if not tensor.name:
            return
        if tensor.name in local and local[tensor.name] is not tensor:
            faults.append(f"{where}: {tensor.name!r} is defined twice, the second time by {by}")
        local[tensor.name] = scope[tensor.name] = tensor

    for tensor in [*graph.inputs, *graph.initializers]:
        define(tensor, "an input or initializer")
    for node in graph.nodes:
        label = f"node {node.name!r} ({node.op})"
        for tensor in reads(node):
            if not tensor.name:
                continue
            if isinstance(tensor, gs.Constant) and tensor.name not in scope:
                scope[tensor.name] = tensor  # made by a pass: written with the root graph
            known = scope.get(tensor.name)
            if known is None:
                faults.append(f"{where}: {label} reads {tensor.name!r} before it is defined")
            elif known is not tensor:
                faults.append(f"{where}: {label} reads {tensor.name!r}, but another tensor has that name")
        for tensor in node.inputs:
            if not any(n is node for n in tensor.outputs):
                faults.append(f"{where}: {label} is not among the readers of {tensor.name!r}")
        for tensor in node.outputs:
            if tensor.name and (len(tensor.inputs) != 1 or tensor.inputs[0] is not node):
                faults.append(f"{where}: {tensor.name!r} does not know its producer {label}")
            if tensor.name and tensor.name in local:
                faults.append(f"{where}: {tensor.name!r} is defined twice, the second time by {label}")
            define(tensor, label)
        for body in subgraphs(node):
            _graph(body, scope, faults)
    for tensor in graph.outputs:
        if scope.get(tensor.name) is not tensor and not isinstance(tensor, gs.Constant):
            faults.append(f"{where}: output {tensor.name!r} is produced by no node")


def cycles(model: Model) -> None:
    """Bring all graphs into topological order.

    Raises:
        InvalidModel: a graph has a cycle; the message names nodes on it.
    """
    for graph in model.graphs():
        cyclic = sort(graph)
        if cyclic:
            names = ", ".join(f"{n.name!r} ({n.op})" for n in cyclic[:4])
            raise InvalidModel(
                f"graph {graph.name!r} has a cycle through {names}; ONNX graphs are acyclic: export the model again"
            )


def operators(model: Model, allowed_domains: Iterable[str] = ()) -> None:
    """Check that every operator exists at the opset that the model imports.

    Args:
        model: what to check, functions' bodies included.
        allowed_domains: custom domains that are carried unread.

    Raises:
        InvalidModel: an unknown operator, or a domain without an opset import.
        UnsupportedModel: a domain that graphopt does not know.
    """
    functions = {(f.carried.domain, f.carried.name) for f in model.functions}
    known = KNOWN_DOMAINS | set(allowed_domains)
    _operators(((n.op, n.domain or "", n.name) for n in model.nodes()), model.opsets, functions, known)
    for function in model.functions:
        opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in function.carried.opset_import}
        nodes = ((n.op_type, n.domain, n.name) for n in function.carried.node)
        _operators(nodes, opsets, functions, known)


def _operators(
    nodes: Iterable[tuple[str, str, str]], opsets: dict[str, int], functions: set[tuple[str, str]], known: Iterable[str]
) -> None:
    checked: set[tuple[str, str]] = set()
    for op, written_domain, name in nodes:
        domain = "" if written_domain == "ai.onnx" else written_domain
        if (domain, op) in checked or (written_domain, op) in functions:
            continue
        checked.add((domain, op))
        where = f"node {name!r} ({f'{domain}.' if domain else ''}{op})"
        if domain not in opsets:
            raise InvalidModel(
                f"{where}: domain {domain or 'ai.onnx'!r} is not among the model's opset imports; add it"
            )
        if domain not in known:
            raise UnsupportedModel(
                f"{where}: unknown domain {domain!r}; if a plug-in of your runtime serves it, allow it with --allow-domain {domain}"
            )
        if domain == "com.microsoft":
            continue
        if not onnx.defs.has(op, opsets[domain], domain):
            every = sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == domain})
            near = difflib.get_close_matches(op, every, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near and near[0] != op else f"check the opset (it is {opsets[domain]})"
            )
            raise InvalidModel(f"{where}: no such operator in opset {opsets[domain]}; {hint}")


def full(model: Model) -> None:
    """Run onnx.checker with full_check (shape inference in strict mode) on what would be written.

    Raises:
        InvalidModel: with the checker's first words.
    """
    try:
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


def interface(before: Model, after: Model) -> list[str]:
    """Differences in the contract with callers: names, order, dtypes and shapes of inputs and outputs."""

    def differences(kind: str, old: tuple[TensorSpec, ...], new: tuple[TensorSpec, ...]) -> list[str]:
        if [s.name for s in old] != [s.name for s in new]:
            return [f"{kind}s changed from {[s.name for s in old]} to {[s.name for s in new]}"]
        return [f"{kind} {a.name!r} changed from {a} to {b}" for a, b in zip(old, new, strict=True) if a != b]

    return differences("input", before.inputs, after.inputs) + differences("output", before.outputs, after.outputs)
