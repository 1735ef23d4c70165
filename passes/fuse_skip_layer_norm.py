"""``norm(a + b)`` is one operator of ONNX Runtime, which also gives the sum to who else reads it, and takes the bias of the product before it.

In a transformer the sum is the residual stream; its readers are the normalization and, where that comes first in each block, the next sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Variable
from graphopt.pass_base import Context, Exactness, Pass

_OPERATORS = {"LayerNormalization": "SkipLayerNormalization", "RMSNormalization": "SkipSimplifiedLayerNormalization"}


@dataclass(frozen=True)
class FuseSkipLayerNorm(Pass):
    """Add and normalize by one operator.

    Before:
        g (float[N,S,4] x, float[N,S,4] r) => (float[N,S,4] y, float[N,S,4] z)
        <float[4] c = {1,1,1,1}, float[4] k = {1,2,3,4}, float[4] b = {4,3,2,1}>
        { p = Exp (x)
          q = Add (p, c)
          s = Add (q, r)
          y = LayerNormalization <axis = -1, epsilon = 0.00001> (s, k, b)
          z = Neg (s) }
    After:
        g (float[N,S,4] x, float[N,S,4] r) => (float[N,S,4] y, float[N,S,4] z)
        <float[4] c = {1,1,1,1}, float[4] k = {1,2,3,4}, float[4] b = {4,3,2,1}>
        { p = Exp (x)
          y, , , s = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (p, r, k, b, c)
          z = Neg (s) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset(_OPERATORS)
    serves: ClassVar[tuple[str, ...]] = ("ort:cuda",)  # the CPU's kernel is slower than its parts, see merge-sums

    contrib: bool | None = None  # whether com.microsoft operators may be written; none: as the target says

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of normalizations fused."""
        if not ctx.serves(self.serves, self.contrib):
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for norm in list(model.nodes()):
            if norm.op not in _OPERATORS or not norm.is_onnx:
                continue
            add = edit.producer(norm.inputs[0])
            if add is None or add.op != "Add" or not add.is_onnx:
                continue
            reason = _objection(norm, add, shapes, edit)
            if reason is not None:
                ctx.remark(norm, f"the sum before it stays: {reason}")
                continue
            if not ctx.admit():
                break
            _write(norm, add, shapes, edit)
            fused += 1
        edit.commit()
        if fused:
            model.set_opset("com.microsoft", 1)
        return fused


def _objection(norm: Node, add: Node, shapes: Shapes, edit: Editor) -> str | None:
    total = add.outputs[0]
    shape = shapes.shape(total)
    if edit.graph_of(add) is not edit.graph_of(norm):
        return "it lies in another graph"
    if edit.is_output(total):
        return f"{total.name!r} is a graph output"
    if shape is None or len(shape) not in (2, 3):
        return "it has neither two dimensions nor three"
    if int(norm.attrs.get("axis", -1)) not in (-1, len(shape) - 1):
        return "the normalization is over more than the last axis"
    if shapes.dtype(total) != np.float32:
        return "ONNX Runtime's operator is for float32"
    if any(shapes.shape(t) != shape for t in add.inputs):
        return f"its operands {add.inputs[0].name!r} and {add.inputs[1].name!r} may differ in shape"
    if any(t.name and (not edit.is_fixed(t) or len(t.shape) != 1) for t in norm.inputs[1:]):
        return "scale or bias is no constant row"
    if any(t.name for t in norm.outputs[1:]):
        return "more than the first output is used"
    return None


def _write(norm: Node, add: Node, shapes: Shapes, edit: Editor) -> None:
    left, right = add.inputs
    bias: gs.Tensor | None = None
    origin = [add, norm]
    for first, second in ((left, right), (right, left)):
        before = _biased(first, add, shapes, edit)
        if before is not None:
            (left, bias), right = before, second
            origin.insert(0, edit.producer(first))  # type: ignore[arg-type]
            break
    total, result = add.outputs[0], norm.outputs[0]
    operands: list[Any] = [left, right, *norm.inputs[1:]]
    if bias is not None:
        before_bias = 4 if norm.op == "LayerNormalization" else 3  # only its operator has a beta ahead of it
        operands += [Variable("")] * (before_bias - len(operands)) + [bias]
    outputs = [result]
    if len(total.outputs) > 1:
        outputs += [Variable(""), Variable(""), total]
        add.outputs.clear()
    norm.outputs.clear()
    attributes = {"epsilon": float(norm.attrs.get("epsilon", 1e-5))}
    new = Node(_OPERATORS[norm.op], norm.name, attributes, operands, outputs, "com.microsoft")
    edit.insert_before(norm, new, origin)
    edit.erase(norm)
    edit.erase(add)


def _biased(tensor: gs.Tensor, reader: Node, shapes: Shapes, edit: Editor) -> tuple[gs.Tensor, gs.Tensor] | None:
    """`tensor` as a value and a constant row added to it, where that sum is read here alone."""
    node = edit.producer(tensor)
    if node is None or node.op != "Add" or not node.is_onnx or edit.sole_consumer(tensor) is not reader:
        return None
    shape = shapes.shape(tensor)
    for index in (0, 1):
        row = node.inputs[index]
        if edit.is_fixed(row) and shape is not None and tuple(row.shape) == shape[-1:]:
            return (node.inputs[1 - index], row) if shapes.shape(node.inputs[1 - index]) == shape else None
    return None
