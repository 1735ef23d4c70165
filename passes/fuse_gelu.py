"""``0.5 x (1 + erf(x / sqrt 2))`` and its approximation by tanh are Gelu; ``x sigmoid(alpha x)`` is QuickGelu.

The standard operator came with opset 20. Below it, and for QuickGelu (SiLU with alpha = 1), ONNX Runtime has operators of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt.analyses.idioms import Activation, gated, gelu, widened
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import CONTRIB, Context, Exactness, Pass

_SINCE = 20


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Compute Gelu, exact or approximate, by one operator.

    Before:
        g (float[N] x) => (float[N] y)
        <float r = {1.4142135}, float one = {1}, float half = {0.5}>
        { a = Div (x, r)
          e = Erf (a)
          b = Add (e, one)
          c = Mul (x, b)
          y = Mul (c, half) }
    After:
        g (float[N] x) => (float[N] y)
        { y = Gelu (x) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Erf", "Tanh", "Sigmoid"})

    contrib: bool | None = None  # whether com.microsoft operators may be written; none: as the target says

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of activations fused."""
        shapes, edit, contrib = ctx.analysis(Shapes, model), Editor(model), ctx.serves(CONTRIB, self.contrib)
        fused = 0
        for node in list(model.nodes()):
            found = gelu(node, edit) or gated(node, edit)
            if found is None or found.kind not in ("erf", "tanh", "sigmoid"):
                continue
            op = widened(found, shapes) or _operator(found, model.opset, contrib, shapes.dtype(found.x))
            if isinstance(op, str):
                ctx.remark(node, f"no Gelu: {op}")
                continue
            if not ctx.admit():
                break
            name, domain, attributes = op
            edit.take_over(found.result, Node(name, "gelu", attributes, [found.x], domain=domain), found.nodes)
            if domain:
                model.set_opset(domain, 1)
            fused += 1
        edit.commit()
        return fused


def _operator(
    found: Activation, opset: int, contrib: bool, dtype: np.dtype[Any] | None
) -> tuple[str, str, dict[str, Any]] | str:
    """Operator, domain and attributes, or why there is none."""
    if found.kind != "sigmoid" and opset >= _SINCE:
        return "Gelu", "", {} if found.kind == "erf" else {"approximate": "tanh"}
    if not contrib:
        return (
            f"opset {opset} has none"
            if found.kind != "sigmoid"
            else "x * sigmoid(a * x) is an operator of ONNX Runtime alone"
        )
    if dtype != np.float32:
        return "ONNX Runtime's operator is for float32"
    if found.kind == "sigmoid":
        return "QuickGelu", "com.microsoft", {"alpha": float(np.float32(found.alpha))}
    return "Gelu" if found.kind == "erf" else "FastGelu", "com.microsoft", {}
