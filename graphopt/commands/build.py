"""`graphopt build`: a model in, a bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.commands.arguments import (
    Continue,
    Domains,
    Level,
    ModelFile,
    PipelineText,
    ReportFile,
    Seed,
    Shapes,
    Threads,
    check_place,
    load,
    make_instruments,
    parse_pipeline,
    parse_ranges,
    read_samples,
    write_report,
)
from graphopt.commands.containment import contained
from graphopt.commands.terminal import bundle_table, out, progress_bar, say
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.pipeline import Pipeline


@contained(default=True)
def build(
    model: ModelFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The bundle's folder.")],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="TARGET", help="As ort:cpu or tensorrt-rtx:sm86+sm89; repeatable."),
    ] = None,
    shape: Shapes = None,
    passes: PipelineText = None,
    level: Level = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SAMPLES", help="One sample; or calibration samples: .npz, folder, module:callable."
        ),
    ] = None,
    prune: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Remove so much of the multiply-accumulates, as 0.3.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize for each target, with the samples of --data.")] = False,
    labels: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="int8: class numbers of the samples.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="int8: top1 (with labels) or agreement.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0.0, metavar="POINTS", help="int8: how much of the metric may be lost.")
    ] = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="int8: also layers that are slower in int8 here.")] = False,
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="Fail instead of building for ONNX Runtime.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the result against the original, into the manifest.")
    ] = False,
    threads: Threads = None,
    graph_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="ONNX Runtime: disabled, basic, extended, all.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=0, metavar="MIB", help="TensorRT: scratch memory in MiB.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(metavar="LEVEL", help="TensorRT: builder level, 0 to 5.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TensorRT: file to read tactics from and write them to.")
    ] = None,
    no_tf32: Annotated[bool, typer.Option("--no-tf32", help="TensorRT: full float32 in matrix products.")] = False,
    sparse_weights: Annotated[bool, typer.Option("--sparse-weights", help="TensorRT: 2:4 sparse kernels.")] = False,
    refit: Annotated[bool, typer.Option("--refit", help="TensorRT: weights can be replaced in the engine.")] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: runs in later versions.")
    ] = False,
    hardware_compatible: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="TensorRT: ampere-plus or same-compute-capability.")
    ] = None,
    allow_domain: Domains = None,
    seed: Seed = 0,
    compare_each: Annotated[bool, typer.Option("--compare-each", help="Compare the numbers after each pass.")] = False,
    reproducer: Annotated[Path | None, typer.Option(metavar="FILE.onnx", help="Written when a pass fails.")] = None,
    continue_without_failing: Continue = False,
    report: ReportFile = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE.html", help="Write a page that shows the build.")
    ] = None,
) -> None:
    """Optimize MODEL for each target and write a bundle: engines, ONNX Runtime models and a manifest."""
    from graphopt import building
    from graphopt.backend import BuildOptions
    from graphopt.target import Target

    for place in (report, html):
        if place is not None and output.resolve() not in place.resolve().parents:
            check_place(place)
    if html is not None:
        from graphopt import page

        page.check_available()
    ranges = parse_ranges(shape)
    targets = [Target.parse(t) for t in target] if target else None
    pipeline = _pruning(parse_pipeline(passes, level, "default"), prune, data)
    options = BuildOptions(
        shapes=ranges,
        threads=threads,
        graph_level=graph_level,
        workspace=None if workspace is None else workspace << 20,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        tf32=not no_tf32,
        sparse_weights=sparse_weights,
        refit=refit,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    loaded = load(model)
    feeds, samples = read_samples(data, loaded.inputs, pipeline, int8)
    wish = _int8_wish(int8, samples, labels, metric, max_drop, not no_gate)
    with progress_bar() as progress:
        bundle = building.build(
            loaded,
            output,
            targets,
            pipeline,
            options=options,
            feeds=feeds,
            data=samples,
            int8=wish,
            fallback=not no_fallback,
            measure=measure,
            seed=seed,
            allow_domains=allow_domain or (),
            say=say,
            progress=progress,
            instruments=make_instruments(
                compare_each=compare_each, feeds=feeds, ranges=ranges, seed=seed, reproducer=reproducer
            ),
            recover=continue_without_failing,
            html=html,
        )
    write_report(report, bundle.manifest)
    out.print(bundle_table(bundle.manifest, f"{output}/"))


def _pruning(pipeline: Pipeline, share: float | None, data: str | None) -> Pipeline:
    """The pipeline with pruning in front, of the simplified model: what targets fuse then fits the widths that are left."""
    from graphopt.pipeline import Pipeline

    if share is None:
        return pipeline
    if not 0 < share < 1:
        raise UsageError(f"--prune takes the share to remove, between 0 and 1, not {share:g}; as in --prune 0.3")
    if data is None:
        raise UsageError("--prune needs samples: --data calib.npz (input name -> samples on the first axis, no labels)")
    simplified = Pipeline.parse("O2") if len(pipeline.steps) > 1 else Pipeline()
    return simplified + Pipeline.parse(f"prune-channels{{ratio={share!r}}}") + pipeline


def _int8_wish(
    int8: bool, data: Any, labels: Path | None, metric: str | None, max_drop: float | None, gate: bool
) -> Any:
    """The options of ``--int8`` as one value, None without it."""
    if not int8:
        if labels is not None or metric is not None or max_drop is not None or not gate:
            raise UsageError("--labels, --metric, --max-drop and --no-gate belong to --int8; add it")
        return None
    from graphopt.int8 import Wish, load_labels

    if data is None:
        raise UsageError("--int8 needs calibration data: --data calib.npz (input name -> samples on the first axis)")
    if metric not in (None, "top1", "agreement"):
        raise UsageError(f"metric {metric!r} is neither top1 nor agreement")
    if metric == "top1" and labels is None:
        raise UsageError("--metric top1 needs --labels; without labels agreement with the float model is the metric")
    told = None if labels is None or metric == "agreement" else load_labels(labels, data)
    return Wish(told, max_drop, gate)
