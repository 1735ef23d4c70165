"""`--html`: one page that shows a build: the graph before and after, the passes, the error of each layer, coverage, latency, sizes.

The page is a file of its own: no script, no address, charts and graphs inline as SVG, light or dark as the reader's system wants. What
comes from the model (names, operators, dtypes) is untrusted and escaped wherever it stands.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from graphopt import charts, drawing
from graphopt.errors import GraphoptError, UserError
from graphopt.instruments import Census, PassTime
from graphopt.ir import Model, replacing
from graphopt.layers import Layer, LayerReport, compare_layers
from graphopt.measure import Timings
from graphopt.pipeline import StepReport

Feeds = Mapping[str, Any]
_LONGEST: Final = 15  # rows of a chart
_ROWS: Final = 200  # of a table
_NEEDS: Final = ("jinja2", "matplotlib")


@dataclass(frozen=True)
class Part:
    """What one target adds to the page."""

    entry: Mapping[str, Any]  # of the manifest
    optimized: Model
    steps: Sequence[StepReport]
    times: Sequence[PassTime]
    history: Sequence[Census]
    timings: Timings | None = None  # against the original, where it was measured


def check_available() -> None:
    """Complain before the work about packages that are missing.

    Raises:
        UserError: naming the extra that brings them.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--html needs {' and '.join(missing)}, not installed here: pip install 'graphopt[report]'")


def write(
    path: Path,
    original: Model,
    manifest: Mapping[str, Any],
    parts: Sequence[Part],
    feeds: Callable[[], Sequence[Feeds]],
) -> None:
    """Write the page.

    Args:
        path: of the file.
        original: the model as it came in.
        manifest: of the bundle.
        parts: one a variant, in the manifest's order.
        feeds: gives samples for the error of each layer; may raise what `compare_layers` raises.

    Raises:
        UserError: a package is missing.
        OutputError: the file cannot be written.
    """
    check_available()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphopt", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
    )
    environment.filters["bytes"] = _bytes
    template = environment.get_template("page.html.jinja")
    text = template.render(
        manifest=manifest,
        before=_graph(original),
        parts=[_part(original, part, feeds) for part in parts],
        kinds=[*drawing.KINDS, "other"],
    )
    with replacing(path) as file:
        file.write(text.encode())


def _printable(value: Any) -> Any:
    """Text without characters that HTML cannot hold; markup made here stays as it is."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def _markup(svg: str) -> Any:
    """SVG that was made here, with its texts escaped."""
    import markupsafe

    return markupsafe.Markup(svg)


def _graph(model: Model) -> dict[str, Any]:
    blocks = drawing.draw(model.graph)
    return {
        "nodes": sum(len(b.nodes) for b in blocks),
        "blocks": [
            {
                "number": b.number,
                "count": len(b.nodes),
                "operators": b.operators[:6],
                "others": max(0, len(b.operators) - 6),
                "shares": b.shares,
                "through": b.through,
                "like": b.like,
                "svg": _markup(b.svg),
            }
            for b in blocks
        ],
    }


def _part(original: Model, part: Part, feeds: Callable[[], Sequence[Feeds]]) -> dict[str, Any]:
    entry = part.entry
    layers, refusal = _layers(original, part.optimized, feeds)
    tolerance = entry["proof"].get("tolerance")
    int8 = entry.get("int8")
    return {
        "entry": entry,
        "graph": _graph(part.optimized),
        "size": sum(f["bytes"] for f in entry["files"]),
        "operators": _markup(charts.pairs(_operators(original, part.optimized), "nodes")),
        "passes": _passes(part),
        "times": _markup(_times(part)),
        "layers": layers,
        "refusal": refusal,
        "rows": [] if layers is None else _worst(layers),
        "errors": _markup(charts.errors([x.relative for x in layers.layers], tolerance, not layers.equal))
        if layers and layers.layers
        else "",
        "decibels": _markup(charts.decibels([x.sqnr for x in layers.layers])) if layers and _quantized(part) else "",
        "coverage": _markup(charts.shares(_coverage(entry))) if _coverage(entry) else "",
        "int8_layers": [] if int8 is None else int8["layers"][:_ROWS],
        "latency": entry.get("latency"),
        "spread": _markup(charts.spread({n: part.timings.wall[n].tolist() for n in part.timings.wall}))
        if part.timings
        else "",
        "finite": math.isfinite,
    }


def _layers(original: Model, optimized: Model, feeds: Callable[[], Sequence[Feeds]]) -> tuple[LayerReport | None, str]:
    """The error of each layer, or why there is none."""
    try:
        return compare_layers(original, optimized, feeds=feeds()), ""
    except GraphoptError as error:
        return None, str(error)


def _worst(report: LayerReport) -> list[Layer]:
    """The layers with the largest errors, in order."""
    chosen = [x for x in sorted(report.layers, key=lambda x: -x.relative)[:_LONGEST] if x.relative]
    return [x for x in report.layers if x in chosen]


def _quantized(part: Part) -> bool:
    return any(n.op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") for n in part.optimized.nodes())


def _operators(before: Model, after: Model) -> list[tuple[str, float, float]]:
    """The most frequent operators, before and after."""
    old, new = (Counter(n.op for n in m.nodes()) for m in (before, after))
    names = sorted({*old, *new}, key=lambda op: (-max(old[op], new[op]), op))
    return [(name, old[name], new[name]) for name in names[:_LONGEST]]


def _passes(part: Part) -> list[dict[str, Any]]:
    """Each pass: its runs, rewrites and seconds in all, and the nodes after its last run."""
    found: dict[str, dict[str, Any]] = {}
    for step, time, state in zip(part.steps, part.times, part.history[1:], strict=True):
        row = found.setdefault(step.pass_name, {"name": step.pass_name, "runs": 0, "rewrites": 0, "seconds": 0.0})
        row["runs"] += 1
        row["rewrites"] += step.rewrites
        row["seconds"] += time.wall_seconds
        row["nodes"] = state.nodes
    return list(found.values())


def _times(part: Part) -> str:
    rows = sorted(_passes(part), key=lambda row: -row["seconds"])[:_LONGEST]
    return charts.bars([(r["name"], r["seconds"], f"{r['rewrites']} rewrites") for r in rows], "seconds")


def _coverage(entry: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """Layers in int8 and in float; kernels by the type that they read."""
    rows: list[tuple[str, dict[str, int]]] = []
    if "int8" in entry:
        layers = entry["int8"]["layers"]
        int8 = sum(layer["int8"] for layer in layers)
        rows.append(("layers", {"int8": int8, "float": len(layers) - int8}))
    if entry["kernels"]:
        kinds = Counter(
            "int8" if "Int8" in k["inputs"] else k["inputs"][0] if k["inputs"] else "none" for k in entry["kernels"]
        )
        first = {"int8": kinds.pop("int8", 0)}
        rows.append(("kernels", {**first, **dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))}))
    return rows
