"""Which channels hold the same numbers as another, whatever the inputs are.

Each tracked axis of each tensor (analyses/channel_groups) gets a *partition*: a number for each index, equal where the slices are
equal bit by bit. Weights start it: equal rows with equal biases make equal channels. Operators carry it on: elementwise ones combine their
operands, pools and index maps copy it, a Concat sets partitions side by side. What is not understood tells every index apart.

A class of channels has a *twin* when wherever the two occur, index by index, their numbers are equal. One of them is enough then, if
each place that sums over the channels gets the sum of both columns: those places are `columns`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.channel_groups import ChannelGroups, Labels
from graphopt.analyses.channel_relations import Call, Relation, relation_of
from graphopt.analyses.channels_elementwise import BROADCASTING, UNARY
from graphopt.ir import Constant, Model, Node

Array = np.ndarray[Any, Any]
Partition = Array | None  # None: every index may differ

# Each index of an axis is treated like every other one, by operands that know no channels; Dropout in training draws for each.
_ALIKE: Final = frozenset(UNARY) - {"Dropout"} | {
    *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "Transpose"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    *("Squeeze", "Unsqueeze"),
}


@dataclass(frozen=True)
class Columns:
    """A constant that sums over channels: what its slices along `axis` belong to, and for a grouped Conv in which rows."""

    node: Node
    axis: int
    atoms: Array
    groups: int


class EqualChannels:
    """The twins of a model; `groups` holds the classes, and slices."""

    def __init__(self, model: Model) -> None:
        self.groups = ChannelGroups(model, relation_of=_relation_of)
        self._known: dict[int, tuple[Partition, ...]] = {}
        self._rows: dict[tuple[int, int], Array] = {}
        for node in model.graph.nodes:
            self._node(node)
        self.columns = [self._columns(c.node, c.atoms) for c in self.groups.contractions]

    def twins(self) -> list[tuple[int, ...]]:
        """Sets of two and more classes that are equal everywhere, in the order of the graph; the first stands for all."""
        groups = self.groups
        colors = _Colors(groups.size)
        seen: set[tuple[bytes, bytes]] = set()
        for node in groups.model.graph.nodes:
            for tensor in node.outputs:
                partitions = self._known.get(id(tensor)) or ()
                for axis, atoms in enumerate(groups.labels(tensor) or () if tensor.name else ()):
                    if atoms is None:
                        continue
                    numbers = partitions[axis] if axis < len(partitions) else None
                    roots = groups.roots[atoms]
                    key = (roots.tobytes(), b"" if numbers is None else numbers.tobytes())
                    if key not in seen:
                        seen.add(key)
                        colors.refine(roots, numbers)
        for contraction, columns in zip(groups.contractions, self.columns, strict=True):
            size = len(contraction.atoms)
            numbers = None if columns is None else np.arange(size) // (size // columns.groups)
            colors.refine(groups.roots[contraction.atoms], numbers)
        for blocks in groups.balances:
            colors.refine(groups.roots[np.concatenate(blocks)], np.repeat(np.arange(len(blocks)), [*map(len, blocks)]))
        alike: dict[int, list[int]] = defaultdict(list)
        for root in groups.classes:
            alike[int(colors.of[root])].append(root)
        return [tuple(members) for members in alike.values() if len(members) > 1]

    # ---------------------------------------------------------------------------------------------------- partitions

    def _of(self, tensor: gs.Tensor, axis: int) -> Partition:
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor, axis)
        known = self._known.get(id(tensor)) or ()
        return known[axis] if axis < len(known) else None

    def _constant(self, tensor: gs.Constant, axis: int) -> Array:
        key = (id(tensor), axis)
        if key not in self._rows:
            values = np.asarray(tensor.values)
            if values.strides[axis] == 0 or not values.shape[axis] or _is_one_number(values):
                self._rows[key] = np.zeros(values.shape[axis], np.int64)
            else:
                first: dict[bytes, int] = {}
                slices = (part.tobytes() for part in np.moveaxis(values, axis, 0))
                self._rows[key] = np.array([first.setdefault(s, len(first)) for s in slices], np.int64)
        return self._rows[key]

    def _node(self, node: Node) -> None:
        groups = self.groups
        for tensor in node.outputs:
            labels = groups.labels(tensor) if tensor.name else None
            if labels is None or not node.is_onnx:
                continue
            found: list[Partition] = [None] * len(labels)
            for axis, atoms in enumerate(labels):
                if atoms is not None:
                    found[axis] = self._axis(node, axis, len(labels), atoms)
            self._known[id(tensor)] = tuple(found)

    def _axis(self, node: Node, axis: int, rank: int, atoms: Array) -> Partition:
        """The partition of one axis of a result."""
        if node.op in _ALIKE:
            return self._same_atoms(node.inputs[0], atoms)
        if node.op == "Reshape" or node.op == "Flatten":
            return self._runs(node.inputs[0], atoms)
        if node.op == "BatchNormalization" and axis == 1:
            return _combined([self._of(node.inputs[0], 1), *(self._of(t, 0) for t in node.inputs[1:])])
        if node.op == "LRN" and axis == 1:
            return _interior(self._of(node.inputs[0], 1), int(node.attrs["size"]) // 2)
        if node.op == "Concat" and axis == int(node.attrs.get("axis", 1)) % rank:
            return self._side_by_side(node.inputs, axis)
        if node.op in BROADCASTING:
            return self._broadcast(node.inputs, axis - rank)
        if node.op == "Conv" and axis == 1:
            return self._conv_rows(node, len(atoms))
        if node.op in ("Gemm", "MatMul") and axis == rank - 1 and isinstance(node.inputs[1], gs.Constant):
            out = 0 if node.attrs.get("transB", 0) else len(node.inputs[1].shape) - 1
            found = self._of(node.inputs[1], out)
            biased = len(node.inputs) > 2 and node.inputs[2].name
            return _combined([found, self._broadcast(node.inputs[2:], -1, len(atoms))]) if biased else found
        return None

    def _same_atoms(self, tensor: gs.Tensor, atoms: Array) -> Partition:
        labels = self.groups.labels(tensor) or ()
        found = [axis for axis, other in enumerate(labels) if other is not None and np.array_equal(other, atoms)]
        return self._of(tensor, found[0]) if len(found) == 1 else None

    def _runs(self, tensor: gs.Tensor, atoms: Array) -> Partition:
        """A reshaped axis: what the n-th indices of two classes are made of is equal where all indices of the classes were."""
        roots = self.groups.roots[atoms]
        tracked = {i: self.groups.roots[a] for i, a in enumerate(self.groups.labels(tensor) or ()) if a is not None}
        sources = [axis for axis, source in tracked.items() if np.isin(roots, source).any()]
        if len(sources) != 1 or not np.isin(roots, tracked[sources[0]]).all():
            return None
        numbers = self._of(tensor, sources[0])
        if numbers is None:
            return None
        colors = _Colors(self.groups.size)
        colors.refine(tracked[sources[0]], numbers)
        order = np.argsort(roots, kind="stable")
        _, starts, counts = np.unique(roots[order], return_index=True, return_counts=True)
        place = np.empty(len(roots), np.int64)
        place[order] = np.arange(len(roots)) - np.repeat(starts, counts)
        return _combined([colors.of[roots], place])

    def _side_by_side(self, operands: Sequence[gs.Tensor], axis: int) -> Partition:
        pieces: list[Array] = []
        start = 0
        known: dict[int, Array] = {}
        for tensor in operands:
            if id(tensor) not in known:
                labels = self.groups.shapes.shape(tensor) or ()
                numbers = self._of(tensor, axis)
                size = len(numbers) if numbers is not None else labels[axis]
                if not isinstance(size, int):
                    return None
                known[id(tensor)] = start + (numbers if numbers is not None else np.arange(size))
                start += size
            pieces.append(known[id(tensor)])
        return np.concatenate(pieces)

    def _broadcast(self, operands: Sequence[gs.Tensor], axis: int, size: int = 0) -> Partition:
        """`axis` from behind; operands without it, or of size 1 there, tell no indices apart."""
        found: list[Partition] = [np.zeros(size, np.int64)] if size else []
        for tensor in operands:
            shape = self.groups.shapes.shape(tensor)
            if shape is None:
                return None
            if -axis <= len(shape) and shape[axis] != 1:
                found.append(self._of(tensor, len(shape) + axis))
        return _combined(found)

    def _conv_rows(self, node: Node, channels: int) -> Partition:
        weight, count = node.inputs[1], int(node.attrs.get("group", 1))
        if not isinstance(weight, gs.Constant):
            return None
        found: list[Partition] = [self._of(weight, 0)]
        if len(node.inputs) > 2 and node.inputs[2].name:
            found.append(self._of(node.inputs[2], 0))
        if count > 1:
            data = self._of(node.inputs[0], 1)
            if channels % count or (data is not None and data.size % count):
                return None  # no such groups; the checker will say so
            read = (
                np.arange(count) if data is None else np.unique(data.reshape(count, -1), axis=0, return_inverse=True)[1]
            )
            found.append(np.repeat(read.reshape(-1), channels // count))
        return _combined(found)

    def _columns(self, node: Node, atoms: Array) -> Columns | None:
        """Where the columns of the constant are that `node` sums over channels with; None where they cannot be added up."""
        weight = node.inputs[1]
        if not isinstance(weight, Constant) or len(weight.outputs) != 1 or not self.groups.is_fixed(weight):
            return None
        if any(weight is t for t in self.groups.model.graph.outputs):
            return None
        if node.op == "Conv":
            return Columns(node, 1, atoms, int(node.attrs.get("group", 1)))
        if node.op == "Gemm":
            return Columns(node, 1 if node.attrs.get("transB", 0) else 0, atoms, 1)
        return Columns(node, len(weight.shape) - 2, atoms, 1) if node.op == "MatMul" else None


class _Colors:
    """A partition of classes that is refined place by place."""

    def __init__(self, size: int) -> None:
        self.of = np.zeros(size, np.int64)  # by class
        self._next = 1

    def refine(self, roots: Array, numbers: Partition) -> None:
        """Tell classes apart that occur on an axis other times, or with other numbers; None: all of them, from each other."""
        order = np.argsort(roots, kind="stable")
        unique, starts, counts = np.unique(roots[order], return_index=True, return_counts=True)
        for count in np.unique(counts).tolist():
            there = unique[counts == count]
            if numbers is None:
                found = np.arange(len(there))
            else:
                places = order[starts[counts == count][:, None] + np.arange(count)]
                rows = np.column_stack([self.of[there], numbers[places]])
                found = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
            self.of[there] = self._next + found
            self._next += len(there)


def _is_one_number(values: Array) -> bool:
    """Whether all bits of all elements agree; the first two elements tell it of most that do not."""
    if values.itemsize not in (2, 4, 8):
        return False
    bits = np.ascontiguousarray(values).reshape(-1).view(f"u{values.itemsize}")
    return bool(bits[0] == bits[-1] and (bits == bits[0]).all())


def _combined(partitions: Sequence[Partition]) -> Partition:
    """Equal where all are."""
    if not partitions or any(p is None for p in partitions):
        return None
    rows = np.column_stack(partitions)  # type: ignore[arg-type]
    return rows[:, 0] if rows.shape[1] == 1 else np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _interior(numbers: Partition, half: int) -> Partition:
    """A normalization over windows of neighbours: where all channels are equal, those whose window is whole stay so.

    Removing some of them leaves the windows of all others as they were, as long as one is left.
    """
    if numbers is None or (numbers != numbers[0]).any() or len(numbers) <= 2 * half:
        return None
    found = np.arange(len(numbers))
    found[half : len(numbers) - half] = half
    return found


def _relation_of(node: Node) -> Relation | None:
    return _lrn if node.op == "LRN" and node.is_onnx else relation_of(node)


def _lrn(call: Call) -> Sequence[Labels | None]:
    """Not in the table, since a channel that is removed there is in its neighbours' windows; an equal one makes no difference."""
    return [tuple(call.axes(0))]


__all__ = ["Columns", "EqualChannels", "Partition"]
