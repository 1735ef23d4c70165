"""Measure what code costs, so that two candidates can be compared on a shared and noisy machine.

The theorem: **times taken in the same round share the machine's mood, so their ratio does not.** Every contestant runs
once a round, in an order drawn anew for each round, and only ratios within a round are compared. Because the order is
random and independent of the contestants, two equal contestants win a round with probability 1/2 each, whatever the
noise looks like: that is all the sign test assumes (Arbuthnot 1710; Dixon and Mood, JASA 41, 1946), and the interval of
the median ratio is its inversion by order statistics (Thompson, Ann. Math. Stat. 7, 1936). Neither asks for a normal
distribution, a seed or a resampling; for the same `alpha` they can never contradict each other, which is why the
interval is not a bootstrap one.

An A/A contest (the same work twice) must therefore end in ``"no difference shown"`` but for a share `alpha` of the
contests; ``python -m benchmarks.aa`` shows it. A tiny difference between two *objects* that do the same work (two
sessions whose memory lies differently) is real for this process and may be found: trust no ratio closer to 1 than the
A/A one beside it.

CPU seconds are those of all threads of the process. ONNX Runtime's threads spin for a moment after a run, and what they
burn is billed to whoever comes next: set ``session.intra_op.allow_spinning`` to ``0`` where CPU seconds matter.
"""

from __future__ import annotations

import gc
import itertools
import marshal
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graphopt.errors import InternalError, UsageError

Verdict = Literal["faster", "slower", "no difference shown"]

MOST_CALLS: Final = 1 << 20  # in one sample; ends the calibration of a callable that takes no measurable time
LONGEST_SAMPLE: Final = 100  # times `min_seconds`: batching stops where the slowest contestant's sample gets this long


@dataclass(frozen=True)
class Clock:
    """The two clocks of a sample, both in seconds; tests put their own in."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time  # user + system, of all threads of this process


SYSTEM_CLOCK: Final = Clock()


@dataclass(frozen=True)
class Comparison:
    """What the paired ratios of two contestants say; each ratio is candidate / baseline, so below 1 is faster."""

    baseline: str
    candidate: str
    rounds: int
    ratio: float  # median of the rounds' wall-second ratios
    quartile_low: float  # a quarter of the ratios are at most this
    quartile_high: float  # a quarter of the ratios are at least this
    interval_low: float  # confidence interval of the median ratio, by order statistics
    interval_high: float
    coverage: float  # confidence of that interval: at least 1 - alpha, or less where the rounds are too few for it
    wins: int  # rounds in which the candidate took less time
    losses: int  # rounds in which it took more; ties are neither
    p_value: float  # exact, two-sided sign test of "wins and losses are equally likely"
    alpha: float  # the share of A/A contests that may be called a difference
    cpu_ratio: float | None  # median of the rounds' CPU-second ratios; None where the CPU clock saw nothing
    verdict: Verdict  # of the wall seconds

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Summary:
    """One contestant's cost, a row of a table; seconds are those of one call."""

    name: str
    wall_seconds: float  # median
    quartile_low: float  # of the wall seconds
    quartile_high: float
    cpu_seconds: float  # median
    comparison: Comparison | None  # against the baseline, None for the baseline itself

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Timings:
    """The samples of a contest: for each contestant one wall and one CPU time a round, in seconds a call."""

    wall: Mapping[str, NDArray[np.float64]]
    cpu: Mapping[str, NDArray[np.float64]]
    calls: int = 1  # calls in a sample, the same for all contestants
    seed: int = 0  # of the rounds' orders

    @property
    def names(self) -> tuple[str, ...]:
        """The contestants, in the order in which they were given."""
        return tuple(self.wall)

    @property
    def rounds(self) -> int:
        """How often each contestant was sampled."""
        return len(next(iter(self.wall.values())))

    def compare(self, baseline: str, candidate: str, *, alpha: float = 0.01) -> Comparison:
        """Compare two contestants round by round.

        Args:
            baseline: the contestant that the ratios divide by.
            candidate: the contestant that is judged.
            alpha: the share of A/A contests that may be called a difference; 1 - alpha is the interval's confidence.
                0.01 needs at least 8 rounds, with fewer the verdict is always "no difference shown".

        Raises:
            UsageError: a name is not a contestant, `alpha` is outside of (0, 1), or a sample took no time.
        """
        for name in (baseline, candidate):
            if name not in self.wall:
                raise UsageError(f"no contestant {name!r}: there are {', '.join(map(repr, self.names))}")
            if np.min(self.wall[name]) <= 0:
                raise UsageError(f"contestant {name!r} took no measurable time: raise min_seconds")
        ratios = self.wall[candidate] / self.wall[baseline]
        wins, losses = int(np.sum(ratios < 1)), int(np.sum(ratios > 1))
        p_value = sign_test(wins, losses)
        low, high, coverage = median_interval(ratios, alpha)
        verdict: Verdict = "no difference shown"
        if p_value <= alpha:
            verdict = "faster" if wins > losses else "slower"
        cpu_ratio = None
        if np.min(self.cpu[baseline]) > 0:
            cpu_ratio = float(np.median(self.cpu[candidate] / self.cpu[baseline]))
        return Comparison(
            baseline=baseline,
            candidate=candidate,
            rounds=self.rounds,
            ratio=float(np.median(ratios)),
            quartile_low=float(np.quantile(ratios, 0.25)),
            quartile_high=float(np.quantile(ratios, 0.75)),
            interval_low=low,
            interval_high=high,
            coverage=coverage,
            wins=wins,
            losses=losses,
            p_value=p_value,
            alpha=alpha,
            cpu_ratio=cpu_ratio,
            verdict=verdict,
        )

    def rows(self, baseline: str | None = None, *, alpha: float = 0.01) -> tuple[Summary, ...]:
        """One row a contestant, in the given order; `baseline` is the first contestant unless named.

        Raises:
            UsageError: as `compare`.
        """
        base = self.names[0] if baseline is None else baseline
        if base not in self.wall:
            raise UsageError(f"no contestant {base!r}: there are {', '.join(map(repr, self.names))}")
        return tuple(
            Summary(
                name=name,
                wall_seconds=float(np.median(wall)),
                quartile_low=float(np.quantile(wall, 0.25)),
                quartile_high=float(np.quantile(wall, 0.75)),
                cpu_seconds=float(np.median(self.cpu[name])),
                comparison=None if name == base else self.compare(base, name, alpha=alpha),
            )
            for name, wall in self.wall.items()
        )

    def as_dict(self) -> dict[str, Any]:
        """Every sample as JSON values, so that a table can be computed anew."""
        samples = {
            name: {"wall_seconds": self.wall[name].tolist(), "cpu_seconds": self.cpu[name].tolist()}
            for name in self.names
        }
        return {"rounds": self.rounds, "calls": self.calls, "seed": self.seed, "samples": samples}


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 31,
    warmup: int = 2,
    min_seconds: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Timings:
    """Time every contestant once a round, in a seeded random order, and return all samples.

    A sample is a batch of calls that lasts `min_seconds` or more, so that the clock's own cost does not count. The
    batch is **the same number of calls for all contestants**: its first call runs on the caches that another contestant
    left, the others on warm ones, and with equal counts everybody has the same share of each. The fastest contestant
    sets the count, unless the slowest would then take more than 100 times `min_seconds`; contestants that far apart
    need no precise clock. The garbage collector is off while timing and runs between rounds.

    Args:
        contestants: name -> what to time; results are dropped.
        rounds: samples of each contestant; odd numbers give a median that was measured.
        warmup: unrecorded calls of each contestant before the batch size is calibrated (by some more calls).
        min_seconds: the shortest sample, in wall seconds; 0 for one call a sample.
        seed: of the rounds' orders.
        progress: called between rounds, never while timing, with the rounds done and the rounds in all.
        clock: where the seconds come from.

    Raises:
        UsageError: no contestants, or a number out of its range. What a contestant raises passes through, with its name
            as a note.
    """
    if not contestants:
        raise UsageError("nothing to measure: no contestants")
    if rounds < 1 or warmup < 0 or not 0 <= min_seconds < math.inf:
        raise UsageError(
            f"rounds must be at least 1, warmup and min_seconds at least 0; got {rounds}, {warmup} and {min_seconds}"
        )
    wall = {name: np.empty(rounds) for name in contestants}
    cpu = {name: np.empty(rounds) for name in contestants}
    with _collector_off():
        for name, call in contestants.items():
            for _ in range(warmup):
                _sample(name, call, 1, clock)
        calls = _batch(contestants, min_seconds, clock)
        for done, order in enumerate(orders(contestants, rounds=rounds, seed=seed)):
            gc.collect()
            for name in order:
                wall[name][done], cpu[name][done] = _sample(name, contestants[name], calls, clock)
            if progress is not None:
                progress(done + 1, rounds)
    return Timings(wall, cpu, calls=calls, seed=seed)


def orders(names: Mapping[str, object] | Sequence[str], *, rounds: int, seed: int) -> Iterator[list[str]]:
    """The order of the contestants in each round: shuffled anew every time, the same for the same seed."""
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        order = list(names)
        shuffle(order)
        yield order


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of `wins` against `losses` when both are equally likely; ties are left out.

    ``p = min(1, 2 * P(X <= min(wins, losses)))`` with X binomial of n = wins + losses and 1/2.

    Raises:
        UsageError: a count is negative.
    """
    if wins < 0 or losses < 0:
        raise UsageError(f"a sign test counts wins and losses from 0 on, got {wins} and {losses}")
    n = wins + losses
    tail = next(itertools.islice(_tails(n), min(wins, losses), None))
    return min(1.0, 2 * tail / (1 << n))


def median_interval(values: ArrayLike, alpha: float) -> tuple[float, float, float]:
    """A distribution-free confidence interval of the median: ``(low, high, coverage)``.

    Low is the k-th smallest value and high the k-th largest, with the largest k whose ``2 * P(X <= k - 1) <= alpha``
    for X binomial of n and 1/2. Where n is too small for any k, it is the whole range with the coverage that this has.

    Raises:
        UsageError: there are no values, or `alpha` is outside of (0, 1).
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if n == 0 or not 0 < alpha < 1:
        raise UsageError(f"a median interval needs values and 0 < alpha < 1; got {n} values and alpha {alpha}")
    fitting = list(itertools.takewhile(lambda p: p <= alpha, (2 * tail / (1 << n) for tail in _tails(n))))
    k = max(1, len(fitting))
    return float(ordered[k - 1]), float(ordered[n - k]), 1 - (fitting[-1] if fitting else 2 / (1 << n))


def _tails(n: int) -> Iterator[int]:
    """Of the 2**n outcomes of n fair coins, how many have at most 0, 1, ... n heads: sums of ``math.comb(n, k)``."""
    ways = 1  # comb(n, k), each from the one before: math.comb anew for each k takes seconds from n = 10,000 on
    tail = 0
    for k in range(n + 1):
        tail += ways
        yield tail
        ways = ways * (n - k) // (k + 1)


def _sample(name: str, call: Callable[[], object], calls: int, clock: Clock) -> tuple[float, float]:
    """Wall and CPU seconds of one call, as the mean of a batch."""
    try:
        cpu_start = clock.cpu()
        wall_start = clock.wall()
        for _ in itertools.repeat(None, calls):  # about 20 ns a turn
            call()
        wall_end = clock.wall()
        cpu_end = clock.cpu()
    except Exception as error:
        error.add_note(f"raised by contestant {name!r} while it was measured")
        raise
    return (wall_end - wall_start) / calls, (cpu_end - cpu_start) / calls


def _batch(contestants: Mapping[str, Callable[[], object]], min_seconds: float, clock: Clock) -> int:
    """The number of calls in a sample, a power of two unless the slowest contestant bounds it."""
    most, slowest = 1, 0.0
    for name, call in contestants.items():
        calls = 1
        seconds, _ = _sample(name, call, calls, clock)
        while seconds * calls < min_seconds and calls < MOST_CALLS:
            calls *= 2
            seconds, _ = _sample(name, call, calls, clock)
        most, slowest = max(most, calls), max(slowest, seconds)
    if slowest > 0:
        most = min(most, int(LONGEST_SAMPLE * min_seconds / slowest))
    return max(1, most)


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class ProcessCost:
    """What a command took from start to end, its own start-up included."""

    command: tuple[str, ...]
    exit_code: int  # negative for the number of the signal that ended it
    timed_out: bool
    wall_seconds: float
    cpu_seconds: float  # user + system, of the command and of the descendants that were waited for
    peak_mb: float  # 10**6 bytes resident, files mapped included: the largest single process, never a sum
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the command ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"command": list(self.command)}


# Runs in a Python of its own: starts the command, waits for it and writes down what wait4 says. Its imports are few,
# since its own size is the smallest peak that can be seen.
_LAUNCHER: Final = """
import marshal, os, signal, sys, time
command, environment, timeout, reply = marshal.load(sys.stdin.buffer)
def answer(*values):
    with open(reply, "wb") as file:
        marshal.dump(values, file)
late = False
def stop(number, frame):
    global late
    late = late or number == signal.SIGALRM
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
start = time.perf_counter()
try:
    child = os.posix_spawn(
        command[0], command, environment, setpgroup=0, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
    )
except (OSError, ValueError) as error:
    answer(getattr(error, "strerror", None) or str(error))
    sys.exit()
signal.signal(signal.SIGALRM, stop)
signal.signal(signal.SIGTERM, stop)
signal.setitimer(signal.ITIMER_REAL, timeout)
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - start
signal.setitimer(signal.ITIMER_REAL, 0)
answer(None, os.waitstatus_to_exitcode(status), late, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


def measure_process(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
) -> ProcessCost:
    """Run `command` to its end and say what it cost: wall and CPU seconds, peak memory, exit code and output.

    The peak is ``ru_maxrss`` of `os.wait4`, and that has a trap: on Linux ``exec`` folds the peak of the address space
    that it leaves into the new program's (``exec_mmap`` calls ``setmax_mm_hiwater_rss``), and after fork, vfork and
    posix_spawn alike that is the *parent's*. Measured: from a parent of 500 MB, ``python -c pass`` "peaks" at 488 MB by
    any of the three. So the command is started by a launcher, a bare Python of about 10 MB: this is the smallest peak
    that can be told, whatever the size of the caller. The launcher's own time is not part of the result.

    The command gets no standard input; its output goes to temporary files, so that nobody waits for a full pipe. A
    failing command or a timeout is a result, not an error. At the timeout, or when the caller is interrupted, the
    command's process group is killed; what it cost until then is reported, less what descendants took that were not
    waited for.

    Args:
        command: the program (a path, or a name on the PATH of `env`) and its arguments.
        env: the whole environment of the command; this process's own when None.
        cwd: its working folder.
        timeout: wall seconds after which it is killed; None for never.

    Raises:
        UsageError: the command is empty, one text, or cannot be started, `cwd` is no folder, `timeout` is not positive,
            or the system has no `os.wait4` (Windows).
    """
    if not hasattr(os, "wait4"):
        raise UsageError("measuring a process needs os.wait4, which this system lacks; run on Linux or macOS")
    if not command or isinstance(command, str):
        raise UsageError(f"a command is a program and its arguments, as in ['ls', '-l']; got {command!r}")
    if timeout is not None and not 0 < timeout < math.inf:
        raise UsageError(f"timeout must be a positive number of seconds, got {timeout}")
    if cwd is not None and not Path(cwd).is_dir():
        raise UsageError(f"cannot run {command[0]!r} in {os.fspath(cwd)!r}: no such folder")
    environment = dict(os.environ if env is None else env)
    program = command[0]
    if os.sep not in program:
        found = shutil.which(program, path=environment.get("PATH", os.defpath))
        if found is None:
            raise UsageError(f"cannot run {program!r}: it is not on the PATH")
        program = str(Path(found).absolute())
    with tempfile.TemporaryDirectory(prefix="graphopt-measure-") as name:
        out, err, reply = (Path(name, part) for part in ("stdout", "stderr", "reply"))
        request = marshal.dumps(
            (
                tuple(os.fsencode(part) for part in (program, *command[1:])),
                {os.fsencode(key): os.fsencode(value) for key, value in environment.items()},
                timeout or 0,
                os.fsencode(reply),
            )
        )
        with out.open("wb") as out_file, err.open("wb") as err_file:
            launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER],
                stdin=subprocess.PIPE,
                stdout=out_file,
                stderr=err_file,
                cwd=cwd,
                start_new_session=True,  # Ctrl-C comes to us alone, and we end the launcher
            )
            try:
                launcher.communicate(request)
            except BaseException:
                launcher.terminate()
                launcher.wait()
                raise
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
        if not reply.exists():
            raise InternalError(f"the launcher of {program!r} ended with {launcher.returncode}: {stderr[-500:]}")
        failure, *result = marshal.loads(reply.read_bytes())
    if failure is not None:
        raise UsageError(f"cannot run {program!r}: {failure}")
    exit_code, timed_out, wall_seconds, cpu_seconds, peak = result
    return ProcessCost(
        command=tuple(command),
        exit_code=exit_code,
        timed_out=timed_out,
        wall_seconds=wall_seconds,
        cpu_seconds=cpu_seconds,
        peak_mb=peak * (1 if sys.platform == "darwin" else 1024) / 1e6,  # bytes on macOS, KiB elsewhere
        stdout=stdout,
        stderr=stderr,
    )
