"""Structured pruning: whole channels go, everywhere at once, and what reads them is fitted to the original again.

1. Channel groups (analyses/channel_groups): which indices of which weights have to go together; residual blocks, which can go whole.
2. Error curves (analyses/importance): for each family of groups, in which order channels go and what error that leaves.
3. Allocation (analyses/allocation): how many channels each family loses, by damage measured at the model's outputs, against
   multiply-accumulates, parameters, or the time that layers take on this machine (analyses/latency).
4. Slicing: weights, group counts, shape constants.
5. Repair (analyses/repair): ridge least squares of every layer behind a cut, without labels.

Steps 2 to 5 need samples; without any, squared norms of weights decide and nothing is repaired.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np

from graphopt import equivalence
from graphopt.analyses import allocation, calibration, gradients, latency
from graphopt.analyses import prune_report as report
from graphopt.analyses.channel_costs import CostModel
from graphopt.analyses.channel_groups import ChannelGroups, Group, Kept, channel_groups
from graphopt.analyses.cut import Cut
from graphopt.analyses.folding import fold
from graphopt.analyses.importance import SELECTORS, Curve, Family, curve, families, selector, sites
from graphopt.analyses.repair import Feeds, Fit, live_bytes
from graphopt.analyses.repair import repair as fit_to
from graphopt.analyses.residual_blocks import Block, chains, residual_blocks
from graphopt.edit import cleanup
from graphopt.errors import UsageError, UserError
from graphopt.ir import Constant, Model, Node
from graphopt.pass_base import Context, Exactness, Pass
from graphopt.target import Target

Array = np.ndarray[Any, Any]

_ATTEMPTS: Final = 5  # at the latency that was asked for
_MEASURED: Final = (0.25, 0.5, 0.75)  # of the channels that a family may lose: where damage is measured
_ENOUGH: Final = 8  # samples to measure on: where time is too short for these, damage is measured at one width
_MEASURING: Final = 1e12  # multiply-accumulates that measuring may take
_ALIGNMENT: Final = Target("ort", "cpu").channel_alignment  # without a target
_OVERSHOOT: Final = 0.04  # of the cost: more is not removed only for the sake of widths that the hardware likes
_MEMORY: Final = 1 << 31  # bytes of activations
_BATCH: Final = 32
_AT_ONCE: Final = 1 << 24  # bytes of activations that are alive for the samples of one call
_GRADIENTS: Final = 128  # samples
_JUDGED: Final = 6  # of what measuring may take, one part in so many is for the errors that are reported
_RECORD: Final = "graphopt.prune-channels"  # metadata: what the model cost before it was first pruned


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the channels that matter least, and repair the layers behind them from samples without labels.

    `ratio` is the share to remove of the multiply-accumulates (or parameters) that the model had before it was first pruned, so a
    second run finds nothing left to do. With ``target=latency`` it is the share of the time that may be left.

    Before:
        g (float[1,2,1,1] x) => (float[1,2,1,1] y)
        <float[2,2,1,1] w = {1, 2, 3, 4}, float[2] b = {5, 6}, float[2,2,1,1] v = {1, 0, 2, 0}>
        { c = Conv (x, w, b)
          r = Relu (c)
          y = Conv (r, v) }
    After:
        g (float[1,2,1,1] x) => (float[1,2,1,1] y)
        <float[1,2,1,1] w = {1, 2}, float[1] b = {5}, float[2,1,1,1] v = {1, 2}>
        { c = Conv (x, w, b)
          r = Relu (c)
          y = Conv (r, v) }
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ratio: float | None = None  # macs, params: share to remove, 0.3; latency: share of the time that is left, 0.7
    target: Literal["macs", "params", "latency"] = (
        "macs"  # the cost: of a sample; parameters; seconds in ONNX Runtime on this CPU
    )
    importance: str = (
        "obs"  # who goes first: obs, activation, l1, l2, median, fisher, fold, random, or your module:function
    )
    align: int | None = (
        None  # kept widths are multiples of this where they were; none: what the target wants, 16 without one
    )
    keep: float = 0.1  # least share of each group's channels that stays
    exclude: tuple[str, ...] = ()  # globs of weights and nodes whose channels stay
    drop_blocks: bool | None = None  # whole residual blocks may go, too; none: with target=latency
    heads: bool = False  # attention loses whole heads, not indices of all heads
    rounds: int = 1  # cuts, each followed by a repair
    repair: bool = True  # fit what is left to the original
    samples: int = 1024  # most that are read

    def __post_init__(self) -> None:
        for name in ("ratio", "keep"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is {value}; give a share between 0 and 1, as in {name}=0.3")
        if self.importance not in SELECTORS and ":" not in self.importance:
            raise ValueError(
                f"importance is {self.importance!r}; there are {', '.join(SELECTORS)}, and a function of yours, module:function"
            )
        if self.rounds < 1 or self.samples < 1 or (self.align is not None and self.align < 1):
            raise ValueError("rounds, samples and align are 1 at least")

    @property
    def left(self) -> float:
        """The share of the cost that may be left."""
        if self.target == "latency":
            return 0.7 if self.ratio is None else self.ratio
        return 1 - (0.3 if self.ratio is None else self.ratio)

    def run(self, model: Model, ctx: Context) -> int:
        """Prune in rounds; returns the number of channel classes (or balanced sets of them) and blocks removed."""
        groups = channel_groups(model, heads=self.heads)
        reached = self._reached(model, groups)
        if reached <= self.left * (1.05 if self.target == "latency" else 1.001):
            return 0
        self._check_excluded(model)
        self._require_prunable(groups)
        if self.target == "latency" and ctx.clock is None:
            raise UserError(
                "prune-channels: target=latency needs a target that runs here; build for ort:cpu, or take target=macs"
            )
        feeds = _feeds(ctx, model, self.samples)
        if not feeds:
            ctx.remark(None, "no calibration data: norms of weights decide, and nothing is repaired")
        original, cut = model.clone(), Cut()
        removed = 0
        fits: list[Fit] = []
        plain = math.nan
        judge = _Judge(original, _some(ctx, original, _JUDGED, feeds)[: max(1, 256 // _size(feeds))]) if feeds else None
        for number in range(self.rounds):
            if number:
                groups = channel_groups(model, heads=self.heads)
            goal = (self.left / reached) ** (1 / self.rounds)
            if number and self.target != "latency":  # widths that are liked may have taken more than the round's share
                share = (
                    groups.cost_model(self.target).total() / channel_groups(original).cost_model(self.target).total()
                )
                goal **= number + 1
                goal /= share
                if goal > 1:
                    continue
            steps, blocks = self._choose(model, groups, feeds, goal, ctx)
            admitted = [step for step in steps if ctx.admit()]
            blocks = [block for block in blocks if ctx.admit()]
            if not admitted and not blocks:
                break
            removed += len(admitted) + len(blocks)
            gone = {c for step in admitted for c in step}
            if self.importance == "fold":
                fold(model, groups, gone)
                groups = channel_groups(model, heads=self.heads)  # numbered as before
            cut.apply(model, groups, gone, blocks)
            if judge is not None and self.repair:
                if number == self.rounds - 1:
                    plain = judge.distance(model)
                told = functools.partial(ctx.progress, "fitting layers")
                stands = cut.stands
                fits = fit_to(
                    original, model, cut.places, feeds, ctx.evaluate, stands=stands, seed=ctx.seed, progress=told
                )
                cleanup(model)
                self._tell_unfitted(ctx, groups, gone, fits)
        if not removed:
            return 0
        self._report(
            ctx,
            model,
            original,
            cut,
            fits,
            feeds,
            (plain, math.nan if judge is None else judge.distance(model)),
            reached,
        )
        return removed

    # ------------------------------------------------------------------------------------------------------- steps

    def _check_excluded(self, model: Model) -> None:
        names = [name for n in model.nodes() for name in (n.name, *n.origin)] + [t.name for t in model.constants()]
        for glob in self.exclude:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise UsageError(
                    f"prune-channels: exclude={glob} matches no node and no weight; graphopt groups lists them"
                )

    def _require_prunable(self, groups: ChannelGroups) -> None:
        if self._free(groups):
            return
        reasons = groups.blocked()[:5]
        if any(group.width > 1 for group in groups.groups):
            reasons = [f"exclude={','.join(self.exclude)} covers all {len(groups.groups)} groups that could be"]
        told = "; ".join(reasons) if reasons else "no Conv, Gemm or MatMul reads what another one computes"
        raise UserError(f"prune-channels: no channel of this model can be removed: {told}")

    def _free(self, groups: ChannelGroups) -> list[Group]:
        if not self.exclude:
            return [g for g in groups.groups if g.width > 1]
        readers: dict[str, list[str]] = {}  # of a weight: the nodes, and what they were in the model as it was given
        for node in groups.model.graph.nodes:
            for tensor in node.inputs:
                readers.setdefault(tensor.name, []).extend((node.name, *node.origin))
        return [g for g in groups.groups if g.width > 1 and not self._excluded(g, readers)]

    def _excluded(self, group: Group, readers: Mapping[str, Sequence[str]]) -> bool:
        weights = [name for name, _, _ in group.sites]
        nodes = [reader for name in weights for reader in readers.get(name, ())]
        return self._named([group.name, *weights, *nodes, *group.consumers])

    def _named(self, names: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in self.exclude)

    def _blocks(self, model: Model, groups: ChannelGroups, feeds: Feeds) -> list[Block]:
        wanted = self.target == "latency" if self.drop_blocks is None else self.drop_blocks
        found = residual_blocks(model, groups.shapes) if wanted and feeds else []
        return [block for block in found if not self._named([block.join, *block.nodes])]

    def _candidates(
        self, model: Model, groups: ChannelGroups, feeds: Feeds, ctx: Context
    ) -> tuple[list[Curve], list[Array], list[Block]]:
        """All that could go, with damages: curves of channels and of blocks. Kept with the samples, since it is what takes time."""
        told = self.importance, self.keep, self.exclude, self.heads, self.samples, ctx.seed
        blocks = self._blocks(model, groups, feeds)
        key = "prune-channels", model.fingerprint(), told, tuple(blocks)
        memo = {} if ctx.data is None else ctx.data.memo
        if key not in memo:
            curves, costs = self._curves(groups, feeds, ctx)
            if blocks:
                some = _some(ctx, model, 3 * len(blocks), feeds)
                step = functools.partial(ctx.progress, "measuring blocks")
                lines = chains(model, blocks)
                for order, errors in allocation.measure_blocks(
                    model, blocks, lines, some, ctx.evaluate, ctx.seed, step
                ):
                    curves.append(Curve(Family((), ()), [(-1 - k,) for k in order], [0.0, *errors]))
                    costs.append(np.maximum.accumulate([0.0, *errors]))
            for line in curves:
                line.weights.clear()  # they have been measured
            memo[key] = curves, costs
        return *memo[key], blocks

    def _curves(self, groups: ChannelGroups, feeds: Feeds, ctx: Context) -> tuple[list[Curve], list[Array]]:
        """How each family shrinks, and with what damage after each step."""
        free = {id(g) for g in self._free(groups)}
        with np.errstate(over="ignore", invalid="ignore"):
            readers = sites(groups, feeds, ctx.evaluate, ctx.seed)
        for site in readers:
            if not (np.isfinite(site.weight).all() and np.isfinite(site.gram).all()):
                where = f"node {site.contraction.node.name!r} ({site.contraction.node.op})"
                raise UserError(
                    f"prune-channels: {where} reads or holds NaN, infinity or numbers too large to square; check samples and weights"
                )
        most = {g: g.width - max(1, math.ceil(g.width * self.keep)) if id(g) in free else 0 for g in groups.groups}
        curves = []
        found, order = families(groups), selector(self.importance)
        several = feeds[: max(1, _GRADIENTS // _size(feeds))] if feeds else []
        told = functools.cache(lambda: gradients.squares(groups, several, ctx.evaluate, ctx.seed)) if feeds else None
        marks: tuple[float, ...] = _MEASURED if feeds else ()
        if marks and len(found) * len(marks) * _ENOUGH * _effort(ctx, groups.model) > _MEASURING:
            marks = marks[1:2]
        for number, family in enumerate(found):
            classes = set(family.classes)
            mine = [site for site in readers if classes.intersection(site.owner.tolist())]
            limits = {g: most[g] for g in family.groups}
            if any(limits.values()):
                line = curve(groups, family, mine, order, seed=ctx.seed, most=limits, samples=marks, gradients=told)
                curves.append(line)
            ctx.progress("ordering channels", number + 1, len(found))
        if not feeds:
            return curves, [allocation.damages(line, []) for line in curves]
        step = functools.partial(ctx.progress, "measuring cuts")
        some = _some(ctx, groups.model, sum(len(c.weights) for c in curves), feeds)
        points = allocation.measure(groups, curves, some, step)
        return curves, [allocation.damages(line, at) for line, at in zip(curves, points, strict=True)]

    def _choose(
        self, model: Model, groups: ChannelGroups, feeds: Feeds, goal: float, ctx: Context
    ) -> tuple[list[tuple[int, ...]], list[Block]]:
        """What to remove: classes, in the sets in which they go, and blocks."""
        curves, costs, blocks = self._candidates(model, groups, feeds, ctx)
        parts = [block.nodes for block in blocks]
        wish = ctx.target.channel_alignment if ctx.target else _ALIGNMENT
        if self.target == "latency":
            taken = self._by_time(model, groups, curves, costs, blocks, goal, self.align or wish, feeds, ctx)
        else:
            taken = self._by_count(groups, curves, costs, parts, goal, wish)
        steps = [step for line, position in zip(curves, taken, strict=True) for step in line.steps[:position]]
        return [s for s in steps if s[0] >= 0], [blocks[k] for k in sorted(-1 - s[0] for s in steps if s[0] < 0)]

    def _by_count(
        self,
        groups: ChannelGroups,
        curves: Sequence[Curve],
        costs: Sequence[Array],
        parts: Sequence[frozenset[str]],
        goal: float,
        wish: int,
    ) -> list[int]:
        """How many steps each family takes, against what can be counted."""
        while True:  # what the hardware wishes gives way where it would take much more than was asked for
            step = self.align or wish
            ends = [allocation.stops(line, step, self.align is not None) for line in curves]
            model = groups.cost_model(self.target, parts)
            taken, left = allocation.allocate(model, curves, costs, goal, stops=ends)
            if self.align is not None or wish == 1 or goal - _OVERSHOOT <= left <= goal * 1.001:
                break
            wish //= 2
        if left > goal * 1.001:
            raise self._out_of_reach(groups, 1 - left * self.left / goal)
        return taken

    def _by_time(
        self,
        model: Model,
        groups: ChannelGroups,
        curves: Sequence[Curve],
        costs: Sequence[Array],
        blocks: Sequence[Block],
        goal: float,
        step: int,
        feeds: Feeds,
        ctx: Context,
    ) -> list[int]:
        """How many steps each family takes, against times of layers, until the time of the whole model is as wanted."""
        assert ctx.clock is not None
        feed = _one_sample(ctx, model, feeds)
        terms, _ = latency.terms(groups, ctx.clock, feed, ctx.evaluate, step)
        ends = [allocation.stops(line, step, self.align is not None) for line in curves]
        best: tuple[float, list[int]] | None = None
        aim = goal
        for attempt in range(_ATTEMPTS):
            times = CostModel(groups, terms, [block.nodes for block in blocks])
            taken, left = allocation.allocate(times, curves, costs, aim, stops=ends)
            trial = model.clone()
            roots = {c for line, n in zip(curves, taken, strict=True) for c in line.removed(n)}
            gone = [blocks[-1 - c] for c in sorted(roots, reverse=True) if c < 0]
            Cut().apply(trial, channel_groups(trial, heads=self.heads), {c for c in roots if c >= 0}, gone)
            before, after = ctx.clock([model, trial], feed)
            ctx.progress("measuring latency", attempt + 1, _ATTEMPTS)
            if best is None or after / before < best[0]:
                best = after / before, taken
            if after / before <= goal * 1.01 or left > aim * 1.001:
                break
            aim *= min(0.98, goal * before / after)
        assert best is not None
        if best[0] > goal * 1.05:
            raise self._out_of_reach(groups, 1 - best[0] * self.left / goal)
        return best[1]

    def _out_of_reach(self, groups: ChannelGroups, most: float) -> UserError:
        return UserError(
            f"prune-channels: {most:.1%} of the {self.target} at most can be removed, {1 - self.left:.1%} was asked for: "
            f"{'raise' if self.target == 'latency' else 'lower'} ratio, lower keep or align, or exclude less"
            + "".join(f"; {reason}" for reason in groups.blocked()[:3])
        )

    # ------------------------------------------------------------------------------------------------------ report

    def _tell_unfitted(self, ctx: Context, groups: ChannelGroups, gone: set[int], fits: Sequence[Fit]) -> None:
        """Say which layers behind the cut are only sliced, and why."""
        kept, fitted = Kept(groups, gone), {fit.node for fit in fits}
        found: dict[str, dict[str, None]] = {}
        for contraction in groups.contractions:
            node = contraction.node
            if node.name not in fitted and not kept.mask(contraction.atoms).all():
                why = _unfitted(node)
                if why is not None:
                    found.setdefault(why, {})[f"{node.name!r} ({node.op})"] = None
        for why, names in found.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            ctx.remark(None, f"only sliced, not fitted: {', '.join([*names][:3])}{more}: {why}")

    def _reached(self, model: Model, groups: ChannelGroups) -> float:
        """The share of the cost that is left of what the model had before it was first pruned."""
        for entry in model.carried.metadata_props:
            if entry.key == f"{_RECORD}.{self.target}":
                try:
                    value = float(entry.value)
                except ValueError:
                    value = math.nan
                if not value > 0:
                    raise UserError(f"prune-channels: metadata {entry.key!r} is {entry.value!r}, no cost; remove it")
                return value if self.target == "latency" else groups.cost_model(self.target).total() / value
        return 1.0

    def _record(self, model: Model, original: Model, share: float) -> None:
        """Note the cost before the first pruning, or, of times, which are those of one machine, the share that is left."""
        kept = {entry.key: entry for entry in model.carried.metadata_props}
        key = f"{_RECORD}.{self.target}"
        if self.target == "latency":
            if key in kept:
                kept[key].value = f"{share:.4f}"
            else:
                model.carried.metadata_props.add(key=key, value=f"{share:.4f}")
        elif key not in kept:
            full = channel_groups(original).cost_model(self.target).total()
            model.carried.metadata_props.add(key=key, value=repr(full))

    def _report(
        self,
        ctx: Context,
        model: Model,
        original: Model,
        cut: Cut,
        fits: Sequence[Fit],
        feeds: Feeds,
        errors: tuple[float, float],
        reached: float,
    ) -> None:
        first, last = channel_groups(original, heads=self.heads), channel_groups(model, heads=self.heads)
        told = report.of_groups(first, last, cut, fits)
        if self.target == "latency" and ctx.clock is not None:
            feed, step = _one_sample(ctx, original, feeds), self.align or _ALIGNMENT
            times = [CostModel(g, latency.terms(g, ctx.clock, feed, ctx.evaluate, step)[0]) for g in (first, last)]
            left = report.counterparts(first, last)
            for group, now, entry in zip(first.groups, left, told["groups"], strict=True):
                entry["latency_seconds"] = [
                    times[0].touched(group.classes),
                    times[1].touched(() if now is None else now.classes),
                ]
        tensors = {tensor.name: tensor for tensor in original.constants()}
        for entry in told["groups"]:
            before, after = entry["channels"]
            if before != after:
                ctx.remark(tensors.get(entry["name"]), f"{before} -> {after} channels: {_told(entry)}")
        for block in cut.blocks:
            ctx.remark(None, f"the residual block that ends in {block!r} is left out")
        costs = {what: told[what] for what in ("macs", "params", "bytes")}
        ctx.remark(
            None,
            f"{costs['macs'][0]:.0f} -> {costs['macs'][1]:.0f} multiply-accumulates ({_change(costs['macs'])}), "
            f"{costs['params'][0]:.0f} -> {costs['params'][1]:.0f} parameters ({_change(costs['params'])})",
        )
        share = reached
        if self.target == "latency" and ctx.clock is not None:
            seconds = ctx.clock([original, model], _one_sample(ctx, original, feeds))
            told["latency_seconds"] = seconds
            share *= seconds[1] / seconds[0]
            ctx.remark(None, f"{seconds[0] * 1e3:.3f} -> {seconds[1] * 1e3:.3f} ms a sample ({_change(seconds)})")
        self._record(model, original, share)
        if feeds:
            plain, after = errors
            told["error"] = {"sliced": None if math.isnan(plain) else plain, "repaired": after}
            middle = "" if math.isnan(plain) else f"{plain:.3g} before repair, "
            ctx.remark(
                None,
                f"relative squared error of the outputs: {middle}{after:.3g} at the end ({len(fits)} layers fitted)",
            )
        ctx.facts["prune-channels"] = told


def _unfitted(node: Node) -> str | None:
    """Why the repair leaves a layer alone; None where there is no layer, but two activations."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op in ("LSTM", "GRU", "RNN"):
        return "gates of a recurrent layer"
    if weight is not None and weight.inputs and weight.inputs[0].op == "DequantizeLinear":
        return "the weight is quantized; prune first, then quantize"
    if not isinstance(weight, Constant):
        return None
    if len(weight.outputs) > 1:
        return f"the weight is shared by {len(weight.outputs)} nodes"
    return "too many columns, or a form that is not solved for"


def _change(pair: Sequence[float]) -> str:
    return f"{pair[1] / pair[0] - 1:+.1%}" if pair[0] else "none"


def _told(entry: Mapping[str, Any]) -> str:
    """A group's costs and errors, before and after."""
    parts = [f"{entry[what][0]:.0f} -> {entry[what][1]:.0f} {what}" for what in report.COSTS]
    if entry["latency_seconds"] is not None:
        parts.append("{:.3f} -> {:.3f} ms".format(*(t * 1e3 for t in entry["latency_seconds"])))
    errors = entry["error"]
    if errors["sliced"] is not None:
        parts.append(f"error of its readers {errors['sliced']:.2g} sliced, {errors['repaired']:.2g} repaired")
    return ", ".join(parts)


def _one_sample(ctx: Context, model: Model, feeds: Feeds) -> dict[str, Array]:
    """What to time the model on."""
    if ctx.data is not None and feeds:
        return dict(next(iter(ctx.data.feeds(1, 1))))
    return equivalence.generate_inputs(model.inputs, seed=ctx.seed)


def _feeds(ctx: Context, model: Model, most: int) -> Feeds:
    """The samples, no more than two models side by side can hold in `_MEMORY` bytes."""
    if ctx.data is None:
        return []
    each = max(1, live_bytes(model, next(iter(ctx.data.feeds(1, 1)), {})))
    room = max(2, _MEMORY // (2 * each))
    if room < most and (ctx.data.count is None or room < ctx.data.count):
        ctx.remark(None, f"{room} samples are read, for more their activations would need over {_MEMORY >> 20} MiB")
    return list(ctx.data.feeds(max(1, min(_BATCH, room, _AT_ONCE // each)), min(room, most)))


def _size(feeds: Feeds) -> int:
    """Samples of a call."""
    first = next(iter(feeds[0].values()))
    return max(1, len(first) if first.ndim else 1)


def _effort(ctx: Context, model: Model) -> int:
    """Multiply-accumulates of a sample."""
    assert ctx.data is not None
    return max(1, calibration.effort(model, ctx.data).macs)


def _some(ctx: Context, model: Model, runs: int, feeds: Feeds) -> Feeds:
    """As many samples as the model can be run on so often in bounded time."""
    assert ctx.data is not None
    count = max(1, math.floor(_MEASURING / ((runs + 1) * _effort(ctx, model))))
    if count >= _size(feeds):
        return feeds[: count // _size(feeds)]
    found: list[dict[str, Array]] = []
    for feed in ctx.data.feeds(-(-count // 2), count):
        found.append(feed)
        if len(found) * _size(found) >= count:
            break
    return found


class _Judge:
    """How far a model's outputs are from the original's on some samples."""

    def __init__(self, original: Model, feeds: Feeds) -> None:
        self.feeds = feeds
        self.reference = allocation.outputs(original, feeds)
        for outputs in self.reference:
            for name, array in outputs.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise UserError(
                        f"prune-channels: output {name!r} of the model is NaN or infinite on the samples; check samples and weights"
                    )

    def distance(self, model: Model) -> float:
        """Mean squared error of the outputs, relative to their variance."""
        return allocation.distance(self.reference, allocation.outputs(model, self.feeds))
