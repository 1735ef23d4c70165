"""Opening what `graphopt run` and `graphopt bench` run, and inputs for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.commands.terminal import say
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.backend import BuildOptions, ShapeRange
    from graphopt.bundle import BundleSession


def open_session(path: Path, target: str | None, threads: int | None, spinning: bool = True) -> BundleSession:
    """Open a bundle or a model, saying which variants were passed over."""
    from graphopt import bundle
    from graphopt.backend import BuildOptions

    options: BuildOptions = BuildOptions(threads=threads, spinning=spinning)
    session = bundle.open(path, target, options)
    for reason in session.skipped:
        say(f"passed over {reason}")
    return session


def generated(session: BundleSession, seed: int, ranges: dict[str, ShapeRange] | None) -> dict[str, Any]:
    """Seeded inputs for a session, of the shapes it is tuned for."""
    from graphopt import equivalence
    from graphopt.backend import takes_values
    from graphopt.building import value_array
    from graphopt.ir import TensorSpec

    variant = session.variant
    known = {**(variant.shapes if variant else {}), **(ranges or {})}
    values = {s.name: s for s in session.inputs if s.name in known and takes_values(s, known[s.name])}
    shapes = {name: wanted.opt for name, wanted in known.items() if name not in values}
    specs = [TensorSpec(s.name, s.dtype, shapes.get(s.name, s.shape)) for s in session.inputs]
    feeds = equivalence.generate_inputs(specs, seed=seed)
    return feeds | {name: value_array(spec, known[name].opt) for name, spec in values.items()}


def first_run(session: BundleSession, feeds: Mapping[str, Any], generated: bool) -> dict[str, Any]:
    """Run once, so that inputs that do not fit are told before any timing."""
    try:
        return session.run(feeds)
    except UsageError as error:
        if generated:
            raise UsageError(f"{error}; these inputs were generated, give others with --data FILE.npz") from None
        raise
