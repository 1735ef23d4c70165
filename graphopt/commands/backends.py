"""`graphopt backends`: what can be built and run here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from graphopt.commands.terminal import out

if TYPE_CHECKING:
    pass


def list_backends() -> None:
    """Say what can be built and run on this machine, and why not."""
    from graphopt.discovery import backends

    table = Table("target", "backend", "version", "builds here", "runs here", "devices")
    for name, backend in backends().items():
        for runtime in backend.runtimes:
            state = backend.availability(runtime)
            table.add_row(
                runtime,
                name,
                state.version or "-",
                "yes" if state.build is None else escape(f"no: {state.build}"),
                "yes" if state.run is None else escape(f"no: {state.run}"),
                escape(", ".join(state.devices)) or "-",
            )
    out.print(table)
