"""`graphopt explain`: what became of a node."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    Level,
    ModelFile,
    PipelineText,
    load,
    parse_pipeline,
)
from graphopt.commands.terminal import out


def explain(
    model: ModelFile,
    node: Annotated[str, typer.Argument(metavar="NODE", help="A node, or a tensor that it computes.")],
    passes: PipelineText = None,
    level: Level = None,
    target: Annotated[
        str, typer.Option("--target", "-t", metavar="TARGET", help="What to fuse for at -O3.")
    ] = "ort:cpu",
) -> None:
    """Say what became of a node, and why no pass did more."""
    from graphopt import verify
    from graphopt.explain import explain as explained
    from graphopt.target import Target

    loaded = load(model)
    verify.cycles(loaded)
    found = explained(loaded, node, parse_pipeline(passes, level, "default"), Target.parse(target))
    out.print(f"{found.node!r} ({found.op}): {found.fate}", markup=False, soft_wrap=True)
    for fact in found.facts:
        out.print(f"  {fact}", markup=False, soft_wrap=True)
    table = Table("pass", "why it did not do more")
    for finding in found.findings:
        table.add_row(finding.pass_name, escape(finding.text))
    if found.findings:
        out.print(table)
    elif found.facts:  # it is still there
        out.print(f"no pass looks at {found.op}", markup=False)
