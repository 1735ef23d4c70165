"""What a bundle was made from, as its manifest records it, and whether that still holds.

The record is ``build`` in the manifest: the request (settings that are not at their defaults), the input files with their
digests and the versions of the packages that decide the bytes. A bundle is up to date when the same record would be
written now and its files have the digests that it names; that costs no import of onnx or of a runtime.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import graphopt
from graphopt.cache import Digests
from graphopt.errors import InvalidModel, UsageError
from graphopt.recipe import Settings, is_callable
from graphopt.staging import MANIFEST, SCHEMA
from graphopt.target import Target

_CORE: Final = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime")
_IN_ITS_PLACE: Final = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)
_ENGINES: Final = {"tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt-rtx": ("tensorrt-rtx-cu13",)}  # fmt: skip
_NOT_IN_THE_BYTES: Final = ("commands", "cli.py")  # of the package: what only talks to the user


@dataclass(frozen=True)
class File:
    """An input of a build."""

    role: str  # model, external data, data, labels or depends
    name: str  # without folders of this machine
    path: Path
    sha256: str
    size: int

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        name = os.fsencode(self.name).decode(errors="replace")  # names on a disk need not be text
        return {"role": self.role, "name": name, "sha256": self.sha256, "bytes": self.size}


def input_paths(settings: Settings, external: Sequence[str] = ()) -> Iterator[tuple[str, str, Path]]:
    """Role, name and place of every file that `settings` reads; `external` names the external data of the model.

    Raises:
        UsageError: a pattern of ``depends`` matches nothing.
    """
    if str(settings.model) != "-":
        yield "model", settings.model.name, settings.model
    for name in external:
        yield "external data", name, beside(settings.model, name)
    if settings.data is not None:
        yield from _data_paths(settings)
    if settings.labels is not None:
        yield "labels", settings.labels.name, settings.labels
    for pattern in settings.depends:
        found = sorted(p for p in glob.glob(pattern, recursive=True) if Path(p).is_file())  # noqa: PTH207  a Path drops '..'
        if not found:
            raise UsageError(f"depends: no file matches {pattern!r}; mend the pattern")
        for path in found:
            yield "depends", Path(path).name, Path(path)


def beside(model: Path, name: str) -> Path:
    """Where the external data `name` of `model` lies; the model may be a link."""
    places = [model.parent / name, Path(os.path.realpath(model)).parent / name]
    return next((p for p in places if p.exists()), places[0])


def _data_paths(settings: Settings) -> Iterator[tuple[str, str, Path]]:
    assert settings.data is not None
    if is_callable(settings.data):  # what it reads nobody knows; `depends` can name it
        parts = settings.data.partition(":")[0].split(".")
        for folder in ("", *sys.path):
            file = Path(folder, *parts)
            for path in (file.with_suffix(".py"), file / "__init__.py"):
                if path.is_file():
                    yield "data", path.name, path
                    return
        return
    path = Path(settings.data)
    if path.is_dir():
        for each in sorted(p for p in path.iterdir() if p.suffix == ".npz"):
            yield "data", f"{path.name}/{each.name}", each
    else:
        yield "data", path.name, path


def input_files(settings: Settings, digests: Digests, external: Sequence[str] = ()) -> list[File]:
    """Every file that `settings` reads, with its digest; what is missing has none, and the build will say so."""
    files = []
    for role, name, path in input_paths(settings, external):
        try:
            files.append(File(role, name, path, *digests.of(path)))
        except OSError:
            files.append(File(role, name, path, "", 0))
    return files


def require_unchanged(files: Sequence[File], digests: Digests) -> None:
    """Complain about an input that is no longer what it was when the build began.

    Raises:
        InvalidModel: with its name.
    """
    for file in files:
        with contextlib.suppress(OSError):
            if digests.of(file.path)[0] == file.sha256:
                continue
        raise InvalidModel(f"{str(file.path)!r} changed while it was being built from; build again")


@functools.cache
def _source_digest() -> str:
    """Of graphopt's own code: a development version changes without its number."""
    home = Path(graphopt.__file__).parent
    found = hashlib.sha256()
    rooms = [home, *(p for p in sorted(home.iterdir()) if p.is_dir() and p.name not in _NOT_IN_THE_BYTES)]
    for room in rooms:
        for path in sorted(room.glob("*.py")):
            if path.name not in _NOT_IN_THE_BYTES:
                found.update(f"{room.name}/{path.name} ".encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return found.hexdigest()[:12]


def _installed(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def core_versions() -> dict[str, str]:
    """What decides the optimized graph: graphopt, the packages that it computes with, and plug-in passes."""
    points = [*importlib.metadata.entry_points(group="graphopt.passes"), *importlib.metadata.entry_points(group="graphopt.backends")]  # fmt: skip
    plugins = {p.dist.name for p in points if p.dist is not None and p.dist.name != "graphopt"}
    names = dict.fromkeys([*_CORE, *_IN_ITS_PLACE, *sorted(plugins)])
    return {"graphopt": f"{graphopt.__version__}+{_source_digest()}", **_installed(list(names))}


def versions(targets: Sequence[str]) -> dict[str, str]:
    """What decides a bundle for `targets`; none means whatever can be built here."""
    runtimes = {Target.parse(t).runtime for t in targets} or set(_ENGINES)
    found = {**core_versions(), **_installed([n for r in sorted(runtimes) for n in _ENGINES.get(r, ())])}
    if "tensorrt" in runtimes:  # it builds for the GPU at hand
        with contextlib.suppress(OSError):
            found["nvidia-driver"] = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].strip()
    return found


def record(settings: Settings, files: Sequence[File]) -> dict[str, Any]:
    """What the manifest says of how the bundle came to be; the same for the same inputs."""
    made = {
        "request": settings.request(),
        "files": [file.as_dict() for file in files],
        "versions": versions(settings.targets),
    }
    created = _created()
    return made if created is None else {**made, "created": created}


def _created() -> str | None:
    """The time that ``SOURCE_DATE_EPOCH`` gives; no other time gets into a bundle.

    Raises:
        UsageError: it is no number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    try:
        return datetime.fromtimestamp(int(text), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"SOURCE_DATE_EPOCH is {text!r}; it holds seconds since 1970, as in 1700000000") from None


# ---------------------------------------------------------------------------------------------------------- up to date?


def changes(settings: Settings, digests: Digests) -> list[str]:
    """Why the bundle at ``settings.output`` has to be built, in words; nothing where it is up to date."""
    try:
        manifest = json.loads((settings.output / MANIFEST).read_bytes())
        if manifest["schema"] != SCHEMA:
            return [f"the bundle there has schema {manifest['schema']!r}"]
        old = manifest["build"]
        made = [(str(f["name"]), str(f["sha256"])) for v in manifest["variants"] for f in v["files"]]
        request, held, known = dict(old["request"]), dict(old["versions"]), list(old["files"])
        external = [str(f["name"]) for f in known if f["role"] == "external data"]
    except FileNotFoundError:
        return ["there is no bundle yet"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ["the bundle there says nothing of how it was built"]
    files = input_files(settings, digests, external)
    found = [
        *_compared(request, settings.request(), "option "),
        *_compared_files(known, files),
        *_compared(held, versions(settings.targets), ""),
        *_compared({"time": old.get("created")}, {"time": _created()}, "SOURCE_DATE_EPOCH, "),
    ]
    for name, digest in made:
        try:
            if digests.of(settings.output / name)[0] != digest:
                found.append(f"{name} in the bundle was changed")
        except OSError:
            found.append(f"{name} is missing from the bundle")
    return found


def _compared(old: Mapping[str, Any], new: Mapping[str, Any], what: str) -> list[str]:
    def shown(value: Any) -> str:
        return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    keys = dict.fromkeys([*old, *new])
    return [f"{what}{k}: {shown(old.get(k))} -> {shown(new.get(k))}" for k in keys if old.get(k) != new.get(k)]


def _compared_files(old: Sequence[Mapping[str, Any]], new: Sequence[File]) -> list[str]:
    before = [(f["role"], f["name"], f["sha256"]) for f in old]
    after = [(f["role"], f["name"], f["sha256"]) for f in map(File.as_dict, new)]
    if before == after:
        return []
    found = [f"{role} {name} " + ("changed" if any(b[:2] == (role, name) for b in before) else "is new")
             for role, name, digest in after if (role, name, digest) not in before]  # fmt: skip
    found += [f"{role} {name} is gone" for role, name, _ in before if not any(a[:2] == (role, name) for a in after)]
    return found or ["the inputs are in another order"]


def touch(settings: Settings, paths: Sequence[Path]) -> None:
    """Make the manifest newer than all inputs, for make: a file that was written anew with its old content asks for nothing."""
    manifest = settings.output / MANIFEST
    with contextlib.suppress(OSError):
        newest = max((p.stat().st_mtime_ns for p in paths if p.exists()), default=0)
        if newest > manifest.stat().st_mtime_ns:
            os.utime(manifest)


# -------------------------------------------------------------------------------------------------------------- depfile


def depfile(rules: Sequence[tuple[Path, Sequence[Path]]]) -> str:
    """Targets and what they depend on, as make and ninja read it."""
    lines = []
    for target, inputs in rules:
        names = dict.fromkeys(map(_escaped, inputs))
        lines.append(" \\\n  ".join([f"{_escaped(target)}:", *names]))
    return "\n".join(lines) + "\n"


def _escaped(path: Path) -> str:
    """A path as gcc writes it: blanks and '#' behind a backslash, '$' doubled.

    Raises:
        UsageError: no dependency file can hold it.
    """
    text = os.fspath(path)
    if "\n" in text:
        raise UsageError(f"a dependency file cannot hold {text!r}; name files without line breaks")
    if sys.platform == "win32":
        text = text.replace("\\", "/")
    return text.replace("$", "$$").replace(" ", "\\ ").replace("#", "\\#")
