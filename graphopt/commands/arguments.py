"""Arguments that several commands take: their declarations, and what is made of their texts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from graphopt.commands.terminal import err
from graphopt.errors import OutputError, UsageError

if TYPE_CHECKING:
    from graphopt.backend import ShapeRange
    from graphopt.ir import Model, TensorSpec
    from graphopt.pipeline import Instrument, Pipeline

_CALIBRATED: Final = ("quantize", "prune", "equalize", "cast-float")  # beginnings of the passes that look at samples

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
Continue = Annotated[
    bool,
    typer.Option(
        "--continue-without-failing",
        help="Leave out the single rewrites that fail (checks, numbers, exceptions), say so, and go on.",
    ),
]
TargetName = Annotated[
    str | None, typer.Option("--target", "-t", metavar="TARGET", help="Which variant; default: the best that runs.")
]


def not_nan(value: float | None) -> float | None:
    """Callback of numbers that have a range, which NaN is in for click, as it is below nothing."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


def load(name: str) -> Model:
    """The model in a file, or on stdin, as protobuf or as ONNX text."""
    from graphopt import ir, isolation

    with isolation.step("reading the model"):
        return ir.load(name) if name != "-" else _from_stdin()


def _from_stdin() -> Model:
    from graphopt import ir

    data = sys.stdin.buffer.read()
    if data.lstrip()[:1] == b"<" or (data[:256].isascii() and b"=>" in data[:65536]):
        return ir.parse(data.decode(errors="replace"))
    return ir.loads(data, "<stdin>")


def parse_pipeline(text: str | None, level: int | None, default: str) -> Pipeline:
    """The pipeline that ``-p`` or ``-O`` names, else the default."""
    from graphopt.pipeline import Pipeline

    if text is not None and level is not None:
        raise UsageError(
            "-O and --passes exclude each other; write the preset into the pipeline, as in -p 'O2,my-pass'"
        )
    return Pipeline.parse(f"O{level}" if level is not None else default if text is None else text)


def parse_ranges(texts: Sequence[str] | None) -> dict[str, ShapeRange]:
    """What ``--shape`` says, by input."""
    from graphopt.backend import ShapeRange

    ranges: dict[str, ShapeRange] = {}
    for text in texts or ():
        name, parsed = ShapeRange.parse(text)
        if name in ranges:
            raise UsageError(f"--shape names input {name!r} twice; give one range")
        ranges[name] = parsed
    return ranges


def read_arrays(path: Path | None, inputs: Sequence[TensorSpec]) -> list[dict[str, Any]] | None:
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


def read_samples(
    source: str | None, inputs: Sequence[TensorSpec], pipeline: Pipeline, calibrates: bool
) -> tuple[list[dict[str, Any]] | None, Any]:
    """What ``--data`` means: one sample of `inputs`, or, where something is to be calibrated, samples and the first of them."""
    if source is None:
        return None, None
    if not calibrates and not any(p.pass_name().startswith(_CALIBRATED) for p in pipeline.passes):
        return read_arrays(Path(source), inputs), None
    from graphopt.data import open_data

    data = open_data(source, inputs)
    data.cache = cache_folder()
    return [next(iter(data.feeds(1, 1)))], data


def cache_folder() -> Path | None:
    """Where calibration statistics are kept: in the user's cache, if there is one."""
    from graphopt.cache import Cache

    cache = Cache.of_user()
    return None if cache is None else cache.folder / "calibration"


def check_place(path: Path | str | None) -> None:
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


def write_report(path: Path | None, report: Any) -> None:
    """Write `report` as JSON to the place that ``--report`` names, if any."""
    if path is not None:
        from graphopt.ir import replacing

        with replacing(path) as file:
            file.write((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def make_instruments(
    *,
    compare_each: bool = False,
    feeds: Any = None,
    ranges: Any = None,
    seed: int = 0,
    reproducer: Path | None = None,
    print_after_change: bool = False,
    dump: Path | None = None,
) -> list[Instrument]:
    """The instruments that the options of ``opt`` and ``build`` ask for."""
    from graphopt import instruments

    chosen: list[Instrument] = []
    if reproducer is not None:
        chosen.append(instruments.Reproducer(reproducer, feeds, seed, ranges))
    if compare_each:
        chosen.append(instruments.Compare(feeds, seed, ranges))
    if print_after_change:
        chosen.append(instruments.PrintAfterChange(lambda text: err.print(text, markup=False, soft_wrap=True)))
    if dump is not None:
        chosen.append(instruments.Dump(dump))
    return chosen
