"""Is this model good or bad? By its numbers beside the original's, or by the exit code of a user's command.

A command is read as ``git bisect run`` reads one: 0 is good, 125 means it cannot tell, anything else, a signal included, is bad.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from graphopt import equivalence, isolation
from graphopt.backend import ShapeRange
from graphopt.errors import NotEquivalent, UnsupportedModel, UsageError
from graphopt.ir import Model, save

SKIP: Final = 125


class Verdict(enum.Enum):
    """What a judge says of a model."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "cannot tell"


class Judge(Protocol):
    """Says whether a model is good."""

    def judge(self, model: Model) -> tuple[Verdict, str]:
        """The verdict on `model`, and its reason."""


class Numbers:
    """Good is what computes the same as the original, within a relative tolerance or what a Bound allows."""

    def __init__(
        self,
        original: Model,
        allowed: float | equivalence.Bound,
        *,
        feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None,
        seed: int = 0,
        shapes: Mapping[str, ShapeRange] | None = None,
    ) -> None:
        """Arguments as of `equivalence.compare`. Nothing runs before the first verdict."""
        self.allowed = allowed
        self._reference = equivalence.Reference(original, feeds=feeds, seed=seed, shapes=shapes)

    def judge(self, model: Model) -> tuple[Verdict, str]:
        """Compare `model` with the original.

        Raises:
            UnsupportedModel: the original cannot be run on these or on generated inputs.
        """
        try:
            report = self._reference.compare(model, self.allowed)
            report.require("the model computes something else")
        except NotEquivalent as error:
            return Verdict.BAD, str(error)
        return Verdict.GOOD, f"within {report.tolerance:.3g}"


class Command:
    """Good is what a command accepts, called with the path of the model: in the place of ``{}``, or at its end.

    It runs without a shell, without standard input, and its output is not shown; the last line that it says on standard error is part of the
    reason.
    """

    def __init__(self, command: str, timeout: float | None = None) -> None:
        """Read the command.

        Args:
            command: program and arguments; ``sh -c '...'`` brings a shell.
            timeout: seconds after which it is killed, with all that it started; None for never.

        Raises:
            UsageError: it is empty, its quotes do not match, or there is no such program.
        """
        try:
            self.parts = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"--cmd {command!r}: {str(error).lower()}; quote it as for a shell") from None
        if not self.parts:
            raise UsageError(
                "--cmd is empty; give a program that takes the model's path, as in --cmd 'python check.py'"
            )
        if shutil.which(self.parts[0]) is None:
            raise UsageError(
                f"--cmd: cannot run {self.parts[0]!r}: no such program; a path needs its folder (./check.sh) and the x bit"
            )
        if timeout is not None and not 0 < timeout < math.inf:
            raise UsageError(f"--timeout takes a positive number of seconds, got {timeout}")
        self.timeout = timeout
        self.hangs_are_bad = False  # whether a run that was killed at the timeout is bad, instead of telling nothing

    def judge(self, model: Model) -> tuple[Verdict, str]:
        """Write `model` into a folder of its own and run the command on it."""
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            path = Path(folder) / "model.onnx"
            try:
                save(model, path)
            except UnsupportedModel as error:
                return Verdict.UNKNOWN, f"cannot be written: {error}"
            errors = Path(folder) / "stderr"
            code = self._run(str(path), errors)
            said = _last_line(errors)
        if code is None:
            told = f"killed after {self.timeout:g} s"
            return (Verdict.BAD if self.hangs_are_bad else Verdict.UNKNOWN), told
        if code == 0:
            return Verdict.GOOD, "exit code 0"
        if code == SKIP:
            return Verdict.UNKNOWN, f"exit code {SKIP}"
        reason = f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"
        return Verdict.BAD, f"{reason}: {said}" if said else reason

    def _run(self, path: str, errors: Path) -> int | None:
        """The exit code, negative for a signal; None where the time was up."""
        if any("{}" in part for part in self.parts):
            arguments = [part.replace("{}", path) for part in self.parts]
        else:
            arguments = [*self.parts, path]
        try:
            with errors.open("wb") as file:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    start_new_session=True,  # a group of its own, to be killed whole
                )
        except OSError as error:
            raise UsageError(f"--cmd: cannot run {self.parts[0]!r}: {error.strerror or error}") from None
        isolation.progress()
        try:
            return process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a finished command left behind
            process.wait()
            isolation.progress()


def _last_line(path: Path) -> str:
    """The last line of a file that may be large, shortened; empty where it has none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    shown = "".join(c if c.isprintable() else " " for c in next((line for line in reversed(lines) if line), ""))
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
