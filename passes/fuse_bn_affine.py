"""Batch normalization followed by a scale or a shift per channel is one batch normalization.

Inference-mode BN is ``s * (x - mean) / sqrt(var + eps) + b`` per channel, so

    BN(x) * k = BN with s * k, b * k        BN(x) + c = BN with b + c

and the same with ``/ k`` and ``- c``. Caffe's BatchNorm-Scale pairs arrive as BatchNormalization, Mul, Add. Folded in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Exactness
from graphopt.rewrite import Match, Op, RewritePass, const, op


@dataclass(frozen=True)
class FuseBatchNormAffine(RewritePass):
    """Fold a Mul, Div, Add or Sub by constants per channel into the BatchNormalization before it.

    Before:
        g (float[N,2,4] x) => (float[N,2,4] y)
        <float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {0, 0}, float[2] v = {1, 1}, float[2,1] k = {3, 4}>
        { n = BatchNormalization (x, s, b, m, v)
          y = Mul (n, k) }
    After:
        g (float[N,2,4] x) => (float[N,2,4] y)
        <float[2] s = {3, 8}, float[2] b = {0, 4}, float[2] m = {0, 0}, float[2] v = {1, 1}>
        { y = BatchNormalization (x, s, b, m, v) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    pattern: ClassVar[Op] = op(
        ("Mul", "Div", "Add", "Sub"),
        op("BatchNormalization", "x", const("scale"), const("bias"), const("mean"), const("var"), name="bn"),
        const("k"),
        name="affine",
        commutative=True,
    )

    def check(self, match: Match, model: Model) -> str | None:
        """Why the constant cannot be folded, or None."""
        bn, affine, k = match.nodes["bn"], match.nodes["affine"], match["k"]
        if bn.attrs.get("training_mode", 0) or bn.attrs.get("spatial", 1) != 1:
            return f"{bn.name!r} is no inference-mode normalization per channel"
        if affine.op in ("Div", "Sub") and affine.inputs[0] is k:
            return "the constant is on the left side"
        channels = int(match["scale"].shape[0])
        rank = None if affine.outputs[0].shape is None else len(affine.outputs[0].shape)
        if _per_channel(match.value("k"), channels, rank) is None:
            return f"{k.name!r} of shape {list(k.shape)} is not one value per channel"
        if not all(np.isfinite(a).all() for a in _folded(match, channels, rank)):
            return f"folding {k.name!r} would make scale or bias infinite or NaN"
        return None

    def rewrite(self, match: Match, edit: Editor) -> gs.Tensor:
        """Insert the folded normalization."""
        bn, affine = match.nodes["bn"], match.nodes["affine"]
        rank = None if affine.outputs[0].shape is None else len(affine.outputs[0].shape)
        scale, bias = _folded(match, int(match["scale"].shape[0]), rank)
        operands = [match["x"], edit.constant(match["scale"].name, scale), edit.constant(match["bias"].name, bias)]
        result = edit.variable(bn.outputs[0].name, affine.outputs[0])
        fused = Node(bn.op, bn.name, dict(bn.attrs), [*operands, match["mean"], match["var"]], [result])
        fused.attr_types = dict(bn.attr_types)
        fused.carried = bn.carried
        edit.insert_after(affine, fused, origin=(bn, affine))
        return result


def _per_channel(values: np.ndarray[Any, Any], channels: int, rank: int | None) -> np.ndarray[Any, Any] | None:
    """The constant as one value a channel, float64 [channels]; None where it does not vary along axis 1 alone.

    A constant of rank r lies against the last r axes, so its channel axis is known only with the rank of the result, unless it is scalar.
    """
    if values.size == 1 and (rank is None or values.ndim <= rank):
        return (
            np.full(channels, float(values.reshape(())), np.float64) if values.ndim <= 1 or rank is not None else None
        )
    if rank is None or values.ndim > rank or values.ndim < rank - 1:
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    if shape != (1, channels) + (1,) * (rank - 2):
        return None
    return values.reshape(channels).astype(np.float64)


def _folded(match: Match, channels: int, rank: int | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scale and bias of the folded normalization, in their dtypes."""
    k = _per_channel(match.value("k"), channels, rank)
    assert k is not None
    scale, bias = match.value("scale"), match.value("bias")
    wide_scale, wide_bias = scale.astype(np.float64), bias.astype(np.float64)
    with np.errstate(all="ignore"):  # infinities are refused by check
        match match.nodes["affine"].op:
            case "Mul":
                wide_scale, wide_bias = wide_scale * k, wide_bias * k
            case "Div":
                wide_scale, wide_bias = wide_scale / k, wide_bias / k
            case "Add":
                wide_bias = wide_bias + k
            case _:
                wide_bias = wide_bias - k
        return wide_scale.astype(scale.dtype), wide_bias.astype(bias.dtype)
