"""Bundles: the deployment unit, a folder with one artifact a target and ``manifest.json``.

The manifest's schema is versioned and documented in ``graphopt/manifest.schema.json``. The same model, options and versions
give the same bytes: no time stamps, no paths, no latencies unless they were asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from graphopt.backend import Arrays, Artifact, BuildOptions, Session, ShapeRange
from graphopt.discovery import backend_for
from graphopt.errors import BackendUnavailable, InvalidModel, OutputError
from graphopt.ir import TensorSpec
from graphopt.target import Target

MANIFEST: Final = "manifest.json"
SCHEMA: Final = "graphopt-bundle/1"
_PREFERENCE: Final = ("tensorrt", "tensorrt-rtx", "ort")  # fastest first


@dataclass(frozen=True)
class Variant:
    """One artifact of a bundle."""

    target: Target
    files: tuple[str, ...]  # the first is the one to open
    record: Mapping[str, Any]  # its entry in the manifest

    @property
    def shapes(self) -> dict[str, ShapeRange]:
        """The shape ranges it accepts, by input."""
        return {name: ShapeRange.parse(f"{name}={text}")[1] for name, text in self.record.get("shapes", {}).items()}


@dataclass(frozen=True)
class Bundle:
    """A folder that `graphopt.build` wrote."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Read a bundle's manifest.

        Raises:
            InvalidModel: no folder, no manifest in it, or a manifest of another version.
        """
        path = Path(folder) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidModel(
                f"{str(folder)!r} is no bundle: {MANIFEST} cannot be read ({error.strerror}); make one with graphopt build"
            ) from None
        except ValueError:
            raise InvalidModel(f"{str(path)!r} is no JSON; build the bundle again") from None
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise InvalidModel(
                f"{str(path)!r} has schema {schema!r}, this graphopt reads {SCHEMA!r}; build the bundle again"
            )
        return cls(Path(folder), manifest)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All artifacts, in the order they were asked for."""
        return tuple(
            Variant(Target.parse(v["target"]), tuple(f["name"] for f in v["files"]), v)
            for v in self.manifest["variants"]
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a session takes."""
        return tuple(_spec(entry) for entry in self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a session returns."""
        return tuple(_spec(entry) for entry in self.manifest["outputs"])

    def damaged(self) -> list[str]:
        """Files that are missing or whose sha256 is not the manifest's."""
        bad = []
        for variant in self.manifest["variants"]:
            for entry in variant["files"]:
                path = self.folder / entry["name"]
                if not path.is_file() or sha256(path) != entry["sha256"]:
                    bad.append(entry["name"])
        return bad

    def open(self, target: str | None = None, options: BuildOptions | None = None) -> BundleSession:
        """Load the best variant that runs on this machine, or the one named.

        Raises:
            BackendUnavailable: none runs here; the message says why for each.
        """
        variants = sorted(self.variants, key=lambda v: _PREFERENCE.index(v.target.runtime))
        if target is not None:
            wanted = Target.parse(target)
            variants = [v for v in variants if v.target == wanted]
            if not variants:
                here = ", ".join(str(v.target) for v in self.variants)
                raise BackendUnavailable(f"{str(self.folder)!r} holds no variant for {target!r}; it has {here}")
        reasons: list[str] = []
        for variant in variants:
            _, backend = backend_for(variant.target.runtime)
            artifact = Artifact(variant.files, {}, variant.shapes)
            missing = [name for name in variant.files if not (self.folder / name).is_file()]
            if missing:
                raise InvalidModel(
                    f"{str(self.folder)!r} lacks {missing[0]!r}, which its manifest names; build it again"
                )
            try:
                session = backend.open(self.folder, artifact, variant.target, options or BuildOptions())
            except BackendUnavailable as error:
                reasons.append(f"{variant.target}: {error}")
                continue
            return BundleSession(session, variant, tuple(reasons))
        raise BackendUnavailable("no variant runs here: " + "; ".join(reasons))


@dataclass(frozen=True)
class BundleSession:
    """A loaded variant; `skipped` says why better ones were passed over."""

    session: Session
    variant: Variant | None  # None: a lone .onnx file
    skipped: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""
        return tuple(self.session.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns."""
        return tuple(self.session.outputs)

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """Compute all outputs from arrays by input name.

        Raises:
            UsageError: names, dtypes or shapes do not fit.
        """
        return self.session.run(feeds)

    def close(self) -> None:
        """Free what the runtime holds."""
        self.session.close()


def open(path: str | os.PathLike[str], target: str | None = None, options: BuildOptions | None = None) -> BundleSession:
    """Open a bundle, or a lone ``.onnx`` file with ONNX Runtime.

    Args:
        path: the bundle's folder, or a model file.
        target: the variant wanted; None picks the fastest that runs on this machine.
        options: threads and graph level of ONNX Runtime.

    Raises:
        InvalidModel: neither a bundle nor a model.
        BackendUnavailable: no variant runs here.
    """
    if Path(path).is_file():
        lone = Target.parse(target or "ort:cpu")
        name, backend = backend_for(lone.runtime)
        if name != "onnxruntime":
            raise BackendUnavailable(f"{str(path)!r} is a model file; build it for {target!r} first")
        session = backend.open(Path(path).parent, Artifact((Path(path).name,), {}), lone, options or BuildOptions())
        return BundleSession(session, None)
    return Bundle.load(path).open(target, options)


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    shape = entry["shape"]
    return TensorSpec(entry["name"], entry["dtype"], None if shape is None else tuple(shape))


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: sorted by nothing, indented, UTF-8, the same bytes for the same content."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and vanishes when it does not.

    What stands at `out` may only be an earlier bundle or an empty folder.

    Raises:
        OutputError: something else stands there, or the place cannot be written.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100  # resolve would follow a link that is to be replaced
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        what = "is a file" if out.is_file() else f"holds other files and no {MANIFEST}"
        raise OutputError(f"cannot write the bundle {str(out)!r}: it {what}; name a new folder")
    stage = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield stage
        stage.chmod(0o755)
        _exchange(stage, out)
    except OSError as error:
        raise OutputError(
            f"cannot write the bundle {str(out)!r}: {error.strerror or error}; check space and permissions"
        ) from None
    finally:
        if stage is not None and stage.exists():
            shutil.rmtree(stage, ignore_errors=True)


def _exchange(stage: Path, out: Path) -> None:
    """Put `stage` in the place of `out`; the old bundle goes away last."""
    if not out.exists():
        stage.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.replace(old)
    try:
        stage.rename(out)
    except OSError:
        old.replace(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
