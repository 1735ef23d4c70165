"""`graphopt build`: models in, bundles out; what is up to date is left alone."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.commands.arguments import (
    Continue,
    Domains,
    Level,
    PipelineText,
    ReportFile,
    Shapes,
    Threads,
    check_place,
    not_nan,
    parse_pipeline,
    parse_ranges,
    write_report,
)
from graphopt.commands.containment import contained
from graphopt.commands.terminal import bundle_table, out, progress_bar, say
from graphopt.errors import OutputError, UsageError, UserError

if TYPE_CHECKING:
    from graphopt.cache import Cache, Digests
    from graphopt.recipe import Settings


class WouldChange(UserError):
    """``--locked``, and something is not up to date."""


@contained(default=True)
def build(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL | NAME...]",
            show_default=False,
            help="An .onnx or .onnxtxt file ('-' is stdin), with -o; or builds of the recipe, none for all.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="The bundle's folder.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-f", metavar="FILE", help="A recipe; default: ./graphopt.toml.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="TARGET", help="As ort:cpu or tensorrt-rtx:sm86+sm89; repeatable."),
    ] = None,
    shape: Shapes = None,
    passes: PipelineText = None,
    level: Level = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SAMPLES", help="One sample; or calibration samples: .npz, folder, module:callable."
        ),
    ] = None,
    prune: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Remove so much of the multiply-accumulates, as 0.3.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize for each target, with the samples of --data.")] = False,
    labels: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="int8: class numbers of the samples.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="int8: top1 (with labels) or agreement.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0.0, callback=not_nan, metavar="POINTS", help="int8: how much of the metric may be lost."),
    ] = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="int8: also layers that are slower in int8 here.")] = False,
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="Fail instead of building for ONNX Runtime.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the result against the original, into the manifest.")
    ] = False,
    threads: Threads = None,
    graph_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="ONNX Runtime: disabled, basic, extended, all.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=0, metavar="MIB", help="TensorRT: scratch memory in MiB.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(metavar="LEVEL", help="TensorRT: builder level, 0 to 5.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TensorRT: file to read tactics from and write them to.")
    ] = None,
    no_tf32: Annotated[bool, typer.Option("--no-tf32", help="TensorRT: full float32 in matrix products.")] = False,
    sparse_weights: Annotated[bool, typer.Option("--sparse-weights", help="TensorRT: 2:4 sparse kernels.")] = False,
    refit: Annotated[bool, typer.Option("--refit", help="TensorRT: weights can be replaced in the engine.")] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: runs in later versions.")
    ] = False,
    hardware_compatible: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="TensorRT: ampere-plus or same-compute-capability.")
    ] = None,
    allow_domain: Domains = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of generated inputs.")] = None,
    locked: Annotated[
        bool, typer.Option("--locked", help="Build nothing; fail when a bundle is not up to date.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, metavar="N", help="Build N targets at a time; 0: one a processor.")
    ] = 1,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Build anew, whatever is known or up to date.")] = False,
    depfile: Annotated[
        Path | None, typer.Option("--depfile", "-MF", metavar="FILE", help="Write what was read, for make and ninja.")
    ] = None,
    depfiles: Annotated[bool, typer.Option("-MD", help="Write it to FOLDER.d beside each bundle.")] = False,
    compare_each: Annotated[bool, typer.Option("--compare-each", help="Compare the numbers after each pass.")] = False,
    reproducer: Annotated[Path | None, typer.Option(metavar="FILE.onnx", help="Written when a pass fails.")] = None,
    continue_without_failing: Continue = False,
    report: ReportFile = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE.html", help="Build anew, and write a page that shows it.")
    ] = None,
) -> None:
    """Optimize models for each target and write bundles: engines, ONNX Runtime models and a manifest.

    Without MODEL the builds of ./graphopt.toml run; flags override its keys. A bundle that is up to date is left alone.
    """
    flags = {
        "targets": tuple(target) if target else None,
        "shapes": _shapes(shape),
        "passes": passes,
        "level": level,
        "data": data,
        "prune": prune,
        "int8": int8 or None,
        "labels": labels,
        "metric": metric,
        "max_drop": max_drop,
        "gate": False if no_gate else None,
        "fallback": False if no_fallback else None,
        "measure": measure or None,
        "threads": threads,
        "graph_level": graph_level,
        "workspace": workspace,
        "optimization_level": optimization_level,
        "timing_cache": timing_cache,
        "tf32": False if no_tf32 else None,
        "sparse_weights": sparse_weights or None,
        "refit": refit or None,
        "version_compatible": version_compatible or None,
        "hardware_compatible": hardware_compatible,
        "allow_domains": tuple(allow_domain) if allow_domain else None,
        "seed": seed,
        "continue_without_failing": continue_without_failing or None,
    }
    if passes is not None and level is not None:
        parse_pipeline(passes, level, "default")  # says that they exclude each other
    builds, read = _wanted(arguments or [], output, recipe, flags)
    for option, place in (("--report", report), ("--html", html)):
        if place is not None and len(builds) != 1:
            raise UsageError(f"{option} takes one build; name it")
        if place is not None and builds[0].output.resolve() not in place.resolve().parents:
            check_place(place)
    if html is not None:
        if str(html) == "-":
            raise UsageError("--html takes a file, as in --html report.html")
        from graphopt import page

        page.check_available()
    check_place(depfile)
    from graphopt.cache import Cache, Digests

    observe = {"compare_each": compare_each, "reproducer": reproducer, "html": html}
    seen = any(observe.values())  # what the cache holds would not be seen to run
    cache = None if no_cache or seen else Cache.of_user()
    session = _Session(cache, Digests(cache), no_cache or seen, read, observe if seen else {})
    if locked:
        manifests = session.require_up_to_date(builds)
    else:
        with session.warmed(builds, jobs or os.cpu_count() or 1):
            manifests = [_told(session, settings, len(builds) > 1) for settings in builds]
        if cache is not None and session.built:
            cache.trim()
    write_report(report, manifests[0] if report is not None else None)
    _write_depfiles(session, builds, depfile, depfiles)


def _told(session: _Session, settings: Settings, several: bool) -> Any:
    """Build; where there are several, an error says which one it is of."""
    try:
        return session.build(settings)
    except UserError as error:
        if several:
            error.add_note(f"in the build of {settings.output}; those before it are done")
        raise


def _shapes(texts: Sequence[str] | None) -> dict[str, str] | None:
    """What ``--shape`` says, by input, unread: reading it takes numpy."""
    pairs = [text.rpartition("=") for text in texts or ()]
    shapes = {name: value for name, _, value in pairs}
    if len(shapes) < len(pairs) or "" in shapes:
        parse_ranges(texts)  # says what is wrong
    return shapes or None


def _wanted(
    arguments: Sequence[str], output: Path | None, file: Path | None, flags: Mapping[str, Any]
) -> tuple[list[Settings], list[Path]]:
    """The builds that the arguments ask for, and the recipe that was read, if any.

    Raises:
        UsageError: they ask for nothing, or for what does not go together.
    """
    from graphopt import recipe
    from graphopt.recipe import Settings

    here = Path(recipe.RECIPE)
    if file is None and (not arguments or (output is None and here.is_file() and not _is_model(arguments))):
        if not here.is_file():
            raise UsageError(
                f"missing argument 'MODEL'; see graphopt build --help (there is no {here} here; `graphopt init MODEL` writes one)"
            )
        file = here
    if file is None:
        if len(arguments) > 1:
            raise UsageError(
                f"one model at a time, not {' and '.join(arguments[:2])}; a {here} can hold several builds"
            )
        if output is None:
            raise UsageError("missing option '--output' / '-o'; see graphopt build --help")
        return [Settings(model=Path(arguments[0]), output=output).overridden(**flags)], []
    read = recipe.load(file)
    chosen = list(read.chosen(arguments).values())
    if output is not None and len(chosen) != 1:
        raise UsageError(f"--output takes one build; name one of {', '.join(read.builds)}")
    return [settings.overridden(**flags, output=output) for settings in chosen], [file]


def _is_model(arguments: Sequence[str]) -> bool:
    """Whether the arguments name a model rather than builds of the recipe."""
    return len(arguments) == 1 and (arguments[0] == "-" or Path(arguments[0]).suffix in (".onnx", ".onnxtxt"))


@dataclass
class _Session:
    """One run of the command."""

    cache: Cache | None
    digests: Digests
    anew: bool  # whether bundles are built although they are up to date
    recipes: Sequence[Path]
    observe: Mapping[str, Any]  # what the user wants to see of a build, by the options of `make`
    built: bool = False  # whether something was

    def changes(self, settings: Settings) -> list[str]:
        """Why the bundle must be built; nothing where it is up to date."""
        from graphopt import provenance

        if str(settings.model) == "-":
            return ["the model comes from stdin"]
        return provenance.changes(settings, self.digests)

    def require_up_to_date(self, builds: Sequence[Settings]) -> list[Any]:
        """``--locked``; returns the manifests.

        Raises:
            WouldChange: a bundle would be built.
        """
        found = {str(settings.output): self.changes(settings) for settings in builds}
        told = [f"{place} ({_some(reasons)})" for place, reasons in found.items() if reasons]
        if told:
            raise WouldChange(f"--locked, and not up to date: {'; '.join(told)}; run graphopt build without --locked")
        for place in found:
            out.print(f"{place}: up to date", markup=False, soft_wrap=True)
        return [_manifest(settings) for settings in builds]

    def build(self, settings: Settings) -> Any:
        """Make or keep one bundle; returns its manifest."""
        from graphopt import provenance
        from graphopt.staging import exclusive

        with contextlib.ExitStack() as stack:
            if self.cache is not None:
                busy = f"{settings.output}: another graphopt builds there; waiting for it"
                stack.enter_context(exclusive(self.cache.lock_file(settings.output), lambda: say(busy)))
            reasons = self.changes(settings)
            if not reasons and not self.anew:
                provenance.touch(settings, [*self.recipes, *(p for _, _, p in provenance.input_paths(settings))])
                out.print(f"{settings.output}: up to date", markup=False, soft_wrap=True)
                return _manifest(settings)
            self.built = True
            again = (settings.output / "manifest.json").is_file()
            from graphopt.commands.make import make

            with progress_bar() as progress:
                manifest = make(settings, self.cache, self.digests, progress=progress, **self.observe)
            if again and reasons:
                say(f"{settings.output} was built again: {_some(reasons)}")
            out.print(bundle_table(manifest, f"{settings.output}/"))
            return manifest

    @contextlib.contextmanager
    def warmed(self, builds: Sequence[Settings], jobs: int) -> Iterator[None]:
        """Let `jobs` processes fill the cache with what `builds` need, a target each; without a cache, one that lives as long."""
        pairs = [
            replace(settings, targets=(target,)) if target else settings
            for settings in (builds if jobs > 1 else ())
            if str(settings.model) != "-" and (self.anew or self.changes(settings))
            for target in settings.targets or ("",)
        ]
        if len(pairs) < 2 or self.observe:
            yield
            return
        from graphopt.commands.make import warm_all

        with contextlib.ExitStack() as stack:
            if self.cache is None:
                from graphopt.cache import Cache

                self.cache = Cache(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-"))))
            warm_all(pairs, self.cache, jobs)
            yield


def _manifest(settings: Settings) -> Any:
    return json.loads((settings.output / "manifest.json").read_bytes())


def _some(reasons: Sequence[str], most: int = 4) -> str:
    more = f", and {len(reasons) - most} more" if len(reasons) > most else ""
    return ", ".join(reasons[:most]) + more


def _write_depfiles(session: _Session, builds: Sequence[Settings], one: Path | None, each: bool) -> None:
    """What ``--depfile`` and ``-MD`` ask for."""
    if one is None and not each:
        return
    from graphopt import provenance

    rules = []
    for settings in builds:
        external = [f["name"] for f in _manifest(settings)["build"]["files"] if f["role"] == "external data"]
        inputs = [path for _, _, path in provenance.input_paths(settings, external)]
        rules.append((settings.output / "manifest.json", [*inputs, *session.recipes]))
    files = [(one, rules)] if one is not None else []
    if each:
        files += [(Path(f"{s.output}.d"), [rule]) for s, rule in zip(builds, rules, strict=True)]
    for path, content in files:
        _write_text(path, provenance.depfile(content))


def _write_text(path: Path, text: str) -> None:
    try:
        if path.is_file() and path.read_text(encoding="utf-8", errors="surrogateescape") == text:
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(text, encoding="utf-8", errors="surrogateescape")
        beside.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {str(path)!r}: {error.strerror}; check the folder and its permissions"
        ) from None
