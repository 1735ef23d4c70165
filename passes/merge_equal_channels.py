"""Channels that are always equal are computed once; who sums over them weights the one that is left with the sum of its columns.

    sum_c W[:, c] * x[c] = (W[:, a] + W[:, b]) * x[a] + ...    where x[a] = x[b] for every input

Models that describe an architecture carry weights that are one number throughout (ConstantOfShape), often hundreds of megabytes of
it. All their channels are equal, so that what is left is small enough to be stored. Trained weights have no two equal rows, and
comparing them would cost time for nothing: the pass looks at models that have a ConstantOfShape, and nowhere else.

Sums are folded in float64 and rounded once. Not bitwise: a sum of fewer terms is rounded otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.equal_channels import Columns, EqualChannels
from graphopt.edit import Editor
from graphopt.ir import Constant, Model, Node
from graphopt.pass_base import TENSORRT, Context, Exactness, Pass

Array = np.ndarray[Any, Any]

_LAYERS: Final = frozenset({"Conv", "Gemm", "MatMul"})
_TILE: Final = 8  # channels that half-precision convolutions of TensorRT take at a time
_LARGEST_WEIGHT: Final = 1 << 31  # elements; whatever is larger is no layer's


@dataclass(frozen=True)
class MergeEqualChannels(Pass):
    """Compute channels once that weights of one number throughout make equal.

    Before:
        g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <int64[4] s = {3, 1, 1, 1}, float[1,3,1,1] v = {1, 2, 4}>
        { w = ConstantOfShape <value = float[1] {0.5}> (s)
          c = Conv (x, w)
          r = Relu (c)
          y = Conv (r, v) }
    After:
        g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[1,1,1,1] w = {0.5}, float[1,1,1,1] v = {7}>
        { c = Conv (x, w)
          r = Relu (c)
          y = Conv (r, v) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ConstantOfShape"})

    budget: int = 1 << 20  # bytes by which a pipeline may let the file grow, as fold-constants has it
    keep: int | None = (
        None  # channels that stay of those that are equal; none: 8 for TensorRT, whose half kernels pad fewer, else 1
    )

    def __post_init__(self) -> None:
        """Check the options."""
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep={self.keep} leaves no channel")

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of channel classes (or balanced sets of them) removed."""
        edit = Editor(model)
        weights = _Weights(model, edit)
        if not weights.places:
            return 0
        equal = EqualChannels(model)
        engine = ctx.target is not None and ctx.target.family in TENSORRT
        removed, count = _admitted(equal, self.keep or (_TILE if engine else 1), ctx)
        slices = equal.groups.bytes_after(removed) if removed else {}
        growth = sum(slices.values()) - sum(weights.stored.get(key, 0) for key in slices)
        if growth > self.budget - ctx.spent.get("bytes", 0):
            ctx.remark(None, f"equal channels stay: their weights are {growth:,} bytes larger when they are stored")
            removed = {}
        sums = {} if not removed else _sums(equal, removed)
        if sums is None:
            ctx.remark(None, "equal channels stay: the sum of their weights is infinite")
        if not removed or sums is None:
            weights.restore()
            return 0
        equal.groups.apply(removed, edit, sums)
        growth += weights.store(self.budget - ctx.spent.get("bytes", 0) - growth)
        ctx.spent["bytes"] = ctx.spent.get("bytes", 0) + growth
        weights.restore()
        edit.commit()
        return count


class _Weights:
    """Fills as constants that take no memory, and for each reader constants of its own: what one needs of them, another may not.

    `restore` puts back what nobody sliced.
    """

    def __init__(self, model: Model, edit: Editor) -> None:
        self.places: list[tuple[Node, int, gs.Tensor, Constant]] = []
        self.stored: dict[int, int] = {}  # id(constant) -> its bytes in the file so far
        filled = [
            (n.outputs[0], a)
            for n in model.graph.nodes
            if n.op == "ConstantOfShape" and (a := _fill(n, edit)) is not None
        ]
        if not any(reader.op in _LAYERS for tensor, _ in filled for reader in tensor.outputs):
            return
        for constant in list(model.constants()):
            if edit.is_fixed(constant) and np.dtype(constant.dtype).kind in "fV":
                own = self.split(constant, constant._values, edit) if len(constant.outputs) > 1 else [constant]
                self.stored.update((id(c), constant.nbytes) for c in own[:1])
        for tensor, array in filled:
            self.split(tensor, array, edit)

    def split(self, tensor: gs.Tensor, values: Any, edit: Editor) -> list[Constant]:
        readers = list({id(n): n for n in tensor.outputs}.values())
        if edit.is_output(tensor) or any(edit.graph_of(n) is not edit.model.graph for n in readers):
            return []
        made = []
        for reader in readers:
            for index, operand in enumerate(reader.inputs):
                if operand is tensor:
                    own = Constant(edit.fresh_name(tensor.name), values)
                    reader.inputs[index] = own
                    self.places.append((reader, index, tensor, own))
                    made.append(own)
        return made

    def store(self, budget: int) -> int:
        """Write out the smallest fills that nobody sliced, for each reader its own, into which what follows can be folded.

        Returns:
            Bytes that they take.
        """
        left = [
            (own.nbytes, place)
            for place, (reader, index, _, own) in enumerate(self.places)
            if reader.inputs[index] is own
        ]
        taken = 0
        for size, place in sorted(left):
            reader, index, tensor, own = self.places[place]
            if _is_fill(np.asarray(own.values)) and not isinstance(tensor, gs.Constant) and taken + size <= budget:
                reader.inputs[index] = Constant(own.name, np.array(own.values))
                taken += size
        return taken

    def restore(self) -> None:
        for reader, index, tensor, own in self.places:
            if reader.inputs[index] is own:
                reader.inputs[index] = tensor


def _fill(node: Node, edit: Editor) -> Array | None:
    """The value of a ConstantOfShape of constant shape, as an array of one number."""
    if not node.is_onnx or not edit.is_fixed(node.inputs[0]):
        return None
    shape = tuple(int(d) for d in np.asarray(node.inputs[0].values).reshape(-1))
    value = np.asarray(node.attrs["value"].values if "value" in node.attrs else np.float32(0))
    if not shape or min(shape) < 1 or value.dtype.kind not in "fV" or value.size != 1:
        return None
    if math.prod(shape) > _LARGEST_WEIGHT:
        return None
    return np.broadcast_to(value.reshape(()), shape)


def _admitted(equal: EqualChannels, keep: int, ctx: Context) -> tuple[dict[int, int], int]:
    """The classes to remove with the one that stands for each, and in how many sets."""
    stands = {other: members[0] for members in equal.twins() for other in members[keep:]}
    sets = equal.groups.balanced(stands)
    stay = len(stands) - sum(map(len, sets))
    if stay:
        ctx.remark(None, f"{stay} equal channels stay: the groups of a convolution would be unequal")
    admitted = [members for members in sets if ctx.admit()]
    return {root: stands[root] for members in admitted for root in members}, len(admitted)


def _sums(equal: EqualChannels, stands: dict[int, int]) -> dict[int, Array] | None:
    """By id of each constant that sums over channels, its values with the columns of equal channels added up; None: they overflow."""
    found: dict[int, Array] = {}
    for columns in equal.columns:
        if columns is None:
            continue
        weight = columns.node.inputs[1]
        roots = equal.groups.roots[columns.atoms]
        if not any(int(r) in stands for r in roots):
            continue
        values = np.asarray(weight.values)
        blocks = [
            _added(block, columns.axis, target)
            for block, target in zip(
                _blocks(values, columns), (_target(r, stands) for r in np.split(roots, columns.groups)), strict=True
            )
        ]
        result = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        if np.isinf(result).any() and not np.isinf(values[(0,) * values.ndim] if _is_fill(values) else values).any():
            return None
        found[id(weight)] = np.broadcast_to(result, values.shape)
    return found


def _is_fill(values: Array) -> bool:
    return not any(values.strides)


def _blocks(values: Array, columns: Columns) -> list[Array]:
    """The weight by groups of rows; of one that is one number only as much as tells its columns apart."""
    if not _is_fill(values):
        return list(np.split(values, columns.groups))
    if columns.groups > 1:
        rows = values[(slice(None), slice(None), *[slice(1)] * (values.ndim - 2))]
        return list(np.split(rows, columns.groups))
    return [values[tuple(slice(None) if axis == columns.axis else slice(1) for axis in range(values.ndim))]]


def _target(roots: Array, stands: dict[int, int]) -> Array:
    """For each index of an axis the index that stands for it: the n-th of a class for the n-th of another."""
    places: dict[int, list[int]] = {}
    for place, root in enumerate(roots.tolist()):
        places.setdefault(root, []).append(place)
    target = np.arange(len(roots))
    for root, own in places.items():
        target[own] = places[stands.get(root, root)]
    return target


def _added(values: Array, axis: int, target: Array) -> Array:
    order = np.argsort(target, kind="stable")
    kept, starts = np.unique(target[order], return_index=True)
    with np.errstate(all="ignore"):  # who asked for infinities gets them, others are refused later
        sums = np.add.reduceat(values.take(order, axis).astype(np.float64), starts, axis)
        result = np.array(values)
        np.moveaxis(result, axis, 0)[kept] = np.moveaxis(sums, axis, 0).astype(values.dtype)
    return result
