"""What calibration samples look like inside a model: exact extremes and a histogram of each tensor, in bounded memory.

The model runs as it is in ONNX Runtime with the tensors in question as further outputs. How many samples run at once, and how many
tensors are taken from one run, follows from a budget of bytes, so memory does not grow with the number of samples or tensors.

A histogram has bins of one width, a power of two, with an edge at 0. When a value lies outside, the width doubles and neighbouring bins
merge, which is exact: the outcome depends neither on the order of the samples nor on how they were batched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import isolation
from graphopt.analyses.macs import macs
from graphopt.data import Data
from graphopt.errors import UnsupportedModel, UsageError
from graphopt.ir import Model, Variable, saves

Array = np.ndarray[Any, Any]

BINS: Final = 8192  # of a histogram; at least a quarter of them lie within the range seen
BUDGET: Final = 256 << 20  # bytes of tensors that one run may give
MOST_AT_ONCE: Final = 32  # samples of a run
COUNTED: Final = 1 << 17  # values of a tensor and run that go into the histogram; extremes see all
_PLENTY: Final = 1 << 21  # values seen, after which an eighth of that is enough
_RUN_MACS: Final = 1 << 34  # multiply-accumulates of a run, about
_SAVE_EVERY: Final = 20.0  # seconds between two looks after the cache
_MEMORY: Final = 0.9  # of the moving averages

Progress = Callable[[int, int | None], None]  # samples done, samples in all


class Statistics:
    """Of all values of one tensor."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf  # exact
        self.average_low, self.average_high = math.nan, math.nan  # moving averages over runs
        self.seen = 0  # values
        self._counts = np.zeros(BINS, np.int64)
        self._exponent: int | None = None  # bins are 2 ** exponent wide

    def add(self, values: Array) -> None:
        """Take in more values.

        Raises:
            FloatingPointError: NaN or infinity among them.
        """
        if not values.size:
            return
        flat = np.ravel(values)
        low, high = float(flat.min()), float(flat.max())  # NaN if any is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FloatingPointError("NaN or infinity")
        if self.seen:
            self.average_low = _MEMORY * self.average_low + (1 - _MEMORY) * low
            self.average_high = _MEMORY * self.average_high + (1 - _MEMORY) * high
        else:
            self.average_low, self.average_high = low, high
        self.low, self.high = min(self.low, low), max(self.high, high)
        counted = COUNTED if self.seen < _PLENTY else COUNTED >> 3
        self.seen += flat.size
        largest = max(-low, high)
        if largest == 0 and self._exponent is None:
            return
        self._reach(largest)
        stride = -(-flat.size // counted)
        if stride > 1:
            flat = flat[:: stride | 1]  # odd, so that no power-of-two period of a layout is followed
        self._count(flat)

    @property
    def counts(self) -> Array:
        """Of all bins, around 0."""
        return self._counts

    def numbers(self) -> list[float]:
        """All but the counts; `restored` takes them."""
        exponent = math.nan if self._exponent is None else float(self._exponent)
        return [exponent, float(self.seen), self.low, self.high, self.average_low, self.average_high]

    @classmethod
    def restored(cls, numbers: Sequence[float], counts: Array) -> Statistics:
        """What gave `numbers` and `counts`."""
        found = cls()
        exponent, seen, found.low, found.high, found.average_low, found.average_high = numbers
        found._exponent, found.seen = None if math.isnan(exponent) else int(exponent), int(seen)
        found._counts = np.array(counts, np.int64)
        return found

    def _reach(self, largest: float) -> None:
        if largest > 0:
            needed = math.frexp(largest)[1] - int(math.log2(BINS // 2))  # largest < 2 ** (needed + log2(BINS / 2))
            needed = max(needed, -120)
            if self._exponent is None:
                self._exponent = needed
            while self._exponent < needed:
                half = BINS // 2
                merged = np.zeros_like(self._counts)
                merged[half // 2 : half + half // 2] = self._counts.reshape(-1, 2).sum(axis=1)
                self._counts = merged
                self._exponent += 1

    def _count(self, flat: Array) -> None:
        assert self._exponent is not None
        places = np.multiply(flat, np.float32(2.0**-self._exponent), dtype=np.float32)
        places = np.floor(places, out=places).astype(np.int32)  # exact: the width is a power of two
        places += BINS // 2
        self._counts += np.bincount(np.clip(places, 0, BINS - 1, out=places), minlength=BINS)

    def histogram(self) -> tuple[Array, Array]:
        """Edges and counts of the bins between the extremes; both empty where all values are 0."""
        if self._exponent is None:
            return np.zeros(0), np.zeros(0, np.int64)
        used = np.flatnonzero(self._counts)
        first, last = int(used[0]), int(used[-1])
        width = 2.0**self._exponent
        edges = (np.arange(first, last + 2) - BINS // 2) * width
        return edges, self._counts[first : last + 1]


@dataclass(frozen=True)
class Effort:
    """How much work one sample is, and what follows from that for how many are looked at."""

    macs: int  # multiply-accumulates, as far as they are known
    nodes: Mapping[str, int]  # of each node, by name

    @property
    def at_once(self) -> int:
        """Samples of one run: few where each is enough to keep the machine busy."""
        return max(1, min(MOST_AT_ONCE, _RUN_MACS // max(1, self.macs)))

    def samples(self, budget: int, least: int, most: int) -> int:
        """As many samples as `budget` multiply-accumulates allow."""
        return max(least, min(most, budget // max(1, self.macs)))


def effort(model: Model, data: Data) -> Effort:
    """The work of the first sample of `data`."""
    key = ("effort", model.fingerprint())
    if key not in data.memo:
        probe = next(iter(data.feeds(1, 1)))
        copy = model.clone()
        for tensor in copy.graph.inputs:
            if isinstance(tensor, Variable) and tensor.name in probe:
                tensor.shape = probe[tensor.name].shape
        for node in copy.nodes():  # what is declared of them followed from the shapes before
            for output in node.outputs:
                output.shape = None
        counts = {name: count for name, count in macs(copy)[1].items() if isinstance(count, int)}
        data.memo[key] = Effort(sum(counts.values()), counts)
    found: Effort = data.memo[key]
    return found


class Runner:
    """A model in ONNX Runtime with chosen tensors as its outputs."""

    def __init__(self, model: Model, wanted: Sequence[str], optimize: bool = True) -> None:
        """`wanted` are names of tensors of the root graph.

        Raises:
            UnsupportedModel: ONNX Runtime refuses the model.
        """
        import onnxruntime as ort

        copy = model.clone()
        tensors = root_tensors(copy)
        copy.graph.outputs = [tensors[name] for name in wanted]
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(saves(copy), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            raise UnsupportedModel(
                f"calibration needs ONNX Runtime to run the model, which refuses it: {told}"
            ) from None
        self._names = list(wanted)
        self._inputs = {i.name for i in self._session.get_inputs()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The wanted tensors, by name.

        Raises:
            UnsupportedModel: the model cannot be run on these samples.
        """
        isolation.progress()
        try:
            values = self._session.run(self._names, {n: a for n, a in feeds.items() if n in self._inputs})
        except Exception as error:
            raise UnsupportedModel(
                f"the model fails on calibration samples: {' '.join(str(error).split())[:300]}"
            ) from None
        return dict(zip(self._names, values, strict=True))


def root_tensors(model: Model) -> dict[str, gs.Tensor]:
    """Inputs and computed values of the root graph by name."""
    found = {t.name: t for t in model.graph.inputs}
    for node in model.graph.nodes:
        found.update((t.name, t) for t in node.outputs if t.name)
    return found


def runs(
    model: Model,
    names: Sequence[str],
    data: Data,
    budget: int = BUDGET,
    limit: int | None = None,
    skip: Callable[[Sequence[str], int], int] = lambda group, batch: 0,
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Run the model on all samples; gives (samples of the run, some of the tensors) for each run.

    All groups of tensors together hold `names`; each group sees all samples in the same order, but for those of the first
    runs that `skip` (of the group and the samples of a run) wants left out.
    """
    most = min(effort(model, data).at_once, data.at_once(MOST_AT_ONCE))
    for group, fits in _groups(model, names, data, budget):
        batch = min(fits, most)
        left_out = skip(group, batch)
        runner = Runner(model, group)
        for number, feeds in enumerate(data.feeds(batch, limit)):
            if number >= left_out:
                yield batch, runner.run(feeds)


def _groups(model: Model, names: Sequence[str], data: Data, budget: int) -> list[tuple[list[str], int]]:
    """Groups of tensors that fit the budget together, and for each how many samples fit at once: measured on one sample."""
    probe = next(iter(data.feeds(1, 1)))
    sizes: dict[str, int] = {}
    for start in range(0, len(names), 64):
        some = list(names[start : start + 64])
        sizes.update((n, max(a.nbytes, 1)) for n, a in Runner(model, some).run(probe).items())
    groups: list[tuple[list[str], int]] = []
    current: list[str] = []
    used = 0
    for name in names:
        if current and used + sizes[name] > budget:
            groups.append((current, max(1, min(MOST_AT_ONCE, budget // used))))
            current, used = [], 0
        current.append(name)
        used += sizes[name]
    if current:
        groups.append((current, max(1, min(MOST_AT_ONCE, budget // used))))
    return groups


def calibrate(
    model: Model,
    names: Sequence[str],
    data: Data,
    *,
    limit: int | None = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Statistics of float tensors of the root graph, by name; from `data.cache` where they are there.

    Raises:
        UsageError: samples that do not fit, or a tensor becomes NaN or infinite on them.
        UnsupportedModel: ONNX Runtime cannot run the model.
    """
    if not names:
        return {}
    found: dict[str, Statistics] = {}
    store = None
    if data.cache is not None:
        from graphopt.analyses.calibration_store import CalibrationStore

        store = CalibrationStore(data.cache, model, data, limit)
        found.update((n, store.statistics[n]) for n in names if n in store.whole)
    missing = [n for n in names if n not in found]
    progress = progress or data.watch or (lambda done, total: None)
    done: dict[str, int] = {}
    total = None if data.count is None else min(data.count, limit or data.count)
    saved = time.monotonic()

    def begun(group: Sequence[str], batch: int) -> int:
        """Runs that an earlier calibration of the group has seen."""
        known = {(store.runs.get(n, 0), store.batch.get(n, 0)) for n in group} if store is not None else {(0, 0)}
        count, size = next(iter(known))
        goes_on = store is not None and len(known) == 1 and size == batch
        for name in group:
            found[name] = store.statistics[name] if goes_on and store is not None and count else Statistics()
            done[name] = count if goes_on else 0
        return count if goes_on else 0

    for batch, values in runs(model, missing, data, budget, limit, begun):
        for name, array in values.items():
            try:
                found[name].add(array)
            except FloatingPointError:
                raise UsageError(
                    f"tensor {name!r} becomes NaN or infinite on the calibration data (run {done[name]} of {data.name}); "
                    "check the samples, or exclude the layers that read it"
                ) from None
            done[name] += 1
            if store is not None:
                store.statistics[name], store.runs[name], store.batch[name] = found[name], done[name], batch
        isolation.progress()
        count = max(done[n] for n in values) * batch
        progress(count if total is None else min(count, total), total)
        if store is not None and time.monotonic() - saved > _SAVE_EVERY:
            store.save()
            saved = time.monotonic()
    if store is not None and missing:
        store.whole.update(missing)
        store.save()
    return {name: found.get(name, Statistics()) for name in names}


def largest(model: Model, names: Sequence[str], data: Data, *, limit: int | None = None) -> dict[str, float]:
    """The largest finite magnitude of tensors of the root graph on the samples, by name; 0 where there is none.

    Raises:
        UnsupportedModel: ONNX Runtime cannot run the model.
    """
    found = dict.fromkeys(names, 0.0)
    for _, values in runs(model, names, data, limit=limit) if names else ():
        for name, array in values.items():
            sizes = np.abs(array[np.isfinite(array)])
            found[name] = max(found[name], float(sizes.max(initial=0.0)))
    return found
