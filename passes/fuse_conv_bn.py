"""Convolution followed by inference-mode batch normalization is one convolution.

With ``k = scale / sqrt(var + epsilon)``, per output channel:

    BN(conv(x, W) + b) = conv(x, W * k) + (b - mean) * k + bias

Conv keeps output channels on axis 0 of W. ConvTranspose keeps them on axis 1, per group: W is [C_in, C_out / group, ...], and
output channel ``g * C_out / group + j`` belongs to rows ``g * C_in / group ..`` of W. Folded in float64, rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness
from graphopt.rewrite import Match, Op, RewritePass, const, maybe, op

_MEANS: Final = frozenset({"GlobalAveragePool", "ReduceMean"})
_ACTIVATIONS: Final = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Add", "Div"})
_STEPS: Final = 5  # Add, Clip, Mul, Div and the mean
_BLOCK: Final = 1 << 17  # elements folded at a time


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

    squeezed: bool | None = (
        None  # also of depthwise convolutions that are averaged; none: not for tensorrt-rtx and a symbolic batch
    )

    def run(self, model: Model, ctx: Context) -> int:
        """Fold all that can be; returns their number."""
        if self.squeezed is not None:
            return super().run(model, ctx)
        rtx = ctx.target is not None and ctx.target.family == "tensorrt-rtx"
        fixed = all(
            spec.shape is not None and isinstance(spec.shape[0], int) for spec in model.inputs if spec.shape != ()
        )
        return replace(self, squeezed=not rtx or fixed or ctx.products_stay).run(model, ctx)

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
        biased = ("b",) if match.has("b") else ()  # some exports give it two dimensions, which no runtime takes
        for name in ("scale", "bias", "mean", "var", *biased):
            if tuple(match[name].shape) != (channels,):
                return f"{name} {match[name].name!r} has shape {list(match[name].shape)}, the convolution has {channels} channels"
        if not self.squeezed and int(conv.attrs.get("group", 1)) == channels > 1 and _averaged(bn.outputs[0]):
            return "TensorRT for RTX takes the mean behind this depthwise convolution in a kernel of its own once it is folded"
        folded = _folded(match)
        if not (np.isfinite(folded.largest) and np.isfinite(folded.weight).all() and np.isfinite(folded.bias).all()):
            return f"folding would make weight {w.name!r} infinite or NaN in {w.dtype}"
        if folded.error > float(np.finfo(w.dtype).eps) * folded.largest:
            return f"folding would make weight {w.name!r} too small for {w.dtype}"
        return None

    def rewrite(self, match: Match, edit: Editor) -> gs.Tensor:
        """Insert the folded convolution."""
        bn, conv, w = match.nodes["bn"], match.nodes["conv"], match["w"]
        folded = _folded(match)
        wish = match["b"].name if match.has("b") else f"{conv.name}_bias"
        operands = [match["x"], edit.constant(w.name, folded.weight), edit.constant(wish, folded.bias)]
        result = edit.variable(conv.outputs[0].name, bn.outputs[0])
        fused = Node(conv.op, conv.name, dict(conv.attrs), operands, [result])
        fused.attr_types = dict(conv.attr_types)
        fused.carried = conv.carried
        edit.insert_after(bn, fused, origin=(conv, bn))
        return result


def _averaged(tensor: gs.Tensor, steps: int = _STEPS) -> bool:
    """Whether a mean over positions is taken of it, activation between: squeeze and excitation."""
    return steps > 0 and any(
        n.op in _MEANS or (n.op in _ACTIVATIONS and _averaged(n.outputs[0], steps - 1)) for n in tensor.outputs
    )


def _out_channels(conv: Node, w: gs.Constant) -> int:
    return int(w.shape[0]) if conv.op == "Conv" else int(w.shape[1]) * int(conv.attrs.get("group", 1))


@dataclass(frozen=True)
class _Folded:
    """Weight and bias of the fused convolution, in the weight's dtype, and what rounding did to the weight."""

    weight: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]
    error: float  # the largest distance of an element from what it was before rounding
    largest: float  # the largest magnitude before rounding


def _folded(match: Match) -> _Folded:
    """Rows of the weight are folded a few at a time: a double of all of it would be most of the memory that we take."""
    conv, bn = match.nodes["conv"], match.nodes["bn"]
    w = match.value("w")
    scale, shift, mean, var = (match.value(n).astype(np.float64) for n in ("scale", "bias", "mean", "var"))
    with np.errstate(all="ignore"):  # a variance below -epsilon gives NaN, which check refuses
        k = scale / np.sqrt(var + float(np.float32(bn.attrs.get("epsilon", 1e-5))))
        ones = [1] * (w.ndim - 2)
        if conv.op == "Conv":
            factors = k.reshape(-1, 1, *ones)
        else:
            groups = int(conv.attrs.get("group", 1))
            factors = np.repeat(k.reshape(groups, -1), w.shape[0] // groups, axis=0).reshape(*w.shape[:2], *ones)
        weight = np.empty(w.shape, w.dtype)
        error = largest = 0.0
        step = max(1, _BLOCK // max(1, math.prod(w.shape[1:])))
        for start in range(0, w.shape[0], step):
            rows = slice(start, start + step)
            exact = w[rows].astype(np.float64) * factors[rows]
            weight[rows] = exact
            error = max(error, float(np.abs(weight[rows] - exact).max(initial=0)))
            largest = max(largest, float(np.abs(exact).max(initial=0)))
        b = match.value("b").astype(np.float64) if match.has("b") else np.zeros_like(k)
        return _Folded(weight, ((b - mean) * k + shift).astype(w.dtype), error, largest)
