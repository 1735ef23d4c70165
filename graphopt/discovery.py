"""Passes and backends are found, not registered: by file name here, by entry point (`graphopt.passes`, `graphopt.backends`)
elsewhere."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

from graphopt.backend import Backend
from graphopt.errors import InternalError, UnknownPass, UnknownTarget, closest
from graphopt.pass_base import Pass

T = TypeVar("T")


def _modules(package: str) -> dict[str, str]:
    """Name with dashes -> module path, of the files in a package, without importing them."""
    home = importlib.import_module(package)
    return {
        i.name.replace("_", "-"): f"{package}.{i.name}" for i in pkgutil.iter_modules(home.__path__) if i.name[0] != "_"
    }


def _entry_points(group: str) -> dict[str, str]:
    return {e.name.replace("_", "-"): e.value.partition(":")[0] for e in importlib.metadata.entry_points(group=group)}


def _only_class(module: ModuleType, base: type[T]) -> type[T]:
    """The one public class of `module` that derives from `base`."""
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, base)
        and c.__module__ == module.__name__
        and not c.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise InternalError(f"{module.__name__} must define one public subclass of {base.__name__}, found {len(found)}")
    return found[0]


@functools.cache
def pass_modules() -> dict[str, str]:
    """Pass name -> module, sorted by name; a file in passes/ wins over an entry point of that name."""
    return dict(sorted({**_entry_points("graphopt.passes"), **_modules("graphopt.passes")}.items()))


def find_pass(name: str) -> type[Pass]:
    """The class of the pass `name`.

    Raises:
        UnknownPass: no such pass; the message names the nearest.
        InternalError: the file does not define exactly one pass, or an entry point names it differently.
    """
    modules = pass_modules()
    if name not in modules:
        raise UnknownPass(f"unknown pass {name!r}{nearest(name, modules)}; `graphopt passes` lists them")
    kind = _only_class(importlib.import_module(modules[name]), Pass)
    if kind.pass_name() != name:
        raise InternalError(
            f"pass {name!r} must come from a module of that name, found {modules[name]!r}; rename the file"
        )
    return kind


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where something is near, else nothing."""
    near = closest(name, known)
    return f" (did you mean {near!r}?)" if near is not None else ""


@functools.cache
def backends() -> dict[str, Backend]:
    """Backend name -> backend, sorted by name."""
    modules = {**_entry_points("graphopt.backends"), **_modules("graphopt.backends")}
    return {name: _only_class(importlib.import_module(module), Backend)() for name, module in sorted(modules.items())}  # type: ignore[type-abstract]


def backend_for(runtime: str) -> tuple[str, Backend]:
    """Name and backend that serve a target's runtime.

    Raises:
        UnknownTarget: none does.
    """
    for name, backend in backends().items():
        if runtime in backend.runtimes:
            return name, backend
    raise UnknownTarget(f"no backend serves {runtime!r}; `graphopt backends` lists what there is")
