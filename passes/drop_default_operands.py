"""Operands that say what the operator assumes anyway.

Exact by the operators' definitions (https://onnx.ai/onnx/operators): absent initial states and peepholes of LSTM, GRU and RNN are zero.
Zero biases of Conv and Gemm are not dropped here: ``-0.0 + 0.0`` is ``0.0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Constant, Model, Variable
from graphopt.pass_base import Context, Pass

# Operator -> operands that are zero when absent: initial states and peepholes.
_ZERO_WHEN_ABSENT: Final = {"LSTM": (5, 6, 7), "GRU": (5,), "RNN": (5,)}
_UNIFORM: Final = frozenset(
    {"Slice", "Expand", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Tile", "Flatten", "Split"}
)
_MAX_BYTES: Final = 1 << 24  # of a constant that is looked through for zeros


@dataclass(frozen=True)
class DropDefaultOperands(Pass):
    """Drop initial states of recurrent layers that are zero, however they were computed.

    Before:
        g (float[4,1,2] x) => (float[4,1,1,3] y)
        <float[1,12,2] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6},
         float[1,12,3] r = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}, int64[3] size = {1, 1, 3}>
        { zeros = ConstantOfShape (size)
          y = LSTM <hidden_size = 3> (x, w, r, , , zeros, zeros) }
    After:
        g (float[4,1,2] x) => (float[4,1,1,3] y)
        <float[1,12,2] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6},
         float[1,12,3] r = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}>
        { y = LSTM <hidden_size = 3> (x, w, r) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"LSTM", "GRU", "RNN"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of operands dropped."""
        edit = Editor(model)
        dropped = 0
        for node in list(model.nodes()):
            before = dropped
            for index in _ZERO_WHEN_ABSENT.get(node.op, ()) if node.is_onnx else ():
                if index >= len(node.inputs) or not node.inputs[index].name:
                    continue
                if not _is_zero(node.inputs[index], edit):
                    ctx.remark(node, f"operand {node.inputs[index].name!r} is not surely zero")
                    continue
                if not ctx.admit():
                    break
                node.inputs[index] = Variable("")
                dropped += 1
            while dropped > before and not node.inputs[-1].name:
                del node.inputs[-1]
        edit.commit()
        return dropped


def _is_zero(tensor: gs.Tensor, edit: Editor) -> bool:
    """Whether every element is surely 0, by looking through nodes that move elements and make none."""
    while True:
        if isinstance(tensor, Constant):
            if not edit.is_fixed(tensor) or tensor.nbytes > _MAX_BYTES or np.dtype(tensor.dtype).kind != "f":
                return False
            return not bool(np.any(tensor.values != 0))
        node = edit.producer(tensor)
        if node is None or not node.is_onnx:
            return False
        if node.op == "ConstantOfShape":
            fill = node.attrs.get("value")
            return fill is None or (isinstance(fill, Constant) and not bool(np.any(fill.values != 0)))
        if node.op not in _UNIFORM:
            return False
        tensor = node.inputs[0]
