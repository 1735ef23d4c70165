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

from graphopt.analyses.channel_costs import CostModel
from graphopt.analyses.channel_groups import ChannelGroups, Kept
from graphopt.analyses.gram import layers
from graphopt.analyses.importance import Curve
from graphopt.analyses.repair import Feeds, bridges, pool
from graphopt.analyses.residual_blocks import Block, leave_out
from graphopt.edit import Editor, cleanup
from graphopt.evaluate import Evaluator
from graphopt.ir import Model, Node
from graphopt.pass_base import Evaluate

Array = np.ndarray[Any, Any]

_AHEAD: Final = (1, 2, 4, 8, 16)


def outputs(model: Model, feeds: Feeds) -> list[dict[str, Array]]:
    """What the model computes."""
    evaluator = Evaluator(model, fast=True)
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
    own = layers(model, turned=True)
    for name, changed in parts.items():
        layer = own[name]
        matrix = layer.matrix().copy()
        bias = layer.bias_values().astype(np.float64).reshape(matrix.shape[:2])
        for site, own_weight in changed:
            weight, mean = site.whole(own_weight)
            bias[site.group] += (matrix[site.group] - weight) @ mean
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


def measure_blocks(
    model: Model,
    blocks: Sequence[Block],
    groups: Sequence[Sequence[int]],
    feeds: Feeds,
    evaluate: Evaluate,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """For each chain of blocks the order in which they go, and the damage after each.

    A block's own damage is that with the layer before it fitted to what the block computed; several together do as much more than the sum
    of theirs as they do without any fit.
    """
    reference = outputs(model, feeds)
    gaps = []
    for block in blocks:
        stands: dict[str, str] = {}
        edit = Editor(copy := model.clone())
        leave_out(copy, edit, block, stands)
        gaps.append(next(iter(stands.items())))
    fitted = bridges(model, gaps, feeds, evaluate, seed)

    def without(numbers: Sequence[int], repaired: bool) -> float:
        copy = model.clone()
        edit, own = Editor(copy), layers(copy, turned=True)
        for number in numbers:
            bridge = fitted[number]
            if repaired and bridge is not None:
                layer = own[bridge[0].node.name]
                layer.store(edit, bridge[1], None if layer.fixed_bias else bridge[2].reshape(-1))
        for number in sorted(numbers):
            leave_out(copy, edit, blocks[number], {})
        edit.commit()
        cleanup(copy)
        return distance(reference, outputs(copy, feeds))

    found = []
    done = 0
    for chain in groups:
        alone, own = {}, {}
        for k in chain:
            alone[k] = without([k], False)
            own[k] = min(alone[k], without([k], True))
            done += 1
            if progress is not None:
                progress(done, len(blocks))
        order = sorted(chain, key=lambda k: (own[k], k))
        errors = []
        for count in range(1, len(order) + 1):
            some = order[:count]
            together = without(some, False) if count > 1 else alone[some[0]]
            errors.append(sum(own[k] for k in some) * max(1.0, together / (sum(alone[k] for k in some) or 1.0)))
        found.append((order, errors))
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
    model: CostModel,
    curves: Sequence[Curve],
    costs: Sequence[Array],
    target: float,
    *,
    stops: Sequence[Sequence[int]] | None = None,
) -> tuple[list[int], float]:
    """How many steps each family takes, and the share of the cost that is left.

    Args:
        model: what the classes cost; the steps that are taken are removed from it.
        curves: of each family.
        costs: the damage after each number of steps, for each family.
        target: the share of the cost that may be left.
        stops: after how many steps each family may stop (alignment), in ascending order; None: anywhere.
    """
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


def stops(line: Curve, step: int, strict: bool) -> list[int]:
    """After how many steps a family may stop: where its widths were multiples of `step`, they have to be; else what goes is.

    A class that is several channels of each weight counts as many. What the hardware wishes (not `strict`) gives way in groups that
    are too narrow for it.
    """
    group_of = {root: number for number, group in enumerate(line.family.groups) for root in group.classes}
    each = [min((count for _, _, count in group.sites), default=1) for group in line.family.groups]
    widths = [group.width * n for group, n in zip(line.family.groups, each, strict=True)]
    fine = [step if strict else min(step, 1 << (max(1, w // 2).bit_length() - 1)) for w in widths]
    lost = [0] * len(widths)
    found = []
    for position, roots in enumerate(line.steps, 1):
        for root in roots:
            if root in group_of:
                lost[group_of[root]] += each[group_of[root]]
        if all((n if w % f == 0 else w - n) % f == 0 for n, w, f in zip(lost, widths, fine, strict=True) if n):
            found.append(position)
    return found
