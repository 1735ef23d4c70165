"""Convolution followed by inference-mode batch normalization is one convolution.

With ``k = scale / sqrt(var + epsilon)``, per output channel:

    BN(conv(x, W) + b) = conv(x, W * k) + (b - mean) * k + bias

Conv keeps output channels on axis 0 of W. ConvTranspose keeps them on axis 1, per group: W is [C_in, C_out / group, ...], and
output channel ``g * C_out / group + j`` belongs to rows ``g * C_in / group ..`` of W. Folded in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Exactness
from graphopt.rewrite import Match, Op, RewritePass, const, maybe, op


@dataclass(frozen=True)
class FuseConvBatchNorm(RewritePass):
    """Fold an inference-mode BatchNormalization into the Conv or ConvTranspose that feeds it.

    Before:
        g (float[1,1,3,3] x) => (float[1,1,3,3] y)
        <float[1,1,1,1] w = {2}, float[1] s = {3}, float[1] b = {0.5}, float[1] m = {1}, float[1] v = {1}>
        { c = Conv (x, w)
          y = BatchNormalization <epsilon = 0.0> (c, s, b, m, v) }
    After:
        g (float[1,1,3,3] x) => (float[1,1,3,3] y)
        <float[1,1,1,1] w = {6}, float[1] b = {-2.5}>
        { y = Conv (x, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    pattern: ClassVar[Op] = op(
        "BatchNormalization",
        op(("Conv", "ConvTranspose"), "x", const("w", unshared=True), maybe(const("b")), name="conv"),
        const("scale"),
        const("bias"),
        const("mean"),
        const("var"),
        name="bn",
    )

    def check(self, match: Match, model: Model) -> str | None:
        """Why the BatchNormalization cannot be folded, or None."""
        bn, conv, w = match.nodes["bn"], match.nodes["conv"], match["w"]
        # Up to opset 13 it is the presence of the statistics outputs, read or not, that switches to training mode.
        if bn.attrs.get("training_mode", 0) or any(t.name for t in bn.outputs[1:]):
            return "it runs in training mode"
        if model.opset < 7:
            return f"opset {model.opset} decides about training mode in other ways"
        if bn.attrs.get("spatial", 1) != 1:
            return "it normalizes each position by itself (spatial=0)"
        if not np.issubdtype(w.dtype, np.floating):
            return f"weight {w.name!r} is {w.dtype}, folding is for float16, float32 and float64"
        if len(w.shape) < 3:
            return f"weight {w.name!r} has {len(w.shape)} dimensions, a convolution's has 3 at least"
        channels = _out_channels(conv, w)
        for name in ("scale", "bias", "mean", "var"):
            if tuple(match[name].shape) != (channels,):
                return f"{name} {match[name].name!r} has shape {list(match[name].shape)}, the convolution has {channels} channels"
        (weight, exact), (bias, _) = _folded(match)
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            return f"folding would make weight {w.name!r} infinite or NaN in {w.dtype}"
        if np.abs(weight - exact).max(initial=0) > np.finfo(w.dtype).eps * np.abs(exact).max(initial=0):
            return f"folding would make weight {w.name!r} too small for {w.dtype}"
        return None

    def rewrite(self, match: Match, edit: Editor) -> gs.Tensor:
        """Insert the folded convolution."""
        bn, conv, w = match.nodes["bn"], match.nodes["conv"], match["w"]
        (weight, _), (bias, _) = _folded(match)
        wish = match["b"].name if match.has("b") else f"{conv.name}_bias"
        operands = [match["x"], edit.constant(w.name, weight), edit.constant(wish, bias)]
        result = edit.variable(conv.outputs[0].name, bn.outputs[0])
        fused = Node(conv.op, conv.name, dict(conv.attrs), operands, [result])
        fused.attr_types = dict(conv.attr_types)
        fused.carried = conv.carried
        edit.insert_after(bn, fused, origin=(conv, bn))
        return result


def _out_channels(conv: Node, w: gs.Constant) -> int:
    return int(w.shape[0]) if conv.op == "Conv" else int(w.shape[1]) * int(conv.attrs.get("group", 1))


def _folded(match: Match) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Weight and bias of the fused convolution: each in the weight's dtype, and before that rounding."""
    conv, bn = match.nodes["conv"], match.nodes["bn"]
    original = match.value("w")
    w = original.astype(np.float64)
    scale, shift, mean, var = (match.value(n).astype(np.float64) for n in ("scale", "bias", "mean", "var"))
    with np.errstate(all="ignore"):  # a variance below -epsilon gives NaN, which check refuses
        k = scale / np.sqrt(var + float(np.float32(bn.attrs.get("epsilon", 1e-5))))
        if conv.op == "Conv":
            weight = w * k.reshape(-1, *[1] * (w.ndim - 1))
        else:
            groups = int(conv.attrs.get("group", 1))
            split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
            weight = (split * k.reshape(groups, 1, w.shape[1], *[1] * (w.ndim - 2))).reshape(w.shape)
        b = match.value("b").astype(np.float64) if match.has("b") else np.zeros_like(k)
        bias = (b - mean) * k + shift
        return [(exact.astype(original.dtype), exact) for exact in (weight, bias)]
