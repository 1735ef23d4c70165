"""The way to int8: quantize for the target, look at what runs, and take back what costs too much accuracy or time.

The search ends in a pipeline, so that what it found can be read, written down and run again: the layers to leave in float are the
``exclude`` of ``quantize-qdq``. Accuracy is judged on the kernels that will run (ONNX Runtime's own session) where this machine has
them, else on the graph as written.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import coverage, isolation, measure
from graphopt.analyses import calibration, weights
from graphopt.analyses.macs import macs
from graphopt.analyses.placement import operators
from graphopt.analyses.quantized import forms
from graphopt.analyses.twins import Switches, Twin, judge
from graphopt.backend import Kernel
from graphopt.coverage import Layer
from graphopt.data import Data, ListData
from graphopt.discovery import find_pass
from graphopt.errors import UnsupportedModel, UsageError
from graphopt.evaluate import clock_of, evaluate_node
from graphopt.ir import Model, saves
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline, Recovery, Result
from graphopt.target import Target

Array = np.ndarray[Any, Any]
Metric = Literal["top1", "agreement"]

_RANKED_ON: Final = 64  # samples that the ranking of layers looks at
_EMULATED_WORK: Final = 1 << 36
_LAYER_WORK: Final = 1 << 36
_RANKING_WORK: Final = 1 << 40  # for all layers together
_GAIN: Final = 0.3  # dB that equalizing channels has to bring
_SECONDS: Final = 4.0  # of timing, about
_SMALL: Final = 0.02  # of all multiply-accumulates, that the smallest layers have together
_JUDGED_WORK: Final = 1 << 40  # multiply-accumulates of the samples that a model without labels is judged on, about
_LATE: Final = frozenset(
    ["fuse-attention", "fuse-skip-layer-norm", "fuse-bias-gelu"]
)  # into operators that hold weights or sums
_KEPT: Final = 64 << 20  # bytes of outputs of the float model that are kept between runs


@dataclass(frozen=True)
class Wish:
    """What a user asks of int8."""

    labels: Array | None = None  # class numbers of the samples; None: agreement with the float model counts
    max_drop: float | None = None  # points of the metric that may be lost; None: whatever comes
    gate: bool = True  # leave in float what is slower in int8 (ONNX Runtime on the CPU, measured here)
    equalize: bool = True  # try equalize-channels before, and keep it where the outputs gain by it
    options: Mapping[str, Any] = field(default_factory=dict)  # of quantize-qdq


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's int8 does to the outputs of the model, all others in float."""

    name: str
    op: str
    sqnr: float  # dB, of the outputs, this layer alone
    own: float | None = None  # dB, of the layer's own result

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "op": self.op, "sqnr_db": round(min(self.sqnr, 200.0), 2), "layer_sqnr_db": self.own}


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
    reasons: dict[str, str] = field(default_factory=dict)  # why the search left a layer in float, by name
    alone: dict[str, float] = field(default_factory=dict)  # dB, of a layer's own result, this layer alone in int8

    def take(self, layers: list[Layer]) -> None:
        """Take in what runs, with the search's own reasons."""
        self.layers = [
            replace(x, why="" if x.int8 else self.reasons.get(x.name, x.why), sqnr_db=self.alone.get(x.name))
            for x in layers
        ]

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.before - self.after

    def built(self, result: Result, kernels: Sequence[Kernel]) -> None:
        """Take in what the backend made of the model."""
        self.result = result
        if kernels:
            self.take(coverage.kernel_coverage(result.model, kernels, result.remarks))

    def __str__(self) -> str:
        share = f"{sum(layer.int8 for layer in self.layers)} of {len(self.layers)} layers run in int8"
        if not any(layer.int8 for layer in self.layers):
            told_of = next((layer for layer in self.layers if layer.why), None)
            share += f" ({told_of.name!r}: {told_of.why})" if told_of is not None else ""
        told = "" if np.isnan(self.after) else f"{self.metric} {self.before:.2f} -> {self.after:.2f} %, "
        return (
            f"{share}; {told}outputs {min(self.sqnr, 200.0):.1f} dB ({min(self.sqnr_emulated, 200.0):.1f} as written)"
        )

    def state(self) -> dict[str, Any]:
        """All of it but the result, as JSON values that `from_state` takes."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "result"}
        return {**plain, "pipeline": str(self.pipeline), "layers": [layer.as_dict() for layer in self.layers]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], result: Result) -> Outcome:
        """The outcome that `state` described, with what its pipeline made."""
        values = dict(state)
        values["pipeline"] = Pipeline.parse(state["pipeline"])
        values["layers"] = [Layer(**layer) for layer in state["layers"]]
        values["excluded"] = tuple(state["excluded"])
        return cls(result=result, **values)

    def as_dict(self, times: bool = True) -> dict[str, Any]:
        """For JSON; without `times` of kernels, which are never the same twice."""
        layers = [layer.as_dict() for layer in self.layers]
        for layer in () if times else layers:
            del layer["microseconds"]
        return {
            "pipeline": str(self.pipeline),
            "metric": self.metric,
            "before": None if np.isnan(self.before) else round(self.before, 3),
            "after": None if np.isnan(self.after) else round(self.after, 3),
            "max_drop_met": self.met,
            "sqnr_db": round(min(self.sqnr, 200.0), 2),
            "sqnr_emulated_db": round(min(self.sqnr_emulated, 200.0), 2),
            "layers": layers,
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


def check_classes(labels: Array, classes: int) -> None:
    """
    Raises:
        UsageError: one of `labels` is no class of a model that tells so many apart.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise UsageError(
            f"label {labels[wrong[0]]} of sample {wrong[0]} is no class: the model's first output has {classes}, "
            f"0 to {classes - 1}; are these labels of another data set?"
        )


def sqnr(reference: Sequence[Array], other: Sequence[Array]) -> float:
    """Signal to noise of `other` in dB, over all arrays."""
    signal = sum(float(np.sum(np.square(a, dtype=np.float64))) for a in reference)
    noise = sum(
        float(np.sum(np.square(np.subtract(a, b, dtype=np.float64)))) for a, b in zip(reference, other, strict=True)
    )
    return 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")


class Judge:
    """Runs models on the data and compares them with the float model, a batch at a time."""

    def __init__(self, model: Model, data: Data, labels: Array | None, limit: int | None = None) -> None:
        """
        Raises:
            UnsupportedModel: ONNX Runtime cannot run the model on these samples.
            UsageError: labels for a model without classes.
        """
        if limit is None and labels is None:
            limit = calibration.effort(model, data).samples(_JUDGED_WORK, 32, 1 << 30)
        self.data, self.labels, self.limit = data, labels, limit
        self._float = model
        work = calibration.effort(model, data)
        self.batch = data.at_once(work.at_once)
        self._kept: list[list[Any]] | None = []  # outputs of the float model, while they are small
        used = 0
        shape: tuple[int, ...] = ()
        for number, outputs in enumerate(self.outputs(model, optimized=True)):
            if not number:
                self.classes = bool(outputs) and _has_classes(outputs[0])
                shape = np.shape(outputs[0]) if outputs else ()
            used += sum(a.nbytes for a in outputs if isinstance(a, np.ndarray))
            if used > _KEPT:
                self._kept = None
                break
            assert self._kept is not None
            self._kept.append(outputs)
        if labels is not None and not (self.classes and len(shape) == 2):
            raise UsageError(
                f"top1 needs a first output of [samples, classes], this model's is {list(shape)}; "
                "leave out --labels and judge by agreement with the float model"
            )
        if labels is not None:
            check_classes(labels, shape[1])

    def outputs(self, model: Model, optimized: bool) -> Iterator[list[Any]]:
        """The outputs for each batch; `optimized`: on the kernels that ONNX Runtime would run, else as written."""
        session = session_of(model, optimized)
        for feeds in self.data.feeds(self.batch, self.limit):
            try:
                with isolation.step("int8: measuring the model"):
                    outputs = session.run(None, feeds)
            except Exception as error:
                raise UnsupportedModel(
                    f"ONNX Runtime cannot run the model on {self.data.name}: {' '.join(str(error).split())[:300]}"
                ) from None
            yield outputs

    def score(self, model: Model, optimized: bool, batches: int | None = None) -> Score:
        """How `model` compares with the float model, and with the labels where there are some, on so many batches."""
        reference = iter(self._kept) if self._kept is not None else self.outputs(self._float, optimized=True)
        signal = noise = 0.0
        right = seen = own = 0.0
        for mine, theirs in itertools.islice(zip(self.outputs(model, optimized), reference, strict=True), batches):
            for a, b in zip(theirs, mine, strict=True):
                if not isinstance(a, np.ndarray) or a.dtype.kind != "f" or a.shape != np.shape(b):
                    continue
                real = np.isfinite(a)
                a, b = (np.where(real, v, 0).astype(np.float64) for v in (a, b))
                signal += float(np.sum(a * a))
                noise += float(np.sum((a - b) ** 2))
            if not self.classes:
                continue
            winners = [v[0].reshape(-1, v[0].shape[-1]).argmax(-1) for v in (theirs, mine)]
            count = len(winners[0])
            against = winners[0] if self.labels is None else self.labels[int(seen) : int(seen) + count]
            right += float(np.sum(winners[1] == against))
            own += float(np.sum(winners[0] == against))
            seen += count
        ratio = 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")
        if self.classes:
            return Score(100 * right / max(seen, 1), 100 * own / max(seen, 1), ratio)
        return Score(100 * max(0.0, 1 - 10 ** (-ratio / 20)), 100.0, ratio)


@dataclass(frozen=True)
class Score:
    """What a `Judge` found."""

    metric: float  # percent
    reference: float  # percent, of the float model
    sqnr: float  # dB, over all float outputs


def _has_classes(output: Any) -> bool:
    return isinstance(output, np.ndarray) and output.dtype.kind == "f" and output.ndim >= 2 and output.shape[-1] > 1


def session_of(model: Model, optimized: bool, threads: int | None = None) -> Any:
    """A model in ONNX Runtime's CPU provider.

    Raises:
        UnsupportedModel: it refuses the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        with isolation.step("int8: loading the model in ONNX Runtime"):
            return ort.InferenceSession(saves(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedModel(f"ONNX Runtime refuses the model: {' '.join(str(error).split())[:300]}") from None


def fusions_last(pipeline: Pipeline) -> Pipeline:
    """`pipeline` with fusions into a runtime's own operators behind the last pass that quantizes, since those hide the weights from it."""
    last = max((i for i, s in enumerate(pipeline.steps) if _is_quantizing(s)), default=None)
    if last is None:
        return pipeline
    early, late = _split(pipeline.steps[: last + 1])
    return Pipeline((*early, *late, *pipeline.steps[last + 1 :]))


def before_quantizing(pipeline: Pipeline) -> Pipeline:
    """The steps of `pipeline` that run on the float model in front of ``quantize-qdq``."""
    return Pipeline(tuple(_split([s for s in pipeline.steps if not _is_quantizing(s)])[0]))


def _split(steps: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    late = [s for s in steps if isinstance(s, Pass) and s.pass_name() in _LATE]
    return [s for s in steps if not any(s is x for x in late)], late


def _is_quantizing(step: Any) -> bool:
    return isinstance(step, Pass) and step.pass_name().startswith("quantize-")


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
    return _Search(model, target, pipeline, data, wish or Wish(), seed, say, recovery).run()


class _Search:
    def __init__(
        self,
        model: Model,
        target: Target,
        pipeline: Pipeline,
        data: Data,
        wish: Wish,
        seed: int,
        say: Callable[[str], None],
        recovery: Recovery | None,
    ) -> None:
        quantize: Any = find_pass("quantize-qdq")
        self.target, self.data, self.wish, self.seed, self.say = target, data, wish, seed, say
        template = next((p for p in pipeline.passes if isinstance(p, quantize)), quantize())
        self.template: Any = replace(template, **dict(wish.options))
        early, late = _split([s for s in pipeline.steps if not isinstance(s, quantize)])
        self.before, self.after = Pipeline(tuple(early)), tuple(late)
        self.floating = self.before.run(model, self.context(), recovery=recovery).model
        self.on_kernels = target.runtime == "ort"
        self.judge = Judge(self.floating, data, wish.labels)
        self.reasons: dict[str, str] = {}  # why a layer stays float, by name
        self.notes: list[str] = []
        self._results: dict[tuple[str, ...], Result] = {}
        self._scores: dict[tuple[str, ...], Score] = {}

    def context(self) -> Context:
        return context(self.target, self.data, self.seed)

    @functools.cached_property
    def names(self) -> list[str]:
        """Of the layers that can become int8."""
        model = self.result(()).model
        return [n.name for n in operators(model) if len(n.inputs) > 1 and _decoded(n.inputs[1])]

    def steps(self, excluded: tuple[str, ...]) -> tuple[Pass, ...]:
        """What quantizes; nothing where every layer is excluded."""
        if excluded and set(self.names) <= set(excluded):
            return ()
        return (replace(self.template, exclude=tuple(dict.fromkeys((*self.template.exclude, *excluded)))), *self.after)

    def result(self, excluded: tuple[str, ...]) -> Result:
        if excluded not in self._results:
            steps = self.steps(excluded) or self.after
            self._results[excluded] = Pipeline(steps).run(self.floating, self.context())
        return self._results[excluded]

    def emulated(self, model: Model) -> tuple[float, float]:
        """dB as the graph is written, and on the kernels, of the same samples; a graph as written is slow, so they are few."""
        work = calibration.effort(self.floating, self.data)
        batches = -(-work.samples(_EMULATED_WORK, 2, 256) // self.judge.batch)
        return self.judge.score(model, False, batches).sqnr, self.judge.score(model, True, batches).sqnr

    def score(self, excluded: tuple[str, ...]) -> Score:
        if excluded not in self._scores:
            self._scores[excluded] = self.judge.score(self.result(excluded).model, self.on_kernels)
        return self._scores[excluded]

    def _equalize(self) -> None:
        """Scale channels alike before, where the outputs gain by it."""
        if not self.wish.equalize or any(p.pass_name() == "equalize-channels" for p in self.before.passes):
            return
        step: Any = find_pass("equalize-channels")()
        found = Pipeline((step,)).run(self.floating, self.context())
        if not found.rewrites:
            return
        floating = self.floating
        old = self.emulated(self.result(()).model)[0]
        results = self._results
        self.floating, self._results = found.model, {}
        new = self.emulated(self.result(()).model)[0]
        if new < old + _GAIN:
            self.floating, self._results = floating, results
            return
        self.before = Pipeline((*self.before.steps, step))
        self.notes.append(f"equalize-channels: {old:.1f} -> {new:.1f} dB as written")

    def run(self) -> Outcome:
        known = forms(self.floating)
        if known:
            told = ", ".join(f"{count} {form}" for form, count in known.items())
            self.say(
                f"the model is quantized already ({told}): that is kept, only what is float is quantized; "
                "-p 'dequantize,default' makes all of it anew"
            )
        self._equalize()
        excluded: tuple[str, ...] = ()
        if self.wish.gate and self.on_kernels and self.names:
            excluded = self._gate()
        met = True
        if self.wish.max_drop is not None:
            excluded, met = self._regain(excluded, self.wish.max_drop)
        result, score = self.result(excluded), self.score(excluded)
        written, kernels = self.emulated(result.model) if self.on_kernels else (score.sqnr, score.sqnr)
        outcome = Outcome(
            Pipeline((*self.before.steps, *(self.steps(excluded) or self.after))),
            result,
            [],
            "top1" if self.wish.labels is not None else "agreement",
            score.reference,
            score.metric,
            score.sqnr,
            written,
            excluded,
            met,
            self.notes,
            reasons={n: r for n, r in self.reasons.items() if n in excluded},
        )
        if self.steps(excluded) and self.names:
            step = self.steps(excluded)[0]
            outcome.alone = layer_sqnr(self.floating, step, self.data, self.context())
        if self.on_kernels:
            sample = next(iter(self.data.feeds(1, 1)))
            outcome.take(coverage.onnxruntime_coverage(result.model, result.remarks, sample))
        if kernels < written - 1 and kernels < 60:
            told = f"the kernels of this machine lose {written - kernels:.1f} dB against the graph as written: they saturate"
            self.notes.append(told)
            self.say(told + "; use pair-safe weights")
        return outcome

    # --------------------------------------------------------------------------------------------------- accuracy

    def _regain(self, excluded: tuple[str, ...], max_drop: float) -> tuple[tuple[str, ...], bool]:
        """Leave ever more of the most sensitive layers in float until the metric holds, then as few as suffice."""
        floor = self.score(excluded).reference - max_drop
        if self.score(excluded).metric >= floor:
            return excluded, True
        ranking = sensitivity(self.floating, self.target, self.data, wish=self.template, seed=self.seed)
        ranked = [s.name for s in ranking if s.name not in excluded]
        tried = {0: excluded}
        count, low, high = 1, 0, None
        while high is None and ranked:
            count = min(count, len(ranked))
            tried[count] = (*excluded, *ranked[:count])
            if self.score(tried[count]).metric >= floor:
                high = count
            elif count == len(ranked):
                break
            else:
                low, count = count, count * 2
        if high is None:
            best = max(tried.values(), key=lambda e: (self.score(e).metric, self.score(e).sqnr, -len(e)))
            lost = self.score(best).reference - self.score(best).metric
            self.say(f"max-drop {max_drop} cannot be met; the best found loses {lost:.2f} points")
            found, met = best, False
        else:
            while high - low > 1:
                middle = (low + high) // 2
                tried[middle] = (*excluded, *ranked[:middle])
                if self.score(tried[middle]).metric >= floor:
                    high = middle
                else:
                    low = middle
            found, met = tried[high], True
            self.say(f"{high} layers stay float so that the drop is at most {max_drop}")
        self.reasons.update((n, "returned to float for max-drop") for n in found if n not in excluded)
        return found, met

    # ------------------------------------------------------------------------------------------------------- time

    def _gate(self) -> tuple[str, ...]:
        """The layers that had better stay float: families of layers are timed in float, each alone and then those that gain together."""
        families = self._families()
        sample = next(iter(self.data.feeds(1, 1)))
        timed: dict[str, tuple[str, ...]] = {"all in int8": ()}
        timed.update((f"{name} in float", members) for name, members in families.items())
        ratios = self._times(timed, sample)
        whole = ratios["all in int8"]
        gains = [n for n in ratios if n != "all in int8" and ratios[n] < 0.99 * whole]
        if len(gains) > 1:
            gains.sort(key=lambda n: ratios[n])
            union = tuple(dict.fromkeys(m for n in gains for m in timed[n]))
            if self.steps(union):
                timed[" and ".join(gains)] = union
                ratios.update(self._times({" and ".join(gains): union, gains[0]: timed[gains[0]]}, sample))
        best = min(ratios, key=lambda n: ratios[n])
        if best != "all in int8":  # a clock errs, and the least of many measurements more than each of them
            again = self._times({n: timed[n] for n in ("all in int8", best)}, sample)
            ratios.update(again)
            if again[best] >= 0.98 * again["all in int8"]:
                best = "all in int8"
        told = "; ".join(f"{n}: x{r:.2f}" for n, r in ratios.items())
        self.notes.append(f"time against float on one sample: {told}")
        excluded = timed[best]
        if ratios[best] >= 0.99:
            self.say(f"int8 is not faster here ({told}): everything stays float (--no-gate forces int8)")
            excluded = tuple(self.names)
        elif excluded:
            self.say(f"{best}: faster ({told})")
        self.reasons.update((n, "int8 is not faster here (measured)") for n in excluded)
        return excluded

    def _times(self, plans: Mapping[str, tuple[str, ...]], sample: Mapping[str, Array]) -> dict[str, float]:
        """Time over that of the float model, by name of the plan."""
        calls: dict[str, Callable[[], object]] = {}
        floating = Pipeline(self.after).run(self.floating, self.context()).model
        for name, model in [("float", floating), *((n, self.result(e).model) for n, e in plans.items())]:
            session = session_of(model, True, threads=1)  # the fairest clock on a machine that does other things too
            calls[name] = lambda s=session: s.run(None, sample)  # type: ignore[misc]
        start = time.perf_counter()
        for call in calls.values():
            call()
        rounds = int(max(3, min(41, _SECONDS / max(1e-6, time.perf_counter() - start))))
        gc.freeze()  # the graphs at hand are no garbage; looking at them between rounds takes longer than the rounds
        try:
            timings = measure.interleave(calls, rounds=rounds, min_seconds=2e-3, seed=self.seed)
        finally:
            gc.unfreeze()
        return {name: timings.compare("float", name).ratio for name in plans}

    def _families(self) -> dict[str, tuple[str, ...]]:
        """Layers that may be slower in int8 for one reason, by that reason."""
        quantizable = set(self.names)
        converted = {n.name: n for n in operators(self.result(()).model) if n.name in quantizable}
        nodes = [n for n in operators(self.floating) if n.name in converted]
        counts = macs(self.floating)[1]
        sizes = {n.name: c for n in nodes if isinstance(c := counts.get(n.name, 0), int)}
        found: dict[str, list[str]] = {}
        for node in nodes:
            shape = tuple(node.inputs[1].shape or ())
            if weights.is_depthwise(node, shape):
                found.setdefault("depthwise", []).append(node.name)
            elif node.op == "Conv" and len(shape) > 2 and int(node.attrs.get("group", 1)) > 1:
                found.setdefault("grouped", []).append(node.name)
            elif node.op == "Conv" and len(shape) > 2 and shape[1] <= 4:
                found.setdefault("narrow inputs", []).append(node.name)
            elif node.op != "Conv":
                found.setdefault("matrix products", []).append(node.name)
            elif not _chained(converted[node.name]):
                found.setdefault("single convolutions", []).append(node.name)
        total, small = sum(sizes.values()), 0
        for name in sorted(sizes, key=lambda n: (sizes[n], n)):
            small += sizes[name]
            if small > _SMALL * total:
                break
            found.setdefault("small layers", []).append(name)
        return {name: tuple(members) for name, members in found.items() if len(members) < len(nodes)}


def _decoded(tensor: gs.Tensor) -> bool:
    return bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"


def _chained(node: gs.Node) -> bool:
    """Whether a convolution gets its codes from another int8 operator, or gives its own to one."""
    decode = node.inputs[0].inputs[0] if _decoded(node.inputs[0]) else None
    encode = decode.inputs[0].inputs[0] if decode is not None and decode.inputs[0].inputs else None
    sources = encode.inputs[0].inputs if encode is not None else []
    decoders = [d for e in node.outputs[0].outputs if e.op == "QuantizeLinear" for d in e.outputs[0].outputs]
    readers = [r for d in decoders for r in d.outputs[0].outputs]
    weighted = [r for r in readers if len(r.inputs) > 1]
    return any(_decoded(t) for n in sources for t in n.inputs) or any(_decoded(r.inputs[1]) for r in weighted)


def context(target: Target, data: Data, seed: int) -> Context:
    """What the passes are given on the way to int8."""
    clock = clock_of(target)
    return Context(target=target, seed=seed, evaluate=evaluate_node, data=data, clock=clock, products_stay=True)


def layer_sqnr(model: Model, step: Any, data: Data, ctx: Context) -> dict[str, float]:
    """dB of each weighted operator's own result when its operands are rounded as `step` (a ``quantize-qdq``) would, by name."""
    model = step.raised(model)
    twins: dict[str, Twin] = step.twins(model, ctx)
    if not twins:
        return {}
    work = calibration.effort(model, data)
    _, shares = judge(model, twins, data.head(work.samples(_LAYER_WORK, 8, _RANKED_ON), work.at_once))
    return {name: _decibels(share) for name, share in shares.items() if np.isfinite(share)}


def _decibels(share: float) -> float:
    """SQNR of an error that is this share of the power."""
    return round(-10 * float(np.log10(max(share, 1e-20))), 2)


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
    step = wish or quantize()
    model = step.raised(model)
    twins: dict[str, Twin] = step.twins(model, context(target, data, seed))
    if not twins:
        return []
    switches = Switches(model, twins)
    work = calibration.effort(model, data)
    feeds = list(data.head(work.samples(_RANKING_WORK // len(twins), 4, limit), work.at_once).feeds())
    reference = [a for f in feeds for a in switches.run(f, ()).values() if a.dtype.kind == "f"]
    ops = {n.name: n.op for n in model.graph.nodes}
    found = []
    _, shares = judge(model, twins, ListData("the ranking", feeds))
    for name in twins:
        other = [a for f in feeds for a in switches.run(f, (name,)).values() if a.dtype.kind == "f"]
        own = _decibels(shares[name]) if np.isfinite(shares[name]) else None  # of values too large to square
        found.append(Sensitivity(name, ops[name], sqnr(reference, other), own))
    return sorted(found, key=lambda s: s.sqnr)
