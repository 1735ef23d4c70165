"""``sum(x^2)`` is ReduceSumSquare, and its root ReduceL2.

On the CPU ONNX Runtime's kernels for both are slower than Mul, ReduceSum and Sqrt, so they are for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.idioms import closed, reduced_axes, reduction, squared
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import TENSORRT, Context, Exactness, Pass


@dataclass(frozen=True)
class FuseReduceSquare(Pass):
    """Compute a sum of squares, or its root, by one operator.

    Before:
        g (float[N,S,4] x) => (float[N,S,1] y)
        <int64[1] axes = {-1}>
        { q = Mul (x, x)
          s = ReduceSum (q, axes)
          y = Sqrt (s) }
    After:
        g (float[N,S,4] x) => (float[N,S,1] y)
        <int64[1] axes = {-1}>
        { y = ReduceL2 (x, axes) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    serves: ClassVar[tuple[str, ...]] = ("ort:cuda", *TENSORRT)
    ops: ClassVar[frozenset[str] | None] = frozenset({"ReduceSum"})

    apply: bool | None = None  # whether to run; none: for the targets that it serves

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of sums fused."""
        if not ctx.serves(self.serves, self.apply):
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            square = edit.producer(node.inputs[0]) if node.op == "ReduceSum" and node.is_onnx else None
            x = None if square is None else squared(square, edit)
            if square is None or x is None:
                continue
            root = edit.sole_consumer(node.outputs[0])
            parts = [square, node, root] if root is not None and root.op == "Sqrt" and root.is_onnx else [square, node]
            op = "ReduceL2" if len(parts) == 3 else "ReduceSumSquare"
            reason = _objection(x, parts, shapes, edit)
            if reason is not None:
                ctx.remark(node, f"no {op}: {reason}")
                continue
            if not ctx.admit():
                break
            edit.insert_before(parts[-1], reduction(op, node, x, parts[-1], model.opset, edit), parts)
            edit.erase(parts[-1])
            fused += 1
        edit.commit()
        return fused


def _objection(x: gs.Tensor, parts: list[Node], shapes: Shapes, edit: Editor) -> str | None:
    if shapes.dtype(x) not in (np.float32, np.float16):
        return f"{x.name!r} is not known to be of floats"
    if not shapes.rank(x) or shapes.rank(x) != shapes.rank(parts[0].outputs[0]):
        return f"the square may have more dimensions than {x.name!r}"
    if reduced_axes(parts[1], edit) is None:
        return "its axes are not fixed"
    if not closed(parts, parts[-1].outputs[0], edit):
        return "a value inside it is read by others, too"
    return None
