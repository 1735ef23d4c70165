"""`graphopt verify`: is a bundle what it says, here and now?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import ReportFile, Seed, TargetName, check_place, load, not_nan, write_report
from graphopt.commands.containment import contained
from graphopt.commands.terminal import err, out
from graphopt.errors import UsageError, UserError


class NotAsItSays(UserError):
    """A bundle fails a check."""


@contained(default=False)
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="FILE", help="The original; default: looked for by its digest.")
    ] = None,
    target: TargetName = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SAMPLES", help="Samples: .npz, .npy, folder, module:callable.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE.npy", help="Class numbers of the samples: top-1 accuracy.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, callback=not_nan, metavar="X", help="Relative to the largest magnitude of an output."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0, callback=not_nan, metavar="POINTS", help="How much accuracy may be lost; default: as built."
        ),
    ] = None,
    seed: Seed = 0,
    report: ReportFile = None,
) -> None:
    """Check a bundle: files against their digests, that it loads and runs here, its numbers beside the original's.

    Ends with 1 when a check fails.
    """
    from graphopt import acceptance, int8
    from graphopt.bundle import Bundle
    from graphopt.data import open_data

    check_place(report)
    if labels is not None and data is None:
        raise UsageError("--labels belong to samples; add --data")
    if max_drop is not None and data is None:
        raise UsageError("--max-drop is of the accuracy on samples; add --data")
    opened = Bundle.load(bundle)
    path = model if model is not None else acceptance.find_original(opened, _places(bundle))
    original = None if path is None else load(str(path))
    samples = None if data is None else open_data(data, opened.inputs)
    known = None if labels is None or samples is None else int8.load_labels(labels, samples)
    checks = acceptance.check(
        opened,
        original,
        target=target,
        data=samples,
        labels=known,
        tolerance=tolerance,
        max_drop=max_drop,
        seed=seed,
    )
    table = Table("variant", "check", "result", "what was found", title=escape(f"{bundle}/"), title_justify="left")
    for each in checks:
        result = {True: "ok", False: "FAILED", None: "-"}[each.passed]
        table.add_row(escape(each.variant) or "bundle", each.what, result, escape(each.text))
    out.print(table)
    failed = [each for each in checks if each.passed is False]
    write_report(report, {"passed": not failed, "original": str(path) if path is not None else None, "checks": [c.as_dict() for c in checks]})  # fmt: skip
    if failed:
        told = "; ".join(f"{c.variant or 'bundle'}: {c.what}: {c.text}" for c in failed[:3])
        raise NotAsItSays(f"{str(bundle)!r} fails {len(failed)} of {len(checks)} checks: {told}")
    if original is None:
        err.print(
            "note: the original model is not here, so numbers were not compared; name it with --model", markup=False
        )


def _places(bundle: Path) -> Sequence[Path]:
    """Where the original of a bundle may lie: where the recipe here says, here, and around the bundle."""
    from graphopt import recipe

    named: list[Path] = []
    file = Path(recipe.RECIPE)
    if file.is_file():
        builds = recipe.load(file).builds.values()
        named = [b.model for b in builds if b.output.resolve() == bundle.resolve()]
    real = bundle.resolve()
    return [*named, Path(), *list(real.parents)[:2], Path("models")]
