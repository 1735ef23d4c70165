"""A tensor of one number throughout stays one number whatever is done to it element by element or with its shape.

1. ``f(ConstantOfShape(s, v)) = ConstantOfShape(s, f(v))`` for elementwise f, its other operand (where it has one) a constant scalar.
2. ``g(ConstantOfShape(s, v)) = ConstantOfShape(t, v)`` for what only moves, repeats or drops elements, where the numbers of t are known.

The new tensor takes no more bytes than the old one, however large it is: what `fold-constants` leaves for its size ends here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.errors import GraphoptError
from graphopt.ir import Constant, Model, Node
from graphopt.pass_base import Context, Pass

_ELEMENTWISE: Final = frozenset(
    [
        *("Cast", "Neg", "Abs", "Sqrt", "Reciprocal", "Relu", "Exp", "Log", "Not", "Sign", "Floor", "Ceil"),
        *("Add", "Sub", "Mul", "Div", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or"),
    ]
)
_MOVES: Final = frozenset(
    ["Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Slice", "Gather"]
)


@dataclass(frozen=True)
class FoldFills(Pass):
    """Fold what is done to a ConstantOfShape into its value and its shape.

    Before:
        g (float[N,2] x) => (float[N,2] y)
        { s = Shape (x)
          f = ConstantOfShape <value = int64[1] {3}> (s)
          c = Cast <to = 1> (f)
          n = Neg (c)
          y = Add (x, n) }
    After:
        g (float[N,2] x) => (float[N,2] y)
        { s = Shape (x)
          n = ConstantOfShape <value = float[1] {-3}> (s)
          y = Add (x, n) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"ConstantOfShape"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in order, so that chains fold at once; returns the number of nodes folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        folded = 0
        for node in list(model.nodes()):
            found = self._folded(node, shapes, edit, ctx)
            if found is None or not ctx.admit():
                continue
            value, shape = found
            attributes = {"value": Constant(edit.fresh_name("value"), value.reshape(1))}
            result = edit.variable(node.outputs[0].name, node.outputs[0])
            edit.insert_before(node, Node("ConstantOfShape", node.name, attributes, [shape], [result]))
            edit.replace_uses(node.outputs[0], result)
            edit.erase(node)
            folded += 1
        edit.commit()
        return folded

    def _folded(
        self, node: Node, shapes: Shapes, edit: Editor, ctx: Context
    ) -> tuple[np.ndarray[Any, Any], gs.Tensor] | None:
        """The number and the shape of the result, or None."""
        if not node.is_onnx or node.op not in _ELEMENTWISE | _MOVES:
            return None
        fills = [(i, n) for i, t in enumerate(node.inputs) if (n := _fill(t, edit)) is not None]
        if len(fills) != 1 or (node.op in _MOVES and fills[0][0] != 0):
            return None
        place, fill = fills[0]
        number = np.asarray(fill.attrs["value"].values if "value" in fill.attrs else np.zeros(1, np.float32))
        if node.op in _MOVES:
            dims = shapes.shape(node.outputs[0])
            if dims is None or not all(isinstance(d, int) for d in dims):
                ctx.remark(node, "the shape of what it makes of one number is not known")
                return None
            return number, edit.constant(f"{node.outputs[0].name}_shape", np.array(dims, np.int64))
        operands: list[np.ndarray[Any, Any] | None] = []
        for index, tensor in enumerate(node.inputs):
            if index == place:
                operands.append(number.reshape(()))
            elif not edit.is_fixed(tensor) or tuple(tensor.shape):
                return None
            else:
                operands.append(np.asarray(tensor.values))
        try:
            return ctx.evaluate(edit.model, node, operands)[0], fill.inputs[0]
        except GraphoptError as error:
            ctx.remark(node, f"cannot be evaluated: {error}")
            return None


def _fill(tensor: gs.Tensor, edit: Editor) -> Node | None:
    producer = edit.producer(tensor)
    return producer if producer is not None and producer.op == "ConstantOfShape" and producer.is_onnx else None
