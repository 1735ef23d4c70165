"""`graphopt inspect`: what a model or a bundle holds."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    ModelFile,
    load,
)
from graphopt.commands.terminal import bundle_table, out
from graphopt.errors import UserError


def inspect(
    model: ModelFile,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Also try what constant folding removes: seconds for large models.")
    ] = True,
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
            out.print(_rewrites_table(bundle.manifest))
        damaged = bundle.damaged()
        if damaged:
            raise UserError(f"{model!r} is damaged: {', '.join(damaged)} differ from the manifest; build it again")
        return
    from graphopt.report import folding, summary

    loaded = load(model)
    facts = summary(loaded)
    if fold:
        facts["folding"] = folding(loaded)
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
    folded = facts.get("folding", {})
    removed = folded.get("removed", {})
    operators = Table("operator", "count", *(["after folding"] if removed else []))
    for op, count in facts["operators"].items():
        left = [str(count - removed.get(op, 0))] if removed else []
        operators.add_row(escape(op), str(count), *left)
    out.print(operators)
    if "error" in folded:
        out.print(f"folding was not possible: {folded['error']}", markup=False)
    elif folded:
        out.print(
            f"constant folding removes {facts['nodes'] - folded['nodes']:,} of {facts['nodes']:,} nodes"
            f" and leaves {folded['weight_bytes']:,} bytes of weights"
            if removed
            else "nothing is left to fold",
            markup=False,
        )


def _rewrites_table(manifest: Any) -> Table:
    """How often each pass rewrote something in each variant of a bundle, in the order in which passes first ran."""
    variants = manifest["variants"]
    counts = [Counter[str]() for _ in variants]
    for counted, variant in zip(counts, variants, strict=True):
        for step in variant["passes"]:
            counted[step["name"]] += step["rewrites"]
    table = Table("pass", *(escape(f"rewrites for {v['target']}") for v in variants))
    for name in dict.fromkeys(step["name"] for v in variants for step in v["passes"]):
        if any(counted[name] for counted in counts):
            table.add_row(escape(name), *(str(counted[name]) for counted in counts))
    return table
