"""A product with a constant matrix takes a factor per row or column into the matrix:

    (x @ W) * k = x @ (W * k)               k by column of W, or a scalar
    (x * k) @ W = x @ (k[:, None] * W)      k by row of W, or a scalar

Gemm's bias is multiplied in the first case. Division is multiplication by the reciprocal. Folded in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt.analyses.idioms import members
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FuseMatmulScale(Pass):
    """Fold constant factors and divisors before or behind MatMul and Gemm into their constant matrix.

    Before:
        g (float[N,S,2] x) => (float[N,S,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float half = {0.5}, float[2] k = {2, 4}>
        { a = Mul (x, half)
          b = MatMul (a, w)
          y = Mul (b, k) }
    After:
        g (float[N,S,2] x) => (float[N,S,2] y)
        <float[2,2] w = {1, 4, 3, 8}>
        { y = MatMul (x, w) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"MatMul", "Gemm"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of factors folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        idioms = members(model, edit)
        for node in list(model.nodes()):
            found = _before(node, edit) or _behind(node, edit)
            if found is None:
                continue
            product, scale, index = found
            if id(scale) in idioms:
                ctx.remark(scale, "it stays part of a normalization or a Gelu, which runtimes fuse")
                continue
            before = product is node
            folded = _folded(product, scale, index, before, shapes, edit)
            if isinstance(folded, str):
                ctx.remark(node, folded)
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            w, c = folded
            operands = [scale.inputs[index] if before else product.inputs[0], edit.constant(product.inputs[1].name, w)]
            operands += [edit.constant(product.inputs[2].name, c)] if c is not None else list(product.inputs[2:])
            new = Node(product.op, product.name, dict(product.attrs), operands, [result])
            new.attr_types = dict(product.attr_types)
            new.carried = product.carried
            edit.insert_before(node, new, origin=(product, scale))
            edit.erase(node)
            edit.erase(scale if before else product)
            fused += 1
        edit.commit()
        return fused


Found = tuple[Node, Node, int]  # the product, the Mul or Div, and the place of its operand that is no constant


def _constant_side(scale: Node, edit: Editor) -> list[int]:
    """The places whose counterpart is constant."""
    return [i for i in ((0, 1) if scale.op == "Mul" else (0,)) if edit.is_fixed(scale.inputs[1 - i])]


def _is_product(node: Node | None) -> bool:
    return node is not None and node.op in ("MatMul", "Gemm") and node.is_onnx


def _before(node: Node, edit: Editor) -> Found | None:
    scale = edit.producer(node.inputs[0]) if _is_product(node) else None
    if scale is None or scale.op not in ("Mul", "Div") or not scale.is_onnx:
        return None
    return next(((node, scale, i) for i in _constant_side(scale, edit)), None)


def _behind(node: Node, edit: Editor) -> Found | None:
    if node.op not in ("Mul", "Div") or not node.is_onnx:
        return None
    for index in _constant_side(node, edit):
        product = edit.producer(node.inputs[index])
        if product is not None and _is_product(product):
            return product, node, index
    return None


def _folded(
    product: Node, scale: Node, index: int, before: bool, shapes: Shapes, edit: Editor
) -> tuple[Array, Array | None] | str:
    """The matrix and the bias (None: it stays), or why there are none."""
    between = (scale if before else product).outputs[0]
    if edit.sole_consumer(between) is not (product if before else scale) or edit.graph_of(product) is not edit.graph_of(
        scale
    ):
        return f"{between.name!r} is read by others too"
    w, constant = product.inputs[1], scale.inputs[1 - index]
    if not edit.is_fixed(w) or len(w.shape) != 2:
        return f"{w.name!r} is no constant matrix"
    if edit.sole_consumer(w) is not product:
        return f"weight {w.name!r} is shared"
    dtype = np.dtype(w.dtype)
    if dtype.kind != "f" or np.dtype(constant.dtype) != dtype:
        return f"weight {w.name!r} is {dtype}, the factor {constant.dtype}; folding is for float16, float32 and float64"
    values, shape = constant.values, shapes.shape(scale.inputs[index])
    flipped = product.op == "Gemm" and bool(product.attrs.get("transB", 0))
    lanes = int(w.shape[int(flipped if before else not flipped)])
    if shape is None or values.ndim > len(shape):
        if values.ndim:
            return f"factor {constant.name!r} may broadcast its operand"
    elif values.size != 1 and shape[-1] != lanes:
        return f"factor {constant.name!r} may broadcast its operand"
    if values.size != 1 and (not values.ndim or values.shape[-1] != lanes or values.size != lanes):
        return f"factor {constant.name!r} of shape {list(values.shape)} is not constant per {'row' if before else 'column'}"
    if before and values.size != 1 and product.op == "Gemm" and product.attrs.get("transA", 0):
        return "the operand is transposed behind the factor"
    with np.errstate(all="ignore"):
        k = values.reshape(-1).astype(np.float64)
        k = 1 / k if scale.op == "Div" else k
        exact = w.values.astype(np.float64) * (k[:, None] if before != flipped else k[None, :])
        weight, bias = exact.astype(dtype), None
        if not before and len(product.inputs) > 2 and product.inputs[2].name:
            c = product.inputs[2]
            if not edit.is_fixed(c):
                return f"bias {c.name!r} is not constant"
            wide = c.values.astype(np.float64) * k if k.size > 1 else c.values.astype(np.float64) * k[0]
            bias = wide.astype(dtype)
    if not np.isfinite(weight).all() or (bias is not None and not np.isfinite(bias).all()):
        return f"folding would make weight {w.name!r} infinite or NaN in {dtype}"
    if np.abs(weight - exact).max(initial=0) > np.finfo(dtype).eps * np.abs(exact).max(initial=0):
        return f"folding would make weight {w.name!r} too small for {dtype}"
    return weight, bias
