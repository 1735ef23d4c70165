"""``sum(x) / n`` over axes of n elements in all is the mean, which normalizations and poolings are then recognized by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.analyses.idioms import close, reduced_axes, reduction
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.views import scalar
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place


@dataclass(frozen=True)
class FuseReduceMean(Pass):
    """Take the mean instead of dividing the sum by the number of elements.

    Before:
        g (float[N,S,4] x) => (float[N,S,1] y)
        <int64[1] axes = {-1}, float four = {4}>
        { s = ReduceSum (x, axes)
          y = Div (s, four) }
    After:
        g (float[N,S,4] x) => (float[N,S,1] y)
        <int64[1] axes = {-1}>
        { y = ReduceMean (x, axes) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ReduceSum"})
    places: ClassVar[tuple[Place, ...]] = (Place(("ReduceSum",), read_by=("Div", "Mul")),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of means written."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            divide = edit.sole_consumer(node.outputs[0]) if node.op == "ReduceSum" and node.is_onnx else None
            if divide is None or divide.op not in ("Div", "Mul") or not divide.is_onnx:
                continue
            found = _constant(node, divide, edit)
            if found is None:
                continue
            reason = _objection(node, divide, found, shapes, edit)
            if reason is not None:
                ctx.remark(node, f"no mean: {reason}")
                continue
            if not ctx.admit():
                break
            mean = reduction("ReduceMean", node, node.inputs[0], divide, model.opset, edit)
            edit.insert_before(divide, mean, (node, divide))
            edit.erase(divide)
            fused += 1
        edit.commit()
        return fused


def _constant(node: Node, divide: Node, edit: Editor) -> gs.Tensor | None:
    """The number that the sum is divided by or multiplied with."""
    left, right = divide.inputs
    other = right if left is node.outputs[0] else left if divide.op == "Mul" else None
    return other if other is not None and scalar(other, edit) else None


def _objection(node: Node, divide: Node, constant: gs.Tensor, shapes: Shapes, edit: Editor) -> str | None:
    shape, dtype = shapes.shape(node.inputs[0]), shapes.dtype(node.inputs[0])
    axes, number = reduced_axes(node, edit), scalar(constant, edit)
    rank = shapes.rank(node.outputs[0])
    if shape is None or dtype is None or dtype.kind != "f":
        return f"{node.inputs[0].name!r} is not known to be of floats"
    if edit.graph_of(node) is not edit.graph_of(divide):
        return "the division lies in another graph"
    if not axes or rank is None or number is None:
        return "its axes are not fixed"
    if len(constant.shape) > rank:
        return f"{constant.name!r} adds dimensions"
    sizes = [d for d in (shape[a] for a in axes) if isinstance(d, int)]
    if len(sizes) != len(axes):
        return "the number of elements is not fixed"
    if not close(number if divide.op == "Div" else 1 / number, math.prod(sizes)):
        return f"{constant.name!r} is not the number of elements"
    return None
