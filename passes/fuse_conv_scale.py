"""A convolution commutes with a factor per channel, before it and behind it:

    conv(x, W, b) * k = conv(x, W * k, b * k)          k by output channel
    conv(x * k, W, b) = conv(x, W * k, b)              k by input channel; exact at the border too, since 0 * k = 0

Conv has W [out, in / group, ...], ConvTranspose [in, out / group, ...]; division is multiplication by the reciprocal. Folded in float64,
rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.idioms import members
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FuseConvScale(Pass):
    """Fold a per-channel constant factor or divisor before or behind Conv and ConvTranspose into the weight.

    Before:
        g (float[1,1,3,3] x) => (float[1,2,3,3] y)
        <float[2,1,1,1] w = {1, 2}, float[2] b = {1, 1}, float[2,1,1] k = {2, 3}>
        { a = Conv (x, w, b)
          y = Mul (a, k) }
    After:
        g (float[1,1,3,3] x) => (float[1,2,3,3] y)
        <float[2,1,1,1] w = {2, 6}, float[2] b = {2, 3}>
        { y = Conv (x, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Conv", "ConvTranspose"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of factors folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        idioms = members(model, edit)
        for node in list(model.nodes()):
            for before in (True, False):
                if edit.is_erased(node):
                    continue
                found = _before(node, edit) if before else _behind(node, edit)
                if found is None:
                    continue
                conv, scale, index = found
                if id(scale) in idioms:
                    ctx.remark(scale, "it stays part of a normalization or a Gelu, which runtimes fuse")
                    continue
                folded = _folded(conv, scale, index, before, shapes, edit)
                if isinstance(folded, str):
                    ctx.remark(node, folded)
                    continue
                if not ctx.admit():
                    edit.commit()
                    return fused
                last = conv if before else scale
                results = list(last.outputs)
                last.outputs.clear()
                w, b = folded
                source = scale.inputs[index] if before else conv.inputs[0]
                operands = [source, edit.constant(conv.inputs[1].name, w)]
                if b is not None:
                    operands.append(edit.constant(conv.inputs[2].name, b))
                elif len(conv.inputs) > 2:
                    operands.append(conv.inputs[2])
                new = Node(conv.op, conv.name, dict(conv.attrs), operands, results)
                new.attr_types = dict(conv.attr_types)
                new.carried = conv.carried
                edit.insert_before(last, new, origin=(conv, scale))
                edit.erase(last)
                edit.erase(scale if before else conv)
                fused += 1
        edit.commit()
        return fused


Found = tuple[Node, Node, int]  # the convolution, the Mul or Div, and the place of its operand that is no constant


def _is_conv(node: Node | None) -> bool:
    return node is not None and node.op in ("Conv", "ConvTranspose") and node.is_onnx


def _behind(node: Node, edit: Editor) -> Found | None:
    if node.op not in ("Mul", "Div") or not node.is_onnx:
        return None
    for index in (0, 1) if node.op == "Mul" else (0,):
        conv = edit.producer(node.inputs[index])
        if conv is not None and _is_conv(conv) and edit.is_fixed(node.inputs[1 - index]):
            return conv, node, index
    return None


def _before(node: Node, edit: Editor) -> Found | None:
    scale = edit.producer(node.inputs[0]) if _is_conv(node) else None
    if scale is None or scale.op not in ("Mul", "Div") or not scale.is_onnx:
        return None
    for index in (0, 1) if scale.op == "Mul" else (0,):
        if edit.is_fixed(scale.inputs[1 - index]):
            return node, scale, index
    return None


def _folded(
    conv: Node, scale: Node, index: int, before: bool, shapes: Shapes, edit: Editor
) -> tuple[Array, Array | None] | str:
    """Weight and bias of the convolution (None: the bias stays), or why there is none."""
    between = (scale if before else conv).outputs[0]
    last = conv if before else scale
    if edit.sole_consumer(between) is not last or edit.graph_of(conv) is not edit.graph_of(scale):
        return f"{between.name!r} is read by others too"
    w, constant = conv.inputs[1], scale.inputs[1 - index]
    if not edit.is_fixed(w):
        return f"weight {w.name!r} is not constant"
    if edit.sole_consumer(w) is not conv:
        return f"weight {w.name!r} is shared"
    dtype = np.dtype(w.dtype)
    if dtype.kind != "f" or constant.dtype != dtype:
        return f"weight {w.name!r} is {dtype}, the factor {constant.dtype}; folding is for float16, float32 and float64"
    if len(w.shape) < 3:
        return f"weight {w.name!r} has {len(w.shape)} dimensions, a convolution's has 3 at least"
    group = int(conv.attrs.get("group", 1))
    by_row = (
        conv.op == "Conv"
    ) != before  # whether the channels in question are axis 0 of the weight, or axis 1 by group
    channels = int(w.shape[0]) if by_row else int(w.shape[1]) * group
    k = _per_channel(constant.values, channels, len(w.shape))
    if k is None:
        return f"factor {constant.name!r} of shape {list(constant.shape)} is not constant per channel"
    if before and not _keeps_shape(scale.inputs[index], constant, channels, len(w.shape), shapes):
        return f"factor {constant.name!r} may broadcast its operand"
    with np.errstate(all="ignore"):
        k = 1 / k if scale.op == "Div" else k
        wide = w.values.astype(np.float64)
        tail = [1] * (wide.ndim - 2)
        if by_row:
            exact = wide * k.reshape(-1, 1, *tail)
        else:
            split = wide.reshape(group, wide.shape[0] // group, *wide.shape[1:])
            exact = (split * k.reshape(group, 1, -1, *tail)).reshape(wide.shape)
        weight = exact.astype(dtype)
        bias = None
        if not before and len(conv.inputs) > 2 and conv.inputs[2].name:
            if not edit.is_fixed(conv.inputs[2]):
                return f"bias {conv.inputs[2].name!r} is not constant"
            bias = (conv.inputs[2].values.astype(np.float64) * k).astype(dtype)
    if not np.isfinite(weight).all() or (bias is not None and not np.isfinite(bias).all()):
        return f"folding would make weight {w.name!r} infinite or NaN in {dtype}"
    if np.abs(weight - exact).max(initial=0) > np.finfo(dtype).eps * np.abs(exact).max(initial=0):
        return f"folding would make weight {w.name!r} too small for {dtype}"
    return weight, bias


def _per_channel(values: Array, channels: int, rank: int) -> Array | None:
    """`values` as one float64 per channel, where broadcasting them to `rank` dimensions varies along axis 1 alone."""
    if values.ndim <= rank and values.size == 1:
        return np.full(channels, values.reshape(-1)[0], np.float64)
    if rank - 1 <= values.ndim <= rank and values.shape[1 - rank] == channels == values.size:
        return values.reshape(-1).astype(np.float64)
    return None


def _keeps_shape(source: gs.Tensor, constant: gs.Tensor, channels: int, rank: int, shapes: Shapes) -> bool:
    shape = shapes.shape(source)
    if shape is None:
        return bool(constant.values.ndim == 0)
    return bool(len(shape) == rank and (constant.values.size == 1 or shape[1] == channels))
