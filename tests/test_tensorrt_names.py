"""Every TensorRT name that the backend uses exists in 10.16, 11.4 and RTX 1.7, or stands in its table `ONLY_IN`.

Enterprise TensorRT cannot be installed where these tests run, so its names are checked against a list that
``data/make_tensorrt_names.py`` made from the real bindings. The check reads the source: which name is used on an object of
which class follows from the variable that holds it, so that one variable name stands for one class throughout the file.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from graphopt.backends import (
    _cuda_buffers,
    _tensorrt_kernels,
    _tensorrt_log,
    _tensorrt_profile,
    _tensorrt_refusals,
    _tensorrt_session,
    tensorrt,
)

DATA = Path(__file__).parent / "data"

VARIABLES = {  # variable -> the TensorRT class that it holds; "" for plain values that TensorRT returns
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "plan": "IHostMemory",
    "cache": "ITimingCache",
    "parsed": "",
    "fault": "ParserError",
    "tensor": "ITensor",
    "layer": "ILayer",
    "loader": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "name": "",
    "d": "",
    "missing": "",
}

# Methods that Python overrides without the bindings listing them; from the docstring of trt.IOutputAllocator in all three.
CALLBACKS = {"IOutputAllocator": {"reallocate_output", "reallocate_output_async", "notify_shape"}}


def _load_names() -> dict[str, set[str]]:
    spec = importlib.util.spec_from_file_location("make_tensorrt_names", DATA / "make_tensorrt_names.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.expand((DATA / "tensorrt_names.json").read_text())


NAMES = _load_names()


def _holder(node: ast.expr) -> str | None:
    """The variable of ``variable``, ``self.variable`` and ``built.variable``."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _chain(node: ast.expr) -> list[str] | None:
    """``trt.A.B`` -> ["A", "B"]."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return parts if isinstance(node, ast.Name) and node.id == "trt" and parts else None


def used_names(source: str) -> set[str]:
    """``Class``, ``Class.member`` and ``Enum.MEMBER`` that the source uses.

    Raises:
        AssertionError: a variable takes something from TensorRT and is not in `VARIABLES`.
    """
    tree = ast.parse(source)
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := _chain(node)) is not None:
            used.update(".".join(chain[: i + 1]) for i in range(len(chain)) if not chain[i].startswith("__"))
        elif isinstance(node, ast.Attribute) and (owner := VARIABLES.get(_holder(node.value) or "")):
            used.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if (chain := _chain(base)) is not None:
                    methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef) and m.name != "__init__"}
                    used.update(f"{chain[0]}.{m}" for m in methods - CALLBACKS.get(chain[0], set()))
        value: ast.expr | None = None
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            value, targets = node.value, node.targets
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign):
            value, targets = node.value, [node.target]
        elif isinstance(node, ast.For | ast.comprehension):
            value, targets = node.iter, [node.target]
        if isinstance(value, ast.IfExp):
            value = value.body
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
            continue
        if _chain(value.func) or VARIABLES.get(_holder(value.func.value) or ""):
            parts = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
            for part in parts:
                assert _holder(part) in VARIABLES, (
                    f"line {part.lineno}: name the class of {ast.unparse(part)} in VARIABLES"
                )
    # Nothing from TensorRT may be fetched by a computed name, but for the compute capabilities, which `_capabilities` checks.
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner = _chain(node.args[0])
            assert owner in (None, ["ComputeCapability"]), f"line {node.lineno}: getattr on trt.{'.'.join(owner or [])}"
    return used


def missing(source: str) -> dict[str, list[str]]:
    """Name -> the versions that lack it, exceptions in `ONLY_IN` left out."""
    lacking = {name: [v for v, known in NAMES.items() if name not in known] for name in sorted(used_names(source))}
    return {name: versions for name, versions in lacking.items() if versions and name not in tensorrt.ONLY_IN}


MODULES = (tensorrt, _tensorrt_kernels, _tensorrt_log, _tensorrt_profile, _tensorrt_refusals, _tensorrt_session)
SOURCE = "".join(Path(module.__file__).read_text() for module in MODULES)


def test_every_name_exists_in_every_version() -> None:
    assert missing(SOURCE) == {}
    assert missing(Path(_cuda_buffers.__file__).read_text()) == {}


def test_the_check_sees_the_names_that_matter() -> None:
    used = used_names(SOURCE)
    assert len(used) > 70
    assert {
        "Builder.build_serialized_network",
        "IBuilderConfig.add_optimization_profile",
        "BuilderFlag.TF32",
        "ParserError.local_function_stack",
        "ITensor.is_shape_tensor",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_tensor_location",
        "IProgressMonitor.step_complete",
        "ILogger.log",
    } <= used


@pytest.mark.parametrize(("old", "new", "name"), [
    ("builder.build_serialized_network(", "builder.build_engine_fast(", "Builder.build_engine_fast"),
    ("trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
    ("self.context.infer_shapes(", "self.context.infer_shape(", "IExecutionContext.infer_shape"),
    ("def step_complete(", "def step_done(", "IProgressMonitor.step_done"),
])  # fmt: skip
def test_a_made_up_or_dropped_name_is_caught(old: str, new: str, name: str) -> None:
    assert old in SOURCE
    assert name in missing(SOURCE.replace(old, new))


def test_a_name_of_one_version_alone_is_caught_with_the_versions_that_lack_it() -> None:
    source = "builder.platform_has_fast_fp16\n"
    assert missing(source) == {"Builder.platform_has_fast_fp16": ["tensorrt-11.4", "tensorrt_rtx-1.7"]}


def test_a_variable_of_unknown_class_is_caught() -> None:
    with pytest.raises(AssertionError, match="name the class of refitter in VARIABLES"):
        used_names("refitter = trt.Refitter(engine, logger)\n")


def test_a_computed_name_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"getattr on trt\.BuilderFlag"):
        used_names("flag = getattr(trt.BuilderFlag, name)\n")


def test_the_table_of_exceptions_tells_the_truth() -> None:
    used = used_names(SOURCE)
    for name, versions in tensorrt.ONLY_IN.items():
        assert tuple(v for v, known in NAMES.items() if name in known) == versions
        assert name in used, f"{name} is not used any more"


def test_the_list_of_names_agrees_with_the_installed_package() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (Linux x86-64 only)")
    if not trt.__version__.startswith("1.7."):
        pytest.skip(f"the list is of 1.7, {trt.__version__} is installed")
    for name in sorted(NAMES["tensorrt_rtx-1.7"]):
        found = trt
        for part in name.split("."):
            found = getattr(found, part)


def test_every_name_of_cuda_python_exists_in_the_installed_package() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    source = Path(_cuda_buffers.__file__).read_text()
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "CudaPython")
    names = {n.attr for n in ast.walk(body) if isinstance(n, ast.Attribute) and n.attr.startswith(("cu", "CU"))} - {
        "current"
    }
    assert "cuMemcpyDtoHAsync" in names
    attributes = {name for name in names if name.startswith("CU_DEVICE_ATTRIBUTE")}
    results = {name for name in names if name.startswith("CUDA_")}
    assert [n for n in sorted(names - attributes - results) if not hasattr(driver, n)] == []
    assert [n for n in sorted(attributes) if not hasattr(driver.CUdevice_attribute, n)] == []
    assert [n for n in sorted(results) if not hasattr(driver.CUresult, n)] == []
