"""``x * tanh(softplus(x))`` is Mish, from opset 18 on.

ONNX Runtime has no kernel for it and takes it apart again, in the same time; so it is for TensorRT, whose parser has one layer for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import opset
from graphopt.analyses.idioms import gated, widened
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import TENSORRT, Context, Exactness, Pass

_SINCE = 18


@dataclass(frozen=True)
class FuseMish(Pass):
    """Compute Mish by one operator.

    Before:
        g (float[N] x) => (float[N] y)
        { s = Softplus (x)
          t = Tanh (s)
          y = Mul (x, t) }
    After:
        g (float[N] x) => (float[N] y)
        { y = Mish (x) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    serves: ClassVar[tuple[str, ...]] = TENSORRT
    ops: ClassVar[frozenset[str] | None] = frozenset({"Softplus"})

    apply: bool | None = None  # whether to run; none: for the targets that it serves
    raise_opset: bool | None = None  # whether an older model is raised to opset 18; none: where a target is known

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of activations fused."""
        if not ctx.serves(self.serves, self.apply):
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        obstacle = opset.obstacle(model, _SINCE, shapes, ctx.may_raise(_SINCE, self.raise_opset))
        fused = 0
        for node in list(model.nodes()):
            found = gated(node, edit)
            if found is None or found.kind != "mish":
                continue
            known = shapes.dtype(found.x) in (np.float32, np.float16)
            reason = obstacle or widened(found, shapes) or (None if known else "its type is not known to be float")
            if reason is not None:
                ctx.remark(node, f"no Mish: {reason}")
                continue
            if not ctx.admit():
                break
            edit.take_over(found.result, Node("Mish", "mish", {}, [found.x]), found.nodes)
            fused += 1
        edit.commit()
        if fused:
            opset.raise_opset(model, _SINCE, edit)
        return fused
