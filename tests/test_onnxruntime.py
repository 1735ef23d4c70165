"""The ONNX Runtime backend: providers by name, plug-ins, options that arrive, types that NumPy lacks, errors in our words."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graphopt import ir
from graphopt.backend import Artifact, BuildOptions, ShapeRange
from graphopt.backends import onnxruntime as backend
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.errors import BackendUnavailable, InvalidModel, ShapeError, UnknownTarget, UnsupportedModel, UsageError
from graphopt.target import Target

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'
RELU = HEADER + "g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }"


def emit(text: str, folder: Path, target: str = "ort:cpu", **options: Any) -> Artifact:
    return OnnxRuntime().emit(ir.parse(text), Target.parse(target), folder, BuildOptions(**options))


def opened(text: str, folder: Path, target: str = "ort:cpu", **options: Any) -> Any:
    artifact = emit(text, folder, target)
    return OnnxRuntime().open(folder, artifact, Target.parse(target), BuildOptions(**options))


# ------------------------------------------------------------------------------------------------------------ providers


@pytest.mark.parametrize("target", ["ort", "ort:cpu", "ort:cpu-avx2", "ort:CPU", "ort:CPUExecutionProvider"])
def test_the_cpu_goes_by_several_names(target: str, tmp_path: Path) -> None:
    session = opened(RELU, tmp_path, target)
    assert session._session.get_providers() == ["CPUExecutionProvider"]


def test_an_unknown_provider_is_answered_with_those_here(tmp_path: Path) -> None:
    with pytest.raises(UnknownTarget, match=r"target 'ort:npu': no execution provider 'npu'; here are: .*cpu"):
        emit(RELU, tmp_path, "ort:npu")


def test_a_provider_that_exists_elsewhere_says_how_to_get_it(tmp_path: Path) -> None:
    artifact = emit(RELU, tmp_path, "ort:cuda")
    assert artifact.remarks[0].startswith("not loaded here: provider 'cuda' is not in this onnxruntime")
    with pytest.raises(BackendUnavailable, match=r"pip uninstall onnxruntime, then pip install onnxruntime-gpu"):
        OnnxRuntime().open(tmp_path, artifact, Target.parse("ort:cuda"), BuildOptions())


def test_a_provider_that_does_not_start_is_no_silent_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit(RELU, tmp_path)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    class Session:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            assert options["providers"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    with pytest.raises(BackendUnavailable, match="CUDAExecutionProvider does not start here"):
        OnnxRuntime().open(tmp_path, Artifact(("ort-cpu.onnx",), {}), Target.parse("ort:cuda"), BuildOptions())


def test_without_onnxruntime_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    state = OnnxRuntime().availability("ort")
    assert state.version is None
    assert state.build is not None
    assert state.build == state.run
    assert "pip install onnxruntime (CPU) or, in its place, onnxruntime-gpu (CUDA)" in state.build


def test_availability_lists_the_providers() -> None:
    state = OnnxRuntime().availability("ort")
    assert state.version == ort.__version__
    assert (state.build, state.run) == (None, None)
    assert "CPUExecutionProvider" in state.devices


# -------------------------------------------------------------------------------------------------------------- plug-ins


class Distribution:
    def __init__(self, name: str) -> None:
        self.name = name


class Device:
    def __init__(self, name: str) -> None:
        self.ep_name = name


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """An installed onnxruntime-ep-foo that offers FooExecutionProvider; gives the libraries registered."""
    registered: list[tuple[str, str]] = []
    module = types.ModuleType("onnxruntime_ep_foo")
    module.get_library_path = lambda: "/lib/foo.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_foo", module)
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda: [Distribution("numpy"), Distribution("OnnxRuntime-EP-Foo")]
    )
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *a: registered.append(a), raising=False)
    devices = [Device("CPUExecutionProvider"), Device("FooExecutionProvider"), Device("FooExecutionProvider")]
    monkeypatch.setattr(ort, "get_ep_devices", lambda: devices if registered else devices[:1], raising=False)
    backend._plugins.cache_clear()
    yield registered
    backend._plugins.cache_clear()


def test_an_installed_plug_in_is_registered_once_and_listed(plugin: list[tuple[str, str]]) -> None:
    for _ in range(2):
        assert "FooExecutionProvider" in OnnxRuntime().availability("ort").devices
    assert plugin == [("onnxruntime-ep-foo", "/lib/foo.so")]


@pytest.mark.parametrize("name", ["foo", "Foo", "FooExecutionProvider"])
def test_a_plug_in_gets_all_its_devices(name: str, plugin: list[tuple[str, str]]) -> None:
    given: list[Any] = []

    class Settings:
        def add_provider_for_devices(self, devices: list[Device], options: dict[str, str]) -> None:
            given.extend(devices)

    assert backend._select(Target.parse(f"ort:{name}"), Settings()) == ("FooExecutionProvider", {})
    assert [d.ep_name for d in given] == ["FooExecutionProvider"] * 2


def test_a_plug_in_that_started_is_not_mistaken_for_one_that_did_not(
    plugin: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit(RELU, tmp_path)
    started = ["FooExecutionProvider", "CPUExecutionProvider"]

    class Session:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            assert "providers" not in options

        def get_providers(self) -> list[str]:
            return started

        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    class Settings:
        def add_provider_for_devices(self, devices: list[Device], options: dict[str, str]) -> None:
            assert devices

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "SessionOptions", Settings)
    artifact = Artifact(("ort-cpu.onnx",), {})
    OnnxRuntime().open(tmp_path, artifact, Target.parse("ort:foo"), BuildOptions())
    started.remove("FooExecutionProvider")
    with pytest.raises(BackendUnavailable, match="FooExecutionProvider does not start here"):
        OnnxRuntime().open(tmp_path, artifact, Target.parse("ort:foo"), BuildOptions())


def test_a_broken_plug_in_is_warned_of_and_leaves_the_cpu(
    plugin: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(ort, "register_execution_provider_library", refuse)
    assert "CPUExecutionProvider" in OnnxRuntime().availability("ort").devices
    assert "onnxruntime-ep-foo cannot be registered: no such device" in caplog.text
    assert opened(RELU, tmp_path).run({"x": np.ones((1, 3), np.float32)}).keys() == {"y"}


def test_an_onnxruntime_without_plug_ins_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ort, "register_execution_provider_library", raising=False)
    backend._plugins.cache_clear()
    assert backend._plugins() == {}
    backend._plugins.cache_clear()


# --------------------------------------------------------------------------------------------------------------- options


def test_options_reach_the_session(tmp_path: Path) -> None:
    settings = opened(RELU, tmp_path, threads=3, graph_level="basic", spinning=False)._session.get_session_options()
    assert settings.intra_op_num_threads == 3
    assert settings.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_without_options_the_runtime_decides(tmp_path: Path) -> None:
    settings = opened(RELU, tmp_path)._session.get_session_options()
    assert settings.intra_op_num_threads == 0
    assert settings.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def test_an_unknown_graph_level_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="graph level 'max' is none of disabled, basic, extended, all"):
        emit(RELU, tmp_path, graph_level="max")
    assert list(tmp_path.iterdir()) == []


def test_shapes_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="dimension 1 is fixed to 3"):
        emit(RELU, tmp_path, shapes={"x": ShapeRange((1, 4), (1, 4), (1, 4))})
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- what is written


def test_the_model_written_is_portable_and_valid(tmp_path: Path) -> None:
    artifact = emit(RELU, tmp_path)
    assert artifact.files == ("ort-cpu.onnx",)
    assert artifact.versions == {"onnxruntime": ort.__version__}
    onnx.checker.check_model(str(tmp_path / "ort-cpu.onnx"), full_check=True)
    assert {n.domain for n in onnx.load(tmp_path / "ort-cpu.onnx").graph.node} == {""}


def test_an_invalid_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"onnx\.checker: "):
        emit(HEADER + "g (float[N] x) => (float[N] y) { y = Relu (x, x) }", tmp_path)


def test_operators_that_only_onnxruntime_knows_are_remarked(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\ng (float[N] x) => (float[N] y) { y = com.microsoft.Gelu (x) }'
    artifact = emit(text, tmp_path)
    assert all("onnx.checker does not know" in remark for remark in artifact.remarks)


def test_a_model_that_onnxruntime_refuses_is_named_with_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20, "acme" : 1]>\ng (float[N] x) => (float[N] y) { y = acme.Blur (x) }'
    with pytest.raises(
        UnsupportedModel, match=r"ONNX Runtime \d\S+ refuses 'ort-cpu.onnx': .*acme.*Blur.*; \w+"
    ) as caught:
        emit(text, tmp_path)
    assert "[ONNXRuntimeError]" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("text", "advice"), [
    ("ONNX Runtime only *guarantees* support for models stamped with official released onnx opset versions. Opset 99", "upgrade"),
    ("Unsupported model IR version: 99, max supported IR version: 13", "upgrade onnxruntime, or convert the model down"),
    ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model failed", "export or copy the model again"),
    ("something else", "graphopt inspect"),
])  # fmt: skip
def test_each_refusal_has_its_advice(text: str, advice: str) -> None:
    assert advice in backend._advice(RuntimeError(text))


def test_reasons_lose_codes_and_source_places() -> None:
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'r' Status Message: "
        "/onnxruntime_src/core/reshape_helper.h:49 onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, "
        "bool) input_shape_size == requested was false. The input tensor cannot be reshaped."
    )
    assert backend._reason(RuntimeError(text)) == (
        "Non-zero status code returned while running Reshape node. Name:'r' Status Message: "
        "input_shape_size == requested was false. The input tensor cannot be reshaped"
    )


# --------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"]
)
def test_every_type_goes_in_and_comes_out(dtype: str, tmp_path: Path) -> None:
    name = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    session = opened(HEADER + f"g ({name}[N,2] x) => ({name}[N,2] y) {{ y = Identity (x) }}", tmp_path)
    x = np.array([[0, 1], [1, 0], [1, 1]]).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    assert [str(s) for s in session.inputs] == [f"{dtype}[N,2] x"]
    for array in (x, np.asfortranarray(x), x[::2], x[:0]):
        y = session.run({"x": array})["y"]
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, array)


@pytest.mark.parametrize("dtype", ["float8e4m3fn", "float8e5m2"])
def test_8_bit_floats_go_in_and_come_out(dtype: str, tmp_path: Path) -> None:
    session = opened(HEADER + f"g ({dtype}[2] x) => ({dtype}[2] y) {{ y = Identity (x) }}", tmp_path)
    x = np.array([1, -0.5]).astype(ir.numpy_dtype(getattr(onnx.TensorProto, dtype.upper())))
    assert session.inputs[0].dtype == ir.dtype_name(x.dtype)
    y = session.run({"x": x})["y"]
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))


def test_strings_go_in_and_come_out(tmp_path: Path) -> None:
    session = opened(HEADER + "g (string[N] x) => (string[N] y) { y = Identity (x) }", tmp_path)
    assert session.run({"x": np.array(["a", "bc"], object)})["y"].tolist() == ["a", "bc"]
    assert session.run({"x": np.array(["a", "bc"])})["y"].tolist() == ["a", "bc"]


def test_scalars_and_outputs_of_any_shape(tmp_path: Path) -> None:
    session = opened(HEADER + "g (float x) => (float y, int64[N] z) { y = Relu (x)  z = Shape (x) }", tmp_path)
    found = session.run({"x": np.array(-1, np.float32)})
    assert found["y"].shape == ()
    assert found["z"].shape == (0,)


@pytest.mark.parametrize(("feeds", "error", "told"), [
    ({}, UsageError, r"missing \['x'\]; it takes float32\[N,3\] x"),
    ({"x": np.ones((1, 3), np.float32), "z": np.ones(1)}, UsageError, r"unknown \['z'\]"),
    ({"x": np.ones((1, 3))}, UsageError, r"input 'x' is float64, the model takes float32\[N,3\] x; convert it with .astype"),
    ({"x": np.ones(3, np.float32)}, ShapeError, r"input 'x' has shape \[3\], the model takes float32\[N,3\] x"),
    ({"x": np.ones((1, 4), np.float32)}, ShapeError, r"input 'x' has shape \[1, 4\]"),
])  # fmt: skip
def test_feeds_that_do_not_fit_are_refused(feeds: Any, error: type[Exception], told: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=told):
        opened(RELU, tmp_path).run(feeds)


def test_a_run_that_fails_says_which_node(tmp_path: Path) -> None:
    session = opened(HEADER + "g (float[N] x, int64[2] s) => (float[P,Q] y) { [shape] y = Reshape (x, s) }", tmp_path)
    with pytest.raises(UsageError, match=r"ONNX Runtime failed on these inputs: .*'shape'.*cannot be reshaped"):
        session.run({"x": np.ones(5, np.float32), "s": np.array([2, 3])})
