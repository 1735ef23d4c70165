"""`graphopt init`: a recipe to begin with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.commands.arguments import load
from graphopt.commands.terminal import err
from graphopt.errors import OutputError, UsageError

if TYPE_CHECKING:
    from graphopt.ir import TensorSpec


def init(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx or .onnxtxt file.")],
    recipe: Annotated[
        Path, typer.Option("--recipe", "-f", metavar="FILE", help="The file to write; it must not be there yet.")
    ] = Path("graphopt.toml"),
) -> None:
    """Write a commented graphopt.toml for MODEL: its inputs, what is dynamic, and the targets that can be built here."""
    loaded = load(str(model))
    if str(model) == "-":
        raise UsageError("a recipe names its model, so it cannot come from stdin; name the file")
    text = recipe_text(model, recipe, loaded.inputs, _targets())
    try:
        with recipe.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{str(recipe)!r} is there already; edit it, or name another with --recipe") from None
    except OSError as error:
        raise OutputError(
            f"cannot write {str(recipe)!r}: {error.strerror}; check the folder and its permissions"
        ) from None
    err.print(
        f"wrote {recipe}; `graphopt build{'' if recipe == Path('graphopt.toml') else f' -f {recipe}'}` runs it",
        markup=False,
    )


def _targets() -> list[tuple[str, str]]:
    """Target, and why it is left for later, if it is."""
    from graphopt.discovery import backend_for

    reasons = {runtime: backend_for(runtime)[1].availability(runtime).build for runtime in ("tensorrt", "tensorrt-rtx")}
    return [
        ("ort:cpu", ""),
        ("tensorrt-rtx:sm89", reasons["tensorrt-rtx"] or ""),
        ("tensorrt", reasons["tensorrt"] or ""),
    ]


def recipe_text(model: Path, recipe: Path, inputs: Sequence[TensorSpec], targets: Sequence[tuple[str, str]]) -> str:
    """The recipe, as TOML."""
    from graphopt.recipe import SCHEMA_FILE

    shown = Path(os.path.relpath(model.resolve().parent, recipe.resolve().parent)) / model.name
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", model.stem).strip("-") or "model"
    lines = [
        f"#:schema {SCHEMA_FILE.as_uri()}",
        "# Builds of this project: `graphopt build` runs them all, `graphopt build NAME` one of them. A key is the flag of `graphopt build`",
        "# without its dashes; paths are relative to this file. [defaults] holds keys for every build.",
        "",
        f"[build.{name}]",
        f"model = {_text(str(shown))}",
        f"output = {_text(f'out/{name}')}",
        "targets = [",
    ]
    for target, reason in targets:
        lines.append(f"  {_text(target)}," if not reason else f"  # {_text(target)},  # not here: {_one_line(reason)}")
    lines += ["]", *_inputs(inputs)]
    lines += [
        "",
        '# passes = "default"             # or O0 .. O3, or passes in sequence; `graphopt passes` lists them',
        '# data = "calib.npz"             # samples for the proof, for int8 and for pruning: input name -> samples on the first axis',
        "# int8 = true                    # quantize for each target; needs data",
        '# labels = "labels.npy"          # int8: class numbers of the samples',
        "# prune = 0.3                    # share of the multiply-accumulates to remove; needs data",
        "",
        "# What must hold, else nothing is written:",
        f"# [build.{name}.budget]",
        '# max-size = "25 MB"             # of the files of each variant',
        "# max-latency-ratio = 1.0        # time of the result over that of the original, under ONNX Runtime here",
        "# max-error = 1e-3               # relative to the largest magnitude of an output",
        "# max-drop = 0.5                 # int8: points of the metric",
    ]
    return "\n".join(lines) + "\n"


def _inputs(inputs: Sequence[TensorSpec]) -> list[str]:
    """The inputs as comments, and a range for those with dynamic dimensions, commented out where a dimension is a guess."""
    lines = ["", f"# Inputs: {', '.join(_one_line(str(spec)) for spec in inputs) or 'none'}"]
    dynamic = [s for s in inputs if s.shape and not all(isinstance(d, int) for d in s.shape)]
    if not dynamic:
        return lines
    named = dict.fromkeys(str(d) for s in dynamic for d in s.shape or () if not isinstance(d, int))
    lines.append(
        f"# Dynamic: {', '.join(map(_one_line, named))}. An engine is built for a range, MIN:OPT:MAX; mend this one and remove its '#':"
    )
    pairs = ", ".join(f"{_key(s.name)} = {_text(_range(s))}" for s in dynamic)
    lines.append(f"# shapes = {{ {pairs} }}")
    return lines


def _range(spec: TensorSpec) -> str:
    from graphopt.backend import ShapeRange, usual_bounds

    dims = spec.shape or ()
    bounds = [(d, d, d) if isinstance(d, int) else usual_bounds(axis, len(dims)) for axis, d in enumerate(dims)]
    low, opt, high = zip(*bounds, strict=True)
    return str(ShapeRange(low, opt, high))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: str) -> str:
    """A TOML string."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"a recipe is UTF-8 and cannot hold the name {value!r}; rename the file") from None
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
