"""Bundles: the deployment unit, a folder with one artifact a target and ``manifest.json``.

The manifest's schema is versioned and documented in ``graphopt/manifest.schema.json``. The same model, options and versions
give the same bytes: no time stamps, no paths, no latencies unless they were asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from graphopt import staging, verify
from graphopt.backend import Arrays, Artifact, BuildOptions, Session, ShapeRange
from graphopt.discovery import backend_for
from graphopt.errors import BackendUnavailable, InvalidModel, UserError
from graphopt.ir import TensorSpec, load, save
from graphopt.target import Target

MANIFEST: Final = staging.MANIFEST
SCHEMA: Final = staging.SCHEMA
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
        return {name: ShapeRange.parse(f"{name}={text}")[1] for name, text in self.record["shapes"].items()}

    @property
    def versions(self) -> dict[str, str]:
        """Package -> version that made it."""
        return dict(self.record["versions"])


@dataclass(frozen=True)
class Bundle:
    """A folder that `graphopt.build` wrote."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Read a bundle's manifest.

        Raises:
            InvalidModel: no folder, no manifest in it, or a manifest that is damaged or of another version.
        """
        path = Path(folder) / MANIFEST
        with contextlib.suppress(OSError):  # where it cannot be finished the manifest is missing, and that is told
            staging.recover(Path(folder))
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidModel(
                f"{str(folder)!r} is no bundle: {MANIFEST} cannot be read ({error.strerror}); make one with graphopt build"
            ) from None
        except (ValueError, RecursionError):
            raise InvalidModel(f"{str(path)!r} is no JSON; build the bundle again") from None
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise InvalidModel(
                f"{str(path)!r} has schema {schema!r}, this graphopt reads {SCHEMA!r}; build the bundle again"
            )
        bundle = cls(Path(folder), manifest)
        try:
            bundle._check()
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InvalidModel(f"{str(path)!r} is damaged ({what}); build the bundle again") from None
        return bundle

    def _check(self) -> None:
        """Touch all that is used later; raises whatever comes of a manifest that breaks its schema."""
        _ = self.inputs, self.outputs
        for variant in self.variants:
            _ = variant.shapes, variant.versions
            if not variant.files:
                raise ValueError(f"variant {str(variant.target)!r} has no files")
            for entry in variant.record["files"]:
                name, _digest = entry["name"], entry["sha256"]
                if not isinstance(name, str) or Path(name).name != name or name == "..":
                    raise ValueError(f"file {name!r} lies outside the bundle")

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
        return [name for variant in self.variants for name in self._damaged(variant)]

    def _damaged(self, variant: Variant) -> list[str]:
        entries = [(self.folder / e["name"], e["sha256"]) for e in variant.record["files"]]
        return [path.name for path, digest in entries if not path.is_file() or sha256(path) != digest]

    def open(self, target: str | None = None, options: BuildOptions | None = None) -> BundleSession:
        """Load the best variant that runs on this machine, or the one named; a runtime alone names any of its devices.

        Raises:
            InvalidModel: a file of the variant is missing or damaged.
            BackendUnavailable: none runs here; the message says why for each.
        """
        variants = sorted(self.variants, key=lambda v: _PREFERENCE.index(v.target.runtime))
        if target is not None:
            wanted = Target.parse(target)
            variants = [v for v in variants if wanted in (v.target, Target(v.target.runtime))]
            if not variants:
                here = ", ".join(str(v.target) for v in self.variants)
                raise BackendUnavailable(f"{str(self.folder)!r} holds no variant for {target!r}; it has {here}")
        reasons: list[str] = []
        for variant in variants:
            _, backend = backend_for(variant.target.runtime)
            reason = backend.availability(variant.target.runtime).run
            if reason is not None:
                reasons.append(f"{variant.target}: {reason}")
                continue
            if damaged := self._damaged(variant):
                raise InvalidModel(
                    f"bundle {str(self.folder)!r}: {', '.join(map(repr, damaged))} is missing or differs from its sha256 in "
                    f"{MANIFEST}; copy or build the bundle again"
                )
            artifact = Artifact(variant.files, variant.versions, variant.shapes)
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
    """Open a bundle, or a lone ``.onnx`` or ``.onnxtxt`` file with ONNX Runtime.

    Args:
        path: the bundle's folder, or a model file.
        target: the variant wanted; None picks the fastest that runs on this machine.
        options: threads and graph level of ONNX Runtime.

    Raises:
        InvalidModel: neither a bundle nor a model.
        BackendUnavailable: no variant runs here.
    """
    if Path(path).is_file() or (Path(path).suffix in (".onnx", ".onnxtxt") and not Path(path).is_dir()):
        lone = Target.parse(target or "ort:cpu")
        name, backend = backend_for(lone.runtime)
        if name != "onnxruntime":
            raise BackendUnavailable(f"{str(path)!r} is a model file; build it for {target!r} first")
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            file = Path(path)
            model = load(file)  # refuses external data elsewhere, and other things that ONNX Runtime might not
            verify.operators(model, {n.domain for n in model.nodes() if n.domain})
            if file.suffix == ".onnxtxt":
                file = save(model, Path(folder) / "model.onnx")[0]
            session = backend.open(file.parent, Artifact((file.name,), {}), lone, options or BuildOptions())
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
    """Write ``manifest.json``: indented UTF-8, the same bytes for the same content."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
