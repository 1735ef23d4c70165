"""Channels that can be scaled without a trace: what writes them divides, what reads them multiplies.

    W2 relu(W1 x + b1) = (W2 S) relu(S^-1 W1 x + S^-1 b1),  S diagonal and positive

One scale for all channels of a tensor leaves few codes to the quiet channels; `S` makes them alike. Between convolutions that is
cross-layer equalization (Nagel 2019), behind a LayerNormalization SmoothQuant (Xiao 2023): there gamma and beta divide. A *class* is all
that has to be scaled together: a whole residual stream through its sums, pools and Relus, every writer and reader of it.

Weights have one scale for each output channel, so dividing a writer's rows costs nothing, while multiplying a reader's columns makes its
largest weights larger. How far to go (alpha) is therefore chosen by the error expected at the readers' outputs, from second moments:

    sum_i |W_i|^2 s_i^2 step^2 / 12  +  sum_oi step_o^2 / 12 E[x_i^2] / s_i^2

the rounding of the tensors of the class, and that of the readers' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import calibration
from graphopt.analyses.shapes import Shapes
from graphopt.data import Data
from graphopt.edit import Editor
from graphopt.ir import Constant, Model, Node

Array = np.ndarray[Any, Any]

ALPHAS: Final = (0.25, 0.5, 0.75, 1.0)
SAMPLES: Final = 128  # that are looked at, at most
WORK: Final = 1 << 38  # multiply-accumulates of those samples, about
_KEPT: Final = frozenset(["Relu", "LeakyRelu", "Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool"])
_FLOOR: Final = 1e-3  # of the largest channel: quieter ones count as that loud
_STEPS: Final = 255


@dataclass(frozen=True)
class Writer:
    """A constant that is divided: `axis` of operand `operand` counts the channels."""

    node: Node
    operand: int
    axis: int


@dataclass(frozen=True)
class Reader:
    """A weight that is multiplied along its input channels."""

    node: Node
    axis: int  # of input channels; of a grouped Conv, those of one group
    groups: int = 1

    def matrix(self) -> Array:
        """The weight as [outputs, input channels, rest]; a grouped one with zeros left out: [outputs of a group, channels, rest]."""
        w = np.asarray(self.node.inputs[1].values, np.float64)
        if self.node.op == "Conv":
            if self.groups == 1:
                return w.reshape(*w.shape[:2], -1)
            w = w.reshape(self.groups, w.shape[0] // self.groups, w.shape[1], -1).transpose(1, 0, 2, 3)
            return w.reshape(w.shape[0], -1, w.shape[3])
        return (w if self.axis == 1 else w.T)[..., None]


@dataclass
class Class:
    """Tensors whose channels have one scale each."""

    channels: int
    tensors: list[gs.Tensor] = field(default_factory=list)  # with the channel axis of `axes`
    axes: list[int] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first tensor's."""
        return str(self.tensors[0].name)


class _Union:
    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def find(self, key: int) -> int:
        self.parent.setdefault(key, key)
        while self.parent[key] != key:
            self.parent[key] = self.parent[self.parent[key]]
            key = self.parent[key]
        return key

    def join(self, a: int, b: int) -> None:
        self.parent[self.find(a)] = self.find(b)


class _Finder:
    def __init__(self, model: Model, shapes: Shapes) -> None:
        self.model, self.shapes, self.edit = model, shapes, Editor(model)
        self.union = _Union()
        self.axes: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.tensors: dict[int, gs.Tensor] = {}
        self.writers: dict[int, list[Writer]] = {}
        self.readers: dict[int, list[Reader]] = {}

    def classes(self) -> list[Class]:
        for tensor in (*self.model.graph.inputs, *self.model.graph.outputs):
            self.pin(tensor)
        root = {id(n) for n in self.model.graph.nodes}
        for node in self.model.nodes():
            if id(node) not in root or not node.is_onnx or not self.rule(node):
                for tensor in (*node.inputs, *node.outputs):
                    self.pin(tensor)
        found: dict[int, Class] = {}
        bad = {self.union.find(t) for t in self.pinned}
        for key, tensor in self.tensors.items():
            group = self.union.find(key)
            if group in bad:
                continue
            shape = self.shapes.shape(tensor)
            size = shape[self.axes[key]] if shape is not None else None
            if not isinstance(size, int):
                bad.add(group)
                found.pop(group, None)
                continue
            one = found.setdefault(group, Class(size))
            one.tensors.append(tensor)
            one.axes.append(self.axes[key])
            one.writers += self.writers.get(key, [])
            one.readers += self.readers.get(key, [])
        return [c for c in found.values() if c.readers and c.writers and c.channels > 1]

    def pin(self, tensor: gs.Tensor) -> None:
        self.pinned.add(id(tensor))

    def member(self, tensor: gs.Tensor, axis: int) -> bool:
        """Note the channel axis of a tensor; False where it has another already, or is no float value."""
        if isinstance(tensor, gs.Constant) or self.shapes.dtype(tensor) not in (None, np.dtype(np.float32)):
            return False
        if self.axes.setdefault(id(tensor), axis) != axis:
            return False
        self.tensors[id(tensor)] = tensor
        return True

    def own(self, tensor: gs.Tensor) -> bool:
        """Whether a constant is fixed and read here alone."""
        return self.edit.is_fixed(tensor) and len(tensor.outputs) == 1 and tensor.dtype == np.float32

    def rule(self, node: Node) -> bool:
        """Note what a node says about scaling; False where it says nothing."""
        match node.op:
            case "Conv" | "Gemm" | "MatMul":
                return self.weighted(node)
            case "LayerNormalization":
                return self.normalization(node)
            case "Add" | "Mul":
                return self.elementwise(node)
            case "Flatten" | "Reshape" | "Squeeze" | "ReduceMean":
                return self.flattened(node)
            case _ if node.op in _KEPT:
                used = [t for t in node.outputs if t.name]
                rank = self.shapes.rank(node.inputs[0])
                axis = self.axes.get(id(node.inputs[0]), 1 if "Pool" in node.op else None)
                if len(used) != 1 or rank is None or axis is None:
                    return False
                return self.same(node.inputs[0], used[0], axis)
        return False

    def same(self, a: gs.Tensor, b: gs.Tensor, axis: int, other: int | None = None) -> bool:
        if not self.member(a, axis) or not self.member(b, axis if other is None else other):
            return False
        self.union.join(id(a), id(b))
        return True

    def weighted(self, node: Node) -> bool:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or not self.own(weight) or len(node.outputs) != 1:
            return False
        x, y = node.inputs[0], node.outputs[0]
        groups = 1
        if node.op == "Conv":
            axis, rows, columns = 1, 0, 1
            groups = int(node.attrs.get("group", 1))
        else:
            rank = self.shapes.rank(x)
            if len(weight.shape) != 2 or rank is None or rank < 2:
                return False
            if node.op == "Gemm" and (
                node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1 or node.attrs.get("beta", 1.0) != 1
            ):
                return False
            axis = rank - 1
            rows, columns = (0, 1) if node.op == "Gemm" and node.attrs.get("transB", 0) else (1, 0)
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if bias is not None and not (self.own(bias) and len(bias.shape) == 1 and bias.shape[0] == weight.shape[rows]):
            return False
        if not self.member(x, axis) or not self.member(y, axis):
            return False
        self.readers.setdefault(id(x), []).append(Reader(node, columns, groups))
        writers = self.writers.setdefault(id(y), [])
        writers.append(Writer(node, 1, rows))
        if bias is not None:
            writers.append(Writer(node, 2, 0))
        return True

    def normalization(self, node: Node) -> bool:
        x, y = node.inputs[0], node.outputs[0]
        rank = self.shapes.rank(x)
        if (
            rank is None
            or node.attrs.get("axis", -1) not in (-1, rank - 1)
            or len([t for t in node.outputs if t.name]) > 1
        ):
            return False
        constants = [(i, t) for i, t in enumerate(node.inputs[1:3], 1) if t.name]
        if not constants or not all(self.own(t) and len(t.shape) == 1 for _, t in constants):
            return False
        self.pin(x)
        if not self.member(y, rank - 1):
            return False
        self.writers.setdefault(id(y), []).extend(Writer(node, i, 0) for i, _ in constants)
        return True

    def elementwise(self, node: Node) -> bool:
        """A sum of two tensors of a class, or a constant for each channel added to one or multiplied with what is in none."""
        y = node.outputs[0]
        constants = [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)]
        if not constants and node.op == "Add":
            a, b = node.inputs
            axis = self.axes.get(id(a), self.axes.get(id(b)))
            shapes = [self.shapes.shape(t) for t in (a, b)]
            if axis is None or shapes[0] is None or shapes[1] is None or len(shapes[0]) != len(shapes[1]):
                return False
            if shapes[0][axis] != shapes[1][axis]:
                return False
            return self.same(a, y, axis) and self.same(b, y, axis)
        if len(constants) != 1 or not self.own(node.inputs[constants[0]]):
            return False
        index = constants[0]
        x, constant = node.inputs[1 - index], node.inputs[index]
        shape, own = self.shapes.shape(x), constant.shape
        axis = self.axes.get(id(x), len(shape) - 1 if shape is not None else None)
        if shape is None or axis is None or len(own) > len(shape):
            return False
        place = axis - (len(shape) - len(own))
        if place < 0 or own[place] != shape[axis] or any(d != 1 for i, d in enumerate(own) if i != place):
            return False
        if node.op == "Add":
            if not self.same(x, y, axis):
                return False
        else:
            self.pin(x)
            if not self.member(y, axis):
                return False
        self.writers.setdefault(id(y), []).append(Writer(node, index, place))
        return True

    def flattened(self, node: Node) -> bool:
        """[N, C, 1, 1] to [N, C], and the mean over all places."""
        x, y = node.inputs[0], node.outputs[0]
        before, after = self.shapes.shape(x), self.shapes.shape(y)
        if before is None or after is None or len(before) < 3 or self.axes.get(id(x), 1) != 1:
            return False
        if node.op == "ReduceMean":
            gone = after[2:] if len(after) == len(before) else ()
            good = len(after) in (2, len(before)) and all(d == 1 for d in gone) and after[1] == before[1]
        else:
            good = len(after) == 2 and all(d == 1 for d in before[2:]) and after[1] == before[1]
        return good and isinstance(before[1], int) and self.same(x, y, 1)


def classes(model: Model, shapes: Shapes) -> list[Class]:
    """All classes of the root graph that have a weight to divide and one to multiply."""
    return _Finder(model, shapes).classes()


@dataclass
class Seen:
    """Of the channels of one tensor."""

    low: Array
    high: Array
    square: Array  # sum of squares
    count: int = 0


def observe(model: Model, found: list[Class], data: Data) -> dict[str, Seen]:
    """Extremes and second moments of each channel, by name of the tensor."""
    places = {t.name: (a, c.channels) for c in found for t, a in zip(c.tensors, c.axes, strict=True)}
    seen = {n: Seen(np.zeros(c), np.zeros(c), np.zeros(c)) for n, (_, c) in places.items()}
    limit = calibration.effort(model, data).samples(WORK, 8, SAMPLES)
    for _, values in calibration.runs(model, list(places), data, limit=limit):
        for name, array in values.items():
            if not array.size:
                continue
            axis, channels = places[name]
            rows = np.moveaxis(array, axis, 0).reshape(channels, -1)
            one = seen[name]
            one.low, one.high = np.minimum(one.low, rows.min(1)), np.maximum(one.high, rows.max(1))
            one.square += np.einsum("cp,cp->c", rows, rows, dtype=np.float64)
            one.count += rows.shape[1]
    return seen


def scales(one: Class, seen: Mapping[str, Seen], coded: Callable[[gs.Tensor], bool]) -> tuple[float, Array | None]:
    """The scale of each channel with the least expected error, and that error over the present one; None where nothing is gained.

    Args:
        one: the class.
        seen: from `observe`.
        coded: whether a tensor will be rounded.
    """
    rounded = [t.name for t in one.tensors if coded(t)]
    if not rounded:
        return 1.0, None
    loud = np.max([np.maximum(-seen[n].low, seen[n].high) for n in rounded], axis=0)
    if not np.isfinite(loud).all() or loud.max() <= 0:
        return 1.0, None
    loud = np.maximum(loud / loud.max(), _FLOOR)
    matrices = [(r.node.inputs[0].name, r.matrix()) for r in one.readers]
    largest = np.maximum(np.max([np.abs(w).max(axis=(0, 2)) for _, w in matrices], axis=0), 1e-12)
    largest = largest / largest.max()
    now = _error(one, matrices, seen, rounded, np.ones(one.channels))
    best, chosen = now, None
    for candidate in _candidates(loud, np.maximum(largest, _FLOOR)):
        error = _error(one, matrices, seen, rounded, candidate)
        if error < best:
            best, chosen = error, candidate
    return best / now if now > 0 else 1.0, chosen


def balanced(one: Class) -> Array:
    """Without samples: the scale that makes what writes a channel and what reads it equally large (Nagel's data-free rule)."""
    written = np.full(one.channels, 1e-12)
    for writer in one.writers:
        w = np.abs(np.asarray(writer.node.inputs[writer.operand].values, np.float64))
        written = np.maximum(written, np.moveaxis(w, writer.axis, 0).reshape(one.channels, -1).max(axis=1))
    read = np.maximum(np.max([np.abs(r.matrix()).max(axis=(0, 2)) for r in one.readers], axis=0), 1e-12)
    scale = np.sqrt(written / read)
    dead = (written <= 1e-12) | (read <= 1e-12)
    return np.where(dead, 1.0, np.clip(scale, 1e-4, 1e4))


def _candidates(loud: Array, largest: Array) -> Iterator[Array]:
    for alpha in ALPHAS:
        for scale in (loud**alpha, loud**alpha / largest ** (1 - alpha)):
            yield scale / np.exp(np.mean(np.log(scale)))


def _error(one: Class, matrices: Any, seen: Mapping[str, Seen], rounded: list[str], scale: Array) -> float:
    noise = 0.0  # variance of a coded value in units of the scaled tensor, summed over the tensors
    for name in rounded:
        step = (np.max(seen[name].high / scale) - np.min(seen[name].low / scale)) / _STEPS
        noise += step**2 / 12 / len(rounded)
    total = 0.0
    for name, w in matrices:
        square = seen[name].square / max(1, seen[name].count)
        power = float(np.einsum("oit,i->", w**2, square)) + 1e-30
        scaled = w * scale[None, :, None]
        steps = np.abs(scaled).max(axis=(1, 2)) / 127
        if one.channels != scaled.shape[1]:
            return float("inf")
        weights = float(np.sum(steps**2) / 12 * np.sum(square / scale**2) * w.shape[2])
        total += (noise * float(np.sum(scaled**2)) + weights) / power
    return total


def apply(one: Class, scale: Array, edit: Editor) -> None:
    """Divide what writes and multiply what reads."""
    for writer in one.writers:
        constant = writer.node.inputs[writer.operand]
        shape = [1] * len(constant.shape)
        shape[writer.axis] = -1
        _store(edit, writer.node, writer.operand, np.asarray(constant.values, np.float64) / scale.reshape(shape))
    for reader in one.readers:
        constant = reader.node.inputs[1]
        w = np.asarray(constant.values, np.float64)
        if reader.groups > 1:
            own = scale.reshape(reader.groups, 1, -1).repeat(w.shape[0] // reader.groups, axis=1).reshape(w.shape[:2])
            w = w * own.reshape(*w.shape[:2], *[1] * (w.ndim - 2))
        else:
            shape = [1] * w.ndim
            shape[reader.axis] = -1
            w = w * scale.reshape(shape)
        _store(edit, reader.node, 1, w)


def _store(edit: Editor, node: Node, operand: int, values: Array) -> None:
    old: Constant = node.inputs[operand]
    node.inputs[operand] = edit.constant(old.name, values.astype(old.dtype))
