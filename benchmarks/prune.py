"""How much accuracy is left when channels go? Pruned by norms alone, by us without repair, and repaired.

    python -m benchmarks.prune                                    # the digits nets, 128 samples without labels
    python -m benchmarks.prune --data FOLDER --nets 'cifar*'      # CIFAR ResNets, 1,000 samples without labels
    python -m benchmarks.prune --figure docs/prune.svg --markdown prune.md

Every row removes the same share of parameters (digits) or multiply-accumulates (CIFAR) three times: in the order of the L2 norms of the
weights and as they come, in our order and as they come, and in our order with the layers behind the cuts fitted to the original
on samples without labels. Labels are read to judge the result, never to make it. Latency is that of ONNX Runtime with all its
optimizations, on one thread, batch 8, as a ratio within interleaved rounds.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from numpy.typing import NDArray

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
    publish,
    script,
)
from graphopt import ir, models
from graphopt.analyses.channel_groups import channel_groups
from graphopt.data import open_data
from graphopt.errors import UsageError
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.ir import Model
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline

Array = NDArray[Any]

_DIGITS: Final = ("resnet", "mobilenet", "concat", "vit")
_CIFAR: Final = ("resnet20", "resnet56")
_WAYS: Final = {"norms": "importance=l2,repair=false", "plain": "repair=false", "repaired": ""}
_BATCH: Final = 8

Nets = Annotated[str, typer.Option("--nets", metavar="GLOB", help="As 'digits-*', 'cifar-resnet56'.")]
Levels = Annotated[str | None, typer.Option("--levels", metavar="A,B", help="Shares to remove; default per net.")]
Figure = Annotated[Path | None, typer.Option("--figure", metavar="FILE.svg", help="Accuracy against what is left.")]


@dataclass(frozen=True)
class Net:
    """A network, samples to prune with, and labelled ones to judge by."""

    name: str
    model: Model
    samples: Array
    x_test: Array
    y_test: Array
    target: str  # what `levels` are shares of
    levels: tuple[float, ...]


def nets(pattern: str, data: Path | None) -> Iterator[Net]:
    """The networks whose names match."""
    digits = models.digits()
    for name in _DIGITS:
        if fnmatch.fnmatchcase(f"digits-{name}", pattern):
            model = ir.load(models.path(f"{name}.legacy"))
            yield Net(
                f"digits-{name}", model, digits["x_calib"], digits["x_test"], digits["y_test"], "params", (0.3, 0.5)
            )
    wanted = [name for name in _CIFAR if fnmatch.fnmatchcase(f"cifar-{name}", pattern)]
    if not wanted:
        return
    if data is None and pattern == "*":
        return
    folder = data_folder(data)
    with np.load(folder / "cifar10_jpeg.npz") as arrays:
        samples, x_test, y_test = _cifar(arrays["x_train"][:1000]), _cifar(arrays["x_test"]), arrays["y_test"]
    for name in wanted:
        model = ir.load(folder / f"{name}_cifar10.onnx")
        yield Net(f"cifar-{name}", model, samples, x_test, y_test, "macs", (1 - 1 / 1.3, 1 - 1 / 1.7))


def _cifar(images: Array) -> Array:
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    return np.ascontiguousarray(((images.astype(np.float32) / 255 - mean) / deviation).transpose(0, 3, 1, 2))


def top1(model: Model, net: Net) -> float:
    """Accuracy on the labelled samples, in per cent."""
    evaluator, name = Evaluator(model), model.inputs[0].name
    found = [
        next(iter(evaluator.run({name: net.x_test[at : at + 128]}).values())).argmax(1)
        for at in range(0, len(net.x_test), 128)
    ]
    return float((np.concatenate(found) == net.y_test).mean() * 100)


def costs(model: Model) -> tuple[float, float]:
    """Multiply-accumulates of a sample and parameters."""
    groups = channel_groups(model)
    return groups.cost_model("macs").total(), groups.cost_model("params").total()


def latency(net: Net, first: Model, second: Model, rounds: int, seed: int) -> float:
    """The median ratio of wall times, second over first."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    feeds = {first.inputs[0].name: net.x_test[:_BATCH]}
    sessions = [ort.InferenceSession(ir.saves(m), options, providers=["CPUExecutionProvider"]) for m in (first, second)]
    timings = contest(
        {"original": lambda: sessions[0].run(None, feeds), "pruned": lambda: sessions[1].run(None, feeds)},
        rounds=rounds,
        seed=seed,
        title=f"{net.name}: latency",
    )
    compared = next(row.comparison for row in timings.rows("original") if row.comparison)
    return compared.ratio


def main(
    nets_: Nets = "*",
    levels: Levels = None,
    options: Annotated[str, typer.Option("--options", help="Of prune-channels in all rows, as align=8.")] = "",
    rounds: Rounds = 15,
    seed: Seed = 0,
    data: DataFolder = None,
    figure: Figure = None,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    table = Table(
        "Channels removed without training: top-1 in per cent",
        [
            *(Column("net", "net"), Column("share", "removed", ">"), Column("macs", "MACs x", ".2f")),
            *(Column("params", "params x", ".2f"), Column("original", "original", ".2f")),
            *(Column("norms", "by norms", ".2f"), Column("plain", "no repair", ".2f")),
            *(Column("repaired", "repaired", ".2f"), Column("drop", "drop", ".2f")),
            *(Column("latency", "latency x", ".2f"), Column("seconds", "s", ".0f")),
        ],
        "Removed: share of parameters (digits) or multiply-accumulates (CIFAR). MACs, params and latency are those of the "
        "repaired model over the original's; s is what pruning and repairing it took.",
    )
    for net in nets(nets_, data):
        original = Pipeline.parse("O2").run(net.model, Context(evaluate=evaluate_node)).model
        samples = open_data({original.inputs[0].name: net.samples}, original.inputs)
        before, judged = costs(original), top1(original, net)
        shares = net.levels if levels is None else _shares(levels)
        for share in shares:
            cells: dict[str, Any] = {}
            pruned = original
            for way, extra in _WAYS.items():
                chosen = ",".join(filter(None, (f"ratio={share!r}", f"target={net.target}", extra, options)))
                began = time.perf_counter()
                context = Context(evaluate=evaluate_node, data=samples, seed=seed)
                pruned = Pipeline.parse(f"prune-channels{{{chosen}}}").run(original, context).model
                cells["seconds"] = time.perf_counter() - began
                cells[way] = top1(pruned, net)
            after = costs(pruned)
            table.add(
                net=net.name,
                share=f"{share:.0%} {'parameters' if net.target == 'params' else 'MACs'}",
                macs=after[0] / before[0],
                params=after[1] / before[1],
                original=judged,
                drop=judged - cells["repaired"],
                latency=latency(net, original, pruned, rounds, seed),
                **cells,
            )
    if not table.rows:
        raise UsageError(f"no net matches {nets_!r}; there are {', '.join(f'digits-{n}' for n in _DIGITS)}, cifar-*")
    if figure is not None:
        figure.write_text(svg(table.rows), encoding="utf-8")
    publish(table, markdown=markdown, json_file=json_file)


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--levels takes shares, as 0.3,0.5, not {text!r}") from None
    if not all(0 < share < 1 for share in found):
        raise UsageError(f"--levels takes shares between 0 and 1, not {text!r}")
    return found


def svg(rows: Sequence[dict[str, Any]]) -> str:
    """Top-1 relative to the original against what is left of it, a panel a net."""
    names = list(dict.fromkeys(row["net"] for row in rows))
    colours = {"norms": "#999999", "plain": "#d98c3f", "repaired": "#2a6fb0"}
    told = {"norms": "by norms, no repair", "plain": "our order, no repair", "repaired": "our order, repaired"}
    wide, high, gap = 230, 170, 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {gap + len(names) * (wide + gap)} {high + 110}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, name in enumerate(names):
        mine = [row for row in rows if row["net"] == name]
        left, top = gap + number * (wide + gap), 34
        key = "params" if "parameters" in str(mine[0]["share"]) else "macs"
        parts.append(f'<text x="{left}" y="{top - 12}" font-weight="bold">{name}</text>')
        for mark in range(0, 101, 25):
            y = top + high - high * mark / 100
            parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{mark}</text>')
        for tick in (0.4, 0.6, 0.8, 1.0):
            x = left + wide * (1 - tick) / 0.7
            parts.append(f'<text x="{x}" y="{top + high + 16}" text-anchor="middle">{tick:.1f}</text>')
        what = "parameters" if key == "params" else "MACs"
        parts.append(f'<text x="{left + wide / 2}" y="{top + high + 34}" text-anchor="middle">{what} left</text>')
        for way, colour in colours.items():
            dots = [(1.0, 100.0)] + [(row[key], 100 * row[way] / row["original"]) for row in mine]
            at = [(left + wide * (1 - kept) / 0.7, top + high - high * share / 100) for kept, share in dots]
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py in at)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.extend(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in at)
    for number, (way, colour) in enumerate(colours.items()):
        at_x = gap + number * 180
        parts.append(f'<circle cx="{at_x}" cy="{high + 92}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{at_x + 10}" y="{high + 96}">{told[way]}</text>')
    parts.append(f'<text x="{gap + 560}" y="{high + 96}">top-1, per cent of the original\'s</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    script(main)
