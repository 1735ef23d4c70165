"""The main job: one model in, a bundle out, with proof at every step."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

import graphopt
from graphopt import bundle as bundles
from graphopt import equivalence, int8, ir, measure, page, provenance, verify
from graphopt.backend import (
    Arrays,
    Artifact,
    Backend,
    BuildOptions,
    Progress,
    ShapeRange,
    check_shapes,
    may_hold_shape,
    takes_values,
)
from graphopt.budget import within
from graphopt.bundle import Bundle
from graphopt.data import Data, open_data
from graphopt.discovery import backend_for
from graphopt.errors import BackendUnavailable, InternalError, NotEquivalent, ShapeError, UnsupportedModel, UsageError
from graphopt.evaluate import Evaluator, clock_of, evaluate_node
from graphopt.instruments import Census, PassTime, Statistics, Timing, Verify, census
from graphopt.ir import Model, TensorSpec
from graphopt.pass_base import Context
from graphopt.pipeline import Instrument, Pipeline, Result
from graphopt.recall import Recall, feeds_digest
from graphopt.recipe import Budget
from graphopt.recovery import Dropped, Recovery
from graphopt.staging import staged
from graphopt.target import Target, cpu_features

Say = Callable[[str], None]
Feeds = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass
class Request:
    """All that decides a build."""

    model: Model
    out: Path
    targets: tuple[Target, ...]
    pipeline: Pipeline
    options: BuildOptions
    feeds: Sequence[Feeds] | None
    fallback: bool
    measure: bool
    seed: int
    say: Say
    progress: Callable[[Target], Progress | None]
    instruments: Sequence[Instrument] = ()
    recover: bool = False  # whether a failing rewrite is left out
    html: Path | None = None  # of the page that shows the build
    recall: Recall = field(default_factory=Recall)
    budget: Budget = field(default_factory=Budget)
    record: Mapping[str, Any] | None = None  # how the build was asked for; None: from this request
    chosen: bool = True  # whether the user named the targets
    data: Data | None = None  # calibration samples
    int8: int8.Wish | None = None  # None: as the pipeline says
    fallbacks: list[dict[str, str]] = field(default_factory=list)


def build(
    model: Model | str | os.PathLike[str],
    out: str | os.PathLike[str],
    targets: Sequence[str | Target] | None = None,
    pipeline: str | Pipeline = "default",
    *,
    shapes: Mapping[str, str | ShapeRange] | None = None,
    options: BuildOptions | None = None,
    feeds: Sequence[Feeds] | Feeds | None = None,
    data: str | Path | Data | Mapping[str, np.ndarray[Any, Any]] | None = None,
    int8: int8.Wish | None = None,
    fallback: bool = True,
    measure: bool = False,
    seed: int = 0,
    allow_domains: Sequence[str] = (),
    say: Say = lambda text: None,
    progress: Callable[[Target], Progress | None] = lambda target: None,
    instruments: Sequence[Instrument] = (),
    recover: bool = False,
    html: str | os.PathLike[str] | None = None,
    recall: Recall | None = None,
    budget: Budget | None = None,
    record: Mapping[str, Any] | None = None,
) -> Bundle:
    """Optimize `model` for each target and write a bundle.

    Args:
        model: a Model, or the path of one.
        out: the bundle's folder; an earlier bundle there is replaced, in one step and only when all went well.
        targets: as in ``["tensorrt-rtx:sm89", "ort:cpu"]``; None: the best engine that can be built here, and ONNX Runtime.
        pipeline: passes or a preset; run once for each target, since the target decides.
        shapes: ranges of dynamic inputs, by name, as ``"1x3x8x8:8x3x8x8:32x3x8x8"``.
        options: what to ask of the backends; `shapes` given here go on top.
        feeds: samples for the numeric proof, or one; None generates some.
        data: calibration samples for passes that quantize (see `graphopt.data`).
        int8: search for the best int8 model on each target, as this says; needs `data`.
        fallback: build for ONNX Runtime, saying so, where a target cannot be built.
        measure: also time the ONNX Runtime variants against the original, into the manifest (its bytes then vary).
        seed: of generated samples.
        allow_domains: custom operator domains to carry unread.
        say: is told of fallbacks, defaults and other things a user should hear.
        progress: gives a progress callback for the build of a target.
        instruments: further instruments around each pass.
        recover: leave out each single rewrite that fails (structure, numbers, an exception), say so, and go on; the manifest
            lists them as "dropped".
        html: file to write a page to that shows the build (needs ``graphopt[report]``).
        recall: takes steps from a cache and keeps them there; None computes all.
        budget: what must hold, else nothing is written.
        record: what the manifest says of how the bundle came to be (`graphopt.provenance`); None makes one of these arguments.

    Raises:
        UserError: the model, an option, the machine or the place is at fault, or the budget is exceeded; nothing is written then.
        NotEquivalent: the optimized model computes something else.
        InternalError: a pass is at fault.
    """
    loaded = model if isinstance(model, Model) else ir.load(model)
    verify.cycles(loaded)
    verify.operators(loaded, allow_domains)
    options = options or BuildOptions()
    ranges = {
        name: ShapeRange.parse(f"{name}={r}")[1] if isinstance(r, str) else r for name, r in (shapes or {}).items()
    }
    options = replace(options, shapes={**options.shapes, **ranges})
    values = {s.name for s in loaded.inputs if may_hold_shape(s)}  # what their ranges mean, the backend will say
    check_shapes(loaded, {name: wanted for name, wanted in options.shapes.items() if name not in values})
    if isinstance(feeds, Mapping):
        feeds = [feeds]
    for sample in feeds or ():
        equivalence.check_feeds(loaded.inputs, sample)
    request = Request(
        loaded,
        Path(out),
        (),
        Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline,
        options,
        feeds or None,
        fallback,
        measure,
        seed,
        say,
        progress,
        instruments,
        recover=recover,
        html=None if html is None else Path(html),
        recall=recall or Recall(),
        budget=budget or Budget(),
        record=record,
        chosen=bool(targets),
        data=None if data is None else open_data(data, loaded.inputs),
        int8=int8,
    )
    if int8 is not None and request.data is None:
        raise UsageError("int8 needs calibration data: --data calib.npz (input name -> samples on the first axis)")
    wanted = [t if isinstance(t, Target) else Target.parse(t) for t in targets] if targets else _best_here(request)
    request.targets = tuple(dict.fromkeys(_CPU if t == Target("ort") else t for t in wanted))
    return _build(request)


_CPU: Final = Target("ort", "cpu")  # what ``ort`` alone means, and what takes the place of an engine


def _best_here(request: Request) -> list[Target]:
    """The engine that can be built on this machine, if any, and ONNX Runtime on the CPU."""
    reasons = []
    for runtime in ("tensorrt", "tensorrt-rtx"):
        reason = backend_for(runtime)[1].availability(runtime).build
        if reason is None:
            return [Target(runtime), _CPU]
        reasons.append(f"{runtime}: {reason}")
    _fall_back(request, "an engine", "; ".join(reasons))
    return [_CPU]


def _fall_back(request: Request, what: str, reason: str) -> None:
    """Say aloud that ONNX Runtime takes the place of `what`, or raise where that is forbidden."""
    if not request.fallback:
        raise BackendUnavailable(f"{what} cannot be built, and --no-fallback forbids {_CPU} instead: {reason}")
    request.say(f"falling back to {_CPU} for {what} (--no-fallback forbids it): {reason}")
    request.fallbacks.append({"target": what, "reason": reason})


@dataclass(frozen=True)
class _Built:
    target: Target
    backend: Backend
    artifact: Artifact
    result: Result
    history: tuple[Census, ...]  # of the passes that ran now
    proof: dict[str, Any]
    int8: int8.Outcome | None = None
    dropped: tuple[Dropped, ...] | None = None  # rewrites that were left out; None: a failing one ends the build
    times: tuple[PassTime, ...] = ()
    timings: list[measure.Timings] = field(default_factory=list)  # against the original, where it was measured


def _build(request: Request) -> Bundle:
    if request.html is not None:
        page.check_available()
    built: list[_Built] = []
    with staged(request.out) as folder:
        pending = list(request.targets)
        while pending:
            target = pending.pop(0)
            try:
                built.append(_variant(request, target, folder))
            except (BackendUnavailable, UnsupportedModel, ShapeError) as error:
                asked = isinstance(error, ShapeError) and (request.chosen or request.options.shapes)
                if target == _CPU or asked:
                    raise
                _fall_back(request, str(target), str(error))
                if _CPU not in [b.target for b in built] and _CPU not in pending:
                    pending.append(_CPU)
        manifest = _manifest(request, built, folder)
        within(request.budget, manifest)
        request.recall.settled()
        bundles.write_manifest(folder, manifest)
    if request.html is not None:
        parts = [
            page.Part(e, b.result.model, b.result.steps, b.times, b.history, b.timings[0] if b.timings else None)
            for e, b in zip(manifest["variants"], built, strict=True)
        ]
        page.write(request.html, request.model, manifest, parts, lambda: _one_sample(request))
    return Bundle(request.out, manifest)


def _variant(request: Request, target: Target, folder: Path) -> _Built:
    _, backend = backend_for(target.runtime)
    reason = backend.availability(target.runtime).build
    if reason is not None:
        raise BackendUnavailable(reason)
    statistics, timing = Statistics(), Timing()
    searched, pipeline = None, int8.fusions_last(request.pipeline)
    if request.int8 is not None and request.data is not None:
        searched = _searched(request, target, request.data, request.int8)
        pipeline = Pipeline.parse(searched["pipeline"])
    update = request.progress(target)
    ctx = Context(target=target, seed=request.seed, evaluate=evaluate_node, data=request.data, clock=clock_of(target))

    def progress(stage: str, done: int, total: int) -> None:
        if update is not None:
            update(stage, done / total)

    ctx.progress = progress
    recovery = _recovery(request, target) if request.recover else None
    instruments = [Verify(), timing, statistics, *request.instruments]
    if recovery is None:
        result = request.recall.optimize(pipeline, request.model, ctx, instruments)
    else:
        result = pipeline.run(request.model, ctx, instruments, recovery)
    left_out = {str(d) for d in recovery.dropped} if recovery is not None else set()
    for told in result.remarks:  # what passes say of the whole model, and of no node in it
        if not told.node and str(told) not in left_out:
            request.say(f"{target}: {told}")
    changed = verify.interface(request.model, result.model, any(p.retypes for p in pipeline.passes))
    if changed:
        raise InternalError(f"the pipeline changed the interface: {changed[0]}")
    proof = _prove(request, target, result, pipeline)
    artifact = request.recall.emit(
        backend,
        result.model,
        target,
        folder,
        request.options,
        lambda: backend.emit(result.model, target, folder, request.options, update),
    )
    for remark in artifact.remarks:
        request.say(f"{target}: {remark}")
    outcome = None
    if searched is not None:
        outcome = int8.Outcome.from_state(searched, result)
        outcome.built(result, artifact.kernels)
        request.say(f"{target}: {outcome}")
    dropped = None if recovery is None else tuple(recovery.dropped)
    return _Built(
        target,
        backend,
        artifact,
        result,
        tuple(statistics.history),
        proof,
        outcome,
        dropped,
        tuple(timing.times),
    )


def _one_sample(request: Request) -> list[Feeds]:
    """What the page compares layers on, and what is timed.

    Raises:
        UnsupportedModel: the original runs on no generated sample.
    """
    if request.feeds:
        return list(request.feeds[:1])
    if request.options.shapes:
        return [next(samples(request.model, request.seed, request.options.shapes))]
    return [equivalence.generated_runs(request.model, Evaluator(request.model), request.seed)[0][0]]


def _recovery(request: Request, target: Target, aloud: bool = True) -> Recovery:
    """Checks each pass on the samples that the proof at the end will use."""
    feeds, shapes = request.feeds, request.options.shapes
    if feeds is None and _values(request.model, shapes):
        feeds = list(samples(request.model, request.seed, shapes))

    def say(text: str) -> None:
        if aloud:
            request.say(f"{target}: {text}")

    return Recovery(feeds=feeds, seed=request.seed, shapes=shapes, say=say)


def _searched(request: Request, target: Target, data: Data, wish: int8.Wish) -> dict[str, Any]:
    """The state of the int8 search's outcome; the search itself where the same was not found before on such a CPU."""
    recall = request.recall

    def search() -> dict[str, Any]:
        told: list[str] = []
        outcome = int8.search(
            request.model,
            target,
            request.pipeline,
            data,
            wish=wish,
            seed=request.seed,
            say=told.append,
            recovery=_recovery(request, target, aloud=False) if request.recover else None,
        )
        return {"outcome": outcome.state(), "told": told}

    def ingredients() -> dict[str, Any]:
        return {
            "model": recall.fingerprint(request.model),
            "target": str(target),
            "pipeline": str(request.pipeline),
            "data": recall.data_digest(data),
            "labels": None if wish.labels is None else feeds_digest([{"labels": wish.labels}]),
            "wish": {f.name: str(getattr(wish, f.name)) for f in fields(wish) if f.name != "labels"},
            "recover": request.recover,
            "seed": request.seed,
            "machine": sorted(cpu_features()),
        }

    found = recall.value("int8", ingredients, search)
    for text in found["told"]:
        request.say(text)
    outcome: dict[str, Any] = found["outcome"]
    return outcome


def _prove(request: Request, target: Target, result: Result, pipeline: Pipeline) -> dict[str, Any]:
    """Compare the optimized model with the original, both as written."""
    counts = Counter[str]()
    for step in result.steps:
        counts[step.pass_name] += step.rewrites
    allowed = equivalence.Bound.of(
        {p: counts[p.pass_name()] for p in pipeline.passes}, equivalence.float_types(request.model)
    )
    feeds, shapes = request.feeds, request.options.shapes
    recall = request.recall

    def ingredients() -> dict[str, Any]:
        return {
            "original": recall.fingerprint(request.model),
            "optimized": recall.fingerprint(result.model),
            "feeds": feeds_digest(feeds),
            "shapes": {name: str(wanted) for name, wanted in sorted(shapes.items())},
            "allowed": str(allowed),
            "seed": request.seed,
        }

    found = recall.value("proof", ingredients, lambda: _compared(request, result, feeds, allowed))
    proof: dict[str, Any] = found["proof"]
    if "unproven" in proof:
        request.say(f"{target}: the numbers are not proven: {proof['unproven']}")
    if found["doubt"] is not None:
        request.say(f"{target}: {found['doubt']}")
    return proof


def _compared(
    request: Request, result: Result, feeds: Sequence[Feeds] | None, allowed: equivalence.Bound
) -> dict[str, Any]:
    """The proof, for the manifest, and what to say of it."""
    shapes = request.options.shapes
    if feeds is None and _values(request.model, shapes):
        feeds = list(samples(request.model, request.seed, shapes))
    try:
        report = equivalence.compare(
            request.model, result.model, feeds=feeds, allowed=allowed, seed=request.seed, shapes=shapes
        )
    except UnsupportedModel as error:
        return {"proof": {"unproven": str(error)}, "doubt": None}
    try:
        report.require("the optimized model computes something else")
    except NotEquivalent as error:
        raise NotEquivalent(
            f"{error}; `graphopt bisect` names the rewrite, --continue-without-failing builds without it"
        ) from None
    proof = {
        "max_abs": _finite(max((d.max_abs for d in report.differences), default=0.0)),
        "relative": _finite(max((d.relative for d in report.differences), default=0.0)),
        "tolerance": _finite(report.tolerance),
        "samples": report.samples,
        "evaluator": report.engine,
    }
    return {"proof": proof, "doubt": report.doubt}


def _finite(value: float) -> float | None:
    """JSON has no infinity; null says that there is no bound, or that outputs differ in more than numbers."""
    return value if math.isfinite(value) else None


def _values(model: Model, shapes: Mapping[str, ShapeRange]) -> dict[str, TensorSpec]:
    return {s.name: s for s in model.inputs if s.name in shapes and takes_values(s, shapes[s.name])}


def samples(model: Model, seed: int = 0, shapes: Mapping[str, ShapeRange] | None = None) -> Iterator[Arrays]:
    """Generated feeds that fit `shapes`, ranges of values included."""
    shapes = shapes or {}
    values = _values(model, shapes)
    rest = {name: wanted for name, wanted in shapes.items() if name not in values}
    for number, feeds in enumerate(equivalence.input_samples(model, seed=seed, shapes=rest)):
        for name, spec in values.items():
            feeds[name] = value_array(spec, (shapes[name].opt, shapes[name].min, shapes[name].max)[number % 3])
        yield feeds


def value_array(spec: TensorSpec, values: Sequence[int]) -> np.ndarray[Any, Any]:
    """What to feed to an input that holds a shape."""
    return np.asarray(values, spec.dtype).reshape([d for d in spec.shape or () if isinstance(d, int)])


def _manifest(request: Request, built: Sequence[_Built], folder: Path) -> dict[str, Any]:
    model = request.model
    return {
        "schema": bundles.SCHEMA,
        "graphopt": graphopt.__version__,
        "model": {
            "name": model.graph.name or "",
            "sha256": request.recall.fingerprint(model),
            "ir_version": model.ir_version,
            "opsets": dict(sorted(model.opsets.items())),
        },
        "inputs": [_spec(s) for s in built[0].result.model.inputs],
        "outputs": [_spec(s) for s in built[0].result.model.outputs],
        "pipeline": str(request.pipeline),
        "build": request.record if request.record is not None else _record(request),
        "variants": [_entry(request, b, folder) for b in built],
        "fallbacks": request.fallbacks,
    }


def _record(request: Request) -> dict[str, Any]:
    """What a call from Python can say of itself: values and no files."""
    options = {f.name.replace("_", "-"): getattr(request.options, f.name) for f in fields(BuildOptions)}
    plain = {name: value for name, value in options.items() if isinstance(value, bool | int | str)}
    asked: dict[str, Any] = {
        "targets": [str(t) for t in request.targets],
        "passes": str(request.pipeline),
        "shapes": {name: str(wanted) for name, wanted in sorted(request.options.shapes.items())},
        "seed": request.seed,
        **{name: value for name, value in plain.items() if value != getattr(BuildOptions(), name.replace("-", "_"))},
    }
    return {"request": asked, "files": [], "versions": provenance.versions(asked["targets"])}


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": None if spec.shape is None else list(spec.shape)}


def _entry(request: Request, built: _Built, folder: Path) -> dict[str, Any]:
    before, after = census("", request.model), census("", built.result.model)
    entry: dict[str, Any] = {
        "target": str(built.target),
        "files": [
            {"name": name, "sha256": bundles.sha256(folder / name), "bytes": (folder / name).stat().st_size}
            for name in built.artifact.files
        ],
        "shapes": {name: str(r) for name, r in sorted(built.artifact.shapes.items())},
        "versions": dict(sorted(built.artifact.versions.items())),
        "passes": [{"name": s.pass_name, "rewrites": s.rewrites} for s in built.result.steps],
        "nodes": {"before": before.nodes, "after": after.nodes},
        "weights": {"before": before.initializer_bytes, "after": after.initializer_bytes},
        "proof": built.proof,
        "kernels": [
            {
                "name": k.name,
                "inputs": list(k.inputs),
                "constants": list(k.constants),
                "outputs": list(k.outputs),
                "origin": list(k.origin),
            }
            for k in built.artifact.kernels
        ],
        "remarks": [*built.artifact.remarks, *map(str, built.result.remarks)],
    }
    if "prune-channels" in built.result.facts:
        entry["pruning"] = built.result.facts["prune-channels"]
    if built.int8 is not None:
        entry["int8"] = built.int8.as_dict(times=request.measure)
    if built.dropped is not None:
        entry["dropped"] = [d.as_dict() for d in built.dropped]
    if request.measure and built.target.runtime == "ort":
        entry["latency"] = _latency(request, built, folder)
    return entry


def _latency(request: Request, built: _Built, folder: Path) -> dict[str, Any] | None:
    """Time the variant against the original under the same runtime, interleaved."""
    options = replace(request.options, spinning=False)
    original = folder / ".original.onnx"
    written = ir.save(request.model, original)
    try:
        sample = _one_sample(request)[0]
        before = built.backend.open(folder, Artifact((original.name,), {}), built.target, options)
        after = built.backend.open(folder, built.artifact, built.target, options)
        timings = measure.interleave({"original": lambda: before.run(sample), "optimized": lambda: after.run(sample)})
        built.timings.append(timings)
        return timings.compare("original", "optimized").as_dict()
    except (UnsupportedModel, UsageError, BackendUnavailable) as error:
        request.say(f"{built.target}: not timed: {error}")
        return None
    finally:
        for path in written:
            path.unlink(missing_ok=True)
