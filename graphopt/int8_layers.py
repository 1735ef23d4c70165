"""Every weighted layer of a model in int8: whether it runs as such and in which kernel or why not, what it costs the outputs, and its time.

Accuracy is that of `graphopt.int8.sensitivity`, each layer alone. What runs is read off the runtime after its own optimisation: ONNX Runtime's
saved graph, the kernel list of a TensorRT for RTX engine. Times are of single kernels in ONNX Runtime on this machine, in int8 and in float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.backend import BuildOptions
from graphopt.coverage import Layer, kernel_coverage, onnxruntime_coverage
from graphopt.data import Data
from graphopt.discovery import backend_for, find_pass
from graphopt.errors import BackendUnavailable, UnsupportedModel
from graphopt.int8 import context, sensitivity
from graphopt.ir import Model
from graphopt.pass_base import Remark
from graphopt.pipeline import Pipeline
from graphopt.target import Target


@dataclass(frozen=True)
class LayerReport:
    """One weighted operator."""

    name: str
    op: str
    int8: bool | None  # whether it runs in int8; None: the runtime was not asked
    kernel: str  # what runs it, as far as the runtime says
    why: str  # where it is not int8
    sqnr: float | None = None  # dB, of the outputs, this layer alone in int8
    own: float | None = None  # dB, of the layer's own result
    microseconds: float | None = None  # of its kernel in one call of one sample
    float_microseconds: float | None = None  # of the kernel that runs it in float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "op": self.op,
            "int8": self.int8,
            "kernel": self.kernel,
            "why": self.why,
            "sqnr_db": None if self.sqnr is None else round(min(self.sqnr, 200.0), 2),
            "layer_sqnr_db": self.own,
            "microseconds": self.microseconds,
            "float_microseconds": self.float_microseconds,
        }


@dataclass(frozen=True)
class Examined:
    """All layers, the most sensitive first and those that stay float last."""

    layers: list[LayerReport]
    remarks: list[Remark]  # of quantizing
    note: str = ""  # why the runtime was not asked


def examine(model: Model, target: Target, data: Data, *, seed: int = 0, limit: int = 64) -> Examined:
    """Quantize `model` for `target`, each layer alone and all together.

    Args:
        model: in float, already optimized.
        target: decides the codes; its runtime is asked what runs.
        data: calibration samples.
        seed: of the passes.
        limit: samples to judge on.

    Raises:
        UnsupportedModel: ONNX Runtime refuses the model, or the target has no int8.
        UsageError: samples that do not fit.
    """
    costs = {one.name: one for one in sensitivity(model, target, data, seed=seed, limit=limit)}
    ctx = context(target, data, seed)
    result = Pipeline((find_pass("quantize-qdq")(),)).run(model, ctx)
    known, note = _runs(result.model, target, result.remarks, next(iter(data.feeds(1, 1))))
    before: Mapping[str, Layer] = {}
    if target.runtime == "ort":
        before = {x.name: x for x in onnxruntime_coverage(model, (), next(iter(data.feeds(1, 1))))}
    found = []
    for layer in known:
        cost, old = costs.get(layer.name), before.get(layer.name)
        found.append(
            LayerReport(
                layer.name,
                layer.op,
                None if note else layer.int8,
                "" if note else layer.kernel,
                layer.why,
                None if cost is None else cost.sqnr,
                None if cost is None else cost.own,
                layer.microseconds,
                None if old is None else old.microseconds,
            )
        )
    found.sort(key=lambda x: float("inf") if x.sqnr is None else x.sqnr)
    return Examined(found, list(result.remarks), note)


def _runs(
    model: Model, target: Target, remarks: Sequence[Remark], sample: Mapping[str, Any]
) -> tuple[list[Layer], str]:
    if target.runtime == "ort":
        return onnxruntime_coverage(model, remarks, sample), ""
    try:
        _, backend = backend_for(target.runtime)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            kernels = backend.emit(model, target, Path(folder), BuildOptions()).kernels
    except (BackendUnavailable, UnsupportedModel) as error:
        return kernel_coverage(model, (), remarks), f"{target} was not asked what runs: {error}"
    if not kernels:
        return kernel_coverage(model, (), remarks), f"{target} lists no kernels"
    return kernel_coverage(model, kernels, remarks), ""
