"""kill -9 at random moments of builds that replace one bundle by another; then count what is neither the old nor the new.

    python -m benchmarks.kills --kills 200

Half of the kills come at a random time, to the process group of ``graphopt build``; the other half at a random one of the file operations
on the bundle's folder and its neighbours (Python's audit events), since that is where a mix could come from and time alone seldom meets it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import graphopt
from graphopt.staging import MANIFEST, recover

_MODEL: Final = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N,3] x) => (float[N,3] y) { a = Identity (x)  b = Relu (a)  y = Relu (b) }"""
_BUILDS: Final = (("-O1", "-t", "ort:cpu"), ("-O3", "-t", "ort:cpu", "-t", "ort:cuda"))  # other bytes, and other files
_HOOKED: Final = """
import os, signal, sys
left = int(sys.argv[1])
def hook(event, arguments):
    global left
    if event[:3] in ("os.", "shu", "ope") and any(p in str(a) for a in arguments[:2] for p in ("bundle", ".graphopt-")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from graphopt.cli import run
code = run(sys.argv[2:])
print(int(sys.argv[1]) - left, file=sys.stderr)
sys.exit(code)
"""


def state(out: Path) -> str:
    """What the folder holds: a digest of the manifest where all files are as it says, else what is wrong."""
    with contextlib.suppress(OSError):
        recover(out)
    try:
        text = (out / MANIFEST).read_bytes()
    except FileNotFoundError:
        return "no manifest"
    files = {f["name"]: f["sha256"] for v in json.loads(text)["variants"] for f in v["files"]}
    present = {p.name for p in out.iterdir()}
    if present != {MANIFEST, *files}:
        return f"files {sorted(present)}, manifest {sorted(files)}"
    for name, digest in files.items():
        if hashlib.sha256((out / name).read_bytes()).hexdigest() != digest:
            return f"{name} is another than the manifest says"
    return hashlib.sha256(text).hexdigest()


def run(kills: int, home: Path, seed: int = 0) -> tuple[int, list[str]]:
    """Kill `kills` builds in `home`; returns how many met a running build, and every state that was neither the old nor the new."""
    rng = random.Random(seed)
    (home / "m.onnxtxt").write_text(_MODEL)
    out = home / "out" / "bundle"
    environment = {
        **os.environ,
        "GRAPHOPT_CACHE": str(home / "cache"),
        "PYTHONPATH": str(Path(graphopt.__file__).parents[1]),
    }
    quiet: dict[str, Any] = {"cwd": home, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}

    def arguments(build: tuple[str, ...]) -> list[str]:
        return ["build", "m.onnxtxt", "-o", "out/bundle", *build]

    good: dict[str, int] = {}  # state -> which build makes it
    seconds, operations = 0.0, 0
    for _ in range(2):  # the second time from the cache
        for which, build in enumerate(_BUILDS):
            start = time.monotonic()
            subprocess.run([sys.executable, "-m", "graphopt.cli", *arguments(build)], check=True, **quiet)
            seconds = time.monotonic() - start
            good[state(out)] = which
    for build in _BUILDS:
        command = [sys.executable, "-c", _HOOKED, "1000000000", *arguments(build), "--no-isolate"]
        operations = int(subprocess.run(command, check=True, text=True, **quiet).stderr.split()[-1])
    assert len(good) == 2, good
    mixed, met, holds = [], 0, 1
    for number in range(kills):
        command = arguments(_BUILDS[1 - holds])
        if number % 2:
            at = rng.randint(1, operations)
            hooked = [sys.executable, "-c", _HOOKED, str(at), *command, "--no-isolate"]
            killed = subprocess.run(hooked, check=False, **quiet).returncode == -signal.SIGKILL
        else:
            process = subprocess.Popen(
                [sys.executable, "-m", "graphopt.cli", *command], start_new_session=True, **quiet
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, seconds))
            killed = process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        met += killed
        found = state(out)
        if found not in good:
            mixed.append(found)
        holds = good.get(found, holds)
    subprocess.run([sys.executable, "-m", "graphopt.cli", *arguments(_BUILDS[0]), "--no-cache"], check=True, **quiet)
    left = sorted(p.name for p in out.parent.iterdir() if p.name.startswith(".graphopt"))
    return met, [*mixed, *(f"{name} was left behind" for name in left)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graphopt-kills-") as home:
        met, mixed = run(options.kills, Path(home), options.seed)
    for found in mixed:
        print(found)
    print(f"{options.kills} kills ({met} met a running build), {len(mixed)} mixed")
    return int(bool(mixed))


if __name__ == "__main__":
    sys.exit(main())
