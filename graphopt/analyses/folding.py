"""Folding channels: one that goes is represented by the most similar one that stays, and whoever read it reads that instead.

Similar are channels whose filters (the slices of the weights that compute them, biases included) point the same way: ``f_r = s f_k``, s >= 0.
A positively homogeneous activation then gives ``a_r = s a_k``, and ``W_k <- W_k + s W_r`` loses nothing. With s by least squares that
is k-means on the filters' directions whose centres are the channels that stay. The repair afterwards starts from the merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.analyses.channel_groups import ChannelGroups
from graphopt.analyses.gram import layers
from graphopt.analyses.importance import owners
from graphopt.edit import Editor
from graphopt.ir import Model

Array = np.ndarray[Any, Any]


def filters(groups: ChannelGroups, classes: Sequence[int]) -> dict[int, Array]:
    """Class -> what computes its channels, flat: rows of weights, and biases."""
    found: dict[int, list[Array]] = {root: [] for root in classes}
    for tensor, labels in groups.weights():
        if labels[0] is None or (len(labels) == 2 and labels[-1] is not None):
            axis = len(labels) - 1 if len(labels) == 2 else None
        else:
            axis = 0
        if axis is None or labels[axis] is None:
            continue
        roots = groups.roots[labels[axis]]
        values = np.moveaxis(np.asarray(tensor.values, np.float64), axis, 0).reshape(len(roots), -1)
        for root in set(roots.tolist()) & found.keys():
            found[root].append(values[roots == root].reshape(-1))
    return {root: np.concatenate(parts) for root, parts in found.items() if parts}


def substitutes(groups: ChannelGroups, gone: set[int]) -> dict[int, tuple[int, float]]:
    """Class that goes -> the one of its group that takes its place, and the factor."""
    found = {}
    for group in groups.groups:
        stays = [c for c in group.classes if c not in gone]
        leaves = [c for c in group.classes if c in gone]
        if not stays or not leaves:
            continue
        rows = filters(groups, group.classes)
        for root in leaves:
            others = [k for k in stays if root in rows and k in rows and rows[k].shape == rows[root].shape]
            if not others:
                continue
            table = np.array([rows[k] for k in others])
            norms = np.square(table).sum(1) + 1e-30
            factors = np.maximum(table @ rows[root] / norms, 0)
            gaps = np.square(rows[root] - factors[:, None] * table).sum(1)
            best = int(gaps.argmin())
            if factors[best] > 0:
                found[root] = others[best], float(factors[best])
    return found


def fold(model: Model, groups: ChannelGroups, gone: set[int]) -> int:
    """Let the readers of classes that go read their substitutes; the number of layers changed."""
    chosen: Mapping[int, tuple[int, float]] = substitutes(groups, gone)
    edit, own, changed = Editor(model), layers(model, turned=True), 0
    for contraction in groups.contractions:
        layer = own.get(contraction.node.name)
        if layer is None:
            continue
        matrix, touched = layer.matrix().astype(np.float64), False
        for owner, block in zip(owners(groups, contraction, layer), matrix, strict=True):
            for root, (kept, factor) in chosen.items():
                old, new = np.flatnonzero(owner == root), np.flatnonzero(owner == kept)
                if len(old) and len(old) == len(new):
                    block[:, new] += factor * block[:, old]
                    touched = True
        if touched:
            layer.store(edit, matrix, None)
            changed += 1
    edit.commit()
    return changed
