"""One build from its settings, in this process or, to fill the cache, in others."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from graphopt.commands.arguments import load, make_instruments, parse_pipeline, parse_ranges, read_samples
from graphopt.commands.terminal import say, watched
from graphopt.errors import UsageError, UserError

if TYPE_CHECKING:
    from graphopt.cache import Cache, Digests
    from graphopt.ir import Model
    from graphopt.pipeline import Pipeline
    from graphopt.provenance import File
    from graphopt.recipe import Settings

_WORKER: Final = "from graphopt.commands.make import warm; warm()"


def make(
    settings: Settings,
    cache: Cache | None,
    digests: Digests,
    *,
    progress: Any = lambda target: None,
    tell: Callable[[str], None] = say,
    compare_each: bool = False,
    reproducer: Path | None = None,
    html: Path | None = None,
) -> Any:
    """Build what `settings` say; returns the manifest.

    Raises:
        UserError: as `graphopt.building.build`, and where an input changed meanwhile.
    """
    from graphopt import building, provenance
    from graphopt.backend import BuildOptions
    from graphopt.recall import Recall
    from graphopt.target import Target

    ranges = parse_ranges([f"{name}={text}" for name, text in settings.shapes.items()])
    targets = [Target.parse(t) for t in settings.targets] or None
    pipeline = _pruning(parse_pipeline(settings.passes, settings.level, "default"), settings)
    options = BuildOptions(
        shapes=ranges,
        threads=settings.threads,
        graph_level=settings.graph_level,
        workspace=None if settings.workspace is None else settings.workspace << 20,
        optimization_level=settings.optimization_level,
        timing_cache=settings.timing_cache,
        tf32=settings.tf32,
        sparse_weights=settings.sparse_weights,
        refit=settings.refit,
        version_compatible=settings.version_compatible,
        hardware_compatible=settings.hardware_compatible,
    )
    loaded, files = _inputs(settings, digests)
    feeds, samples = read_samples(settings.data, loaded.inputs, pipeline, settings.int8)
    wish = _int8_wish(settings, samples)
    with watched(samples):
        bundle = building.build(
            loaded,
            settings.output,
            targets,
            pipeline,
            options=options,
            feeds=feeds,
            data=samples,
            int8=wish,
            fallback=settings.fallback,
            measure=settings.measure or settings.budget.max_latency_ratio is not None,
            seed=settings.seed,
            allow_domains=settings.allow_domains,
            say=tell,
            progress=progress,
            instruments=make_instruments(
                compare_each=compare_each, feeds=feeds, ranges=ranges, seed=settings.seed, reproducer=reproducer
            ),
            html=html,
            recall=Recall(cache, lambda: provenance.require_unchanged(files, digests)),
            budget=settings.budget,
            record=provenance.record(settings, files),
            recover=settings.continue_without_failing,
        )
    return bundle.manifest


def _inputs(settings: Settings, digests: Digests) -> tuple[Model, list[File]]:
    """The model and what identifies the files, which hold the same until `require_unchanged` says otherwise."""
    from graphopt import provenance

    files = provenance.input_files(settings, digests)
    model = load(str(settings.model))
    if model.external:
        files = provenance.input_files(settings, digests, model.external)
        model = load(str(settings.model))  # again, so that what is mapped is not older than its digests
    return model, [file for file in files if file.sha256]  # what is missing is told by who reads it


def _pruning(pipeline: Pipeline, settings: Settings) -> Pipeline:
    """The pipeline with pruning in front, of the simplified model: what targets fuse then fits the widths that are left."""
    from graphopt.pipeline import Pipeline

    share = settings.prune
    if share is None:
        return pipeline
    if not 0 < share < 1:
        raise UsageError(f"--prune takes the share to remove, between 0 and 1, not {share:g}; as in --prune 0.3")
    if settings.data is None:
        raise UsageError("--prune needs samples: --data calib.npz (input name -> samples on the first axis, no labels)")
    simplified = Pipeline.parse("O2") if len(pipeline.steps) > 1 else Pipeline()
    return simplified + Pipeline.parse(f"prune-channels{{ratio={share!r}}}") + pipeline


def _int8_wish(settings: Settings, data: Any) -> Any:
    """The options of ``--int8`` as one value, None without it."""
    labels, metric, max_drop = settings.labels, settings.metric, settings.max_drop
    if not settings.int8:
        if labels is not None or metric is not None or max_drop is not None or not settings.gate:
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
    return Wish(told, max_drop if max_drop is not None else settings.budget.max_drop, settings.gate)


# --------------------------------------------------------------------------------------------------- other processes


def warm_all(builds: Sequence[Settings], cache: Cache, jobs: int) -> None:
    """Run `builds` in up to `jobs` processes at a time for what they leave in the cache; what fails there will fail, and be told,
    when it is built in earnest."""

    def one(settings: Settings) -> None:
        asked = {"cache": str(cache.folder), "bound": cache.bound, "path": sys.path, "settings": settings.as_table()}
        subprocess.run(
            [sys.executable, "-c", _WORKER],
            input=json.dumps(asked).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )

    pool = ThreadPoolExecutor(jobs)
    try:
        list(pool.map(one, builds))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt starts no more of them


def warm() -> None:
    """What such a process does: the build that stdin describes, into a folder that it throws away."""
    asked = json.loads(sys.stdin.buffer.read())
    sys.path[:] = asked["path"]
    from graphopt.cache import Cache, Digests
    from graphopt.recipe import Budget, Settings

    settings = Settings.of_table(asked["settings"])
    cache = Cache(Path(asked["cache"]), asked["bound"])
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        alone = replace(
            settings,
            output=Path(folder) / "out",
            fallback=False,
            measure=False,
            budget=Budget(max_drop=settings.budget.max_drop),
        )
        try:
            make(alone, cache, Digests(cache), tell=lambda text: None)
        except UserError:
            sys.exit(1)
