"""`graphopt compare`: two models on the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    not_nan,
    parse_ranges,
    read_arrays,
    write_report,
)
from graphopt.commands.containment import contained
from graphopt.commands.terminal import err, out

if TYPE_CHECKING:
    from graphopt.ir import Model
    from graphopt.layers import Layer

_ROWS = 60  # of the table of layers that are shown


@contained(default=False)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The reference model.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The model to judge.")],
    data: DataFile = None,
    shape: Shapes = None,
    seed: Seed = 0,
    tolerance: Annotated[
        float,
        typer.Option(min=0, callback=not_nan, metavar="X", help="Relative to the largest magnitude of an output."),
    ] = 1e-4,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare every tensor, and name the first that diverges.")
    ] = False,
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
    if layers:
        _layers(reference, candidate, feeds or _generated(reference, seed), tolerance, (first, second), report)
        return
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


def _generated(reference: Model, seed: int) -> list[dict[str, Any]]:
    """Samples that the reference can be run on."""
    from graphopt import equivalence
    from graphopt.evaluate import Evaluator

    return [sample for sample, _ in equivalence.generated_runs(reference, Evaluator(reference), seed)]


def _layers(
    reference: Model,
    candidate: Model,
    feeds: list[dict[str, Any]],
    tolerance: float,
    names: tuple[str, str],
    report: Path | None,
) -> None:
    from graphopt.errors import NotEquivalent
    from graphopt.layers import compare_layers

    found = compare_layers(reference, candidate, feeds=feeds, tolerance=tolerance)
    rows = list(found.layers)
    if len(rows) > _ROWS:
        worst = sorted(rows, key=lambda row: -row.relative)[: _ROWS - 1]
        rows = [row for row in rows if row in worst or row == found.first]
        err.print(
            f"the {len(rows)} worst of {len(found.layers)} tensors are shown; --report has them all", soft_wrap=True
        )
    table = Table()
    for heading in ("tensor", "operator", "in B", "matched by", "max abs diff", "relative", "SQNR dB", "note"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, _cells(row)), style="bold" if row == found.first else "")
    out.print(table)
    write_report(
        report,
        {
            "equal": found.equal,
            "tolerance": tolerance,
            "samples": found.samples,
            "first": None if found.first is None else found.first.as_dict(),
            "layers": [row.as_dict() for row in found.layers],
            "only_in_a": list(found.alone),
            "only_in_b": list(found.alone_there),
        },
    )
    inside = sum(map(found.diverges, found.layers))
    if found.alone:
        err.print(f"{len(found.alone)} tensors of A have no counterpart in B", soft_wrap=True)
    if found.bodies:
        err.print(f"{found.bodies} nodes in bodies of control flow were not looked into", soft_wrap=True)
    if found.first is None:
        local = f"; {inside} inner tensors differ and yet the outputs do not: rewritten parts" if inside else ""
        err.print(f"the outputs agree within {tolerance:g} on {found.samples} samples{local}", soft_wrap=True)
        return
    for line in found.around:
        err.print(line, markup=False, soft_wrap=True)
    first = found.first
    raise NotEquivalent(
        f"{names[0]} and {names[1]} part at tensor {first.name!r} of node {first.node!r} ({first.op}): it differs by {first.max_abs:.3g} "
        f"({first.relative:.3g} relative, {tolerance:g} allowed){f': {first.note}' if first.note else ''}"
    )


def _cells(row: Layer) -> list[str]:
    other = "" if row.counterpart == row.name else row.counterpart
    numbers = [f"{row.max_abs:.3g}", f"{row.relative:.3g}", f"{row.sqnr:.1f}"]
    return [row.name, row.op, other, row.matched, *numbers, row.note]
