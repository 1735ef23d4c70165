"""Int8 engines of TensorRT for RTX, built ahead of time without a GPU: which layers they run in int8, of our Q/DQ and of ONNX Runtime's.

For `benchmarks.int8`. A *round trip* is a kernel that rounds values to int8 and decodes them again inside (``...RounCastCast...`` in its
name, which TensorRT builds from the operations): work and a rounding for nothing.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.harness import Column, Table
from graphopt import ir
from graphopt.backend import BuildOptions, Kernel, ShapeRange
from graphopt.coverage import kernel_coverage
from graphopt.data import open_data
from graphopt.discovery import backend_for
from graphopt.errors import UserError
from graphopt.evaluate import evaluate_node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.target import Target

Array = np.ndarray[Any, Any]

TARGETS: Final = ("tensorrt-rtx:sm80", "tensorrt-rtx:sm89")
FOR_TENSORRT: Final = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "QuantizeBias": False,
    "DedicatedQDQPair": True,
}  # the form of ONNX Runtime's Q/DQ that TensorRT's parser takes
BATCH: Final = 8


def engines_table() -> Table:
    """The empty table."""
    return Table(
        "Int8 engines of TensorRT for RTX",
        [
            Column("network", "network"),
            Column("target", "target"),
            Column("setting", "Q/DQ by"),
            Column("placed", "layers with codes", "d"),
            Column("int8", "in int8", "d"),
            Column("kernels", "kernels", "d"),
            Column("trips", "round trips", "d"),
            Column("note", "note"),
        ],
        note="From the builder's own kernel list with datatypes, batch 8; round trips: kernels that round to int8 and decode again inside.",
    )


def engines(name: str, model: ir.Model, calibration: Array, table: Table) -> None:
    """Build the engines of one network and add their rows."""
    for target in map(Target.parse, TARGETS):
        floating = Pipeline.parse("default").run(model, Context(target=target, evaluate=evaluate_node)).model
        data = open_data({model.inputs[0].name: calibration}, model.inputs)
        ctx = Context(target=target, data=data, evaluate=evaluate_node)
        made: dict[str, ir.Model] = {"graphopt": Pipeline.parse("quantize-qdq").run(floating, ctx).model}
        with tempfile.TemporaryDirectory(prefix="graphopt-rtx-") as folder:
            made["ORT S8S8"] = by_onnxruntime(floating, calibration, Path(folder), {})
            made["ORT, TensorRT's form"] = by_onnxruntime(floating, calibration, Path(folder), FOR_TENSORRT)
        for setting, quantized in made.items():
            row: dict[str, Any] = {"network": name, "target": str(target), "setting": setting}
            try:
                kernels = kernels_of(quantized, target)
            except UserError as error:
                table.add(**row, note=" ".join(str(error).split())[:60])
                continue
            layers = kernel_coverage(quantized, kernels)
            placed = {n.name for n in quantized.graph.nodes if _coded(n)}
            table.add(
                **row,
                placed=len(placed),
                int8=sum(layer.int8 for layer in layers if layer.name in placed),
                kernels=len(kernels),
                trips=sum("RounCastCast" in k.name for k in kernels),
            )
            table.extra[f"{name}, {target}, {setting}"] = [[k.name, *k.inputs, "->", *k.outputs] for k in kernels]


def _coded(node: Any) -> bool:
    """Whether a weighted operator reads both its operands from codes."""
    if node.op not in ("Conv", "Gemm", "MatMul"):
        return False
    return all(bool(t.inputs) and t.inputs[0].op == "DequantizeLinear" for t in node.inputs[:2])


def kernels_of(model: ir.Model, target: Target) -> tuple[Kernel, ...]:
    """What an engine of `model` runs."""
    ranges = {}
    for spec in model.inputs:
        sizes = tuple(d if isinstance(d, int) else BATCH for d in spec.shape or ())
        if sizes != spec.shape:
            ranges[spec.name] = ShapeRange(sizes, sizes, sizes)
    with tempfile.TemporaryDirectory(prefix="graphopt-rtx-") as folder:
        return backend_for(target.runtime)[1].emit(model, target, Path(folder), BuildOptions(shapes=ranges)).kernels


def by_onnxruntime(model: ir.Model, calibration: Array, folder: Path, options: dict[str, Any]) -> ir.Model:
    """ONNX Runtime's own static quantization, int8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pieces: Iterator[Array] = iter(np.array_split(calibration, max(1, len(calibration) // 16)))

        def get_next(self) -> dict[str, Array] | None:
            piece = next(self.pieces, None)
            return None if piece is None else {model.inputs[0].name: piece}

    source, target = folder / "float.onnx", folder / "int8.onnx"
    ir.save(model, source)
    kind = QuantType.QInt8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            str(source),
            str(target),
            Reader(),
            per_channel=True,
            activation_type=kind,
            weight_type=kind,
            extra_options=options,
        )
    return ir.loads(target.read_bytes())
