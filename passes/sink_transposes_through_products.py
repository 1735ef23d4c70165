"""``transpose(x) @ W = transpose(x @ W)`` for a matrix W and a permutation that leaves the last axis in its place.

That alone gains nothing; it brings the Transpose nearer to one that undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.layouts import permutation
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass


@dataclass(frozen=True)
class SinkTransposesThroughProducts(Pass):
    """Multiply by a constant matrix before transposing the other axes.

    Before:
        g (float[B,S,2] x) => (float[S,B,2] y)
        <float[2,2] w = {1,2,3,4}>
        { t = Transpose <perm = [1,0,2]> (x)
          y = MatMul (t, w) }
    After:
        g (float[B,S,2] x) => (float[S,B,2] y)
        <float[2,2] w = {1,2,3,4}>
        { p = MatMul (x, w)
          y = Transpose <perm = [1,0,2]> (p) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"MatMul"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of products moved."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        for node in list(model.nodes()):
            turn = edit.producer(node.inputs[0]) if node.op == "MatMul" and node.is_onnx else None
            perm = None if turn is None else permutation(turn, shapes)
            if turn is None or perm is None:
                continue
            reason = _objection(node, turn, perm, shapes, edit)
            if reason is not None:
                ctx.remark(turn, reason)
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            product = edit.variable(f"{result.name}_product")
            product.dtype = shapes.dtype(result)
            first = Node("MatMul", node.name, {}, [turn.inputs[0], node.inputs[1]], [product])
            edit.insert_before(node, first, (node,))
            edit.insert_before(node, Node("Transpose", turn.name, {"perm": list(perm)}, [product], [result]), (turn,))
            edit.erase(node)
            edit.erase(turn)
            done += 1
        edit.commit()
        return done


def _objection(node: Node, turn: Node, perm: tuple[int, ...], shapes: Shapes, edit: Editor) -> str | None:
    if len(perm) < 3 or perm[-1] != len(perm) - 1:
        return "it moves the last axis"
    if edit.sole_consumer(turn.outputs[0]) is not node or edit.graph_of(turn) is not edit.graph_of(node):
        return f"{turn.outputs[0].name!r} is read by others too"
    if not edit.is_fixed(node.inputs[1]) or len(node.inputs[1].shape) != 2:
        return f"{node.inputs[1].name!r} is no constant matrix"
    if node.inputs[1].shape[1] > node.inputs[1].shape[0]:
        return "the product is larger than what is transposed now"
    return None
