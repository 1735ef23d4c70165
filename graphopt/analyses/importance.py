"""What it costs in accuracy to do without channels: the error that is left after the best repair of whoever reads them.

A reader with weight W and second moments H of its operand loses, when the columns c of a class go and the others are re-fitted,

    tr(W_c [(H^-1)_cc]^-1 W_c^T),   W <- W - W_c [(H^-1)_cc]^-1 (H^-1)_c,   H^-1 <- H^-1 - (H^-1)_c [(H^-1)_cc]^-1 (H^-1)_c^T

(optimal brain surgeon, for blocks). Errors are relative to the variance of the reader's result and add up over readers. Two
activations that are multiplied (attention) read each other: W is then the square root of the other one's second moments. Without
samples H is the identity, and the error is the squared norm of the columns. Where a kernel has very many columns its taps are taken
apart: each is a reader of its own, and all have the mean of their second moments.

An order in which to remove classes is a *selector*, one function from a `Chooser` to a score for each class that is left; the errors of
what it chose are the same for all of them, so selectors can be compared.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.channel_groups import ChannelGroups, Contraction, Group
from graphopt.analyses.gram import MAX_COLUMNS, WIDE, Layer, Moments, layers, rounding
from graphopt.analyses.repair import Feeds, Runner, picks, pool
from graphopt.errors import UserError
from graphopt.pass_base import Evaluate

Array = np.ndarray[Any, Any]

_DAMP: Final = 1e-3  # of the mean diagonal of H, so that its inverse exists
_FINE: Final = 64  # families up to this width are weighed anew after each class, wider ones this often


@dataclass
class Site:
    """A reader, or one group of a grouped convolution: what it multiplies the classes with."""

    contraction: Contraction
    layer: Layer | None  # None: an activation, or a weight that cannot be changed
    group: int
    owner: Array  # the class of each column
    weight: Array  # [outputs, columns]; of `taps` that are taken apart [outputs * taps, columns of one]
    gram: Array  # [columns, columns], or only its diagonal where that is too large
    mean: Array  # of the columns
    scale: float  # mean square of the result
    taps: int = 1

    def whole(self, weight: Array) -> tuple[Array, Array]:
        """A weight of this shape, and the mean of the columns, as the layer has them, its taps together."""
        return weight.reshape(len(weight) // self.taps, -1), np.tile(self.mean, self.taps)

    def columns(self) -> dict[int, Array]:
        """Class -> its columns."""
        order = np.argsort(self.owner, kind="stable")
        roots, starts = np.unique(self.owner[order], return_index=True)
        return {int(r): c for r, c in zip(roots, np.split(order, starts[1:]), strict=True)}


@dataclass(frozen=True)
class Family:
    """Groups whose channels have to be removed in balance with each other; mostly a single group."""

    groups: tuple[Group, ...]
    classes: tuple[int, ...]

    @property
    def name(self) -> str:
        """For reports."""
        return self.groups[0].name + (f" and {len(self.groups) - 1} more" if len(self.groups) > 1 else "")


@dataclass
class Curve:
    """How a family shrinks: what goes at each step, and the error so far, before and after steps."""

    family: Family
    steps: list[tuple[int, ...]]
    errors: list[float]  # one more than steps
    weights: dict[int, list[tuple[Site, Array]]] = field(default_factory=dict)  # at some positions: repaired weights

    def removed(self, position: int) -> list[int]:
        """The classes gone after so many steps."""
        return [c for step in self.steps[:position] for c in step]


def families(groups: ChannelGroups) -> list[Family]:
    """The groups, joined where a balance joins them."""
    parent = list(range(len(groups.groups)))
    group_of = {c: i for i, g in enumerate(groups.groups) for c in g.classes}

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for blocks in groups.balances:
        members = {group_of[int(r)] for block in blocks for r in groups.roots[block] if int(r) in group_of}
        for other in sorted(members)[1:]:
            parent[find(other)] = find(min(members))
    found: dict[int, list[Group]] = {}
    for index, group in enumerate(groups.groups):
        found.setdefault(find(index), []).append(group)
    return [Family(tuple(gs_), tuple(c for g in gs_ for c in g.classes)) for gs_ in found.values()]


# ------------------------------------------------------------------------------------------------------------ sites


def sites(groups: ChannelGroups, feeds: Feeds, evaluate: Evaluate, seed: int = 0) -> list[Site]:
    """All readers of removable classes; with `feeds`, after a run of the model on them."""
    free = set(groups.classes)
    found = layers(groups.model, turned=True)
    wanted = [c for c in groups.contractions if free.intersection(groups.roots[c.atoms].tolist())]
    by_node: dict[str, list[Contraction]] = {}
    for contraction in wanted:
        by_node.setdefault(contraction.node.name, []).append(contraction)
    result: list[Site] = []
    if not feeds:
        for contraction in wanted:
            result.extend(_blind(groups, contraction, found.get(contraction.node.name)))
        return result
    runner = Runner(groups.model, feeds, evaluate)
    with pool() as threads:
        for number, node in enumerate(groups.model.graph.nodes):
            for contraction in by_node.get(node.name, ()):
                layer = found.get(node.name)
                if layer is not None:
                    result.extend(_layer_sites(groups, contraction, layer, runner, seed + number))
                else:
                    result.extend(_other_site(groups, contraction, runner))
            runner.step(node, threads)
    return result


def owners(groups: ChannelGroups, contraction: Contraction, layer: Layer) -> Array:
    """[groups, columns]: the class of each."""
    roots = groups.roots[contraction.atoms]
    if layer.is_convolution:
        taps = int(np.prod(layer.weight.shape[2:], dtype=np.int64))
        return np.stack([np.tile(part, taps) for part in np.split(roots, layer.groups)])
    return roots[None]


def _blind(groups: ChannelGroups, contraction: Contraction, layer: Layer | None) -> list[Site]:
    if layer is None:
        return []
    owner = owners(groups, contraction, layer)
    made = []
    for g, w in enumerate(layer.matrix()):
        columns = w.shape[1]
        scale = float(np.square(w).sum()) or 1.0
        made.append(Site(contraction, layer, g, owner[g], w, np.ones(columns, np.float32), np.zeros(columns), scale))
    return made


def _layer_sites(
    groups: ChannelGroups, contraction: Contraction, layer: Layer, runner: Runner, seed: int
) -> list[Site]:
    w, owner = layer.matrix(), owners(groups, contraction, layer)
    taps = 1
    if layer.is_convolution and w.shape[2] > WIDE:
        taps = int(np.prod(layer.weight.shape[2:], dtype=np.int64))
        w, owner = w.reshape(w.shape[0], w.shape[1] * taps, -1), owner[:, : owner.shape[1] // taps]
    wide = w.shape[2] > MAX_COLUMNS
    x = runner.get(layer.node.inputs[0])
    result = [layer.result_like(values) for values in x]
    moments = Moments(layer.groups, 1 if wide else w.shape[2], 0)
    squares, sums, count = np.zeros((w.shape[0], w.shape[2])), np.zeros((w.shape[0], w.shape[2])), 0
    for values, out, take in zip(x, result, picks(layer, result, seed), strict=True):
        columns = np.asarray(layer.columns(values, out, take), np.float32).reshape(layer.groups, -1, w.shape[2])
        if wide:
            squares += np.square(columns, dtype=np.float64).sum(1)
            sums += columns.sum(1, dtype=np.float64)
            count += columns.shape[1]
        else:
            moments.add(columns, np.zeros((layer.groups, columns.shape[1], 0), np.float32))
    made = []
    if wide:
        mean, gram = sums / count, squares / count
        if not layer.fixed_bias:
            gram = gram - mean**2
    else:
        _, _, gram, _, _ = moments.centred(not layer.fixed_bias)
        mean = moments.x / moments.count
    for g in range(layer.groups):
        h = np.asarray(gram[g], np.float32)
        energy = float(np.einsum("od,d,od->", w[g], h, w[g]) if wide else np.einsum("od,od->", w[g] @ h, w[g]))
        made.append(Site(contraction, layer, g, owner[g], w[g], h, mean[g], energy or 1.0, taps))
    total = sum(site.scale for site in made)
    for site in made:
        site.scale = total
    return made


def _other_site(groups: ChannelGroups, contraction: Contraction, runner: Runner) -> list[Site]:
    """Two activations, a shared weight, a transposed convolution."""
    node = contraction.node
    if node.op not in ("MatMul", "Gemm", "ConvTranspose", "Conv"):
        return []
    left, right = runner.get(node.inputs[0]), runner.get(node.inputs[1])
    size = len(contraction.atoms)
    h = np.zeros((size, size))
    count = 0
    for x in left:
        rows = np.moveaxis(x, contraction.axis, -1).reshape(-1, size)
        h += rows.T @ rows
        count += len(rows)
    other = np.zeros((size, size))
    inner = {"MatMul": -2, "Gemm": 1 if node.attrs.get("transB", 0) else 0, "ConvTranspose": 0, "Conv": 1}[node.op]
    if node.op == "Conv" and int(node.attrs.get("group", 1)) != 1:
        return []
    for w in right if not isinstance(node.inputs[1], gs.Constant) else right[:1]:
        rows = np.moveaxis(w, inner, -1).reshape(-1, size)
        other += rows.T @ rows / (len(right) if not isinstance(node.inputs[1], gs.Constant) else 1)
    values, vectors = np.linalg.eigh(other)
    root = (vectors * np.sqrt(np.maximum(values, 0))).T
    h /= max(1, count)
    scale = float(np.einsum("od,od->", root @ h, root)) or 1.0
    owner = groups.roots[contraction.atoms]
    return [Site(contraction, None, 0, owner, root.astype(np.float32), h.astype(np.float32), np.zeros(size), scale)]


# -------------------------------------------------------------------------------------------------------- selectors


class Chooser:
    """The readers of one family while its classes go."""

    def __init__(
        self,
        groups: ChannelGroups,
        family: Family,
        readers: Sequence[Site],
        seed: int,
        gradients: Callable[[], Mapping[int, float]] | None = None,
    ) -> None:
        """Start with all classes; `gradients` gives their mean squared gradients where someone asks."""
        self.groups = groups
        self.gradients = gradients
        self.family = family
        self.left = list(family.classes)
        self.rng = np.random.default_rng(seed)
        self.readers = [_Reader(site, set(family.classes)) for site in readers]
        self._rows: dict[int, list[Array]] | None = None

    def errors(self) -> dict[int, float]:
        """Class -> the relative error that its removal adds now."""
        total = dict.fromkeys(self.left, 0.0)
        for reader in self.readers:
            for root, error in reader.errors().items():
                if root in total:
                    total[root] += error
        return total

    def remove(self, roots: Sequence[int]) -> float:
        """Take classes out; the relative error that they added."""
        gone = set(roots)
        self.left = [c for c in self.left if c not in gone]
        return sum(reader.remove(roots) for reader in self.readers)

    def rows(self) -> Mapping[int, list[Array]]:
        """Class -> the slices of the weights that compute it."""
        if self._rows is None:
            self._rows = {root: [] for root in self.family.classes}
            for tensor, labels in self.groups.weights():
                if (
                    labels
                    and labels[0] is not None
                    and len(labels) > 1
                    and labels[-1 if len(labels) == 2 else 0] is not None
                ):
                    axis = 0
                    roots = self.groups.roots[labels[axis]]
                    values = np.asarray(tensor.values, np.float32)
                    for root in set(roots.tolist()) & self._rows.keys():
                        self._rows[root].append(np.take(values, np.flatnonzero(roots == root), axis).reshape(-1))
        return self._rows


class _Reader:
    """One site during the elimination of a family."""

    def __init__(self, site: Site, classes: set[int]) -> None:
        self.site = site
        self.columns = {root: c for root, c in site.columns().items() if root in classes}
        self.weight = site.weight.astype(np.float32)
        self.live = np.arange(self.weight.shape[1])  # columns that are left, in the order of `inverse`
        self.inverse: Array | None = None
        self.diagonal = site.gram if site.gram.ndim == 1 else None
        if self.diagonal is None:
            size = len(site.gram)
            damped = site.gram.astype(np.float64)
            damped += np.eye(size) * (_DAMP * np.trace(damped) / max(1, size) + rounding(site.mean) + 1e-12)
            self.inverse = np.linalg.inv(damped)

    def errors(self) -> dict[int, float]:
        found: dict[int, float] = {}
        by_size: dict[int, list[int]] = {}
        for root, columns in self.columns.items():
            by_size.setdefault(len(columns), []).append(root)
        for roots in by_size.values():
            at = np.array([self.columns[r] for r in roots])
            w = self.weight[:, at]  # [outputs, classes, columns]
            inside = np.searchsorted(self.live, at)
            if self.inverse is None:
                assert self.diagonal is not None
                errors = np.einsum("ocj,cj,ocj->c", w, self.diagonal[at], w)
            elif at.shape[1] == 1:
                errors = np.square(w[:, :, 0]).sum(0) / np.maximum(self.inverse[inside[:, 0], inside[:, 0]], 1e-30)
            else:
                blocks = self.inverse[inside[:, :, None], inside[:, None, :]]
                solved = np.linalg.solve(blocks, w.transpose(1, 2, 0))
                errors = np.einsum("ocj,cjo->c", w, solved)
            found.update(zip(roots, (np.maximum(errors, 0) / self.site.scale).tolist(), strict=True))
        return found

    def remove(self, roots: Sequence[int]) -> float:
        taken = [self.columns.pop(root) for root in roots if root in self.columns]
        if not taken:
            return 0.0
        columns = np.concatenate(taken)
        w = self.weight[:, columns]
        if self.inverse is None:
            assert self.diagonal is not None
            error = float(np.einsum("oj,j,oj->", w, self.diagonal[columns], w))
        else:
            inside = np.searchsorted(self.live, columns)
            stays = np.ones(len(self.live), bool)
            stays[inside] = False
            lines = self.inverse[inside]
            block = lines[:, inside]
            lines = lines[:, stays]
            gain = np.linalg.solve(block, lines)
            error = float(np.einsum("oj,oj->", w, np.linalg.solve(block, w.T).T))
            self.live = self.live[stays]
            self.weight[:, self.live] -= w @ gain.astype(np.float32)
            self.inverse = self.inverse[stays][:, stays]
            self.inverse -= lines.T @ gain
        self.weight[:, columns] = 0
        return max(0.0, error) / self.site.scale


Selector = Callable[[Chooser], Mapping[int, float]]


def obs(chooser: Chooser) -> Mapping[int, float]:
    """The error after the best repair; needs to be asked anew after each removal."""
    return chooser.errors()


def activation(chooser: Chooser) -> Mapping[int, float]:
    """Mean square of the activation times squared norm of the weights that read it: the error without any repair."""
    scores = dict.fromkeys(chooser.left, 0.0)
    for reader in chooser.readers:
        gram = reader.site.gram
        energy = (gram if gram.ndim == 1 else np.diag(gram)) * np.square(reader.site.weight).sum(0) / reader.site.scale
        for root, columns in reader.columns.items():
            scores[root] = scores.get(root, 0.0) + float(energy[columns].sum())
    return {root: scores[root] for root in chooser.left}


def _norm(power: int) -> Selector:
    def score(chooser: Chooser) -> Mapping[int, float]:
        rows = chooser.rows()
        scores = {root: float(sum((np.abs(r) ** power).sum() for r in rows[root])) for root in chooser.left}
        for reader in chooser.readers:
            weight = (np.abs(reader.site.weight) ** power).sum(0)
            for root, columns in reader.columns.items():
                scores[root] += float(weight[columns].sum())
        return scores

    return score


def geometric_median(chooser: Chooser) -> Mapping[int, float]:
    """The sum of distances to the other channels' filters: who lies in the middle of the others can be replaced by them."""
    rows = {root: np.concatenate(r) if r else np.zeros(1, np.float32) for root, r in chooser.rows().items()}
    scores = {}
    for root in chooser.left:
        mine = rows[root]
        scores[root] = float(sum(np.linalg.norm(mine - o) for r in chooser.left if (o := rows[r]).shape == mine.shape))
    return scores


def fisher(chooser: Chooser) -> Mapping[int, float]:
    """The mean squared gradient of the outputs' likelihood by a factor on the channels (analyses/gradients)."""
    if chooser.gradients is None:
        raise UserError("importance=fisher needs samples: --data calib.npz; norms of weights (l2) need none")
    found = chooser.gradients()
    return {root: found[root] for root in chooser.left}


def fold(chooser: Chooser) -> Mapping[int, float]:
    """What is left of the filter when the most similar other one, scaled, is taken off: who has a twin goes first (analyses/folding)."""
    rows = {root: np.concatenate(r) if r else np.zeros(1, np.float32) for root, r in chooser.rows().items()}
    scores = {}
    for root in chooser.left:
        mine = rows[root].astype(np.float64)
        others = [rows[o] for o in chooser.left if o != root and rows[o].shape == mine.shape]
        if not others:
            scores[root] = float(np.square(mine).sum())
            continue
        table = np.array(others, np.float64)
        along = np.maximum(table @ mine, 0) ** 2 / (np.square(table).sum(1) + 1e-30)
        scores[root] = float(np.square(mine).sum() - along.max(initial=0.0))
    return scores


def random(chooser: Chooser) -> Mapping[int, float]:
    """By lot, from the seed."""
    return dict(zip(chooser.left, chooser.rng.random(len(chooser.left)).tolist(), strict=True))


SELECTORS: Final[dict[str, Selector]] = {
    "obs": obs,
    "activation": activation,
    "l1": _norm(1),
    "l2": _norm(2),
    "median": geometric_median,
    "fisher": fisher,
    "fold": fold,
    "random": random,
}


def selector(name: str) -> Selector:
    """One of `SELECTORS`, or a function of one's own as ``module:function``.

    Raises:
        UserError: there is no such function.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's
        told = str(error) if isinstance(error, ImportError | AttributeError | ValueError) else f"it raised {error!r}"
        raise UserError(f"importance={name}: {told}; write module:function, importable from here") from None
    if not callable(found):
        raise UserError(f"importance={name}: {attribute} is no function; name one from a Chooser to scores")
    return functools.partial(_scores_of, name, found)


def _scores_of(name: str, function: Callable[[Chooser], Any], chooser: Chooser) -> dict[int, float]:
    """What a function of the user's says of the classes that are left, checked."""
    try:
        given = function(chooser)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"importance={name}: it raised {type(error).__name__}: {error}; mend it") from error
    try:
        scores = {c: float(given[c]) for c in chooser.left}
    except (TypeError, ValueError, LookupError):
        raise UserError(
            f"importance={name}: it gave {type(given).__name__} without a number for each class; "
            "return a mapping of each of chooser.left to its score"
        ) from None
    lost = next((c for c, score in scores.items() if math.isnan(score)), None)
    if lost is not None:
        raise UserError(f"importance={name}: the score of class {lost} is NaN; return numbers, the least goes first")
    return scores


def curve(
    groups: ChannelGroups,
    family: Family,
    readers: Sequence[Site],
    order: Selector,
    *,
    seed: int = 0,
    most: Mapping[Group, int],
    samples: Sequence[float] = (),
    gradients: Callable[[], Mapping[int, float]] | None = None,
) -> Curve:
    """Remove a family's classes one after the other, the least important first, until `most` of each group are gone.

    At the shares `samples` of all steps the repaired weights are kept for measuring.
    """
    chooser = Chooser(groups, family, readers, seed, gradients)
    group_of = {c: g for g in family.groups for c in g.classes}
    gone = dict.fromkeys(family.groups, 0)
    found = Curve(family, [], [0.0])
    limit = sum(most.values())
    marks = sorted({max(1, round(limit * share)) for share in samples})
    total, refused = 0, set[int]()
    while True:
        scores = order(chooser)
        ranked = sorted(chooser.left, key=lambda c: (scores[c], c))
        batch: list[tuple[int, ...]] = []
        out = set(refused)
        for _ in range(max(1, len(chooser.left) // _FINE)):
            open_ = {g for g in family.groups if gone[g] < most[g]}
            free = [c for c in ranked if c not in out and group_of[c] in open_]
            bundle = _next(groups, free, scores, gone, most, group_of, refused)
            if bundle is None:
                break
            for c in bundle:
                gone[group_of[c]] += 1
            batch.append(bundle)
            out = refused.union(*batch)
        if not batch:
            return found
        error = chooser.remove([c for bundle in batch for c in bundle]) / len(batch)
        for bundle in batch:
            total += len(bundle)
            found.steps.append(bundle)
            found.errors.append(found.errors[-1] + error)
        if marks and total >= marks[0]:
            marks = [mark for mark in marks if mark > total]
            found.weights[len(found.steps)] = [(r.site, r.weight.copy()) for r in chooser.readers]


def _next(
    groups: ChannelGroups,
    free: Sequence[int],
    scores: Mapping[int, float],
    gone: Mapping[Group, int],
    most: Mapping[Group, int],
    group_of: Mapping[int, Group],
    refused: set[int],
) -> tuple[int, ...] | None:
    """The first of the classes that may go, with those that balance it; those that cannot are added to `refused`."""
    for seed in free:
        bundle = groups.bundle(seed, free, scores.__getitem__)
        lost: dict[Group, int] = {}
        for c in bundle or ():
            lost[group_of[c]] = lost.get(group_of[c], 0) + 1
        if bundle is not None and all(gone[g] + n <= most[g] for g, n in lost.items()):
            return bundle
        refused.add(seed)
    return None
