"""What TensorRT says while it works: its log, kept for our messages, and the progress of a build."""

from __future__ import annotations

import logging
import re
import threading
from typing import Any, Final

from graphopt import isolation
from graphopt.backend import Progress
from graphopt.errors import UserError
from graphopt.target import Target

_LOG = logging.getLogger(__name__)


class Log:
    """What TensorRT says: errors for our messages, the list of kernels, warnings on to `logging`, each once.

    There is one for all builders and sessions of a process, since TensorRT ignores a second logger while an object with
    the first one lives.
    """

    def __init__(self, trt: Any) -> None:
        self.logger = self._attach(trt)
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.errors: list[str] = []
        self.inconsistent: list[str] = []  # shapes that the network cannot be computed with; TensorRT only warns
        self.layers = ""
        self._said: set[str] = set()

    def _attach(self, trt: Any) -> Any:
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity == trt.ILogger.VERBOSE:
                    if message.startswith("Layers:"):
                        log.layers = message
                elif severity == trt.ILogger.WARNING:
                    log.warn(message)
                elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    log.errors.append(message)

        return Logger()

    def warn(self, message: str) -> None:
        if re.search(r"Profile k(MIN|OPT|MAX) values are not self-consistent", message):
            self.inconsistent.append(message)
        elif message not in self._said and "has Int64 binding" not in message:  # that one comes for every int64 input
            self._said.add(message)
            _LOG.warning("%s", cleaned(message))

    def first(self) -> str:
        """The first error that says something, cleaned."""
        for message in self.errors:
            if "ModelImporter.cpp" not in message and (text := cleaned(message)):
                return text
        return "no reason given"


_LOGS: Final[dict[Any, Log]] = {}  # by ILogger class, which stands for the runtime


def log_of(trt: Any) -> Log:
    if trt.ILogger not in _LOGS:
        _LOGS[trt.ILogger] = Log(trt)
    return _LOGS[trt.ILogger]


class Monitor:
    """Nested phases of a build -> one share that only grows. Kept from raising inside native code."""

    def __init__(self, progress: Progress | None, target: Target) -> None:
        self.progress = progress
        self.target = target
        self.cancelled = False
        self.failure: Exception | None = None
        self._spans: dict[str, tuple[float, float, int]] = {}  # phase -> share at its start, share it covers, steps
        self._done: dict[str, int] = {}
        self._share = 0.0
        self._lock = threading.Lock()  # phases run in several threads

    def report(self, phase: str, share: float) -> bool:
        """Tell the caller; False once it has cancelled."""
        self._share = max(self._share, min(share, 1.0))
        isolation.progress()
        if self.progress is not None and not self.cancelled:
            try:
                self.cancelled = not self.progress(phase, self._share)
            except Exception as error:
                self.failure, self.cancelled = error, True
        return not self.cancelled

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            low, width = 0.0, 1.0
            if parent in self._spans:
                low, width, count = self._spans[parent]
                width /= count
                low += width * min(self._done[parent], count - 1)
            self._spans[phase] = (low, width, max(steps, 1))
            self._done[phase] = 0

    def step(self, phase: str, step: int) -> bool:
        with self._lock:
            low, width, count = self._spans.get(phase, (self._share, 0.0, 1))
            self._done[phase] = step + 1
            return self.report(phase, low + width * min(step + 1, count) / count)

    def attach(self, trt: Any) -> Any:
        """A trt.IProgressMonitor that reports here."""
        monitor = self

        class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                monitor.start(phase_name, parent_phase, num_steps)

            def phase_finish(self, phase_name: str) -> None:
                return None

            def step_complete(self, phase_name: str, step: int) -> bool:
                return monitor.step(phase_name, step)

        return ProgressMonitor()

    def check(self) -> None:
        """Raise what the caller's function raised, or that it cancelled."""
        if self.failure is not None:
            raise self.failure
        if self.cancelled:
            raise UserError(f"the build for {self.target} was cancelled; nothing was written")


def cleaned(text: str) -> str:
    """TensorRT's message without source places, error codes and the ``cudaError 35`` of every machine without a GPU."""
    noise = re.compile("catchCudaError|^Invalid Node - ")
    lines = [line for line in text.splitlines() if not noise.search(line)]
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"^\w+\.cpp:\d+: ", "", text)
    text = re.sub(r"^\w+::\w+: ", "", text)
    text = re.sub(r"^Error Code \d+: [\w ]+ \((.*)\)$", r"\1", text)
    text = re.sub(r"^Myelin \((.*)\)$", r"\1", text)
    text = re.sub(r"\[\w+\.(cpp|h):\d+: [^]]*\] *", "", text)
    text = re.sub(r"MyelinCheckException: \w+\.cpp:\d+: ", "", text)
    text = re.sub(r"\s*In \w+ at \S+?:\d+", "", text)
    text = re.sub(r"\s*\(cudaError \d+: ([^)]*)\)", r"\1", text)
    text = re.sub(r"^Assertion failed: .*? && \"(.*)\"\.?$", r"\1", text)
    text = re.sub(r"^Assertion failed: .*?[^:]: (.*)$", r"\1", text)
    return text.strip(" .")
