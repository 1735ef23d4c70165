"""Charts as SVG text for a page, drawn by matplotlib: letters stay letters, and colours are CSS variables of the page.

matplotlib writes colours as ``#rrggbb``. The ones used here stand for variables and are replaced by them in the text, so that one chart
serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

_WIDTH: Final = 7.2  # inches
_INK, _SOFT, _FIRST, _SECOND, _WARN, _PAGE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES: Final = {
    _INK: "--ink",
    _SOFT: "--soft",
    _FIRST: "--first",
    _SECOND: "--second",
    _WARN: "--warn",
    _PAGE: "--page",
}
_STYLE: Final = {
    "svg.fonttype": "none",  # text, not outlines: small, selectable, in the page's font
    "svg.hashsalt": "graphopt",  # ids that are the same for the same chart
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _SOFT,
    "grid.linewidth": 0.4,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def _chart(height: float) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; the list holds the SVG afterwards."""
    from matplotlib import style
    from matplotlib.figure import Figure

    done: list[str] = []
    with style.context(["default", _STYLE]), warnings.catch_warnings():  # whatever the user's matplotlibrc says
        warnings.simplefilter("ignore")  # letters that matplotlib's own font lacks: the page's font decides
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        yield axes, done
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg )height="[^"]*" ', r"\1\2", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart of a page
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    done.append(svg)


def bars(rows: Sequence[tuple[str, float, str]], unit: str) -> str:
    """Horizontal bars from the top: label, length, and what is written at its end."""
    with _chart(0.5 + 0.22 * max(len(rows), 1)) as (axes, done):
        places = np.arange(len(rows))[::-1]
        axes.barh(places, [r[1] for r in rows], color=_FIRST, height=0.7)
        axes.set_yticks(places, [r[0] for r in rows], parse_math=False)
        for place, (_, length, note) in zip(places, rows, strict=True):
            axes.annotate(note, (length, place), (4, 0), textcoords="offset points", va="center", parse_math=False)
        axes.margins(x=0.18, y=0.02)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
    return done[0]


def pairs(rows: Sequence[tuple[str, float, float]], unit: str) -> str:
    """Before and after side by side, for each label."""
    with _chart(0.7 + 0.34 * max(len(rows), 1)) as (axes, done):
        places = np.arange(len(rows))[::-1]
        for shift, column, colour, label in ((0.19, 1, _SECOND, "before"), (-0.19, 2, _FIRST, "after")):
            values = [float(r[column]) for r in rows]
            axes.barh(places + shift, values, color=colour, height=0.36, label=label)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    f"{value:.4g}", (value, place + shift), (4, 0), textcoords="offset points", va="center", size=8
                )
        axes.set_yticks(places, [r[0] for r in rows], parse_math=False)
        axes.margins(x=0.12, y=0.02)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.legend(frameon=False, loc="lower right")
    return done[0]


def errors(values: Sequence[float], tolerance: float | None, wrong: bool) -> str:
    """Relative error of each layer on a logarithmic axis; what is 0 stands at the foot, what has no number at the top.

    What exceeds `tolerance` stands out as `wrong` where it is, and otherwise in the second colour.
    """
    finite = [min(max(v, 1e-30), 1e30) for v in [*values, tolerance or 1e-7] if 0 < v < math.inf]
    low, high = 10.0 ** math.floor(math.log10(min(finite)) - 1), 10.0 ** math.ceil(math.log10(max(finite)) + 1)
    with _chart(2.4) as (axes, done):
        places = np.arange(len(values))
        shown = np.array([high if not math.isfinite(v) else min(max(v, low), high) for v in values], float)
        beyond = np.array([tolerance is not None and v > tolerance for v in values], bool)
        axes.set_yscale("log")
        axes.vlines(places, low, shown, color=_SOFT, linewidth=0.6)
        for chosen, colour in ((~beyond, _FIRST), (beyond, _WARN if wrong else _SECOND)):
            axes.plot(places[chosen], shown[chosen], "o", color=colour, markersize=3)
        if tolerance:
            axes.axhline(tolerance, color=_WARN, linewidth=1, linestyle="--")
            axes.annotate("tolerance", (0, tolerance), (2, 3), textcoords="offset points", size=8)
        axes.set_ylim(low, high)
        axes.set_xlabel("layer, in topological order")
        axes.set_ylabel("relative error")
        axes.grid(axis="y")
    return done[0]


def decibels(values: Sequence[float]) -> str:
    """Signal to noise of each layer in dB; equal ones are left out."""
    with _chart(2.4) as (axes, done):
        chosen = [(i, v) for i, v in enumerate(values) if math.isfinite(v)]
        axes.plot([i for i, _ in chosen], [v for _, v in chosen], "o", color=_FIRST, markersize=3)
        axes.set_xlabel("layer, in topological order")
        axes.set_ylabel("SQNR, dB")
        axes.grid(axis="y")
    return done[0]


def spread(samples: Mapping[str, Sequence[float]]) -> str:
    """All samples of each contestant as points in milliseconds over a box of quartiles."""
    with _chart(0.8 + 0.5 * len(samples)) as (axes, done):
        names = list(samples)[::-1]
        line = {"color": _INK}
        axes.boxplot(
            [np.asarray(samples[n]) * 1e3 for n in names],
            orientation="horizontal",
            showfliers=False,
            widths=0.5,
            medianprops={"color": _FIRST, "linewidth": 2},
            boxprops=line,
            whiskerprops=line,
            capprops=line,
        )
        for place, name in enumerate(names, 1):
            values = np.asarray(samples[name]) * 1e3
            offsets = 0.16 * np.sin(np.arange(len(values)) * 2.4)  # apart, and the same in every drawing
            axes.plot(values, place + offsets, "o", color=_SECOND, markersize=3, alpha=0.7)
        axes.set_yticks(range(1, len(names) + 1), names, parse_math=False)
        axes.set_xlabel("milliseconds a call")
        axes.grid(axis="x")
    return done[0]


def shares(rows: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """One stacked bar for each label: the first share in colour, the others fainter, with their counts."""
    with _chart(0.6 + 0.42 * len(rows)) as (axes, done):
        for place, (_, parts) in enumerate(reversed(rows)):
            start = 0
            for number, (name, count) in enumerate(parts.items()):
                if not count:
                    continue
                axes.barh(
                    place, count, left=start, height=0.6, color=(_FIRST, _SECOND, _WARN)[min(number, 2)], alpha=0.85
                )
                axes.annotate(
                    f"{name}: {count}",
                    (start + count / 2, place),
                    ha="center",
                    va="center",
                    size=8,
                    color=_PAGE,
                    parse_math=False,
                )
                start += count
        axes.set_yticks(range(len(rows)), [r[0] for r in reversed(rows)], parse_math=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
    return done[0]
