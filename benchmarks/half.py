"""What float16 and bfloat16 cost in accuracy: the answers of networks with every rounding of the half model emulated.

    python -m benchmarks.half
    python -m benchmarks.half --data /data/graphopt --markdown half.md

Every model is ``default,cast-float{dtype=...}``; its results are rounded to the type behind each operator (`graphopt.emulation`), as a GPU
does, so no GPU is asked for. `islands` are the operators that stay float32, `dB` the SQNR of the logits against the float32 model.
"""

from __future__ import annotations

from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer

from benchmarks.harness import Column, DataFolder, JsonFile, MarkdownFile, Table, data_folder, publish, script
from benchmarks.int8 import networks
from graphopt.emulation import in_float32
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.int8 import sqnr
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline

Array = np.ndarray[Any, Any]


def main(
    data: DataFolder = None,
    only: Annotated[str, typer.Option(help="Part of a network's name.")] = "",
    images: Annotated[int, typer.Option(min=1, help="Test images, at most.")] = 2000,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate the networks and print the table."""
    table = Table(
        "Half precision, emulated",
        [
            Column("network", "network"),
            Column("dtype", "type"),
            Column("top1", "top-1 %", ".1f"),
            Column("agreement", "agreement %", ".1f"),
            Column("db", "dB", ".1f"),
            Column("casts", "casts", "d"),
            Column("islands", "islands", "d"),
            Column("megabytes", "weights MB", ".2f"),
        ],
        note="agreement: share of images with the answer of the float32 model; dB: SQNR of the logits against it.",
    )
    for network in networks(None if data is None else data_folder(data), None):
        if only not in network.name or network.labels is None:
            continue
        x, y = network.images[:images], network.labels[:images]
        reference: Array | None = None
        for dtype in ("float32", "float16", "bfloat16"):
            text = "default" if dtype == "float32" else f"default,cast-float{{dtype={dtype}}}"
            result = Pipeline.parse(text).run(network.model, Context(evaluate=evaluate_node))
            half = np.dtype(getattr(ml_dtypes, dtype, dtype))
            runnable = result.model if dtype == "float32" else in_float32(result.model, half)
            evaluator = Evaluator(runnable)
            parts = [
                next(iter(evaluator.run({runnable.inputs[0].name: x[i : i + 200]}).values()))
                for i in range(0, len(x), 200)
            ]
            logits = np.concatenate(parts)
            reference = logits if reference is None else reference
            told = [str(r) for r in result.remarks if r.pass_name == "cast-float" and "stay float32" in r.text]
            numbers = [int(word) for word in told[-1].replace(",", "").split() if word.isdigit()] if told else [0, 0, 0]
            table.add(
                network=network.name,
                dtype=dtype,
                top1=100 * float(np.mean(logits.argmax(1) == y)),
                agreement=100 * float(np.mean(logits.argmax(1) == reference.argmax(1))),
                db=None if dtype == "float32" else sqnr([reference], [logits]),
                casts=sum(n.op == "Cast" for n in result.model.nodes()),
                islands=numbers[1],
                megabytes=result.model.nbytes / 1e6,
            )
    publish(table, markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
