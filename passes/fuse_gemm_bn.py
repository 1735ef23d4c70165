"""Batch normalization of a matrix product is a matrix product. With ``k = scale / sqrt(var + epsilon)``, per column:

    BN(alpha * A @ B + beta * C) = alpha * A @ (B * k) + (beta * C - mean) * k + bias

Folded in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FuseGemmBn(Pass):
    """Fold an inference-mode BatchNormalization into the Gemm, or MatMul of matrices, that feeds it.

    Before:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {1, 1}, float[2] v = {1, 1}>
        { a = MatMul (x, w)
          y = BatchNormalization <epsilon = 0.0> (a, s, b, m, v) }
    After:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 4, 3, 8}, float[2] c = {-1, -1}>
        { y = Gemm (x, w, c) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"BatchNormalization"})
    places: ClassVar[tuple[Place, ...]] = (Place(("BatchNormalization",), ("Gemm", "MatMul")),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of normalizations folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op != "BatchNormalization" or not node.is_onnx or model.opset < 9:
                continue
            gemm = edit.producer(node.inputs[0])
            if gemm is None or gemm.op not in ("Gemm", "MatMul") or not gemm.is_onnx:
                continue
            folded = _folded(node, gemm, shapes, edit)
            if isinstance(folded, str):
                ctx.remark(node, folded)
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            constants = [edit.constant(gemm.inputs[1].name, folded[0]), edit.constant(f"{gemm.name}_bias", folded[1])]
            attributes = {k: v for k, v in gemm.attrs.items() if k != "beta"}
            new = Node("Gemm", gemm.name, attributes, [gemm.inputs[0], *constants], [result])
            new.attr_types = dict(gemm.attr_types)
            edit.insert_before(node, new, origin=(gemm, node))
            edit.erase(node)
            edit.erase(gemm)
            fused += 1
        edit.commit()
        return fused


def _folded(bn: Node, gemm: Node, shapes: Shapes, edit: Editor) -> tuple[Array, Array] | str:
    """Weight and bias of the Gemm, or why there are none."""
    if edit.sole_consumer(gemm.outputs[0]) is not bn or edit.graph_of(gemm) is not edit.graph_of(bn):
        return f"{gemm.outputs[0].name!r} is read by others too"
    if bn.attrs.get("training_mode", 0) or any(t.name for t in bn.outputs[1:]):
        return "it runs in training mode"
    if shapes.rank(gemm.inputs[0]) != 2 or shapes.rank(gemm.inputs[1]) != 2:
        return f"{gemm.name!r} is no product of matrices"
    w = gemm.inputs[1]
    if not edit.is_fixed(w) or not all(edit.is_fixed(t) for t in [*bn.inputs[1:5], *gemm.inputs[2:]]):
        return "weight, bias and statistics are not all constant"
    if edit.sole_consumer(w) is not gemm:
        return f"weight {w.name!r} is shared"
    dtype = np.dtype(w.dtype)
    if dtype.kind != "f":
        return f"weight {w.name!r} is {dtype}, folding is for float16, float32 and float64"
    by_row = bool(gemm.attrs.get("transB", 0)) and gemm.op == "Gemm"
    columns = int(w.shape[0] if by_row else w.shape[1])
    scale, shift, mean, var = (t.values.astype(np.float64) for t in bn.inputs[1:5])
    if any(v.shape != (columns,) for v in (scale, shift, mean, var)):
        return f"its parameters are not one for each of the {columns} columns"
    c = np.zeros(columns)
    if len(gemm.inputs) > 2 and gemm.inputs[2].name:
        old = gemm.inputs[2].values
        if old.size != 1 and (old.size != columns or old.shape[-1] != columns):
            return f"{gemm.inputs[2].name!r} of shape {list(old.shape)} is not constant per column"
        c = np.broadcast_to(old.reshape(-1).astype(np.float64), (columns,)) * float(gemm.attrs.get("beta", 1.0))
    with np.errstate(all="ignore"):
        k = scale / np.sqrt(var + float(np.float32(bn.attrs.get("epsilon", 1e-5))))
        exact = w.values.astype(np.float64) * (k[:, None] if by_row else k[None, :])
        weight, bias = exact.astype(dtype), ((c - mean) * k + shift).astype(dtype)
    if not np.isfinite(weight).all() or not np.isfinite(bias).all():
        return f"folding would make weight {w.name!r} infinite or NaN in {dtype}"
    if np.abs(weight - exact).max(initial=0) > np.finfo(dtype).eps * np.abs(exact).max(initial=0):
        return f"folding would make weight {w.name!r} too small for {dtype}"
    return weight, bias
