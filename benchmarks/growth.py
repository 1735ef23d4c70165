"""Does -O2 stay linear? Time per node and memory on chains and wide graphs, from a thousand nodes to a hundred thousand.

    python -m benchmarks.growth                            # 1,000, 10,000 and 100,000 nodes; a few minutes
    python -m benchmarks.growth --sizes 1000,4000 --shapes chain,wide
    python -m benchmarks.growth --external-gb 4            # and a model of 4 GB in external data, through the command line

Each run is a process of its own; what is timed is the pipeline, in CPU seconds, without imports. The shapes:

- ``chain``: each node reads the one before (Relu, Add, Mul, Sigmoid in turn); nothing can be removed.
- ``identity``: the same with an Identity behind each; half of the nodes go.
- ``shapes``: each Reshape gets its target from Shape, Gather and Concat; all of that goes.
- ``wide``: all nodes read one input, and one node reads them all.
- ``constants``: a constant computed for each node, folded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

from benchmarks.graphs import ROOT
from benchmarks.harness import Column, JsonFile, MarkdownFile, Rounds, Table, Timeout, peer_process, publish, script
from graphopt.errors import UsageError

SHAPES: Final = ("chain", "identity", "shapes", "wide", "constants")
FACTOR: Final = 1.3  # time per node at the largest size over that at the smallest: what we allow ourselves

_RUN: Final = """
import json, resource, sys, time
import graphopt
from graphopt.pipeline import Pipeline
passes = Pipeline.parse("O2")
best = float("inf")
for _ in range(int(sys.argv[2])):
    model = graphopt.load(sys.argv[1])
    before = time.process_time()
    result = passes.run(model)
    best = min(best, time.process_time() - before)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": best, "nodes": sum(1 for _ in result.model.nodes()), "peak_mb": peak / 1e6}))
"""


def model_of(shape: str, size: int) -> onnx.ModelProto:
    """A model of about `size` nodes."""
    nodes: list[onnx.NodeProto] = []
    weights: list[TensorProto] = []

    def stored(values: np.ndarray[Any, Any]) -> str:
        name = f"w{len(weights)}"
        weights.append(numpy_helper.from_array(values, name))
        return name

    def emit(op: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [f"t{len(nodes)}"], f"n{len(nodes)}", **attributes))
        name: str = nodes[-1].output[0]
        return name

    last = "x"
    step = 0
    two, zero = stored(np.full(4, 2, np.float32)), stored(np.zeros(1, np.int64))
    four = stored(np.array([4], np.int64))
    branches: list[str] = []
    while len(nodes) < size - 1:
        step += 1
        match shape:
            case "chain" | "identity":
                op = ("Relu", "Add", "Mul", "Sigmoid")[step % 4]
                last = emit(op, last, *([two] if op in ("Add", "Mul") else []))
                if shape == "identity":
                    last = emit("Identity", last)
            case "shapes":
                first = emit("Gather", emit("Shape", last), zero)
                last = emit("Reshape", emit("Sigmoid", last), emit("Concat", first, four, axis=0))
            case "wide":
                branches.append(emit("Add", "x", stored(np.full(4, step, np.float32))))
            case "constants":
                computed = emit("Exp", stored(np.full(4, step % 7 / 7, np.float32)))
                last = emit("Mul", emit("Sigmoid", last), computed)
    nodes.append(helper.make_node("Sum" if branches else "Neg", branches or [last], ["y"], "last"))
    kind = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])
    graph = helper.make_graph(nodes, "g", [kind], [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(folder: Path, gigabytes: float) -> Path:
    """A model whose weights lie beside it: MatMuls of 64 MB each, written one at a time."""
    size, count = 4096, max(1, round(gigabytes * 1e9 / (4096 * 4096 * 4)))
    block = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    weights, nodes, last = [], [], "x"
    with (folder / "weights.bin").open("wb") as file:
        for number in range(count):
            block[0, 0] = number
            tensor = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=[size, size])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", file.tell()), ("length", block.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(block.tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"m{number}"]))
            nodes.append(helper.make_node("Identity", [f"m{number}"], [f"t{number}"]))
            last = f"t{number}"
    nodes.append(helper.make_node("Relu", [last], ["y"]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _measured(path: Path, rounds: int, timeout: float) -> dict[str, Any]:
    run = peer_process(_RUN, path, str(rounds), timeout=timeout, env={"PYTHONPATH": str(ROOT)})
    if run.failure or run.cost is None:
        raise UsageError(f"{path.name}: {run.failure}; give it more time with --timeout")
    answer: dict[str, Any] = json.loads(run.cost.stdout.strip().splitlines()[-1])
    return answer


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of nodes.")] = "1000,10000,100000",
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = ",".join(SHAPES),
    external_gb: Annotated[float, typer.Option(help="Also optimize a model with so much external data.")] = 0,
    rounds: Rounds = 3,
    timeout: Timeout = 1800,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    counts, wanted = [int(s) for s in sizes.split(",")], [s.strip() for s in shapes.split(",")]
    if unknown := [s for s in wanted if s not in SHAPES]:
        raise UsageError(f"no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    columns = [Column("shape", "graph"), Column("size", "nodes", "d"), Column("left", "left", "d")]
    columns += [Column("seconds", "CPU s", ".2f"), Column("each", "us per node", ".1f")]
    columns += [Column("ratio", "to the smallest", ".2f"), Column("peak", "peak MB", ".0f")]
    table = Table("Growth", columns, f"{FACTOR} is what we allow ourselves; best of {rounds} round(s) of the pipeline.")
    with tempfile.TemporaryDirectory(prefix="graphopt-growth-") as temporary:
        path = Path(temporary) / "model.onnx"
        for shape in wanted:
            first = 0.0
            for size in counts:
                path.write_bytes(model_of(shape, size).SerializeToString())
                found = _measured(path, rounds if size < 50_000 else 1, timeout)
                each = found["seconds"] / size * 1e6
                first = first or each
                table.add(
                    shape=shape,
                    size=size,
                    left=found["nodes"],
                    seconds=found["seconds"],
                    each=each,
                    ratio=each / first,
                    peak=found["peak_mb"],
                )
                print(f"{shape} {size}: {each:.1f} us per node, {each / first:.2f}", file=sys.stderr, flush=True)
    tables = [table]
    if external_gb:
        tables.append(_external(external_gb, timeout))
    publish(*tables, markdown=markdown, json_file=json_file)


def _external(gigabytes: float, timeout: float) -> Table:
    """The command line on a model with external data: what it takes, start-up included."""
    columns = [Column("size", "GB", ".2f"), Column("seconds", "CPU s", ".2f"), Column("peak", "peak MB", ".0f")]
    table = Table("External data", columns, "graphopt opt model.onnx -o out.onnx --external-data -O2.")
    command = (
        "import runpy, sys; sys.argv = ['graphopt', 'opt', sys.argv[1], '-o', sys.argv[2], '-O2', '--external-data']; "
    )
    with tempfile.TemporaryDirectory(prefix="graphopt-growth-") as temporary:
        path = external(Path(temporary), gigabytes)
        size = (path.parent / "weights.bin").stat().st_size / 1e9
        snippet = f"{command}runpy.run_module('graphopt.cli', run_name='__main__')"
        out = Path(temporary) / "out.onnx"
        run = peer_process(snippet, path, out, timeout=timeout, env={"PYTHONPATH": str(ROOT)})
        if run.failure or run.cost is None:
            raise UsageError(f"the model with external data: {run.failure}")
        table.add(size=size, seconds=run.cost.cpu_seconds, peak=run.cost.peak_mb)
    return table


if __name__ == "__main__":
    script(main)
