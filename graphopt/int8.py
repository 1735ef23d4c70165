"""The way to int8: quantize for the target, look at what runs, and take back what costs too much accuracy or time.

The search ends in a pipeline, so that what it found can be read, written down and run again: the layers to leave in float are the
``exclude`` of ``quantize-qdq``. Accuracy is judged on the kernels that will run (ONNX Runtime's own session) where this machine has
them, else on the graph as written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from graphopt import coverage, isolation, measure
from graphopt.analyses import weights
from graphopt.analyses.placement import operators
from graphopt.analyses.twins import Switches, Twin
from graphopt.backend import Kernel
from graphopt.coverage import Layer
from graphopt.data import Data
from graphopt.discovery import find_pass
from graphopt.errors import UsageError
from graphopt.evaluate import evaluate_node
from graphopt.ir import Model, saves
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline, Recovery, Result
from graphopt.target import Target

Array = np.ndarray[Any, Any]
Metric = Literal["top1", "agreement"]

_RANKED_ON: Final = 64  # samples that the ranking of layers looks at
_ROUNDS: Final = 15  # of timing


@dataclass(frozen=True)
class Wish:
    """What a user asks of int8."""

    labels: Array | None = None  # class numbers of the samples; None: agreement with the float model counts
    max_drop: float | None = None  # points of the metric that may be lost; None: whatever comes
    gate: bool = True  # leave in float what is slower in int8 (ONNX Runtime on the CPU, measured here)
    options: Mapping[str, Any] = field(default_factory=dict)  # of quantize-qdq


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's int8 does to the outputs of the model, all others in float."""

    name: str
    op: str
    sqnr: float  # dB, of the outputs, this layer alone

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "op": self.op, "sqnr_db": round(self.sqnr, 2)}


@dataclass
class Outcome:
    """What the search found."""

    pipeline: Pipeline
    result: Result
    layers: list[Layer]
    metric: Metric
    before: float  # percent, of the float model
    after: float  # percent, of the result
    sqnr: float  # dB, of the outputs on the kernels that run
    sqnr_emulated: float  # dB, as the graph is written
    excluded: tuple[str, ...] = ()
    met: bool = True  # whether max_drop holds
    notes: list[str] = field(default_factory=list)

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.before - self.after

    def built(self, result: Result, kernels: Sequence[Kernel]) -> None:
        """Take in what the backend made of the model."""
        self.result = result
        if kernels:
            self.layers = coverage.kernel_coverage(result.model, kernels, result.remarks)

    def __str__(self) -> str:
        share = f"{sum(layer.int8 for layer in self.layers)} of {len(self.layers)} layers run in int8"
        told = "" if np.isnan(self.after) else f"{self.metric} {self.before:.2f} -> {self.after:.2f} %, "
        return (
            f"{share}; {told}outputs {min(self.sqnr, 200.0):.1f} dB ({min(self.sqnr_emulated, 200.0):.1f} as written)"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pipeline": str(self.pipeline),
            "metric": self.metric,
            "before": None if np.isnan(self.before) else round(self.before, 3),
            "after": None if np.isnan(self.after) else round(self.after, 3),
            "max_drop_met": self.met,
            "sqnr_db": round(min(self.sqnr, 200.0), 2),
            "sqnr_emulated_db": round(min(self.sqnr_emulated, 200.0), 2),
            "layers": [layer.as_dict() for layer in self.layers],
            "excluded": list(self.excluded),
            "notes": self.notes,
        }


def load_labels(path: Path, data: Data) -> Array:
    """Class numbers, one a sample of `data`: an .npy file, or an .npz with one array of integers or one called y or labels.

    Raises:
        UsageError: no such file, or it does not fit.
    """
    try:
        found: Any = np.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"labels {str(path)!r} cannot be read ({error}); store an .npy file of class numbers"
        ) from None
    if not isinstance(found, np.ndarray):
        names = [n for n in found.files if n in ("y", "labels")] or found.files
        if len(names) != 1:
            raise UsageError(f"labels {str(path)!r} holds {found.files}; store one array, or call it 'y'")
        found = found[names[0]]
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise UsageError(f"labels {str(path)!r} is {found.dtype}{list(found.shape)}; store one class number a sample")
    if data.count is not None and len(found) != data.count:
        raise UsageError(f"labels {str(path)!r} holds {len(found)} labels, {data.name} {data.count} samples")
    return np.asarray(found)


def sqnr(reference: Sequence[Array], other: Sequence[Array]) -> float:
    """Signal to noise of `other` in dB, over all arrays."""
    signal = sum(float(np.sum(np.square(a, dtype=np.float64))) for a in reference)
    noise = sum(
        float(np.sum(np.square(np.subtract(a, b, dtype=np.float64)))) for a, b in zip(reference, other, strict=True)
    )
    return 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")


class Judge:
    """Runs models on the data and compares them with the float model."""

    def __init__(self, model: Model, data: Data, labels: Array | None, limit: int | None = None) -> None:
        self.feeds = list(data.feeds(32, limit))
        self.labels = labels
        self.reference = self.outputs(model, optimized=False)
        self.classes = self.reference[0][0].ndim >= 2
        if labels is not None and not self.classes:
            raise UsageError(
                "top1 needs an output of [samples, classes] first; judge this model by its outputs' SQNR instead"
            )

    def outputs(self, model: Model, optimized: bool) -> list[list[Array]]:
        """The outputs for each feed; `optimized`: on the kernels that ONNX Runtime would run, else as written."""
        session = _session(model, optimized)
        found = []
        for feeds in self.feeds:
            with isolation.step("int8: measuring the model"):
                found.append([np.asarray(v) for v in session.run(None, feeds)])
        return found

    def metric(self, found: list[list[Array]]) -> float:
        """Percent of samples classified as the labels say; without labels, as the float model does."""
        if not self.classes:
            return float("nan")
        mine = np.concatenate([v[0].reshape(-1, v[0].shape[-1]).argmax(-1) for v in found])
        if self.labels is not None:
            return 100 * float(np.mean(mine == self.labels[: len(mine)]))
        theirs = np.concatenate([v[0].reshape(-1, v[0].shape[-1]).argmax(-1) for v in self.reference])
        return 100 * float(np.mean(mine == theirs))

    def sqnr(self, found: list[list[Array]]) -> float:
        """Of all float outputs."""
        pairs = [
            (a, b)
            for x, y in zip(self.reference, found, strict=True)
            for a, b in zip(x, y, strict=True)
            if a.dtype.kind == "f"
        ]
        return sqnr([a for a, _ in pairs], [b for _, b in pairs])


def _session(model: Model, optimized: bool, threads: int | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    with isolation.step("int8: loading the model in ONNX Runtime"):
        return ort.InferenceSession(saves(model), options, providers=["CPUExecutionProvider"])


def search(
    model: Model,
    target: Target,
    pipeline: Pipeline,
    data: Data,
    *,
    wish: Wish | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    recovery: Recovery | None = None,
) -> Outcome:
    """Find the pipeline that brings `model` to int8 on `target`.

    Args:
        model: in float.
        target: decides where pairs stand and which kernels judge.
        pipeline: what runs before; a ``quantize-qdq`` in it is taken as the wish and replaced.
        data: calibration samples.
        wish: what to hold and what to leave.
        seed: of the timing.
        say: is told what was found.
        recovery: of the float passes.

    Returns:
        The best that was found, whether or not `max_drop` holds.
    """
    quantize: Any = find_pass("quantize-qdq")
    wish = wish or Wish()
    labels, max_drop = wish.labels, wish.max_drop
    template = next((p for p in pipeline.passes if isinstance(p, quantize)), quantize())
    template = replace(template, **dict(wish.options))
    before = Pipeline(tuple(s for s in pipeline.steps if not isinstance(s, quantize)))
    floating = before.run(model, _context(target, data, seed), recovery=recovery).model
    on_kernels = target.runtime == "ort"
    judge = Judge(floating, data, labels)
    runs: dict[tuple[str, ...], tuple[Result, list[list[Array]], float]] = {}

    def attempt(excluded: tuple[str, ...]) -> tuple[Result, list[list[Array]], float]:
        if excluded not in runs:
            step = _excluding(template, excluded)
            result = Pipeline((step,)).run(floating, _context(target, data, seed))
            found = judge.outputs(result.model, on_kernels)
            runs[excluded] = (result, found, judge.metric(found))
        return runs[excluded]

    notes: list[str] = []
    excluded: tuple[str, ...] = ()
    if wish.gate and on_kernels:
        excluded = _gate(floating, attempt, data, notes, say)
    reference = judge.metric(judge.reference)
    met = True
    if max_drop is not None:
        gated = len(excluded)
        excluded, met = _regain(floating, target, data, template, attempt, excluded, reference - max_drop, seed)
        if not met:
            say(
                f"max-drop {max_drop} cannot be met; the best found loses {reference - attempt(excluded)[2]:.2f} points"
            )
        elif len(excluded) > gated:
            say(f"{len(excluded) - gated} layers stay float so that the drop is at most {max_drop}")
    result, found, after = attempt(excluded)
    layers = coverage.onnxruntime_coverage(result.model, result.remarks) if on_kernels else []
    emulated = judge.outputs(result.model, optimized=False) if on_kernels else found
    outcome = Outcome(
        Pipeline((*before.steps, _excluding(template, excluded))),
        result,
        layers,
        "top1" if labels is not None else "agreement",
        reference,
        after,
        judge.sqnr(found),
        judge.sqnr(emulated),
        excluded,
        met,
        notes,
    )
    if on_kernels and outcome.sqnr < outcome.sqnr_emulated - 1 and outcome.sqnr < 60:
        told = f"the kernels of this machine lose {outcome.sqnr_emulated - outcome.sqnr:.1f} dB against the graph as written: they saturate"
        notes.append(told)
        say(told + "; use pair-safe weights")
    return outcome


def _context(target: Target, data: Data, seed: int) -> Context:
    return Context(target=target, seed=seed, evaluate=evaluate_node, data=data)


def _excluding(wish: Any, names: tuple[str, ...]) -> Pass:
    step: Pass = replace(wish, exclude=tuple(dict.fromkeys((*wish.exclude, *names))))
    return step


def _regain(
    floating: Model,
    target: Target,
    data: Data,
    wish: Any,
    attempt: Callable[[tuple[str, ...]], tuple[Result, list[list[Array]], float]],
    excluded: tuple[str, ...],
    floor: float,
    seed: int,
) -> tuple[tuple[str, ...], bool]:
    """Leave ever more of the most sensitive layers in float until the metric reaches `floor`, then as few as suffice."""
    if attempt(excluded)[2] >= floor:
        return excluded, True
    ranked = [s.name for s in sensitivity(floating, target, data, wish=wish, seed=seed) if s.name not in excluded]
    tried: dict[int, tuple[str, ...]] = {0: excluded}
    count, low, high = 1, 0, None
    while high is None:
        count = min(count, len(ranked))
        tried[count] = (*excluded, *ranked[:count])
        if attempt(tried[count])[2] >= floor:
            high = count
        elif count == len(ranked):
            break
        else:
            low, count = count, count * 2
    if high is None:
        best = max(tried.values(), key=lambda e: (attempt(e)[2], -len(e)))
        return best, False
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = (*excluded, *ranked[:middle])
        if attempt(tried[middle])[2] >= floor:
            high = middle
        else:
            low = middle
    return tried[high], True


def sensitivity(
    model: Model, target: Target, data: Data, *, wish: Any = None, seed: int = 0, limit: int = _RANKED_ON
) -> list[Sensitivity]:
    """Each weighted operator's int8 alone, the worst first. One session judges all: every operator has a switch.

    Args:
        model: in float, already optimized.
        target: decides the codes.
        data: calibration samples.
        wish: options of ``quantize-qdq``.
        seed: of the passes.
        limit: samples to judge on.
    """
    quantize: Any = find_pass("quantize-qdq")
    twins: dict[str, Twin] = (wish or quantize()).twins(model, _context(target, data, seed))
    switches = Switches(model, twins)
    feeds = list(data.feeds(32, limit))
    reference = [a for f in feeds for a in switches.run(f, ()).values() if a.dtype.kind == "f"]
    ops = {n.name: n.op for n in model.graph.nodes}
    found = []
    for name in twins:
        other = [a for f in feeds for a in switches.run(f, (name,)).values() if a.dtype.kind == "f"]
        found.append(Sensitivity(name, ops[name], sqnr(reference, other)))
    return sorted(found, key=lambda s: s.sqnr)


def _gate(
    floating: Model,
    attempt: Callable[[tuple[str, ...]], tuple[Result, list[list[Array]], float]],
    data: Data,
    notes: list[str],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """The layers that had better stay float, by timing whole models with groups of layers in float; in the end all of them."""
    depthwise, narrow = [], []
    nodes = list(operators(floating))
    for node in nodes:
        shape = tuple(node.inputs[1].shape or ()) if len(node.inputs) > 1 else ()
        if weights.is_depthwise(node, shape):
            depthwise.append(node.name)
        elif node.op == "Conv" and len(shape) > 2 and shape[1] <= 4:
            narrow.append(node.name)
    plans: dict[str, tuple[str, ...]] = {"all in int8": ()}
    if depthwise:
        plans["depthwise in float"] = tuple(depthwise)
    if narrow:
        plans["narrow inputs in float"] = tuple(narrow)
    if depthwise and narrow:
        plans["depthwise and narrow inputs in float"] = (*depthwise, *narrow)
    sample = next(iter(data.feeds(1, 1)))
    calls: dict[str, Callable[[], object]] = {}
    for name, excluded in plans.items():
        session = _session(attempt(excluded)[0].model, True)
        calls[name] = lambda s=session: s.run(None, sample)  # type: ignore[misc]
    session = _session(floating, True)
    calls["float"] = lambda: session.run(None, sample)
    timings = measure.interleave(calls, rounds=_ROUNDS)
    ratios = {name: timings.compare("float", name) for name in plans}
    best = min(ratios, key=lambda n: ratios[n].ratio)
    told = "; ".join(f"{n}: x{c.ratio:.2f}" for n, c in ratios.items())
    notes.append(f"time against float on one sample: {told}")
    if ratios[best].ratio >= 1:
        say(f"int8 is not faster here ({told}): everything stays float (--no-gate forces int8)")
        return tuple(n.name for n in nodes)
    if best != "all in int8":
        say(f"{best}: faster ({told})")
    return plans[best]
