"""A command in a child process: crashes, hangs and limits end in one line that names the step, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphopt import ir, isolation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

MODEL = '<ir_version: 10, opset_import: ["" : 20]> g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }'
READING = "reading the model"  # the first step
CHECKING = "onnx.checker"  # one in which files lie around half written
HANG = "import time; time.sleep(1000)"
SPIN = "while True: pass"
CRASH = "import ctypes; ctypes.string_at(0)"
HOARD = "kept = [bytearray(1 << 28) for _ in range(1000)]"
ABORT = "import os; os.abort()"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def script(where: str, disaster: str, *arguments: str) -> list[str]:
    """A command line in which the step `where` does `disaster`."""
    code = f"""
import sys
from graphopt import cli, isolation
enter = isolation.step.__enter__
def enter_and_fail(step):
    enter(step)
    if step.what == {where!r}:
        {disaster}
isolation.step.__enter__ = enter_and_fail
sys.exit(cli.run({list(arguments)!r}))
"""
    return [sys.executable, "-c", code]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnxtxt"
    path.write_text(MODEL)
    return path


def build(model: Path, disaster: str, *options: str, where: str = READING) -> subprocess.CompletedProcess[str]:
    command = script(where, disaster, "build", str(model), "-o", str(model.parent / "out"), "-t", "ort:cpu", *options)
    environment = {**os.environ, "TMPDIR": str(model.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("disaster", "options", "message"),
    [
        (CRASH, (), "reading the model: native code crashed (SIGSEGV); nothing was written"),
        (ABORT, (), "reading the model: native code crashed (SIGABRT); nothing was written"),
        (KILLED, (), "reading the model: the process was killed, most likely for want of memory; nothing was written"),
        (HANG, ("--step-limit", "2"), "reading the model: no progress for 2 s, stopped; nothing was written"),
        (SPIN, ("--cpu-limit", "2"), "reading the model: the 2 s of CPU time are used up; nothing was written"),
        (HOARD, ("--memory-limit", "600"), "out of memory; the model or a value in it is too large"),
    ],
    ids=["crash", "abort", "killed", "hang", "spin", "hoard"],
)
def test_a_disaster_in_native_code_is_told_in_one_line_and_leaves_nothing(model, disaster, options, message):
    done = build(model, disaster, *options)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in model.parent.iterdir()) == ["m.onnxtxt"]


def test_an_earlier_bundle_survives_a_crash(model):
    fine = build(model, "return None")
    assert fine.returncode == 0, fine.stderr
    before = {p.name: p.read_bytes() for p in (model.parent / "out").iterdir()}
    model.write_text(MODEL.replace("Relu", "Abs"))
    assert build(model, CRASH, where=CHECKING).stderr.startswith("error: onnx.checker: native code crashed")
    assert {p.name: p.read_bytes() for p in (model.parent / "out").iterdir()} == before
    assert sorted(p.name for p in model.parent.iterdir()) == ["m.onnxtxt", "out"]


def test_without_isolation_a_crash_is_a_crash(model):
    assert build(model, CRASH, "--no-isolate").returncode == -signal.SIGSEGV


def test_errors_notes_and_exit_codes_of_the_child_are_the_commands_own(model):
    done = build(model, "return None", "--target", "tensorrt:sm75")
    assert "note: falling back to ort:cpu" in done.stderr
    assert done.returncode == 0
    missing = build(model.parent / "missing.onnx", "return None")
    assert missing.returncode == 1
    assert missing.stderr.endswith("No such file or directory; check the path\n")
    assert build(model, "return None", "--shape", "x=nonsense").returncode == 2


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_child_ends_with_its_parent(model, number):
    note = model.parent / "child"
    disaster = f"import os, pathlib; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); {HANG}"
    command = script(CHECKING, disaster, "build", str(model), "-o", str(model.parent / "out"), "-t", "ort:cpu")
    environment = {**os.environ, "TMPDIR": str(model.parent)}
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as parent:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(note.read_text())
        assert child != parent.pid
        parent.send_signal(number)
        _, told = parent.communicate(timeout=60)
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    if number != signal.SIGKILL:  # which leaves nobody to clean up
        assert parent.returncode == 128 + number
        assert told == ""
        assert sorted(p.name for p in model.parent.iterdir()) == ["child", "m.onnxtxt"]


def test_a_process_that_runs_native_code_already_is_not_forked(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", ir)
    assert isolation.possible() == "this process already runs onnxruntime"


def test_steps_outside_of_a_child_change_nothing(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("content")
    with isolation.step("one"), isolation.step("two"):
        isolation.progress()
        isolation.scratch(kept)
    assert kept.read_text() == "content"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
