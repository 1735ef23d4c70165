"""The steps of a build, taken from the cache where it holds them: optimized graphs after prefixes of a pipeline, proofs, int8 searches,
artifacts.

Each is a pure function of what its key names, so a changed option computes anew only what depends on it: a pass and those behind it,
or the engine alone. Without a cache everything is computed, by the same code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from graphopt import ir, provenance
from graphopt.backend import Artifact, Backend, BuildOptions, Kernel, ShapeRange
from graphopt.cache import Cache
from graphopt.data import Data
from graphopt.errors import GraphoptError
from graphopt.ir import Model
from graphopt.pass_base import Context, Remark
from graphopt.pipeline import Instrument, Pipeline, Result, StepReport, measures, step_text
from graphopt.target import Target

_WORTH: Final = 5  # a graph is kept when computing it again takes so many times as long as writing it
_WRITING: Final = 0.02, 200e6  # seconds for any entry, bytes a second


class Recall:
    """What a build asks before it computes.

    Args:
        cache: None computes everything.
        settled: raises when an input of the build is not what it was; nothing is kept then.
    """

    def __init__(self, cache: Cache | None = None, settled: Callable[[], None] = lambda: None) -> None:
        self.cache = cache
        self.settled = settled
        self._prints: dict[int, tuple[Model, str]] = {}
        self._data: tuple[Data, str] | None = None

    def fingerprint(self, model: Model) -> str:
        """As `Model.fingerprint`, computed once for each object."""
        if id(model) not in self._prints:
            self._prints[id(model)] = model, model.fingerprint()
        return self._prints[id(model)][1]

    def value(self, kind: str, ingredients: Callable[[], Mapping[str, Any]], compute: Callable[[], Any]) -> Any:
        """A JSON value."""
        if self.cache is None:
            return compute()
        key = {**ingredients(), "versions": provenance.core_versions()}
        if (entry := self.cache.find(kind, key)) is not None:
            return entry.meta
        value = compute()
        self.cache.add(kind, key, lambda folder: self._checked(value))
        return value

    def _checked(self, value: Any) -> Any:
        self.settled()
        return value

    # ------------------------------------------------------------------------------------------------------- graphs

    def optimize(self, pipeline: Pipeline, model: Model, ctx: Context, instruments: Sequence[Instrument]) -> Result:
        """``pipeline.run``, from the longest prefix that the cache holds; `ctx` must be new."""
        cache = self.cache
        if cache is None or not pipeline.steps:
            return pipeline.run(model, ctx, instruments)
        keys = [self._graph_key(pipeline, n, model, ctx) for n in range(1, len(pipeline.steps) + 1)]
        before, done = None, 0
        for number in range(len(keys), 0, -1):
            before = self._restore(cache, keys[number - 1], ctx)
            if before is not None:
                done = number
                break
        if before is not None and done == len(keys):
            return before
        last = time.perf_counter()

        def keep(number: int, result: Result) -> None:
            nonlocal last
            fixed, rate = _WRITING
            worth = time.perf_counter() - last > _WORTH * (fixed + result.model.nbytes / rate)
            if number == len(keys) or worth:
                self._store(cache, keys[number - 1], _joined(before, result), ctx)
                last = time.perf_counter()

        start = model if before is None else before.model
        return _joined(before, pipeline.run(start, ctx, instruments, done=done, after_step=keep))

    def _graph_key(self, pipeline: Pipeline, number: int, model: Model, ctx: Context) -> dict[str, Any]:
        steps, ahead = pipeline.steps[:number], pipeline.steps[number:]
        return {
            "model": self.fingerprint(model),
            "target": str(ctx.target),
            "seed": ctx.seed,
            "steps": [step_text(step) for step in steps],
            "products_stay": ctx.products_stay or measures(ahead),  # what is ahead decides what may be fused before
            "data": self.data_digest(ctx.data) if measures(steps) and ctx.data is not None else None,
            "versions": provenance.core_versions(),
        }

    def data_digest(self, data: Data) -> str:
        """sha256 over all samples, computed once."""
        if self._data is None or self._data[0] is not data:
            self._data = data, data.digest()
        return self._data[1]

    def _store(self, cache: Cache, key: Mapping[str, Any], result: Result, ctx: Context) -> None:
        def write(folder: Path) -> dict[str, Any]:
            path = ir.save(result.model, folder / "model.onnx")[0]
            self.settled()
            known = result.model.fingerprint()
            if ir.load(path).fingerprint() != known:
                raise OSError("the graph does not survive its file form, so it is not kept")
            return {
                "fingerprint": known,
                "steps": [[s.pass_name, s.rewrites, s.round] for s in result.steps],
                "remarks": [[r.pass_name, r.node, r.text] for r in result.remarks],
                "stops": list(result.stops),
                "spent": ctx.spent,
                "facts": result.facts,
                "origins": _origins(result.model),
            }

        try:
            cache.add("graph", key, write)
        except GraphoptError:  # the disk is full, or the graph has no file form: it is not kept
            self.settled()

    def _restore(self, cache: Cache, key: Mapping[str, Any], ctx: Context) -> Result | None:
        entry = cache.find("graph", key)
        if entry is None:
            return None
        meta = entry.meta
        try:
            model = ir.load(entry.folder / "model.onnx")
        except GraphoptError:  # another process has just removed it
            return None
        model.source, model.external = None, ()
        for node, origin in zip(model.nodes(), meta["origins"], strict=True):
            node.origin = tuple(origin)
        self._prints[id(model)] = model, meta["fingerprint"]
        ctx.spent.update(meta["spent"])
        ctx.facts.update(meta["facts"])
        remarks = [Remark(*r) for r in meta["remarks"]]
        ctx.remarks.extend(remarks)
        steps = tuple(StepReport(*s) for s in meta["steps"])
        return Result(model, steps, tuple(remarks), tuple(meta["stops"]), meta["facts"])

    # ---------------------------------------------------------------------------------------------------- artifacts

    def emit(
        self,
        backend: Backend,
        model: Model,
        target: Target,
        folder: Path,
        options: BuildOptions,
        compute: Callable[[], Artifact],
    ) -> Artifact:
        """What ``backend.emit`` writes into `folder`."""
        if self.cache is None:
            return compute()
        origins = hashlib.sha256(json.dumps(_origins(model)).encode()).hexdigest()
        available = backend.availability(target.runtime)
        key = {
            "model": self.fingerprint(model),
            "origins": origins,
            "target": str(target),
            "options": {f.name: _plain(getattr(options, f.name)) for f in fields(options) if f.name in backend.reads},
            "runtime": [available.version, list(available.devices)],
            "versions": provenance.versions([str(target)]),
        }
        if (entry := self.cache.find("artifact", key)) is not None:
            try:
                for name in entry.meta["files"]:
                    shutil.copyfile(entry.folder / name, folder / name)
                return _artifact(entry.meta)
            except FileNotFoundError:  # another process has just removed it
                pass
        artifact = compute()

        def write(stage: Path) -> dict[str, Any]:
            for name in artifact.files:
                shutil.copyfile(folder / name, stage / name)
            self.settled()
            return {
                "files": list(artifact.files),
                "versions": dict(artifact.versions),
                "shapes": _plain(artifact.shapes),
                "kernels": [asdict(k) for k in artifact.kernels],
                "remarks": list(artifact.remarks),
                "details": dict(artifact.details),
            }

        self.cache.add("artifact", key, write)
        return artifact


def _joined(before: Result | None, after: Result) -> Result:
    if before is None:
        return after
    return Result(after.model, before.steps + after.steps, after.remarks, before.stops + after.stops, after.facts)


def _origins(model: Model) -> list[list[str]]:
    return [list(node.origin) for node in model.nodes()]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in sorted(value.items())}
    return str(value) if isinstance(value, ShapeRange | Path) else value


def _artifact(meta: Mapping[str, Any]) -> Artifact:
    kernels = [
        Kernel(k["name"], *(tuple(k[part]) for part in ("inputs", "constants", "outputs", "origin")))
        for k in meta["kernels"]
    ]
    shapes = {name: ShapeRange.parse(f"{name}={text}")[1] for name, text in meta["shapes"].items()}
    return Artifact(
        tuple(meta["files"]), meta["versions"], shapes, tuple(kernels), tuple(meta["remarks"]), meta["details"]
    )


def feeds_digest(feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None) -> list[Any] | None:
    """What identifies samples."""
    if feeds is None:
        return None
    return [
        [[n, str(a.dtype), list(a.shape), hashlib.sha256(_bytes(a)).hexdigest()] for n, a in sorted(sample.items())]
        for sample in feeds
    ]


def _bytes(array: np.ndarray[Any, Any]) -> bytes:
    return repr(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array).tobytes()
