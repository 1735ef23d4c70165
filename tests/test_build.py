"""The main job on real models: engines and ONNX Runtime models that keep the contract, the same bytes each time, nothing half done."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import ir, models
from graphopt.backend import Availability, BuildOptions, ShapeRange
from graphopt.discovery import backend_for
from graphopt.errors import (
    BackendUnavailable,
    InternalError,
    NotEquivalent,
    OutputError,
    ShapeError,
    UnsupportedModel,
    UsageError,
)
from graphopt.passes.eliminate_identity import EliminateIdentity
from graphopt.target import Target

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("light_*.onnx"))
NETS = sorted(Path(models.__file__).resolve().parent.glob("*.onnx"))
RESNET = next(p for p in NETS if p.name == "resnet.legacy.onnx")
ROOT = Path(graphopt.__file__).parent.parent
HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'
SMALL = ir.parse(HEADER + "g (float[N,3] x) => (float[N,3] y) { a = Identity (x)  y = Relu (a) }")
STRINGS = ir.parse(HEADER + "g (string[N] x) => (string[N] y) { y = Identity (x) }")
RESHAPE = ir.parse(HEADER + "g (float[N,C] x, int64[2] s) => (float[P,Q] y) { y = Reshape (x, s) }")

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def interface(path: Path) -> list[list[tuple[str, Any]]]:
    """Names and types of the inputs that must be fed, and of the outputs, by onnx alone."""
    graph = onnx.load(path).graph
    given = {i.name for i in graph.initializer}
    return [[(v.name, v.type) for v in graph.input if v.name not in given], [(v.name, v.type) for v in graph.output]]


# ------------------------------------------------------------------------------------------------------ real networks


@needs_rtx
@pytest.mark.parametrize("path", [*NETS, *LIGHT], ids=lambda p: p.stem)
def test_a_real_network_becomes_an_engine_and_a_valid_model_with_the_same_interface(path: Path, out: Path) -> None:
    bundle = graphopt.build(path, out, targets=["tensorrt-rtx:sm89", "ort:cpu"], fallback=False)
    engine, portable = bundle.variants
    assert [str(v.target) for v in bundle.variants] == ["tensorrt-rtx:sm89", "ort:cpu"]
    assert (out / engine.files[0]).stat().st_size > 100_000
    assert len(engine.record["kernels"]) >= 5
    written = out / portable.files[0]
    onnx.checker.check_model(str(written), full_check=True)
    assert interface(written) == interface(path)
    assert onnx.load(written).ir_version == max(4, onnx.load(path).ir_version)
    for variant in bundle.variants:
        proof = variant.record["proof"]
        assert proof["relative"] <= proof["tolerance"] < 1e-3
    inputs = {name for name, _ in interface(path)[0]}
    assert {spec.name for spec in bundle.inputs} == inputs
    assert {spec.name for spec in graphopt.open(out).inputs} == inputs


def test_there_are_nine_light_models_and_eight_digits_nets() -> None:
    assert len(LIGHT) == 9
    assert len(NETS) >= 8


# --------------------------------------------------------------------------------------------------- the Python contract


def test_the_ten_lines_of_the_documentation(out: Path) -> None:
    model = graphopt.load(str(RESNET))
    model = graphopt.Pipeline.parse("fold-constants,fuse-conv-bn").run(model).model
    bundle = graphopt.build(model, f"{out}/", targets=["ort:cpu"])
    x = models.digits()["x_test"]
    y = graphopt.open(f"{out}/").run({"x": x})["y"]
    assert y.shape == (len(x), 10)
    assert y.dtype == np.float32
    assert (y.argmax(axis=1) == models.digits()["y_test"]).mean() > 0.95
    assert isinstance(bundle, graphopt.Bundle)


def test_build_stays_a_function_whoever_imports_what() -> None:
    code = "import graphopt.building, graphopt.cli, graphopt\nfrom graphopt import build\nassert callable(graphopt.build) and callable(build)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_targets_and_shapes_are_given_as_text_or_as_values(tmp_path: Path) -> None:
    spelled = graphopt.build(SMALL, tmp_path / "a", ["ort:cpu"], shapes={"x": "1x3:2x3:4x3"})
    shape = ShapeRange((1, 3), (2, 3), (4, 3))
    valued = graphopt.build(SMALL, tmp_path / "b", [Target("ort", "cpu")], shapes={"x": shape})
    optional = graphopt.build(SMALL, tmp_path / "c", ["ort"], options=BuildOptions(shapes={"x": shape}))
    assert spelled.manifest == valued.manifest == optional.manifest
    assert spelled.variants[0].shapes == {"x": shape}


def test_targets_are_built_once_each(out: Path) -> None:
    bundle = graphopt.build(SMALL, out, ["ort:cpu", "ort", Target("ort", "cpu")])
    assert [str(v.target) for v in bundle.variants] == ["ort:cpu"]


def test_the_pipeline_is_given_as_text_or_as_a_value(tmp_path: Path) -> None:
    a = graphopt.build(SMALL, tmp_path / "a", ["ort"], "eliminate-identity")
    b = graphopt.build(SMALL, tmp_path / "b", ["ort"], graphopt.Pipeline.parse("eliminate-identity"))
    assert a.manifest == b.manifest
    assert a.variants[0].record["nodes"] == {"before": 2, "after": 1}


def test_the_model_given_stays_as_it_was(out: Path) -> None:
    model = graphopt.load(RESNET)
    before = model.fingerprint()
    graphopt.build(model, out, ["ort"])
    assert model.fingerprint() == before


def test_feeds_are_a_sample_or_several(tmp_path: Path) -> None:
    sample = {"x": np.ones((4, 3), np.float32)}
    one = graphopt.build(SMALL, tmp_path / "a", ["ort"], feeds=sample)
    two = graphopt.build(SMALL, tmp_path / "b", ["ort"], feeds=[sample, {"x": np.zeros((1, 3), np.float32)}])
    assert [b.variants[0].record["proof"]["samples"] for b in (one, two)] == [1, 2]


@pytest.mark.parametrize(("feeds", "error", "told"), [
    ({"z": np.ones((4, 3), np.float32)}, UsageError, "missing"),
    ({"x": np.ones((4, 3))}, UsageError, "float64"),
    ({"x": np.ones((4, 4), np.float32)}, ShapeError, "has shape"),
    ({"x": np.ones(3, np.float32)}, ShapeError, "has shape"),
])  # fmt: skip
def test_feeds_that_do_not_fit_are_refused(feeds: Any, error: type[Exception], told: str, out: Path) -> None:
    with pytest.raises(error, match=told):
        graphopt.build(SMALL, out, ["ort"], feeds=feeds)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------- same bytes


BUILD = """
import sys, graphopt
graphopt.build(sys.argv[1], sys.argv[2], targets=sys.argv[3].split())
"""


@needs_rtx
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    folders = []
    for seed in ("1", "4711"):
        folders.append(tmp_path / seed)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", BUILD, str(RESNET), str(folders[-1]), "tensorrt-rtx:sm89 ort:cpu"]
        subprocess.run(command, check=True, env=environment, timeout=300)
    assert len(contents(folders[0])) == 3
    assert contents(folders[0]) == contents(folders[1])


def test_a_second_build_over_the_first_writes_the_same_bytes(out: Path) -> None:
    graphopt.build(RESNET, out, ["ort"])
    before = contents(out)
    graphopt.build(RESNET, out, ["ort"])
    assert contents(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@needs_rtx
def test_seconds_and_paths_stay_out_of_the_manifest(out: Path) -> None:
    graphopt.build(SMALL, out, ["tensorrt-rtx:sm89", "ort"])
    text = (out / "manifest.json").read_text()
    assert "seconds" not in text
    assert str(out.parent) not in text


# ---------------------------------------------------------------------------------------------------- fallback and refusal


def without_engines(monkeypatch: pytest.MonkeyPatch, reason: str = "no such package: pip install it") -> None:
    backend = type(backend_for("tensorrt")[1])
    monkeypatch.setattr(backend, "availability", lambda self, runtime: Availability(None, reason, reason))


def test_without_engines_the_default_is_onnx_runtime_said_aloud_and_recorded(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_engines(monkeypatch)
    said: list[str] = []
    bundle = graphopt.build(SMALL, out, say=said.append)
    assert [str(v.target) for v in bundle.variants] == ["ort:cpu"]
    reason = "tensorrt: no such package: pip install it; tensorrt-rtx: no such package: pip install it"
    assert said == [f"falling back to ort:cpu for an engine (--no-fallback forbids it): {reason}"]
    assert bundle.manifest["fallbacks"] == [{"target": "an engine", "reason": reason}]


@pytest.mark.parametrize("targets", [None, ["tensorrt-rtx:sm89"], ["ort:cpu", "tensorrt"]])
def test_fallback_can_be_forbidden(targets: list[str] | None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_engines(monkeypatch)
    with pytest.raises(BackendUnavailable, match=r"--no-fallback forbids ort:cpu instead: .*pip install it"):
        graphopt.build(SMALL, out, targets, fallback=False)
    assert list(out.parent.iterdir()) == []


def test_several_fallbacks_give_one_model(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_engines(monkeypatch)
    said: list[str] = []
    bundle = graphopt.build(SMALL, out, ["tensorrt-rtx:sm80", "tensorrt-rtx:sm89"], say=said.append)
    assert [str(v.target) for v in bundle.variants] == ["ort:cpu"]
    assert [f["target"] for f in bundle.manifest["fallbacks"]] == ["tensorrt-rtx:sm80", "tensorrt-rtx:sm89"]
    assert len(said) == 2


@needs_rtx
def test_a_model_that_no_engine_takes_falls_back(out: Path) -> None:
    said: list[str] = []
    bundle = graphopt.build(STRINGS, out, ["tensorrt-rtx:sm89"], say=said.append)
    assert [str(v.target) for v in bundle.variants] == ["ort:cpu"]
    assert "cannot keep the type of 'x' (string)" in said[0]
    with pytest.raises(BackendUnavailable, match="cannot keep the type"):
        graphopt.build(STRINGS, out, ["tensorrt-rtx:sm89"], fallback=False)


@needs_rtx
def test_a_range_that_only_an_engine_needs_is_asked_for_or_fallen_back_from(out: Path) -> None:
    with pytest.raises(ShapeError, match=r"input 's' holds a shape, and TensorRT needs the range of its 2 values"):
        graphopt.build(RESHAPE, out, ["tensorrt-rtx:sm89"])
    said: list[str] = []
    bundle = graphopt.build(RESHAPE, out, say=said.append)
    assert [str(v.target) for v in bundle.variants] == ["ort:cpu"]
    assert "input 's' holds a shape" in said[0]


@needs_rtx
def test_an_input_that_holds_a_shape_takes_values_in_every_target(out: Path) -> None:
    shapes = {"x": "1x2:2x3:3x4", "s": "1x2:2x3:3x4"}
    said: list[str] = []
    bundle = graphopt.build(RESHAPE, out, ["tensorrt-rtx:sm89", "ort"], shapes=shapes, say=said.append, measure=True)
    assert [v.record["proof"]["samples"] for v in bundle.variants] == [2, 2]
    assert bundle.variants[1].record["latency"]["rounds"] > 0
    assert said == []


def test_an_input_that_may_hold_a_shape_is_checked_for_its_name(out: Path) -> None:
    with pytest.raises(ShapeError, match="its inputs are x, s"):
        graphopt.build(RESHAPE, out, ["ort"], shapes={"t": "2x3"})


def test_onnx_runtime_itself_has_no_fallback(out: Path) -> None:
    model = SMALL.clone()
    model.carried.ir_version = onnx.IR_VERSION
    model.set_opset("", onnx.defs.onnx_opset_version())
    backend = backend_for("ort")[1]

    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedModel("ONNX Runtime refuses")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "emit", refuse)
        with pytest.raises(UnsupportedModel, match="ONNX Runtime refuses"):
            graphopt.build(model, out, ["ort"])
    assert not out.exists()


def test_a_provider_that_is_not_here_gets_a_portable_model_and_a_remark(out: Path) -> None:
    said: list[str] = []
    bundle = graphopt.build(SMALL, out, ["ort:cuda"], say=said.append)
    assert bundle.variants[0].files == ("ort-cuda.onnx",)
    assert "not loaded here: provider 'cuda' is not in this onnxruntime" in said[0]
    with pytest.raises(BackendUnavailable, match="no variant runs here: ort:cuda: provider 'cuda'"):
        graphopt.open(out)


# ------------------------------------------------------------------------------------------------------- nothing half done


def negate(self: Any, model: Any, ctx: Any) -> int:
    """A wrong pass: Relu becomes Neg."""
    nodes = [n for n in model.nodes() if n.op == "Relu"]
    for node in nodes:
        node.op = "Neg"
    return len(nodes)


def rename(self: Any, model: Any, ctx: Any) -> int:
    """A wrong pass: another name for an output."""
    model.graph.outputs[0].name = "other"
    return 1


def test_the_proof_catches_a_wrong_pass(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EliminateIdentity, "run", negate)
    with pytest.raises(NotEquivalent, match="the optimized model computes something else: output 'y' differs by"):
        graphopt.build(SMALL, out, ["ort"], "eliminate-identity")
    assert list(out.parent.iterdir()) == []


def test_a_pass_that_changes_the_interface_is_caught(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EliminateIdentity, "run", rename)
    with pytest.raises(InternalError, match="changed"):
        graphopt.build(SMALL, out, ["ort"], "eliminate-identity")
    assert list(out.parent.iterdir()) == []


def test_a_failing_build_leaves_the_earlier_bundle_as_it_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphopt.build(SMALL, out, ["ort"])
    before = contents(out)
    monkeypatch.setattr(EliminateIdentity, "run", negate)
    with pytest.raises(NotEquivalent):
        graphopt.build(SMALL, out, ["ort"], "eliminate-identity")
    assert contents(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_build_that_fails_at_its_second_target_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no execution provider 'npu'"):
        graphopt.build(SMALL, out, ["ort:cpu", "ort:npu"])
    assert list(out.parent.iterdir()) == []


def test_a_link_to_a_bundle_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):  # the first time what it names does not exist
        graphopt.build(SMALL, tmp_path / "link", ["ort"])
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real/manifest.json").is_file()


def test_other_files_beside_a_bundle_are_kept(out: Path) -> None:
    graphopt.build(SMALL, out, ["ort:cuda"])
    (out / "notes.txt").write_text("mine")
    graphopt.build(SMALL, out, ["ort:cpu"])
    assert sorted(contents(out)) == ["manifest.json", "notes.txt", "ort-cpu.onnx"]


def test_the_current_folder_can_become_a_bundle(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    monkeypatch.chdir(out)
    for _ in range(2):
        graphopt.build(SMALL, ".", ["ort"])
        assert sorted(p.name for p in Path.cwd().iterdir()) == ["manifest.json", "ort-cpu.onnx"]


def test_a_place_that_holds_something_else_is_refused(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="it holds other files; name a new folder"):
        graphopt.build(SMALL, out, ["ort"])
    assert (out / "notes.txt").read_text() == "mine"


def test_the_folder_gets_the_mode_that_the_umask_admits(out: Path) -> None:
    before = os.umask(0o027)
    try:
        graphopt.build(SMALL, out, ["ort"])
        assert out.stat().st_mode & 0o777 == 0o750
        assert (out / "ort-cpu.onnx").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


# --------------------------------------------------------------------------------------------------------- what is told


def test_numbers_that_cannot_be_compared_are_said_to_be_unproven(out: Path) -> None:
    model = ir.parse(HEADER + "g (float[N] x, int64[M] s) => (float[P,Q] y) { y = Reshape (x, s) }")
    said: list[str] = []
    bundle = graphopt.build(model, out, ["ort"], say=said.append)
    proof = bundle.variants[0].record["proof"]
    if "unproven" in proof:
        assert said == [f"ort:cpu: the numbers are not proven: {proof['unproven']}"]


def test_instruments_and_progress_reach_the_build(out: Path) -> None:
    from graphopt.instruments import Timing

    timing, seen = Timing(), list[tuple[str, float]]()

    def progress(target: Target) -> Callable[[str, float], bool]:
        return lambda phase, share: seen.append((phase, share)) is None

    targets = ["tensorrt-rtx:sm89"] if importlib.util.find_spec("tensorrt_rtx") else ["ort"]
    graphopt.build(SMALL, out, targets, "eliminate-identity,eliminate-dead", instruments=[timing], progress=progress)
    assert [t.pass_name for t in timing.times] == ["eliminate-identity", "eliminate-dead"]
    assert not seen or seen[-1] == ("Built", 1.0)


@needs_rtx
def test_a_build_can_be_cancelled(out: Path) -> None:
    with pytest.raises(graphopt.UserError, match="was cancelled; nothing was written"):
        graphopt.build(SMALL, out, ["tensorrt-rtx:sm89"], progress=lambda target: lambda phase, share: False)
    assert list(out.parent.iterdir()) == []


def test_the_manifest_says_what_passes_did(out: Path) -> None:
    record = graphopt.build(RESNET, out, ["ort"], "eliminate-identity,fuse-conv-bn").variants[0].record
    assert record["passes"] == [{"name": "eliminate-identity", "rewrites": 2}, {"name": "fuse-conv-bn", "rewrites": 15}]
    assert record["nodes"] == {"before": 54, "after": 37}
    assert record["weights"]["after"] < record["weights"]["before"]


def test_options_are_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BuildOptions().threads = 3  # type: ignore[misc]


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """No hidden staging folder survives any build of this file."""
    yield
    assert [p for p in tmp_path.rglob(".*") if p.name.startswith(".out")] == []
