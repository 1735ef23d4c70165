"""opt's changes to the interface, explain, and MACs in inspect, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt import cli, ir, models

TEXT = """g (float[N,4] x, float[N,4] z) => (float[N,4] y)
<float[4] w = {1, 2, 3, 4}>
{ [relu] a = Relu (x)
  [mul] b = Mul (a, w)
  [add] c = Add (b, z)
  [neg] y = Neg (c) }"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "m.onnxtxt"
    path.write_text(TEXT)
    return str(path)


def test_opt_keeps_a_tensor(model: str, tmp_path: Path) -> None:
    assert cli.run(["opt", model, "-o", str(tmp_path / "o.onnx"), "--keep", "b", "-O2"]) == 0
    assert [s.name for s in ir.load(tmp_path / "o.onnx").outputs] == ["y", "b"]


def test_opt_extracts_a_part(model: str, tmp_path: Path) -> None:
    assert cli.run(["opt", model, "-o", str(tmp_path / "o.onnx"), "--extract", "a,z:c", "-O2"]) == 0
    part = ir.load(tmp_path / "o.onnx")
    assert [s.name for s in part.inputs] == ["a", "z"]
    assert [s.name for s in part.outputs] == ["c"]


def test_opt_sets_shapes_and_renames_dimensions(model: str, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    assert cli.run(["opt", model, "-o", str(out), "--rename-dim", "N=batch", "--set-shape", "z=1x4", "-O0"]) == 0
    assert [s.shape for s in ir.load(out).inputs] == [("batch", 4), (1, 4)]


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--keep", "bb", "no tensor 'bb'"),
        ("--extract", "a", "expected A:B"),
        ("--extract", "a:c", "also need 'z'"),
        ("--set-shape", "x", "expected INPUT=SHAPE"),
        ("--set-shape", "q=1x4", "no input 'q'"),
        ("--rename-dim", "M=K", "no input or output has a dimension 'M'"),
    ],
)
def test_a_wrong_change_says_what_to_write(
    option: str, value: str, told: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["opt", model, "-o", str(tmp_path / "o.onnx"), option, value]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "o.onnx").exists()


def test_explain_names_the_pass_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(models.path("resnet.legacy"))
    node = next(n.name for n in ir.load(path).nodes() if n.op == "BatchNormalization")
    assert cli.run(["explain", path, node]) == 0
    assert "fuse-conv-bn" in capsys.readouterr().out


def test_inspect_counts_multiply_accumulates(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(models.path("resnet.legacy")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"].endswith("*batch")
