"""Recognise models that are quantized already, and how."""

from __future__ import annotations

from collections import Counter
from typing import Final

import onnx_graphsurgeon as gs

from graphopt.ir import Model

FORMS: Final = {
    "QLinearConv": "operators on codes",
    "QLinearMatMul": "operators on codes",
    "QGemm": "operators on codes",
    "ConvInteger": "operators on codes",
    "DynamicQuantizeLinear": "dynamic codes",
    "MatMulInteger": "dynamic codes",
    "DynamicQuantizeMatMul": "dynamic codes",
    "QuantizeLinear": "Q/DQ pairs",
    "MatMulNBits": "weights alone",
}


def forms(model: Model) -> dict[str, int]:
    """How `model` is quantized: form -> number of operators that show it; empty for a float model."""
    found: Counter[str] = Counter()
    pairs = False
    for node in model.nodes():
        if node.op in FORMS:
            found[FORMS[node.op]] += 1
            pairs = pairs or node.op == "QuantizeLinear"
    if not pairs:
        decoded = [n for n in model.nodes() if n.op == "DequantizeLinear" and isinstance(n.inputs[0], gs.Constant)]
        if decoded:
            found["weights alone"] += len(decoded)
    return dict(sorted(found.items()))
