"""``x * tanh(softplus(x))`` is Mish, from opset 18 on.

ONNX Runtime has no kernel for it and takes it apart again, in the same time; so it is for TensorRT, whose parser has one layer for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.analyses.idioms import gated, widened
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.opset import NewerOperator
from graphopt.pass_base import TENSORRT, Context, Exactness


@dataclass(frozen=True)
class FuseMish(NewerOperator):
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
    operator: ClassVar[str] = "Mish"
    since: ClassVar[int] = 18
    ops: ClassVar[frozenset[str] | None] = frozenset({"Softplus"})

    apply: bool | None = None  # whether to run; none: for the targets that it serves

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of activations fused."""
        return super().run(model, ctx) if ctx.serves(self.serves, self.apply) else 0

    def match(self, node: Node, shapes: Shapes, edit: Editor) -> Callable[[], None] | str | None:
        """The activation around its Softplus."""
        found = gated(node, edit)
        if found is None or found.kind != "mish":
            return None
        known = shapes.dtype(found.x) in (np.float32, np.float16)
        reason = widened(found, shapes) or (None if known else "its type is not known to be float")
        return reason or (lambda: edit.take_over(found.result, Node("Mish", "mish", {}, [found.x]), found.nodes))
