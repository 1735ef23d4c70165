"""How much accuracy is left when channels go? Pruned by norms alone, by us without repair, and repaired; beside the peers.

    python -m benchmarks.prune                                    # the digits nets, 128 samples without labels
    python -m benchmarks.prune --data FOLDER                      # and CIFAR ResNets, 1,000 samples without labels
    python -m benchmarks.prune --data FOLDER --python PEERS --resume prune.json --figure docs/prune.svg --markdown prune.md

Every row removes the same share of parameters (digits), multiply-accumulates or time (CIFAR) three times: in the order of the L2 norms of the
weights and as they come, in our order and as they come, and in our order with the layers behind the cuts fitted to the original
on samples without labels. Labels are read to judge the result, never to make it. CIFAR's rows at 1.7x may lose residual blocks, too
(`drop_blocks`). With ``--python`` (or GRAPHOPT_PEERS_PYTHON) the peers do the same in processes of their own. Latency is that of ONNX
Runtime with all its optimizations, on one thread, for one sample and for eight, as a ratio within interleaved rounds. What is done
is kept in the file that ``--resume`` names, and not done again.
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks import prune_peers
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
from graphopt.data import Data, open_data
from graphopt.errors import UsageError
from graphopt.evaluate import Evaluator, evaluate_node, seconds
from graphopt.ir import Model
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline

Array = NDArray[Any]

_DIGITS: Final = ("resnet", "mobilenet", "concat", "vit")
_CIFAR: Final = ("resnet20", "resnet56")
_WAYS: Final = {"norms": "importance=l2,repair=false", "plain": "repair=false", "repaired": ""}

Nets = Annotated[str, typer.Option("--nets", metavar="GLOB", help="As 'digits-*', 'cifar-resnet56'.")]
Levels = Annotated[str | None, typer.Option("--levels", metavar="A,B", help="Shares to remove; default per net.")]
Figure = Annotated[Path | None, typer.Option("--figure", metavar="FILE.svg", help="Accuracy against what is left.")]


@dataclass(frozen=True)
class Level:
    """How much goes, and of what."""

    share: float  # to remove
    of: str  # macs, params or latency
    options: str = ""  # of prune-channels

    def __str__(self) -> str:
        return f"{self.share:.0%} {_TOLD[self.of]}"


_TOLD: Final = {"params": "parameters", "macs": "MACs", "latency": "time"}
_DIGITS_LEVELS: Final = (Level(0.3, "params"), Level(0.5, "params"))
_CIFAR_LEVELS: Final = (
    Level(1 - 1 / 1.3, "macs"),
    Level(1 - 1 / 1.7, "macs", "drop_blocks=true"),
    Level(0.4, "latency"),
)


@dataclass(frozen=True)
class Net:
    """A network, samples to prune with, and labelled ones to judge by."""

    name: str
    model: Model
    samples: Array
    x_test: Array
    y_test: Array
    levels: tuple[Level, ...]


def nets(pattern: str, data: Path | None) -> Iterator[Net]:
    """The networks whose names match."""
    digits = models.digits()
    for name in _DIGITS:
        if fnmatch.fnmatchcase(f"digits-{name}", pattern):
            model = ir.load(models.path(f"{name}.legacy"))
            yield Net(
                f"digits-{name}",
                model,
                digits["x_calib"],
                digits["x_test"],
                digits["y_test"],
                _DIGITS_LEVELS,
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
        yield Net(f"cifar-{name}", model, samples, x_test, y_test, _CIFAR_LEVELS)


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


def latency(net: Net, first: Model, second: Model, batch: int, rounds: int, seed: int) -> float:
    """The median ratio of wall times, second over first."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    feeds = {first.inputs[0].name: net.x_test[:batch]}
    sessions = [ort.InferenceSession(ir.saves(m), options, providers=["CPUExecutionProvider"]) for m in (first, second)]
    timings = contest(
        {"original": lambda: sessions[0].run(None, feeds), "pruned": lambda: sessions[1].run(None, feeds)},
        rounds=rounds,
        seed=seed,
        title=f"{net.name}: latency",
    )
    compared = next(row.comparison for row in timings.rows("original") if row.comparison)
    return compared.ratio


class Progress:
    """Rows that are done, in a file; without one they are forgotten."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def row(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of that key, made if it is not there."""
        if key not in self.rows:
            self.rows[key] = make()
            if self.path is not None:
                self.path.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        return self.rows[key]


def ours(
    net: Net, original: Model, samples: Data, level: Level, options: str, rounds: int, seed: int
) -> dict[str, Any]:
    """A row of our own."""
    left = level.of == "latency"  # whose ratio is the share that is left
    goal = f"ratio={1 - level.share if left else level.share!r},target={level.of}"
    cells: dict[str, Any] = {}
    pruned = original
    for way, extra in _WAYS.items():
        chosen = ",".join(filter(None, (goal, extra, level.options, options)))
        began = time.perf_counter()
        context = Context(evaluate=evaluate_node, data=samples, seed=seed, clock=seconds)
        pruned = Pipeline.parse(f"prune-channels{{{chosen}}}").run(original, context).model
        cells[f"{way}_seconds"] = time.perf_counter() - began
        cells[way] = top1(pruned, net)
    before, after, judged = costs(original), costs(pruned), top1(original, net)
    taken = cells.pop("repaired_seconds") + cells.pop("plain_seconds")  # the second finds the first one's measurements
    del cells["norms_seconds"]
    return {
        "net": net.name,
        "share": str(level),
        "macs": after[0] / before[0],
        "params": after[1] / before[1],
        "original": judged,
        "drop": judged - cells["repaired"],
        "one": latency(net, original, pruned, 1, rounds, seed),
        "eight": latency(net, original, pruned, 8, rounds, seed),
        "seconds": taken,
        **cells,
    }


def theirs(net: Net, original: Model, level: Level, peer: str, python: str) -> dict[str, Any]:
    """A row of a peer."""
    what = {original.inputs[0].name: net.samples}
    pruned, failure = prune_peers.prune(peer, original, what, level.of, 1 - level.share, python)
    cells = {"net": net.name, "share": str(level), "peer": peer}
    if pruned is None:
        return {**cells, "failure": failure}
    before, after = costs(original), costs(pruned)
    return {**cells, "macs": after[0] / before[0], "params": after[1] / before[1], "top1": top1(pruned, net)}


def main(
    nets_: Nets = "*",
    levels: Levels = None,
    options: Annotated[str, typer.Option("--options", help="Of prune-channels in all rows, as align=8.")] = "",
    rounds: Rounds = 15,
    seed: Seed = 0,
    data: DataFolder = None,
    python: Annotated[
        str | None,
        typer.Option("--python", help="The peers' interpreter; default $GRAPHOPT_PEERS_PYTHON, else no peers."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE.json", help="Rows done are kept here.")
    ] = None,
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
            *(Column("one", "latency x", ".2f"), Column("eight", "of 8 x", ".2f"), Column("seconds", "s", ".0f")),
        ],
        "Removed: share of parameters, of multiply-accumulates, or of the time of one sample. MACs, params and latency (of one sample, and of "
        "eight) are those of the repaired model over the original's; s is what pruning and repairing it took.",
    )
    peers = Table(
        "Peers on the same nets",
        [
            *(
                Column("net", "net"),
                Column("share", "removed", ">"),
                Column("peer", "peer"),
                Column("macs", "MACs x", ".2f"),
            ),
            *(Column("params", "params x", ".2f"), Column("top1", "top-1", ".2f"), Column("failure", "failure")),
        ],
        "The same share asked for; 128 samples for those that take any.",
    )
    interpreter = python or os.environ.get("GRAPHOPT_PEERS_PYTHON")
    progress = Progress(resume)
    for net in nets(nets_, data):
        original = Pipeline.parse("O2").run(net.model, Context(evaluate=evaluate_node)).model
        samples = open_data({original.inputs[0].name: net.samples}, original.inputs)
        chosen = net.levels if levels is None else [Level(share, net.levels[0].of) for share in _shares(levels)]
        for level in chosen:
            key = f"{net.name} {level.share:.4f} {level.of} {level.options} {options} {seed}"
            table.add(**progress.row(key, lambda: ours(net, original, samples, level, options, rounds, seed)))  # noqa: B023
            for peer in prune_peers.PEERS if interpreter and level.of != "latency" else ():
                key = f"{net.name} {level.share:.4f} {peer}"
                peers.add(**progress.row(key, lambda: theirs(net, original, level, peer, str(interpreter))))  # noqa: B023
    if not table.rows:
        raise UsageError(f"no net matches {nets_!r}; there are {', '.join(f'digits-{n}' for n in _DIGITS)}, cifar-*")
    if figure is not None:
        figure.write_text(svg(table.rows, peers.rows), encoding="utf-8")
    publish(*([table, peers] if peers.rows else [table]), markdown=markdown, json_file=json_file)


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--levels takes shares, as 0.3,0.5, not {text!r}") from None
    if not all(0 < share < 1 for share in found):
        raise UsageError(f"--levels takes shares between 0 and 1, not {text!r}")
    return found


def svg(rows: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]] = ()) -> str:
    """Top-1 relative to the original against what is left of it, a panel a net; peers are single dots."""
    names = list(dict.fromkeys(row["net"] for row in rows))
    colours = {"norms": "#999999", "plain": "#d98c3f", "repaired": "#2a6fb0"}
    told = {"norms": "by norms, no repair", "plain": "our order, no repair", "repaired": "our order, repaired"}
    marks = dict(
        zip(dict.fromkeys(row["peer"] for row in peers), ("#7a4fa3", "#b03a5b", "#3f8f5f", "#444444"), strict=False)
    )
    wide, high, gap, columns = 230, 170, 46, 4
    lines = -(-len(names) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {gap + min(columns, len(names)) * (wide + gap)} '
        f'{lines * (high + 76) + 76}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, name in enumerate(names):
        mine = [row for row in rows if row["net"] == name]
        left, top = gap + number % columns * (wide + gap), 34 + number // columns * (high + 76)
        key = "params" if "parameters" in str(mine[0]["share"]) else "macs"

        def at(kept: float, share: float, left: int = left, top: int = top) -> tuple[float, float]:
            return left + wide * (1 - max(0.3, kept)) / 0.7, top + high - high * min(1.05, share)

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
            dots = [at(1.0, 1.0)] + [at(row[key], row[way] / row["original"]) for row in mine]
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py in dots)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.extend(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in dots)
        for row in peers:
            if row["net"] == name and "top1" in row:
                px, py = at(row[key], row["top1"] / mine[0]["original"])
                parts.append(
                    f'<rect x="{px - 3:.1f}" y="{py - 3:.1f}" width="6" height="6" fill="{marks[row["peer"]]}"/>'
                )
    legend = [(told[way], colour) for way, colour in colours.items()] + list(marks.items())
    for number, (text, colour) in enumerate(legend):
        x, y = gap + number % 4 * 200, lines * (high + 76) + 34 + number // 4 * 18
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/><text x="{x + 10}" y="{y}">{text}</text>')
    end = lines * (high + 76) + 70
    parts.append(f'<text x="{gap}" y="{end}">top-1, per cent of the original\'s; squares are peers</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    script(main)
