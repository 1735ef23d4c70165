"""`graphopt run`: a bundle or a model on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from graphopt.commands.arguments import (
    DataFile,
    Seed,
    TargetName,
    Threads,
    check_place,
    read_arrays,
)
from graphopt.commands.containment import contained
from graphopt.commands.sessions import first_run, generated, open_session
from graphopt.commands.terminal import out
from graphopt.errors import UsageError

if TYPE_CHECKING:
    pass


@contained(default=False)
def run_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or an .onnx file.")],
    data: DataFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.npz", help="Write the outputs.")
    ] = None,
    target: TargetName = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Run a bundle on this machine; without --data on generated inputs."""
    import numpy as np

    check_place(output)
    session = open_session(bundle, target, threads)
    feeds = (read_arrays(data, session.inputs) or [generated(session, seed, None)])[0]
    results = first_run(session, feeds, data is None)
    table = Table("output", "dtype", "shape", "min", "mean", "max")
    for name, value in results.items():
        if not isinstance(value, np.ndarray | np.generic):
            table.add_row(
                escape(name), type(value).__name__, "-" if value is None else f"{len(value)} elements", "-", "-", "-"
            )
            continue
        array = np.asarray(value)
        numeric = array.size > 0 and (array.dtype.kind in "fiu" or array.dtype.name == "bfloat16")
        figures = [f"{f(array.astype(np.float64)):.5g}" for f in (np.min, np.mean, np.max)] if numeric else ["-"] * 3
        table.add_row(escape(name), str(array.dtype), str(list(array.shape)), *figures)
    out.print(table)
    if output is not None:
        write_arrays(output, results)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz file, whatever the arrays are called; strings become fixed-width, so that no pickle is needed.

    Raises:
        UsageError: an output is no tensor.
    """
    import zipfile

    import numpy as np

    from graphopt.ir import replacing

    with replacing(path) as target, zipfile.ZipFile(target, "w") as archive:
        for name, value in arrays.items():
            if not isinstance(value, np.ndarray | np.generic):
                raise UsageError(f"output {name!r} is no tensor, and an .npz file holds tensors alone; leave out -o")
            array = np.asarray(value)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(
                    file, array.astype(str) if array.dtype == object else array, allow_pickle=False
                )
