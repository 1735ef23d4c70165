"""Weights as int8: one symmetric scale for each output channel, on the right axis, safe on every CPU where that is asked for.

``w' = scale[c] * code``, codes in [-127, 127], the zero point 0. A channel of zeros gets a scale that divides by nothing.

x86 without VNNI multiplies u8 by s8 with ``vpmaddubsw``, which adds two neighbouring products in 16 bits and saturates:
``255 * 127 * 2 = 64770 > 32767``. With codes whose neighbours along the packed reduction axis sum to at most 128 in each sign,
``255 * 128 = 32640`` fits, whatever the activations are. `pair_safe` scales are as small as that allows: they cost 1.3 to
2.4 dB of the weights' precision where 7-bit weights cost 6. The reduction axis of ONNX Runtime's kernels is the row index of MatMul
and Gemm, and for Conv the taps with the input channels of a group fastest; depthwise kernels use 32 bits and need nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from graphopt.ir import Node

Array = np.ndarray[Any, Any]

LARGEST: Final = 127  # code
PAIR: Final = 128  # largest sum of two neighbouring codes of one sign: 255 * 128 < 2**15


@dataclass(frozen=True)
class Quantized:
    """A weight as codes; `scale` has one entry for each index of `axis`, or none for the whole tensor (axis None)."""

    codes: Array  # int8
    scale: Array  # float32
    axis: int | None

    def values(self) -> Array:
        """What the codes stand for."""
        return (self.codes.astype(np.float64) * self._spread()).astype(np.float32)

    def _spread(self) -> Array:
        if self.axis is None:
            return self.scale.astype(np.float64)
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.scale.astype(np.float64).reshape(shape)


def channel_axis(node: Node, rank: int) -> int | None:
    """The axis of output channels of the weight (second input) of `node`; None where it has no such axis."""
    match node.op:
        case "Conv":
            return 0 if rank >= 3 else None
        case "ConvTranspose":
            return 1 if rank >= 3 else None
        case "MatMul":
            return 1 if rank == 2 else None
        case "Gemm":
            return 0 if node.attrs.get("transB", 0) else 1
    return None


def is_depthwise(node: Node, shape: tuple[int, ...]) -> bool:
    """One filter for each channel: the kernel that never adds pairs."""
    return node.op == "Conv" and len(shape) >= 3 and shape[1] == 1 and shape[0] == int(node.attrs.get("group", 1)) > 1


def reduction(node: Node, weight: Array) -> tuple[Array, bool]:
    """`weight` as [output channel, position along the reduction axis] in the order in which CPU kernels pack it, and
    whether that order is known (else any two positions may meet)."""
    if node.op == "Conv":
        flat = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
        return flat, int(node.attrs.get("group", 1)) == 1
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        return weight, True
    return weight.reshape(-1, weight.shape[-1]).T, weight.ndim == 2


def worst_pair(rows: Array, ordered: bool = True) -> Array:
    """The largest sum of magnitudes of two neighbours of one sign, for each row; of any two where the order is unknown."""
    if rows.shape[1] < 2:
        return np.asarray(np.abs(rows).max(axis=1, initial=0))
    worst = np.zeros(len(rows))
    for signed in (np.maximum(rows, 0), np.maximum(-rows, 0)):
        if ordered:
            padded = signed if rows.shape[1] % 2 == 0 else np.pad(signed, ((0, 0), (0, 1)))
            sums = padded[:, 0::2] + padded[:, 1::2]
            worst = np.maximum(worst, sums.max(axis=1))
        else:
            top = np.partition(signed, -2, axis=1)[:, -2:]
            worst = np.maximum(worst, top.sum(axis=1))
    return worst


def pairs_at_risk(node: Node, codes: Array) -> int:
    """How many pairs of neighbouring codes can saturate 16 bits with some u8 activations."""
    if is_depthwise(node, codes.shape):
        return 0
    rows, _ = reduction(node, codes.astype(np.int32))
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    a, b = rows[:, 0::2], rows[:, 1::2]
    high = np.maximum(a, 0) + np.maximum(b, 0)
    low = np.minimum(a, 0) + np.minimum(b, 0)
    return int(np.count_nonzero((255 * high > 32767) | (255 * low < -32768)))


def quantize(
    node: Node, weight: Array, *, pair_safe: bool, per_channel: bool = True, least: Array | None = None
) -> Quantized:
    """Round the weight of `node` to int8.

    Args:
        node: the Conv, ConvTranspose, Gemm or MatMul that reads it.
        weight: finite.
        pair_safe: whether u8 x s8 kernels without VNNI must not saturate.
        per_channel: else one scale for the whole tensor.
        least: a lower bound of the scales, one for each channel (a bias may ask for it).
    """
    axis = channel_axis(node, weight.ndim) if per_channel else None
    rows, ordered = reduction(node, weight.astype(np.float64))
    if node.op == "ConvTranspose":
        rows, ordered = np.moveaxis(weight.astype(np.float64), 1, 0).reshape(weight.shape[1], -1), False
    scale = np.abs(rows).max(axis=1, initial=0) / LARGEST
    safe = pair_safe and not is_depthwise(node, weight.shape)
    if safe:
        scale = np.maximum(scale, worst_pair(rows, ordered) / PAIR)
    if axis is None:
        scale = scale.max(initial=0, keepdims=True)
    scale = floored(scale)
    if least is not None:
        scale = np.maximum(scale, least)
    scale = scale.astype(np.float32)
    while True:
        codes = np.clip(np.rint(rows / scale.astype(np.float64)[:, None]), -LARGEST, LARGEST)
        over = worst_pair(codes, ordered) > PAIR if safe else np.zeros(len(rows), bool)
        if not over.any():  # the float32 scale may have been rounded down
            break
        grow = np.broadcast_to(over.any() if axis is None else over, scale.shape)
        scale = np.where(grow, np.nextafter(scale * np.float32(1.0001), np.float32(np.inf)), scale).astype(np.float32)
    if axis is None:
        return Quantized(
            np.clip(np.rint(weight / scale[0]), -LARGEST, LARGEST).astype(np.int8), scale.reshape(()), None
        )
    shape = [1] * weight.ndim
    shape[axis] = -1
    spread = scale.astype(np.float64).reshape(shape)
    return Quantized(
        np.clip(np.rint(weight.astype(np.float64) / spread), -LARGEST, LARGEST).astype(np.int8), scale, axis
    )


def floored(scale: Array) -> Array:
    """Scales without zeros: a dead channel gets the largest scale of its tensor, a dead tensor 1/127."""
    largest = float(scale.max(initial=0))
    if largest < np.finfo(np.float32).tiny * 2**20:
        return np.full_like(scale, 1 / LARGEST)
    return np.where(scale < largest * 2.0**-40, largest, scale)
