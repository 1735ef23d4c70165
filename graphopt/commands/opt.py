"""`graphopt opt`: ONNX in, ONNX out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from graphopt.commands.arguments import (
    Continue,
    Domains,
    Level,
    ModelFile,
    PipelineText,
    ReportFile,
    Seed,
    Shapes,
    check_place,
    load,
    make_instruments,
    parse_pipeline,
    parse_ranges,
    read_samples,
    write_report,
)
from graphopt.commands.containment import contained
from graphopt.commands.terminal import err, say, stages, to_stdout
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.ir import Model
    from graphopt.pipeline import Instrument


@contained(default=False)
def opt(
    model: ModelFile,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help=".onnx, .onnxtxt (text), or '-' for stdout.")
    ],
    passes: PipelineText = None,
    level: Level = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", metavar="TARGET", help="What to fuse for at -O3, as ort:cpu; default: portable."
        ),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="With -o -: ONNX text instead of protobuf.")] = False,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Weights into FILE.data beside the model.")
    ] = False,
    allow_domain: Domains = None,
    shape: Shapes = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SAMPLES", help="Inputs to compare on; or calibration samples, as for build."),
    ] = None,
    seed: Seed = 0,
    check: Annotated[bool, typer.Option("--check", help="Run onnx.checker after each pass.")] = False,
    compare_each: Annotated[bool, typer.Option("--compare-each", help="Compare the numbers after each pass.")] = False,
    print_after_change: Annotated[
        bool, typer.Option("--print-after-change", help="Show what each pass changed.")
    ] = False,
    time: Annotated[bool, typer.Option("--time", help="Show the seconds of each pass.")] = False,
    remarks: Annotated[bool, typer.Option("--remarks", help="Show what was left alone, and why.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the model after each pass.")] = None,
    reproducer: Annotated[Path | None, typer.Option(metavar="FILE.onnx", help="Written when a pass fails.")] = None,
    continue_without_failing: Continue = False,
    origins: Annotated[
        bool, typer.Option("--origins", help="Write into each node what it stands for, for compare --layers.")
    ] = False,
    keep: Annotated[list[str] | None, typer.Option(metavar="TENSOR", help="Make a tensor an output too.")] = None,
    extract: Annotated[
        str | None, typer.Option(metavar="A[,A2]:B[,B2]", help="Only what computes B from A; ':B' keeps the inputs.")
    ] = None,
    set_shape: Annotated[
        list[str] | None, typer.Option(metavar="INPUT=SHAPE", help="Declare an input anew, as x=Nx3x224x224.")
    ] = None,
    rename_dim: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a symbolic dimension, or fix it to a number.")
    ] = None,
    report: ReportFile = None,
) -> None:
    """Run passes alone: ONNX in, ONNX out."""
    from graphopt import equivalence, instruments, ir, verify
    from graphopt.backend import check_shapes
    from graphopt.evaluate import clock_of, evaluate_node
    from graphopt.evaluate import seconds as clock
    from graphopt.pass_base import Context
    from graphopt.target import Target

    if text and output != "-":
        raise UsageError("--text goes with -o -; a file gets ONNX text by its name: -o FILE.onnxtxt")
    if external_data and (output == "-" or output.endswith(".onnxtxt")):
        raise UsageError("--external-data needs a file, as in -o FILE.onnx")
    for place in (output, report, reproducer):
        check_place(place)
    pipeline = parse_pipeline(passes, level, "default")
    aim = None if target is None else Target.parse(target)
    ranges = parse_ranges(shape)
    loaded = load(model)
    verify.cycles(loaded)
    verify.operators(loaded, allow_domain or ())
    _change_interface(loaded, keep or (), extract, set_shape or (), rename_dim or ())
    check_shapes(loaded, ranges)
    feeds, samples = read_samples(data, loaded.inputs, pipeline, False)
    for sample in feeds or ():
        equivalence.check_feeds(loaded.inputs, sample)
    timing, statistics = instruments.Timing(), instruments.Statistics()
    stack: list[Instrument] = [instruments.Verify(), timing, statistics]
    if check:
        stack.append(instruments.FullCheck())
    stack += make_instruments(
        compare_each=compare_each,
        feeds=feeds,
        ranges=ranges,
        seed=seed,
        reproducer=reproducer,
        print_after_change=print_after_change,
        dump=dump,
    )
    recovery = None
    if continue_without_failing:
        from graphopt.recovery import Recovery

        recovery = Recovery(feeds=feeds, seed=seed, shapes=ranges, check=check, say=say)
    ctx = Context(target=aim, seed=seed, evaluate=evaluate_node, data=samples)
    ctx.clock = clock if aim is None else clock_of(aim)
    with stages("opt") as ctx.progress:
        result = pipeline.run(loaded, ctx, stack, recovery)
    if origins:
        from graphopt.layers import write_origins

        write_origins(result.model)
    if output == "-":
        to_stdout(result.model.text().encode() if text else ir.saves(result.model))
    else:
        ir.save(result.model, output, True if external_data else None)
    if time or print_after_change:
        table = Table("pass", "rewrites", "nodes", "wall s", "CPU s")
        for step, seconds, state in zip(result.steps, timing.times, statistics.history[1:], strict=True):
            table.add_row(
                step.pass_name,
                str(step.rewrites),
                str(state.nodes),
                f"{seconds.wall_seconds:.3f}",
                f"{seconds.cpu_seconds:.3f}",
            )
        err.print(table)
    if remarks:
        for remark in result.remarks:
            err.print(f"remark: {remark}", markup=False, soft_wrap=True)
    first, last = statistics.history[0], statistics.history[-1]
    err.print(
        f"{first.nodes} -> {last.nodes} nodes, {first.initializer_bytes:,} -> {last.initializer_bytes:,} bytes of weights, "
        f"{result.rewrites} rewrites, {len(result.remarks)} remarks",
        soft_wrap=True,
    )
    write_report(
        report,
        {
            "pipeline": str(pipeline),
            "passes": [
                {
                    "name": s.pass_name,
                    "rewrites": s.rewrites,
                    "nodes": c.nodes,
                    "wall_seconds": t.wall_seconds,
                    "cpu_seconds": t.cpu_seconds,
                }
                for s, t, c in zip(result.steps, timing.times, statistics.history[1:], strict=True)
            ],
            "nodes": {"before": first.nodes, "after": last.nodes},
            "weights": {"before": first.initializer_bytes, "after": last.initializer_bytes},
            "stops": list(result.stops),
            "dropped": [] if recovery is None else [d.as_dict() for d in recovery.dropped],
            "remarks": [str(r) for r in result.remarks],
            **({"pruning": result.facts["prune-channels"]} if "prune-channels" in result.facts else {}),
        },
    )


def _change_interface(
    model: Model, keep: Sequence[str], extract: str | None, set_shape: Sequence[str], rename_dim: Sequence[str]
) -> None:
    """Apply --rename-dim, --set-shape, --extract and --keep, in this order."""
    from graphopt import interface

    for text in rename_dim:
        old, separator, new = text.partition("=")
        if not separator or not old or not new:
            raise UsageError(f"--rename-dim {text!r}: expected OLD=NEW, as in N=batch or N=1")
        interface.rename_dim(model, old, int(new) if new.isdigit() else new)
    for text in set_shape:
        name, separator, dims = text.rpartition("=")
        if not separator or not name:
            raise UsageError(f"--set-shape {text!r}: expected INPUT=SHAPE, as in x=Nx3x224x224")
        interface.set_shape(model, name, [int(d) if d.isdigit() else d for d in dims.split("x")] if dims else [])
    if extract is not None:
        first, separator, last = extract.partition(":")
        if not separator or not last:
            raise UsageError(f"--extract {extract!r}: expected A:B, names of tensors joined by commas on each side")
        interface.extract(model, [n for n in first.split(",") if n], last.split(","))
    interface.keep(model, keep)
