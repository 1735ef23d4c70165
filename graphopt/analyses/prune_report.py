"""What became of each group of channels when a model was cut: widths, costs, and the errors of the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.analyses.channel_costs import CostModel
from graphopt.analyses.channel_groups import ChannelGroups, Group
from graphopt.analyses.cut import Cut, places_of
from graphopt.analyses.repair import Fit

COSTS = ("macs", "params", "bytes")


def counterparts(first: ChannelGroups, last: ChannelGroups) -> list[Group | None]:
    """What each group of `first` is in the model that was cut; None where it is gone, or one channel, which is no group."""
    left = {place: group for group in last.groups for place in places_of(last, group)}
    return [next((left[p] for p in places_of(first, g) if p in left), None) for g in first.groups]


def _cost_of_nodes(first: ChannelGroups, group: Group, last: ChannelGroups, what: str) -> float:
    """The cost that is left of the layers whose weights have the group's channels."""
    weights = {name for name, _, _ in group.sites}
    nodes = {n.name for n in first.model.graph.nodes if any(t.name in weights for t in n.inputs)}
    return CostModel(last, [term for term in last.terms(what) if not nodes.isdisjoint(term.nodes)]).total()


def of_groups(first: ChannelGroups, last: ChannelGroups, cut: Cut, fits: Sequence[Fit]) -> dict[str, Any]:
    """A report as JSON knows it; pairs are [before, after].

    A group's costs are those of all layers and weights that have its channels on an axis. Its error is the mean over the layers that
    read it, on samples held out from the fit, relative to the variance of what the original computes there; null where none was fitted.
    """
    before = {what: first.cost_model(what) for what in COSTS}
    after = {what: last.cost_model(what) for what in COSTS}
    errors = {fit.node: fit for fit in fits}
    found = []
    for group, now in zip(first.groups, counterparts(first, last), strict=True):
        mine = [errors[name] for name in group.consumers if name in errors]
        lost = next((cut.removed[p] for p in places_of(first, group) if p in cut.removed), 0)
        entry: dict[str, Any] = {
            "name": group.name,
            "channels": [group.width, now.width if now is not None else group.width - lost],
        }
        for what in COSTS:
            entry[what] = [
                before[what].touched(group.classes),
                _cost_of_nodes(first, group, last, what) if now is None else after[what].touched(now.classes),
            ]
        entry["latency_seconds"] = None
        entry["error"] = {
            "sliced": sum(fit.before for fit in mine) / len(mine) if mine else None,
            "repaired": sum(fit.after for fit in mine) / len(mine) if mine else None,
        }
        found.append(entry)
    total: dict[str, Any] = {what: [before[what].total(), after[what].total()] for what in COSTS}
    return {**total, "blocks": list(cut.blocks), "groups": found}
