"""`graphopt sensitivity`: what int8 costs, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    Level,
    ModelFile,
    PipelineText,
    ReportFile,
    Seed,
    cache_folder,
    check_place,
    load,
    parse_pipeline,
    write_report,
)
from graphopt.commands.terminal import out, say, watched

if TYPE_CHECKING:
    pass


def sensitivity(
    model: ModelFile,
    data: Annotated[str, typer.Option("--data", metavar="SAMPLES", help="Calibration samples, as for build --int8.")],
    target: Annotated[str, typer.Option("--target", "-t", metavar="TARGET", help="Decides the codes.")] = "ort:cpu",
    passes: PipelineText = None,
    level: Level = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="How many samples judge.")] = 64,
    seed: Seed = 0,
    report: ReportFile = None,
) -> None:
    """Quantize each layer of the optimized MODEL alone and compare the outputs; the most sensitive layer comes first."""
    from graphopt import int8
    from graphopt.data import open_data
    from graphopt.evaluate import evaluate_node
    from graphopt.pass_base import Context
    from graphopt.target import Target

    check_place(report)
    pipeline = parse_pipeline(passes, level, "default")
    loaded = load(model)
    chosen = Target.parse(target)
    source = open_data(data, loaded.inputs)
    source.cache = cache_folder()
    context = Context(target=chosen, seed=seed, evaluate=evaluate_node, data=source)
    with watched(source):
        optimized = pipeline.run(loaded, context).model
        found = int8.sensitivity(optimized, chosen, source, seed=seed, limit=samples)
    for remark in context.remarks if not found else ():
        say(str(remark))
    table = Table("layer", "operator", "outputs' SQNR, dB", "its own SQNR, dB")
    for one in found:
        own = "-" if one.own is None else f"{one.own:.1f}"
        table.add_row(escape(one.name), one.op, f"{one.sqnr:.1f}", own)
    out.print(table)
    write_report(report, {"target": target, "layers": [one.as_dict() for one in found]})
