"""``where(isnan(p), 0, p) @ v = where(isnan(p @ v), 0, p @ v)`` for the weights p of a Softmax over its last axis, and v without NaN or infinities.

A row of scores that are all masked makes a row of NaN, and nothing else does: a Softmax has its whole row NaN or no number of it. PyTorch gives zeros
for it, so exporters of its attention write a guard between Softmax and product. There it hides attention from TensorRT, which
has a kernel for ``softmax(q k^T + mask) v`` alone; and it looks at S x T weights instead of S x D results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.views import scalar
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import TENSORRT, Context, Exactness, Pass


@dataclass(frozen=True)
class SinkNanGuards(Pass):
    """Replace the NaN of rows without any key behind attention's product, not in front of it.

    Before:
        g (float[2,3] s, float[3,4] v) => (float[2,4] y)
        <float zero = {0}>
        { p = Softmax <axis = -1> (s)
          n = IsNaN (p)
          w = Where (n, zero, p)
          y = MatMul (w, v) }
    After:
        g (float[2,3] s, float[3,4] v) => (float[2,4] y)
        <float zero = {0}>
        { p = Softmax <axis = -1> (s)
          r = MatMul (p, v)
          n = IsNaN (r)
          y = Where (n, zero, r) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING  # NaN or infinities among the values end otherwise
    serves: ClassVar[tuple[str, ...]] = TENSORRT
    ops: ClassVar[frozenset[str] | None] = frozenset({"IsNaN"})

    apply: bool | None = None  # whether to run; none: for the targets that it serves

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of guards moved."""
        if not ctx.serves(self.serves, self.apply):
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        moved = 0
        for guard in list(model.nodes()):
            if guard.op != "IsNaN" or not guard.is_onnx:
                continue
            weights = guard.inputs[0]
            softmax = edit.producer(weights)
            if softmax is None or softmax.op != "Softmax" or not softmax.is_onnx:
                continue
            found = _product(guard, softmax, shapes, edit)
            if isinstance(found, str):
                ctx.remark(guard, f"the guard stays in front of the product: {found}")
                continue
            if not ctx.admit():
                break
            _move(guard, *found, edit)
            moved += 1
        edit.commit()
        return moved


def _product(guard: Node, softmax: Node, shapes: Shapes, edit: Editor) -> tuple[Node, Node] | str:
    """The Where of the guard and the product behind it, or why the guard cannot be moved."""
    weights = guard.inputs[0]
    rank = shapes.rank(weights)
    if rank is None or int(softmax.attrs.get("axis", -1 if shapes.opset >= 13 else 1)) not in (-1, rank - 1):
        return f"{softmax.name!r} is not known to be over the last axis"
    where = edit.sole_consumer(guard.outputs[0])
    if (
        where is None
        or where.op != "Where"
        or where.inputs[0] is not guard.outputs[0]
        or where.inputs[2] is not weights
    ):
        return "its result does not choose between the weights and zero"
    if scalar(where.inputs[1], edit) != 0 or len(where.inputs[1].shape) > rank:
        return f"{where.name!r} puts something else than 0 there"
    if edit.is_output(weights) or {id(n) for n in weights.outputs} != {id(guard), id(where)}:
        return f"the weights {weights.name!r} are read by others, too"
    product = edit.sole_consumer(where.outputs[0])
    if product is None or product.op != "MatMul" or product.inputs[0] is not where.outputs[0]:
        return "no product alone reads the weights as its left operand"
    if product.inputs[1] is where.outputs[0] or edit.graph_of(product) is not edit.graph_of(guard):
        return "the product is in another graph, or one with itself"
    if shapes.rank(product.inputs[1]) not in range(2, rank + 1):
        return "the values have more dimensions than the weights, or one"
    return product, where


def _move(guard: Node, product: Node, where: Node, edit: Editor) -> None:
    result = product.outputs[0]
    raw, wrong = edit.variable(f"{result.name}_unguarded", result), edit.variable(guard.outputs[0].name)
    origin = (product, guard, where)
    first = Node("MatMul", product.name, None, [guard.inputs[0], product.inputs[1]], [raw])
    edit.insert_before(product, first, origin)
    edit.insert_before(product, Node("IsNaN", guard.name, None, [raw], [wrong]), origin)
    operands: list[gs.Tensor] = [wrong, where.inputs[1], raw]
    edit.take_over(result, Node("Where", where.name, None, operands, []), origin)
    edit.erase(where)
    edit.erase(guard)
