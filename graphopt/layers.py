"""Where do two models part? Every tensor of one beside its counterpart in the other, some at a time, so that memory stays bounded.

Counterparts are found, in this order, by *name*; by *origin*, where a node says which nodes of the reference it stands for (passes write
that, and ``graphopt opt --origins`` keeps it in the file); by *value*, where one sample gives tensors of the same shape that agree; by *node*,
where nodes have one name; and by *place*, where between two such pairs tensors of the same shape are left on both sides.

Rewrites may move a factor over several nodes, so that tensors in between differ and yet nothing is wrong. The divergence that counts is
the first from which differing tensors lead up to a differing output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import equivalence
from graphopt.errors import NotEquivalent, UnsupportedModel
from graphopt.evaluate import Arrays, Evaluator
from graphopt.graph_diff import node_text
from graphopt.ir import Model, Node, dtype_name, subgraphs

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

BUDGET: Final = 128 << 20  # bytes of tensors that one run of a model may give
ORIGIN: Final = "graphopt.origin"  # key of a node's metadata: names of nodes of the original, joined by line breaks
_FIRST: Final = 8  # tensors of the first run, before their sizes are known
_PROBES: Final = 64  # values by which tensors are told apart
_ALIKE: Final = 1e-3  # relative difference of tensors that are taken for counterparts by value


@dataclass(frozen=True)
class Layer:
    """One tensor of the reference and its counterpart: the worst of all samples."""

    name: str
    node: str  # that computes it, in the reference
    op: str
    counterpart: str  # its name in the candidate
    matched: str  # name, origin, value, node or place
    max_abs: float
    relative: float
    sqnr: float  # dB; inf where they are equal
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""

        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "tensor": self.name,
            "node": self.node,
            "op": self.op,
            "counterpart": self.counterpart,
            "matched": self.matched,
            "max_abs": finite(self.max_abs),
            "relative": finite(self.relative),
            "sqnr_db": finite(self.sqnr),
            "note": self.note,
        }


@dataclass(frozen=True)
class LayerReport:
    """Two models side by side, in the topological order of the reference."""

    layers: tuple[Layer, ...]
    tolerance: float
    samples: int
    first: Layer | None  # the first divergence that reaches an output; None: all outputs agree
    around: tuple[str, ...]  # what computes it in both models, as text
    alone: tuple[str, ...]  # tensors of the reference without a counterpart
    alone_there: tuple[str, ...]  # tensors of the candidate without one
    bodies: int  # nodes in bodies of control flow, which cannot be looked into

    @property
    def equal(self) -> bool:
        """Whether the outputs agree."""
        return self.first is None

    def diverges(self, layer: Layer) -> bool:
        """Whether it leaves the tolerance."""
        return layer.relative > self.tolerance


def compare_layers(
    reference: Model,
    candidate: Model,
    *,
    feeds: Sequence[Feeds],
    tolerance: float = 1e-4,
    budget: int = BUDGET,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerReport:
    """Compare every tensor of the root graphs.

    Args:
        reference: sets the scale and the order.
        candidate: has the same inputs and outputs.
        feeds: samples; the first also finds counterparts by value.
        tolerance: relative to the largest magnitude in the reference's tensor.
        budget: bytes of tensors taken from one run; each model runs as often as that needs.
        progress: called with tensors done and in all.

    Raises:
        NotEquivalent: inputs or outputs have other names, or the candidate cannot be run where the reference can.
        UnsupportedModel: the reference cannot be run.
    """
    for kind, a, b in (
        ("inputs", reference.inputs, candidate.inputs),
        ("outputs", reference.outputs, candidate.outputs),
    ):
        if {s.name for s in a} != {s.name for s in b}:
            raise NotEquivalent(f"{kind} differ: {[s.name for s in a]} and {[s.name for s in b]}")
    here, there = Tapped(equivalence.seeded(reference), budget), Tapped(equivalence.seeded(candidate), budget)
    pairs = _pairs(here, there, feeds[0])
    order = [n for n in here.tensors if n in pairs]
    worst: dict[str, Layer] = {}
    outputs = {s.name for s in reference.outputs}
    foreign: set[str] = set()  # numbers here, codes there: their names are alike, they are not
    done = 0
    for names in here.chunks(order):
        for sample in feeds:
            expected = here.run(names, sample)
            try:
                found = there.run([pairs[n][0] for n in names], sample)
            except UnsupportedModel as error:
                raise NotEquivalent(f"the reference runs on this sample, the other does not: {error}") from None
            for name in names:
                layer = _layer(name, here.tensors[name], *pairs[name], expected[name], found[pairs[name][0]])
                if layer is None and name in outputs:
                    layer = _typed(name, here.tensors[name], expected[name], found[name])
                if layer is None:
                    foreign.add(name)
                elif name not in worst or layer.relative > worst[name].relative:
                    worst[name] = layer
        done += len(names)
        progress(done, len(order))
    order = [n for n in order if n not in foreign]
    pairs = {n: pairs[n] for n in order}
    layers = tuple(worst[n] for n in order)
    first = _first(reference, {n for n in order if worst[n].relative > tolerance}, set(order), order)
    taken = {other for other, _ in pairs.values()}
    return LayerReport(
        layers,
        tolerance,
        len(feeds),
        None if first is None else worst[first],
        () if first is None else _around(here, there, worst[first]),
        tuple(n for n in here.tensors if n not in pairs),
        tuple(n for n in there.tensors if n not in taken),
        sum(len(body.nodes) for node in reference.graph.nodes for body in subgraphs(node)),
    )


class Tapped:
    """A model whose tensors can be asked for.

    Attributes:
        tensors: name of each tensor that the root graph computes -> the node that does, in topological order.
    """

    def __init__(self, model: Model, budget: int = BUDGET) -> None:
        """`budget` is in bytes, see `chunks`."""
        self.model, self.budget = model, budget
        self.tensors: dict[str, Node] = {
            t.name: node
            for node in model.graph.nodes
            for t in node.outputs
            if t.name and getattr(t, "type", "tensor_type") in ("tensor_type", None) and node.op != "Constant"
        }
        self._types = {t.name: np.dtype(t.dtype) for t in model.graph.inputs if t.dtype is not None}
        self._evaluator: tuple[tuple[str, ...], Evaluator] | None = None
        self._bytes, self._count = 0, 0  # seen so far

    def run(self, names: Sequence[str], feeds: Feeds) -> Arrays:
        """The named tensors on one sample."""
        wanted = tuple(dict.fromkeys(names))
        if self._evaluator is None or self._evaluator[0] != wanted:
            copy = self.model.clone()
            known = {t.name: t for node in copy.graph.nodes for t in node.outputs if t.name}
            copy.graph.outputs = [known[n] for n in wanted]
            self._evaluator = None  # the old one goes before the new one comes
            self._evaluator = wanted, Evaluator(copy)
        found = self._evaluator[1].run({n: self._typed(n, a) for n, a in feeds.items()})
        self._bytes += sum(getattr(v, "nbytes", 0) for v in found.values())
        self._count += len(found)
        return found

    def _typed(self, name: str, array: Array) -> Array:
        """A sample for another width of floats, where this model takes one."""
        wanted = self._types.get(name)
        if wanted is None or array.dtype == wanted or _family(array.dtype) != "float" or _family(wanted) != "float":
            return array
        return array.astype(wanted)

    def chunks(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """Consecutive groups that keep the budget, as far as declared shapes and the sizes seen so far tell."""
        at = 0
        while at < len(names):
            usual = self._bytes / self._count if self._count else self.budget / _FIRST
            room, end = float(self.budget), at
            while end < len(names) and (end == at or room > 0):
                room -= max(self._size(names[end]) or usual, 1.0)
                end += 1
            if room < 0 and end - at > 1:
                end -= 1
            yield names[at:end]
            at = end

    def _size(self, name: str) -> float | None:
        tensor = next(t for t in self.tensors[name].outputs if t.name == name)
        if tensor.shape is None or tensor.dtype is None or not all(isinstance(d, int) for d in tensor.shape):
            return None
        return float(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize)

    def sketches(self, names: Sequence[str], feeds: Feeds) -> dict[str, _Sketch]:
        """What tells the named tensors apart, from one sample."""
        found: dict[str, _Sketch] = {}
        for some in self.chunks(names):
            found.update((n, s) for n, v in self.run(some, feeds).items() if (s := _sketch(v)) is not None)
        return found


@dataclass(frozen=True)
class _Sketch:
    kind: tuple[str, tuple[int, ...]]  # family of the dtype, and shape
    scale: float
    values: Array


def _sketch(value: Any) -> _Sketch | None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiubV" or not value.size:
        return None
    flat = value.reshape(-1)
    places = np.linspace(0, flat.size - 1, min(_PROBES, flat.size)).astype(np.int64)
    with np.errstate(all="ignore"):
        wide = flat.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        scale = float(np.abs(finite).max()) if finite.size else 0.0
        moments = [wide.mean(), wide.std(), wide.min(), wide.max()]
    return _Sketch((_family(value.dtype), value.shape), scale, np.concatenate([wide[places], moments]))


def _pairs(here: Tapped, there: Tapped, sample: Feeds) -> dict[str, tuple[str, str]]:
    """Tensor of the reference -> its counterpart, and how it was found."""
    pairs = {name: (name, "name") for name in here.tensors if name in there.tensors}
    taken = set(pairs)
    rest = [n for n in here.tensors if n not in pairs]
    others = [n for n in there.tensors if n not in taken]
    if not rest or not others:
        return pairs
    left, right = here.sketches(rest, sample), there.sketches(others, sample)

    def alike(name: str, other: str) -> bool:
        return name in left and other in right and left[name].kind == right[other].kind

    _by_node(here, there, pairs, taken, "origin", alike)
    pools: dict[Any, list[str]] = {}
    for name in (n for n in left if n not in pairs):
        pools.setdefault(left[name].kind, []).append(name)
    tables = {key: np.stack([left[n].values for n in names]) for key, names in pools.items()}
    for other, sketch in right.items():
        if other in taken or sketch.kind not in pools:
            continue
        table = tables[sketch.kind]
        gaps = np.abs(table - sketch.values)
        gap = np.where(np.isnan(gaps), np.inf, gaps).max(axis=1)
        best = int(np.argmin(gap))
        name = pools[sketch.kind][best]
        if gap[best] <= _ALIKE * max(left[name].scale, 1e-30):
            pairs[name] = (other, "value")
            taken.add(other)
            table[best] = np.inf  # taken
    _by_node(here, there, pairs, taken, "node", alike)
    _by_place(here, there, pairs, taken, alike)
    return pairs


def _by_node(
    here: Tapped,
    there: Tapped,
    pairs: dict[str, tuple[str, str]],
    taken: set[str],
    how: str,
    alike: Callable[[str, str], bool],
) -> None:
    """Pair results of a node with those of the last node that it stands for: by its origin, or else by its name."""
    place = {id(node): index for index, node in enumerate(here.model.graph.nodes)}
    nodes = {node.name: node for node in here.model.graph.nodes if node.name}
    found: dict[str, str] = {}  # the last one counts where several stand for one
    for name, node in there.tensors.items():
        told = origins(node)
        if name in taken or len(node.outputs) != 1 or (told in ((), (node.name,))) != (how == "node"):
            continue
        known = [nodes[o] for o in told or (node.name,) if o in nodes]
        if not known:
            continue
        last = max(known, key=lambda n: place[id(n)])
        if len(last.outputs) == 1 and alike(last.outputs[0].name, name):
            found[last.outputs[0].name] = name
    for name, other in found.items():
        if name not in pairs:
            pairs[name] = (other, how)
            taken.add(other)


def _by_place(
    here: Tapped,
    there: Tapped,
    pairs: dict[str, tuple[str, str]],
    taken: set[str],
    alike: Callable[[str, str], bool],
) -> None:
    """Pair what is left between two pairs, the last ones first: what a fusion leaves stands for the end of what it replaced."""
    names = list(there.tensors)
    at = {name: index for index, name in enumerate(names)}
    gap: list[str] = []
    low = -1
    for name in [*here.tensors, None]:
        if name is not None and name not in pairs:
            gap.append(name)
            continue
        high = len(at) if name is None else at[pairs[name][0]]
        between = [n for n in names[low + 1 : high] if n not in taken] if gap and high > low else []
        for mine in reversed(gap):
            for index in range(len(between) - 1, -1, -1):
                other = between[index]
                if alike(mine, other):
                    pairs[mine] = (other, "place")
                    taken.add(other)
                    del between[index:]
                    break
        gap = []
        low = max(low, high)


def origins(node: Node) -> tuple[str, ...]:
    """Names of the nodes of the original that `node` stands for: as passes left them, or as the file says."""
    for entry in node.carried.metadata_props if node.carried is not None else ():
        if entry.key == ORIGIN:
            return tuple(entry.value.split("\n"))
    return tuple(getattr(node, "origin", ()))


def write_origins(model: Model) -> None:
    """Write into the metadata of each node what it stands for, so that `compare_layers` finds it in the file."""
    import onnx

    for node in model.nodes():
        if not node.origin or node.origin == (node.name,):
            continue
        carried = onnx.NodeProto()
        if node.carried is not None:
            carried.CopyFrom(node.carried)
        kept = [p for p in carried.metadata_props if p.key != ORIGIN]
        del carried.metadata_props[:]
        carried.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=ORIGIN, value="\n".join(node.origin))])
        node.carried = carried


def _layer(name: str, node: Node, counterpart: str, matched: str, expected: Any, found: Any) -> Layer | None:
    """None where one holds numbers and the other their codes."""
    note = ""
    if isinstance(expected, np.ndarray) and isinstance(found, np.ndarray) and expected.dtype != found.dtype:
        if _family(expected.dtype) != _family(found.dtype):
            return None
        note = f"{dtype_name(expected.dtype)} in A, {dtype_name(found.dtype)} in B"
        expected, found = expected.astype(np.float64), found.astype(np.float64)
    gap = equivalence.difference(name, expected, found)
    note = "; ".join(filter(None, (note, gap.note)))
    return Layer(
        name, node.name, node.op, counterpart, matched, gap.max_abs, gap.relative, _sqnr(expected, found), note
    )


def _typed(name: str, node: Node, expected: Any, found: Any) -> Layer:
    """An output that is of another type."""
    gap = equivalence.difference(name, expected, found)
    return Layer(name, node.name, node.op, name, "name", gap.max_abs, gap.relative, math.nan, gap.note)


def _family(dtype: np.dtype[Any]) -> str:
    """Floats of any width are of one family; every other type is one of its own."""
    return "float" if "float" in dtype_name(dtype) else dtype_name(dtype)


def _sqnr(expected: Any, found: Any) -> float:
    """Signal to noise in dB; nan where the two cannot be subtracted."""
    if not (isinstance(expected, np.ndarray) and isinstance(found, np.ndarray)) or expected.shape != found.shape:
        return math.nan
    if expected.dtype.kind not in "fiu" or found.dtype.kind not in "fiu":
        return math.nan
    with np.errstate(all="ignore"):
        noise = float(np.sum(np.square(np.subtract(expected, found, dtype=np.float64))))
        signal = float(np.sum(np.square(expected, dtype=np.float64)))
    if not math.isfinite(noise) or not math.isfinite(signal):
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def _first(model: Model, diverging: set[str], known: set[str], order: Sequence[str]) -> str | None:
    """The first of `diverging` from which tensors that do not agree lead to an output that does not."""
    pending: list[gs.Tensor] = [t for t in model.graph.outputs if t.name in diverging]
    reached: set[str] = set()
    while pending:
        tensor = pending.pop()
        if tensor.name in reached or (tensor.name in known and tensor.name not in diverging):
            continue
        reached.add(tensor.name)
        for node in tensor.inputs:
            pending.extend(t for t in node.inputs if t.name and t.inputs)
    return next((n for n in order if n in reached and n in diverging), None)


def _around(here: Tapped, there: Tapped, layer: Layer) -> tuple[str, ...]:
    return (
        f"reference: {node_text(here.tensors[layer.name])}",
        f"candidate: {node_text(there.tensors[layer.counterpart])}",
    )
