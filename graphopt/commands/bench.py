"""`graphopt bench`: bundles and models timed side by side."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    DataFile,
    ReportFile,
    Seed,
    Shapes,
    TargetName,
    Threads,
    parse_ranges,
    read_arrays,
    write_report,
)
from graphopt.commands.sessions import first_run, generated, open_session
from graphopt.commands.terminal import out
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.bundle import BundleSession


def bench(
    contestants: Annotated[list[Path], typer.Argument(metavar="BUNDLE_OR_ONNX", help="The first is the baseline.")],
    data: DataFile = None,
    shape: Shapes = None,
    target: TargetName = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Each runs once a round, in random order.")] = 51,
    seed: Seed = 0,
    report: ReportFile = None,
) -> None:
    """Time bundles and models side by side: interleaved, with the ratio to the first and a sign test."""
    from graphopt.measure import interleave

    ranges = parse_ranges(shape)
    sessions: dict[str, BundleSession] = {}
    for path in contestants:
        name = str(path) if str(path) not in sessions else f"{path} ({len(sessions) + 1})"
        sessions[name] = open_session(path, target if path.is_dir() else None, threads, spinning=False)
    first = next(iter(sessions.values()))
    unknown = sorted(ranges.keys() - {spec.name for spec in first.inputs})
    if unknown:
        names = ", ".join(spec.name for spec in first.inputs)
        raise UsageError(f"shape for {unknown[0]!r}: there is no such input; the inputs are {names or 'none'}")
    feeds = (read_arrays(data, first.inputs) or [generated(first, seed, ranges)])[0]
    runs = {name: functools.partial(session.run, feeds) for name, session in sessions.items()}
    for session in sessions.values():
        first_run(session, feeds, data is None)
    timings = interleave(runs, rounds=rounds, seed=seed)
    table = Table("contestant", "median ms", "CPU ms", "ratio", "99 % interval", "p", "verdict")
    rows = timings.rows(baseline=next(iter(sessions)))
    for row in rows:
        versus = row.comparison
        table.add_row(
            escape(row.name),
            f"{row.wall_seconds * 1e3:.3f}",
            f"{row.cpu_seconds * 1e3:.3f}",
            *(
                ("1", "", "", "baseline")
                if versus is None
                else (
                    f"{versus.ratio:.3f}",
                    f"{versus.interval_low:.3f} .. {versus.interval_high:.3f}",
                    f"{versus.p_value:.2g}",
                    versus.verdict,
                )
            ),
        )
    out.print(table)
    write_report(report, {"rows": [row.as_dict() for row in rows], "timings": timings.as_dict()})
