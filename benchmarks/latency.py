"""Latency under ONNX Runtime: what `-O3 --target ort:cpu` makes of a model, against the model with all of ONNX Runtime's own optimizations.

Both run in this process, one call each in turn (`graphopt.measure.interleave`), on 1 and on 2 threads. Where ONNX Runtime's transformers optimizer
applies (``--transformers``), its result is a third contestant. ``--profile`` says where the time goes, by operator. ``--kernels`` compares single operators with the parts they stand for: what the
passes for ort:cpu decide by.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import typer
from onnx import numpy_helper

from benchmarks import graphs as catalogue
from benchmarks.graphs import GraphsFolder, Patterns
from benchmarks.harness import (
    PEERS_VARIABLE,
    Column,
    DataFolder,
    JsonFile,
    MarkdownFile,
    Rounds,
    Seed,
    Table,
    contest,
    peer_process,
    publish,
    script,
)
from graphopt import ir
from graphopt.equivalence import difference
from graphopt.errors import UsageError
from graphopt.evaluate import evaluate_node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.target import Target

_LARGEST: Final = 400e6  # bytes of weights of a graph that is measured unless it is named alone
Arrays = dict[str, np.ndarray[Any, Any]]

# ONNX Runtime's optimizer for the models that it names; num_heads and hidden_size are found by itself where it can.
TRANSFORMERS: Final = """
import sys
from onnxruntime.transformers import optimizer

model = optimizer.optimize_model(sys.argv[1], model_type=sys.argv[3], num_heads=0, hidden_size=0, use_gpu=False)
model.save_model_to_file(sys.argv[2])
fused = [f"{count} {op}" for op, count in model.get_fused_operator_statistics().items() if count]
print(", ".join(fused) or "nothing fused")
"""


def session(path: Path, threads: int, optimized: bool = True) -> ort.InferenceSession:
    """A session on the CPU whose threads do not spin after a run, so that CPU seconds are billed to who used them."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def optimized(graph: catalogue.Graph, folder: Path, passes: str, target: Target) -> Path:
    """The model that graphopt makes of `graph`."""
    result = Pipeline.parse(passes).run(ir.load(graph.path), Context(target=target, evaluate=evaluate_node))
    path = folder / f"{graph.name}.graphopt.onnx"
    ir.save(result.model, path)
    return path


def inputs(graph: catalogue.Graph, seed: int) -> Arrays:
    """What both models are run on: recorded inputs of the same name beside the file (.npz), else the first sample's."""
    recorded, proto = graph.path.with_suffix(".npz"), onnx.load(graph.path)
    if not recorded.exists():
        return graph.samples[0].feeds(proto, seed)
    with np.load(recorded) as arrays:
        wanted = [value.name for value in catalogue.required_inputs(proto)]
        absent = [name for name in wanted if name not in arrays]
        if absent:
            raise UsageError(f"{str(recorded)!r} holds no input {absent[0]!r} of {graph.path.name}")
        return {name: arrays[name] for name in wanted}


def by_transformers_optimizer(graph: catalogue.Graph, folder: Path, python: str) -> tuple[Path | None, str]:
    """What ONNX Runtime's transformers optimizer, which needs torch, makes of it, and what it fused; or None and why not."""
    path = folder / f"{graph.name}.transformers.onnx"
    kind = "vit" if "vit" in graph.name or "deit" in graph.name else "bert"
    run = peer_process(TRANSFORMERS, graph.path, path, kind, python=python)
    if run.failure or run.cost is None:
        return None, f"fails: {run.failure}"
    try:
        session(path, 1)
    except Exception as error:  # what it wrote need not load
        return None, f"its result does not load: {str(error)[:100]}"
    return path, run.cost.stdout.strip().splitlines()[-1]


def measured(
    graph: catalogue.Graph, contestants: Mapping[str, Path], threads: int, feeds: Arrays, rounds: int, seed: int
) -> dict[str, Any]:
    """One row of the table."""
    sessions = {name: session(path, threads) for name, path in contestants.items()}
    expected = sessions["original"].run(None, feeds)
    found = sessions["graphopt"].run(None, feeds)
    gaps = [difference(str(i), a, b).relative for i, (a, b) in enumerate(zip(expected, found, strict=True))]
    calls: dict[str, Callable[[], object]] = {
        name: (lambda opened=opened: opened.run(None, feeds))  # type: ignore[misc]
        for name, opened in sessions.items()
    }
    timings = contest(calls, rounds=rounds, seed=seed, title=f"{graph.name}, {threads} threads")
    compared = timings.compare("original", "graphopt")
    peer = {"peer": timings.compare("original", "transformers").ratio} if "transformers" in contestants else {}
    return {
        "graph": graph.name,
        "threads": str(threads),
        "wall": float(np.median(timings.wall["original"])) * 1e3,
        "ratio": compared.ratio,
        "interval": f"{compared.interval_low:.3f} to {compared.interval_high:.3f}",
        "cpu_ratio": compared.cpu_ratio,
        **peer,
        "difference": max(gaps, default=0.0),
        "verdict": compared.verdict,
    }


def latencies(
    chosen: Sequence[catalogue.Graph], threads: Sequence[int], passes: str, peers: str | None, rounds: int, seed: int
) -> Table:
    """All graphs on all numbers of threads; `peers` is the interpreter that has ONNX Runtime's transformers optimizer and torch, or None."""
    columns = [
        *(Column("graph", "graph"), Column("threads", "threads", ">"), Column("wall", "original ms", ".4g")),
        *(
            Column("ratio", "ratio", ".3f"),
            Column("interval", "interval", ">"),
            Column("cpu_ratio", "CPU ratio", ".3f"),
        ),
        *(Column("difference", "difference", ".0e"), Column("verdict", "verdict")),
    ]
    if peers:
        columns += [Column("peer", "transformers optimizer", ".3f"), Column("fused", "what it fused")]
    table = Table(f"Latency of -p {passes!r} --target ort:cpu against the original under ONNX Runtime", columns)
    with tempfile.TemporaryDirectory(prefix="graphopt-latency-") as folder:
        for graph in chosen:
            feeds = inputs(graph, seed)
            contestants = {
                "original": graph.path,
                "graphopt": optimized(graph, Path(folder), passes, Target("ort", "cpu")),
            }
            fused: dict[str, str] = {}
            if peers:
                other, fused["fused"] = by_transformers_optimizer(graph, Path(folder), peers)
                contestants |= {"transformers": other} if other is not None else {}
            for count in threads:
                table.add(**measured(graph, contestants, count, feeds, rounds, seed), **fused)
    for count in threads:
        ratios = [float(str(r["ratio"])) for r in table.rows if r["threads"] == str(count)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            worst = max(ratios)
            table.note += f"{count} threads: geometric mean {mean:.3f}, highest {worst:.3f}, {len(ratios)} graphs. "
    table.note += "Ratios are graphopt / original: below 1 is faster. The difference is relative to the largest output."
    return table


# ------------------------------------------------------------------------------------------- where the time goes


def profiled(path: Path, feeds: Arrays, runs: int, folder: Path) -> dict[str, tuple[int, float]]:
    """By operator of what ONNX Runtime makes of the model: how many nodes, and the microseconds of a run on one thread in all of their kernels."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    settings.enable_profiling = True
    settings.profile_file_prefix = str(folder / path.stem)
    opened = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    for _ in range(runs):
        opened.run(None, feeds)
    spent: dict[tuple[str, str], list[float]] = {}
    for event in json.loads(Path(opened.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent.setdefault((event["args"]["op_name"], event["name"]), []).append(float(event["dur"]))
    found: dict[str, tuple[int, float]] = {}
    for (op, _), durations in spent.items():
        count, total = found.get(op, (0, 0.0))
        found[op] = count + 1, total + float(np.median(durations)) * len(durations) / runs
    return found


def profiles(chosen: Sequence[catalogue.Graph], passes: str, runs: int, seed: int) -> Table:
    """What the kernels of each operator take, in the original and in ours, both as ONNX Runtime optimizes them."""
    columns = [
        *(Column("graph", "graph"), Column("operator", "operator")),
        *(Column("nodes", "nodes", "d"), Column("spent", "original us", ".0f")),
        *(Column("ours_nodes", "our nodes", "d"), Column("ours", "ours us", ".0f"), Column("share", "of ours", ".0%")),
    ]
    table = Table("Kernels by operator, 1 thread, as ONNX Runtime's profiler counts them", columns)
    with tempfile.TemporaryDirectory(prefix="graphopt-profile-") as folder:
        for graph in chosen:
            feeds = inputs(graph, seed)
            ours = optimized(graph, Path(folder), passes, Target("ort", "cpu"))
            before, after = (profiled(path, feeds, runs, Path(folder)) for path in (graph.path, ours))
            total = sum(spent for _, spent in after.values())
            for op in sorted({*before, *after}, key=lambda op: (-after.get(op, (0, 0.0))[1], op)):
                (nodes, spent), (ours_nodes, own) = before.get(op, (0, 0.0)), after.get(op, (0, 0.0))
                if max(own, spent) < 0.01 * total:
                    continue
                table.add(
                    graph=graph.name, operator=op, nodes=nodes, spent=spent, ours_nodes=ours_nodes, ours=own, share=own / total
                )  # fmt: skip
            table.note += f"{graph.name}: {sum(s for _, s in before.values()):.0f} us before, {total:.0f} us after. "
    table.note += (
        f"Each kernel's median of {runs} runs; operators below 1 % are left out, the profiler's own time is in."
    )
    return table


# ----------------------------------------------------------------------------------------------------- single kernels


def _node(op: str, operands: Sequence[str], results: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    contrib = attributes.pop("contrib", False)
    return onnx.helper.make_node(op, operands, results, domain="com.microsoft" if contrib else "", **attributes)


def kernel_contests(width: int) -> dict[str, dict[str, list[onnx.NodeProto]]]:
    """What stands for what: a title, and ways to compute it from x and r of `width` columns."""
    add, plus = _node("Add", ["x", "c"], ["a"]), _node("Add", ["a", "r"], ["s"])
    norm = _node("LayerNormalization", ["s", "g", "b"], ["y"])
    return {
        "bias, residual and LayerNormalization": {
            "Add, Add, LayerNormalization": [add, plus, norm],
            "Sum, LayerNormalization": [_node("Sum", ["x", "c", "r"], ["s"]), norm],
            "SkipLayerNormalization": [_node("SkipLayerNormalization", ["x", "r", "g", "b", "c"], ["y"], contrib=True)],
        },
        "bias and Gelu": {
            "primitives": [
                add,
                _node("Div", ["a", "root"], ["d"]),
                _node("Erf", ["d"], ["e"]),
                _node("Add", ["e", "one"], ["p"]),
                _node("Mul", ["a", "p"], ["q"]),
                _node("Mul", ["q", "half"], ["y"]),
            ],
            "Add, Gelu": [add, _node("Gelu", ["a"], ["y"], contrib=True)],
            "BiasGelu": [_node("BiasGelu", ["x", "c"], ["y"], contrib=True)],
            "FastGelu": [_node("FastGelu", ["x", "c"], ["y"], contrib=True)],
        },
        "q, k and v": {
            "three products": [_node("MatMul", ["x", w], [y]) for w, y in (("w", "q"), ("v", "k"), ("u", "y"))],
            "one product, Split": [
                _node("MatMul", ["x", "wide"], ["p"]),
                _node("Split", ["p", "parts"], ["q", "k", "y"], axis=2),
            ],
        },
        "HardSwish": {
            "Add, Clip, Mul, Div": [
                _node("Add", ["x", "three"], ["a"]),
                _node("Clip", ["a", "zero", "six"], ["p"]),
                _node("Mul", ["x", "p"], ["q"]),
                _node("Div", ["q", "six"], ["y"]),
            ],
            "HardSigmoid, Mul": [_node("HardSigmoid", ["x"], ["a"], alpha=1 / 6), _node("Mul", ["x", "a"], ["y"])],
            "HardSwish": [_node("HardSwish", ["x"], ["y"])],
        },
        "Mish": {
            "Softplus, Tanh, Mul": [
                _node("Softplus", ["x"], ["p"]),
                _node("Tanh", ["p"], ["a"]),
                _node("Mul", ["x", "a"], ["y"]),
            ],
            "Mish": [_node("Mish", ["x"], ["y"])],
        },
        **{f"Softmax over axis {axis}": _softmax(axis) for axis in (1, 2)},
        "x / |x|": {
            "Mul, ReduceSum, Sqrt": [
                _node("Mul", ["x", "x"], ["a"]),
                _node("ReduceSum", ["a", "axis 2"], ["p"]),
                _node("Sqrt", ["p"], ["q"]),
                _node("Div", ["x", "q"], ["y"]),
            ],
            "ReduceL2": [_node("ReduceL2", ["x", "axis 2"], ["q"]), _node("Div", ["x", "q"], ["y"])],
        },
        "SiLU": {
            "Sigmoid, Mul": [_node("Sigmoid", ["x"], ["a"]), _node("Mul", ["x", "a"], ["y"])],
            "QuickGelu": [_node("QuickGelu", ["x"], ["y"], contrib=True, alpha=1.0)],
        },
    }


def _softmax(axis: int) -> dict[str, list[onnx.NodeProto]]:
    return {
        "ReduceMax, Sub, Exp, ReduceSum, Div": [
            _node("ReduceMax", ["x", f"axis {axis}"], ["a"]),
            _node("Sub", ["x", "a"], ["d"]),
            _node("Exp", ["d"], ["e"]),
            _node("ReduceSum", ["e", f"axis {axis}"], ["p"]),
            _node("Div", ["e", "p"], ["y"]),
        ],
        "Softmax": [_node("Softmax", ["x"], ["y"], axis=axis)],
    }


def kernels(rounds: int, seed: int) -> Table:
    """Single operators against their parts, ONNX Runtime's own fusions switched off."""
    columns = [
        *(Column("what", "what"), Column("rows", "rows", ">"), Column("width", "width", ">"), Column("way", "way")),
        *(Column("ratio", "ratio", ".3f"), Column("cpu_ratio", "CPU ratio", ".3f"), Column("verdict", "verdict")),
    ]
    table = Table("Single operators against their parts, ONNX Runtime's CPU provider, 1 thread", columns)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="graphopt-kernels-") as folder:
        for rows, width in ((17, 64), (64, 128), (64, 384), (128, 768)):
            feeds = {name: rng.standard_normal((1, rows, width)).astype(np.float32) for name in ("x", "r")}
            for what, ways in kernel_contests(width).items():
                calls: dict[str, Callable[[], object]] = {}
                for way, nodes in ways.items():
                    path = _one_kernel(Path(folder) / f"{len(calls)}.onnx", nodes, width, rng)
                    opened = session(path, 1, optimized=False)
                    wanted = {i.name for i in opened.get_inputs()}
                    fed = {name: array for name, array in feeds.items() if name in wanted}
                    calls[way] = lambda opened=opened, fed=fed: opened.run(None, fed)  # type: ignore[misc]
                timings = contest(calls, rounds=rounds, seed=seed, title=f"{what}, {rows} x {width}")
                first = next(iter(calls))
                for way in [*calls][1:]:
                    found = timings.compare(first, way)
                    table.add(
                        what=what, rows=str(rows), width=str(width), way=f"{way} / {first}", ratio=found.ratio,
                        cpu_ratio=found.cpu_ratio, verdict=found.verdict,
                    )  # fmt: skip
    return table


def _one_kernel(path: Path, nodes: Sequence[onnx.NodeProto], width: int, rng: np.random.Generator) -> Path:
    constants: Arrays = {name: rng.standard_normal(width).astype(np.float32) for name in ("c", "g", "b")}
    numbers = {"root": math.sqrt(2), "one": 1, "half": 0.5, "zero": 0, "three": 3, "six": 6}
    constants |= {name: np.array(value, np.float32) for name, value in numbers.items()}
    constants |= {f"axis {axis}": np.array([axis]) for axis in (1, 2)}
    square = {name: rng.standard_normal((width, width)).astype(np.float32) for name in ("w", "v", "u")}
    constants |= square | {"wide": np.concatenate([*square.values()], axis=1), "parts": np.array([width] * 3)}
    used = {name for node in nodes for name in node.input}
    info = onnx.helper.make_tensor_value_info
    inputs = [info(name, 1, ["b", "s", width]) for name in ("x", "r") if name in used]
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used]
    made = [name for node in nodes for name in node.output if not any(name in other.input for other in nodes)]
    outputs = [info(name, 1, ["b", "s", width]) for name in made]
    graph = onnx.helper.make_graph(nodes, "kernel", inputs, outputs, weights)
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def main(
    graphs: Patterns = "*",
    folder: GraphsFolder = None,
    data: DataFolder = None,
    models: Annotated[
        Path | None,
        typer.Option(
            "--models", metavar="FOLDER", help="All .onnx files there instead, each with inputs in a .npz of its name."
        ),
    ] = None,
    passes: Annotated[str, typer.Option("--passes", "-p", metavar="PIPELINE", help="What graphopt runs.")] = "O3",
    threads: Annotated[str, typer.Option("--threads", metavar="N[,N]", help="Intra-op threads, as '1,2'.")] = "1,2",
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Also ONNX Runtime's transformers optimizer, which needs torch.")
    ] = False,
    python: Annotated[
        str | None, typer.Option("--python", help=f"Its interpreter; default ${PEERS_VARIABLE}, else this one.")
    ] = None,
    where: Annotated[bool, typer.Option("--profile", help="Time by operator, before and after, instead.")] = False,
    only_kernels: Annotated[bool, typer.Option("--kernels", help="Single operators against their parts.")] = False,
    rounds: Rounds = 31,
    seed: Seed = 0,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    try:
        counts = [int(count) for count in threads.split(",")]
    except ValueError:
        raise UsageError(f"--threads takes numbers, as in '1,2', not {threads!r}") from None
    if only_kernels:
        publish(kernels(rounds, seed), markdown=markdown, json_file=json_file)
        return
    home = models or catalogue.graphs_folder(folder)
    known = (
        [catalogue.Graph(p.stem, p) for p in sorted(home.glob("*.onnx"))] if models else catalogue.catalogue(home, data)
    )
    found = [g for g in known if catalogue.matches(g.name, graphs) and g.path.exists()]
    chosen = [g for g in found if len(found) == 1 or g.path.stat().st_size < _LARGEST]
    if not chosen:
        raise UsageError(f"no graph in {str(home)!r} fits {graphs!r}; make them with python -m benchmarks.graphs")
    if where:
        publish(profiles(chosen, passes, 10 * rounds, seed), markdown=markdown, json_file=json_file)
        return
    interpreter = (python or os.environ.get(PEERS_VARIABLE) or sys.executable) if transformers else None
    table = latencies(chosen, counts, passes, interpreter, rounds, seed)
    publish(table, markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
