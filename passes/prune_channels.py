"""Structured pruning: whole channels go, everywhere at once, and what reads them is fitted to the original again.

1. Channel groups (analyses/channel_groups): which indices of which weights have to go together.
2. Error curves (analyses/importance): for each family of groups, in which order channels go and what error that leaves.
3. Allocation (analyses/allocation): how many channels each family loses, by damage measured at the model's outputs.
4. Slicing: weights, group counts, shape constants.
5. Repair (analyses/repair): ridge least squares of every layer behind a cut, without labels.

Steps 2 to 5 need samples; without any, squared norms of weights decide and nothing is repaired.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np

from graphopt.analyses import allocation
from graphopt.analyses.channel_groups import ChannelGroups, Group, Kept, channel_groups
from graphopt.analyses.importance import SELECTORS, Curve, curve, families, sites
from graphopt.analyses.repair import Feeds, Fit, live_bytes
from graphopt.analyses.repair import repair as fit_to
from graphopt.edit import Editor, cleanup
from graphopt.errors import UsageError, UserError
from graphopt.ir import Model
from graphopt.pass_base import Context, Exactness, Pass

_MEASURED: Final = (0.25, 0.5, 0.75)  # of the channels that a family may lose: where damage is measured
_MEASURING: Final = 2e12  # multiply-accumulates that measuring may take
_ALIGNMENT: Final = (
    8  # without a target: blocks of ONNX Runtime's convolutions, whose other widths are several times slower
)
_OVERSHOOT: Final = 0.04  # of the cost: more is not removed only for the sake of widths that the hardware likes
_MEMORY: Final = 5 << 29  # bytes of activations
_BATCH: Final = 32
_RECORD: Final = "graphopt.prune-channels"  # metadata: what the model cost before it was first pruned

Places = dict[str, list["np.ndarray[Any, Any] | None"]]


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the channels that matter least, and repair the layers behind them from samples without labels.

    `ratio` is of the multiply-accumulates (or parameters) that the model had before it was first pruned, so a second run
    finds nothing left to do.

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
    ratio: float = 0.3  # share of the cost to remove, 0 to 1
    target: Literal["macs", "params"] = "macs"  # the cost: multiply-accumulates of a sample, or parameters
    importance: Literal["obs", "activation", "l1", "l2", "median", "random"] = "obs"  # who goes first
    align: int | None = (
        None  # kept widths are multiples of this where they were; none: what the target wants, 8 without one
    )
    keep: float = 0.1  # least share of each group's channels that stays
    exclude: tuple[str, ...] = ()  # globs of weights and nodes whose channels stay
    rounds: int = 1  # cuts, each followed by a repair
    repair: bool = True  # fit what is left to the original
    samples: int = 1024  # most that are read

    def __post_init__(self) -> None:
        for name in ("ratio", "keep"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share between 0 and 1, as in {name}=0.3")
        if self.rounds < 1 or self.samples < 1 or (self.align is not None and self.align < 1):
            raise ValueError("rounds, samples and align are 1 at least")

    def run(self, model: Model, ctx: Context) -> int:
        """Prune in rounds; returns the number of channel classes (or balanced sets of them) removed."""
        groups = channel_groups(model)
        full = self._recorded(model, groups)
        if groups.cost_model(self.target).total() <= full * (1 - self.ratio) * 1.001:
            return 0
        self._require_prunable(groups)
        feeds = _feeds(ctx, groups, self.samples)
        if not feeds:
            ctx.remark(None, "no calibration data: norms of weights decide, and nothing is repaired")
        original, places = model.clone(), Places()
        before = groups.cost_model("macs").total(), groups.cost_model("params").total()
        widths: dict[str, tuple[int, int]] = {}
        removed = 0
        start = groups.cost_model(self.target).total()
        fits: list[Fit] = []
        plain = math.nan
        for number in range(self.rounds):
            if number:
                groups = channel_groups(model)
            goal = start * (full * (1 - self.ratio) / start) ** ((number + 1) / self.rounds)
            steps = self._cut(groups, feeds, goal, ctx)
            admitted = [step for step in steps if ctx.admit()]
            if not admitted:
                break
            removed += len(admitted)
            gone = {c for step in admitted for c in step}
            for group in groups.groups:
                first, last = widths.get(group.name, (group.width, group.width))
                widths[group.name] = first, last - len(gone.intersection(group.classes))
            self._slice(model, groups, gone, places)
            if feeds and self.repair:
                if number == self.rounds - 1:
                    plain = _distance(original, model, feeds)
                fits = fit_to(original, model, places, feeds, ctx.evaluate, seed=ctx.seed)
                cleanup(model)
        if not removed:
            return 0
        self._record(model, full)
        self._report(ctx, model, original, before, widths, fits, feeds, plain)
        return removed

    # ------------------------------------------------------------------------------------------------------- steps

    def _require_prunable(self, groups: ChannelGroups) -> None:
        if self._free(groups):
            return
        reasons = groups.blocked()[:5]
        if any(group.width > 1 for group in groups.groups):
            reasons = [f"exclude={','.join(self.exclude)} covers all {len(groups.groups)} groups that could be"]
        told = "; ".join(reasons) if reasons else "no Conv, Gemm or MatMul reads what another one computes"
        raise UserError(f"prune-channels: no channel of this model can be removed: {told}")

    def _free(self, groups: ChannelGroups) -> list[Group]:
        return [g for g in groups.groups if g.width > 1 and not self._excluded(g)]

    def _excluded(self, group: Group) -> bool:
        names = [group.name, *(name for name, _, _ in group.sites), *group.consumers]
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in self.exclude)

    def _cut(self, groups: ChannelGroups, feeds: Feeds, goal: float, ctx: Context) -> list[tuple[int, ...]]:
        """The classes to remove, in the sets in which they go."""
        free = {id(g) for g in self._free(groups)}
        readers = sites(groups, feeds, ctx.evaluate, ctx.seed)
        most = {g: g.width - max(1, math.ceil(g.width * self.keep)) if id(g) in free else 0 for g in groups.groups}
        curves = []
        for family in families(groups):
            classes = set(family.classes)
            mine = [site for site in readers if classes.intersection(site.owner.tolist())]
            limits = {g: most[g] for g in family.groups}
            if not any(limits.values()):
                continue
            marks = _MEASURED if feeds else ()
            selector = SELECTORS[self.importance]
            curves.append(curve(groups, family, mine, selector, seed=ctx.seed, most=limits, samples=marks))
        points = (
            allocation.measure(groups, curves, self._some(groups, curves, feeds)) if feeds else [[] for _ in curves]
        )
        costs = [allocation.damages(line, found) for line, found in zip(curves, points, strict=True)]
        now = groups.cost_model(self.target).total()
        wish = ctx.target.traits.channel_alignment if ctx.target else _ALIGNMENT

        share = goal / now
        while True:  # what the hardware wishes gives way where it would take much more than was asked for
            step = self.align or wish
            stops = [_stops(line, step, self.align is not None) for line in curves]
            taken, left = allocation.allocate(groups, curves, costs, share, what=self.target, stops=stops)
            if self.align is not None or wish == 1 or share - _OVERSHOOT <= left <= share * 1.001:
                break
            wish //= 2
        if left > goal / now * 1.001:
            reach = 1 - left * now / (goal / (1 - self.ratio)) if self.rounds == 1 else 1 - left
            raise UserError(
                f"prune-channels: {reach:.1%} of the {self.target} at most can be removed, {self.ratio:.1%} was asked for: "
                "lower ratio, keep or align, or exclude less"
                + "".join(f"; {reason}" for reason in groups.blocked()[:3])
            )
        return [step for line, position in zip(curves, taken, strict=True) for step in line.steps[:position]]

    def _some(self, groups: ChannelGroups, curves: Sequence[Curve], feeds: Feeds) -> Feeds:
        """As many samples as can be measured on in bounded time."""
        runs = sum(len(line.weights) for line in curves) + 1
        size = max(1, len(next(iter(feeds[0].values()))) if next(iter(feeds[0].values())).ndim else 1)
        samples = _MEASURING / max(1.0, runs * groups.cost_model("macs").total())
        return feeds[: max(1, math.floor(samples / size))]

    def _slice(self, model: Model, groups: ChannelGroups, gone: set[int], places: Places) -> None:
        kept = Kept(groups, gone)
        for node in model.graph.nodes:
            for tensor in node.outputs:
                labels = groups.labels(tensor) or ()
                if not any(atoms is not None for atoms in labels):
                    continue
                old = places.get(tensor.name, [None] * len(labels))
                new = [None if atoms is None else kept.indices(atoms) for atoms in labels]
                places[tensor.name] = [n if o is None or n is None else o[n] for o, n in zip(old, new, strict=True)]
        edit = Editor(model)
        groups.apply(gone, edit)
        edit.commit()
        cleanup(model)

    # ------------------------------------------------------------------------------------------------------ report

    def _recorded(self, model: Model, groups: ChannelGroups) -> float:
        for entry in model.carried.metadata_props:
            if entry.key == f"{_RECORD}.{self.target}":
                try:
                    return float(entry.value)
                except ValueError:
                    raise UsageError(f"prune-channels: metadata {entry.key!r} is no number; remove it") from None
        return groups.cost_model(self.target).total()

    def _record(self, model: Model, full: float) -> None:
        if not any(entry.key == f"{_RECORD}.{self.target}" for entry in model.carried.metadata_props):
            model.carried.metadata_props.add(key=f"{_RECORD}.{self.target}", value=repr(full))

    def _report(
        self,
        ctx: Context,
        model: Model,
        original: Model,
        before: tuple[float, float],
        widths: dict[str, tuple[int, int]],
        fits: Sequence[Fit],
        feeds: Feeds,
        plain: float,
    ) -> None:
        tensors = {tensor.name: tensor for tensor in original.constants()}
        for name, (first, last) in widths.items():
            if first != last:
                ctx.remark(tensors.get(name), f"{first} -> {last} channels")
        groups = channel_groups(model)
        macs, params = groups.cost_model("macs").total(), groups.cost_model("params").total()
        ctx.remark(
            None,
            f"{before[0]:.0f} -> {macs:.0f} multiply-accumulates ({macs / before[0] - 1:+.1%}), "
            f"{before[1]:.0f} -> {params:.0f} parameters ({params / before[1] - 1:+.1%})",
        )
        if feeds:
            after = _distance(original, model, feeds)
            told = "" if math.isnan(plain) else f"{plain:.3g} before repair, "
            ctx.remark(
                None, f"relative squared error of the outputs: {told}{after:.3g} at the end ({len(fits)} layers fitted)"
            )


def _feeds(ctx: Context, groups: ChannelGroups, most: int) -> Feeds:
    """The samples, no more than two models side by side can hold in `_MEMORY` bytes."""
    if ctx.data is None:
        return []
    room = max(2, _MEMORY // max(1, 2 * live_bytes(groups.model, groups.shapes)))
    if room < most and (ctx.data.count is None or room < ctx.data.count):
        ctx.remark(None, f"{room} samples are read, for more their activations would need over {_MEMORY >> 20} MiB")
    return list(ctx.data.feeds(min(_BATCH, room), min(room, most)))


def _distance(original: Model, model: Model, feeds: Feeds) -> float:
    some = feeds[: max(1, 256 // _BATCH)]
    return allocation.distance(allocation.outputs(original, some), allocation.outputs(model, some))


def _stops(line: Curve, step: int, strict: bool) -> list[int]:
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
            lost[group_of[root]] += each[group_of[root]]
        if all((n if w % f == 0 else w - n) % f == 0 for n, w, f in zip(lost, widths, fine, strict=True) if n):
            found.append(position)
    return found
