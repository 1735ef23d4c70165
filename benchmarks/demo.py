"""The main job, shown: two real networks become a TensorRT engine for SM89 and an ONNX Runtime model each.

    make demo

The networks are a digits ResNet from models/ and ResNet-50's topology from the onnx package (weights are constants there, so
its outputs are not a classifier's, but its graph is real). The engines are built by TensorRT for RTX, without a GPU;
where it is not installed (it exists for Linux on x86-64) the demo says so and builds for ONNX Runtime alone.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt import models
from graphopt.discovery import backend_for

OUT = Path("demo-out")


def main() -> None:
    """Build both bundles into demo-out/ and print the table."""
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    networks = {
        "digits-resnet": Path(__file__).parent.parent / "models" / "resnet.legacy.onnx",
        "light-resnet50": light / "light_resnet50.onnx",
    }
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    targets = ["ort:cpu"]
    reason = backend_for("tensorrt-rtx")[1].availability("tensorrt-rtx").build
    if reason is None:
        targets.insert(0, "tensorrt-rtx:sm89")
    else:
        console.print(f"no engines: {reason}", markup=False)

    table = Table("network", "target", "nodes", "MB", "max abs diff", "latency", "kernels", title="graphopt demo")
    for name, path in networks.items():
        console.print(f"building {name} from {path.name} ({path.stat().st_size / 1e6:.2f} MB) ...")
        bundle = graphopt.build(
            path, OUT / name, targets, measure=True, say=lambda text: console.print(f"  {text}", markup=False)
        )
        for variant in bundle.manifest["variants"]:
            latency = variant.get("latency")
            table.add_row(
                name,
                variant["target"],
                f"{variant['nodes']['before']} -> {variant['nodes']['after']}",
                f"{sum(f['bytes'] for f in variant['files']) / 1e6:.2f}",
                f"{variant['proof']['max_abs']:.2g}",
                f"x{latency['ratio']:.2f}, {latency['verdict']}" if latency else "needs a GPU",
                str(len(variant["kernels"])) if variant["kernels"] else "-",
            )
    console.print(table)
    console.print("max abs diff: optimized against original ONNX, both as written, on the CPU.")
    console.print("latency: ONNX Runtime on this machine, optimized over original; below 1 is faster.")
    session = graphopt.open(OUT / "digits-resnet")
    digits = models.digits()
    predicted = session.run({"x": digits["x_test"]})["y"].argmax(axis=1)
    correct = int((predicted == digits["y_test"]).sum())
    served = session.variant.target if session.variant else "onnxruntime"
    console.print(
        f"graphopt.open('{OUT}/digits-resnet') runs {served} here: {correct} of {len(predicted)} test digits right."
    )


if __name__ == "__main__":
    main()
