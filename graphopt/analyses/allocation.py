"""How many channels each family loses: a greedy knapsack on measured damage against multiply-accumulates or parameters.

The damage of a cut is the mean squared error of the model's outputs, relative to their variance, when only that family is cut and its
readers are repaired. It is measured at a few widths of each family and interpolated along its error curve; damages of
different families are taken to add up. The greedy step takes, of all families, the cut with the least damage for what it saves, looking
several steps ahead so that a dear first step does not hide a cheap second one. What a cut saves depends on the other families'
widths (a convolution costs inputs times outputs), so it is asked anew at each step.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from graphopt.analyses.channel_groups import ChannelGroups, Kept
from graphopt.analyses.importance import Curve
from graphopt.analyses.repair import Feeds, pool
from graphopt.edit import Editor
from graphopt.evaluate import Evaluator
from graphopt.ir import Model, Node

Array = np.ndarray[Any, Any]

_AHEAD: Final = (1, 2, 4, 8, 16)


def outputs(model: Model, feeds: Feeds) -> list[dict[str, Array]]:
    """What the model computes."""
    evaluator = Evaluator(model)
    with pool() as threads:
        return list(threads.map(evaluator.run, feeds))


def distance(reference: Sequence[dict[str, Array]], found: Sequence[dict[str, Array]]) -> float:
    """Mean squared error of the floating-point outputs relative to their variance; the mean over outputs."""
    shares = []
    for name in reference[0]:
        if reference[0][name].dtype.kind != "f":
            continue
        a = np.concatenate([r[name].reshape(-1) for r in reference]).astype(np.float64)
        b = np.concatenate([f[name].reshape(-1) for f in found]).astype(np.float64)
        if a.shape != b.shape:
            return float("inf")
        spread = float(np.var(a)) or 1.0
        shares.append(float(np.mean((a - b) ** 2)) / spread)
    return float(np.mean(shares)) if shares else 0.0


def simulate(groups: ChannelGroups, curve: Curve, position: int) -> Model:
    """A model of the old shape that computes what it would without the classes gone by `position`, its readers repaired."""
    model = groups.model.clone()
    edit = Editor(model)
    nodes = {node.name: node for node in model.graph.nodes}
    kept = Kept(groups, curve.removed(position))
    parts: dict[str, list[tuple[Any, Array]]] = {}
    for site, weight in curve.weights[position]:
        if site.layer is not None:
            parts.setdefault(site.layer.node.name, []).append((site, weight))
    from graphopt.analyses.gram import layers

    own = layers(model)
    for name, changed in parts.items():
        layer = own[name]
        matrix = layer.matrix().copy()
        bias = layer.bias_values().astype(np.float64).reshape(matrix.shape[:2])
        for site, weight in changed:
            bias[site.group] += (matrix[site.group] - weight) @ site.mean
            matrix[site.group] = weight
        layer.store(edit, matrix, None if layer.fixed_bias else bias.reshape(-1))
    for contraction in groups.contractions:
        mask = kept.mask(contraction.atoms)
        if mask.all() or contraction.node.name in parts:
            continue
        node = nodes[contraction.node.name]
        rank = groups.shapes.rank(contraction.node.inputs[contraction.operand]) or 1
        shape = [1] * rank
        shape[contraction.axis] = len(mask)
        operand = node.inputs[contraction.operand]
        dtype = groups.shapes.dtype(contraction.node.inputs[contraction.operand]) or np.dtype(np.float32)
        masked = edit.variable("masked")
        values = mask.astype(dtype).reshape(shape)
        edit.insert_before(node, Node("Mul", "mask", {}, [operand, edit.constant("mask", values)], [masked]))
        node.inputs[contraction.operand] = masked
    edit.commit()
    return model


def measure(
    groups: ChannelGroups, curves: Sequence[Curve], feeds: Feeds, progress: Callable[[int, int], None] | None = None
) -> list[list[tuple[int, float]]]:
    """For each curve the damage at the positions for which it kept weights."""
    reference = outputs(groups.model, feeds)
    total = sum(len(c.weights) for c in curves)
    done = 0
    found: list[list[tuple[int, float]]] = []
    for curve in curves:
        points = []
        for position in sorted(curve.weights):
            points.append((position, distance(reference, outputs(simulate(groups, curve, position), feeds))))
            done += 1
            if progress is not None:
                progress(done, total)
        found.append(points)
    return found


def damages(curve: Curve, points: Sequence[tuple[int, float]]) -> Array:
    """The damage after each number of steps: interpolated between measured points in the logarithms of error and damage."""
    errors = np.maximum.accumulate(np.array(curve.errors, np.float64))
    if not points:
        return errors
    tiny = 1e-12
    x = np.log([errors[p] + tiny for p, _ in points])
    y = np.log([max(d, 0.0) + tiny for _, d in points])
    y = np.maximum.accumulate(y)
    at = np.log(errors + tiny)
    found = np.interp(at, x, y)
    found = np.where(at < x[0], y[0] + (at - x[0]), found)
    found = np.where(at > x[-1], y[-1] + (at - x[-1]), found)
    result = np.exp(found)
    result[0] = 0.0
    return np.maximum.accumulate(result)


def allocate(
    groups: ChannelGroups,
    curves: Sequence[Curve],
    costs: Sequence[Array],
    target: float,
    *,
    what: str = "macs",
    stops: Sequence[Sequence[int]] | None = None,
) -> tuple[list[int], float]:
    """How many steps each family takes, and the share of the cost that is left.

    Args:
        groups: the classes.
        curves: of each family.
        costs: the damage after each number of steps, for each family.
        target: the share of the cost that may be left.
        what: ``macs`` or ``params``.
        stops: after how many steps each family may stop (alignment), in ascending order; None: anywhere.
    """
    model = groups.cost_model(what)
    full = model.total()
    position = [0] * len(curves)
    goal = target * full
    ends = [list(range(1, len(c.steps) + 1)) for c in curves] if stops is None else stops
    while model.total() > goal:
        best: tuple[float, int, int] | None = None
        for index, curve in enumerate(curves):
            here = position[index]
            first = bisect.bisect_right(ends[index], here)
            for place in dict.fromkeys(min(first + a, len(ends[index])) for a in _AHEAD):
                if place == first:
                    continue
                there = ends[index][place - 1]
                saved = model.saving([c for step in curve.steps[here:there] for c in step])
                if saved <= 0:
                    continue
                useful = min(saved, model.total() - goal)
                price = (costs[index][there] - costs[index][here] + 1e-15) / useful
                if best is None or price < best[0]:
                    best = price, index, there
        if best is None:
            break
        _, index, there = best
        model.remove([c for step in curves[index].steps[position[index] : there] for c in step])
        position[index] = there
    return position, model.total() / full
