"""`graphopt export`: a bundle in the form that a server wants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import TargetName
from graphopt.commands.terminal import out, say
from graphopt.errors import UsageError


def export(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    triton: Annotated[
        Path | None, typer.Option("--triton", metavar="DIR", help="A model repository of NVIDIA Triton.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the model there; default: as the model's file.")
    ] = None,
    target: TargetName = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch", min=0, metavar="N", help="Largest batch; default: as the shape profile says. 0: no batching."
        ),
    ] = None,
) -> None:
    """Write a bundle into a model repository of NVIDIA Triton: config.pbtxt and version 1 of each variant."""
    if triton is None:
        raise UsageError("missing option '--triton'; see graphopt export --help")
    from graphopt import triton as server
    from graphopt.bundle import Bundle

    opened = Bundle.load(bundle)
    table = Table("model", "platform", "variant", "max batch", title=escape(f"{triton}/"), title_justify="left")
    written = server.export(opened, triton, name=name, target=target, max_batch=max_batch)
    for each in written:
        for remark in each.remarks:
            say(f"{each.folder.name}: {remark}")
        table.add_row(
            escape(each.folder.name), each.platform, each.target, str(each.max_batch) if each.max_batch else "-"
        )
    left = [str(v.target) for v in opened.variants if str(v.target) not in {w.target for w in written}]
    if left and target is None:
        say(
            f"left out: {', '.join(left)}; Triton loads engines of enterprise TensorRT only (--target names one all the same)"
        )
    out.print(table)
