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
        ("--shape", "q=1x4", "the model has no such input; its inputs are x, z"),
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


def test_inspect_counts_what_functions_multiply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N,3] x, float[3,2] w) => (float[N,2] y) { y = local.Product (x, w) }
        <domain: "local", opset_import: ["" : 21]>
        Product (a, b) => (c) { c = MatMul (a, b) }"""
    (tmp_path / "m.onnxtxt").write_text(text)
    assert cli.run(["inspect", str(tmp_path / "m.onnxtxt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == "6*N"


def test_explain_names_the_pass_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(models.path("resnet.legacy"))
    node = next(n.name for n in ir.load(path).nodes() if n.op == "BatchNormalization")
    assert cli.run(["explain", path, node]) == 0
    assert "fuse-conv-bn" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("x", "an input"), ("c", "a constant"), ("nowhere", "no node")])
def test_explain_of_what_no_node_computes(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnxtxt").write_text("g (float[2] x) => (float[2] y) <float c = {1}> { y = Add (x, c) }")
    assert cli.run(["explain", str(tmp_path / "m.onnxtxt"), name]) == 2
    assert kind in capsys.readouterr().err


def test_explain_of_a_node_that_went_says_where_it_went_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "m.onnx")
    ir.save(ir.parse("g (float[2] x) => (float[2] y) { [n] a = Cast <to = 1> (x) y = Exp (a) }"), path)
    assert cli.run(["explain", path, "n", "-p", "eliminate-nop"]) == 0
    assert capsys.readouterr().out == "'n' (Cast): eliminate-nop removed it\n"


def test_explain_of_an_operator_that_no_pass_knows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "my" : 1]> g () => (float[2] y) { [n] y = my.Magic () }"""
    path = str(tmp_path / "m.onnx")
    ir.save(ir.parse(text), path)
    assert cli.run(["explain", path, "n"]) == 0
    assert "domain 'my' is not evaluated" in capsys.readouterr().out


def test_explain_says_so_where_no_pass_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """g () => (float[2] y) <int8[2] a = {1, 2}, float s = {1}, int8 z = {0}> { [n] y = DequantizeLinear (a, s, z) }"""
    path = str(tmp_path / "m.onnx")
    ir.save(ir.parse(text), path)
    assert cli.run(["explain", path, "n"]) == 0
    assert "no pass looks at DequantizeLinear" in capsys.readouterr().out


def test_inspect_counts_multiply_accumulates(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(models.path("resnet.legacy")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"].endswith("*batch")


def test_inspect_tells_what_folding_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """g (float[N,3] x) => (float[N,3] y, int64[1] z) <float c = {2}, int64[1] one = {1}, int64[1] i = {1}>
    { s = Shape (x) d = Gather (s, i) z = Mul (d, d)
      e = Mul (c, c) f = Exp (e) y = Mul (x, f) dead = Neg (x) }"""
    path = str(tmp_path / "m.onnx")
    ir.save(ir.parse(text), path)
    assert cli.run(["inspect", path, "--json"]) == 0
    folding = json.loads(capsys.readouterr().out)["folding"]
    assert folding["removed"] == {"Exp": 1, "Gather": 1, "Mul": 1, "Neg": 1, "Shape": 1}
    assert folding["nodes"] == 2
    assert cli.run(["inspect", path]) == 0
    told = capsys.readouterr().out
    assert "after folding" in told
    assert "constant folding removes 5 of 7 nodes" in told
    assert cli.run(["inspect", path, "--json", "--no-fold"]) == 0
    assert "folding" not in json.loads(capsys.readouterr().out)


def test_inspect_of_a_folded_model_says_so(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", model]) == 0
    assert "nothing is left to fold" in capsys.readouterr().out


def test_inspect_of_a_model_that_cannot_be_folded_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "m.onnx")
    ir.save(ir.parse("g (float[2] x) => (float[2] y) { a = Add (x, b) b = Exp (a) y = Neg (b) }"), path)
    assert cli.run(["inspect", path]) == 0
    assert "folding was not possible" in capsys.readouterr().out


def test_inspect_of_a_bundle_counts_what_each_pass_rewrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(tmp_path / "b")
    assert cli.run(["build", str(models.path("resnet.legacy")), "-o", bundle, "-t", "ort:cpu"]) == 0
    capsys.readouterr()
    assert cli.run(["inspect", bundle]) == 0
    told = capsys.readouterr().out
    assert "rewrites for ort:cpu" in told
    [variant] = json.loads((Path(bundle) / "manifest.json").read_text())["variants"]
    wrote = {step["name"] for step in variant["passes"] if step["rewrites"]}
    assert wrote
    assert all(name in told for name in wrote)
    assert not any(step["name"] in told for step in variant["passes"] if step["name"] not in wrote)
