"""What the commands print on: tables and data to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.backend import Progress
    from graphopt.target import Target

_WIDTH = 140  # columns of tables that go to a file or pipe
_LONGEST = 4000  # characters of an error, which may name what a model calls its tensors
# What drives a terminal or turns its text round: C0 without tab and newline, DEL, C1, bidirectional controls, line separators.
_CONTROLS = (
    *range(9),
    *range(11, 32),
    *range(127, 160),
    0x61C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
)
_VISIBLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS}


def harmless(text: str) -> str:
    """`text` with control characters spelled out: names in a model are a stranger's, and a terminal obeys escape codes."""
    return text.translate(_VISIBLE)


class _Terminal(Console):
    """A console that shows control characters in what it is given, and obeys none."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless(text), **options)


out = _Terminal(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
err = _Terminal(stderr=True, highlight=False, emoji=False, width=None if sys.stderr.isatty() else _WIDTH)


class HarmlessFormatter(logging.Formatter):
    """For log records, which name nodes and tensors too."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text without control characters."""
        return harmless(super().format(record))


def complain(error: GraphoptError) -> None:
    """Tell of an error, and of what was noted on it."""
    text = str(error)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    err.print(f"error: {text}", markup=False, soft_wrap=True)
    for note in getattr(error, "__notes__", ()):
        err.print(note, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Tell something that the user should hear; on stderr."""
    err.print(f"note: {text}", markup=False, soft_wrap=True)


def mute_stdout() -> None:
    """Let nothing that is still buffered fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_stdout(data: bytes) -> None:
    """Write bytes that are the result of a command; on a terminal, without control characters."""
    if sys.stdout.isatty():
        data = harmless(data.decode(errors="replace")).encode()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """Gives a function Target -> progress callback; the bar shows on a terminal only."""
    if not err.is_terminal:
        yield lambda target: lambda phase, share: True
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[target]}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:

        def for_target(target: Target) -> Progress:
            task = bar.add_task("starting", total=1.0, target=str(target))

            def update(phase: str, share: float) -> bool:
                bar.update(task, completed=share, description=escape(harmless(phase)))
                return True

            return update  # type: ignore[return-value]  # our Progress, not Rich's

        yield for_target


@contextlib.contextmanager
def watched(data: Any) -> Iterator[None]:
    """A bar of the samples that calibration has seen, while they are read; on a terminal only. `data` may be None."""
    if data is None:
        yield
        return
    with stages("calibration") as bar:
        data.watch = lambda done, total: bar(f"{done} samples", done, total or max(2 * done, 1))
        try:
            yield
        finally:
            data.watch = None


@contextlib.contextmanager
def stages(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function of stage, steps done and steps in all; a bar shows from its first call on, on a terminal only."""
    with progress_bar() as bar:
        started: list[Any] = []

        def update(stage: str, done: int, total: int) -> None:
            if not started:
                started.append(bar(title))
            started[0](stage, done / total)

        yield update


def bundle_table(manifest: Any, title: str) -> Table:
    """The variants of a bundle as a Rich table."""
    table = Table(title=escape(title), title_justify="left")
    for heading in ("target", "file"):
        table.add_column(heading, overflow="fold")
    for heading in ("MB", "nodes", "max abs diff", "latency", "kernels"):
        table.add_column(heading, justify="right")
    for variant in manifest["variants"]:
        proof, latency = variant["proof"], variant.get("latency")
        table.add_row(
            variant["target"],
            ", ".join(f["name"] for f in variant["files"]),
            f"{sum(f['bytes'] for f in variant['files']) / 1e6:.2f}",
            f"{variant['nodes']['before']} -> {variant['nodes']['after']}",
            "not proven" if "unproven" in proof else f"{proof['max_abs']:.2g}",
            f"x{latency['ratio']:.2f} ({latency['verdict']})" if latency else "-",
            str(len(variant["kernels"])) if variant["kernels"] else "-",
        )
    return table
