"""A reduction followed by a reshape that only adds, or drops, the axes it reduced is a reduction with the other keepdims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.tensor_facts import Shape
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

_REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
) | {"ArgMax", "ArgMin"}


@dataclass(frozen=True)
class FuseReduceUnsqueeze(Pass):
    """Fold an Unsqueeze, Squeeze, Reshape or Flatten behind a reduction into its keepdims.

    Before:
        g (float[N,4,5] x) => (float[N,1,1] y)
        <int64[2] axes = {1, 2}>
        { m = ReduceMean <keepdims = 0> (x, axes)
          u = Unsqueeze (m, axes)
          y = Exp (u) }
    After:
        g (float[N,4,5] x) => (float[N,1,1] y)
        <int64[2] axes = {1, 2}>
        { u = ReduceMean <keepdims = 1> (x, axes)
          y = Exp (u) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Unsqueeze", "Squeeze", "Reshape", "Flatten"})
    places: ClassVar[tuple[Place, ...]] = (
        Place(("Unsqueeze", "Squeeze", "Reshape", "Flatten"), tuple(sorted(_REDUCTIONS))),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of reshapes folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op not in ("Unsqueeze", "Squeeze", "Reshape", "Flatten") or not node.is_onnx:
                continue
            reduce = edit.producer(node.inputs[0])
            if reduce is None or reduce.op not in _REDUCTIONS or not reduce.is_onnx:
                continue
            if edit.sole_consumer(node.inputs[0]) is not node or edit.graph_of(reduce) is not edit.graph_of(node):
                ctx.remark(node, f"{node.inputs[0].name!r} is read by others too")
                continue
            keep = 1 - int(reduce.attrs.get("keepdims", 1))
            wanted = _reduced(reduce, keep, shapes)
            if wanted is None or wanted != shapes.shape(node.outputs[0]):
                ctx.remark(
                    node, f"it does more than to {'add' if keep else 'drop'} the axes that {reduce.name!r} reduces"
                )
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            new = Node(reduce.op, reduce.name, {**reduce.attrs, "keepdims": keep}, list(reduce.inputs), [result])
            new.attr_types = dict(reduce.attr_types)
            new.carried = reduce.carried
            edit.insert_before(node, new, origin=(reduce, node))
            edit.erase(node)
            edit.erase(reduce)
            fused += 1
        edit.commit()
        return fused


def _reduced(reduce: Node, keep: int, shapes: Shapes) -> Shape | None:
    """The shape that `reduce` would have with keepdims = `keep`."""
    source = shapes.shape(reduce.inputs[0])
    if source is None or not source:
        return None
    axes: list[int] | None = list(range(len(source)))
    if reduce.op in ("ArgMax", "ArgMin"):
        axes = [int(reduce.attrs.get("axis", 0))]
    elif "axes" in reduce.attrs:
        axes = [int(a) for a in reduce.attrs["axes"]]
    elif len(reduce.inputs) > 1 and reduce.inputs[1].name:
        known = shapes.integers(reduce.inputs[1])
        axes = None if known is None else [int(a) for a in known.reshape(-1)]
    elif reduce.attrs.get("noop_with_empty_axes", 0):
        return None
    if not axes:
        return None  # unknown; or empty, which means all or none
    gone = {a % len(source) for a in axes}
    kept = tuple(1 if i in gone else d for i, d in enumerate(source) if keep or i not in gone)
    return kept
