"""``conv(x, W, b) + c = conv(x, W, b + c)`` where c is constant along all axes but the output channels; the same holds for Gemm:
``alpha*A*B + beta*C + c = alpha*A*B + (beta*C + c)``. Added in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass


@dataclass(frozen=True)
class FuseConvBias(Pass):
    """Fold a per-channel constant added to, or subtracted from, Conv, ConvTranspose or Gemm into the bias.

    Before:
        g (float[1,1,3,3] x, float[2,1,1,1] w) => (float[1,2,3,3] y)
        <float[2,1,1] c = {1, 2}>
        { a = Conv (x, w)
          y = Add (a, c) }
    After:
        g (float[1,1,3,3] x, float[2,1,1,1] w) => (float[1,2,3,3] y)
        <float[2] c = {1, 2}>
        { y = Conv (x, w, c) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of additions folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op not in ("Add", "Sub") or not node.is_onnx or model.opset < 7:
                continue
            for index in (0, 1) if node.op == "Add" else (0,):
                conv = edit.producer(node.inputs[index])
                if conv is not None and conv.is_onnx and conv.op in ("Conv", "ConvTranspose", "Gemm"):
                    break
            else:
                continue
            addend = node.inputs[1 - index]
            bias = _bias(node, conv, addend, shapes, edit)
            if isinstance(bias, str):
                ctx.remark(node, bias)
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            attributes = {k: v for k, v in conv.attrs.items() if k != "beta"}
            operands = [*conv.inputs[:2], edit.constant(addend.name, bias)]
            new = Node(conv.op, conv.name, attributes, operands, [result])
            new.attr_types = dict(conv.attr_types)
            new.carried = conv.carried
            edit.insert_before(node, new, origin=(conv, node))
            edit.erase(node)
            edit.erase(conv)
            fused += 1
        edit.commit()
        return fused


def _bias(node: Node, conv: Node, addend: gs.Tensor, shapes: Shapes, edit: Editor) -> np.ndarray[Any, Any] | str:
    """The new bias, or why there is none."""
    if not edit.is_fixed(addend):
        return f"{addend.name!r} is not constant"
    if edit.sole_consumer(conv.outputs[0]) is not node or edit.graph_of(conv) is not edit.graph_of(node):
        return f"{conv.outputs[0].name!r} is read by others too"
    dtype = np.dtype(addend.dtype)
    if dtype.kind != "f":
        return f"{addend.name!r} is {dtype}, folding is for float16, float32 and float64"
    channels, rank, behind = _channels(conv, shapes)
    if not channels:
        return "the number of output channels is not known"
    added = _per_channel(addend.values, channels, rank, behind)
    if added is None:
        return f"{addend.name!r} of shape {list(addend.shape)} is not constant per channel"
    old = np.zeros(channels)
    if len(conv.inputs) > 2 and conv.inputs[2].name:
        if not edit.is_fixed(conv.inputs[2]):
            return f"bias {conv.inputs[2].name!r} is not constant"
        known = _per_channel(conv.inputs[2].values, channels, rank, 1)
        if known is None:
            return f"bias {conv.inputs[2].name!r} of shape {list(conv.inputs[2].shape)} is not constant per channel"
        old = known * (float(conv.attrs.get("beta", 1.0)) if conv.op == "Gemm" else 1.0)
    with np.errstate(all="ignore"):
        total = (old + added if node.op == "Add" else old - added).astype(dtype)
    return total if np.isfinite(total).all() else f"the bias would be infinite or NaN in {dtype}"


def _channels(conv: Node, shapes: Shapes) -> tuple[int, int, int]:
    """Output channels (0: not known), rank of the result, and place of the channel axis counted from behind, from 1."""
    weight = shapes.shape(conv.inputs[1])
    if conv.op == "Gemm":
        result = shapes.shape(conv.outputs[0])
        count: Any = result[1] if result is not None and len(result) == 2 else 0
        return count if isinstance(count, int) else 0, 2, 1
    if weight is None or len(weight) < 3:
        return 0, 0, 0
    count = weight[0] if conv.op == "Conv" else weight[1]
    if not isinstance(count, int):
        return 0, 0, 0
    return count * (int(conv.attrs.get("group", 1)) if conv.op == "ConvTranspose" else 1), len(weight), len(weight) - 1


def _per_channel(values: np.ndarray[Any, Any], channels: int, rank: int, behind: int) -> np.ndarray[Any, Any] | None:
    """`values` as one float64 per channel, where broadcasting them to `rank` dimensions varies along that axis alone."""
    if values.ndim <= rank and values.size == 1:
        return np.full(channels, values.reshape(-1)[0], np.float64)
    if behind <= values.ndim <= rank and values.shape[-behind] == channels == values.size:
        return values.reshape(-1).astype(np.float64)
    return None
