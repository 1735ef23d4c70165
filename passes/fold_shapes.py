"""Folding of shape arithmetic, numbers and symbols.

Three rewrites on the facts of the shape analysis:

1. An integer tensor whose elements are all known numbers becomes an initializer, though it was computed from ``Shape(x)``.
2. ``Reshape(x, computed)`` gets a constant target when each dimension of the result is a number, the dimension of x at the same place
   (written 0, which copies), or the one dimension that is left (written -1).
3. ``Expand(x, computed)`` gets a constant target when each dimension of the result is a number or that of x (written 1).

What computed the old targets dies, if nothing else reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Expr
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Replace shape arithmetic by constants, also where dimensions are symbols.

    Before:
        g (float[N,2,3] x) => (float[N,6] y)
        <int64 zero = {0}, int64[1] axes = {0}, int64[1] six = {6}>
        { r = Relu (x)
          s = Shape (r)
          n = Gather <axis = 0> (s, zero)
          u = Unsqueeze (n, axes)
          t = Concat <axis = 0> (u, six)
          y = Reshape (r, t) }
    After:
        g (float[N,2,3] x) => (float[N,6] y)
        <int64[2] t = {0, 6}>
        { r = Relu (x)
          y = Reshape (r, t) }
    """

    @classmethod
    def objection(cls, node: gs.Node, edit: Editor, shapes: Shapes) -> str | None:
        """Which number of a result that stands for a shape is not known."""
        if not node.outputs or node.domain not in (None, "", "ai.onnx"):
            return None
        value = shapes.value(node.outputs[0])
        if value is None:
            return None
        unknown = next((v for v in value.flat if isinstance(v, Expr)), None)
        if unknown is None:
            return f"its result {value.tolist()} is known, but a graph returns it"
        return f"{unknown} in its result {[v if isinstance(v, int) else str(v) for v in value.flat]} is known at run time alone"

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of values and targets replaced."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        folded = 0
        for node in list(model.nodes()):
            if not node.is_onnx or node.op == "Constant":
                continue
            if node.op in ("Reshape", "Expand"):
                folded += self._target(node, shapes, edit, ctx)
            folded += self._values(node, shapes, edit, ctx)
        edit.commit()
        return folded

    def _values(self, node: Node, shapes: Shapes, edit: Editor, ctx: Context) -> int:
        folded = 0
        for tensor in node.outputs:
            if not tensor.outputs or edit.is_output(tensor):
                continue
            known = shapes.integers(tensor)
            if known is None or not ctx.admit():
                continue
            edit.replace_uses(tensor, edit.constant(tensor.name, known))
            folded += 1
        return folded

    def _target(self, node: Node, shapes: Shapes, edit: Editor, ctx: Context) -> int:
        if edit.is_fixed(node.inputs[1]):
            return 0
        source, result = shapes.shape(node.inputs[0]), shapes.shape(node.outputs[0])
        if source is None or result is None:
            ctx.remark(node, "the shape it makes is not known")
            return 0
        target: list[int] = []
        for axis, dim in enumerate(result):
            same = node.op == "Reshape" and axis < len(source) and source[axis] == dim
            if node.op == "Expand":
                behind = axis - len(result) + len(source)
                same = behind >= 0 and source[behind] == dim
            if not isinstance(dim, Expr) and (dim != 0 or node.op == "Expand"):
                target.append(dim)
            elif same:
                target.append(1 if node.op == "Expand" else 0)
            elif isinstance(dim, Expr) and node.op == "Reshape" and -1 not in target and _divides(result, axis):
                target.append(-1)
            else:
                ctx.remark(node, f"needs dimension {dim} at run time")
                return 0
        if not ctx.admit():
            return 0
        if node.op == "Reshape" and 0 in target:
            node.attrs.pop(
                "allowzero", None
            )  # every 0 in the new target copies, and no dimension of the result is the number 0
        node.inputs[1] = edit.constant(node.inputs[1].name, np.array(target, np.int64))
        return 1


def _divides(result: tuple[int | Expr, ...], axis: int) -> bool:
    """Whether -1 can stand for `axis`: no other dimension may be the number 0."""
    return all(isinstance(d, Expr) or d != 0 for i, d in enumerate(result) if i != axis)
