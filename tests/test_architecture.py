"""Who may import whom (ARCHITECTURE section 2), held by walking the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import graphopt

ROOT = Path(__file__).parents[1]
COMMANDS = sorted([ROOT / "graphopt/cli.py", *(ROOT / "graphopt/commands").glob("*.py")])
CORE = sorted({*(ROOT / "graphopt").glob("*.py"), *(ROOT / "graphopt/analyses").glob("*.py")} - set(COMMANDS))
PASSES, BACKENDS, MODELS = (sorted((ROOT / room).glob("*.py")) for room in ("passes", "backends", "models"))
ROOMS = ("graphopt.passes", "graphopt.backends", "graphopt.models")
RUNTIMES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda", "cuda", "torch", "onnxruntime_extensions"}
THIRD_PARTY = {"onnx", "onnx_graphsurgeon", "numpy", "ml_dtypes", "google"}
COMMAND_LINE = {"typer", "rich", "click"}
REPORT = {"jinja2", "markupsafe", "matplotlib"}


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Module, whether it is imported where the file is read (not in a function, not for types), and line."""

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, now, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name}:{child.lineno}: relative import"
                for alias in child.names:
                    name = (
                        f"{child.module}.{alias.name}"
                        if child.module in ("graphopt", *ROOMS, "graphopt.analyses")
                        else str(child.module)
                    )
                    yield name, now, child.lineno
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from walk(
                child,
                now and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not typing_only,
            )

    yield from walk(ast.parse(path.read_text()), True)


def of(module: str, *tops: str) -> bool:
    return any(module == top or module.startswith(f"{top}.") for top in tops)


def known(module: str, allowed: set[str]) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in allowed


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_core_names_no_pass_no_backend_and_no_runtime_at_import(path: Path) -> None:
    for module, now, line in imports(path):
        where = f"{path.name}:{line} imports {module}"
        assert not of(module, "graphopt.passes", "graphopt.backends"), where
        assert not of(module, "graphopt.models") or not now, where
        assert not of(module, "graphopt.cli", "graphopt.commands"), where
        assert known(module, {"graphopt"} | THIRD_PARTY | COMMAND_LINE | (set() if now else RUNTIMES | REPORT)), where


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.name)
def test_commands_import_at_once_only_what_help_needs(path: Path) -> None:
    light = ("graphopt.commands", "graphopt.errors")
    for module, now, line in imports(path):
        where = f"{path.name}:{line} imports {module}"
        assert not of(module, "graphopt.passes", "graphopt.backends"), where
        assert not now or of(module, *light) or known(module, COMMAND_LINE), where


@pytest.mark.parametrize("path", PASSES, ids=lambda p: p.name)
def test_a_pass_imports_the_core_only(path: Path) -> None:
    for module, _, line in imports(path):
        where = f"{path.name}:{line} imports {module}"
        assert not of(
            module,
            *ROOMS,
            "graphopt.evaluate",
            "graphopt.pipeline",
            "graphopt.discovery",
            "graphopt.cli",
            "graphopt.commands",
        ), where
        assert known(module, {"graphopt"} | THIRD_PARTY), where


@pytest.mark.parametrize("path", BACKENDS, ids=lambda p: p.name)
def test_a_backend_imports_the_core_and_its_runtime_inside_functions(path: Path) -> None:
    for module, now, line in imports(path):
        where = f"{path.name}:{line} imports {module}"
        helper = of(module, "graphopt.backends") and module.split(".")[2].startswith("_")
        assert helper or not of(module, *ROOMS, "graphopt.cli", "graphopt.commands"), where
        assert known(module, {"graphopt"} | THIRD_PARTY | (set() if now else RUNTIMES)), where


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_models_import_the_ir_at_most(path: Path) -> None:
    for module, _, line in imports(path):
        where = f"{path.name}:{line} imports {module}"
        assert not of(module, "graphopt") or of(module, "graphopt.ir") or path.name == "train.py", where
        assert path.name == "train.py" or known(module, {"graphopt"} | THIRD_PARTY), where


@pytest.mark.parametrize("room", ["passes", "backends"])
def test_rooms_hold_a_docstring_only_and_are_linked(room: str) -> None:
    (statement,) = ast.parse((ROOT / room / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert (ROOT / "graphopt" / room).is_symlink()
    assert (ROOT / "graphopt" / room).resolve() == ROOT / room


def loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_graphopt_loads_no_runtime_and_not_even_onnx() -> None:
    assert not {"onnx", "onnxruntime", "numpy", "tensorrt", "typer"} & loaded("import graphopt")


def test_running_exact_passes_that_compute_nothing_loads_no_runtime() -> None:
    code = """
from graphopt import Pipeline, parse
from graphopt.discovery import find_pass, pass_modules
for name in pass_modules(): find_pass(name)
Pipeline.parse("eliminate-dead,infer-shapes").run(parse("g (float[2] x) => (float[2] y) { y = Relu (x) }"))
"""
    assert not RUNTIMES & loaded(code)


def test_public_names_are_few_and_all_there() -> None:
    assert len(graphopt.__all__) <= 15
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None
        assert name in dir(graphopt)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        graphopt.nonsense  # noqa: B018


def test_every_core_module_says_what_it_is() -> None:
    for path in [*CORE, *COMMANDS, *PASSES, *BACKENDS, *MODELS]:
        assert ast.get_docstring(ast.parse(path.read_text())), path
