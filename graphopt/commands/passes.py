"""`graphopt passes`: what there is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.terminal import out

if TYPE_CHECKING:
    pass


def passes(name: Annotated[str | None, typer.Argument(metavar="NAME", help="A pass, or a preset.")] = None) -> None:
    """List the passes, or explain one."""
    import inspect

    from graphopt.discovery import find_pass, pass_modules
    from graphopt.pipeline import PRESETS, Pipeline, value_text

    if name is None:
        table = Table("pass", "class", "what it does", title="passes", title_justify="left")
        for known in pass_modules():
            kind = find_pass(known)
            table.add_row(known, kind.exactness.value, escape(kind.summary()))
        out.print(table)
        presets = Table("preset", "passes", title="presets", title_justify="left")
        for preset in PRESETS:
            presets.add_row(preset, escape(str(Pipeline.parse(preset)) or "none"))
        out.print(presets)
        out.print("class: A exact, bitwise; B floating-point re-association; C approximate")
        return
    if name in PRESETS:
        out.print(str(Pipeline.parse(name)), markup=False, soft_wrap=True)
        return
    kind = find_pass(name)
    out.print(f"{name}: {inspect.cleandoc(kind.__doc__ or '')}\n", markup=False, soft_wrap=True)
    options = dataclasses.fields(kind)
    if options:
        table = Table("option", "type", "default", title="options", title_justify="left")
        for option in options:
            kind_text = (
                option.type if isinstance(option.type, str) else getattr(option.type, "__name__", str(option.type))
            )
            table.add_row(option.name.replace("_", "-"), escape(str(kind_text)), escape(value_text(option.default)))
        out.print(table)
