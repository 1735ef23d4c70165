"""`graphopt sensitivity`: what int8 costs, layer by layer."""

from __future__ import annotations

from typing import Annotated

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
    """Say for each layer of the optimized MODEL whether it runs in int8 and in which kernel or why not, what that costs the outputs alone, and its time.

    The most sensitive layer comes first. With a TensorRT for RTX target an engine is built, whose kernels are looked at.
    """
    from graphopt.data import open_data
    from graphopt.int8 import before_quantizing, context
    from graphopt.int8_layers import examine
    from graphopt.target import Target

    check_place(report)
    pipeline = parse_pipeline(passes, level, "default")
    loaded = load(model)
    chosen = Target.parse(target)
    source = open_data(data, loaded.inputs)
    source.cache = cache_folder()
    with watched(source):
        optimized = before_quantizing(pipeline).run(loaded, context(chosen, source, seed)).model
        found = examine(optimized, chosen, source, seed=seed, limit=samples)
    if found.note:
        say(found.note)
    if source.count is not None and source.count < samples:
        say(f"{source.name} holds {source.count} samples, fewer than the {samples} that were to judge")

    def told(kernel: str) -> str:  # TensorRT's kernels are called after the layers, at length
        return f": {kernel}" if chosen.runtime == "ort" else ""

    table = Table("layer", "operator", "runs in", "outputs' SQNR, dB", "its own SQNR, dB", "us", "us in float")
    for one in found.layers:
        runs = "?" if one.int8 is None else f"int8{told(one.kernel)}" if one.int8 else f"float: {one.why}"
        numbers = (one.sqnr, one.own, one.microseconds, one.float_microseconds)
        table.add_row(
            escape(one.name),
            one.op,
            escape(runs),
            *("-" if n is None else f"{min(n, 200):.1f}" if i < 2 else f"{n:.0f}" for i, n in enumerate(numbers)),
        )
    out.print(table)
    listed = {one.name for one in found.layers}
    for remark in found.remarks:  # layers in bodies, which no table of kernels has
        if "stays float" in remark.text and not any(remark.node.startswith(repr(name)) for name in listed):
            say(str(remark))
    write_report(report, {"target": target, "note": found.note, "layers": [one.as_dict() for one in found.layers]})
