"""The largest of a row's probabilities stands where the largest of the row does: ``argmax(softmax(x)) = argmax(x)`` along one axis.

Softmax may round two numbers of a row to one, of which ArgMax then takes the first: where that happens, the index is that of the larger one
now. So the class is B, and half precision, which rounds that much often, is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place


@dataclass(frozen=True)
class FuseArgMax(Pass):
    """Take the largest of the operand of a Softmax or LogSoftmax.

    Before:
        g (float[N,4] x) => (int64[N,1] y)
        { s = Softmax <axis = 1> (x)
          y = ArgMax <axis = -1> (s) }
    After:
        g (float[N,4] x) => (int64[N,1] y)
        { y = ArgMax <axis = -1> (x) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ArgMax"})
    places: ClassVar[tuple[Place, ...]] = (Place(("ArgMax",), ("Softmax", "LogSoftmax")),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of Softmax that are no longer asked."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            softmax = edit.producer(node.inputs[0]) if node.op == "ArgMax" and node.is_onnx else None
            if softmax is None or softmax.op not in ("Softmax", "LogSoftmax") or not softmax.is_onnx:
                continue
            reason = _objection(softmax, node, shapes, edit, model.opset)
            if reason is not None:
                ctx.remark(node, reason)
                continue
            if not ctx.admit():
                break
            new = Node("ArgMax", "largest", dict(node.attrs), [softmax.inputs[0]])
            edit.take_over(node.outputs[0], new, (softmax, node))
            edit.erase(softmax)
            fused += 1
        edit.commit()
        return fused


def _objection(softmax: Node, node: Node, shapes: Shapes, edit: Editor, opset: int) -> str | None:
    between = node.inputs[0]
    if edit.sole_consumer(between) is not node or edit.graph_of(softmax) is not edit.graph_of(node):
        return f"{between.name!r} is read by others too"
    dtype, rank = shapes.dtype(between), shapes.rank(between)
    if dtype is None or rank is None or dtype.kind != "f" or dtype.itemsize < 4:
        return "half precision rounds many probabilities to one"
    over = int(softmax.attrs.get("axis", -1 if opset >= 13 else 1)) % rank
    along = int(node.attrs.get("axis", 0)) % rank
    if opset < 13 and along < over:
        return "it looks for the largest across the rows that the Softmax normalizes"
    others = [d for axis, d in enumerate(shapes.shape(between) or ()) if axis >= over and axis != along]
    if opset < 13 and softmax.op == "Softmax" and any(d != 1 for d in others):
        return "the Softmax normalizes over more than the row, of which all may vanish"
    if opset >= 13 and along != over:
        return "it looks for the largest across the rows that the Softmax normalizes"
    return None
