"""A command in a child process: what happens to native code there (a crash, a hang, all memory gone) ends in one line here.

The child is forked before anything native is loaded, so it costs a few milliseconds and prints where the parent would. It writes what it is
doing (`step`) and what it has lying around unfinished (`scratch`) to places that outlive it; when it ends badly the parent says the first and
removes the second. The child dies with the parent, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

from graphopt.errors import UserError

_NATIVE: Final = ("onnxruntime", "tensorrt", "tensorrt_rtx", "torch", "pycuda")
_PAGE: Final = 4096  # bytes of the board: a counter of eight, then the name of the step
_GRACE: Final = 3.0  # seconds in which an interrupted child may clean up by itself
_LOADING: Final = 60.0  # seconds that importing may take on a busy machine, whatever the limit of a step
_TICK: Final = 0.5  # seconds between two looks at a silent child
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(frozen=True)
class Limits:
    """What the child may use; None: no limit."""

    memory: int | None = None  # bytes of memory of its own; mapped files do not count
    cpu: int | None = None  # seconds, of all threads
    silence: float | None = None  # seconds that one step may take without progress


class _Board:
    """A page that parent and child share: how often a step began or ended, and which one runs."""

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, _PAGE)
        self.count = 0

    def write(self, text: str) -> None:
        self.count += 1
        data = text.encode(errors="replace")[: _PAGE - 10]
        self.page[:10] = self.count.to_bytes(8, "little") + len(data).to_bytes(2, "little")
        self.page[10 : 10 + len(data)] = data

    def read(self) -> tuple[int, str]:
        length = int.from_bytes(self.page[8:10], "little")
        return int.from_bytes(self.page[:8], "little"), self.page[10 : 10 + length].decode(errors="replace")


_board: _Board | None = None  # the child's
_litter: int | None = None  # the child's end of the pipe that names unfinished files


class step:  # noqa: N801  (a context manager that reads like a word)
    """Say what runs, for the message of a crash; costs nothing outside of a child."""

    __slots__ = ("outer", "what")

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        if _board is not None:
            self.outer = _board.read()[1]
            _board.write(self.what)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if _board is not None:
            _board.write(self.outer)


def progress() -> None:
    """Tell that a long step is alive."""
    if _board is not None:
        _board.write(_board.read()[1])


def scratch(path: Path) -> None:
    """Name an unfinished file or folder, to be removed where this process cannot do it any more."""
    if _litter is not None:
        os.write(_litter, os.fsencode(path.absolute()) + b"\0")


def possible() -> str | None:
    """None where a child can be made of this process; else why not."""
    if not hasattr(os, "fork"):
        return "this system has no fork"
    loaded = [name for name in _NATIVE if name in sys.modules]
    if loaded or threading.active_count() > 1:
        return f"this process already runs {loaded[0] if loaded else 'threads'}"
    return None


def available_memory() -> int | None:
    """Bytes that this machine or container has; None where an NVIDIA driver, which reserves more than it uses, is at work."""
    if Path("/dev/nvidiactl").exists() or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(name).read_text()))
    return min(found)


def run(work: Callable[[], int], limits: Limits) -> int:
    """Run `work` in a child and return its exit code.

    Args:
        work: what to do; reports its own errors and returns an exit code.
        limits: what it may use.

    Raises:
        UserError: the child was ended by a signal, or by the limits; the message names the step.
    """
    board = _Board()
    read_end, write_end = os.pipe()
    temporary = tempfile.mkdtemp(prefix="graphopt-")
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _be_child(work, limits, board, write_end, parent, temporary)
    os.close(write_end)
    watch = _Watch(child, board, read_end, limits)
    try:
        return watch.wait()
    finally:
        watch.clean()
        os.close(read_end)
        shutil.rmtree(temporary, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------- the child


def _be_child(
    work: Callable[[], int], limits: Limits, board: _Board, litter: int, parent: int, temporary: str
) -> NoReturn:
    global _board, _litter
    code = 3
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
        _die_with(parent)
        _obey(limits)
        _board, _litter = board, litter
        tempfile.tempdir = temporary
        os.environ["TMPDIR"] = temporary
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _stop(number: int, frame: Any) -> NoReturn:
    """Clean up and end; once, though a terminal and the parent may both ask for it."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends; elsewhere, look after it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:

        def look() -> None:
            while os.getppid() == parent:
                time.sleep(_TICK)
            os._exit(1)

        threading.Thread(target=look, daemon=True).start()
    if os.getppid() != parent:  # it ended meanwhile
        os._exit(1)


def _obey(limits: Limits) -> None:
    import resource

    def limit(kind: int, value: int) -> None:
        _, hard = resource.getrlimit(kind)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    limit(resource.RLIMIT_CORE, 0)
    if limits.memory is not None:
        limit(resource.RLIMIT_DATA, limits.memory)  # RLIMIT_AS would count mapped weights
        with contextlib.suppress(OSError):  # where the kernel has to choose, it shall take this process
            Path("/proc/self/oom_score_adj").write_text("1000")
    if limits.cpu is not None:
        limit(resource.RLIMIT_CPU, limits.cpu)


# ------------------------------------------------------------------------------------------------------- the parent


class _Watch:
    """Waits for a child, and for reasons to end it."""

    def __init__(self, child: int, board: _Board, litter: int, limits: Limits) -> None:
        self.child = child
        self.board = board
        self.litter = litter
        self.limits = limits
        self.names = b""
        self.status: int | None = None
        self.open = True

    def wait(self) -> int:
        """The child's exit code, or what a shell makes of the signal that ended this wait; raises as `run` does."""
        with self.signals():
            try:
                return self.verdict(self.hang())
            except KeyboardInterrupt as stop:
                self.interrupt()
                return 128 + getattr(stop, "number", signal.SIGINT)

    def hang(self) -> bool:
        """Wait for the end; True: it had to be ended, since nothing moved."""
        count, since = 0, time.monotonic()
        while not self.ended(_TICK):
            now, _ = self.board.read()
            if now != count:
                count, since = now, time.monotonic()
            elif self.limits.silence is not None and time.monotonic() - since > max(
                self.limits.silence, 0 if count else _LOADING
            ):
                self.kill()
                return True
        return False

    def ended(self, seconds: float) -> bool:
        """Whether the child has ended; waits for that no longer than `seconds`."""
        if self.status is None and self.open:
            if select.select([self.litter], [], [], seconds)[0]:
                data = os.read(self.litter, 65536)
                self.names += data
                self.open = bool(data)  # closed: the child ends now
        elif self.status is None:
            time.sleep(0.001)
        if self.status is None:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.child, signal.SIGKILL)
            _, self.status = os.waitpid(self.child, 0)

    def interrupt(self) -> None:
        """Ask the child to end; make it, when it is too busy to listen."""
        with contextlib.suppress(ProcessLookupError):
            if self.status is None:
                os.kill(self.child, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and not self.ended(0.05):
            pass
        self.kill()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Treat a request to terminate like Ctrl-C; exit as its sender expects."""

        def stop(number: int, frame: Any) -> None:
            raise _Terminated(number)

        kept = {}
        if threading.current_thread() is threading.main_thread():
            kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def verdict(self, hung: bool) -> int:
        assert self.status is not None
        what = self.board.read()[1] or "loading graphopt"
        if hung:
            raise UserError(
                f"{what}: no progress for {self.limits.silence:g} s, stopped; nothing was written: "
                "allow more with --step-limit SECONDS (0: any)"
            )
        if os.WIFEXITED(self.status):
            return os.WEXITSTATUS(self.status)
        number = os.WTERMSIG(self.status)
        name = signal.Signals(number).name
        if number == signal.SIGXCPU:
            raise UserError(
                f"{what}: the {self.limits.cpu} s of CPU time are used up; nothing was written: allow more with --cpu-limit SECONDS"
            )
        if number == signal.SIGKILL:
            raise UserError(
                f"{what}: the process was killed, most likely for want of memory; nothing was written: free some, or use a smaller model"
            )
        raise UserError(
            f"{what}: native code crashed ({name}); nothing was written: report it to the runtime's authors with the model"
        )

    def clean(self) -> None:
        """Remove what the child left unfinished."""
        self.kill()
        if os.WIFEXITED(self.status or 0):
            return
        while self.open and select.select([self.litter], [], [], 0)[0]:
            data = os.read(self.litter, 65536)
            self.names += data
            self.open = bool(data)
        for name in self.names.split(b"\0")[:-1]:
            path = Path(os.fsdecode(name))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


class _Terminated(KeyboardInterrupt):
    """A request to terminate; `number` is its signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
