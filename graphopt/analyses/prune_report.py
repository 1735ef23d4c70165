"""What became of each group of channels when a model was cut: widths, costs, and the errors of the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.analyses.channel_groups import ChannelGroups
from graphopt.analyses.cut import Cut
from graphopt.analyses.repair import Fit

COSTS = ("macs", "params", "bytes")


def of_groups(first: ChannelGroups, last: ChannelGroups, cut: Cut, fits: Sequence[Fit]) -> dict[str, Any]:
    """A report as JSON knows it; pairs are [before, after].

    A group's costs are those of all layers and weights that have its channels on an axis. Its error is the mean over the layers that
    read it, on samples held out from the fit, relative to the variance of what the original computes there; null where none was fitted.
    """
    before = {what: first.cost_model(what) for what in COSTS}
    after = {what: last.cost_model(what) for what in COSTS}
    left = {group.name: group for group in last.groups}
    errors = {fit.node: fit for fit in fits}
    found = []
    for group in first.groups:
        now = left.get(group.name)
        mine = [errors[name] for name in group.consumers if name in errors]
        entry: dict[str, Any] = {
            "name": group.name,
            "channels": [group.width, now.width if now is not None else group.width - cut.removed.get(group.name, 0)],
        }
        for what in COSTS:
            entry[what] = [
                before[what].touched(group.classes),
                0.0 if now is None else after[what].touched(now.classes),
            ]
        entry["latency_seconds"] = None
        entry["error"] = {
            "sliced": sum(fit.before for fit in mine) / len(mine) if mine else None,
            "repaired": sum(fit.after for fit in mine) / len(mine) if mine else None,
        }
        found.append(entry)
    total: dict[str, Any] = {what: [before[what].total(), after[what].total()] for what in COSTS}
    return {**total, "blocks": list(cut.blocks), "groups": found}
