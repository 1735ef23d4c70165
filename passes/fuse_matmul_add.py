"""``A @ B + C`` of matrices is Gemm, where C broadcasts to the product and not the other way round; a Gemm without C takes one in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place


@dataclass(frozen=True)
class FuseMatmulAdd(Pass):
    """Turn MatMul and Add of matrices into Gemm.

    Before:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] b = {5, 6}>
        { a = MatMul (x, w)
          y = Add (a, b) }
    After:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] b = {5, 6}>
        { y = Gemm (x, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"MatMul", "Gemm"})
    places: ClassVar[tuple[Place, ...]] = (
        Place(("MatMul", "Gemm"), read_by=("Add",)),
        Place(("Add",), ("MatMul", "Gemm")),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of pairs fused."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op != "Add" or not node.is_onnx or model.opset < 7:
                continue
            for index in (0, 1):
                product = edit.producer(node.inputs[index])
                if product is not None and product.op in ("MatMul", "Gemm") and product.is_onnx:
                    reason = _objection(node, product, index, shapes, edit)
                    if reason is None:
                        break
                    ctx.remark(node, reason)
            else:
                continue
            if not ctx.admit():
                break
            result, addend = node.outputs[0], node.inputs[1 - index]
            node.outputs.clear()
            attributes = {name: value for name, value in product.attrs.items() if name != "beta"}
            new = Node("Gemm", product.name, attributes, [*product.inputs[:2], addend], [result])
            edit.insert_before(node, new, origin=(product, node))
            edit.erase(node)
            edit.erase(product)
            fused += 1
        edit.commit()
        return fused


def _objection(node: Node, product: Node, index: int, shapes: Shapes, edit: Editor) -> str | None:
    """Why the two are no Gemm, or None."""
    between, addend = node.inputs[index], node.inputs[1 - index]
    if edit.sole_consumer(between) is not node or edit.graph_of(product) is not edit.graph_of(node):
        return f"{between.name!r} is read by others too"
    if len(product.inputs) > 2 and product.inputs[2].name:
        return f"{product.name!r} adds {product.inputs[2].name!r} already"
    if any(shapes.rank(t) != 2 for t in product.inputs[:2]):
        return "an operand of the product is no matrix"
    dtype = shapes.dtype(between)
    if dtype is None or dtype.kind != "f":
        return "Gemm of this type is not available in every runtime"
    wide, narrow = shapes.shape(between), shapes.shape(addend)
    if wide is None or narrow is None or len(narrow) > 2:
        return f"{addend.name!r} may have more than two dimensions"
    if any(d not in (1, w) for d, w in zip(reversed(narrow), reversed(wide), strict=False)):
        return f"{addend.name!r} may widen the product"
    return None
