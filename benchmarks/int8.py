"""Int8 that keeps its accuracy on the CPU that runs it: graphopt beside ONNX Runtime's own quantizer, from the same samples.

    python -m benchmarks.int8
    python -m benchmarks.int8 --data /data/graphopt --avx2 --markdown int8.md --json int8.json

The digits networks of models/ are always there; CIFAR ResNets come from the data folder where given. Every setting starts from the same
float model, the one that graphopt's default pipeline made, and sees the same calibration samples. SQNR is of the logits on the test
images against that float model: `emulated` with the graph computed as written (ORT_DISABLE_ALL), `kernels` in a default session on
this CPU, `avx2` in the same session under qemu as a CPU without VNNI (``--avx2``; needs qemu-x86_64), whose u8 x s8 kernels
saturate. `int8` counts weighted operators that run as integer kernels after ONNX Runtime's own fusion. Time is one thread, batch 1 and
8, int8 over float in the same round.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from benchmarks.harness import (
    Column,
    DataFolder,
    JsonFile,
    MarkdownFile,
    Rounds,
    Seed,
    Table,
    contest,
    data_folder,
    peer_process,
    publish,
    script,
)
from graphopt import ir, models
from graphopt.coverage import INTEGER, onnxruntime_coverage
from graphopt.data import open_data
from graphopt.evaluate import evaluate_node
from graphopt.int8 import sqnr
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.target import Target

Array = np.ndarray[Any, Any]

ROOT: Final = Path(__file__).parent.parent
TARGET: Final = Target("ort", "cpu")
EMULATED_CPU: Final = ("qemu-x86_64", "-cpu", "max,avx512f=off")
UNDER_QEMU: Final = 100  # test images; it is slow

RUN: Final = """
import json, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
samples = np.load(sys.argv[1])
for name in json.loads(sys.argv[2]):
    session = ort.InferenceSession(name, options, providers=["CPUExecutionProvider"])
    np.save(name + ".npy", session.run(None, {session.get_inputs()[0].name: samples})[0])
"""

COLLECT = """
import sys
import numpy as np
from graphopt import ir
from graphopt.analyses.calibration import calibrate, root_tensors
from graphopt.data import open_data
model = ir.load({model!r})
names = [t.name for n in model.graph.nodes for t in n.outputs]
data = open_data({data!r}, model.inputs)
block = calibrate(model, names, data)
"""

COLLECT_ORT = """
import sys, tempfile
import numpy as np, onnx
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
class Reader(CalibrationDataReader):
    def __init__(self):
        self.samples = iter(np.split(np.load({data!r})[{name!r}], {pieces}))
    def get_next(self):
        piece = next(self.samples, None)
        return None if piece is None else {{{name!r}: piece}}
ops = sorted({{n.op_type for n in onnx.load({model!r}).graph.node}})
with tempfile.TemporaryDirectory() as folder:
    calibrator = create_calibrator({model!r}, ops, folder + "/augmented.onnx", CalibrationMethod.{method})
    calibrator.collect_data(Reader())
    block = calibrator.compute_data()
"""


@dataclass(frozen=True)
class Network:
    """A float model with its data."""

    name: str
    model: ir.Model
    calibration: Array
    images: Array
    labels: Array

    @property
    def input(self) -> str:
        """The name of the one input."""
        return self.model.inputs[0].name


def networks(folder: Path | None) -> Iterator[Network]:
    digits = models.digits()
    for name in ("mobilenet", "resnet", "concat", "vit"):
        model = ir.load(ROOT / "models" / f"{name}.legacy.onnx")
        yield Network(f"digits {name}", model, digits["x_calib"], digits["x_test"], digits["y_test"])
    if folder is None:
        return
    file = folder / "cifar10_jpeg.npz"
    for name in ("resnet20", "resnet56"):
        path = folder / f"{name}_cifar10.onnx"
        if path.exists() and file.exists():
            stored = np.load(file)
            yield Network(
                f"CIFAR {name}",
                ir.load(path),
                normalized(stored["x_train"][:256]),
                normalized(stored["x_test"]),
                stored["y_test"],
            )


def normalized(images: Array) -> Array:
    mean, std = (np.array(v, np.float32) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return np.ascontiguousarray(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))


def session(path: Path, optimized: bool = True, threads: int = 1) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits(path: Path, network: Network, optimized: bool) -> Array:
    """Of all images on the kernels; of the first thousand as written, which is slow."""
    running = session(path, optimized, 2)
    images = network.images if optimized else network.images[:1000]
    return np.concatenate([running.run(None, {network.input: p})[0] for p in pieces(images, 100)])


def pieces(images: Array, size: int) -> Iterator[Array]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


# Settings: each writes an int8 model of the float model at `source`


def ours(pipeline: str) -> Callable[[Path, Path, Network], None]:
    def make(source: Path, target: Path, network: Network) -> None:
        model = ir.load(source)
        data = open_data({network.input: network.calibration}, model.inputs)
        ctx = Context(target=TARGET, data=data, evaluate=evaluate_node)
        ir.save(Pipeline.parse(pipeline).run(model, ctx).model, target)

    return make


def theirs(
    activations: str, reduce_range: bool = False, method: str = "MinMax"
) -> Callable[[Path, Path, Network], None]:
    def make(source: Path, target: Path, network: Network) -> None:
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.pieces = iter(np.array_split(network.calibration, len(network.calibration) // 16))

            def get_next(self) -> dict[str, Array] | None:
                piece = next(self.pieces, None)
                return None if piece is None else {network.input: piece}

        quantize_static(
            str(source),
            str(target),
            Reader(),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=getattr(QuantType, activations),
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )

    return make


SETTINGS: Final[dict[str, Callable[[Path, Path, Network], None]]] = {
    "graphopt": ours("quantize-qdq"),
    "graphopt, full-range weights": ours("quantize-qdq{pair-safe=false}"),
    "graphopt dynamic": ours("quantize-dynamic"),
    "ORT S8S8": theirs("QInt8"),
    "ORT U8S8": theirs("QUInt8"),
    "ORT U8S8 reduce_range": theirs("QUInt8", reduce_range=True),
    "ORT U8S8 percentile": theirs("QUInt8", method="Percentile"),
}


def int8_layers(path: Path) -> str:
    """How many weighted operators run as integer kernels, of all."""
    import onnx
    import onnxruntime as ort

    layers = onnxruntime_coverage(ir.load(path))
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
        integer = sum(n.op_type in INTEGER - {"MatMulNBits"} for n in nodes)
    return f"{integer}/{max(len(layers), integer)}"


def accuracy(network: Network, folder: Path, table: Table, rounds: int, seed: int, avx2: bool) -> None:
    source = folder / "float.onnx"
    ir.save(Pipeline.parse("default").run(network.model).model, source)
    reference = logits(source, network, True)
    made: dict[str, tuple[Path, float]] = {}
    for number, (name, make) in enumerate(SETTINGS.items()):
        path = folder / f"{number}.onnx"
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # ORT's collectors print
                warnings.simplefilter("ignore")
                make(source, path, network)
                session(path)
        except Exception as error:
            table.add(network=network.name, setting=name, note=" ".join(str(error).split())[:60])
            continue
        made[name] = path, time.perf_counter() - start
    ratios: dict[str, dict[int, float]] = {name: {} for name in made}
    for batch in (1, 8):
        sample = {network.input: network.images[:batch]}
        running = {"float": session(source), **{name: session(path) for name, (path, _) in made.items()}}
        calls = {name: (lambda s=s, sample=sample: s.run(None, sample)) for name, s in running.items()}
        timings = contest(calls, rounds=rounds, seed=seed, title=f"{network.name}, batch {batch}")
        for name in made:
            ratios[name][batch] = timings.compare("float", name).ratio
    without = without_vnni(network, folder, [path for path, _ in made.values()]) if avx2 else {}
    for name, (path, seconds) in made.items():
        written, kernels = logits(path, network, False), logits(path, network, True)
        other = without.get(path)
        table.add(
            network=network.name,
            setting=name,
            emulated=sqnr([reference[: len(written)]], [written]),
            kernels=sqnr([reference], [kernels]),
            avx2=None if other is None else sqnr([reference[: len(other)]], [other]),
            float=100 * float(np.mean(reference.argmax(1) == network.labels)),
            top1=100 * float(np.mean(kernels.argmax(1) == network.labels)),
            agreement=100 * float(np.mean(kernels.argmax(1) == reference.argmax(1))),
            int8=int8_layers(path),
            one=ratios[name][1],
            eight=ratios[name][8],
            seconds=seconds,
        )


def without_vnni(network: Network, folder: Path, paths: list[Path]) -> dict[Path, Array]:
    """The logits of each model on an emulated CPU with AVX2 and neither AVX-512 nor VNNI."""
    np.save(folder / "samples.npy", network.images[:UNDER_QEMU])
    arguments = [sys.executable, "-c", RUN, str(folder / "samples.npy"), json.dumps(list(map(str, paths)))]
    subprocess.run([*EMULATED_CPU, *arguments], check=True, capture_output=True)
    return {path: np.load(f"{path}.npy") for path in paths}


def memory(network: Network, folder: Path, table: Table) -> None:
    """Peak memory and time of calibration alone, in processes of their own."""
    source = folder / "float.onnx"
    for count in (64, 2048):
        repeated = np.resize(network.calibration, (count, *network.calibration.shape[1:]))
        data = folder / f"{count}.npz"
        arrays: Any = {network.input: repeated}
        np.savez(data, **arrays)
        fields = {"model": str(source), "data": str(data), "name": network.input, "pieces": max(1, count // 16)}
        contestants = {
            "graphopt, histograms of all tensors": COLLECT.format(**fields),
            "ORT MinMax": COLLECT_ORT.format(**fields, method="MinMax"),
            "ORT Entropy": COLLECT_ORT.format(**fields, method="Entropy"),
        }
        for name, code in contestants.items():
            run = peer_process(code, source, timeout=600, env={"PYTHONPATH": str(ROOT)})
            if run.failure or run.cost is None:
                table.add(network=network.name, samples=count, collector=name, note=str(run.failure)[:60])
            else:
                cost = run.cost
                table.add(
                    network=network.name, samples=count, collector=name, peak=cost.peak_mb, wall=cost.wall_seconds
                )


def main(
    data: DataFolder = None,
    rounds: Rounds = 31,
    seed: Seed = 0,
    avx2: Annotated[bool, typer.Option("--avx2", help="Also run on an emulated CPU without VNNI (slow).")] = False,
    only: Annotated[str, typer.Option(help="Networks whose name holds this text.")] = "",
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    logging.disable(logging.WARNING)
    folder = data_folder(data) if data is not None else None
    avx2 = avx2 and shutil.which(EMULATED_CPU[0]) is not None
    first = Table(
        "Int8 on ONNX Runtime's CPU provider",
        [
            Column("network", "network"),
            Column("setting", "setting"),
            Column("emulated", "emulated dB", ".1f"),
            Column("kernels", "kernels dB", ".1f"),
            Column("avx2", "avx2 dB", ".1f"),
            Column("float", "top-1 float", ".2f"),
            Column("top1", "top-1", ".2f"),
            Column("agreement", "agreement", ".2f"),
            Column("int8", "int8"),
            Column("one", "time, batch 1", ".2f"),
            Column("eight", "batch 8", ".2f"),
            Column("seconds", "seconds", ".1f"),
            Column("note", "note"),
        ],
        note="dB: SQNR of the logits; time: int8 over float, one thread; seconds: to quantize, calibration included.",
    )
    second = Table(
        "Calibration alone",
        [
            Column("network", "network"),
            Column("samples", "samples", "d"),
            Column("collector", "collector"),
            Column("peak", "peak MB", ".0f"),
            Column("wall", "wall s", ".2f"),
            Column("note", "note"),
        ],
        note="A process each, imports included; graphopt reads the compressed-free .npz in pieces, ORT's reader holds it.",
    )
    for network in networks(folder):
        if only not in network.name:
            continue
        with tempfile.TemporaryDirectory(prefix="graphopt-int8-") as place:
            accuracy(network, Path(place), first, rounds, seed, avx2)
            if network.name in ("digits resnet", "CIFAR resnet20"):
                memory(network, Path(place), second)
    publish(first, second, markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
