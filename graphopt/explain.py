"""Why was nothing done to a node? The fate of one node in a pipeline, and the reason each rule that came near it gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from graphopt.discovery import find_pass, nearest, pass_modules
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.evaluate import evaluate_node
from graphopt.instruments import _Silent
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline
from graphopt.rewrite import Op, RewritePass, find
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
    edit = Editor(result.model)
    for pass_name in pass_modules():
        kind = find_pass(pass_name)
        if issubclass(kind, RewritePass):
            for candidate in standing:
                findings += [Finding(pass_name, text) for text in _nearest_miss(kind, candidate, edit)]
    fate = "; ".join(watch.events) or "nothing changed it"
    return Explanation(origin, node.op, fate, tuple(dict.fromkeys(findings)))


def _find(model: Model, name: str) -> Node:
    for node in model.nodes():
        if node.name == name or any(t.name == name for t in node.outputs):
            return node
    known = [n.name for n in model.nodes() if n.name] + [t.name for n in model.nodes() for t in n.outputs]
    raise UsageError(f"the model has no node or computed tensor {name!r}{nearest(name, known)}")


def _nearest_miss(kind: type[RewritePass], node: Node, edit: Editor) -> Iterator[str]:
    """Why the pattern of `kind` does not match around `node`, where the node has an operator of the pattern."""
    pattern = kind.pattern
    if node.op in pattern.ops:
        match, reason = find(pattern, node, edit)
        if match is None:
            yield (
                reason or f"not after {' or '.join(_inner(pattern))}"
                if _inner(pattern)
                else "its operands look different"
            )
        return
    for inner in _ops(pattern):
        if node.op in inner.ops:
            readers = sorted({n.op for t in node.outputs for n in t.outputs}) or ["nothing"]
            if not set(readers) & set(pattern.ops):
                yield f"would need {' or '.join(pattern.ops)} behind it, but {', '.join(readers)} reads it"
            return


def _inner(pattern: Op) -> list[str]:
    return [name for operand in pattern.operands if isinstance(operand, Op) for name in operand.ops]


def _ops(pattern: Op) -> Iterator[Op]:
    for operand in pattern.operands:
        if isinstance(operand, Op):
            yield operand
            yield from _ops(operand)
