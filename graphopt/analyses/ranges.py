"""From what calibration saw of a tensor to the scale and zero point of its int8 codes.

All methods read the same statistics, so trying another costs no second pass over the data:

* ``minmax``: everything that was seen;
* ``average``: the moving average (0.9 old, 0.1 new) of the extremes of the batches;
* ``percentile``: all but a share of the values, half of it at either end;
* ``mse``: the range with the least squared error of rounding and clipping, on the histogram;
* ``entropy``: the range whose 128 levels tell least apart from the histogram (Kullback and Leibler; TensorRT's method, Migacz 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from graphopt.analyses.calibration import Statistics

Array = np.ndarray[Any, Any]

METHODS: Final = ("minmax", "average", "percentile", "mse", "entropy")
_SHRINKS: Final = np.concatenate([np.geomspace(1, 0.5, 48), np.geomspace(0.48, 0.02, 32)])  # shares of the full range
_LEVELS: Final = 128  # of the entropy method, for a signed range of which one side counts
_TINY: Final = 1e-30  # a range below this counts as constant zero


@dataclass(frozen=True)
class Scheme:
    """How codes are laid out."""

    symmetric: bool  # zero point 0, codes -127..127 (written as -128..127)
    low: int  # smallest code
    high: int  # largest code

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8 or uint8."""
        return np.dtype(np.int8 if self.low < 0 else np.uint8)


SIGNED: Final = Scheme(True, -128, 127)
UNSIGNED: Final = Scheme(False, 0, 255)


@dataclass(frozen=True)
class Affine:
    """``value = scale * (code - zero_point)``."""

    scale: float  # rounded to float32
    zero_point: int
    scheme: Scheme

    @property
    def low(self) -> float:
        """The smallest value that has a code."""
        return (self.scheme.low - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest value that has a code."""
        return (self.scheme.high - self.zero_point) * self.scale

    def round_trip(self, values: Array) -> Array:
        """What is left of `values` after coding and decoding."""
        codes = np.clip(np.rint(values / self.scale) + self.zero_point, self.scheme.low, self.scheme.high)
        return np.asarray((codes - self.zero_point) * self.scale)


def affine(low: float, high: float, scheme: Scheme) -> Affine:
    """Codes that reach from `low` to `high`, 0 among them exactly; a tensor that is constant zero gets the scale 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme.symmetric:
        largest = max(-low, high)
        scale = np.float32(largest / scheme.high if largest > _TINY else 1.0)
        return Affine(float(scale), 0, scheme)
    if high - low <= _TINY:
        return Affine(1.0, scheme.low, scheme)
    scale = np.float32((high - low) / (scheme.high - scheme.low))
    zero = int(np.clip(np.rint(scheme.low - low / float(scale)), scheme.low, scheme.high))
    return Affine(float(scale), zero, scheme)


def find_range(statistics: Statistics, method: str, scheme: Scheme, share: float = 0.9999) -> tuple[float, float]:
    """The range that `method` finds; `share` of the values lies in it where the method is ``percentile``.

    Raises:
        KeyError: no such method.
    """
    return _METHODS[method](statistics, scheme, share)


def _minmax(statistics: Statistics, scheme: Scheme, share: float) -> tuple[float, float]:
    return statistics.low, statistics.high


def _average(statistics: Statistics, scheme: Scheme, share: float) -> tuple[float, float]:
    return statistics.average_low, statistics.average_high


def _percentile(statistics: Statistics, scheme: Scheme, share: float) -> tuple[float, float]:
    edges, counts = statistics.histogram()
    if not len(counts):
        return statistics.low, statistics.high
    if scheme.symmetric:
        largest = np.maximum(np.abs(edges[:-1]), np.abs(edges[1:]))
        order = np.argsort(largest, kind="stable")
        seen = np.cumsum(counts[order])
        bound = float(largest[order][np.searchsorted(seen, share * seen[-1])])
        return max(statistics.low, -bound), min(statistics.high, bound)
    seen = np.cumsum(counts)
    outside = (1 - share) / (1 if statistics.low >= 0 or statistics.high <= 0 else 2)
    low = edges[np.searchsorted(seen, outside * seen[-1], side="right")] if statistics.low < 0 else 0.0
    high = edges[min(np.searchsorted(seen, (1 - outside) * seen[-1]) + 1, len(edges) - 1)]
    return max(statistics.low, float(low)), min(statistics.high, float(high))


def _mse(statistics: Statistics, scheme: Scheme, share: float) -> tuple[float, float]:
    edges, counts = statistics.histogram()
    used = counts > 0
    values, weights = ((edges[:-1] + edges[1:]) / 2)[used], counts[used].astype(np.float64)
    if not len(values):
        return statistics.low, statistics.high

    def error(low: float, high: float) -> float:
        codes = affine(low, high, scheme)
        off = codes.round_trip(values) - values
        return float(np.dot(weights, off * off))

    low, high = statistics.low, statistics.high
    best = min(_SHRINKS, key=lambda c: error(low * c, high * c))
    found = (low * best, high * best)
    if not scheme.symmetric and low < 0 < high:  # the two ends by themselves
        shrinks = _SHRINKS[:48:2]
        found = (min((low * c for c in shrinks * best), key=lambda v: error(v, found[1])), found[1])
        found = (found[0], min((high * c for c in shrinks), key=lambda v: error(found[0], v)))
    return float(found[0]), float(found[1])


def _entropy(statistics: Statistics, scheme: Scheme, share: float) -> tuple[float, float]:
    edges, counts = statistics.histogram()
    if not len(counts):
        return statistics.low, statistics.high
    middle = np.abs((edges[:-1] + edges[1:]) / 2)
    width = float(edges[1] - edges[0])
    folded = np.bincount((middle / width).astype(np.int64), counts)
    levels = _LEVELS if scheme.symmetric or statistics.low < 0 else 2 * _LEVELS
    if len(folded) > 1:
        folded[0] = folded[1]  # exact zeros have a code whatever the range is
    if len(folded) <= levels:
        return statistics.low, statistics.high
    step = max(1, len(folded) // 256)
    best, bound = np.inf, len(folded)
    for size in range(levels, len(folded) + 1, step):
        loss = _divergence(folded, size, levels)
        if loss < best:
            best, bound = loss, size
    limit = bound * width
    return max(statistics.low, -limit), min(statistics.high, limit)


def _divergence(folded: Array, size: int, levels: int) -> float:
    """Kullback-Leibler divergence of the first `size` bins, the rest added to the last, from their `levels` levels."""
    inside = folded[:size].astype(np.float64)
    clipped = inside.copy()
    clipped[-1] += folded[size:].sum()
    level = (np.arange(size) * levels) // size
    filled = inside > 0
    sums = np.bincount(level, inside, levels)
    counts = np.bincount(level, filled, levels)
    spread = np.where(filled, (sums / np.maximum(counts, 1))[level], 0)
    p = clipped / clipped.sum()
    total = spread.sum()
    if total <= 0:
        return np.inf
    q = spread / total
    both = p > 0
    return float(np.sum(p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))))


_METHODS: Final[dict[str, Callable[[Statistics, Scheme, float], tuple[float, float]]]] = {
    "minmax": _minmax,
    "average": _average,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
