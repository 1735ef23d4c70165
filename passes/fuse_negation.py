"""A product with constant weights takes a sign into them; the numbers stay as they are but for the sign of a zero:

    -conv(x, W, b) = conv(x, -W, -b)            c - conv(x, W, b) = conv(x, -W, -b) + c            conv(-x, W, b) = conv(x, -W, b)

The same holds for ConvTranspose, Gemm and MatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass


@dataclass(frozen=True)
class FuseNegation(Pass):
    """Fold a sign before or behind Conv, ConvTranspose, Gemm and MatMul, or their subtraction from a constant, into the weight.

    Before:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] b = {5, 6}, float one = {1}>
        { h = Gemm (x, w, b)
          y = Sub (one, h) }
    After:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {-1, -2, -3, -4}, float[2] b = {-5, -6}, float one = {1}>
        { h = Gemm (x, w, b)
          y = Add (h, one) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Neg", "Sub"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of signs folded."""
        if model.opset < 7:  # up to then Sub broadcasts by attribute
            return 0
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            for before in (True, False):
                if edit.is_erased(node):
                    continue
                sign = edit.producer(node.inputs[0]) if before and _is_product(node) else None if before else node
                product = node if before else _negated(node, edit)
                if sign is None or product is None or (before and (sign.op != "Neg" or not sign.is_onnx)):
                    continue
                reason = _objection(product, sign, before, edit)
                if reason is not None:
                    ctx.remark(node, reason)
                    continue
                if not ctx.admit():
                    edit.commit()
                    return fused
                _fold(product, sign, before, edit)
                fused += 1
        edit.commit()
        return fused


def _is_product(node: Node | None) -> bool:
    return node is not None and node.is_onnx and node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _negated(node: Node, edit: Editor) -> Node | None:
    """The product of which `node` changes the sign."""
    if not node.is_onnx or node.op not in ("Neg", "Sub") or (node.op == "Sub" and not edit.is_fixed(node.inputs[0])):
        return None
    product = edit.producer(node.inputs[-1])
    return product if product is not None and _is_product(product) else None


def _objection(product: Node, sign: Node, before: bool, edit: Editor) -> str | None:
    """Why the sign cannot move into the weights, or None."""
    between, reader = (sign, product) if before else (product, sign)
    tensor, w = between.outputs[0], product.inputs[1]
    if edit.sole_consumer(tensor) is not reader or edit.graph_of(product) is not edit.graph_of(sign):
        return f"{tensor.name!r} is read by others too"
    if not all(edit.is_fixed(t) for t in product.inputs[1:] if t.name):
        return f"weight or bias of {product.name!r} is not constant"
    if edit.sole_consumer(w) is not product:
        return f"weight {w.name!r} is shared"
    if np.dtype(w.dtype).kind != "f":
        return f"weight {w.name!r} is {w.dtype}; folding is for float16, float32 and float64"
    return None


def _fold(product: Node, sign: Node, before: bool, edit: Editor) -> None:
    last = product if before else sign
    result = last.outputs[0]
    last.outputs.clear()
    operands = [sign.inputs[0] if before else product.inputs[0]]
    operands.append(edit.constant(product.inputs[1].name, np.negative(product.inputs[1].values)))
    for bias in product.inputs[2:]:
        operands.append(bias if before or not bias.name else edit.constant(bias.name, np.negative(bias.values)))
    target = edit.variable(product.outputs[0].name, result) if sign.op == "Sub" else result
    if sign.op == "Sub":
        target.shape = None
    new = Node(product.op, product.name, dict(product.attrs), operands, [target])
    new.attr_types = dict(product.attr_types)
    new.carried = product.carried
    edit.insert_before(last, new, origin=(product, sign))
    if sign.op == "Sub":
        edit.insert_before(last, Node("Add", sign.name, {}, [target, sign.inputs[0]], [result]), origin=(sign,))
    edit.erase(last)
    edit.erase(sign if before else product)
