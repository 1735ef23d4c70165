"""What every benchmark script shares: contests, peers in processes of their own, tables, and the facts of the machine.

A script is one function with the options below, handed to `script`, which prints users' errors without a traceback:

    def main(rounds: Rounds = 31, markdown: MarkdownFile = None, json_file: JsonFile = None) -> None:
        table = timings_table("title", contest({"ours": f, "theirs": g}, rounds=rounds))
        publish(table, markdown=markdown, json_file=json_file)

    if __name__ == "__main__":
        script(main)
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import numpy as np
import rich.box
import rich.table
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from graphopt.errors import InternalError, OutputError, UsageError, UserError
from graphopt.measure import Comparison, ProcessCost, Timings, interleave, measure_process, orders
from graphopt.target import cpu_features, cpu_name

PACKAGES: Final = (  # whose versions decide a number; those that are not installed are left out
    *("graphopt", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "tensorrt-rtx-cu13", "torch", "scikit-learn"),
    *("onnxslim", "onnxsim", "onnxscript", "onnx-ir", "onnxoptimizer", "nncf", "nvidia-modelopt", "torch-pruning"),
)
DATA_VARIABLE: Final = "GRAPHOPT_DATA"
PEERS_VARIABLE: Final = "GRAPHOPT_PEERS_PYTHON"  # the interpreter of an environment that has the peers

Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Samples of each contestant; 8 at least for a verdict.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the order of the contestants in each round.")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds after which a peer's process is killed.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help=f"Folder of the data sets; default ${DATA_VARIABLE}.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write the tables as Markdown to this file.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write tables and samples as JSON to this file.")]


def script(main: Callable[..., None]) -> NoReturn:
    """Run `main` with its command line; a user's error is one text on stderr and exit code 1, or 2 for a wrong call."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=(sys.modules[main.__module__].__doc__ or "").partition("\n\n")[0])(main)
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    sys.exit(0)


def data_folder(option: Path | None) -> Path:
    """The folder of the data sets: `option` (from ``--data``), else the environment's ``GRAPHOPT_DATA``.

    Raises:
        UsageError: neither is given, or it is no folder.
    """
    text = option or os.environ.get(DATA_VARIABLE)
    if not text:
        raise UsageError(f"this benchmark reads data sets: give their folder with --data or in {DATA_VARIABLE}")
    folder = Path(text)
    if not folder.is_dir():
        origin = "--data" if option else DATA_VARIABLE
        raise UsageError(f"{origin} names {str(folder)!r}, which is no folder")
    return folder


# Contests


def contest(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 31,
    warmup: int = 2,
    min_seconds: float = 1e-3,
    seed: int = 0,
    title: str = "measuring",
) -> Timings:
    """`graphopt.measure.interleave` with a progress bar on stderr; the bar is drawn between rounds only.

    Raises:
        UsageError: as `interleave`.
    """
    with _progress() as bar:
        task = bar.add_task(title, total=rounds)

        def advance(done: int, _: int) -> None:
            bar.update(task, completed=done, refresh=True)

        return interleave(
            contestants, rounds=rounds, warmup=warmup, min_seconds=min_seconds, seed=seed, progress=advance
        )


@dataclass(frozen=True)
class PeerRun:
    """One run of a peer: what it cost, or why it failed; a failed run may have a cost too."""

    cost: ProcessCost | None  # None when it did not start
    failure: str | None  # one line, None for success


def peer_process(
    snippet: str,
    model: Path,
    *arguments: str | Path,
    timeout: float = 600,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> PeerRun:
    """Run a peer in a Python process of its own, so that its start-up and imports count and its crash is only its own.

    `snippet` finds the model's path in ``sys.argv[1]`` and `arguments` (an output file, say) after it; paths are made
    absolute. The current folder is not on ``sys.path`` (``-P``), since this repository's folders ``models`` and
    ``passes`` would hide a peer's modules of these names. A failure or a timeout is text in the result, never raised.

    Args:
        snippet: Python source.
        model: the file that the peer works on.
        arguments: what else ``sys.argv`` holds.
        timeout: seconds until the peer is killed.
        python: the interpreter, for a peer that lives in another environment.
        env: variables set on top of this process's own.
        cwd: the working folder, for a peer that leaves files behind.
    """
    words = [str(word.absolute()) if isinstance(word, Path) else word for word in (model, *arguments)]
    try:
        cost = measure_process(
            [python, "-P", "-c", snippet, *words], env={**os.environ, **(env or {})}, cwd=cwd, timeout=timeout
        )
    except (UserError, InternalError) as error:
        return PeerRun(None, str(error))
    return PeerRun(cost, _failure(cost, timeout))


def peer_contest(
    peers: Mapping[str, Callable[[], PeerRun]],
    *,
    rounds: int = 9,
    seed: int = 0,
    title: str = "peers",
) -> tuple[Timings | None, dict[str, tuple[PeerRun, ...]]]:
    """Run every peer once a round in a seeded random order; the process version of `contest`.

    A peer that fails once is not run again. The timings hold those that never failed (None when there are none), the
    runs hold everything. There is no warm-up: run one round before and drop it where the disk's cache matters.

    Raises:
        UsageError: no peers, or no rounds.
    """
    if not peers or rounds < 1:
        raise UsageError(f"a contest needs peers and rounds; got {len(peers)} and {rounds}")
    runs: dict[str, list[PeerRun]] = {name: [] for name in peers}
    with _progress() as bar:
        task = bar.add_task(title, total=rounds * len(peers))
        for order in orders(peers, rounds=rounds, seed=seed):
            for name in order:
                if not (runs[name] and runs[name][-1].failure):
                    runs[name].append(peers[name]())
                bar.update(task, advance=1, refresh=True)
    costs = {name: [run.cost for run in done if run.cost and not run.failure] for name, done in runs.items()}
    whole = {name: done for name, done in costs.items() if len(done) == rounds}
    timings = None
    if whole:
        timings = Timings(
            wall={name: np.array([cost.wall_seconds for cost in done]) for name, done in whole.items()},
            cpu={name: np.array([cost.cpu_seconds for cost in done]) for name, done in whole.items()},
            seed=seed,
        )
    return timings, {name: tuple(done) for name, done in runs.items()}


def _failure(cost: ProcessCost, timeout: float) -> str | None:
    if cost.timed_out:
        return f"timed out after {timeout:g} s"
    if cost.exit_code < 0:
        try:
            return f"killed by {signal.Signals(-cost.exit_code).name}"
        except ValueError:  # a real-time signal has no name
            return f"killed by signal {-cost.exit_code}"
    if cost.exit_code > 0:
        lines = cost.stderr.strip().splitlines()
        return f"exit code {cost.exit_code}: {lines[-1].strip()[:200] if lines else 'no text on stderr'}"
    return None


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # no refresh thread: it would run, and burn CPU seconds, while a contestant is timed
    return Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)


# Tables


@dataclass(frozen=True)
class Column:
    """A column: the key of its cells in a row, its heading, and for numbers a format specification (right-aligned)."""

    key: str
    heading: str
    spec: str = ""


@dataclass
class Table:
    """A table that is printed with Rich, written as Markdown and dumped as JSON from the same raw cells.

    `extra` goes to the JSON file alone: samples, file hashes, whatever a table has no room for.
    """

    title: str
    columns: Sequence[Column]
    note: str = ""  # one sentence below the table: what the numbers are
    rows: list[dict[str, object]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, **cells: object) -> None:
        """Append a row; a column without a cell shows "-".

        Raises:
            KeyError: a cell belongs to no column.
        """
        unknown = cells.keys() - {column.key for column in self.columns}
        if unknown:
            raise KeyError(f"table {self.title!r} has no column {', '.join(sorted(unknown))}")
        self.rows.append(cells)

    def texts(self) -> list[list[str]]:
        """The formatted cells, row by row."""
        return [[_text(row.get(column.key), column.spec) for column in self.columns] for row in self.rows]

    def rich(self) -> rich.table.Table:
        """The table for a terminal."""
        table = rich.table.Table(title=self.title, caption=self.note or None, box=rich.box.SIMPLE, title_justify="left")
        table.caption_justify = "left"
        for column in self.columns:
            number = bool(column.spec)
            table.add_column(column.heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in self.texts():
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """The table as GitHub Markdown, with its title as a heading and its note below."""
        lines = [
            _markdown_row([column.heading for column in self.columns]),
            _markdown_row(["--:" if column.spec else "---" for column in self.columns]),
            *map(_markdown_row, self.texts()),
        ]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else []), ""])

    def as_dict(self) -> dict[str, Any]:
        """Title, note, rows with raw cells, and `extra`."""
        return {"title": self.title, "note": self.note, "rows": self.rows, "extra": self.extra}


def timings_table(
    title: str,
    timings: Timings,
    baseline: str | None = None,
    *,
    alpha: float = 0.01,
    peak_mb: Mapping[str, float] | None = None,
) -> Table:
    """A contest as a table: a row a contestant, each against `baseline` (the first unless named); samples in `extra`.

    Raises:
        UsageError: as `Timings.compare`.
    """
    rows = timings.rows(baseline, alpha=alpha)
    unit, scale = ("s", 1.0) if max(row.wall_seconds for row in rows) >= 1 else ("ms", 1e3)
    memory = [Column("peak_mb", "peak MB", ".0f")] if peak_mb else []
    columns = [
        *(Column("name", "contestant"), Column("wall", f"wall {unit}", ".4g"), Column("cpu", f"CPU {unit}", ".4g")),
        *(*memory, Column("ratio", "ratio", ".3f"), Column("interval", "interval", ">")),
        *(Column("cpu_ratio", "CPU ratio", ".3f"), Column("wins", "wins", ">"), Column("p", "p", ".2g")),
        Column("verdict", "verdict"),
    ]
    coverage = next((row.comparison.coverage for row in rows if row.comparison), 1 - alpha)
    note = (
        f"Medians of {timings.rounds} interleaved rounds, {timings.calls} call(s) a sample. Ratios are paired, to the "
        f"baseline: below 1 is faster; their interval has {coverage:.1%} confidence."
    )
    extra = {"timings": timings.as_dict(), "summaries": [row.as_dict() for row in rows]}
    table = Table(title, columns, note, extra=extra)
    for row in rows:
        cells = {"name": row.name, "wall": row.wall_seconds * scale, "cpu": row.cpu_seconds * scale}
        if peak_mb:
            cells["peak_mb"] = peak_mb.get(row.name)
        table.add(**cells, **(_compared(row.comparison) if row.comparison else {"verdict": "baseline"}))
    return table


def _compared(found: Comparison) -> dict[str, object]:
    return {
        "ratio": found.ratio,
        "interval": f"{found.interval_low:.3f} to {found.interval_high:.3f}",
        "cpu_ratio": found.cpu_ratio,
        "wins": f"{found.wins}/{found.wins + found.losses}",
        "p": found.p_value,
        "verdict": found.verdict,
    }


def publish(*tables: Table, markdown: Path | None = None, json_file: Path | None = None) -> None:
    """Print the tables on stdout with the command and the machine below, and write the files that were asked for.

    Raises:
        OutputError: a file cannot be written.
    """
    command = _command()
    facts = machine()
    console = Console(width=max(120, Console().width))  # narrower, whole columns vanish; a pipe would count as 80
    for table in tables:
        console.print(table.rich())
    console.print(Text(f"command: {command}\n" + "\n".join(f"{key}: {value}" for key, value in facts.items()), "dim"))
    if markdown is not None:
        foot = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        _write(markdown, "\n".join(table.markdown() for table in tables) + f"\n    {command}\n\n{foot}\n")
    if json_file is not None:
        whole = {"command": command, "machine": facts, "tables": [table.as_dict() for table in tables]}
        _write(json_file, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def _text(value: object, spec: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, str) else format(value, spec)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror}; name another file") from error


def _command() -> str:
    program = Path(sys.argv[0])
    start = ["python", "-m", f"benchmarks.{program.stem}"] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


# Machine


def machine() -> dict[str, str]:
    """What a reader needs to judge a number: CPU, cores, memory, system, load, and the packages' versions."""
    features = cpu_features()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "CPU": f"{cpu_name()}, {usable} of {os.cpu_count()} cores",
        "int8": ", ".join(sorted(features)) or "unknown",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB",
        "system": f"{_system()}, {platform.machine()}",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()) + " (1, 5, 15 min, after the run)",
        "packages": ", ".join(f"{name} {version}" for name, version in _versions().items()),
    }


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = ""
    return ", ".join(filter(None, [name, f"{platform.system()} {platform.release()}"]))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
