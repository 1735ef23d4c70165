"""``log(softmax(x))`` is LogSoftmax, which also holds where a probability vanishes: its logarithm is a number there, not minus infinity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Node
from graphopt.pass_base import Exactness
from graphopt.rewrite import Match, Op, RewritePass, op


@dataclass(frozen=True)
class FuseLogSoftmax(RewritePass):
    """Turn the logarithm of a Softmax into LogSoftmax.

    Before:
        g (float[N,4] x) => (float[N,4] y)
        { s = Softmax <axis = 1> (x)
          y = Log (s) }
    After:
        g (float[N,4] x) => (float[N,4] y)
        { y = LogSoftmax <axis = 1> (x) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    pattern: ClassVar[Op] = op("Log", op("Softmax", "x"))

    def rewrite(self, match: Match, edit: Editor) -> gs.Tensor:
        """Both operators count axes alike in every opset."""
        softmax, root = match.nodes["softmax"], match.root
        made = Node(
            "LogSoftmax",
            softmax.name,
            dict(softmax.attrs),
            [match["x"]],
            [edit.variable(root.outputs[0].name, root.outputs[0])],
        )
        return edit.insert_before(root, made, origin=(softmax, root)).outputs[0]
