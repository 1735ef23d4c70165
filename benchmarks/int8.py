"""Int8 that keeps its accuracy on the CPU that runs it: graphopt beside ONNX Runtime's own quantizer, from the same samples.

    python -m benchmarks.int8
    python -m benchmarks.int8 --data /data/graphopt --folder /data/graphs --python peers/bin/python --state int8.state.json \\
        --markdown int8.md --json int8.json
    python -m benchmarks.int8 --avx2    # and on an emulated CPU without VNNI (slow)

The digits networks of models/ are always there; CIFAR ResNets come from the data folder, EfficientNet-Lite0 and MiniLM from the folder of
`benchmarks.graphs`, where given, and peers from the environment of ``--python``. With ``--state`` an interrupted run goes on
with the first network that is not in that file. Every setting starts from the same
float model, the one that graphopt's default pipeline made, and sees the same calibration samples. SQNR is of the logits on the test
images against that float model: `emulated` with the graph computed as written (ORT_DISABLE_ALL), `kernels` in a default session on
this CPU, `avx2` in the same session under qemu as a CPU without VNNI (``--avx2``; needs qemu-x86_64), whose u8 x s8 kernels
saturate. `int8` counts weighted operators that run as integer kernels after ONNX Runtime's own fusion. Time is one thread, batch 1 and
8, int8 over float in the same round.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from benchmarks.graphs import GraphsFolder
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
from benchmarks.int8_rtx import engines, engines_table
from benchmarks.int8_text import WordPiece, batches, embed, pairs, spearman
from graphopt import ir, models
from graphopt.coverage import INTEGER, onnxruntime_coverage
from graphopt.data import ListData, open_data
from graphopt.errors import UsageError
from graphopt.evaluate import evaluate_node
from graphopt.int8 import Judge, search, sqnr
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.target import Target

Array = np.ndarray[Any, Any]

ROOT: Final = Path(__file__).parent.parent
TARGET: Final = Target("ort", "cpu")
EMULATED_CPU: Final = ("qemu-x86_64", "-cpu", "max,avx512f=off")
UNDER_QEMU: Final = 600  # test images; it is slow

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
from graphopt.data import ListData, open_data
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
    labels: Array | None  # None: agreement alone counts
    settings: tuple[str, ...] | None = None  # none: all of them

    @property
    def input(self) -> str:
        """The name of the one input."""
        return self.model.inputs[0].name

    @property
    def most(self) -> int:
        """Samples that a run may have: the model's own number where that is fixed."""
        first = (self.model.inputs[0].shape or ("N",))[0]
        return first if isinstance(first, int) else 100


def networks(folder: Path | None, graphs: Path | None) -> Iterator[Network]:
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
    large_net = (graphs or Path()) / "efficientnet_lite0.onnx"
    if graphs is not None and large_net.exists() and file.exists():
        # no ImageNet here: enlarged CIFAR images, and agreement alone counts
        stored = np.load(file)
        small = [stored[k][:n].repeat(7, axis=1).repeat(7, axis=2) for k, n in (("x_train", 32), ("x_test", 100))]
        large = [np.ascontiguousarray((s.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)) for s in small]
        yield Network("EfficientNet-Lite0", ir.load(large_net), large[0], large[1], None)
    for name in ("mat_resnet50",) if graphs is not None else ():  # random weights: their time alone says something
        path = (graphs or Path()) / f"{name}.onnx"
        if path.exists():
            noise = np.random.default_rng(0).standard_normal((8, 3, 224, 224)).astype(np.float32)
            yield Network(name, ir.load(path), noise, noise, None, TIMED)


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
    return np.concatenate([running.run(None, {network.input: p})[0] for p in pieces(images, network.most)])


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
                size = min(16, network.most)
                self.pieces = iter(np.array_split(network.calibration, len(network.calibration) // size))

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


ONNXSIM: Final = """
import sys, numpy as np, onnx, onnxsim
source, target, samples, name = sys.argv[1:]
pieces = np.array_split(np.load(samples), 8)
onnx.save(onnxsim.quantize_static(onnx.load(source), [{name: p} for p in pieces]), target)
"""
NNCF: Final = """
import sys, numpy as np, onnx, nncf
source, target, samples, name = sys.argv[1:]
x = np.load(samples)
feeds = [{name: x[i : i + 1]} for i in range(len(x))]
onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(feeds), subset_size=len(x)), target)
"""
MODELOPT: Final = """
import sys, numpy as np
from modelopt.onnx.quantization import quantize
source, target, samples, name = sys.argv[1:]
quantize(onnx_path=source, quantize_mode="int8", calibration_data={name: np.load(samples)}, calibration_method="max",
    calibration_eps=["cpu"], high_precision_dtype="fp32", output_path=target)
"""


def peer(code: str) -> Callable[[Path, Path, Network], None]:
    """A peer in its own environment; its failure is this setting's note."""

    def make(source: Path, target: Path, network: Network) -> None:
        samples = source.parent / "calibration.npy"
        np.save(samples, network.calibration)
        command = [PEERS[0], "-c", code, str(source), str(target), str(samples), network.input]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=source.parent, check=False)
        if run.returncode:
            raise RuntimeError((run.stderr.strip().splitlines() or ["it failed"])[-1])

    return make


def gated(source: Path, target: Path, network: Network) -> None:
    """What ``build --int8`` makes: the search with its gate."""
    model = ir.load(source)
    data = open_data({network.input: network.calibration}, model.inputs)
    ir.save(search(model, TARGET, Pipeline(), data).result.model, target)


TIMED: Final = ("graphopt build --int8 (gate)", "ORT S8S8", "ORT U8S8")
PEERS: list[str] = []  # the interpreter that has them, where one was named
PEER_CODE: Final = {"onnxsim static": ONNXSIM, "nncf": NNCF, "modelopt max": MODELOPT}
STEPS: Final = {
    "as before: nearest codes, min-max, no bias": "quantize-qdq{calibration=minmax,rounding=nearest,correct-bias=false}",
    "+ bias correction": "quantize-qdq{calibration=minmax,rounding=nearest}",
    "+ GPTQ rounding": "quantize-qdq{calibration=minmax}",
    "+ ranges by error at the readers (default)": "quantize-qdq",
    "+ equalize-channels": "equalize-channels,quantize-qdq",
    "default, full-range weights": "quantize-qdq{pair-safe=false}",
}  # what each brings, on the digits networks
SETTINGS: Final[dict[str, Callable[[Path, Path, Network], None]]] = {
    "graphopt": ours("quantize-qdq"),
    "graphopt, full-range weights": ours("quantize-qdq{pair-safe=false}"),
    "graphopt build --int8 (gate)": gated,
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
    settings = {**SETTINGS, **({name: peer(code) for name, code in PEER_CODE.items()} if PEERS else {})}
    if network.settings is not None:
        settings = {name: settings[name] for name in network.settings}
    for number, (name, make) in enumerate(settings.items()):
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
    for batch in (1, 8) if network.most >= 8 else (1,):
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
            avx2_top1=None if other is None or network.labels is None else right(other, network.labels[: len(other)]),
            float=right(reference, network.labels),
            top1=right(kernels, network.labels),
            agreement=100 * float(np.mean(kernels.argmax(1) == reference.argmax(1))),
            int8=int8_layers(path),
            one=ratios[name][1],
            eight=ratios[name].get(8),
            seconds=seconds,
        )


def right(logits: Array, labels: Array | None) -> float | None:
    return None if labels is None else 100 * float(np.mean(logits.argmax(1) == labels))


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


def steps(network: Network, table: Table) -> None:
    """What each step of quantization brings, in dB of the test images' logits as written."""
    model = Pipeline.parse("default").run(network.model).model
    data = open_data({network.input: network.calibration}, model.inputs)
    judge = Judge(model, open_data({network.input: network.images[:1000]}, model.inputs), None)
    row: dict[str, Any] = {"network": network.name}
    for name, pipeline in STEPS.items():
        made = Pipeline.parse(pipeline).run(model, Context(target=TARGET, data=data, evaluate=evaluate_node)).model
        row[name] = judge.score(made, optimized=False).sqnr
    table.add(**row)


def last_hidden(running: Any, name: str, feeds: dict[str, Array]) -> Array:
    return np.asarray(running.run([name], feeds)[0])


def sentences(model: ir.Model, scores: Path, vocabulary: Path, table: Table, rounds: int, seed: int) -> None:
    """MiniLM on STS-B: rank correlation with the scores, and time of a batch of one and of eight sentences."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    tokenizer, rows = WordPiece(vocabulary), pairs(scores)
    held = [tokenizer(t) for a, b, _ in rows[-64:] for t in (a, b)]  # calibration; not judged on
    rows = rows[:-64]
    sides = [[tokenizer(a) for a, _, _ in rows], [tokenizer(b) for _, b, _ in rows]]
    truth = np.array([row[2] for row in rows])
    floating = Pipeline.parse("default").run(model).model
    hidden = next(s.name for s in floating.outputs if s.dtype == "float32" and len(s.shape or ()) == 3)
    with tempfile.TemporaryDirectory(prefix="graphopt-int8-") as place:
        paths = {
            name: Path(place) / f"{number}.onnx" for number, name in enumerate(("float", *TEXT_SETTINGS, "ORT dynamic"))
        }
        ir.save(floating, paths["float"])
        for name, pipeline in TEXT_SETTINGS.items():
            data = ListData("sentences", list(batches(held, 8)))
            ctx = Context(target=TARGET, data=data, evaluate=evaluate_node)
            if pipeline is None:
                made = search(floating, TARGET, Pipeline(), data).result.model
            else:
                made = Pipeline.parse(pipeline).run(floating, ctx).model
            ir.save(made, paths[name])
        quantize_dynamic(str(paths["float"]), str(paths["ORT dynamic"]), weight_type=QuantType.QInt8, per_channel=True)
        running = {name: session(path) for name, path in paths.items()}
        ratios: dict[str, list[float]] = {name: [] for name in paths}
        for size in (1, 8):
            feeds = next(batches(sides[0], size))
            calls = {name: (lambda s=s, f=feeds: s.run([hidden], f)) for name, s in running.items()}
            timings = contest(calls, rounds=rounds, seed=seed, title=f"MiniLM, batch {size}")
            for name in paths:
                ratios[name].append(1.0 if name == "float" else timings.compare("float", name).ratio)
        for name, path in paths.items():
            run = functools.partial(last_hidden, running[name], hidden)
            left, right_ = (embed(run, side) for side in sides)
            found = spearman((left * right_).sum(1), truth)
            table.add(setting=name, spearman=found, one=ratios[name][0], eight=ratios[name][1], int8=int8_layers(path))


TEXT_SETTINGS: Final[dict[str, str | None]] = {
    "graphopt quantize-qdq": "quantize-qdq",
    "graphopt build --int8 (gate)": None,
    "graphopt quantize-dynamic": "quantize-dynamic",
    "graphopt quantize-weights": "quantize-weights",
}


class State:
    """Rows of the networks that are done, in a file, for a run that goes on after an interruption."""

    def __init__(self, path: Path | None, tables: Sequence[Table]) -> None:
        self.path, self.tables = path, tables
        self.done: dict[str, list[list[dict[str, Any]]]] = {}
        if path is not None and path.exists():
            self.done = json.loads(path.read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def network(self, name: str) -> Iterator[bool]:
        """True where the network has to be run; its rows are then stored. Else they are taken from the file."""
        before = [len(t.rows) for t in self.tables]
        if name in self.done:
            for table, rows in zip(self.tables, self.done[name], strict=True):
                for row in rows:
                    table.add(**row)
            yield False
            return
        yield True
        self.done[name] = [[dict(r) for r in t.rows[n:]] for t, n in zip(self.tables, before, strict=True)]
        if self.path is not None:
            self.path.write_text(json.dumps(self.done, indent=1), encoding="utf-8")


def main(
    data: DataFolder = None,
    graphs: GraphsFolder = None,
    python: Annotated[
        str | None, typer.Option("--python", envvar="GRAPHOPT_PEERS_PYTHON", help="An interpreter that has the peers.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", help="BERT's uncased vocab.txt; default: in the graphs' folder.")
    ] = None,
    state: Annotated[Path | None, typer.Option("--state", help="Finished networks, to go on from.")] = None,
    rounds: Rounds = 31,
    seed: Seed = 0,
    avx2: Annotated[bool, typer.Option("--avx2", help="Also run on an emulated CPU without VNNI (slow).")] = False,
    rtx: Annotated[bool, typer.Option(help="Also build engines of the digits networks for sm80 and sm89.")] = True,
    only: Annotated[str, typer.Option(help="Networks whose name holds this text.")] = "",
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    logging.disable(logging.WARNING)
    folder = data_folder(data) if data is not None else None
    if avx2 and shutil.which(EMULATED_CPU[0]) is None:
        raise UsageError(f"--avx2 runs the kernels under {EMULATED_CPU[0]}, which is not here: install qemu-user")
    if rtx and importlib.util.find_spec("tensorrt_rtx") is None:
        sys.stderr.write('engines are left out: pip install "graphopt[rtx]"\n')
        rtx = False
    first = Table(
        "Int8 on ONNX Runtime's CPU provider",
        [
            Column("network", "network"),
            Column("setting", "setting"),
            Column("emulated", "emulated dB", ".1f"),
            Column("kernels", "kernels dB", ".1f"),
            Column("avx2", "avx2 dB", ".1f"),
            Column("avx2_top1", "avx2 top-1", ".2f"),
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
    third = Table(
        "What each step brings",
        [Column("network", "network"), *(Column(name, name, ".1f") for name in STEPS)],
        note="dB of the logits, as written.",
    )
    fourth = Table(
        "MiniLM-L3 on STS-B dev",
        [
            Column("setting", "setting"),
            Column("spearman", "Spearman", ".4f"),
            Column("int8", "int8"),
            Column("one", "time, batch 1", ".2f"),
            Column("eight", "batch 8", ".2f"),
        ],
        note="Mean-pooled embeddings; 64 of the 1,500 pairs calibrate and are not judged on; time over float, one thread.",
    )
    fifth = engines_table()
    PEERS[:] = [python] if python else []
    tables = (first, second, third, fourth, fifth)
    progress = State(state, tables)
    for network in networks(folder, graphs):
        if only not in network.name:
            continue
        with progress.network(network.name) as wanted, tempfile.TemporaryDirectory(prefix="graphopt-int8-") as place:
            if not wanted:
                continue
            accuracy(network, Path(place), first, rounds, seed, avx2)
            if network.name in ("digits resnet", "CIFAR resnet20"):
                memory(network, Path(place), second)
            if network.name.startswith("digits"):
                steps(network, third)
    if folder is not None and graphs is not None and only in "MiniLM":
        found = next(graphs.rglob("paraphrase-MiniLM-L3-v2.onnx"), None)
        words = vocabulary or graphs / "bert_uncased_vocab.txt"
        scores = folder / "stsb-en-dev.csv"
        if found is None or not words.exists() or not scores.exists():
            sys.stderr.write("MiniLM is left out: it needs the model, stsb-en-dev.csv and --vocabulary\n")
        else:
            with progress.network("MiniLM") as wanted:
                if wanted:
                    sentences(ir.load(found), scores, words, fourth, rounds, seed)
    digits = models.digits()
    for name in ("resnet", "mobilenet", "concat", "vit") if rtx else ():
        if only not in f"digits {name} engines":
            continue
        with progress.network(f"digits {name} engines") as wanted:
            if wanted:
                engines(f"digits {name}", ir.load(ROOT / "models" / f"{name}.legacy.onnx"), digits["x_calib"], fifth)
    if not any(t.rows for t in tables):
        raise UsageError(f"no network's name holds {only!r}")
    publish(*(t for t in tables if t.rows), markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
