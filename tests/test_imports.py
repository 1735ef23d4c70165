"""What is imported when: the help and `import graphopt` stay light, runtimes come with the call that needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import graphopt

ROOT = Path(graphopt.__file__).parent.parent
HEAVY = ("numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "ml_dtypes", "google.protobuf", "tensorrt", "tensorrt_rtx",
         "cuda", "pycuda", "torch", "scipy", "sklearn")  # fmt: skip


def loaded_after(code: str) -> set[str]:
    """Names of HEAVY modules that a fresh Python holds after running `code`."""
    code += f"\nimport sys\nsys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def command(*arguments: str) -> str:
    return f"from graphopt.cli import run\nassert run({list(arguments)!r}) == 0"


def test_importing_graphopt_loads_neither_onnx_nor_a_runtime() -> None:
    assert loaded_after("import graphopt\nassert 'build' in dir(graphopt) and graphopt.__version__") == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["build", "--help"], ["opt", "--help"], ["bench", "--help"]], ids=" ".join
)
def test_help_loads_neither_onnx_nor_a_runtime(arguments: list[str]) -> None:
    assert loaded_after(command(*arguments)) == set()


def test_errors_and_targets_load_nothing_heavy() -> None:
    assert loaded_after("from graphopt import UserError, Target\nTarget.parse('ort:cpu')") == set()


def test_every_public_name_is_there_and_is_what_it_says() -> None:
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None
    assert len(graphopt.__all__) <= 15
    assert callable(graphopt.build)
    assert callable(graphopt.compare)
    with pytest.raises(AttributeError, match="has no attribute 'biuld'"):
        _ = graphopt.biuld  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [
    command("passes"),
    command("passes", "fuse-conv-bn"),
    "import graphopt\ngraphopt.load",
    "from graphopt.discovery import backends\nbackends()",
    "from graphopt import bundle, building",
], ids=["passes", "passes NAME", "load", "backends", "modules"])  # fmt: skip
def test_runtimes_wait_for_the_call_that_needs_them(code: str) -> None:
    assert loaded_after(code) & {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "pycuda"} == set()


EACH_ALONE = """
import os, sys, traceback
import numpy, onnx, onnx_graphsurgeon, rich, typer  # once, since they take most of the time
failed = 0
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
            assert "onnxruntime" not in sys.modules, f"{name} imports onnxruntime"
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed != 0)
"""


def test_every_module_imports_alone() -> None:
    """No order of imports is needed, so no two modules wait for each other."""
    rooms = {"graphopt": "graphopt", "graphopt/passes": "graphopt.passes", "graphopt/backends": "graphopt.backends"}
    names = [f"{package}.{p.stem}" for room, package in rooms.items() for p in sorted((ROOT / room).glob("*.py"))]
    names = [n for n in names if not n.endswith("__init__")]
    assert len(names) > 25
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EACH_ALONE, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
