"""Accuracy back without labels: every layer behind a cut is fitted to what the original computed there.

Both models run side by side, node by node in the order of the graph, all samples at once. Where a layer reads something that
the cut has changed, its weight and bias are solved anew by ridge least squares from the inputs that it now gets to the outputs
that the original had (of the channels that are left). Where its result is added to something that is already there, as in a residual
block, the target is the original's sum minus that, so each block mends the error of the stream and not only its own. A fifth
of the samples is held out: a fit that does not win on them is not taken.

Memory is that of the activations alive at one node plus the moments of one layer: what a node is the last to read goes feed by feed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.gram import MAX_COLUMNS, RIDGES, WIDE, Layer, Moments, layers, ridge
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor, captures
from graphopt.ir import Model, Node, Variable, subgraphs
from graphopt.pass_base import Evaluate

Array = np.ndarray[Any, Any]
Feeds = Sequence[Mapping[str, Array]]
Values = list[Any]  # one array a feed
Value = Callable[[int], Array]  # of a feed
Places = Mapping[str, Sequence[Array | None]]  # tensor -> for each axis, the indices of the original that are left

ROWS: Final = 1 << 13  # positions of a layer that go into its moments at least
ROWS_PER_COLUMN: Final = 40
ROW_WORK: Final = 1 << 36  # multiply-accumulates that more than `ROWS` may take to become moments
KEPT_ROWS: Final = 1 << 26  # elements of rows that are kept to look at behind a gate
GATE_TURNS: Final = 4
WIDE_GATE_TURNS: Final = 2
HELD_OUT: Final = 5  # every fifth sample is not fitted to


class Runner:
    """One model run node by node on all feeds; values are dropped once nobody reads them any more."""

    def __init__(self, model: Model, feeds: Feeds, evaluate: Evaluate, held: Iterable[str] = ()) -> None:
        """Start at the inputs; the values of tensors in `held` stay until they are released as often as they are named there."""
        self.model = model
        self.evaluate = evaluate
        self.values: dict[str, Values] = {}
        self.count = len(feeds)
        self._left: dict[str, int] = {}
        for node in model.graph.nodes:
            for tensor in _operands(node):
                self._left[tensor.name] = self._left.get(tensor.name, 0) + 1
        for tensor in model.graph.outputs:
            self._left[tensor.name] = self._left.get(tensor.name, 0) + 1
        for name in held:
            self._left[name] = self._left.get(name, 0) + 1
        for spec in model.inputs:
            self.values[spec.name] = [feed[spec.name] for feed in feeds]
        self._ahead = iter(model.graph.nodes)

    def get(self, tensor: gs.Tensor) -> Values:
        """The values of a tensor, one a feed."""
        if isinstance(tensor, gs.Constant):
            return [tensor.values] * self.count
        return self.values[tensor.name]

    def run(self, node: Node, pool: ThreadPoolExecutor) -> list[Values]:
        """Compute a node on all feeds; the results, by output."""
        operands = [None if not t.name else self.get(t) for t in node.inputs]
        operands += [self.get(t) for body in subgraphs(node) for t in captures(body).values()]

        def one(index: int) -> list[Array]:
            return self.evaluate(self.model, node, [None if o is None else o[index] for o in operands])

        return [list(results) for results in zip(*pool.map(one, range(self.count)), strict=True)]

    def step(self, node: Node, pool: ThreadPoolExecutor) -> None:
        """Compute a node and take its results in; what it is the last to read goes feed by feed, so that both are never there whole."""
        names = [t.name for t in _operands(node)]
        last = [n for n in dict.fromkeys(names) if self._left[n] == names.count(n) and n in self.values]
        operands: list[Values | None] = [None if not t.name else self.get(t) for t in node.inputs]
        operands += [self.get(t) for body in subgraphs(node) for t in captures(body).values()]

        def one(index: int) -> list[Array]:
            results = self.evaluate(self.model, node, [None if o is None else o[index] for o in operands])
            for name in last:
                self.values[name][index] = None
            return results

        self.keep(node, [list(results) for results in zip(*pool.map(one, range(self.count)), strict=True)])

    def keep(self, node: Node, results: Sequence[Values]) -> None:
        """Take the results of a node in, and drop what it was the last to read."""
        named = [t for t in node.outputs if t.name]
        for tensor, values in zip(named, results, strict=True):
            if self._left.get(tensor.name):
                self.values[tensor.name] = list(values)
        for tensor in _operands(node):
            self.release(tensor.name)

    def release(self, name: str) -> None:
        """One reader of a tensor less."""
        self._left[name] -= 1
        if not self._left[name]:
            self.values.pop(name, None)

    def ensure(self, name: str, pool: ThreadPoolExecutor) -> Values:
        """Run on in the order of the graph until a tensor, which must be held, is there."""
        while name not in self.values:
            self.step(next(self._ahead), pool)
        return self.values[name]


def live_bytes(model: Model, feed: Mapping[str, Array]) -> int:
    """The most bytes of activations that are alive at once for a feed, while `Runner` steps through the model."""
    model = model.clone()
    for tensor in model.graph.inputs:
        if isinstance(tensor, Variable) and tensor.name in feed:
            tensor.shape = feed[tensor.name].shape
    for node in model.graph.nodes:  # what is declared of them followed from the shapes before
        for output in node.outputs:
            output.shape = None
    shapes = Shapes(model)
    last: dict[str, int] = {}
    for number, node in enumerate(model.graph.nodes):
        last.update((tensor.name, number) for tensor in _operands(node))
    sizes: dict[str, int] = {}
    most = 0
    for number, node in enumerate(model.graph.nodes):
        for tensor in node.outputs:
            dims = [d if isinstance(d, int) else 1 for d in shapes.shape(tensor) or ()]
            dtype = shapes.dtype(tensor)
            sizes[tensor.name] = math.prod(dims) * (dtype.itemsize if dtype is not None else 4)
        sizes = {name: size for name, size in sizes.items() if last.get(name, -1) > number}
        most = max(most, sum(sizes.values()))
    return most


def _operands(node: Node) -> list[gs.Tensor]:
    found = [t for t in node.inputs if t.name and not isinstance(t, gs.Constant)]
    for body in subgraphs(node):
        found.extend(t for t in captures(body).values() if not isinstance(t, gs.Constant))
    return found


def pool() -> ThreadPoolExecutor:
    """Threads that share the feeds of one node; each feed is computed on one thread, so the results do not depend on their number."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1)


def picks(layer: Layer, results: Values, seed: int) -> list[Array]:
    """For each feed the positions of the layer's result that are looked at: all, or a random share."""
    sizes = [layer.positions(r) for r in results]
    total = sum(sizes)
    rng = np.random.default_rng(seed)
    columns = layer.matrix().shape[-1]
    most = max(ROWS, min(ROWS_PER_COLUMN * columns, ROW_WORK // columns**2))
    return [
        np.arange(n) if total <= most else np.sort(rng.choice(n, max(1, n * most // total), replace=False))
        for n in sizes
    ]


@dataclass(frozen=True)
class Fit:
    """What became of one layer, by the mean squared distance from its target on samples that were held out, relative to its variance."""

    node: str
    before: float
    after: float
    kind: str  # "sliced", "bias" or "ridge STRENGTH"


def repair(
    original: Model,
    pruned: Model,
    places: Places,
    feeds: Feeds,
    evaluate: Evaluate,
    *,
    stands: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Fit]:
    """Fit the layers of `pruned` to `original`, in place; nodes and tensors are the same by name, as far as they are left.

    Args:
        original: what to be like.
        pruned: the model whose weights are changed.
        places: for tensors whose axes were cut, the indices that are left.
        feeds: samples, several calls of the model.
        evaluate: computes one node.
        stands: tensor of `pruned` -> the later tensor of `original` in whose place it is, where a block between them is gone.
        seed: of the positions looked at.
        progress: nodes done, nodes in all.
    """
    edit = Editor(pruned)
    found = {name: layer for name, layer in layers(pruned, turned=True).items() if _fittable(layer)}
    joins, by_name = _joins(pruned, found), {node.name: node for node in original.graph.nodes}
    lasts = {name: joins.get(name) or _last(pruned, layer) for name, layer in found.items()}
    aims = {name: (stands or {}).get(node.outputs[0].name, node.outputs[0].name) for name, node in lasts.items()}
    alone = {name: _last(pruned, layer).outputs[0].name for name, layer in found.items()}
    twins = [by_name[b.name] for b in pruned.graph.nodes if b.name in by_name]
    held = [*aims.values(), *alone.values(), *(t.name for a in twins for t in a.outputs if t.name)]
    first, second = Runner(original, feeds, evaluate, held), Runner(pruned, feeds, evaluate)
    clean = set(first.values)  # tensors of the pruned model that are as in the original
    second.values.update((name, list(values)) for name, values in first.values.items())
    returned = {tensor.name for tensor in original.graph.outputs}
    fits: list[Fit] = []
    with pool() as threads:
        for number, b in enumerate(pruned.graph.nodes):
            a, layer = by_name.get(b.name), found.get(b.name)
            moved = b.name in found and lasts[b.name].outputs[0].name in (stands or {})
            touched = a is None or moved or not _same(a, b, clean)
            if touched and layer is not None:
                last, aim, added = lasts[b.name], aims[b.name], _added(joins.get(b.name), second)
                values, own = first.ensure(aim, threads), first.ensure(alone[b.name], threads)
                shape = _take(own[0], places.get(alone[b.name], ())).shape
                cut = places.get(last.outputs[0].name, ())
                if b.name in joins and (added is None or not shape == added[0].shape == _take(values[0], cut).shape):
                    last, aim, values, added = _last(pruned, layer), alone[b.name], own, None
                    cut = places.get(aim, ())
                target, offsets = _target(values, added, cut)
                seen = last.outputs[0]
                gated = bool(seen.outputs) and all(r.op == "Relu" for r in seen.outputs) and seen.name not in returned
                takes = picks(layer, values, seed + number)
                fits.append(_fit(layer, edit, second.get(b.inputs[0]), takes, target, offsets, gated))
            if layer is not None:
                first.ensure(aims[b.name], threads)
                first.ensure(alone[b.name], threads)
                first.release(aims[b.name])
                first.release(alone[b.name])
            names = [t.name for t in b.outputs if t.name]
            if touched:
                second.step(b, threads)
            else:
                second.keep(b, [first.ensure(name, threads) for name in names])
                clean.update(names)
            for tensor in a.outputs if a is not None else ():
                if tensor.name:
                    first.ensure(tensor.name, threads)
                    first.release(tensor.name)
            if progress is not None:
                progress(number + 1, len(pruned.graph.nodes))
    edit.commit()
    return fits


def _same(a: Node, b: Node, clean: set[str]) -> bool:
    """Whether a node computes the same in both models: same operands, untouched so far, and same attributes."""
    if (a.attrs != b.attrs and not subgraphs(a)) or len(a.inputs) != len(b.inputs):
        return False
    for x, y in zip(a.inputs, b.inputs, strict=True):
        if isinstance(x, gs.Constant) or isinstance(y, gs.Constant):
            if not (isinstance(x, gs.Constant) and isinstance(y, gs.Constant) and x._values is y._values):
                return False
        elif x.name != y.name or (x.name and x.name not in clean):
            return False
    return all(t.name in clean for t in _operands(b))


def _last(model: Model, layer: Layer) -> Node:
    """The node whose result is the layer's, bias included."""
    node: Node = layer.adder or layer.node
    return node


def _fittable(layer: Layer) -> bool:
    return bool(layer.matrix().shape[-1] <= MAX_COLUMNS)


def _joins(model: Model, found: Mapping[str, Layer]) -> dict[str, Node]:
    """For layers whose result is only added to another computed tensor: that Add, by the layer's name."""
    edit = Editor(model)
    joins = {}
    for name, layer in found.items():
        reader = edit.sole_consumer(_last(model, layer).outputs[0])
        if reader is not None and reader.op == "Add" and not any(isinstance(t, gs.Constant) for t in reader.inputs):
            joins[name] = reader
    return joins


def _added(join: Node | None, second: Runner) -> Values | None:
    """What is added at a join, if it has been computed already."""
    for tensor in () if join is None else join.inputs:
        if tensor.name in second.values:
            return second.values[tensor.name]
    return None


def _target(values: Values, added: Values | None, cut: Sequence[Array | None]) -> tuple[Value, Value | None]:
    """What the layer's result should be for a feed: the original's, less what will be added to it; and that."""
    if added is None:
        return (lambda feed: _take(values[feed], cut)), None
    return (lambda feed: np.asarray(_take(values[feed], cut) - added[feed])), lambda feed: np.asarray(added[feed])


def _take(array: Array, cut: Sequence[Array | None]) -> Array:
    for axis, indices in enumerate(cut):
        if indices is not None and len(indices) != array.shape[axis]:
            array = np.take(array, indices, axis)
    return array


class _Rows:
    """Positions of a layer, fitted or held out: moments, and where they fit into memory the rows themselves."""

    def __init__(self, layer: Layer, shape: tuple[int, int, int], gated: bool) -> None:
        groups, outputs, columns = shape
        self.layer = layer
        self.gated = gated
        self.moments = Moments(groups, columns, outputs)
        self.x: list[Array] = []
        self.z: list[Array] = []
        self.offset: list[Array] = []

    def add(self, x: Array, z: Array, offset: Array | None, take: Array) -> None:
        if not len(take):
            return
        columns = np.asarray(self.layer.columns(x, z, take), np.float32)
        target = np.asarray(self.layer.outputs(z, take), np.float32)
        self.moments.add(columns, target)
        if self.gated:
            self.x.append(columns)
            self.z.append(target)
            zero = np.zeros((1, 1, 1), np.float32)
            self.offset.append(zero if offset is None else np.asarray(self.layer.outputs(offset, take), np.float32))

    def error(self, w: Array, b: Array) -> float:
        """Mean squared error of the layer, behind the gate if there is one."""
        if not self.gated:
            return self.moments.error(w, b)
        total = 0.0
        for x, z, offset in zip(self.x, self.z, self.offset, strict=True):
            found = x @ w.astype(np.float32).transpose(0, 2, 1) + b[:, None, :].astype(np.float32)
            gap = np.maximum(z + offset, 0) - np.maximum(found + offset, 0)
            total += float(np.square(gap, dtype=np.float64).sum())
        return total / max(1, self.moments.count)

    def bent(self, w: Array, b: Array) -> Moments:
        """Moments with a target that asks nothing where both the original and the layer are cut off by the gate."""
        moved = Moments(0, 0, 0)
        old = self.moments
        moved.count, moved.x, moved.xx = old.count, old.x, old.xx
        moved.z, moved.zx, moved.zz = np.zeros_like(old.z), np.zeros_like(old.zx), np.zeros_like(old.zz)
        for x, z, offset in zip(self.x, self.z, self.offset, strict=True):
            found = x @ w.astype(np.float32).transpose(0, 2, 1) + b[:, None, :].astype(np.float32)
            target = np.where(z + offset > 0, z, np.minimum(found, -offset))
            moved.z += target.sum(1, dtype=np.float64)
            moved.zx += target.transpose(0, 2, 1) @ x
        return moved


def _fit(
    layer: Layer,
    edit: Editor,
    inputs: Values,
    takes: Sequence[Array],
    target: Value,
    offsets: Value | None,
    gated: bool,
) -> Fit:
    fit, matrix, vector = _solved(layer, inputs, takes, target, offsets, gated)
    if fit.kind != "sliced":
        layer.store(edit, matrix, None if layer.fixed_bias else vector.reshape(-1))
    return fit


def _solved(
    layer: Layer, inputs: Values, takes: Sequence[Array], target: Value, offsets: Value | None, gated: bool
) -> tuple[Fit, Array, Array]:
    """The weights, as [groups, outputs, columns] and [groups, outputs], that fit a target best."""
    w = layer.matrix().astype(np.float64)
    groups, outputs, columns = w.shape
    gated = gated and sum(map(len, takes)) * columns * groups <= KEPT_ROWS
    fitted, held = (_Rows(layer, w.shape, gated) for _ in range(2))
    for index, (x, take) in enumerate(zip(inputs, takes, strict=True)):
        z, offset = target(index), None if offsets is None else offsets(index)
        sample = take * len(x) // layer.positions(z) + index
        out = (sample % HELD_OUT) == 0 if len(inputs) > 1 or len(x) > 1 else np.zeros(len(take), bool)
        fitted.add(x, z, offset, take[~out])
        held.add(x, z, offset, take[out])
    judge = held if held.moments.count else fitted
    bias = layer.bias_values().astype(np.float64).reshape(groups, outputs)
    scale = judge.moments.variance() or 1.0
    before = judge.error(w, bias)
    best = before, w, bias, "sliced"
    free = not layer.fixed_bias

    def propose(matrix: Array, vector: Array, kind: str) -> None:
        nonlocal best
        vector = vector if free else bias
        with np.errstate(over="ignore", invalid="ignore"):  # a solution of next to nothing may be beyond all bounds
            error = judge.error(matrix, vector)
        if np.isfinite(error) and error < best[0]:
            best = error, matrix, vector, kind

    mean = (fitted.moments.z - np.einsum("god,gd->go", w, fitted.moments.x)) / max(1, fitted.moments.count)
    propose(w, mean, "bias")
    for strengths in _strengths(columns):
        for strength in strengths:
            propose(*ridge(fitted.moments, w, strength, free), f"ridge {strength:g}")
            if columns > WIDE and best[3] != f"ridge {strength:g}":
                break
    if gated and best[3].startswith("ridge"):
        strength = float(best[3].split()[1])
        for turn in range(GATE_TURNS if columns <= WIDE else WIDE_GATE_TURNS):
            _, matrix, vector, _ = best
            propose(*ridge(fitted.bent(matrix, vector), w, strength, free), f"ridge {strength:g} gated {turn + 1}")
            if best[1] is matrix:
                break
    error, matrix, vector, kind = best
    if kind.startswith("ridge"):  # the verdict is in: learn from those held out, too
        both = [rows.bent(matrix, vector) if "gated" in kind else rows.moments for rows in (fitted, held)]
        matrix, vector = ridge(both[0] + both[1], w, float(kind.split()[1]), free)
    return Fit(layer.node.name, max(0.0, before / scale), max(0.0, error / scale), kind), matrix, vector


def _strengths(columns: int) -> list[Sequence[float]]:
    """Ridges to try: each of these from its beginning on, in a wide layer until one is no better than what there was."""
    if columns <= WIDE:
        return [RIDGES]
    middle = len(RIDGES) // 2
    return [RIDGES[middle:], RIDGES[:middle][::-1]]


def bridges(
    model: Model, gaps: Sequence[tuple[str, str]], feeds: Feeds, evaluate: Evaluate, seed: int = 0
) -> list[tuple[Layer, Array, Array] | None]:
    """For each pair of tensors the layer that ends in the first, and its weights fitted so that it computes the second.

    None where no layer ends there, or its weights as they are fit best.
    """
    found = {name: layer for name, layer in layers(model, turned=True).items() if _fittable(layer)}
    joins = _joins(model, found)
    ends = {(joins.get(name) or _last(model, layer)).outputs[0].name: name for name, layer in found.items()}
    needed: list[tuple[Layer, str, str | None] | None] = []
    for start, aim in gaps:
        layer = found.get(ends.get(start, ""))
        if layer is None:
            needed.append(None)
            continue
        own, join = _last(model, layer).outputs[0], joins.get(layer.node.name)
        added = None if join is None else next(t.name for t in join.inputs if t is not own)
        needed.append((layer, aim, added))
    held = [n for entry in needed if entry for n in (entry[0].node.inputs[0].name, entry[1], entry[2]) if n]
    runner = Runner(model, feeds, evaluate, held)
    by_name = {t.name: t for node in model.graph.nodes for t in node.outputs}
    result: list[tuple[Layer, Array, Array] | None] = []
    with pool() as threads:
        for number, entry in enumerate(needed):
            if entry is None:
                result.append(None)
                continue
            layer, aim, extra = entry
            values, x = runner.ensure(aim, threads), runner.ensure(layer.node.inputs[0].name, threads)
            target, offsets = _target(values, runner.ensure(extra, threads) if extra else None, ())
            gated = bool(by_name[aim].outputs) and all(r.op == "Relu" for r in by_name[aim].outputs)
            fit, matrix, vector = _solved(layer, x, picks(layer, values, seed + number), target, offsets, gated)
            result.append(None if fit.kind == "sliced" else (layer, matrix, vector))
            for name in (layer.node.inputs[0].name, aim, extra):
                if name:
                    runner.release(name)
    return result
