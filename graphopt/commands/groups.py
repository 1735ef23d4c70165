"""`graphopt groups`: coupled channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    Level,
    ModelFile,
    PipelineText,
    ReportFile,
    check_place,
    load,
    parse_pipeline,
    write_report,
)
from graphopt.commands.terminal import out

if TYPE_CHECKING:
    pass


def groups(model: ModelFile, passes: PipelineText = None, level: Level = None, report: ReportFile = None) -> None:
    """Show the groups of channels of the optimized MODEL that pruning removes together, and why others have to stay."""
    from graphopt import verify
    from graphopt.analyses.channel_groups import channel_groups
    from graphopt.evaluate import evaluate_node
    from graphopt.pass_base import Context

    check_place(report)
    pipeline = parse_pipeline(passes, level, "default")
    loaded = load(model)
    verify.cycles(loaded)
    found = channel_groups(pipeline.run(loaded, Context(evaluate=evaluate_node)).model)
    table = Table("group", "sliced", "read by")
    for heading in ("channels", "MACs each", "parameters each"):
        table.add_column(heading, justify="right")
    costs = {what: found.cost_model(what) for what in ("macs", "params")}
    listed = []
    for group in found.groups:
        saved = {what: round(cost.saving(group.classes[:1])) for what, cost in costs.items()}
        sites = [f"{name}[{axis}]{f' x{count}' if count > 1 else ''}" for name, axis, count in group.sites]
        cells = [group.name, ", ".join(sites), ", ".join(group.consumers)]
        table.add_row(*map(escape, cells), str(group.width), f"{saved['macs']:,}", f"{saved['params']:,}")
        listed.append(
            {"name": group.name, "channels": group.width, "sliced": sites, "readers": group.consumers, **saved}
        )
    out.print(table)
    blocked = found.blocked()
    for line in blocked:
        out.print(line, markup=False, soft_wrap=True)
    write_report(report, {"groups": listed, "blocked": blocked})
