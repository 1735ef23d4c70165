"""Layers as matrices: ``z = W x + b`` for Conv, ConvTranspose, Gemm and MatMul, and what streamed moments of x and z say about W.

A convolution is a product with the columns of im2col, in groups (of a transposed one with zeros between); a Gemm or MatMul has one group. For each group the moments ``E[x x^T]``,
``E[z x^T]``, ``E[x]`` and ``E[z]`` are all that least squares needs, so samples stream through and memory is that of the moments.

    W' = (S_zx + l W) (S_xx + l I)^-1,  b' = E[z] - W' E[x],  S centred, l = ridge * tr(S_xx) / d

is ridge regression that is pulled toward the weights at hand and not toward zero: where the samples say nothing, nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Constant, Model, Node

Array = np.ndarray[Any, Any]

MAX_COLUMNS: Final = 6144  # of a group; a wider Gram matrix takes too long to invert
WIDE: Final = 1024  # columns from which single precision and fewer looks have to do
RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Layer:
    """A node that multiplies its first operand by a fixed weight of its own."""

    node: Node
    op: str
    groups: int
    transposed: bool  # whether the weight is [d, o]
    scale: float  # alpha of Gemm
    adder: Node | None  # the Add behind a MatMul that holds the bias
    bias: int | None  # operand of `node` (or of `adder`) that holds the bias; None: there is none
    fixed_bias: bool  # no bias can be added

    @property
    def weight(self) -> Constant:
        """The weight."""
        found: Constant = self.node.inputs[1]
        return found

    @property
    def is_convolution(self) -> bool:
        """Whether channels are on axis 1."""
        return self.op in ("Conv", "ConvTranspose")

    @property
    def result(self) -> gs.Tensor:
        """What is computed, bias included."""
        return (self.adder or self.node).outputs[0]

    def matrix(self, values: Array | None = None) -> Array:
        """The weight as [groups, outputs, columns]."""
        w = np.asarray(self.weight.values if values is None else values, np.float32)
        if self.op == "Conv":
            taps = w.reshape(*w.shape[:2], -1).transpose(0, 2, 1)
            return np.ascontiguousarray(taps).reshape(self.groups, w.shape[0] // self.groups, -1)
        if self.op == "ConvTranspose":
            taps = w.reshape(self.groups, -1, w.shape[1], math.prod(w.shape[2:])).transpose(0, 2, 3, 1)
            return np.ascontiguousarray(taps).reshape(self.groups, w.shape[1], -1)
        w = w if not self.transposed else w.T
        return (w * np.float32(self.scale))[None]

    def unmatrix(self, matrix: Array) -> Array:
        """The weight tensor of a matrix."""
        if self.op == "Conv":
            kernel = self.weight.shape[2:]
            taps = matrix.reshape(matrix.shape[0] * matrix.shape[1], math.prod(kernel), -1)
            return np.ascontiguousarray(taps.transpose(0, 2, 1)).reshape(len(taps), -1, *kernel)
        if self.op == "ConvTranspose":
            kernel = self.weight.shape[2:]
            taps = matrix.reshape(*matrix.shape[:2], math.prod(kernel), -1).transpose(0, 3, 1, 2)
            return np.ascontiguousarray(taps).reshape(-1, matrix.shape[1], *kernel)
        w = matrix[0] / self.scale
        return np.ascontiguousarray(w.T if self.transposed else w)

    def bias_values(self) -> Array:
        """The bias as a vector, zeros where there is none."""
        outputs = self.matrix().shape[0] * self.matrix().shape[1]
        if self.bias is None:
            return np.zeros(outputs, np.float32)
        found = np.asarray((self.adder or self.node).inputs[self.bias].values, np.float32).reshape(-1)
        return found * np.float32(self.node.attrs.get("beta", 1.0)) if self.op == "Gemm" else found

    def store(self, edit: Editor, matrix: Array, bias: Array | None) -> None:
        """Give the layer another weight, and bias if not None."""
        old = self.weight
        values = self.unmatrix(matrix).astype(old.dtype)
        self.node.inputs[1] = edit.constant(old.name, values)
        if bias is None or self.fixed_bias:
            return
        beta = float(self.node.attrs.get("beta", 1.0)) if self.op == "Gemm" else 1.0
        vector = (bias / beta).astype(old.dtype)
        holder = self.adder or self.node
        if self.bias is not None:
            shape = holder.inputs[self.bias].shape
            holder.inputs[self.bias] = edit.constant(holder.inputs[self.bias].name, vector.reshape(shape))
        elif len(holder.inputs) > 2:
            holder.inputs[2] = edit.constant(f"{self.node.name}_bias", vector)
        else:
            holder.inputs.append(edit.constant(f"{self.node.name}_bias", vector))

    def result_like(self, x: Array) -> Array:
        """An array of the shape that the result has for `x`, without memory behind it."""
        if not self.is_convolution:
            return np.broadcast_to(np.float32(0), (*x.shape[:-1], self.weight.shape[int(self.transposed)]))
        kernel = self.weight.shape[2:]
        if self.op == "ConvTranspose":
            strides, dilations, pads = convolution(self.node, x.shape[2:], kernel)
            more = self.node.attrs.get("output_padding", [0] * len(kernel))
            sizes = [
                max(0, (n - 1) * s + d * (k - 1) + 1 - sum(pad) + int(extra))
                for n, k, s, d, pad, extra in zip(x.shape[2:], kernel, strides, dilations, pads, more, strict=True)
            ]
            return np.broadcast_to(np.float32(0), (x.shape[0], self.weight.shape[1] * self.groups, *sizes))
        strides, dilations, pads = convolution(self.node, x.shape[2:], kernel)
        sizes = [
            max(0, (n + sum(pad) - d * (k - 1) - 1) // s + 1)
            for n, k, s, d, pad in zip(x.shape[2:], kernel, strides, dilations, pads, strict=True)
        ]
        return np.broadcast_to(np.float32(0), (x.shape[0], self.weight.shape[0], *sizes))

    def positions(self, result: Array) -> int:
        """How many rows `columns` and `outputs` have for this result."""
        channels = int(result.shape[1 if self.is_convolution else -1])
        return result.size // max(1, channels)

    def columns(self, x: Array, result: Array, take: Array) -> Array:
        """What the weight multiplies, at some positions of the result: [groups, positions, columns]; a Conv's taps before channels."""
        if not self.is_convolution:
            return x.reshape(-1, x.shape[-1])[take][None]
        kernel = self.weight.shape[2:]
        strides, dilations, pads = convolution(self.node, x.shape[2:], kernel)
        turned = self.op == "ConvTranspose"
        padding: list[tuple[int, int]] = [(0, 0), (0, 0), *([] if turned else pads)]
        last = np.ascontiguousarray(np.moveaxis(np.pad(x, padding) if any(map(any, padding)) else x, 1, -1))
        sample, *place = np.unravel_index(take, (x.shape[0], *result.shape[2:]))
        rows = np.empty((len(take), math.prod(kernel), x.shape[1]), x.dtype)
        for tap, offset in enumerate(np.ndindex(*kernel)):
            there: Any = True
            if turned:  # which operand's position, if any, reaches this one of the result by this tap
                far = [p + pad[0] - o * d for p, pad, o, d in zip(place, pads, offset, dilations, strict=True)]
                at = [np.clip(f // s, 0, n - 1) for f, s, n in zip(far, strides, x.shape[2:], strict=True)]
                there = np.all([f == a * s for f, a, s in zip(far, at, strides, strict=True)], axis=0)[:, None]
            else:
                at = [p * s + o * d for p, s, o, d in zip(place, strides, offset, dilations, strict=True)]
            index: Any = (sample, *at)
            rows[:, tap] = np.where(there, last[index], 0) if turned else last[index]
        if self.groups == 1:
            return rows.reshape(1, len(take), -1)
        parts = rows.reshape(len(take), rows.shape[1], self.groups, -1).transpose(2, 0, 1, 3)
        blocks: Array = parts.reshape(self.groups, len(take), -1)
        return blocks

    def outputs(self, result: Array, take: Array) -> Array:
        """The results at the same positions: [groups, positions, outputs]."""
        if not self.is_convolution:
            return result.reshape(-1, result.shape[-1])[take][None]
        place = np.unravel_index(take, (result.shape[0], *result.shape[2:]))
        index: Any = (place[0], slice(None), *place[1:])
        picked = result[index]
        parts: Array = picked.reshape(len(take), self.groups, -1).transpose(1, 0, 2)
        return parts


def convolution(
    node: Node, size: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Strides, dilations and pads of a Conv, auto_pad resolved."""
    rank = len(kernel)
    strides = [int(s) for s in node.attrs.get("strides", [1] * rank)]
    dilations = [int(d) for d in node.attrs.get("dilations", [1] * rank)]
    given = [int(p) for p in node.attrs.get("pads", [0] * 2 * rank)]
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
        return strides, dilations, pads
    if auto == "VALID":
        return strides, dilations, [(0, 0)] * rank
    return strides, dilations, [(given[i], given[i + rank]) for i in range(rank)]


def layers(model: Model, turned: bool = False) -> dict[str, Layer]:
    """The layers of the root graph whose weight no other node reads, by node name; ConvTranspose among them if `turned`."""
    edit = Editor(model)
    found = {}
    for node in model.graph.nodes:
        layer = _layer(node, edit)
        if layer is not None and (turned or layer.op != "ConvTranspose"):
            found[node.name] = layer
    return found


def _layer(node: Node, edit: Editor) -> Layer | None:
    if node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or not node.is_onnx or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    if not edit.is_fixed(weight) or len(weight.outputs) != 1 or np.dtype(weight.dtype).kind != "f":
        return None
    if isinstance(node.inputs[0], gs.Constant) or edit.is_output(weight):
        return None
    if node.op in ("Conv", "ConvTranspose"):
        if node.op == "ConvTranspose" and (
            "output_shape" in node.attrs or node.attrs.get("auto_pad", "NOTSET") != "NOTSET"
        ):
            return None
        bias, fixed = _own_bias(node, edit)
        return Layer(node, node.op, int(node.attrs.get("group", 1)), False, 1.0, None, bias, fixed)
    if len(weight.shape) != 2:
        return None
    if node.op == "Gemm":
        if node.attrs.get("transA", 0) or not node.attrs.get("alpha", 1.0):
            return None
        bias, fixed = _own_bias(node, edit)
        scale = float(node.attrs.get("alpha", 1.0))
        return Layer(node, "Gemm", 1, not node.attrs.get("transB", 0), scale, None, bias, fixed)
    reader = edit.sole_consumer(node.outputs[0])
    if reader is not None and reader.op == "Add":
        for index, other in enumerate(reader.inputs):
            if (
                edit.is_fixed(other)
                and len(other.outputs) == 1
                and math.prod(other.shape) == weight.shape[1] == other.shape[-1]
            ):
                return Layer(node, "MatMul", 1, True, 1.0, reader, index, False)
    return Layer(node, "MatMul", 1, True, 1.0, None, None, True)


def _own_bias(node: Node, edit: Editor) -> tuple[int | None, bool]:
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return None, False
    bias = node.inputs[2]
    rows = node.inputs[1].shape[0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1]
    if node.op == "ConvTranspose":
        rows *= int(node.attrs.get("group", 1))
    usable = (
        edit.is_fixed(bias) and len(bias.outputs) == 1 and math.prod(bias.shape) == rows and node.attrs.get("beta", 1.0)
    )
    return (2, False) if usable else (None, True)


class Moments:
    """Sums over positions of a layer's columns and targets."""

    def __init__(self, groups: int, columns: int, outputs: int) -> None:
        self.count = 0
        self.x = np.zeros((groups, columns))
        self.z = np.zeros((groups, outputs))
        kind = np.float32 if columns > WIDE else np.float64
        self.xx = np.zeros((groups, columns, columns), kind)
        self.zx = np.zeros((groups, outputs, columns), kind)
        self.zz = np.zeros((groups, outputs))

    def add(self, x: Array, z: Array) -> None:
        """Take in positions: [groups, positions, columns] and [groups, positions, outputs]."""
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=np.float64)
        self.z += z.sum(1, dtype=np.float64)
        transposed = x.transpose(0, 2, 1)
        with np.errstate(over="ignore", invalid="ignore"):  # told where the moments are used
            self.xx += transposed @ x
            self.zx += z.transpose(0, 2, 1) @ x
        self.zz += np.square(z, dtype=np.float64).sum(1)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(0, 0, 0)
        for name in ("count", "x", "z", "xx", "zx", "zz"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def centred(self, free: bool = True) -> tuple[Array, Array, Array, Array, Array]:
        """E[x], E[z] and the second moments about them; about zero where no bias is free to take the means."""
        n = max(1, self.count)
        mx, mz = self.x / n, self.z / n
        if not free:
            mx, mz = np.zeros_like(mx), np.zeros_like(mz)
        fine = mx.astype(self.xx.dtype)
        sxx = self.xx / n - fine[:, :, None] * fine[:, None, :]
        szx = self.zx / n - mz.astype(self.zx.dtype)[:, :, None] * fine[:, None, :]
        szz = self.zz / n - mz**2
        return mx, mz, sxx, szx, szz

    def error(self, w: Array, b: Array) -> float:
        """Mean squared distance of W x + b from z, summed over outputs."""
        n = max(1, self.count)
        zz, mx, mz = self.zz / n, self.x / n, self.z / n
        b = b.reshape(mz.shape)
        wx = np.einsum("god,gd->go", w, mx)
        v = w.astype(self.xx.dtype, copy=False)
        quadratic = (np.einsum("god,god->go", v @ self.xx, w) - 2 * np.einsum("god,god->go", w, self.zx)) / n
        return float((quadratic + zz + 2 * b * wx - 2 * b * mz + b * b).sum())

    def variance(self) -> float:
        """Of z, summed over outputs."""
        n = max(1, self.count)
        return float(np.maximum(self.zz / n - (self.z / n) ** 2, 0).sum())


def rounding(mean: Array) -> Any:
    """How far second moments about a mean may be off, by columns (the last axis): sums in single precision, less what the mean takes."""
    size = max(1, mean.shape[-1])
    return np.finfo(np.float32).eps * math.sqrt(size) * np.square(mean).sum(-1) / size


def ridge(moments: Moments, w: Array, strength: float, free_bias: bool) -> tuple[Array, Array]:
    """Weights and bias (as [groups, outputs]) that fit z best, pulled toward `w`."""
    mx, mz, sxx, szx, _ = moments.centred(free_bias)
    d = sxx.shape[-1]
    lam = strength * np.trace(sxx, axis1=1, axis2=2, dtype=np.float64) / max(1, d) + rounding(mx) + 1e-12
    sxx[:, range(d), range(d)] += lam[:, None]
    szx += lam[:, None, None] * w
    solved = np.linalg.solve(sxx, szx.transpose(0, 2, 1)).transpose(0, 2, 1).astype(np.float64)
    return solved, mz - np.einsum("god,gd->go", solved, mx)
