"""GPTQ: round a weight so that the errors of its codes cancel on the inputs it really gets, and not each code to its nearest.

A layer computes ``W x``; with ``H = E[x x^T]`` the mean squared error of a rounded ``Q`` is ``tr((W - Q) H (W - Q)^T)``. With the
Cholesky factor ``H = L L^T`` that is ``|(W - Q) L|^2``, and as L is triangular the columns can be rounded from the last to the first, each to
the code that best cancels what those after it left (Frantar 2022; the same codes as Babai's nearest plane):

    q_j = round(w_j + sum_{i > j} (w_i - q_i) L_ij / L_jj)

Where a bias can take the mean error, H is the covariance. Codes of a pair-safe weight stay pair-safe: the second of two neighbours
keeps to what the first has left, and the columns before it make up for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from graphopt.analyses import calibration, gram, weights
from graphopt.analyses.gram import MAX_COLUMNS, Layer, Moments
from graphopt.data import Data
from graphopt.ir import Model, Node

Array = np.ndarray[Any, Any]

SAMPLES: Final = 128  # that the moments are taken from, at most
WORK: Final = 1 << 38  # multiply-accumulates of those samples, about
ROWS: Final = 4096  # positions of a layer that go into its moments at least
ROWS_PER_COLUMN: Final = 2
BUDGET: Final = 512 << 20  # bytes of moments at once; more layers mean more runs over the samples
DAMPING: Final = 0.003  # of the mean diagonal, added to it: what the samples do not say
_BLOCK: Final = 128  # columns between which errors are handed on one by one


def rounded(
    model: Model,
    layers: Mapping[str, Layer],
    quantized: Mapping[str, weights.Quantized],
    data: Data,
    *,
    pair_safe: bool,
    centred: frozenset[str],
    seed: int = 0,
) -> dict[str, weights.Quantized]:
    """`quantized` with better codes, and the same scales.

    Args:
        model: in float; its root graph holds `layers`.
        layers: by name, of those to round; Gemm without alpha.
        quantized: their weights, rounded to the nearest code.
        data: samples to see inputs on.
        pair_safe: whether codes must stay so.
        centred: names of layers whose mean error a bias will take.
        seed: of the positions that are looked at.
    """
    found: dict[str, weights.Quantized] = {}
    fits = {n: layer for n, layer in layers.items() if layer.matrix().shape[2] <= MAX_COLUMNS}
    for group in _groups(fits):
        moments = _moments(model, {n: fits[n] for n in group}, data, seed)
        for name in group:
            layer, one, seen = fits[name], quantized[name], moments.pop(name)
            if seen.count:
                gram = seen.centred(name in centred)[2]
                if not np.isfinite(gram).all():  # operands too large to square: nearest codes
                    continue
                safe = pair_safe and not weights.is_depthwise(layer.node, one.codes.shape)
                found[name] = _better(layer, one, gram, safe)
    return {**quantized, **found}


def rounded_on(
    model: Model, nodes: Sequence[Node], data: Data, *, pair_safe: bool, seed: int = 0
) -> dict[str, weights.Quantized]:
    """Weights of `nodes` of the root graph as codes that suit `data`, by name of the node; shared weights and wide ones are left out."""
    layers = gram.layers(model)
    chosen = {n.name: layers[n.name] for n in nodes if n.name in layers and n.attrs.get("alpha", 1.0) == 1.0}
    nearest = {
        name: weights.quantize(layer.node, np.asarray(layer.weight.values), pair_safe=pair_safe)
        for name, layer in chosen.items()
    }
    return rounded(model, chosen, nearest, data, pair_safe=pair_safe, centred=frozenset(), seed=seed)


def _groups(layers: Mapping[str, Layer]) -> Iterator[list[str]]:
    group: list[str] = []
    used = 0
    for name, layer in layers.items():
        count, _, columns = layer.matrix().shape
        size = count * columns**2 * (4 if columns > 1024 else 8)
        if group and used + size > BUDGET:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def _moments(model: Model, layers: Mapping[str, Layer], data: Data, seed: int) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    readers: dict[str, list[str]] = {}
    for name, layer in layers.items():
        groups, _, columns = layer.matrix().shape
        found[name] = Moments(groups, columns, 1)
        readers.setdefault(layer.node.inputs[0].name, []).append(name)
    limit = calibration.effort(model, data).samples(WORK, 8, SAMPLES)
    samples = min(limit, data.count or limit)
    generator = np.random.default_rng(seed)
    for _, values in calibration.runs(model, list(readers), data, limit=limit):
        for tensor, x in values.items():
            for name in readers[tensor]:
                layer = layers[name]
                result = layer.result_like(x)
                positions = layer.positions(result)
                if not positions:
                    continue
                columns = found[name].xx.shape[-1]
                share = max(ROWS, ROWS_PER_COLUMN * columns) / samples  # of a sample
                count = min(positions, math.ceil(share * max(1, len(x) if layer.op == "Conv" else positions)))
                count = min(count, max(ROWS, ROWS_PER_COLUMN * columns))
                take = np.sort(generator.integers(0, positions, count)) if count < positions else np.arange(positions)
                rows = layer.columns(np.asarray(x, np.float32), result, take)
                found[name].add(rows, np.zeros((len(rows), rows.shape[1], 1), np.float32))
    return found


def _better(layer: Layer, quantized: weights.Quantized, gram: Array, pair_safe: bool) -> weights.Quantized:
    """New codes, for each row that gains by them."""
    matrix = layer.matrix().astype(np.float64)
    old = layer.matrix(quantized.codes).astype(np.float64)
    spread = np.asarray(quantized.scale, np.float64)
    scale = np.broadcast_to(spread.reshape(matrix.shape[:2]) if spread.ndim else spread, matrix.shape[:2])
    _, ordered = weights.reduction(layer.node, quantized.codes)
    new = gptq(matrix, gram.astype(np.float64), scale, pair_safe=pair_safe, ordered=ordered)
    if new is None:
        return quantized
    gains = loss(matrix - new * scale[..., None], gram) < loss(matrix - old * scale[..., None], gram)
    codes = layer.unmatrix(np.where(gains[..., None], new, old)).astype(np.int8)
    return weights.Quantized(codes, quantized.scale, quantized.axis)


def loss(off: Array, gram: Array) -> Array:
    """``e H e^T`` of each row of `off` [groups, rows, columns]."""
    return np.asarray(np.einsum("god,god->go", off @ gram, off))


def gptq(matrix: Array, gram: Array, scale: Array, *, pair_safe: bool, ordered: bool = True) -> Array | None:
    """Codes as float64.

    Args:
        matrix: [groups, rows, columns].
        gram: H as [groups, columns, columns].
        scale: [groups, rows], positive.
        pair_safe: keep codes of one sign that meet in a pair to a sum of `weights.PAIR`.
        ordered: pairs are columns 2t and 2t + 1; else any two may meet.

    Returns:
        None where H has no Cholesky factor, whatever is added to its diagonal.
    """
    count = matrix.shape[-1]
    lower = _cholesky(gram)
    if lower is None:
        return None
    inverse = 1 / scale
    codes = np.zeros_like(matrix)
    off = np.zeros_like(matrix)  # W - Q
    diagonal = np.einsum("gdd->gd", lower)
    most = np.zeros((2, *scale.shape))  # largest code of each sign so far
    handed = np.zeros_like(matrix)  # sum over later blocks of (w_i - q_i) L_ij
    for end in range(count, 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        for j in range(end - 1, start - 1, -1):
            left = handed[..., j] + (off[..., j + 1 : end] @ lower[:, j + 1 : end, j, None])[..., 0]
            code = np.rint((matrix[..., j] + left / diagonal[:, j, None]) * inverse)
            low, high = -float(weights.LARGEST), float(weights.LARGEST)
            if pair_safe:
                low, high = _room(codes, most, j, ordered)
            code = np.clip(code, low, high)
            codes[..., j] = code
            off[..., j] = matrix[..., j] - code * scale
            most[0], most[1] = np.maximum(most[0], code), np.maximum(most[1], -code)
        if start:
            handed[..., :start] += off[..., start:end] @ lower[:, start:end, :start]
    return codes


def _room(codes: Array, most: Array, j: int, ordered: bool) -> tuple[Any, Any]:
    """The smallest and largest code that column j may get."""
    if ordered:
        if j % 2 or j + 1 >= codes.shape[-1]:
            return -float(weights.LARGEST), float(weights.LARGEST)
        partner = codes[..., j + 1]
        positive, negative = np.maximum(partner, 0), np.maximum(-partner, 0)
    else:
        positive, negative = most
    bound = float(weights.PAIR)
    return -np.minimum(bound - negative, weights.LARGEST), np.minimum(bound - positive, weights.LARGEST)


def _cholesky(gram: Array) -> Array | None:
    """L of the damped H."""
    mean = np.maximum(np.einsum("gdd->gd", gram).mean(axis=1), 1e-30)
    for damping in (DAMPING, 10 * DAMPING, 1.0):
        try:
            return np.asarray(np.linalg.cholesky(gram + np.eye(gram.shape[-1]) * (damping * mean)[:, None, None]))
        except np.linalg.LinAlgError:
            continue
    return None
