"""Why was nothing done to a node? The fate of one node in a pipeline, and the reason each rule that came near it gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.discovery import find_pass, nearest, pass_modules
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.evaluate import evaluate_node
from graphopt.instruments import _Silent
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline
from graphopt.target import Target


@dataclass(frozen=True)
class Finding:
    """What one pass has to say of a node."""

    pass_name: str
    text: str


@dataclass(frozen=True)
class Explanation:
    """The fate of a node."""

    node: str  # its name in the loaded model
    op: str
    fate: str  # where it went, or that it stayed
    facts: tuple[str, ...]  # what stands for it in the result, with types and shapes
    findings: tuple[Finding, ...]


class _Watch(_Silent):
    """Notes after which pass no node carries the origin any more, or another operator stands for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: list[str] = []
        self._shown: tuple[str, ...] | None = None

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Compare with what stood for the node before."""
        if not rewrites:
            return
        now = tuple(f"{n.name!r} ({n.op})" for n in model.nodes() if self.name in n.origin)
        if self._shown is not None and now != self._shown:
            self.events.append(
                f"{step.pass_name()}: {' and '.join(now)} now" if now else f"{step.pass_name()} removed it"
            )
        self._shown = now

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Note what stands for the node at first."""
        self._shown = tuple(f"{n.name!r} ({n.op})" for n in model.nodes() if self.name in n.origin)


def explain(model: Model, name: str, pipeline: Pipeline, target: Target | None = None) -> Explanation:
    """Run `pipeline` on `model` and tell what became of the node `name`, and what kept each pass from more.

    Args:
        model: the model as loaded.
        name: a node's name, or the name of a tensor it computes.
        pipeline: the passes to ask; passes outside it that know the operator are asked too, on the result.
        target: what passes that are made for a target are to assume; None: they stand aside.

    Raises:
        UsageError: no such node.
    """
    node = _find(model, name)
    origin = node.origin[0] if node.origin else node.name
    watch = _Watch(origin)
    result = pipeline.run(model, Context(target=target, evaluate=evaluate_node), [watch])
    standing = [n for n in result.model.nodes() if origin in n.origin]
    names = {node.name, origin, *(n.name for n in standing)}
    findings = [Finding(r.pass_name, r.text) for r in result.remarks if any(r.node.startswith(repr(n)) for n in names)]
    edit, shapes = Editor(result.model), Shapes(result.model)
    kinds = {pass_name: find_pass(pass_name) for pass_name in pass_modules()}
    asked = [
        Finding(pass_name, text)
        for pass_name, kind in kinds.items()
        for candidate in standing
        if (text := kind.objection(candidate, edit, shapes)) is not None
    ]
    said = {f.pass_name for f in findings}
    findings += [f for f in asked if f.pass_name not in said]
    around = {n.name: n for s in standing for n in _neighbours(s, edit) if n.name and n.name not in names}
    findings += [
        Finding(r.pass_name, f"of its neighbour {r.node}: {r.text}")
        for r in result.remarks
        if any(r.node.startswith(repr(name)) for name in around)
    ]
    facts = tuple(_facts(candidate, shapes) for candidate in standing)
    fate = "; ".join(watch.events) or "nothing changed it"
    return Explanation(origin, node.op, fate, facts, tuple(dict.fromkeys(findings)))


def _neighbours(node: Node, edit: Editor) -> Iterator[Node]:
    """What computes its operands and what reads its results."""
    for tensor in node.inputs:
        producer = edit.producer(tensor)
        if producer is not None:
            yield producer
    for tensor in node.outputs:
        yield from tensor.outputs


def _facts(node: Node, shapes: Shapes) -> str:
    """The node with the types and shapes of what it reads and computes."""
    sides = [", ".join(_typed(t, shapes) for t in side if t.name) for side in (node.outputs, node.inputs)]
    return f"{sides[0]} = {node.op} ({sides[1]})"


def _typed(tensor: gs.Tensor, shapes: Shapes) -> str:
    info = shapes.info(tensor)
    dims = "[?]" if info.shape is None else f"[{','.join(map(str, info.shape))}]"
    return f"{'?' if info.dtype is None else info.dtype.name}{dims} {tensor.name}"


def _find(model: Model, name: str) -> Node:
    for node in model.nodes():
        if node.name == name or any(t.name == name for t in node.outputs):
            return node
    given = {s.name: "an input" for s in model.inputs} | {c.name: "a constant" for c in model.constants()}
    if name in given:
        raise UsageError(f"{name!r} is {given[name]} of the model: name a node, or a tensor that one computes")
    known = [n.name for n in model.nodes() if n.name] + [t.name for n in model.nodes() for t in n.outputs]
    raise UsageError(f"the model has no node or computed tensor {name!r}{nearest(name, known)}")
