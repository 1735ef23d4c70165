"""Pruning real models of others, and one of ResNet-50's size: what is found, whether it is valid, how far the outputs move, what it takes.

    python -m benchmarks.prune_models --folder GRAPHS               # EfficientNet-Lite0, MiniLM-L3, Silero VAD, PP-OCRv4 rec at 20 %
    python -m benchmarks.prune_models --graphs resnet50-sized       # 30 %, 128 samples of 224 x 224, time and memory

The models come from `benchmarks.graphs --fetch`. Samples are generated, so the relative errors (root mean square of the outputs' change over
their standard deviation, on samples that were not pruned with) compare repairs and not accuracies. ``resnet50-sized`` has ResNet-50's
graph with random weights and runs in a process of its own, whose peak memory is taken.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

from benchmarks import graphs as catalogue
from benchmarks.graphs import GraphsFolder, Patterns
from benchmarks.harness import Column, JsonFile, MarkdownFile, Seed, Table, peer_process, publish, script
from graphopt import ir
from graphopt.analyses import allocation
from graphopt.analyses.channel_groups import channel_groups
from graphopt.data import ListData, open_data
from graphopt.errors import UsageError, UserError
from graphopt.evaluate import evaluate_node, seconds
from graphopt.ir import Model
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline

Array = NDArray[Any]

REAL: Final = ("efficientnet_lite0", "minilm", "silero_op15", "ppocr_rec")
SIZED: Final = "resnet50-sized"
_SHARE: Final = 0.2
_FEEDS: Final = {"efficientnet_lite0": 24, "minilm": 48, "silero_op15": 48, "ppocr_rec": 32}
_SIZED_RUN: Final = """
import json, resource, sys, time
from benchmarks import prune_models
print(json.dumps(prune_models.sized(int(sys.argv[2]), int(sys.argv[3]))))
"""


@dataclass(frozen=True)
class Subject:
    """A model and samples: to prune with, and others to judge by."""

    name: str
    model: Model
    feeds: list[dict[str, Array]]
    held_out: list[dict[str, Array]]


def subjects(folder: Path, patterns: str) -> Iterator[Subject]:
    """The real models whose names match."""
    there = {graph.name: graph for graph in catalogue.real(folder)}
    for name in REAL:
        if not catalogue.matches(name, patterns):
            continue
        graph = there[name]
        if not graph.path.exists():
            raise UsageError(
                f"{graph.path} is not there; fetch it: python -m benchmarks.graphs --fetch --folder {folder}"
            )
        proto = onnx.load(graph.path)
        sample = graph.samples[-1]
        feeds = [sample.feeds(proto, seed) for seed in range(_FEEDS[name] + 8)]
        yield Subject(name, ir.load(graph.path), feeds[:-8], feeds[-8:])


def row(subject: Subject, seed: int) -> dict[str, Any]:
    """Prune one real model twice, without and with repair."""
    original = Pipeline.parse("O2").run(subject.model, Context(evaluate=evaluate_node)).model
    began = time.perf_counter()
    groups = channel_groups(original)
    cells: dict[str, Any] = {"model": subject.name, "found": time.perf_counter() - began}
    cells |= {"groups": len(groups.groups), "channels": len(groups.classes)}
    reference = allocation.outputs(original, subject.held_out)
    for way, options in {"plain": ",repair=false", "repaired": ""}.items():
        data = ListData("generated", subject.feeds)
        context = Context(evaluate=evaluate_node, data=data, seed=seed, clock=seconds)
        began = time.perf_counter()
        try:
            pruned = Pipeline.parse(f"prune-channels{{ratio={_SHARE}{options}}}").run(original, context).model
        except UserError as error:
            return {**cells, "valid": str(error)[:120]}
        cells["seconds"] = time.perf_counter() - began
        cells[way] = math.sqrt(allocation.distance(reference, allocation.outputs(pruned, subject.held_out)))
        onnx.checker.check_model(ir.saves(pruned), full_check=True)
        after = channel_groups(pruned)
        cells["macs"] = after.cost_model("macs").total() / groups.cost_model("macs").total()
        cells["params"] = after.cost_model("params").total() / groups.cost_model("params").total()
        before, now = seconds([original, pruned], subject.held_out[0])
        cells["latency"] = now / before
    return {**cells, "valid": "yes"}


def resnet50(seed: int = 0) -> Model:
    """ResNet-50's graph with random weights, BatchNormalization folded; input ``x`` float32 [N, 3, 224, 224]."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(x: str, ins: int, outs: int, kernel: int, stride: int = 1, gain: float = 1.0) -> str:
        scale = gain * math.sqrt(2 / (ins * kernel * kernel))
        name = f"conv{len(nodes)}"
        values = rng.standard_normal((outs, ins, kernel, kernel), np.float32) * np.float32(scale)
        weights.append(onnx.numpy_helper.from_array(values, f"{name}_w"))
        weights.append(onnx.numpy_helper.from_array(np.zeros(outs, np.float32), f"{name}_b"))
        pads = [kernel // 2] * 4
        made = onnx.helper.make_node(
            "Conv", [x, f"{name}_w", f"{name}_b"], [name], name, pads=pads, strides=[stride, stride]
        )
        nodes.append(made)
        return name

    def op(kind: str, inputs: list[str], **attrs: Any) -> str:
        name = f"{kind.lower()}{len(nodes)}"
        nodes.append(onnx.helper.make_node(kind, inputs, [name], name, **attrs))
        return name

    x = op("Relu", [conv("x", 3, 64, 7, 2)])
    x = op("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    ins = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            step = stride if block == 0 else 1
            y = op("Relu", [conv(x, ins, width, 1)])
            y = op("Relu", [conv(y, width, width, 3, step)])
            y = conv(y, width, 4 * width, 1, gain=0.3)
            skip = conv(x, ins, 4 * width, 1, step, 0.7) if block == 0 else x
            x, ins = op("Relu", [op("Add", [y, skip])]), 4 * width
    x = op("Flatten", [op("GlobalAveragePool", [x])])
    weights.append(onnx.numpy_helper.from_array(rng.standard_normal((ins, 1000), np.float32) / 45, "head"))
    nodes.append(onnx.helper.make_node("MatMul", [x, "head"], ["y"], "head"))
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "resnet50",
        [info("x", onnx.TensorProto.FLOAT, ["N", 3, 224, 224])],
        [info("y", onnx.TensorProto.FLOAT, ["N", 1000])],
        weights,
    )
    opset = onnx.helper.make_opsetid("", 17)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))


def sized(samples: int, seed: int) -> dict[str, Any]:
    """The run of ResNet-50's size; in a process of its own, since its peak memory is taken."""
    import resource

    model = resnet50()
    began = time.perf_counter()
    groups = channel_groups(model)
    cells: dict[str, Any] = {"model": f"{SIZED}, {samples} samples", "found": time.perf_counter() - began}
    cells |= {"groups": len(groups.groups), "channels": len(groups.classes)}
    rng = np.random.default_rng(seed)
    feeds = {"x": rng.standard_normal((samples, 3, 224, 224), np.float32)}
    context = Context(evaluate=evaluate_node, data=open_data(feeds, model.inputs), seed=seed)
    began, spent = time.perf_counter(), time.process_time()
    pruned = Pipeline.parse("prune-channels{ratio=0.3}").run(model, context).model
    cells["seconds"], cells["cpu"] = time.perf_counter() - began, time.process_time() - spent
    after = channel_groups(pruned)
    cells["macs"] = after.cost_model("macs").total() / groups.cost_model("macs").total()
    cells["params"] = after.cost_model("params").total() / groups.cost_model("params").total()
    cells["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**cells, "valid": "yes"}


def table() -> Table:
    """The columns of this benchmark."""
    return Table(
        "Real models, and one of ResNet-50's size",
        [
            *(Column("model", "model"), Column("groups", "groups", "d"), Column("channels", "free channels", "d")),
            *(Column("found", "groups s", ".2f"), Column("macs", "MACs x", ".2f"), Column("params", "params x", ".2f")),
            *(Column("latency", "latency x", ".2f"), Column("plain", "error sliced", ".3f")),
            *(Column("repaired", "error repaired", ".3f"), Column("valid", "valid")),
            *(Column("seconds", "s", ".0f"), Column("cpu", "CPU s", ".0f"), Column("peak_mb", "peak MB", ".0f")),
        ],
        "Errors: root mean square of the change of the outputs over their standard deviation, on generated samples held out.",
    )


def rows(folder: Path, patterns: str, samples: int, seed: int, done: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a model; those in `done` are taken from there."""
    for name in (*REAL, SIZED):
        if not catalogue.matches(name, patterns):
            continue
        if name in done:
            yield done[name]
        elif name == SIZED:
            yield _sized_row(samples, seed)
        else:
            for subject in subjects(folder, name):
                yield row(subject, seed)


def _sized_row(samples: int, seed: int) -> dict[str, Any]:
    import json
    import os

    root = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join([str(root), *sys.path])
    run = peer_process(_SIZED_RUN, root, str(samples), str(seed), timeout=3600, env={"PYTHONPATH": paths})
    if run.failure or run.cost is None:
        return {"model": SIZED, "valid": run.failure}
    found: dict[str, Any] = json.loads(run.cost.stdout.strip().splitlines()[-1])
    return found


def main(
    graphs_: Patterns = "*",
    folder: GraphsFolder = None,
    samples: Annotated[int, typer.Option(help="Of the run of ResNet-50's size.")] = 128,
    seed: Seed = 0,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    found = table()
    for cells in rows(catalogue.graphs_folder(folder), graphs_, samples, seed, {}):
        found.add(**cells)
    if not found.rows:
        raise UsageError(f"no model matches {graphs_!r}; there are {', '.join((*REAL, SIZED))}")
    publish(found, markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
