"""The same inputs give the same bytes: in other processes, folders and locales, with other hash seeds and numbers of threads."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt import models

ROOT = Path(__file__).parents[1]
NETS = Path(models.__file__).resolve().parent
ELSEWHERE: dict[str, dict[str, str]] = {
    "one thread": {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C"},
    "many threads": {"PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "7", "OPENBLAS_NUM_THREADS": "7", "LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo"},
}  # fmt: skip


def bundle(folder: Path, environment: dict[str, str], *arguments: str, one_cpu: bool = False) -> dict[str, bytes]:
    """Build a copy of a network in `folder`, without a cache, in a process of its own."""
    folder.mkdir(parents=True)
    shutil.copy(NETS / "vit.dynamo.onnx", folder / "net.onnx")
    command = [sys.executable, "-m", "graphopt.cli", "build", "net.onnx", "-o", "out", "--no-cache", *arguments]

    def pin() -> None:
        if one_cpu and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    settings = {**os.environ, **environment, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}
    done = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, timeout=300, check=False, preexec_fn=pin
    )
    assert done.returncode == 0, done.stderr
    return {p.name: p.read_bytes() for p in sorted((folder / "out").iterdir())}


@pytest.mark.parametrize("arguments", [
    ("-t", "ort:cpu"),
    ("-t", "ort:cpu", "--prune", "0.2", "--data", str(NETS / "digits.npz")),
    ("-t", "ort:cpu", "--int8", "--no-gate", "--data", str(NETS / "digits.npz")),
], ids=["default", "prune", "int8"])  # fmt: skip
def test_models_for_onnx_runtime(arguments: tuple[str, ...], tmp_path: Path) -> None:
    if "--data" in arguments:
        import numpy as np

        with np.load(NETS / "digits.npz") as digits:
            np.savez(tmp_path / "d.npz", x=digits["x_calib"][:32])
        arguments = (*arguments[:-1], str(tmp_path / "d.npz"))
    one = bundle(tmp_path / "a", ELSEWHERE["one thread"], *arguments, one_cpu=True)
    many = bundle(tmp_path / "b" / "deep ü", ELSEWHERE["many threads"], *arguments)
    assert list(one) == ["manifest.json", "ort-cpu.onnx"]
    assert one == many


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_engines_of_tensorrt_for_rtx(tmp_path: Path) -> None:
    one = bundle(tmp_path / "a", ELSEWHERE["one thread"], "-t", "tensorrt-rtx:sm89", one_cpu=True)
    many = bundle(tmp_path / "b" / "deep ü", ELSEWHERE["many threads"], "-t", "tensorrt-rtx:sm89")
    assert list(one) == ["manifest.json", "tensorrt-rtx-sm89.engine"]
    assert one == many
