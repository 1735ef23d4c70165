"""`--isolate`: a command in a child process with limits, so that native code can crash or hang there and be told of in one line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from graphopt.errors import UserError

_STEP_LIMIT: Final = 1800  # seconds; TensorRT reports progress more often, and no pass or run takes so long

_ISOLATE: Final = "Work in a child process: a crash or a hang there ends in one line; default: "
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        "--memory-limit", min=0, metavar="MIB", help="With --isolate; default: the machine's memory, 0: none."
    ),
]
CpuLimit = Annotated[
    int, typer.Option("--cpu-limit", min=0, metavar="SECONDS", help="With --isolate: CPU time of all threads; 0: any.")
]
StepLimit = Annotated[
    int,
    typer.Option(
        "--step-limit", min=0, metavar="SECONDS", help="With --isolate: longest that a step may be silent; 0: any."
    ),
]


def contained(default: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--isolate` and its limits; `default` says what holds without the option."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(
            *, isolate: bool | None, memory_limit: int | None, cpu_limit: int, step_limit: int, **options: Any
        ) -> None:
            from graphopt import isolation

            hindrance = isolation.possible()
            if isolate and hindrance is not None:
                raise UserError(f"--isolate: {hindrance}; start graphopt as a process of its own")
            if hindrance is not None or not (default if isolate is None else isolate):
                command(**options)
                return
            from graphopt.cli import exit_code

            memory = isolation.available_memory() if memory_limit is None else memory_limit << 20
            limits = isolation.Limits(memory or None, cpu_limit or None, step_limit or None)
            raise typer.Exit(isolation.run(lambda: exit_code(lambda: command(**options)), limits))

        own = inspect.signature(command, eval_str=True)
        told = _ISOLATE + ("it does." if default else "it does not.")
        isolate = Annotated[bool | None, typer.Option("--isolate/--no-isolate", help=told)]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind)
            for name, kind, value in (
                ("isolate", isolate, None),
                ("memory_limit", MemoryLimit, None),
                ("cpu_limit", CpuLimit, 0),
                ("step_limit", StepLimit, _STEP_LIMIT),
            )
        ]
        signature = own.replace(parameters=[*own.parameters.values(), *more])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate
