"""Multiply-accumulates of the operators that have nearly all of them: convolutions, matrix products, recurrent layers, attention."""

from __future__ import annotations

from graphopt.analyses import symbolic
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Dim
from graphopt.ir import Model, Node


def macs(model: Model) -> tuple[Dim, dict[str, Dim]]:
    """Multiply-accumulates of one run of `model`, as numbers or expressions in its symbolic dimensions.

    Returns:
        The sum, and the count of each node by name. Nodes of which a shape is not known count 0; bodies count once.
    """
    shapes = Shapes(model)
    counts: dict[str, Dim] = {}
    total: Dim = 0
    for node in model.nodes():
        count = _node(node, shapes)
        if count != 0:
            counts[node.name or node.outputs[0].name] = count
            total = symbolic.add(total, count)
    return total, counts


def _node(node: Node, shapes: Shapes) -> Dim:
    if not node.is_onnx or not node.inputs:
        return 0
    operands = [shapes.shape(t) if t.name else () for t in node.inputs]
    result = shapes.shape(node.outputs[0])
    if node.op in ("Conv", "ConvInteger", "QLinearConv"):
        weight = operands[3 if node.op == "QLinearConv" else 1]
        return 0 if result is None or weight is None else symbolic.product([*result, *weight[1:]])
    if node.op == "ConvTranspose":
        source, weight = operands[:2]
        return 0 if source is None or weight is None else symbolic.product([*source, *weight[1:]])
    if node.op in ("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm"):
        source = operands[0]
        if result is None or not source:
            return 0
        inner = source[0] if node.op == "Gemm" and node.attrs.get("transA", 0) else source[-1]
        return symbolic.multiply(symbolic.product(result), inner)
    if node.op in ("LSTM", "GRU", "RNN"):
        source, weight, recurrent = operands[:3]
        if not source or not weight or not recurrent:
            return 0
        steps = symbolic.multiply(source[0], source[1])
        return symbolic.multiply(steps, symbolic.add(symbolic.product(weight), symbolic.product(recurrent)))
    return 0
