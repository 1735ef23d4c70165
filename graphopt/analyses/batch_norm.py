"""Inference-mode BatchNormalization as a factor and a shift per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.edit import Editor
from graphopt.ir import Node

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ChannelAffine:
    """``x * scale + shift`` by channel, float64; not finite where a variance is below -epsilon."""

    scale: Array
    shift: Array
    distance: float  # the largest of |mean| / sqrt(var + epsilon): how far the data lie from zero, in their own spread


def channel_affine(bn: Node, edit: Editor) -> ChannelAffine | str:
    """``scale * (x - mean) / sqrt(var + epsilon) + bias`` of `bn`, opset 9 or later, or why it is none."""
    if bn.attrs.get("training_mode", 0) or any(t.name for t in bn.outputs[1:]):
        return f"{bn.name!r} runs in training mode"
    if not all(edit.is_fixed(t) for t in bn.inputs[1:5]):
        return f"the parameters of {bn.name!r} are not constant"
    scale, bias, mean, var = (t.values.astype(np.float64) for t in bn.inputs[1:5])
    with np.errstate(all="ignore"):
        spread = np.sqrt(var + float(np.float32(bn.attrs.get("epsilon", 1e-5))))
        k = scale / spread
        return ChannelAffine(k, bias - mean * k, float(np.abs(mean / spread).max(initial=0)))
