"""Channels that are zero wherever they are summed over, or that only zeros read, are not computed at all.

A class of channels (analyses/channel_groups) is dead when at each place that sums over it either the value is zero, or the weight that
reads it is. Zeros come from rows of weights with zero bias and pass through what keeps them: ``f(0) = 0``, ``0 * x``, ``0 + 0``, pools
and index maps. A model that another tool masked, with its zeros in place, becomes a small one.

Not bitwise: ``0 * inf`` is NaN and goes with its channel, and a sum of fewer terms may be rounded in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.channel_groups import ChannelGroups, Kept, channel_groups
from graphopt.analyses.gram import layers
from graphopt.analyses.importance import owners
from graphopt.edit import Editor, cleanup
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

_KEEPS: Final = frozenset(
    [
        "Relu",
        "LeakyRelu",
        "Tanh",
        "Erf",
        "Gelu",
        "HardSwish",
        "Elu",
        "Selu",
        "Celu",
        "ThresholdedRelu",
        "Sqrt",
        "Abs",
        "Neg",
        "Sign",
        "Sin",
        "Tan",
        "Asin",
        "Atan",
        "Sinh",
        "Asinh",
        "Atanh",
        "Identity",
        "Cast",
        "CastLike",
        "Dropout",
        "Mish",
        "Softsign",
        "Floor",
        "Ceil",
        "Round",
        "PRelu",
        "Swish",
        "QuickGelu",
        "MaxPool",
        "AveragePool",
        "LpPool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "GlobalLpPool",
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "Transpose",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Expand",
        "Tile",
        "DepthToSpace",
        "SpaceToDepth",
        "Resize",
    ]
)  # results whose channels are zero where the first operand's are
_ALL: Final = frozenset(("Add", "Sub", "Sum", "Max", "Min", "Mean", "Concat"))  # where all operands' are
_ANY: Final = frozenset(("Mul", "And"))  # where any operand's are


@dataclass(frozen=True)
class EliminateDeadChannels(Pass):
    """Remove channels that are zero, or that nothing reads with a weight other than zero.

    Before:
        g (float[1,1,1,1] x) => (float[1,1,1,1] y)
        <float[3,1,1,1] w = {1, 0, 3}, float[3] b = {4, 0, 6}, float[1,3,1,1] v = {7, 8, 0}>
        { c = Conv (x, w, b)
          r = Relu (c)
          y = Conv (r, v) }
    After:
        g (float[1,1,1,1] x) => (float[1,1,1,1] y)
        <float[1,1,1,1] w = {1}, float[1] b = {4}, float[1,1,1,1] v = {7}>
        { c = Conv (x, w, b)
          r = Relu (c)
          y = Conv (r, v) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING

    def run(self, model: Model, ctx: Context) -> int:
        """Sweeps until nothing is dead; returns the number of channel classes (or balanced sets of them) removed."""
        removed = 0
        while True:
            groups = channel_groups(model)
            gone, count = _admitted(groups, ctx)
            if not gone:
                return removed
            removed += count
            edit = Editor(model)
            groups.apply(gone, edit)
            edit.commit()
            cleanup(model)


def _admitted(groups: ChannelGroups, ctx: Context) -> tuple[set[int], int]:
    """The dead classes that may go, and in how many sets."""
    dead = sorted(_dead(groups))
    gone: set[int] = set()
    count = 0
    for root in dead:
        if root in gone:
            continue
        bundle = groups.bundle(root, [c for c in dead if c not in gone], lambda c: 0.0)
        if bundle is None or not groups.is_balanced(Kept(groups, gone.union(bundle))):
            name = next((g.name for g in groups.groups if root in g.classes), "?")
            ctx.remark(None, f"a channel of {name!r} is dead, but its group or axis cannot do without it")
            continue
        if not ctx.admit():
            break
        gone.update(bundle)
        count += 1
    return gone, count


def _dead(groups: ChannelGroups) -> set[int]:
    """The free classes that count for nothing wherever they are summed over."""
    zeros = _zeros(groups)
    found = layers(groups.model)
    dead = set(groups.classes)
    for contraction in groups.contractions:
        roots = set(groups.roots[contraction.atoms].tolist())
        alive = (roots & dead) - zeros.get(id(contraction.node.inputs[contraction.operand]), set())
        layer = found.get(contraction.node.name)
        if layer is not None and alive:
            read = set()
            for owner, weight in zip(owners(groups, contraction, layer), layer.matrix(), strict=True):
                read.update(owner[(weight != 0).any(0)].tolist())
            alive &= read
        dead -= alive
    return dead


def _zeros(groups: ChannelGroups) -> dict[int, set[int]]:
    """By id of a tensor, the classes that are zero on it."""
    zeros: dict[int, set[int]] = {}
    for tensor, _ in groups.weights():
        zeros[id(tensor)] = _constant(groups, tensor)
    for node in groups.model.graph.nodes:
        known = _node(groups, node, zeros)
        for tensor in node.outputs:
            if tensor.name and known:
                zeros[id(tensor)] = known & _classes(groups, tensor)
    return zeros


def _classes(groups: ChannelGroups, tensor: gs.Tensor) -> set[int]:
    return {int(r) for axis in groups.labels(tensor) or () if axis is not None for r in groups.roots[axis]}


def _constant(groups: ChannelGroups, tensor: gs.Constant, axes: Container[int] | None = None) -> set[int]:
    """Classes all of whose slices, on all axes or some, are zero."""
    values: np.ndarray[Any, Any] = np.asarray(tensor.values)
    found: set[int] = set()
    other: set[int] = set()
    for axis, atoms in enumerate(groups.labels(tensor) or ()):
        if atoms is not None and (axes is None or axis in axes):
            used = (values != 0).any(tuple(i for i in range(values.ndim) if i != axis))
            roots = groups.roots[atoms]
            other.update(roots[used].tolist())
            found.update(roots[~used].tolist())
    return found - other


def _rows(groups: ChannelGroups, node: Node, of: Callable[[int], set[int]]) -> set[int]:
    """Classes of results of a product that are zero, but for a bias: not those that are only summed over."""
    weight = node.inputs[1]
    if isinstance(weight, gs.Constant):
        swapped = node.op == "ConvTranspose" or (node.op == "Gemm" and not node.attrs.get("transB", 0))
        last = len(weight.shape) - 1
        return _constant(groups, weight, (last if node.op == "MatMul" else 1 if swapped else 0,))
    if node.op != "MatMul":
        return set()
    summed = {int(r) for c in groups.contractions if c.node is node for r in groups.roots[c.atoms]}
    return (of(0) | of(1)) - summed


def _node(groups: ChannelGroups, node: Node, zeros: dict[int, set[int]]) -> set[int]:
    """Classes that are zero on the results."""

    def of(index: int) -> set[int]:
        return zeros.get(id(node.inputs[index]), set())

    if not node.is_onnx or not node.inputs:
        return set()
    if node.op in _KEEPS:
        return of(0)
    if node.op == "Clip":
        bounds = [t.values for t in node.inputs[1:] if groups.is_fixed(t)]
        known = len(bounds) == sum(1 for t in node.inputs[1:] if t.name)
        low, high = node.attrs.get("min", 0), node.attrs.get("max", 0)
        if len(node.inputs) > 1 and node.inputs[1].name and known:
            low = bounds[0]
        if len(node.inputs) > 2 and known:
            high = bounds[-1]
        return of(0) if known and low <= 0 <= high else set()
    if node.op == "Pad":
        return of(0) if node.attrs.get("mode", "constant") == "constant" and len(node.inputs) < 3 else set()
    if node.op in _ANY:
        return set().union(*(of(i) for i in range(len(node.inputs))))
    if node.op == "Div":
        return of(0)
    if node.op in _ALL:
        present = [
            of(i) | (_absent(groups, node, i) if node.op == "Concat" else set()) for i in range(len(node.inputs))
        ]
        return set.intersection(*present)
    if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        rows = _rows(groups, node, of)
        biased = len(node.inputs) > 2 and bool(node.inputs[2].name)
        return rows & of(2) if biased else rows
    return set()


def _absent(groups: ChannelGroups, node: Node, index: int) -> set[int]:
    """For a Concat: the classes of the result that an operand has no part in."""
    return _classes(groups, node.outputs[0]) - _classes(groups, node.inputs[index])
