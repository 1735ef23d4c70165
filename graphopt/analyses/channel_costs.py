"""What a model costs by the lengths of its axes, and what it saves to remove channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from graphopt.analyses.channel_groups import ChannelGroups

Array = np.ndarray[Any, Any]

_RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN"})
# Operators of which `macs` counts products.
MULTIPLYING: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}) | _RECURRENT


@dataclass(frozen=True)
class Term:
    """A part of the cost: a price by the lengths of axes, and the nodes without any of which it is not due."""

    price: Callable[[Sequence[int]], float]
    axes: tuple[Array, ...]
    nodes: tuple[str, ...]


def product(factors: Sequence[Array | int], nodes: Sequence[str], scale: float = 1.0) -> Term:
    """A number times the lengths of axes."""
    axes = tuple(f for f in factors if not isinstance(f, int))
    factor = scale * math.prod(f for f in factors if isinstance(f, int))
    return Term(lambda lengths: factor * math.prod(lengths), axes, tuple(nodes))


class CostModel:
    """A sum of products of axis lengths, kept up to date while classes go."""

    def __init__(self, groups: ChannelGroups, terms: Sequence[Term], blocks: Sequence[Container[str]] = ()) -> None:
        """Add up `terms`; block k, a set of nodes that may go as a whole, is class -1 - k."""
        self.lengths: list[int] = []
        self._numbers: dict[bytes, int] = {}
        self._where: dict[int, list[tuple[int, int]]] = {}  # class -> (axis, indices on it)
        self._terms: list[tuple[Callable[[Sequence[int]], float], list[int], list[int]]] = []
        self._of_axis: dict[int, list[int]] = {}
        for k in range(len(blocks)):  # a block is an axis of length one: 0 when it is gone
            self._where[-1 - k] = [(len(self.lengths), 1)]
            self.lengths.append(1)
        for term in terms:
            numbers = [self._number(groups.roots[a]) for a in term.axes]
            within = [k for k, block in enumerate(blocks) if term.nodes and all(n in block for n in term.nodes)]
            for number in {*numbers, *within}:
                self._of_axis.setdefault(number, []).append(len(self._terms))
            self._terms.append((term.price, numbers, within))

    def _number(self, roots: Array) -> int:
        key = roots.tobytes()
        if key not in self._numbers:
            number = self._numbers[key] = len(self.lengths)
            self.lengths.append(len(roots))
            for root, count in zip(*np.unique(roots, return_counts=True), strict=True):
                self._where.setdefault(int(root), []).append((number, int(count)))
        return self._numbers[key]

    def _value(self, term: int, lengths: Sequence[int]) -> float:
        price, axes, blocks = self._terms[term]
        if not all(lengths[k] for k in blocks):
            return 0.0
        return price([lengths[a] for a in axes])

    def total(self) -> float:
        """The cost now."""
        return sum(self._value(i, self.lengths) for i in range(len(self._terms)))

    def touched(self, classes: Iterable[int]) -> float:
        """The cost of all that has to do with classes."""
        axes = {axis for root in classes for axis, _ in self._where.get(root, ())}
        return sum(self._value(i, self.lengths) for i in sorted({i for a in axes for i in self._of_axis[a]}))

    def saving(self, classes: Iterable[int]) -> float:
        """What the cost would fall by."""
        lengths = list(self.lengths)
        touched: dict[int, None] = {}
        for root in classes:
            for axis, count in self._where.get(root, ()):
                lengths[axis] -= count
                touched.update(dict.fromkeys(self._of_axis[axis]))
        return sum(self._value(i, self.lengths) - self._value(i, lengths) for i in touched)

    def remove(self, classes: Iterable[int]) -> None:
        """Let classes go."""
        for root in classes:
            for axis, count in self._where.get(root, ()):
                self.lengths[axis] -= count


def macs(groups: ChannelGroups) -> list[Term]:
    """Multiply-accumulates of one sample, a term a node."""
    found: list[Term] = []
    for node in groups.model.graph.nodes:
        if node.op == "Attention" and node.domain == "com.microsoft":
            rows = [groups.axis(node.inputs[0], i) for i in range(groups.shapes.rank(node.inputs[0]) or 0)]
            found.append(product([*rows, groups.axis(node.inputs[1], -1)], [node.name]))
        if node.op not in MULTIPLYING or not node.is_onnx:
            continue
        data, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
        ranks = [groups.shapes.rank(t) for t in (data, weight)]
        if any(r is None or r < 2 for r in ranks):
            continue
        if node.op in _RECURRENT:
            steps = [groups.axis(data, 0), groups.axis(data, 1)]
            for tensor in node.inputs[1:3]:
                found.append(product([*steps, *(groups.axis(tensor, i) for i in range(3))], [node.name]))
            continue
        factors = [groups.axis(result, i) for i in range(groups.shapes.rank(result) or 0)]
        scale = 1.0
        if node.op == "Conv":
            taps = [groups.axis(weight, i) for i in range(2, ranks[1] or 0)]
            group, ins = int(node.attrs.get("group", 1)), groups.axis(data, 1)
            width = ins if isinstance(ins, int) else len(ins)
            depthwise = group == width > 1
            factors += [*taps, *([] if depthwise else [ins])]
            scale = 1.0 if depthwise else 1 / group
        elif node.op == "ConvTranspose":
            factors = [*(groups.axis(data, i) for i in range(ranks[0] or 0))]
            factors += [groups.axis(weight, i) for i in range(1, ranks[1] or 0)]
        else:
            factors.append(groups.axis(data, 0 if node.op == "Gemm" and node.attrs.get("transA", 0) else -1))
        found.append(product(factors, [node.name], scale))
    return found
