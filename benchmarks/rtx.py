"""Engines of TensorRT for RTX, built ahead of time without a GPU: kernels, seconds and size, of the original graph and of ours, in float32 and float16.

    python -m benchmarks.rtx
    python -m benchmarks.rtx --folder /data/graphs --only densenet121,vit --target tensorrt-rtx:sm89 --markdown rtx.md

Each engine is built in a process of its own, `original` (the file as it is), `O3` (``default``), `original half` (``cast-float`` alone) and `O3 half`
(``default,cast-float``) right after one another, so that the machine's mood is shared. `half` counts kernels that read, hold or write half
values. Seconds are those of the build call alone (the parse and TensorRT's compilation), the least of ``--rounds``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from benchmarks.graphs import Sample, catalogue, graphs_folder, make, matches
from benchmarks.harness import Column, JsonFile, MarkdownFile, Table, publish, script
from graphopt import ir, models

WAYS: Final = {"original": "", "O3": "default", "original half": "cast-float", "O3 half": "default,cast-float"}
DEFAULT: Final = "light_densenet121,mat_densenet121,mat_resnet50,encoder_*,vit_*,mbv_*,unet_*,digits *"

BUILD: Final = """
import json, sys, tempfile
from pathlib import Path
from graphopt import ir
from graphopt.backend import BuildOptions, ShapeRange
from graphopt.discovery import backend_for
from graphopt.evaluate import evaluate_node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.target import Target

path, text, wanted, ranges = sys.argv[1:]
target = Target.parse(wanted)
model = ir.load(path)
options = BuildOptions(shapes=dict(ShapeRange.parse(r) for r in json.loads(ranges)))
result = Pipeline.parse(text).run(model, Context(target=target, evaluate=evaluate_node))
_, backend = backend_for(target.runtime)
with tempfile.TemporaryDirectory() as folder:
    artifact = backend.emit(result.model, target, Path(folder), options)
half = sum(any(t in ("Half", "BFloat16") for t in (*k.inputs, *k.constants, *k.outputs)) for k in artifact.kernels)
print(json.dumps({
    "nodes": sum(1 for _ in result.model.nodes()),
    "kernels": len(artifact.kernels),
    "half": half,
    "seconds": artifact.details["build_seconds"],
    "megabytes": artifact.details["engine_bytes"] / 1e6,
    "names": [k.name for k in artifact.kernels],
}))
"""


def ranges(path: Path, samples: Sequence[Sample]) -> list[str]:
    """What ``--shape`` would say: from the smallest to the largest of the sizes that are compared elsewhere, the first for the middle."""
    model = ir.load(path)
    found = []
    for spec in model.inputs:
        if spec.shape is None or not any(isinstance(d, str) and d in s.dims for s in samples for d in spec.shape):
            continue
        sizes = [[s.dims.get(d, 2) if isinstance(d, str) else d for d in spec.shape] for s in samples]
        texts = ["x".join(map(str, side)) for side in (map(min, *sizes), sizes[0], map(max, *sizes))]
        found.append(f"{spec.name}={':'.join(texts)}")
    return found


def build(path: Path, pipeline: str, target: str, shapes: Sequence[str], timeout: float) -> dict[str, Any]:
    """One engine, in a process of its own; ``note`` says why there is none."""
    command = [sys.executable, "-c", BUILD, str(path), pipeline, target, json.dumps(shapes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"note": f"no engine after {timeout:.0f} s"}
    if done.returncode:
        return {"note": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "failed"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(
    folder: Annotated[Path | None, typer.Option(help="Where the graphs of benchmarks.graphs are.")] = None,
    only: Annotated[str, typer.Option(help="Names of graphs, with * and ?, separated by commas.")] = DEFAULT,
    target: Annotated[str, typer.Option(help="What to build for.")] = "tensorrt-rtx:sm89",
    ways: Annotated[str, typer.Option(help="Which of the four, separated by commas.")] = ",".join(WAYS),
    rounds: Annotated[int, typer.Option(min=1, help="Builds of each; the fastest counts.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds for one build.")] = 600.0,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    """Build the engines and print the table."""
    table = Table(
        f"Engines for {target}",
        [
            Column("graph", "graph"),
            Column("way", "model"),
            Column("nodes", "nodes", "d"),
            Column("kernels", "kernels", "d"),
            Column("half", "half", "d"),
            Column("seconds", "build s", ".1f"),
            Column("megabytes", "engine MB", ".1f"),
            Column("note", "note"),
        ],
        note="half: kernels that read, hold or write half values; build s: the least of the rounds.",
    )
    files = {graph.name: graph for graph in catalogue(graphs_folder(folder))}
    nets = {f"digits {p.stem}": p for p in sorted(Path(models.__file__).parent.glob("*.onnx"))}
    for name in (n for n in [*files, *nets] if matches(n, only)):
        if name in files and not files[name].path.exists():
            make(files[name])
        path = files[name].path if name in files else nets[name]
        builds: dict[str, list[dict[str, Any]]] = {way: [] for way in ways.split(",")}
        for _ in range(rounds):
            for way, found in builds.items():
                shapes = ranges(path, files[name].samples) if name in files else []
                found.append(build(path, WAYS[way], target, shapes, timeout))
        for way, found in builds.items():
            best = min(found, key=lambda one: float(one.get("seconds", float("inf"))))
            table.add(graph=name, way=way, **{key: value for key, value in best.items() if key != "names"})
            table.extra[f"{name}, {way}"] = best.get("names", [])
    publish(table, markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
