"""Is the harness honest? The same work twice must show no difference, twice the work must show a ratio of 2.

A is a row of numpy work, "A again" the same work in another closure, "2 x A" does it twice. The second table does the
same with processes, where "100 MB" holds that much memory more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import (
    JsonFile,
    MarkdownFile,
    PeerRun,
    Rounds,
    Seed,
    Table,
    contest,
    peer_contest,
    peer_process,
    publish,
    script,
    timings_table,
)
from graphopt.errors import UserError

START = "pass"
HOLD = "block = b'x' * 100_000_000"


def work(times: int) -> Callable[[], None]:
    """A closure that computes the same row of tangents `times` times: one thread, about 0.1 ms each."""
    row = np.linspace(-3, 3, 10_000)

    def call() -> None:
        for _ in range(times):
            np.tanh(row)

    return call


def processes(rounds: int, seed: int) -> Table:
    """The A/A and the memory contest between processes."""

    def peer(snippet: str) -> Callable[[], PeerRun]:
        return lambda: peer_process(snippet, Path(sys.executable), timeout=60)

    peers = {"start": peer(START), "start again": peer(START), "start + 100 MB": peer(HOLD)}
    timings, runs = peer_contest(peers, rounds=rounds, seed=seed, title="processes")
    if timings is None:
        raise UserError(f"no process ran: {runs['start'][-1].failure}")
    peaks = {name: max(run.cost.peak_mb for run in done if run.cost) for name, done in runs.items()}
    return timings_table("Processes: python start-up twice, and with 100 MB held", timings, peak_mb=peaks)


def main(rounds: Rounds = 31, seed: Seed = 0, markdown: MarkdownFile = None, json_file: JsonFile = None) -> None:
    timings = contest({"A": work(1), "A again": work(1), "2 x A": work(2)}, rounds=rounds, seed=seed, title="calls")
    calls = timings_table("Calls: the same work twice, and twice the work", timings)
    publish(calls, processes(rounds, seed), markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
