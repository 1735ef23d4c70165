"""`graphopt compare`: two models on the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    DataFile,
    ReportFile,
    Seed,
    Shapes,
    check_place,
    load,
    parse_ranges,
    read_arrays,
    write_report,
)
from graphopt.commands.containment import contained
from graphopt.commands.terminal import err, out

if TYPE_CHECKING:
    pass


@contained(default=False)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The reference model.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The model to judge.")],
    data: DataFile = None,
    shape: Shapes = None,
    seed: Seed = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, metavar="X", help="Relative to the largest magnitude of an output.")
    ] = 1e-4,
    report: ReportFile = None,
) -> None:
    """Run two models, as written, on the same inputs; exit with 1 when they differ."""
    from graphopt import building, equivalence
    from graphopt.backend import check_shapes

    check_place(report)
    ranges = parse_ranges(shape)
    reference, candidate = load(first), load(second)
    check_shapes(reference, ranges)
    feeds = read_arrays(data, reference.inputs)
    for sample in feeds or ():
        equivalence.check_feeds(reference.inputs, sample)
    if feeds is None and ranges:
        feeds = list(building.samples(reference, seed, ranges))
    found = equivalence.compare(reference, candidate, feeds=feeds, allowed=tolerance, seed=seed)
    table = Table("output", "max abs diff", "relative", "note")
    for gap in found.differences:
        table.add_row(escape(gap.name), f"{gap.max_abs:.3g}", f"{gap.relative:.3g}", escape(gap.note))
    out.print(table)
    rows = [
        {"output": d.name, "max_abs": str(d.max_abs), "relative": str(d.relative), "note": d.note}
        for d in found.differences
    ]
    write_report(report, {"equal": found.equal, "tolerance": tolerance, "samples": found.samples, "outputs": rows})
    found.require(f"{first} and {second}")
    err.print(f"equal within {tolerance:g} on {found.samples} samples ({found.engine})")
