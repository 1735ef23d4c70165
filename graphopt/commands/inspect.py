"""`graphopt inspect`: what a model or a bundle holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    ModelFile,
    load,
)
from graphopt.commands.terminal import bundle_table, out
from graphopt.errors import UserError

if TYPE_CHECKING:
    pass


def inspect(
    model: ModelFile,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a model or a bundle holds."""
    if model != "-" and Path(model).is_dir():
        from graphopt.bundle import Bundle

        bundle = Bundle.load(model)
        if as_json:
            print(json.dumps(bundle.manifest, indent=2, ensure_ascii=sys.stdout.isatty()))
        else:
            out.print(bundle_table(bundle.manifest, model))
        damaged = bundle.damaged()
        if damaged:
            raise UserError(f"{model!r} is damaged: {', '.join(damaged)} differ from the manifest; build it again")
        return
    from graphopt.report import summary

    facts = summary(load(model))
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=sys.stdout.isatty()))
        return
    table = Table(show_header=False, title=escape(model), title_justify="left")
    for key in (
        "producer",
        "ir_version",
        "opsets",
        "nodes",
        "parameters",
        "macs",
        "weight_bytes",
        "dynamic_dims",
        "functions",
    ):
        value = facts[key]
        shown = ", ".join(f"{k or 'ai.onnx'} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        shown = (
            ", ".join(shown) or "none" if isinstance(shown, list) else f"{shown:,}" if isinstance(shown, int) else shown
        )
        table.add_row(key.replace("_", " "), escape(str(shown)))
    for kind in ("inputs", "outputs"):
        for spec in facts[kind]:
            table.add_row(kind[:-1], escape(spec["text"]))
    out.print(table)
    operators = Table("operator", "count")
    for op, count in facts["operators"].items():
        operators.add_row(op, str(count))
    out.print(operators)
