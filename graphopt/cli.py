"""The command line: arguments in, one call of the library, text out.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 a failed build or unequal models, 2 usage, 3 a bug in graphopt.
Nothing heavy is imported before a command needs it: `graphopt --help` loads neither onnx nor a runtime.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphopt.errors import GraphoptError, InternalError, OutputError, UsageError, UserError

if TYPE_CHECKING:
    from graphopt.backend import BuildOptions, Progress, ShapeRange
    from graphopt.bundle import BundleSession
    from graphopt.ir import Model, TensorSpec
    from graphopt.pipeline import Instrument, Pipeline
    from graphopt.target import Target

app = typer.Typer(
    name="graphopt",
    help="Optimize ONNX graphs; build TensorRT engines and ONNX Runtime models from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_WIDTH = 140  # columns of tables that go to a file or pipe
out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH)

ModelFile = Annotated[str, typer.Argument(metavar="MODEL", help="An .onnx or .onnxtxt file; '-' is stdin.")]
PipelineText = Annotated[
    str | None,
    typer.Option("--passes", "-p", metavar="PIPELINE", help="Passes in sequence, or a preset (O0..O3, default)."),
]
Level = Annotated[int | None, typer.Option("-O", min=0, max=3, metavar="LEVEL", help="Preset -O0 .. -O3.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=MIN[:OPT:MAX]", help="Range of an input, as x=1x3x8x8:8x3x8x8:32x3x8x8."),
]
DataFile = Annotated[Path | None, typer.Option("--data", metavar="FILE.npz", help="Inputs by name; one sample.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.json", help="Write all that was found as JSON.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of generated inputs.")]
Domains = Annotated[
    list[str] | None,
    typer.Option("--allow-domain", metavar="DOMAIN", help="Carry operators of a custom domain unread."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="Intra-op threads of ONNX Runtime.")]
TargetName = Annotated[
    str | None, typer.Option("--target", metavar="TARGET", help="Which variant; default: the best that runs.")
]


def main() -> None:
    """Run the command line and exit with its code."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line on `arguments` and return the exit code; what goes wrong is told on stderr, not raised."""
    try:
        code = app(args=list(arguments), prog_name="graphopt", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except UserError as error:
        _complain(error)
        return 2 if isinstance(error, UsageError) else 1
    except MemoryError:
        _complain(UserError("out of memory; the model or a value in it is too large for this machine"))
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        _mute_stdout()
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            return _unexpected(error)
        _mute_stdout()
        _complain(OutputError(f"cannot write the output: {error.strerror}; free some space or name another place"))
        return 1
    except (InternalError, GraphoptError) as error:
        traceback.print_exc()
        _complain(error)
        err.print(
            "this is a bug in graphopt or in a plug-in pass; --reproducer FILE writes what is needed to report it"
        )
        return 3
    except Exception as error:
        return _usage(error) if hasattr(error, "format_message") else _unexpected(error)


def _usage(error: Any) -> int:
    """Say what typer found wrong with the arguments; it bundles its own click, so its errors are known by their form."""
    shown = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(shown, file=sys.stderr)
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "graphopt"
    _complain(UsageError(f"{shown[:1].lower()}{' '.join(shown[1:].split()).rstrip('.')}; see {command} --help"))
    return 2


def _unexpected(error: Exception) -> int:
    traceback.print_exception(error)
    err.print(f"error: unexpected {type(error).__name__}; this is a bug in graphopt", markup=False)
    return 3


def _mute_stdout() -> None:
    """Let nothing that is still buffered fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: GraphoptError) -> None:
    err.print(f"error: {error}", markup=False, soft_wrap=True)
    for note in getattr(error, "__notes__", ()):
        err.print(note, markup=False, soft_wrap=True)


def _say(text: str) -> None:
    err.print(f"note: {text}", markup=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------- arguments


def _load(name: str) -> Model:
    from graphopt import ir

    if name != "-":
        return ir.load(name)
    data = sys.stdin.buffer.read()
    if data.lstrip()[:1] == b"<" or (data[:256].isascii() and b"=>" in data[:65536]):
        return ir.parse(data.decode(errors="replace"))
    return ir.loads(data, "<stdin>")


def _pipeline(text: str | None, level: int | None, default: str) -> Pipeline:
    from graphopt.pipeline import Pipeline

    if text is not None and level is not None:
        raise UsageError(
            "-O and --passes exclude each other; write the preset into the pipeline, as in -p 'O2,my-pass'"
        )
    return Pipeline.parse(f"O{level}" if level is not None else default if text is None else text)


def _ranges(texts: Sequence[str] | None) -> dict[str, ShapeRange]:
    from graphopt.backend import ShapeRange

    ranges: dict[str, ShapeRange] = {}
    for text in texts or ():
        name, parsed = ShapeRange.parse(text)
        if name in ranges:
            raise UsageError(f"--shape names input {name!r} twice; give one range")
        ranges[name] = parsed
    return ranges


def _arrays(path: Path | None, inputs: Sequence[TensorSpec]) -> list[dict[str, Any]] | None:
    """One sample for `inputs` from an .npz file, which keeps bfloat16 and its like as plain bytes.

    Raises:
        UsageError: the file cannot be read, or holds pickled objects.
    """
    import zipfile
    import zlib

    import ml_dtypes
    import numpy as np

    if path is None:
        return None
    what = f"--data {str(path)!r}"
    try:
        with zipfile.ZipFile(path) as archive:
            feeds = {}
            for name in archive.namelist():
                with archive.open(name) as file:
                    feeds[name.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
        for spec in inputs:
            array = feeds.get(spec.name)
            if array is not None and array.dtype.kind == "V" and spec.dtype is not None:
                feeds[spec.name] = array.view(np.dtype(getattr(ml_dtypes, spec.dtype, spec.dtype)))
        return [feeds]
    except OSError as error:
        raise UsageError(f"cannot read {what}: {error.strerror or error}; name an .npz file of inputs") from None
    except zipfile.BadZipFile:
        raise UsageError(f"{what} is no .npz file; write it with np.savez(file, NAME=array)") from None
    except ValueError as error:
        why = "an array of Python objects" if "allow_pickle" in str(error) else str(error)
        raise UsageError(f"{what} holds {why}; write plain arrays with np.savez(file, NAME=array)") from None
    except (EOFError, KeyError, zlib.error, NotImplementedError) as error:
        raise UsageError(f"{what} is damaged ({error}); write it again with np.savez") from None


def _samples(
    source: str | None, inputs: Sequence[TensorSpec], pipeline: Pipeline, calibrates: bool
) -> tuple[list[dict[str, Any]] | None, Any]:
    """What ``--data`` means: one sample of `inputs`, or, where something is to be calibrated, samples and the first of them."""
    if source is None:
        return None, None
    if not calibrates and not any(p.pass_name().startswith(("quantize", "prune")) for p in pipeline.passes):
        return _arrays(Path(source), inputs), None
    from graphopt.data import open_data

    data = open_data(source, inputs)
    return [next(iter(data.feeds(1, 1)))], data


def _pruning(pipeline: Pipeline, share: float | None, data: str | None) -> Pipeline:
    """The pipeline with pruning behind it, where ``--prune`` asks for it."""
    from graphopt.pipeline import Pipeline

    if share is None:
        return pipeline
    if not 0 < share < 1:
        raise UsageError(f"--prune takes the share to remove, between 0 and 1, not {share:g}; as in --prune 0.3")
    if data is None:
        raise UsageError("--prune needs samples: --data calib.npz (input name -> samples on the first axis, no labels)")
    return pipeline + Pipeline.parse(f"prune-channels{{ratio={share!r}}}")


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


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz file, whatever the arrays are called; strings become fixed-width, so that no pickle is needed.

    Raises:
        UsageError: an output is no tensor.
    """
    import zipfile

    import numpy as np

    from graphopt.ir import replacing

    with replacing(path) as target, zipfile.ZipFile(target, "w") as archive:
        for name, value in arrays.items():
            if not isinstance(value, np.ndarray | np.generic):
                raise UsageError(f"output {name!r} is no tensor, and an .npz file holds tensors alone; leave out -o")
            array = np.asarray(value)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(
                    file, array.astype(str) if array.dtype == object else array, allow_pickle=False
                )


def _check_place(path: Path | str | None) -> None:
    """Complain before the work, not after it, about a file that cannot be written."""
    if path is None or str(path) == "-":
        return
    file = Path(path)
    if not file.parent.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: {str(file.parent)!r} is no folder; make it first")
    if file.exists() and not file.is_file():  # a device would be replaced by a file
        raise OutputError(
            f"cannot write {str(path)!r}: it is no file; name one, or '-' for stdout where that is offered"
        )


def _write_report(path: Path | None, report: Any) -> None:
    if path is not None:
        from graphopt.ir import replacing

        with replacing(path) as file:
            file.write((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def _progress_bar() -> Iterator[Any]:
    """Gives a function Target -> progress callback; the bar shows on a terminal only."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[target]}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:

        def for_target(target: Target) -> Progress:
            task = bar.add_task("starting", total=1.0, target=str(target))

            def update(phase: str, share: float) -> bool:
                bar.update(task, completed=share, description=escape(phase))
                return True

            return update  # type: ignore[return-value]  # our Progress, not Rich's

        yield for_target


# -------------------------------------------------------------------------------------------------------- commands


@app.command(short_help="Optimize a model for targets; write a bundle.")
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
    report: ReportFile = None,
) -> None:
    """Optimize MODEL for each target and write a bundle: engines, ONNX Runtime models and a manifest."""
    from graphopt import building
    from graphopt.backend import BuildOptions
    from graphopt.target import Target

    if report is not None and output.resolve() not in report.resolve().parents:
        _check_place(report)
    ranges = _ranges(shape)
    targets = [Target.parse(t) for t in target] if target else None
    pipeline = _pruning(_pipeline(passes, level, "default"), prune, data)
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
    loaded = _load(model)
    feeds, samples = _samples(data, loaded.inputs, pipeline, int8)
    wish = _int8_wish(int8, samples, labels, metric, max_drop, not no_gate)
    with _progress_bar() as progress:
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
            say=_say,
            progress=progress,
            instruments=_instruments(
                compare_each=compare_each, feeds=feeds, ranges=ranges, seed=seed, reproducer=reproducer
            ),
        )
    _write_report(report, bundle.manifest)
    out.print(bundle_table(bundle.manifest, f"{output}/"))


def bundle_table(manifest: Any, title: str) -> Table:
    """The variants of a bundle as a Rich table."""
    table = Table(title=escape(title), title_justify="left")
    for heading in ("target", "file"):
        table.add_column(heading, overflow="fold")
    for heading in ("MB", "nodes", "max abs diff", "latency", "kernels"):
        table.add_column(heading, justify="right")
    for variant in manifest["variants"]:
        proof, latency = variant["proof"], variant.get("latency")
        table.add_row(
            variant["target"],
            ", ".join(f["name"] for f in variant["files"]),
            f"{sum(f['bytes'] for f in variant['files']) / 1e6:.2f}",
            f"{variant['nodes']['before']} -> {variant['nodes']['after']}",
            "not proven" if "unproven" in proof else f"{proof['max_abs']:.2g}",
            f"x{latency['ratio']:.2f} ({latency['verdict']})" if latency else "-",
            str(len(variant["kernels"])) if variant["kernels"] else "-",
        )
    return table


def _instruments(
    *,
    compare_each: bool = False,
    feeds: Any = None,
    ranges: Any = None,
    seed: int = 0,
    reproducer: Path | None = None,
    print_after_change: bool = False,
    dump: Path | None = None,
) -> list[Instrument]:
    from graphopt import instruments

    chosen: list[Instrument] = []
    if reproducer is not None:
        chosen.append(instruments.Reproducer(reproducer))
    if compare_each:
        chosen.append(instruments.Compare(feeds, seed, ranges))
    if print_after_change:
        chosen.append(instruments.PrintAfterChange(lambda text: err.print(text, markup=False, soft_wrap=True)))
    if dump is not None:
        chosen.append(instruments.Dump(dump))
    return chosen


@app.command()
def opt(
    model: ModelFile,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help=".onnx, .onnxtxt (text), or '-' for stdout.")
    ],
    passes: PipelineText = None,
    level: Level = None,
    text: Annotated[bool, typer.Option("--text", help="With -o -: ONNX text instead of protobuf.")] = False,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Weights into FILE.data beside the model.")
    ] = False,
    allow_domain: Domains = None,
    shape: Shapes = None,
    data: DataFile = None,
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
    from graphopt.evaluate import evaluate_node
    from graphopt.pass_base import Context

    if text and output != "-":
        raise UsageError("--text goes with -o -; a file gets ONNX text by its name: -o FILE.onnxtxt")
    if external_data and (output == "-" or output.endswith(".onnxtxt")):
        raise UsageError("--external-data needs a file, as in -o FILE.onnx")
    for place in (output, report, reproducer):
        _check_place(place)
    pipeline = _pipeline(passes, level, "default")
    ranges = _ranges(shape)
    loaded = _load(model)
    verify.cycles(loaded)
    verify.operators(loaded, allow_domain or ())
    _change_interface(loaded, keep or (), extract, set_shape or (), rename_dim or ())
    feeds, samples = _samples(None if data is None else str(data), loaded.inputs, pipeline, False)
    for sample in feeds or ():
        equivalence.check_feeds(loaded.inputs, sample)
    timing, statistics = instruments.Timing(), instruments.Statistics()
    stack: list[Instrument] = [instruments.Verify(), timing, statistics]
    if check:
        stack.append(instruments.FullCheck())
    stack += _instruments(
        compare_each=compare_each,
        feeds=feeds,
        ranges=ranges,
        seed=seed,
        reproducer=reproducer,
        print_after_change=print_after_change,
        dump=dump,
    )
    result = pipeline.run(loaded, Context(seed=seed, evaluate=evaluate_node, data=samples), stack)
    if output == "-":
        _to_stdout(result.model.text().encode() if text else ir.saves(result.model))
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
    _write_report(
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
            "remarks": [str(r) for r in result.remarks],
        },
    )


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


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


@app.command()
def explain(
    model: ModelFile,
    node: Annotated[str, typer.Argument(metavar="NODE", help="A node, or a tensor that it computes.")],
    passes: PipelineText = None,
    level: Level = None,
) -> None:
    """Say what became of a node, and why no pass did more."""
    from graphopt import verify
    from graphopt.explain import explain as explained

    loaded = _load(model)
    verify.cycles(loaded)
    found = explained(loaded, node, _pipeline(passes, level, "default"))
    out.print(f"{found.node!r} ({found.op}): {found.fate}", markup=False, soft_wrap=True)
    table = Table("pass", "why it did not do more")
    for finding in found.findings:
        table.add_row(finding.pass_name, escape(finding.text))
    if found.findings:
        out.print(table)
    else:
        out.print("no pass came near it")


@app.command()
def passes(name: Annotated[str | None, typer.Argument(metavar="NAME", help="A pass, or a preset.")] = None) -> None:
    """List the passes, or explain one."""
    import dataclasses
    import inspect

    from graphopt.discovery import find_pass, pass_modules
    from graphopt.pipeline import PRESETS, Pipeline, value_text

    if name is None:
        table = Table("pass", "class", "what it does", title="passes", title_justify="left")
        for known in pass_modules():
            kind = find_pass(known)
            table.add_row(known, kind.exactness.value, escape(kind.summary()))
        out.print(table)
        presets = Table("preset", "passes", title="presets", title_justify="left")
        for preset in PRESETS:
            presets.add_row(preset, escape(str(Pipeline.parse(preset)) or "none"))
        out.print(presets)
        out.print("class: A exact, bitwise; B floating-point re-association; C approximate")
        return
    if name in PRESETS:
        out.print(str(Pipeline.parse(name)), markup=False, soft_wrap=True)
        return
    kind = find_pass(name)
    out.print(f"{name}: {inspect.cleandoc(kind.__doc__ or '')}\n", markup=False, soft_wrap=True)
    options = dataclasses.fields(kind)
    if options:
        table = Table("option", "type", "default", title="options", title_justify="left")
        for option in options:
            kind_text = (
                option.type if isinstance(option.type, str) else getattr(option.type, "__name__", str(option.type))
            )
            table.add_row(option.name.replace("_", "-"), escape(str(kind_text)), escape(value_text(option.default)))
        out.print(table)


@app.command("backends", short_help="Say what can be built and run here.")
def list_backends() -> None:
    """Say what can be built and run on this machine, and why not."""
    from graphopt.discovery import backends

    table = Table("target", "backend", "version", "builds here", "runs here", "devices")
    for name, backend in backends().items():
        for runtime in backend.runtimes:
            state = backend.availability(runtime)
            table.add_row(
                runtime,
                name,
                state.version or "-",
                "yes" if state.build is None else escape(f"no: {state.build}"),
                "yes" if state.run is None else escape(f"no: {state.run}"),
                escape(", ".join(state.devices)) or "-",
            )
    out.print(table)


@app.command()
def inspect(
    model: ModelFile,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a model or a bundle holds."""
    if model != "-" and Path(model).is_dir():
        from graphopt.bundle import Bundle

        bundle = Bundle.load(model)
        if as_json:
            print(json.dumps(bundle.manifest, indent=2, ensure_ascii=False))
        else:
            out.print(bundle_table(bundle.manifest, model))
        damaged = bundle.damaged()
        if damaged:
            raise UserError(f"{model!r} is damaged: {', '.join(damaged)} differ from the manifest; build it again")
        return
    from graphopt.report import summary

    facts = summary(_load(model))
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    table = Table(show_header=False, title=escape(model), title_justify="left")
    for key in (
        "producer",
        "ir_version",
        "opsets",
        "nodes",
        "parameters",
        "macs",
        "weight_bytes",
        "dynamic_dims",
        "functions",
    ):
        value = facts[key]
        shown = ", ".join(f"{k or 'ai.onnx'} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        shown = (
            ", ".join(shown) or "none" if isinstance(shown, list) else f"{shown:,}" if isinstance(shown, int) else shown
        )
        table.add_row(key.replace("_", " "), escape(str(shown)))
    for kind in ("inputs", "outputs"):
        for spec in facts[kind]:
            table.add_row(kind[:-1], escape(spec["text"]))
    out.print(table)
    operators = Table("operator", "count")
    for op, count in facts["operators"].items():
        operators.add_row(op, str(count))
    out.print(operators)


@app.command(short_help="Show which channels can be removed, and what keeps the others.")
def groups(model: ModelFile, passes: PipelineText = None, level: Level = None, report: ReportFile = None) -> None:
    """Show the groups of channels of the optimized MODEL that pruning removes together, and why others have to stay."""
    from graphopt import verify
    from graphopt.analyses.channel_groups import channel_groups
    from graphopt.evaluate import evaluate_node
    from graphopt.pass_base import Context

    _check_place(report)
    pipeline = _pipeline(passes, level, "default")
    loaded = _load(model)
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
    _write_report(report, {"groups": listed, "blocked": blocked})


@app.command(short_help="Say what int8 costs, layer by layer.")
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

    _check_place(report)
    pipeline = _pipeline(passes, level, "default")
    loaded = _load(model)
    chosen = Target.parse(target)
    source = open_data(data, loaded.inputs)
    optimized = pipeline.run(loaded, Context(target=chosen, seed=seed, evaluate=evaluate_node)).model
    found = int8.sensitivity(optimized, chosen, source, seed=seed, limit=samples)
    table = Table("layer", "operator", "outputs' SQNR, dB")
    for one in found:
        table.add_row(escape(one.name), one.op, f"{one.sqnr:.1f}")
    out.print(table)
    _write_report(report, {"target": target, "layers": [one.as_dict() for one in found]})


@app.command(short_help="Run two models on the same inputs.")
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

    _check_place(report)
    ranges = _ranges(shape)
    reference, candidate = _load(first), _load(second)
    check_shapes(reference, ranges)
    feeds = _arrays(data, reference.inputs)
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
    _write_report(report, {"equal": found.equal, "tolerance": tolerance, "samples": found.samples, "outputs": rows})
    found.require(f"{first} and {second}")
    err.print(f"equal within {tolerance:g} on {found.samples} samples ({found.engine})")


@app.command("run", short_help="Run a bundle or a model on this machine.")
def run_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or an .onnx file.")],
    data: DataFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.npz", help="Write the outputs.")
    ] = None,
    target: TargetName = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Run a bundle on this machine; without --data on generated inputs."""
    import numpy as np

    _check_place(output)
    session = _open(bundle, target, threads)
    feeds = (_arrays(data, session.inputs) or [_generated(session, seed, None)])[0]
    results = _first_run(session, feeds, data is None)
    table = Table("output", "dtype", "shape", "min", "mean", "max")
    for name, value in results.items():
        if not isinstance(value, np.ndarray | np.generic):
            table.add_row(
                escape(name), type(value).__name__, "-" if value is None else f"{len(value)} elements", "-", "-", "-"
            )
            continue
        array = np.asarray(value)
        numeric = array.size > 0 and (array.dtype.kind in "fiu" or array.dtype.name == "bfloat16")
        figures = [f"{f(array.astype(np.float64)):.5g}" for f in (np.min, np.mean, np.max)] if numeric else ["-"] * 3
        table.add_row(escape(name), str(array.dtype), str(list(array.shape)), *figures)
    out.print(table)
    if output is not None:
        _write_arrays(output, results)


def _open(path: Path, target: str | None, threads: int | None, spinning: bool = True) -> BundleSession:
    from graphopt import bundle
    from graphopt.backend import BuildOptions

    options: BuildOptions = BuildOptions(threads=threads, spinning=spinning)
    session = bundle.open(path, target, options)
    for reason in session.skipped:
        _say(f"passed over {reason}")
    return session


def _generated(session: BundleSession, seed: int, ranges: dict[str, ShapeRange] | None) -> dict[str, Any]:
    from graphopt import equivalence
    from graphopt.backend import takes_values
    from graphopt.building import value_array
    from graphopt.ir import TensorSpec

    variant = session.variant
    known = {**(variant.shapes if variant else {}), **(ranges or {})}
    values = {s.name: s for s in session.inputs if s.name in known and takes_values(s, known[s.name])}
    shapes = {name: wanted.opt for name, wanted in known.items() if name not in values}
    specs = [TensorSpec(s.name, s.dtype, shapes.get(s.name, s.shape)) for s in session.inputs]
    feeds = equivalence.generate_inputs(specs, seed=seed)
    return feeds | {name: value_array(spec, known[name].opt) for name, spec in values.items()}


def _first_run(session: BundleSession, feeds: Mapping[str, Any], generated: bool) -> dict[str, Any]:
    try:
        return session.run(feeds)
    except UsageError as error:
        if generated:
            raise UsageError(f"{error}; these inputs were generated, give others with --data FILE.npz") from None
        raise


@app.command(short_help="Time bundles and models side by side.")
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

    ranges = _ranges(shape)
    sessions: dict[str, BundleSession] = {}
    for path in contestants:
        name = str(path) if str(path) not in sessions else f"{path} ({len(sessions) + 1})"
        sessions[name] = _open(path, target if path.is_dir() else None, threads, spinning=False)
    first = next(iter(sessions.values()))
    feeds = (_arrays(data, first.inputs) or [_generated(first, seed, ranges)])[0]
    runs = {name: functools.partial(session.run, feeds) for name, session in sessions.items()}
    for session in sessions.values():
        _first_run(session, feeds, data is None)
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
    _write_report(report, {"rows": [row.as_dict() for row in rows], "timings": timings.as_dict()})


if __name__ == "__main__":
    main()
