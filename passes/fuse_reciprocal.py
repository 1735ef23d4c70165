"""``(1 / x) * y = y / x``, rounded once instead of twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place


@dataclass(frozen=True)
class FuseReciprocal(Pass):
    """Divide instead of multiplying with a reciprocal.

    Before:
        g (float[N] x, float[N] z) => (float[N] y)
        <float one = {1}>
        { r = Div (one, x)
          y = Mul (z, r) }
    After:
        g (float[N] x, float[N] z) => (float[N] y)
        { y = Div (z, x) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Reciprocal", "Div"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Reciprocal", "Div"), read_by=("Mul",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of products replaced."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op not in ("Reciprocal", "Div") or not node.is_onnx or model.opset < 7:
                continue
            source = _inverted(node, shapes, edit)
            if source is None:
                continue
            product = edit.sole_consumer(node.outputs[0])
            if product is None or product.op != "Mul" or not product.is_onnx:
                ctx.remark(node, "no Mul alone reads it")
                continue
            if edit.graph_of(product) is not edit.graph_of(node):
                ctx.remark(node, "the product lies in another graph")
                continue
            if not ctx.admit():
                break
            other = product.inputs[1] if product.inputs[0] is node.outputs[0] else product.inputs[0]
            edit.take_over(product.outputs[0], Node("Div", "quotient", {}, [other, source]), (node, product))
            edit.erase(node)
            fused += 1
        edit.commit()
        return fused


def _inverted(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """x, where `node` computes 1 / x of floats, in the shape of x."""
    dtype = shapes.dtype(node.outputs[0])
    if dtype is None or dtype.kind != "f":
        return None
    if node.op == "Reciprocal":
        return node.inputs[0]
    one, source = node.inputs
    if not edit.is_fixed(one) or one.values.size != 1 or np.asarray(one.values).reshape(())[()] != 1:
        return None
    rank = shapes.rank(source)
    return source if rank is not None and len(one.shape) <= rank else None
