"""Verify and ship: what `graphopt verify` catches, and model repositories as Triton itself would read them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt import cli as command_line
from graphopt import ir, models, triton
from graphopt.errors import UnsupportedModel
from graphopt.ir import TensorSpec
from graphopt.target import Target

NETS = Path(models.__file__).resolve().parent
SMALL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N,3] x) => (float[N,3] y) <float[3] w = {1, 2, 3}> { a = Identity (x)  b = Add (a, w)  y = Relu (b) }"""
Cli = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in `tmp_path`, which holds m.onnxtxt and, built from it for ort:cpu, out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnxtxt").write_text(SMALL)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = command_line.run([str(a) for a in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    assert call("build", "m.onnxtxt", "-o", "out", "-t", "ort:cpu")[0] == 0
    return call


def checks(cli: Cli, *arguments: object) -> tuple[int, dict[str, bool | None]]:
    code, _, _ = cli("verify", *arguments, "--report", "r.json")
    report = json.loads(Path("r.json").read_text())
    assert report["passed"] == (code == 0)
    return code, {c["check"]: c["passed"] for c in report["checks"]}


# -------------------------------------------------------------------------------------------------------------- verify


def test_a_good_bundle_passes_and_the_original_is_found_by_its_digest(cli: Cli) -> None:
    assert checks(cli, "out/") == (0, {"original": True, "files": True, "loads": True, "numbers": True})


def test_without_the_original_numbers_are_not_compared_and_that_is_said(cli: Cli) -> None:
    Path("m.onnxtxt").write_text(SMALL + " ")  # other bytes: not the one
    code, out, err = cli("verify", "out")
    assert (code, "not compared" in out) == (0, True)
    assert "name it with --model" in err


def test_the_recipe_says_where_the_original_lies(cli: Cli) -> None:
    Path("far/away").mkdir(parents=True)
    shutil.move("m.onnxtxt", "far/away/m.onnxtxt")
    assert "numbers" in checks(cli, "out")[1]
    assert checks(cli, "out")[1]["numbers"] is None
    Path("graphopt.toml").write_text('[build.m]\nmodel = "far/away/m.onnxtxt"\noutput = "out"\n')
    assert checks(cli, "out")[1]["numbers"] is True


def test_another_model_under_the_name_of_the_original_fails(cli: Cli) -> None:
    Path("n.onnxtxt").write_text(SMALL.replace("{1, 2, 3}", "{1, 2, 4}"))
    code, found = checks(cli, "out", "--model", "n.onnxtxt")
    assert (code, found["original"], found["numbers"]) == (1, False, False)


def test_a_changed_file_fails(cli: Cli) -> None:
    data = bytearray(Path("out/ort-cpu.onnx").read_bytes())
    data[-1] ^= 1
    Path("out/ort-cpu.onnx").write_bytes(data)
    code, _out, err = cli("verify", "out")
    assert code == 1
    assert "fails 1 of" in err
    assert "ort-cpu.onnx missing or not as the manifest says" in err


def test_wrong_numbers_fail_although_all_digests_hold(cli: Cli) -> None:
    """A bundle whose model computes something else, with a manifest that was made to fit."""
    import hashlib

    graphopt.save(ir.parse(SMALL.replace("{1, 2, 3}", "{1, 2, 3.01}")), "out/ort-cpu.onnx")
    manifest = json.loads(Path("out/manifest.json").read_text())
    data = Path("out/ort-cpu.onnx").read_bytes()
    manifest["variants"][0]["files"][0].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    Path("out/manifest.json").write_text(json.dumps(manifest))
    code, found = checks(cli, "out")
    assert (code, found) == (1, {"original": True, "files": True, "loads": True, "numbers": False})
    assert checks(cli, "out", "--tolerance", "0.1")[0] == 0


def test_a_variant_that_cannot_run_here_is_passed_over_unless_it_was_named(cli: Cli) -> None:
    cli("build", "m.onnxtxt", "-o", "out", "-t", "ort:cpu", "-t", "ort:cuda")
    assert cli("verify", "out")[0] == 0
    assert cli("verify", "out", "--target", "ort:cuda")[0] == 1
    cli("build", "m.onnxtxt", "-o", "cuda", "-t", "ort:cuda")
    code, _, err = cli("verify", "cuda")
    assert (code, "no variant runs on this machine" in err) == (1, True)
    assert cli("verify", "out", "--target", "tensorrt")[0] == 1


def test_accuracy_is_judged_with_labels(cli: Cli) -> None:
    with np.load(NETS / "digits.npz") as digits:
        np.savez("d.npz", x=digits["x_test"][:64])
        np.save("y.npy", digits["y_test"][:64])
        np.save("wrong.npy", (digits["y_test"][:64] + 1) % 10)
    assert cli("build", NETS / "resnet.legacy.onnx", "-o", "net", "-t", "ort:cpu")[0] == 0
    arguments = ["net", "--model", NETS / "resnet.legacy.onnx", "--data", "d.npz"]
    code, out, _ = cli("verify", *arguments, "--labels", "y.npy", "--max-drop", "0")
    assert code == 0
    assert "-> " in out
    assert "% on 64 samples, 0 points may be lost" in out
    assert checks(cli, *arguments, "--max-drop", "0")[1]["accuracy"] is True  # agreement with the original
    assert checks(cli, *arguments)[1]["accuracy"] is None
    assert cli("verify", "net", "--labels", "y.npy")[0] == 2
    np.save("short.npy", np.zeros(3, np.int64))
    assert cli("verify", *arguments, "--labels", "short.npy")[0] == 2


def test_what_is_no_bundle_is_told(cli: Cli) -> None:
    code, out, err = cli("verify", ".")
    assert (code, out) == (1, "")
    assert "is no bundle" in err
    assert "Traceback" not in err


# -------------------------------------------------------------------------------------------------------------- Triton


@pytest.fixture(scope="module")
def proto() -> ModuleType:
    """Triton's own definition of config.pbtxt, loaded without the gRPC client around it."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed: pip install 'tritonclient[grpc]'")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(text: str, proto: ModuleType) -> Any:
    from google.protobuf import text_format

    return text_format.Parse(text, proto.ModelConfig())


def test_an_exported_bundle_is_a_model_repository(cli: Cli, proto: ModuleType) -> None:
    cli("build", "m.onnxtxt", "-o", "out", "-t", "ort:cpu", "--shape", "x=1x3:4x3:16x3")
    code, _out, err = cli("export", "out/", "--triton", "repository")
    assert (code, err) == (0, "")
    files = sorted(str(p.relative_to("repository")) for p in Path("repository").rglob("*") if p.is_file())
    assert files == ["m/1/model.onnx", "m/config.pbtxt"]
    assert Path("repository/m/1/model.onnx").read_bytes() == Path("out/ort-cpu.onnx").read_bytes()
    config = parsed(Path("repository/m/config.pbtxt").read_text(), proto)
    assert (config.name, config.platform, config.max_batch_size) == ("m", "onnxruntime_onnx", 16)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", proto.TYPE_FP32, [3])]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [("y", proto.TYPE_FP32, [3])]
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.instance_group[0].kind == proto.ModelInstanceGroup.KIND_CPU
    assert cli("export", "out/", "--triton", "repository")[0] == 0  # again, over itself


def test_engines_are_plans_and_those_of_rtx_have_to_be_named(cli: Cli, proto: ModuleType) -> None:
    """The bundle of a GPU machine, imitated: the file is no engine, and nobody loads it here."""
    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest["variants"][0].update(target="tensorrt:sm89", shapes={"x": "1x3:8x3:32x3"})
    Path("out/manifest.json").write_text(json.dumps(manifest))
    assert cli("export", "out", "--triton", "r", "--name", "net")[0] == 0
    config = parsed(Path("r/net/config.pbtxt").read_text(), proto)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 32)
    assert config.instance_group[0].kind == proto.ModelInstanceGroup.KIND_GPU
    assert Path("r/net/1/model.plan").is_file()
    assert cli("export", "out", "--triton", "r", "--max-batch", "64")[0] == 2  # beyond the profile
    manifest["variants"][0]["target"] = "tensorrt-rtx:sm89"
    Path("out/manifest.json").write_text(json.dumps(manifest))
    code, _, err = cli("export", "out", "--triton", "r")
    assert (code, "name one with --target" in err) == (1, True)
    code, _, err = cli("export", "out", "--triton", "r", "--target", "tensorrt-rtx")
    assert (code, "needs a backend built with TensorRT for RTX" in err) == (0, True)


def test_external_data_keeps_its_name(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir, "EXTERNAL_ABOVE", 1000)
    graphopt.build(NETS / "vit.legacy.onnx", "v", ["ort"])
    assert cli("export", "v", "--triton", "r", "--name", "v")[0] == 0
    assert sorted(p.name for p in Path("r/v/1").iterdir()) == ["model.onnx", "ort-cpu.onnx.data"]
    assert graphopt.open("r/v/1/model.onnx").outputs[0].name == "y"


def spec(dtype: str | None, *shape: int | str | None) -> TensorSpec:
    return TensorSpec("t", dtype, shape)


@pytest.mark.parametrize(("tensor", "batch", "dims", "reshaped"), [
    (spec("float32", "N", 3, None), 8, [3, -1], None),
    (spec("float16", 1, 3), 0, [1, 3], None),
    (spec("int64", "N"), 8, [1], []),
    (spec("bool"), 0, [1], []),
    (spec("string", "N", 2), 4, [2], None),
    (spec("bfloat16", "N", 2), 4, [2], None),
])  # fmt: skip
def test_dimensions_and_types_as_triton_has_them(
    tensor: TensorSpec, batch: int, dims: list[int], reshaped: list[int] | None, proto: ModuleType
) -> None:
    config = parsed(triton.config("a", Target("ort", "cpu"), [tensor], [tensor], batch), proto)
    assert list(config.input[0].dims) == dims
    assert (list(config.input[0].reshape.shape) if config.input[0].HasField("reshape") else None) == reshaped
    assert config.input[0].data_type == getattr(proto, triton.DTYPES[str(tensor.dtype)])


def test_every_type_of_triton_is_known(proto: ModuleType) -> None:
    assert set(triton.DTYPES.values()) == set(proto.DataType.keys()) - {"TYPE_INVALID"}


@pytest.mark.parametrize(
    "tensor", [spec("float8_e4m3fn", 2), spec(None), TensorSpec("t", "float32", None), spec("float32", 0)]
)
def test_what_triton_does_not_have_is_refused(tensor: TensorSpec) -> None:
    with pytest.raises(UnsupportedModel):
        triton.config("a", Target("ort"), [tensor], [tensor], 0)


@pytest.mark.parametrize("name", ['in"put', "über", "a\nb", "a\\b"])
def test_names_survive_the_text_format(name: str, proto: ModuleType) -> None:
    tensor = TensorSpec(name, "float32", (1,))
    assert parsed(triton.config("a", Target("ort"), [tensor], [tensor], 0), proto).input[0].name == name


@pytest.mark.parametrize(("inputs", "outputs", "batched"), [
    ([spec("float32", "N", 3)], [spec("float32", "N", 2)], True),
    ([spec("float32", None, 3)], [spec("float32", "N")], True),
    ([spec("float32", "N", 3), spec("int64", "S")], [spec("float32", "N", 2)], False),
    ([spec("float32", 1, 3)], [spec("float32", 1, 2)], False),
    ([spec("float32", "N", 3)], [spec("float32")], False),
    ([], [spec("float32", "N")], False),
])  # fmt: skip
def test_a_batch_is_one_dynamic_dimension_everywhere(
    inputs: list[TensorSpec], outputs: list[TensorSpec], batched: bool
) -> None:
    assert triton.is_batched(inputs, outputs) == batched


def test_a_place_that_holds_something_else_is_refused(cli: Cli) -> None:
    Path("r/m").mkdir(parents=True)
    Path("r/m/notes").write_text("mine")
    code, _, err = cli("export", "out", "--triton", "r")
    assert (code, "holds something else" in err) == (1, True)
    assert cli("export", "out")[0] == 2
    assert cli("export", "out", "--triton", "r", "--name", "a/b")[0] == 2
    assert Path("r/m/notes").read_text() == "mine"
