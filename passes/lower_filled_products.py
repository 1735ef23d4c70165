"""A product with a matrix of one number c sums each row: ``(x @ fill(c))[n, m] = c * sum(x[n])``.

    gemm(reshape(x), fill(c), b) = gemm(reduce_sum(x), [c c ... c], b)

The matrix, which `fold-constants` left as a ConstantOfShape for its size, becomes one row, and a Reshape that merges axes for the product
alone is not needed for a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place


@dataclass(frozen=True)
class LowerFilledProducts(Pass):
    """Sum rows instead of multiplying them with a ConstantOfShape, where that saves the Reshape before it.

    Before:
        g (float[N,4,2,1] x) => (float[N,3] y)
        <int64[2] shape = {8, 3}, int64[2] rows = {0, -1}, float[3] b = {1, 2, 3}>
        { w = ConstantOfShape <value = float[1] {0.5}> (shape)
          r = Reshape (x, rows)
          y = Gemm (r, w, b) }
    After:
        g (float[N,4,2,1] x) => (float[N,3] y)
        <int64[2] axes = {1, 2}, float[1,3] w = {0.5, 0.5, 0.5}, float[3] b = {1, 2, 3}>
        { r = ReduceSum <keepdims = 0> (x, axes)
          y = Gemm (r, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ConstantOfShape"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Gemm", "MatMul"), ("ConstantOfShape",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of products rewritten."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        for node in list(model.nodes()):
            fill = edit.producer(node.inputs[1]) if node.op in ("Gemm", "MatMul") and node.is_onnx else None
            if fill is None or fill.op != "ConstantOfShape" or not fill.is_onnx:
                continue
            reshape = edit.producer(node.inputs[0])
            reason = _objection(node, fill, reshape, shapes, edit)
            if reason is not None or reshape is None:
                ctx.remark(node, reason or f"{node.inputs[0].name!r} is an input")
                continue
            if not ctx.admit():
                break
            _rewrite(node, fill, reshape, model.opset, shapes, edit)
            done += 1
        edit.commit()
        return done


def _objection(node: Node, fill: Node, reshape: Node | None, shapes: Shapes, edit: Editor) -> str | None:
    weight, dtype = shapes.shape(node.inputs[1]), shapes.dtype(node.inputs[1])
    if weight is None or len(weight) != 2 or not all(isinstance(d, int) for d in weight):
        return f"{node.inputs[1].name!r} is no matrix of known size"
    if dtype is None or dtype.kind != "f" or dtype.itemsize < 4 or node.attrs.get("transA", 0):
        return "it is not of floats, or of half ones, in which a sum may overflow that is not yet scaled, or transposes its first operand"
    if not np.isfinite(_number(fill)):
        return f"{node.inputs[1].name!r} is not of a finite number"
    if edit.sole_consumer(node.inputs[1]) is not node or edit.graph_of(fill) is not edit.graph_of(node):
        return f"{node.inputs[1].name!r} is read by others too"
    if reshape is None or reshape.op not in ("Reshape", "Flatten") or not reshape.is_onnx:
        return "no Reshape before it would be saved"
    if edit.sole_consumer(node.inputs[0]) is not node or edit.graph_of(reshape) is not edit.graph_of(node):
        return f"{node.inputs[0].name!r} is read by others too"
    source, rows = shapes.shape(reshape.inputs[0]), shapes.shape(node.inputs[0])
    if source is None or rows is None or len(rows) != 2 or len(source) < 3 or source[0] != rows[0] or source[-1] != 1:
        return "the Reshape before it does more than to merge all axes but the first, the last of them of one element"
    return None


def _number(fill: Node) -> Any:
    """The number, with its type, that a ConstantOfShape repeats."""
    return np.asarray(fill.attrs["value"].values if "value" in fill.attrs else np.zeros(1, np.float32)).reshape(-1)[0]


def _rewrite(node: Node, fill: Node, reshape: Node, opset: int, shapes: Shapes, edit: Editor) -> None:
    source, weight = reshape.inputs[0], node.inputs[1]
    axes = list(range(1, (shapes.rank(source) or 0) - 1))
    attributes: dict[str, Any] = {"keepdims": 0}
    operands: list[gs.Tensor] = [source]
    if opset >= 13:
        operands.append(edit.constant(f"{reshape.name}_axes", np.array(axes, np.int64)))
    else:
        attributes["axes"] = axes
    turned = bool(node.attrs.get("transB", 0))
    width = (shapes.shape(weight) or (0, 0))[0 if turned else 1]
    row = edit.constant(weight.name, np.full((width, 1) if turned else (1, width), _number(fill)))
    edit.take_over(node.inputs[0], Node("ReduceSum", "sum", attributes, operands), (reshape, node))
    node.inputs[0].shape = None
    node.inputs[1] = row
    edit.erase(fill)
