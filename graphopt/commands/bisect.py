"""`graphopt bisect`: which single rewrite broke the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.commands.arguments import (
    Domains,
    Level,
    ModelFile,
    PipelineText,
    ReportFile,
    Seed,
    Shapes,
    check_place,
    load,
    not_nan,
    parse_pipeline,
    parse_ranges,
    read_samples,
    write_report,
)
from graphopt.commands.containment import contained
from graphopt.commands.terminal import err, out
from graphopt.errors import InternalError, UsageError

if TYPE_CHECKING:
    from graphopt.bisection import Culprit
    from graphopt.verdict import Judge

_LINES = 60  # of the difference that are shown
CommandText = Annotated[
    str | None,
    typer.Option(
        "--cmd",
        metavar="CMD",
        help="Judges a model by its exit code: 0 good, 125 cannot tell, else bad. Gets its path as last argument, or for {}.",
    ),
]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Kill CMD after so long; such a run tells nothing.")
]


@contained(default=True)
def bisect(
    model: ModelFile,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SAMPLES", help="Inputs to compare on; or calibration samples, as for build."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, callback=not_nan, metavar="X", help="Relative; default: what the passes are allowed by their class."
        ),
    ] = None,
    cmd: CommandText = None,
    passes: PipelineText = None,
    level: Level = None,
    timeout: Timeout = None,
    target: Annotated[str | None, typer.Option("--target", "-t", metavar="TARGET", help="As for build.")] = None,
    shape: Shapes = None,
    allow_domain: Domains = None,
    seed: Seed = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every run.")] = False,
    report: ReportFile = None,
) -> None:
    """Find the single rewrite after which the outputs leave the tolerance, or CMD fails, and show what it did."""
    from graphopt import bisection, building, equivalence, verdict, verify
    from graphopt.backend import check_shapes
    from graphopt.evaluate import evaluate_node
    from graphopt.pass_base import Context
    from graphopt.target import Target

    if cmd is not None and tolerance is not None:
        raise UsageError("--tolerance and --cmd exclude each other: one of them says what is good")
    if cmd is None and timeout is not None:
        raise UsageError("--timeout belongs to --cmd; add it")
    check_place(report)
    pipeline = parse_pipeline(passes, level, "default")
    ranges = parse_ranges(shape)
    chosen = Target.parse(target) if target else None
    loaded = load(model)
    verify.cycles(loaded)
    verify.operators(loaded, allow_domain or ())
    check_shapes(loaded, ranges)
    feeds, samples = read_samples(data, loaded.inputs, pipeline, False)
    for sample in feeds or ():
        equivalence.check_feeds(loaded.inputs, sample)
    if feeds is None and ranges:
        feeds = list(building.samples(loaded, seed, ranges))

    def context() -> Context:
        return Context(target=chosen, seed=seed, evaluate=evaluate_node, data=samples)

    judge: Judge
    if cmd is not None:
        judge = verdict.Command(cmd, timeout)
    else:
        allowed: float | equivalence.Bound
        if tolerance is None:
            try:
                result = pipeline.run(loaded, context())
            except InternalError:
                result = None
            allowed = bisection.default_bound(loaded, pipeline, result)
        else:
            allowed = tolerance
        judge = verdict.Numbers(loaded, allowed, feeds=feeds, seed=seed)
    search = bisection.Bisection(
        loaded,
        pipeline,
        judge,
        context,
        (lambda text: err.print(text, markup=False, soft_wrap=True)) if verbose else lambda text: None,
    )
    culprit = search.find()
    if culprit is None:
        out.print("nothing wrong: the result of the whole pipeline is good", soft_wrap=True)
        write_report(report, {"culprit": None, "runs": search.runs})
        return
    _show(culprit, model)
    write_report(
        report,
        {
            "culprit": {
                "pass": culprit.pass_name,
                "round": culprit.round,
                "rewrite": culprit.number,
                "rewrites": culprit.total,
                "nodes": list(culprit.nodes),
                "reason": culprit.reason,
                "counted": culprit.counted,
                "unknown": list(culprit.unknown),
                "good_without_it": culprit.alone,
                "diff": list(culprit.change.lines),
            },
            "runs": search.runs,
        },
    )


def _show(culprit: Culprit, model: str) -> None:
    def tell(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)

    where = f"{culprit.pass_name}, round {culprit.round} of its fixpoint" if culprit.round else culprit.pass_name
    tell(f"culprit: rewrite {culprit.number} of {culprit.total}, by {where}")
    if culprit.nodes:
        shown = ", ".join(map(repr, culprit.nodes[:8]))
        tell(f"nodes: {shown}{f' and {len(culprit.nodes) - 8} more' if len(culprit.nodes) > 8 else ''}")
    tell(f"after it: {culprit.reason}")
    if culprit.unknown:
        first, last = culprit.unknown[0], culprit.unknown[-1]
        tell(
            f"nothing can be told of the models after {first} to {last} rewrites: it may be one of {first} to {culprit.number}"
        )
    if not culprit.counted:
        tell(f"{culprit.pass_name} does not ask before each rewrite, so this is what its whole run did")
    for line in culprit.change.lines[:_LINES] or ("the pass raised before the rewrite was done",):
        tell(line)
    if len(culprit.change.lines) > _LINES:
        tell(f"and {len(culprit.change.lines) - _LINES} lines more: --report has them all")
    if culprit.alone is True:
        tell(f"without this rewrite all is good: graphopt opt {model} -o FILE --continue-without-failing leaves it out")
    elif culprit.alone is False:
        tell("without this rewrite the result is still bad: others fail too")
    tell(f"{culprit.runs} runs of the pipeline")
