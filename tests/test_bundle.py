"""Bundles: the manifest keeps its schema, `graphopt.open` picks what runs here and refuses what is damaged."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import graphopt
from graphopt import bundle as bundles
from graphopt import cli, ir, models
from graphopt.backend import Availability, BuildOptions
from graphopt.discovery import backend_for
from graphopt.errors import BackendUnavailable, InvalidModel, UsageError

RESNET = Path(models.__file__).resolve().parent / "resnet.legacy.onnx"
SCHEMA = json.loads((Path(graphopt.__file__).parent / "manifest.schema.json").read_text())
SMALL = ir.parse(
    '<ir_version: 10, opset_import: ["" : 20]>\ng (float[N,3] x) => (float[N,3] y) { a = Identity (x)  y = Relu (a) }'
)
X = np.array([[1, -2, 3]], np.float32)

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)


def validate(folder: Path) -> Any:
    manifest = json.loads((folder / "manifest.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    return manifest


@pytest.mark.parametrize("measured", [False, True])
def test_manifest_of_a_pruned_int8_build_keeps_its_schema(measured: bool, tmp_path: Path) -> None:
    """Times of kernels are in it only where times were asked for."""
    samples = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=samples)
    weights = ", ".join(str(v) for v in np.random.default_rng(1).standard_normal(256).round(3))
    (tmp_path / "m.onnxtxt").write_text(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N,8] x) => (float[N,8] y)
        <float[8,32] a = {{{weights}}}, float[32,8] b = {{{weights}}}> {{ h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }}"""
    )
    command = ["build", str(tmp_path / "m.onnxtxt"), "-o", str(tmp_path / "out"), "-t", "ort:cpu", "--prune", "0.3"]
    command += ["--int8", "--no-gate", "--data", str(tmp_path / "calib.npz"), *["--measure"] * measured]
    assert cli.run(command) == 0
    (variant,) = validate(tmp_path / "out")["variants"]
    assert variant["pruning"]["groups"]
    assert [("microseconds" in layer) for layer in variant["int8"]["layers"]] == [measured] * 2


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within a schema."""
    yield schema
    for keyword in ("properties", "$defs"):
        for part in schema.get(keyword, {}).values():
            yield from parts(part)
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            yield from parts(schema[keyword])
    for part in schema.get("oneOf", []):
        yield from parts(part)


# ----------------------------------------------------------------------------------------------------------- the schema


def test_the_schema_is_one_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == SCHEMA["properties"]["schema"]["const"] == bundles.SCHEMA
    assert [part for part in parts(SCHEMA) if not part.get("description") and "$ref" not in part] == []


def test_a_bundle_for_onnx_runtime_keeps_the_schema(tmp_path: Path) -> None:
    graphopt.build(RESNET, tmp_path / "out", ["ort"], measure=True)
    manifest = validate(tmp_path / "out")
    assert manifest["variants"][0]["latency"]["candidate"] == "optimized"
    assert list(manifest) == list(SCHEMA["properties"])


@needs_rtx
def test_a_bundle_with_an_engine_and_a_fallback_keeps_the_schema(tmp_path: Path) -> None:
    graphopt.build(RESNET, tmp_path / "out", ["tensorrt-rtx:sm80+sm89", "tensorrt:sm89"], say=print)
    manifest = validate(tmp_path / "out")
    assert manifest["variants"][0]["kernels"][0]["outputs"]
    assert manifest["variants"][0]["versions"].keys() == {"tensorrt_rtx"}


@pytest.mark.parametrize("text", [
    "g (float16[2] x) => (float16[2] y) { y = Relu (x) }",
    "g (float x) => (float y) { y = Relu (x) }",
    "g (string[N] x, bool[1] b) => (string[N] y, bool[1] c) { y = Identity (x)  c = Not (b) }",
    "g (float[4] x) => (seq(float[N]) y) { y = SplitToSequence <axis = 0> (x) }",
    "g () => (float[2] y) { y = Constant <value = float[2] {1, 2}> () }",
])  # fmt: skip
def test_models_of_every_kind_keep_the_schema(text: str, tmp_path: Path) -> None:
    graphopt.build(ir.parse('<ir_version: 10, opset_import: ["" : 20]>\n' + text), tmp_path / "out", ["ort"])
    validate(tmp_path / "out")
    assert graphopt.Bundle.load(tmp_path / "out").damaged() == []


def test_what_cannot_be_proven_keeps_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import equivalence
    from graphopt.errors import UnsupportedModel

    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedModel("nothing runs it")

    monkeypatch.setattr(equivalence, "compare", refuse)
    graphopt.build(SMALL, tmp_path / "out", ["ort"])
    assert validate(tmp_path / "out")["variants"][0]["proof"] == {"unproven": "nothing runs it"}


def test_infinite_bounds_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import equivalence

    monkeypatch.setattr(equivalence, "tolerance", lambda *_: float("inf"))
    graphopt.build(SMALL, tmp_path / "out", ["ort"])
    assert validate(tmp_path / "out")["variants"][0]["proof"]["tolerance"] is None


# ------------------------------------------------------------------------------------------------------------- opening


@pytest.fixture
def out(tmp_path: Path) -> Path:
    graphopt.build(SMALL, tmp_path / "out", ["ort:cuda", "ort:cpu"])
    return tmp_path / "out"


def test_open_picks_the_best_variant_that_runs_and_says_what_it_skipped(out: Path) -> None:
    session = graphopt.open(out)
    assert session.variant is not None
    assert str(session.variant.target) == "ort:cpu"
    assert len(session.skipped) == 1
    assert session.skipped[0].startswith("ort:cuda: provider 'cuda' is not in this onnxruntime")
    np.testing.assert_array_equal(session.run({"x": X})["y"], np.maximum(X, 0))
    assert [str(s) for s in session.inputs] == ["float32[N,3] x"]
    assert [str(s) for s in session.outputs] == ["float32[N,3] y"]
    session.close()


@needs_rtx
def test_an_engine_is_preferred_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphopt.build(SMALL, tmp_path / "out", ["ort", "tensorrt-rtx:sm89"])
    backend = type(backend_for("tensorrt")[1])
    asked: list[Any] = []
    monkeypatch.setattr(backend, "availability", lambda self, runtime: Availability("1", None, None))
    monkeypatch.setattr(backend, "open", lambda self, *arguments: asked.append(arguments))
    session = graphopt.open(tmp_path / "out")
    assert session.variant is not None
    assert str(session.variant.target) == "tensorrt-rtx:sm89"
    [(folder, artifact, target, _)] = asked
    assert folder / artifact.files[0] == tmp_path / "out/tensorrt-rtx-sm89.engine"
    assert list(artifact.versions) == ["tensorrt_rtx"]  # so that a mismatch can be named
    assert str(artifact.shapes["x"]) == "1x3:8x3:32x3"
    assert str(target) == "tensorrt-rtx:sm89"


@needs_rtx
def test_an_engine_lost_on_the_way_does_not_matter_where_it_could_not_run(tmp_path: Path) -> None:
    graphopt.build(SMALL, tmp_path / "out", ["tensorrt-rtx:sm89", "ort"])
    if backend_for("tensorrt-rtx")[1].availability("tensorrt-rtx").run is None:
        pytest.skip("there is a GPU here")
    (tmp_path / "out/tensorrt-rtx-sm89.engine").unlink()
    assert graphopt.open(tmp_path / "out").run({"x": X}).keys() == {"y"}


@pytest.mark.parametrize("target", ["ort:cpu", "ort"])
def test_a_variant_can_be_named(target: str, out: Path) -> None:
    session = graphopt.open(out, target)
    assert session.variant is not None
    assert str(session.variant.target) == "ort:cpu"


def test_a_variant_that_cannot_run_says_why(out: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no variant runs here: ort:cuda: provider 'cuda' is not in this"):
        graphopt.open(out, "ort:cuda")
    with pytest.raises(BackendUnavailable, match="holds no variant for 'tensorrt'; it has ort:cuda, ort:cpu"):
        graphopt.open(out, "tensorrt")


def test_a_damaged_file_is_refused(out: Path) -> None:
    file = out / "ort-cpu.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert graphopt.Bundle.load(out).damaged() == ["ort-cpu.onnx"]
    with pytest.raises(InvalidModel, match=r"'ort-cpu.onnx' is missing or differs from its sha256 in manifest.json"):
        graphopt.open(out)


def test_weights_beside_the_model_belong_to_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir, "EXTERNAL_ABOVE", 1000)
    bundle = graphopt.build(RESNET, tmp_path / "out", ["ort"])
    assert bundle.variants[0].files == ("ort-cpu.onnx", "ort-cpu.onnx.data")
    assert bundle.damaged() == []
    x = models.digits()["x_test"][:4]
    y = graphopt.open(tmp_path / "out").run({"x": x})["y"]
    np.testing.assert_allclose(y, graphopt.open(RESNET).run({"x": x})["y"], rtol=1e-4, atol=1e-5)
    (tmp_path / "out/ort-cpu.onnx.data").unlink()
    with pytest.raises(InvalidModel, match=r"ort-cpu.onnx.data"):
        graphopt.open(tmp_path / "out")


def test_a_bundle_can_move(out: Path) -> None:
    moved = out.rename(out.parent / "elsewhere")
    assert graphopt.open(moved).run({"x": X}).keys() == {"y"}


# ------------------------------------------------------------------------------------------------------- lone files


@pytest.mark.parametrize("name", ["m.onnx", "m.onnxtxt"])
def test_a_lone_model_opens_with_onnx_runtime(name: str, tmp_path: Path) -> None:
    graphopt.save(SMALL, tmp_path / name)
    session = graphopt.open(tmp_path / name, options=BuildOptions(threads=1))
    assert session.variant is None
    np.testing.assert_array_equal(session.run({"x": X})["y"], np.maximum(X, 0))


def test_a_lone_model_is_no_engine(tmp_path: Path) -> None:
    graphopt.save(SMALL, tmp_path / "m.onnx")
    with pytest.raises(BackendUnavailable, match="is a model file; build it for 'tensorrt-rtx:sm89' first"):
        graphopt.open(tmp_path / "m.onnx", "tensorrt-rtx:sm89")


def test_what_is_no_bundle_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"is no bundle: manifest\.json cannot be read"):
        graphopt.open(tmp_path)
    with pytest.raises(InvalidModel, match="is no bundle"):
        graphopt.open(tmp_path / "none")
    with pytest.raises(InvalidModel, match=r"cannot read .*none\.onnx': No such file"):
        graphopt.open(tmp_path / "none.onnx")


@pytest.mark.parametrize("feeds", [{}, {"x": X, "z": X}, {"x": X.astype(np.float64)}, {"x": X[0]}, {"x": X[:, :2]}])
def test_feeds_that_do_not_fit_are_refused(feeds: dict[str, Any], out: Path) -> None:
    with pytest.raises(UsageError):
        graphopt.open(out).run(feeds)
