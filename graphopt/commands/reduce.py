"""`graphopt reduce`: the smallest model on which a command still fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.arguments import (
    DataFile,
    Domains,
    ModelFile,
    ReportFile,
    Seed,
    check_place,
    load,
    read_arrays,
    write_report,
)
from graphopt.commands.containment import contained
from graphopt.commands.terminal import err, say


@contained(default=False)
def reduce(
    model: ModelFile,
    cmd: Annotated[
        str,
        typer.Option(
            "--cmd",
            metavar="CMD",
            help="Fails on the model: exits with another code than 0 (good) and 125 (cannot tell). Gets its path as last argument, or for {}.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help=".onnx, or .onnxtxt for text.")] = Path(
        "reduced.onnx"
    ),
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Kill CMD after so long; such a run tells nothing.")
    ] = None,
    max_runs: Annotated[int, typer.Option(min=1, metavar="N", help="Stop after so many runs of CMD.")] = 1000,
    data: DataFile = None,
    allow_domain: Domains = None,
    seed: Seed = 0,
    report: ReportFile = None,
) -> None:
    """Leave out nodes, outputs, sizes and values as long as CMD fails on what is left, and write the smallest model found."""
    from graphopt import equivalence, ir, verdict, verify
    from graphopt.reduction import Reduction

    for place in (output, report):
        check_place(place)
    judge = verdict.Command(cmd, timeout)
    loaded = load(model)
    verify.cycles(loaded)
    verify.operators(loaded, allow_domain or ())
    feeds = read_arrays(data, loaded.inputs)
    for sample in feeds or ():
        equivalence.check_feeds(loaded.inputs, sample)
    search = Reduction(
        loaded,
        judge,
        feeds=feeds[0] if feeds else None,
        seed=seed,
        most=max_runs,
        say=lambda text: err.print(text, markup=False, soft_wrap=True),
    )
    before = search.size()
    try:
        search.run()
    except KeyboardInterrupt:
        search.stopped = True
        say("interrupted; what was found so far is written")
    else:
        if search.stopped:
            say(f"stopped after {max_runs} runs; --max-runs allows more")
    after = search.size()
    ir.save(search.best, output)
    err.print(
        f"{before[0]} -> {after[0]} nodes, {before[1]:,} -> {after[1]:,} elements of inputs and weights, "
        f"{before[2]} -> {after[2]} outputs, {search.runs} runs: {output}",
        markup=False,
        soft_wrap=True,
    )
    write_report(
        report,
        {
            "runs": search.runs,
            "stopped": search.stopped,
            "nodes": {"before": before[0], "after": after[0]},
            "elements": {"before": before[1], "after": after[1]},
            "outputs": {"before": before[2], "after": after[2]},
        },
    )
