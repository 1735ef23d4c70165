"""The measuring of code and of processes: exact statistics on a clock of our own, no assertion about real time."""

import gc
import itertools
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import UsageError
from graphopt.measure import (
    MOST_CALLS,
    Clock,
    ProcessCost,
    Timings,
    interleave,
    measure_process,
    median_interval,
    orders,
    sign_test,
)

needs_wait4 = pytest.mark.skipif(not hasattr(os, "wait4"), reason="os.wait4 is not on this system")


class Machine:
    """A clock that only work moves: `work(seconds)` is a contestant that takes exactly so long on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cpu = 0.0
        self.slowness = itertools.repeat(1.0)
        self.log: list[str] = []
        self.clock = Clock(wall=lambda: self.now, cpu=lambda: self.cpu)

    def work(self, seconds, *, name="", threads=1):
        def call():
            self.log.append(name)
            took = seconds * next(self.slowness)
            self.now += took
            self.cpu += took * threads

        return call


def samples(**seconds):
    wall = {name: np.array(values, dtype=float) for name, values in seconds.items()}
    return Timings(wall, dict(wall))


def test_a_sample_is_the_seconds_of_one_call():
    machine = Machine()
    timings = interleave({"a": machine.work(0.25), "b": machine.work(0.5, threads=2)}, rounds=3, clock=machine.clock)
    assert timings.calls == 1
    assert timings.rounds == 3
    np.testing.assert_array_equal(timings.wall["a"], [0.25] * 3)
    np.testing.assert_array_equal(timings.cpu["b"], [1.0] * 3)


def test_fast_calls_are_batched_by_the_same_count_for_all():
    machine = Machine()
    contestants = {"fast": machine.work(2**-13), "slow": machine.work(2**-11)}
    timings = interleave(contestants, rounds=2, min_seconds=2**-10, clock=machine.clock)
    assert timings.calls == 8  # what the fast one needs
    np.testing.assert_array_equal(timings.wall["fast"], [2**-13] * 2)
    np.testing.assert_array_equal(timings.wall["slow"], [2**-11] * 2)


def test_every_contestant_is_called_as_often_as_the_others_in_the_rounds():
    machine = Machine()
    contestants = {"fast": machine.work(2**-13, name="fast"), "slow": machine.work(2**-11, name="slow")}
    interleave(contestants, rounds=2, warmup=0, min_seconds=2**-10, clock=machine.clock)
    recorded = machine.log[-2 * 2 * 8 :]
    assert recorded.count("fast") == recorded.count("slow") == 16


def test_a_very_slow_contestant_bounds_the_batch():
    machine = Machine()
    contestants = {"fast": machine.work(2**-20), "slow": machine.work(2**-10)}
    timings = interleave(contestants, rounds=1, min_seconds=2**-10, clock=machine.clock)
    assert timings.calls == 100  # 1024 for the fast one alone; the slow one's sample is 100 times min_seconds


def test_calibration_ends_when_a_call_takes_no_time():
    ticks = itertools.count(1)
    clock = Clock(wall=lambda: 1.0, cpu=lambda: 1.0)
    with pytest.raises(UsageError, match=r"'a' took no measurable time.*min_seconds"):
        interleave({"a": lambda: next(ticks), "b": int}, rounds=1, clock=clock).compare("a", "b")
    assert next(ticks) < 4 * MOST_CALLS


def test_no_minimum_means_one_call_a_sample():
    machine = Machine()
    timings = interleave({"a": machine.work(1e-9)}, rounds=4, warmup=3, min_seconds=0, clock=machine.clock)
    assert timings.calls == 1
    assert len(machine.log) == 3 + 1 + 4  # warm-up, calibration, rounds


def test_the_order_of_the_rounds_is_decided_by_the_seed():
    names = list("abcd")
    assert list(orders(names, rounds=9, seed=1)) == list(orders(names, rounds=9, seed=1))
    assert list(orders(names, rounds=9, seed=1)) != list(orders(names, rounds=9, seed=2))
    assert all(sorted(order) == names for order in orders(names, rounds=9, seed=1))
    assert len({tuple(order) for order in orders(names, rounds=9, seed=1)}) > 1
    assert names == list("abcd")


def test_interleave_runs_each_round_in_its_order():
    machine = Machine()
    contestants = {name: machine.work(1, name=name) for name in "abc"}
    timings = interleave(contestants, rounds=5, warmup=0, seed=7, clock=machine.clock)
    assert timings.seed == 7
    assert machine.log[3:] == list(itertools.chain(*orders("abc", rounds=5, seed=7)))


def test_progress_is_told_between_rounds():
    machine, told = Machine(), []
    interleave({"a": machine.work(1)}, rounds=3, clock=machine.clock, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_garbage_collector_is_off_while_timing_and_on_again_after_an_error():
    seen = []

    def fails():
        seen.append(gc.isenabled())
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as caught:
        interleave({"the broken one": fails}, rounds=1)
    assert seen == [False]
    assert gc.isenabled()
    assert "'the broken one'" in caught.value.__notes__[0]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warmup": -1}, {"min_seconds": -1.0}, {"min_seconds": float("nan")}])
def test_a_number_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match="rounds must be at least 1"):
        interleave({"a": int}, **wrong)


def test_no_contestants_are_refused():
    with pytest.raises(UsageError, match="no contestants"):
        interleave({})


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [  # binomial tables; 8 against 2 of 10 is the textbook's 0.109, 0 of 6 the smallest below 0.05
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (8, 2, 0.109375),
        (2, 8, 0.109375),
        (6, 0, 0.03125),
        (0, 8, 0.0078125),
        (7, 1, 0.0703125),
        (15, 5, 0.041389465332),
    ],
)
def test_the_sign_test_gives_the_values_of_the_tables(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-10)


def test_the_sign_test_of_very_many_rounds_stays_a_number():
    assert sign_test(5_000, 5_000) == 1.0
    assert sign_test(4_900, 5_100) == pytest.approx(0.0466, rel=0.01)  # the normal approximation: z = 1.99
    assert 0 <= sign_test(0, 100_000) < 1e-300


def test_a_negative_count_is_refused():
    with pytest.raises(UsageError, match="-1"):
        sign_test(-1, 2)


@pytest.mark.parametrize(
    ("n", "alpha", "low", "high", "coverage"),
    [  # ranks of the tables for the median (Conover): n = 10: 2 and 9 with 0.9785; n = 20: 6 and 15 with 0.9586
        (10, 0.05, 2, 9, 0.978515625),
        (20, 0.05, 6, 15, 0.958610534668),
        (6, 0.05, 1, 6, 0.96875),
        (5, 0.05, 1, 5, 0.9375),  # too few for 95 %: the range, and what it covers
        (1, 0.05, 1, 1, 0.0),
    ],
)
def test_the_interval_of_the_median_gives_the_ranks_of_the_tables(n, alpha, low, high, coverage):
    values = random.Random(0).sample(range(1, n + 1), n)
    assert median_interval(values, alpha) == (low, high, pytest.approx(coverage, rel=1e-10))


@pytest.mark.parametrize("n", [8, 9, 31, 60])
def test_the_interval_and_the_sign_test_agree(n):
    for wins in range(n + 1):
        ratios = np.r_[np.linspace(0.5, 0.9, wins), np.linspace(1.1, 2, n - wins)]
        low, high, _ = median_interval(ratios, 0.01)
        assert (sign_test(wins, n - wins) <= 0.01) == (not low < 1 < high)


@pytest.mark.parametrize(("values", "alpha"), [([], 0.05), ([1.0], 0.0), ([1.0], 1.0)])
def test_an_interval_of_nothing_is_refused(values, alpha):
    with pytest.raises(UsageError, match="alpha"):
        median_interval(values, alpha)


def test_twice_the_work_is_slower_and_half_of_it_faster_however_the_machine_wavers():
    machine = Machine()
    contestants = {"a": machine.work(1.0), "b": machine.work(2.0, threads=2)}
    rng = np.random.default_rng(0)
    machine.slowness = (float(1 + 0.5 * rng.random()) for _ in itertools.count())
    timings = interleave(contestants, rounds=15, clock=machine.clock)
    slower, faster = timings.compare("a", "b"), timings.compare("b", "a")
    assert slower.verdict == "slower"
    assert (slower.wins, slower.losses) == (0, 15)
    assert slower.interval_low <= slower.ratio <= slower.interval_high
    assert slower.quartile_low <= slower.ratio <= slower.quartile_high
    assert slower.interval_low > 1
    assert slower.cpu_ratio == pytest.approx(2 * slower.ratio)
    assert faster.verdict == "faster"
    assert faster.ratio == pytest.approx(1 / slower.ratio)
    assert faster.p_value == slower.p_value == 2 * 0.5**15


def test_a_drift_of_the_machine_cancels_in_the_paired_ratios():
    drift = np.linspace(1, 10, 21)
    found = samples(a=drift, b=1.25 * drift).compare("a", "b")
    assert found.ratio == found.interval_low == found.interval_high == 1.25
    assert found.verdict == "slower"


def test_the_same_work_twice_shows_no_difference():
    machine = Machine()
    rng = np.random.default_rng(1)
    machine.slowness = (float(rng.lognormal(0, 0.3)) for _ in itertools.count())
    found = interleave({"a": machine.work(1), "a again": machine.work(1)}, clock=machine.clock).compare("a", "a again")
    assert found.verdict == "no difference shown"
    assert found.interval_low < 1 < found.interval_high


def test_at_most_alpha_of_the_contests_of_equals_show_a_difference():
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(400):
        wall = rng.lognormal(0, 0.3, (2, 31))
        wrong += samples(a=wall[0], b=wall[1]).compare("a", "b", alpha=0.05).verdict != "no difference shown"
    assert wrong <= 400 * 0.05 * 1.6  # the exact size at n = 31 is 0.029; the seed is fixed


def test_exact_ties_show_no_difference():
    found = samples(a=[1] * 20, b=[1] * 20).compare("a", "b")
    assert (found.wins, found.losses, found.p_value, found.verdict) == (0, 0, 1.0, "no difference shown")


def test_too_few_rounds_give_no_verdict_and_say_what_they_cover():
    found = samples(a=[1] * 7, b=[3] * 7).compare("a", "b")
    assert found.verdict == "no difference shown"
    assert found.coverage == pytest.approx(1 - 2 * 0.5**7)
    assert found.coverage < 1 - found.alpha
    assert samples(a=[1] * 8, b=[3] * 8).compare("a", "b").verdict == "slower"


def test_a_cpu_clock_that_saw_nothing_gives_no_ratio():
    wall = {"a": np.ones(8), "b": np.ones(8)}
    assert Timings(wall, {"a": np.zeros(8), "b": np.ones(8)}).compare("a", "b").cpu_ratio is None


def test_an_unknown_contestant_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="no contestant 'c': there are 'a', 'b'"):
        samples(a=[1], b=[1]).compare("a", "c")
    with pytest.raises(UsageError, match="no contestant 'c'"):
        samples(a=[1], b=[1]).rows("c")


def test_rows_keep_the_order_and_compare_with_the_baseline():
    rows = samples(a=[2] * 9, b=[1] * 9, c=[4] * 9).rows("b")
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert [row.wall_seconds for row in rows] == [2, 1, 4]
    assert rows[1].comparison is None
    assert [row.comparison.ratio for row in rows if row.comparison] == [2, 4]
    assert samples(a=[2] * 9, b=[1] * 9).rows()[0].comparison is None


def test_everything_is_json():
    timings = samples(a=[2, 3] * 4, b=[1, 2] * 4)
    rows = [row.as_dict() for row in timings.rows()]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[1]["comparison"]["verdict"] == "faster"
    whole = timings.as_dict()
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert whole["samples"]["a"]["wall_seconds"] == [2, 3] * 4


def test_the_system_clock_measures_something():
    timings = interleave({"a": lambda: sum(range(100))}, rounds=2, min_seconds=1e-5)
    assert (timings.wall["a"] > 0).all()


def run(code, *arguments, **options) -> ProcessCost:
    return measure_process([sys.executable, "-I", "-S", "-c", code, *arguments], **options)


@needs_wait4
def test_a_process_reports_its_output_exit_code_and_cost():
    cost = run("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (cost.exit_code, cost.stdout, cost.stderr) == (3, "out\n", "err\n")
    assert not cost.ok
    assert not cost.timed_out
    assert cost.wall_seconds > 0
    assert run("pass").ok
    assert json.loads(json.dumps(cost.as_dict())) == cost.as_dict()


@needs_wait4
def test_peak_memory_is_the_childs_own():
    ballast = b"x" * 300_000_000  # a child must not inherit this, though fork, vfork and posix_spawn let it
    small = run("pass").peak_mb
    large = run("block = b'x' * 200_000_000").peak_mb
    assert len(ballast) / 1e6 > large > 200 > 100 > small > 0


@needs_wait4
def test_what_a_childs_own_child_takes_is_counted():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', sys.argv[1]], check=True)"
    assert run(code, "block = b'x' * 200_000_000").peak_mb > 200


@needs_wait4
def test_a_busy_child_has_cpu_seconds():
    assert run("sum(range(300_000))").cpu_seconds > 0


@needs_wait4
def test_more_output_than_a_pipe_holds_blocks_nobody():
    cost = run("import sys; sys.stdout.write('o' * 1_000_000); sys.stderr.write('e' * 1_000_000)")
    assert (len(cost.stdout), len(cost.stderr)) == (1_000_000, 1_000_000)


@needs_wait4
def test_a_timeout_is_reported_and_ends_the_childs_children_too():
    cost = measure_process(["sh", "-c", "sleep 600 & echo $!; wait"], timeout=2)
    assert cost.timed_out
    assert not cost.ok
    assert cost.exit_code == -9
    assert cost.peak_mb > 0
    if Path("/proc/self/stat").exists():
        stat = Path("/proc", cost.stdout.strip(), "stat")
        assert not stat.exists() or stat.read_text().split()[2] in "ZX"  # gone, or dead and not yet collected


@needs_wait4
def test_a_signal_is_a_negative_exit_code_and_no_timeout():
    cost = run("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", timeout=60)
    assert (cost.exit_code, cost.timed_out) == (-15, False)


@needs_wait4
def test_the_environment_and_the_folder_are_those_given(tmp_path):
    code = "import os; print(os.getcwd(), sorted(os.environ.items()), os.read(0, 9))"
    env = {"ONE": "1", "LC_CTYPE": "C.UTF-8"}
    cost = run(code, env=env, cwd=tmp_path)
    assert cost.stdout == f"{tmp_path.resolve()} {sorted(env.items())} b''\n"


@needs_wait4
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ([], {}, "program and its arguments"),
        ("ls -l", {}, "program and its arguments"),
        (["no-such-program-here"], {}, "'no-such-program-here': it is not on the PATH"),
        (["/no/such/program"], {}, "'/no/such/program': No such file"),
        ([sys.executable], {"cwd": "/no/such/folder"}, "no such folder"),
        ([sys.executable], {"timeout": 0}, "timeout"),
    ],
)
def test_what_cannot_run_is_refused(command, options, message):
    with pytest.raises(UsageError, match=message):
        measure_process(command, **options)
