"""``x * clip(x + 3, 0, 6) / 6`` is HardSwish, and ``clip(x + 3, 0, 6) / 6`` is HardSigmoid with slope 1/6.

HardSwish came with opset 14. Below it the product of x and a HardSigmoid is what is left, which is what runtimes make of HardSwish anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.analyses.idioms import Activation, gated, widened
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

_SINCE = 14
_FEW = 2  # nodes of the form below opset 14; no more are written for fewer


@dataclass(frozen=True)
class FuseHardSwish(Pass):
    """Compute HardSwish by one operator, or below opset 14 by two.

    Before:
        g (float[N] x) => (float[N] y)
        <float three = {3}, float zero = {0}, float six = {6}>
        { a = Add (x, three)
          c = Clip (a, zero, six)
          m = Mul (x, c)
          y = Div (m, six) }
    After:
        g (float[N] x) => (float[N] y)
        { y = HardSwish (x) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Clip", "HardSigmoid"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of activations fused."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            found = gated(node, edit)
            if found is None or found.kind != "hardswish":
                continue
            reason = _objection(found, model.opset, shapes)
            if reason is not None:
                ctx.remark(node, f"no HardSwish: {reason}")
                continue
            if not ctx.admit():
                break
            _write(found, model.opset, edit)
            fused += 1
        edit.commit()
        return fused


def _objection(found: Activation, opset: int, shapes: Shapes) -> str | None:
    if shapes.dtype(found.x) != np.float32:
        return "ONNX Runtime's HardSigmoid is for float32"
    if opset < _SINCE and len(found.nodes) <= _FEW:
        return f"opset {opset} has none, and fewer nodes cannot say it"
    return widened(found, shapes)


def _write(found: Activation, opset: int, edit: Editor) -> None:
    last = edit.producer(found.result)
    assert last is not None
    last.outputs.clear()
    if opset >= _SINCE:
        edit.insert_before(last, Node("HardSwish", f"{last.name}_hs", {}, [found.x], [found.result]), found.nodes)
    else:
        gate = edit.variable(f"{found.result.name}_gate", found.result)
        slope = {"alpha": float(np.float32(1 / 6)), "beta": 0.5}
        edit.insert_before(last, Node("HardSigmoid", f"{last.name}_gate", slope, [found.x], [gate]), found.nodes)
        edit.insert_before(last, Node("Mul", f"{last.name}_hs", {}, [found.x, gate], [found.result]), found.nodes)
    edit.erase(last)
