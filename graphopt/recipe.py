"""Recipes: ``graphopt.toml``, all builds of a project in one file.

    [defaults]                       keys for every build
    [build.NAME]                     one build; its keys are the flags of `graphopt build` without their dashes
    [build.NAME.budget]              what must hold for the bundle to be written

`Settings` is both what a recipe's table and what the flags of a command say; its fields are the only list of keys there is, and
``recipe.schema.json`` is generated from it. Nothing heavy is imported here: a build with nothing to do must end at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from graphopt.errors import ShapeError, UsageError
from graphopt.target import Target

RECIPE: Final = "graphopt.toml"
SCHEMA_FILE: Final = Path(__file__).with_name("recipe.schema.json")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)?", re.ASCII)
_UNITS: Final = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}  # fmt: skip
_NAME: Final = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


class RecipeError(UsageError):
    """A recipe does not parse, or a key of it is wrong; the message names file, line and key."""


@dataclass(frozen=True)
class Budget:
    """What a bundle must keep to; a build that does not fails and leaves the earlier bundle."""

    max_size: Annotated[str | None, "Bytes of the files of each variant at most, as in '25 MB' or '8 MiB'."] = None
    max_latency_ratio: Annotated[
        float | None, "Time of each ONNX Runtime variant over that of the original, at most; the build measures it."
    ] = None
    max_error: Annotated[
        float | None, "Largest difference from the original, relative to the largest magnitude of an output."
    ] = None
    max_drop: Annotated[float | None, "int8: points of the metric that may be lost at most."] = None

    @property
    def max_bytes(self) -> int | None:
        """`max_size` as a number."""
        return None if self.max_size is None else parse_size(self.max_size)


@dataclass(frozen=True)
class Settings:
    """One build: what `graphopt build` is told, by flags or by a recipe. Paths are as the working folder sees them."""

    model: Annotated[Path, "The .onnx or .onnxtxt file."] = Path()
    output: Annotated[Path, "The bundle's folder; default: out/NAME."] = Path()
    targets: Annotated[
        tuple[str, ...],
        "As in 'ort:cpu' and 'tensorrt-rtx:sm86+sm89'; none: the best engine that can be built here, and ort:cpu.",
    ] = ()
    passes: Annotated[str | None, "Passes in sequence, or a preset (O0 .. O3, default)."] = None
    level: Annotated[int | None, "Preset O0 .. O3 by its number; excludes passes."] = None
    shapes: Annotated[
        Mapping[str, str], "Input to its shape, or MIN:OPT:MAX of a dynamic one, as in '1x3x8x8:8x3x8x8:32x3x8x8'."
    ] = field(default_factory=dict)
    data: Annotated[str | None, "One sample, or calibration samples: .npz, .npy, folder, module:callable."] = None
    depends: Annotated[
        tuple[str, ...], "Further files whose change makes the build run again, as patterns ('images/*.png')."
    ] = ()
    prune: Annotated[float | None, "Share of the multiply-accumulates to remove, between 0 and 1."] = None
    int8: Annotated[bool, "Quantize for each target, with the samples of data."] = False
    labels: Annotated[Path | None, "int8: .npy file of the samples' class numbers."] = None
    metric: Annotated[Literal["top1", "agreement"] | None, "int8: what max-drop counts."] = None
    max_drop: Annotated[
        float | None, "int8: points of the metric that may be lost; where it cannot hold, the best found is built."
    ] = None
    gate: Annotated[bool, "int8: leave in float the layers that are slower in int8 on this machine."] = True
    fallback: Annotated[bool, "Build for ONNX Runtime, saying so, where a target cannot be built."] = True
    measure: Annotated[bool, "Time the result against the original, into the manifest."] = False
    seed: Annotated[int, "Of generated inputs."] = 0
    continue_without_failing: Annotated[bool, "Leave out single rewrites that fail, say so, and go on."] = False
    allow_domains: Annotated[tuple[str, ...], "Custom operator domains to carry unread."] = ()
    threads: Annotated[int | None, "ONNX Runtime: intra-op threads."] = None
    graph_level: Annotated[
        Literal["disabled", "basic", "extended", "all"] | None, "ONNX Runtime: its own optimization."
    ] = None
    workspace: Annotated[int | None, "TensorRT: scratch memory in MiB."] = None
    optimization_level: Annotated[int | None, "TensorRT: builder level, 0 to 5."] = None
    timing_cache: Annotated[Path | None, "TensorRT: file to read tactics from and write them to."] = None
    tf32: Annotated[bool, "TensorRT: TF32 in matrix products of float32."] = True
    sparse_weights: Annotated[bool, "TensorRT: 2:4 sparse kernels."] = False
    refit: Annotated[bool, "TensorRT: weights can be replaced in the engine."] = False
    version_compatible: Annotated[bool, "TensorRT: the engine runs in later versions."] = False
    hardware_compatible: Annotated[
        Literal["ampere-plus", "same-compute-capability"] | None, "TensorRT: which other GPUs the engine must run on."
    ] = None
    budget: Annotated[Budget, "What must hold for the bundle to be written."] = field(default_factory=Budget)

    def overridden(self, **flags: Any) -> Settings:
        """These settings with the flags that were given, which are those that are not None."""
        given = {name: value for name, value in flags.items() if value is not None}
        if "passes" in given:
            given.setdefault("level", None)
        elif "level" in given:
            given["passes"] = None
        if "shapes" in given:
            given["shapes"] = {**self.shapes, **given["shapes"]}
        return replace(self, **given)

    def as_table(self) -> dict[str, Any]:
        """These settings as `of_table` reads them, paths included."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != _default(f)}
        return {_spelled(k): str(v) if isinstance(v, Path) else _plain(v) for k, v in given.items()}

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> Settings:
        """Settings from the keys of a recipe's table; paths are relative to the working folder.

        Raises:
            RecipeError: a key is unknown or has a value that does not fit.
        """
        return _Reader(Path(RECIPE), {}).settings(dict(table), (), cls())

    def request(self) -> dict[str, Any]:
        """What the build was asked for, as JSON: the keys that are not at their defaults, and no path of a file."""
        found: dict[str, Any] = {}
        for item in fields(self):
            value, default = getattr(self, item.name), _default(item)
            if item.name in ("model", "output", "labels", "data", "depends") or value == default:
                continue
            found[_spelled(item.name)] = _plain(value)
        if self.data is not None and is_callable(self.data):
            found["data"] = self.data
        return found


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _plain(value: Any) -> Any:
    if isinstance(value, Budget):
        return {_spelled(f.name): v for f in fields(value) if (v := getattr(value, f.name)) is not None}
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(sorted(value.items()))
    return value.name if isinstance(value, Path) else value


def is_callable(data: str) -> bool:
    """Whether ``data`` names Python, as ``module:callable``, and no file."""
    module, separator, attribute = data.partition(":")
    named = module.replace(".", "").isidentifier() and attribute.replace(".", "").isidentifier()
    return bool(separator) and named and not Path(data).exists()


def parse_size(text: str) -> int:
    """Bytes, from a text as ``25 MB``.

    Raises:
        ValueError: it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write a number and B, kB, MB, GB, KiB, MiB or GiB, as in '25 MB'")
    return round(float(match[1]) * _UNITS[match[2] or "B"])


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Recipe:
    """A recipe file, read and checked."""

    path: Path
    builds: Mapping[str, Settings]

    def chosen(self, names: Sequence[str]) -> dict[str, Settings]:
        """The builds of these names, in the order of the file; all where none is named.

        Raises:
            UsageError: there is no build of a name.
        """
        for name in names:
            if name not in self.builds:
                near = _near(name, self.builds)
                raise UsageError(f"{str(self.path)!r} has no build {name!r}{near}; it has {', '.join(self.builds)}")
        return {name: settings for name, settings in self.builds.items() if not names or name in names}


def load(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe; paths in it are relative to its folder.

    Raises:
        RecipeError: it cannot be read, is no TOML, or a key is unknown, missing or has a value that does not fit.
    """
    file = Path(path)
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe {str(file)!r}: {error.strerror}; `graphopt init MODEL` writes one"
        ) from None
    except UnicodeDecodeError:
        raise RecipeError(f"the recipe {str(file)!r} is not UTF-8 text; save it as UTF-8") from None
    try:
        tables = tomllib.loads(f"{text}\n#")  # so that no complaint is of the 'end of document'
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        told = str(error) or "tables nested too deeply"
        told = re.sub(r"^(.*) \(at (.*)\)$", r"\2: \1", told)
        raise RecipeError(f"{file}: {told[:1].lower()}{told[1:]}; the file is no TOML") from None
    return _Reader(file, _lines(text)).read(tables)


class _Reader:
    """Turns tables into settings; every complaint knows the line of its key."""

    def __init__(self, file: Path, lines: Mapping[tuple[str, ...], int]) -> None:
        self.file, self.lines = file, lines

    def fail(self, where: tuple[str, ...], message: str) -> RecipeError:
        line = next((self.lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in self.lines), 1)
        name = f"{_dotted(where)}: " if where else ""
        return RecipeError(f"{self.file}:{line}: {name}{message}")

    def read(self, tables: dict[str, Any]) -> Recipe:
        self.known(tables, ("defaults", "build"), ())
        given = tables.get("build")
        if not isinstance(given, dict) or not given:
            raise self.fail(("build",) if given is not None else (), "a recipe needs a table [build.NAME]")
        shared = tables.get("defaults", {})
        base = self.settings(shared, ("defaults",), Settings())
        builds: dict[str, Settings] = {}
        for name, table in given.items():
            where = ("build", name)
            if not _NAME.fullmatch(name):
                raise self.fail(where, "a build's name is made of letters, digits, '_', '-' and '.'")
            built = self.settings(table, where, base)
            if "model" not in table and "model" not in shared:
                raise self.fail(where, 'lacks the key model; add model = "FILE.onnx"')
            if "output" not in table:
                built = replace(built, output=self.file.parent / "out" / name)
            self.sense(built, where)
            builds[name] = built
        if "output" in shared and len(given) > 1:
            raise self.fail(("defaults", "output"), "several builds cannot share one folder; give each its own")
        self.places(builds)
        return Recipe(self.file, builds)

    def known(self, table: Mapping[str, Any], keys: Sequence[str], where: tuple[str, ...]) -> None:
        for key in table:
            if key not in keys:
                near = _near(key.replace("_", "-"), keys)
                raise self.fail((*where, key), f"unknown key{near}; known here: {', '.join(keys)}")

    def settings(self, table: Any, where: tuple[str, ...], base: Settings) -> Settings:
        return self.table(table, where, base)  # type: ignore[no-any-return]

    def table(self, table: Any, where: tuple[str, ...], base: Any) -> Any:
        """`base` with the keys of `table`, which are the fields of its class."""
        if not isinstance(table, dict):
            raise self.fail(where, f"is {_kind(table)}, and must be a table of keys")
        kind = type(base)
        wanted = typing.get_type_hints(kind)
        self.known(table, [_spelled(f.name) for f in fields(kind)], where)
        found = {}
        for key, value in table.items():
            name = key.replace("-", "_")
            place = (*where, key)
            if wanted[name] is Budget:
                found[name] = self.table(value, place, base.budget)
                continue
            try:
                found[name] = _convert(value, wanted[name])
                _check(name, found[name])
            except (ValueError, UsageError) as error:
                raise self.fail(place, str(error)) from None
            if wanted[name] in (Path, Path | None):
                if not str(value) or "\0" in str(value):
                    raise self.fail(place, f"{value!r} is no path")
                found[name] = self.file.parent / found[name]
        if isinstance(found.get("data"), str) and not is_callable(found["data"]):
            found["data"] = str(self.file.parent / found["data"])
        if "depends" in found:
            found["depends"] = tuple(str(self.file.parent / pattern) for pattern in found["depends"])
        if "passes" in found and "level" in found:
            raise self.fail((*where, "level"), "excludes passes; write the preset into passes, as in 'O2,my-pass'")
        if "passes" in found:
            found["level"] = None
        elif "level" in found:
            found["passes"] = None
        return replace(base, **found)

    def sense(self, settings: Settings, where: tuple[str, ...]) -> None:
        """What one key alone cannot tell."""
        if (settings.int8 or settings.prune is not None) and settings.data is None:
            key = "int8" if settings.int8 else "prune"
            raise self.fail((*where, key), 'needs samples: data = "calib.npz"')
        if not settings.int8:
            for name in ("labels", "metric", "max_drop"):
                if getattr(settings, name) is not None:
                    raise self.fail((*where, _spelled(name)), "belongs to int8; add int8 = true")
            if settings.budget.max_drop is not None:
                raise self.fail((*where, "budget", "max-drop"), "belongs to int8; add int8 = true")
        if settings.metric == "top1" and settings.labels is None:
            raise self.fail((*where, "metric"), 'top1 needs labels = "FILE.npy"')

    def places(self, builds: Mapping[str, Settings]) -> None:
        """No two builds write into one folder, nor one into that of another."""
        seen: dict[Path, str] = {}
        for name, settings in builds.items():
            place = Path(os.path.realpath(settings.output))
            for other, owner in seen.items():
                if place == other:
                    raise self.fail(
                        ("build", name, "output"), f"build {owner!r} writes {str(settings.output)!r} too; name another"
                    )
                if place in other.parents or other in place.parents:
                    raise self.fail(
                        ("build", name, "output"),
                        f"{str(settings.output)!r} and the folder of build {owner!r} lie in one another; put them side by side",
                    )
            seen[place] = name


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _dotted(where: tuple[str, ...]) -> str:
    return ".".join(part if re.fullmatch(r"[\w-]+", part, re.ASCII) else json.dumps(part) for part in where)


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), "a date or time")


def _convert(value: Any, wanted: Any) -> Any:
    """A TOML value as the type of a field.

    Raises:
        ValueError: it does not fit.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return _convert(value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value not in arguments:
            near = _near(value, arguments) if isinstance(value, str) else ""
            raise ValueError(f"{value!r} is none of {', '.join(map(repr, arguments))}{near}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"is {_kind(value)}, and must be a list of texts")
        return tuple(value)
    if origin is not None:  # Mapping[str, str]
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ValueError('must be a table of texts, as in { x = "1x3x224x224" }')
        return dict(value)
    if wanted is float and type(value) in (int, float):
        return float(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not wanted:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a text"}
        raise ValueError(f"is {_kind(value)}, and must be {names[wanted]}")
    return value


def _check(name: str, value: Any) -> None:
    """The range of a key's value.

    Raises:
        ValueError: or UsageError; it is out of range, or no target or shape.
    """
    if name == "targets":
        for text in value:
            Target.parse(text)
    elif name == "shapes":
        for key, text in value.items():
            _check_shape(key, text)
    elif name == "level" and value not in range(4):
        raise ValueError(f"{value} is none of 0, 1, 2, 3")
    elif name == "prune" and not 0 < value < 1:
        raise ValueError(f"{value:g} is not between 0 and 1")
    elif name == "max_size":
        parse_size(value)
    elif name == "optimization_level" and value not in range(6):
        raise ValueError(f"{value} is none of 0, 1, 2, 3, 4, 5")
    elif name in ("threads", "workspace") and value < 1:
        raise ValueError(f"{value} is not above 0")
    elif name in ("max_latency_ratio", "max_error", "max_drop") and not 0 <= value < float("inf"):
        raise ValueError(f"{value:g} is no bound; give a number of 0 or more")


def _check_shape(name: str, text: str) -> None:
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"(\d+(x\d+)*)?", part, re.ASCII) for part in parts):
        raise ShapeError(f"{name} = {text!r}: expected a shape or MIN:OPT:MAX, as in '1x3x8x8:8x3x8x8:32x3x8x8'")


# -------------------------------------------------------------------------------------------------------------- lines

_TOKEN: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|\#[^\n]*|\n|[\[\]{},=.]|[^\s\[\]{},=.\#"\']+|[^\S\n]+',
    re.DOTALL,
)


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Key, as the path to it, to its line, in a text that is known to be TOML."""
    found: dict[tuple[str, ...], int] = {}
    tokens = list(_tokens(text))
    at = 0
    table: tuple[str, ...] = ()

    def note(path: tuple[str, ...], line: int) -> None:
        for length in range(1, len(path) + 1):
            found.setdefault(path[:length], line)

    def name() -> tuple[tuple[str, ...], int]:
        """A dotted key, and its line; `at` is behind it afterwards."""
        nonlocal at
        parts, line = [], tokens[at][1]
        while at < len(tokens) and tokens[at][0] not in ("=", "]", "\n"):
            token = tokens[at][0]
            if token != ".":
                parts.append(_unquoted(token))
            at += 1
        return tuple(parts), line

    def value(path: tuple[str, ...], ends: tuple[str, ...]) -> None:
        nonlocal at
        while at < len(tokens) and tokens[at][0] not in ends:
            token = tokens[at][0]
            at += 1
            if token == "[":
                while at < len(tokens) and tokens[at][0] != "]":
                    value(path, (",", "]"))
                    at += at < len(tokens) and tokens[at][0] == ","
                at += 1
            elif token == "{":
                while at < len(tokens) and tokens[at][0] != "}":
                    if tokens[at][0] in (",", "\n"):
                        at += 1
                        continue
                    inner, line = name()
                    note((*path, *inner), line)
                    at += 1
                    value((*path, *inner), (",", "}"))
                at += 1

    while at < len(tokens):
        if tokens[at][0] == "\n":
            at += 1
        elif tokens[at][0] == "[":
            while tokens[at][0] == "[":
                at += 1
            table, line = name()
            note(table, line)
            while at < len(tokens) and tokens[at][0] == "]":
                at += 1
        else:
            key, line = name()
            note((*table, *key), line)
            at += 1
            value((*table, *key), ("\n",))
    return found


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line = 1
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "\n" or not (token.isspace() or token[0] == "#"):
            yield token, line
        line += token.count("\n")


def _unquoted(token: str) -> str:
    if token[0] not in "\"'":
        return token
    return str(tomllib.loads(f"k = {token}")["k"])


# ------------------------------------------------------------------------------------------------------------- schema


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors; ``recipe.schema.json`` holds it."""
    settings = _object(Settings)
    budget = settings["properties"].pop("budget")
    settings["properties"]["budget"] = {"$ref": "#/$defs/budget"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",  # the newest that taplo and its editors know
        "title": "A graphopt recipe (graphopt.toml)",
        "description": "Builds of ONNX models for targets; `graphopt build` runs them.",
        "type": "object",
        "required": ["build"],
        "additionalProperties": False,
        "properties": {
            "defaults": {"description": "Keys for every build.", "allOf": [{"$ref": "#/$defs/settings"}]},
            "build": {
                "description": "The builds, by name.",
                "type": "object",
                "minProperties": 1,
                "propertyNames": {"pattern": f"^{_NAME.pattern}$"},
                "additionalProperties": {"$ref": "#/$defs/settings"},
            },
        },
        "$defs": {"settings": settings, "budget": budget},
    }


def _object(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        "description": (kind.__doc__ or "").strip(),
        "type": "object",
        "additionalProperties": False,
        "properties": {_spelled(f.name): _property(f, hints[f.name]) for f in fields(kind)},
    }


def _property(item: dataclasses.Field[Any], wanted: Any) -> dict[str, Any]:
    kind, told = typing.get_args(wanted)
    if kind is Budget:
        return _object(Budget)
    return {"description": told, **_schema_of(kind), **_RANGES.get(item.name, {})}


def _schema_of(wanted: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return _schema_of(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": {"type": "string"}}
    if origin is not None:
        return {"type": "object", "additionalProperties": {"type": "string"}}
    return {"type": {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}[wanted]}


_RANGES: Final[dict[str, dict[str, Any]]] = {  # what `_check` checks, as far as a schema can say it
    "model": {"minLength": 1},
    "output": {"minLength": 1},
    "labels": {"minLength": 1},
    "timing_cache": {"minLength": 1},
    "targets": {"items": {"type": "string", "pattern": "^(ort|tensorrt|tensorrt-rtx)(:[A-Za-z][A-Za-z0-9_.+-]*)?$"}},
    "level": {"minimum": 0, "maximum": 3},
    "prune": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "shapes": {"additionalProperties": {"type": "string", "pattern": "^(\\d+(x\\d+)*)?(:(\\d+(x\\d+)*)?:(\\d+(x\\d+)*)?)?$"}},
    "optimization_level": {"minimum": 0, "maximum": 5},
    "threads": {"minimum": 1},
    "workspace": {"minimum": 1},
    "max_size": {"pattern": f"^\\s*{_SIZE.pattern}\\s*$"},
    "max_latency_ratio": {"minimum": 0},
    "max_error": {"minimum": 0},
    "max_drop": {"minimum": 0},
}  # fmt: skip


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(schema(), indent=2) + "\n")
