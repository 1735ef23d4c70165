"""Which channels have to go together: index atoms of (tensor, axis), joined by what each operator does with them.

Every axis of every constant gets one *atom* an index. The relations of channel_relations.py, one an operator, carry the atoms from
operands to results and join those that must be kept or removed together: the rows of a convolution's weight with its bias and
with the columns of whoever reads the result, two operands of an addition index by index, a channel and its run of columns
behind a Flatten. What follows is a partition of all atoms into *classes*; removing a class removes its indices everywhere.

* An axis that nothing tracks (a dynamic dimension, a spatial axis, what an unknown operator reads or writes, a graph output, a value
  that a body captures) *pins* the classes joined with it, and the reason is kept.
* Groups of a convolution need not lose the same positions, only equally many: a *balance* between blocks of atoms.
* Classes that occur in the same places (as the channels of one layer do) form a `Group`, which is what users see.

The law, held by tests on random graphs: zeroing the atoms where they are summed over, in the original, gives the outputs of the sliced model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import channel_relations
from graphopt.analyses.channel_costs import MULTIPLYING, CostModel, Term, macs, product
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor, captures
from graphopt.elements import stored_bytes
from graphopt.ir import Constant, Graph, Model, Node, subgraphs

Array = np.ndarray[Any, Any]
Axis = Array | None  # an atom for each index, or None: nothing tracks this axis, every index stays
Labels = tuple[Axis, ...]


@dataclass(frozen=True)
class Contraction:
    """A place where a tracked axis is summed over: what a removed channel takes part in."""

    node: Node
    operand: int
    axis: int
    atoms: Array


@dataclass(frozen=True, eq=False)  # to hash its classes would take as long as there are
class Group:
    """Classes of channels that occur in the same places, each of which may be removed by itself (within a balance)."""

    name: str  # of the tensor that carries the channels first
    classes: tuple[int, ...]
    sites: tuple[tuple[str, int, int], ...]  # weight, axis, indices of each class there
    consumers: tuple[str, ...]  # nodes that sum over the channels

    @property
    def width(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def __str__(self) -> str:
        where = ", ".join(f"{name}[axis {axis}]{f' x{count}' if count > 1 else ''}" for name, axis, count in self.sites)
        return f"{self.name}: {self.width} channels; sliced: {where}; read by: {', '.join(self.consumers) or 'nothing'}"


@dataclass
class _Weight:
    tensor: Constant
    labels: Labels
    frozen: bool = False
    custom: channel_relations.BlockSlice | None = None
    users: int = 0


class Kept:
    """A choice of classes to remove, as seen from axes."""

    def __init__(self, groups: ChannelGroups, removed: Iterable[int]) -> None:
        self._gone = np.zeros(groups.size, bool)
        self._gone[np.fromiter(removed, np.int64)] = True
        self._roots = groups.roots

    def mask(self, atoms: Array) -> Array:
        """For each index of an axis, whether it stays."""
        return ~self._gone[self._roots[atoms]]

    def indices(self, atoms: Array) -> Array:
        """The indices of an axis that stay."""
        return np.flatnonzero(self.mask(atoms))

    def count(self, atoms: Array) -> int:
        """How many indices of an axis stay."""
        return int(self.mask(atoms).sum())


Fix = Callable[[Kept, Editor], None]


class ChannelGroups:
    """The classes of a model; `groups` for users, `classes`, `contractions` and `apply` for passes."""

    def __init__(
        self,
        model: Model,
        carriers: dict[str, int] | None = None,
        relation_of: Callable[[Node], channel_relations.Relation | None] = channel_relations.relation_of,
    ) -> None:
        """Analyse `model`; `carriers` says for a Reshape, by node name, which axis of a split carries the channels."""
        self.model = model
        self.relation_of = relation_of
        self._inputs = {id(t) for graph in model.graphs() for t in graph.inputs}
        self.shapes = Shapes(model)
        self.contractions: list[Contraction] = []
        self.balances: list[tuple[Array, ...]] = []
        self.fixes: list[Fix] = []
        self.sizes: dict[int, list[Axis]] = {}  # by id of an integer tensor: the axes whose sizes its elements are
        self._seen: list[Array] = []
        self.ambiguous: dict[str, tuple[int, ...]] = {}  # Reshapes that could carry channels on another axis, too
        self.carriers = dict(carriers or {})
        self.copies: set[int] = set()  # atoms of axes along which all indices are alike
        self.folded: dict[int, Array] = {}  # by id of a Reshape: heads that the batch holds in front of it
        self.outputs = list(model.graph.outputs)
        self._parent: list[int] = []
        self._why: dict[int, str] = {}  # root -> why it is pinned
        self._labels: dict[int, Labels | None] = {}
        self._weights: dict[int, _Weight] = {}
        self._graph()

    # ------------------------------------------------------------------------------------------------ building

    @property
    def size(self) -> int:
        """The number of atoms."""
        return len(self._parent)

    def fresh(self, count: int, why: str | None = None) -> Array:
        """New atoms, pinned when there is a reason."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        atoms = np.arange(start, start + count)
        if why is not None:
            self.pin(atoms, why)
        return atoms

    def find(self, atom: int) -> int:
        """The representative of an atom's class, so far."""
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def join(self, a: Array, b: Array) -> None:
        """Index by index, the atoms of two axes go together."""
        if a is b:
            return
        for first, second in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self.find(first), self.find(second)
            if x == y:
                continue
            low, high = min(x, y), max(x, y)
            self._parent[high] = low
            if high in self._why:
                self._why.setdefault(low, self._why[high])

    def pin(self, atoms: Axis, why: str) -> None:
        """The atoms must stay."""
        if atoms is not None:
            for atom in atoms.tolist():
                self._why.setdefault(self.find(atom), why)

    def is_pinned(self, atoms: Array) -> bool:
        """Whether any of the atoms must stay, as far as is known yet."""
        return any(self.find(a) in self._why for a in atoms.tolist())

    def contract(self, node: Node, operand: int, axis: int, atoms: Axis) -> None:
        """Record that `node` sums over an axis of an operand."""
        if atoms is not None:
            self.contractions.append(Contraction(node, operand, axis, atoms))

    def seen(self, *axes: Axis) -> None:
        """Record axes that are channels in the users' sense, free or not."""
        self._seen.extend(axis for axis in axes if axis is not None)

    def is_fixed(self, tensor: gs.Tensor) -> bool:
        """As `Model.is_fixed`, without a walk over the model."""
        return isinstance(tensor, gs.Constant) and (id(tensor) not in self._inputs or self.model.ir_version < 4)

    def weight(self, tensor: gs.Constant) -> _Weight:
        """The record of a constant, with atoms on every axis of more than one index."""
        found = self._weights.get(id(tensor))
        if found is None:
            free = _is_weight(tensor) and self.is_fixed(tensor)
            labels = tuple(self.fresh(int(n)) if free and n > 1 else None for n in tensor.shape)
            found = self._weights[id(tensor)] = _Weight(tensor, labels)
        return found

    def labels(self, tensor: gs.Tensor) -> Labels | None:
        """The atoms on each axis; None for a tensor of unknown rank."""
        if isinstance(tensor, gs.Constant):
            return self.weight(tensor).labels
        if id(tensor) not in self._labels:
            rank = self.shapes.rank(tensor)
            self._labels[id(tensor)] = None if rank is None else (None,) * rank
        return self._labels[id(tensor)]

    def _graph(self) -> None:
        for node in self.model.graph.nodes:
            results = self._relate(node)
            for tensor, labels in zip(node.outputs, results, strict=False):
                if tensor.name:
                    self._labels[id(tensor)] = self._checked(tensor, labels, node)
        for tensor in self.model.graph.outputs:
            self._pin_tensor(tensor, f"it is graph output {tensor.name!r}")

    def _relate(self, node: Node) -> Sequence[Labels | None]:
        for body in subgraphs(node):
            for tensor in captures(body).values():
                self._pin_tensor(tensor, f"node {node.name!r} ({node.op}) reads it inside a body")
        relation = self.relation_of(node)
        call = channel_relations.Call(self, node)
        results: Sequence[Labels | None] | None = None
        why = "has no relation in the table"
        if (
            relation is not None
            and not subgraphs(node)
            and all(self.labels(t) is not None for t in node.inputs if t.name)
        ):
            results = relation(call)
            why = "cannot follow channels through it"
        if results is None:
            call.touched.clear()
            results = [self._untracked(t) for t in node.outputs]
        self._follow_sizes(call)
        for index, tensor in enumerate(node.inputs):
            if tensor.name and index not in call.touched:
                self._pin_tensor(
                    tensor,
                    f"node {node.name!r} ({node.op}) {why if results is None or relation is None else 'needs all of it'}",
                )
        return results

    def _follow_sizes(self, call: channel_relations.Call) -> None:
        """Sizes of channels that are read at run time: let through where they are moved or stated anew, pinned elsewhere."""
        node = call.node
        moved = channel_relations.held_sizes(call) if node.is_onnx and not subgraphs(node) else None
        if moved is not None and any(axis is not None for axis in moved):
            self.sizes[id(node.outputs[0])] = moved
        for index, tensor in enumerate(node.inputs):
            if moved is None and index not in call.restated:
                for axis in self.sizes.get(id(tensor), ()):
                    self.pin(axis, f"node {node.name!r} ({node.op}) reads its size")

    def _untracked(self, tensor: gs.Tensor) -> Labels | None:
        rank = self.shapes.rank(tensor)
        return None if rank is None else (None,) * rank

    def _checked(self, tensor: gs.Tensor, labels: Labels | None, node: Node) -> Labels | None:
        """Labels that agree with what is known of the shape; where they do not, the analysis knows too little: pin."""
        shape = self.shapes.shape(tensor)
        if labels is None or shape is None:
            if labels is not None:
                for axis in labels:
                    self.pin(axis, f"the shape of {tensor.name!r} is not known")
            return None if shape is None else (None,) * len(shape)
        checked: list[Axis] = []
        for axis, dim in zip(labels, shape, strict=True):
            fits = axis is not None and isinstance(dim, int) and dim == len(axis)
            if axis is not None and not fits:
                self.pin(axis, f"node {node.name!r} ({node.op}) makes dimension {dim} of {len(axis)} channels")
            checked.append(axis if fits else None)
        return tuple(checked)

    def _pin_tensor(self, tensor: gs.Tensor, why: str) -> None:
        if isinstance(tensor, gs.Constant):
            self.weight(tensor).frozen = True
        for axis in [*(self.labels(tensor) or ()), *self.sizes.get(id(tensor), ())]:
            self.pin(axis, why)

    # ------------------------------------------------------------------------------------------------- answers

    @cached_property
    def roots(self) -> Array:
        """The class of every atom."""
        return np.array([self.find(a) for a in range(len(self._parent))], np.int64)

    @cached_property
    def axes(self) -> tuple[Array, ...]:
        """All tracked axes, each once: none of them may become empty."""
        found: dict[bytes, Array] = {}
        tensors = [*self._labels.values(), *(w.labels for w in self._weights.values())]
        for labels in tensors:
            for axis in labels or ():
                if axis is not None:
                    found.setdefault(self.roots[axis].tobytes(), axis)
        return tuple(found.values())

    @cached_property
    def pins(self) -> dict[int, str]:
        """Class -> why it must stay."""
        return {self.find(root): why for root, why in self._why.items()}

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The classes that may be removed: they are summed over somewhere, and nothing pins them."""
        read = {int(r) for c in self.contractions for r in self.roots[c.atoms]}
        return tuple(sorted(read - self.pins.keys()))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The classes by the places where they occur, in the order of the graph."""
        free = set(self.classes)
        sites: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        weights = list(self._weights.values())
        for number, weight in enumerate(weights):
            for axis, atoms in enumerate(weight.labels):
                if atoms is not None:
                    _count(self.roots[atoms], free, (number, axis), sites)
        reads: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for number, contraction in enumerate(self.contractions):
            _count(self.roots[contraction.atoms], free, (number, 0), reads)
        alike: dict[Any, list[int]] = defaultdict(list)
        for root in self.classes:
            alike[tuple(sites[root]), tuple(reads[root])].append(root)
        found = []
        for (where, readers), members in alike.items():
            nodes = list(dict.fromkeys(self.contractions[n].node.name for n, _, _ in readers))
            places = tuple((weights[n].tensor.name, axis, count) for n, axis, count in where)
            name = places[0][0] if places else nodes[0]
            found.append(Group(name, tuple(members), places, tuple(nodes)))
        return tuple(found)

    def blocked(self) -> list[str]:
        """Why channels stay, each reason once, with the number of classes: the answer to "why is nothing pruned?"."""
        reasons: dict[str, int] = defaultdict(int)
        for root in sorted({int(r) for axis in self._seen for r in self.roots[axis]} & self.pins.keys()):
            reasons[self.pins[root]] += 1
        ordered = sorted(reasons.items(), key=lambda item: -item[1])
        inside: dict[str, int] = defaultdict(int)
        for node in self.model.graph.nodes:
            for body in subgraphs(node):
                layers = sum(n.op in MULTIPLYING for n in _all_nodes(body))
                if layers:
                    inside[f"node {node.name!r} ({node.op})"] += layers
        bodies = [f"{count} layers stay: they are in the body of {where}" for where, count in inside.items()]
        return [f"{count} channels stay: {why}" for why, count in ordered] + bodies

    def is_free(self, tensor: gs.Tensor) -> bool:
        """Whether an axis of a tensor can lose indices."""
        free = set(self.classes)
        return any(a is not None and not free.isdisjoint(self.roots[a].tolist()) for a in self.labels(tensor) or ())

    def weights(self) -> list[tuple[Constant, Labels]]:
        """All constants with tracked axes."""
        return [(w.tensor, w.labels) for w in self._weights.values() if any(a is not None for a in w.labels)]

    @cached_property
    def _blocks(self) -> dict[int, Array]:
        """Class -> how many indices it has in each block of each balance, for the classes that are in any."""
        flat = [block for blocks in self.balances for block in blocks]
        found: dict[int, Array] = {}
        for place, block in enumerate(flat):
            for root, count in zip(*np.unique(self.roots[block], return_counts=True), strict=True):
                found.setdefault(int(root), np.zeros(len(flat), np.int64))[place] = count
        return found

    def bundle(self, seed: int, available: Iterable[int], score: Callable[[int], float]) -> tuple[int, ...] | None:
        """The fewest classes (by a greedy search) that may go together with `seed` from a balanced state; the cheaper by `score` first.

        None where no balance is found.
        """
        blocks = self._blocks
        if seed not in blocks:
            return (seed,)
        edges = np.cumsum([0, *map(len, self.balances)])
        starts = edges[:-1]

        def imbalance(counts: Array) -> int:
            tops = np.maximum.reduceat(counts, starts)
            return int(np.repeat(tops, np.diff(edges)).sum() - counts.sum())

        chosen, counts = [seed], blocks[seed].copy()
        free = [c for c in available if c != seed and c in blocks and c not in self.pins]
        worst = imbalance(counts)
        limit = 4 * max(map(len, self.balances)) + 8
        while worst and len(chosen) < limit:
            short = np.repeat(np.maximum.reduceat(counts, starts), np.diff(edges)) > counts
            useful = [c for c in free if (blocks[c][short] > 0).any()]
            if not useful:
                return None
            best = min(useful, key=lambda c: (imbalance(counts + blocks[c]), score(c), c))
            chosen.append(best)
            free.remove(best)
            counts = counts + blocks[best]
            worst = imbalance(counts)
        return None if worst else tuple(chosen)

    def balanced(self, removed: Iterable[int]) -> list[list[int]]:
        """Of the classes to remove, as many (by a greedy search) as leave blocks that have to be of one size equal.

        Returns:
            Sets of classes, each of which may go without the others, in order.
        """
        gone = set(removed)
        candidates = sorted(gone & self._blocks.keys())
        if candidates:
            edges = np.cumsum([0, *map(len, self.balances)])
            sizes = np.array([len(block) for blocks in self.balances for block in blocks])
            queues: dict[bytes, list[int]] = {}  # classes that lie alike, the first in front
            for candidate in candidates:
                queues.setdefault(self._blocks[candidate].tobytes(), []).append(candidate)
            waiting = list(queues.values())
            table = np.array([self._blocks[queue[0]] for queue in waiting])
            counts = sizes - np.array(list(map(len, waiting))) @ table

            def tops(counts: Array) -> Array:
                return np.repeat(np.maximum.reduceat(counts, edges[:-1], axis=-1), np.diff(edges), axis=-1)

            left = np.ones(len(waiting), bool)
            while (short := tops(counts) > counts).any():
                useful = np.flatnonzero(left & (table[:, short] > 0).any(axis=1))
                if not len(useful):
                    gone -= set(candidates)
                    break
                tried = counts + table[useful]
                worst = (tops(tried) - tried).sum(axis=1)
                best = min(useful[worst == worst.min()], key=lambda place: waiting[place][0])
                counts = counts + table[best]
                gone.discard(waiting[best].pop(0))
                left[best] = bool(waiting[best])
        return self._independent(sorted(gone))

    def _independent(self, classes: Sequence[int]) -> list[list[int]]:
        """The classes, those together that are tied by balances."""
        balance_of = np.repeat(np.arange(len(self.balances)), [*map(len, self.balances)])
        touched = {c: np.unique(balance_of[self._blocks[c] > 0]).tolist() for c in classes if c in self._blocks}
        parent = list(range(len(self.balances)))

        def find(balance: int) -> int:
            while parent[balance] != balance:
                balance = parent[balance]
            return balance

        for first, *others in touched.values():
            for other in others:
                parent[find(other)] = find(first)
        sets: dict[tuple[str, int], list[int]] = {}
        for c in classes:
            sets.setdefault(("tied", find(touched[c][0])) if c in touched else ("free", c), []).append(c)
        return list(sets.values())

    def is_balanced(self, kept: Kept) -> bool:
        """Whether blocks that have to be of one size are, and no axis is empty."""
        equal = all(len({kept.count(block) for block in blocks}) == 1 for blocks in self.balances)
        return equal and all(kept.mask(axis).any() for axis in self.axes)

    # ------------------------------------------------------------------------------------------------- slicing

    def apply(self, removed: Iterable[int], edit: Editor, values_of: Mapping[int, Array] | None = None) -> None:
        """Slice the model: weights, attributes and shape constants; `is_balanced` must hold for what stays.

        Args:
            removed: classes.
            edit: of the model.
            values_of: by id of a constant, what to slice instead of its own values.
        """
        kept = Kept(self, removed)
        replaced: dict[int, Constant] = {}
        for key, weight in self._sliced(kept):
            values = np.asarray((values_of or {}).get(key, weight.tensor.values))
            if weight.custom is not None:
                values = weight.custom(kept, values)
            else:
                for axis, atoms in enumerate(weight.labels):
                    if atoms is not None:
                        # np.take would first write out a weight that is one number repeated
                        where: tuple[Any, ...] = (*[slice(None)] * axis, kept.indices(atoms))
                        values = values[where]
            if values.shape != tuple(weight.tensor.shape):
                replaced[key] = edit.constant(weight.tensor.name, np.ascontiguousarray(values))
        for node in self.model.graph.nodes:
            for index, tensor in enumerate(node.inputs):
                if id(tensor) in replaced:
                    node.inputs[index] = replaced[id(tensor)]
        for fix in self.fixes:
            fix(kept, edit)
        for node in self.model.graph.nodes:
            for tensor in node.outputs:
                labels = self._labels.get(id(tensor))
                if labels is not None and tensor.shape is not None and len(tensor.shape) == len(labels):
                    tensor.shape = tuple(
                        dim if atoms is None or kept.mask(atoms).all() else kept.count(atoms)
                        for dim, atoms in zip(tensor.shape, labels, strict=True)
                    )

    def _sliced(self, kept: Kept) -> list[tuple[int, _Weight]]:
        """The weights that may lose something, by id of their constants."""
        return [
            (key, weight)
            for key, weight in self._weights.items()
            if weight.custom is not None
            or (not weight.frozen and any(a is not None and not kept.mask(a).all() for a in weight.labels))
        ]

    def bytes_after(self, removed: Iterable[int]) -> dict[int, int]:
        """Bytes of each constant that `apply` would slice, afterwards, by id."""
        kept = Kept(self, removed)
        found: dict[int, int] = {}
        for key, weight in self._sliced(kept):
            dims = [
                int(n) if a is None else kept.count(a) for n, a in zip(weight.tensor.shape, weight.labels, strict=True)
            ]
            columns = weight.custom.columns[0] if weight.custom is not None else None
            if columns is not None:
                dims[1] = kept.count(columns)
            found[key] = stored_bytes(np.dtype(weight.tensor.dtype), dims)
        return found

    def cost_model(self, what: str, blocks: Sequence[Container[str]] = ()) -> CostModel:
        """What the model costs, and what it saves to remove classes: ``macs`` of one sample, ``params`` or ``bytes`` of weights."""
        return CostModel(self, self.terms(what), blocks)

    def terms(self, what: str) -> list[Term]:
        """What `cost_model` adds up."""
        return macs(self) if what == "macs" else self._weights_terms(what == "bytes")

    def axis(self, tensor: gs.Tensor, axis: int) -> Array | int:
        """The atoms of an axis, or its length; 1 where that is known at run time only."""
        atoms = (self.labels(tensor) or ())[axis]
        dim = (self.shapes.shape(tensor) or ())[axis]
        return atoms if atoms is not None else dim if isinstance(dim, int) else 1

    def _weights_terms(self, in_bytes: bool) -> list[Term]:
        found: list[Term] = []
        for tensor in self.model.constants():
            if not _is_weight(tensor):
                continue
            weight = self._weights.get(id(tensor))
            factors: list[Array | int] = [int(n) for n in tensor.shape]
            if weight is not None:
                factors = [n if a is None else a for n, a in zip(factors, weight.labels, strict=True)]
                columns = weight.custom.columns[0] if weight.custom is not None else None
                if columns is not None:
                    factors[1] = columns
            size = np.dtype(tensor.dtype).itemsize if in_bytes else 1
            found.append(product(factors, [reader.name for reader in tensor.outputs], float(size)))
        return found


def _all_nodes(graph: Graph) -> Iterator[Node]:
    """The nodes of a body, and of the bodies in it."""
    for node in graph.nodes:
        yield node
        for body in subgraphs(node):
            yield from _all_nodes(body)


def _reaches_attention(node: Node) -> bool:
    """Whether a product of two activations reads what a Reshape computes, moved and scaled."""
    seen, ahead = {id(node)}, [node]
    while ahead:
        for tensor in ahead.pop().outputs:
            for reader in tensor.outputs:
                if reader.op in ("MatMul", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention"):
                    if sum(bool(t.name) and not isinstance(t, gs.Constant) for t in reader.inputs) > 1:
                        return True
                elif reader.op in _MOVED and id(reader) not in seen:
                    seen.add(id(reader))
                    ahead.append(reader)
    return False


def _is_weight(tensor: gs.Constant) -> bool:
    """Whether a constant holds weights: floating-point numbers, or codes that are only dequantized."""
    readers = tensor.outputs
    codes = bool(readers) and all(r.op in ("DequantizeLinear", "QuantizeLinear") for r in readers)
    return np.dtype(tensor.dtype).kind in "fV" or codes


_MOVED = frozenset(
    (
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Gather",
        "Split",
        "Slice",
        "Expand",
        "Concat",
        "Identity",
        "Mul",
        "Div",
    )
    + ("Add", "Sub", "Neg")
)


def _count(roots: Array, free: set[int], site: tuple[int, int], into: dict[int, list[tuple[int, int, int]]]) -> None:
    for root, count in zip(*np.unique(roots, return_counts=True), strict=True):
        if int(root) in free:
            into[int(root)].append((*site, int(count)))


def channel_groups(model: Model, heads: bool = False) -> ChannelGroups:
    """The analysis, with the axes that Reshapes carry channels on chosen so that most classes are free.

    Args:
        model: what to analyse.
        heads: where a Reshape parts heads from their indices, let the heads carry if they can go: they then go whole.
    """
    best = ChannelGroups(model)
    alike: dict[Any, list[str]] = defaultdict(
        list
    )  # what is split alike in several places is tried in all of them at once
    nodes = {node.name: node for node in model.graph.nodes}
    for name, options in sorted(best.ambiguous.items()):
        shape = best.shapes.shape(nodes[name].outputs[0]) or ()
        alike[options, tuple(d if isinstance(d, int) else None for d in shape)].append(name)
    if heads:
        inside = {name: options[-1] for name, options in best.ambiguous.items() if _reaches_attention(nodes[name])}
        tried = [list(inside)] if inside else []  # all at once, since queries and shared keys are split differently
        tried += [mine for names in alike.values() if (mine := [name for name in names if name in inside])]
        for names in tried:
            other = ChannelGroups(model, {**best.carriers, **{name: inside[name] for name in names}})
            if all(other.is_free(nodes[name].outputs[0]) for name in names):
                best = other
                if len(names) == len(inside):
                    break
    for (options, _), names in alike.items():
        for option in options if best.carriers.keys().isdisjoint(names) else ():
            other = ChannelGroups(model, {**best.carriers, **dict.fromkeys(names, option)})
            if len(other.classes) > len(best.classes):
                best = other
                break
    return best


__all__ = [
    "Axis",
    "ChannelGroups",
    "Contraction",
    "Group",
    "Kept",
    "Labels",
    "channel_groups",
]
