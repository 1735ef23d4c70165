"""InstanceNormalization of x regrouped as ``[N, G, -1]``, back in the shape of x, times scale plus bias by channel, is GroupNormalization.

Exporters write it so, with ones and zeros by group inside, which are carried outward: ``(n s + b) k + c = n (s k) + (b k + c)``.
ONNX Runtime on the CPU takes the operator apart into more nodes than these, so it is for TensorRT; scale and bias are by channel from opset 21 on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.idioms import by_channel, closed
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.views import Array
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.opset import NewerOperator
from graphopt.pass_base import TENSORRT, Context, Exactness


@dataclass(frozen=True)
class FuseGroupNorm(NewerOperator):
    """Normalize groups of channels by one operator.

    Before:
        g (float[N,4,H,W] x) => (float[N,4,H,W] y)
        <int64[3] r = {0,2,-1}, float[2] one = {1,1}, float[2] zero = {0,0}, float[4,1,1] k = {1,2,3,4}, float[4,1,1] b = {4,3,2,1}>
        { v = Reshape (x, r)
          n = InstanceNormalization <epsilon = 0.00001> (v, one, zero)
          s = Shape (x)
          u = Reshape (n, s)
          t = Mul (u, k)
          y = Add (t, b) }
    After:
        g (float[N,4,H,W] x) => (float[N,4,H,W] y)
        <float[4] k = {1,2,3,4}, float[4] b = {4,3,2,1}>
        { y = GroupNormalization <epsilon = 0.00001, num_groups = 2> (x, k, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    serves: ClassVar[tuple[str, ...]] = TENSORRT
    operator: ClassVar[str] = "GroupNormalization"
    since: ClassVar[int] = 21
    ops: ClassVar[frozenset[str] | None] = frozenset({"InstanceNormalization"})

    apply: bool | None = None  # whether to run; none: for the targets that it serves

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of normalizations fused."""
        return super().run(model, ctx) if ctx.serves(self.serves, self.apply) else 0

    def match(self, node: Node, shapes: Shapes, edit: Editor) -> Callable[[], None] | str | None:
        """The group normalization around an InstanceNormalization."""
        if node.op != "InstanceNormalization" or not node.is_onnx:
            return None
        found = _match(node, shapes, edit)
        return found if isinstance(found, str) else lambda: _write(node, found, edit)


@dataclass(frozen=True)
class _GroupNorm:
    x: gs.Tensor
    result: gs.Tensor
    groups: int
    scale: Array  # by channel
    bias: Array
    nodes: tuple[Node, ...]


def _match(norm: Node, shapes: Shapes, edit: Editor) -> _GroupNorm | str:
    """The group normalization around `norm`, or why there is none."""
    first, last = edit.producer(norm.inputs[0]), edit.sole_consumer(norm.outputs[0])
    if not (_is(first, "Reshape") and _is(last, "Reshape")) or last.inputs[0] is not norm.outputs[0]:
        return "no Reshape stands before and behind it"
    x, back = first.inputs[0], last.outputs[0]
    shape, grouped = shapes.shape(x), shapes.shape(norm.inputs[0])
    if shape is None or grouped is None or shapes.dtype(x) != np.float32 or len(shape) < 3 or len(grouped) < 3:
        return f"{x.name!r} is not known to be float32 with batch, channels and space"
    if shape != shapes.shape(back):
        return f"{back.name!r} may have another shape than {x.name!r}"
    channels, groups = shape[1], grouped[1]
    if grouped[0] != shape[0]:
        return "the batch is regrouped, too"
    if not isinstance(channels, int) or not isinstance(groups, int) or groups < 1 or channels % groups:
        return "the channels are not known to be groups of one size"
    if not all(edit.is_fixed(t) and t.values.shape == (groups,) for t in norm.inputs[1:]):
        return "its scale or bias is not fixed, or not by group"
    inner = [np.repeat(t.values.astype(np.float64), channels // groups) for t in norm.inputs[1:]]
    nodes, result = [first, norm, last], back
    scale, bias = inner
    multiply = edit.sole_consumer(result)
    factor = _channel_constant(multiply, "Mul", result, len(shape), channels, edit)
    if multiply is not None and factor is not None:
        scale, bias, result = scale * factor, bias * factor, multiply.outputs[0]
        nodes.append(multiply)
    add = edit.sole_consumer(result)
    shift = _channel_constant(add, "Add", result, len(shape), channels, edit)
    if add is not None and shift is not None:
        bias, result = bias + shift, add.outputs[0]
        nodes.append(add)
    if not closed(nodes, result, edit):
        return "a value inside it is read by others, too"
    return _GroupNorm(x, result, groups, scale.astype(np.float32), bias.astype(np.float32), tuple(nodes))


def _is(node: Node | None, op: str) -> TypeGuard[Node]:
    return node is not None and node.op == op and node.is_onnx


def _channel_constant(
    node: Node | None, op: str, tensor: gs.Tensor, rank: int, channels: int, edit: Editor
) -> Array | None:
    """The operand beside `tensor` as a float64 vector by channel, where `node` is an `op` with such a constant."""
    if not _is(node, op):
        return None
    other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    values = by_channel(other, rank, channels) if edit.is_fixed(other) else None
    return None if values is None else values.astype(np.float64)


def _write(norm: Node, found: _GroupNorm, edit: Editor) -> None:
    attributes = {"num_groups": found.groups, "epsilon": norm.attrs.get("epsilon", 1e-5)}
    scale = edit.constant(f"{norm.name}_scale", found.scale)
    bias = edit.constant(f"{norm.name}_bias", found.bias)
    edit.take_over(found.result, Node("GroupNormalization", "groups", attributes, [found.x, scale, bias]), found.nodes)
