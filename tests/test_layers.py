"""Two models layer by layer: counterparts, the first divergence that counts, and bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import cli, equivalence, ir, layers, models
from graphopt.errors import NotEquivalent
from graphopt.evaluate import Evaluator
from graphopt.ir import Model
from graphopt.layers import compare_layers
from graphopt.pipeline import Pipeline

NETS = sorted(Path(models.__file__).resolve().parent.glob("*.onnx"))
CHAIN = """g (float[2,3] x) => (float[2,3] y) <float[3] w = {1,2,3}, float[3] b = {3,2,1}>
{ [m] m = Mul (x, w) [a] a = Add (m, b) [r] r = Relu (a) [e] e = Exp (r) [l] l = Log (e) [o] y = Neg (l) }"""


def feeds(model: Model, count: int = 2) -> list[dict[str, Any]]:
    return list(equivalence.input_samples(model, count=count))


def damaged(model: Model, node: str, values: Sequence[float]) -> Model:
    copy = model.clone()
    broken = next(n for n in copy.nodes() if n.name == node)
    broken.inputs[1] = ir.Constant("damaged", np.array(values, np.float32))
    return copy


@pytest.mark.parametrize("path", NETS, ids=lambda p: p.stem)
def test_optimized_networks_agree_layer_by_layer(path: Path) -> None:
    model = ir.load(path)
    after = Pipeline.parse("O2").run(model).model
    report = compare_layers(model, ir.loads(ir.saves(after)), feeds=feeds(model, 1), tolerance=1e-4)
    assert report.equal
    assert {layer.name for layer in report.layers} >= {s.name for s in model.outputs}
    assert len(report.layers) >= 0.8 * sum(len(n.outputs) for n in after.graph.nodes)
    inside = {layer.op for layer in report.layers if report.diverges(layer)}
    assert inside <= {
        "MatMul",
        "Add",
        "Reshape",
        "Transpose",
        "Mul",
    }  # attention's scale moves into the weights before it
    assert not inside or "vit" in path.name


def test_the_first_divergence_is_named_and_what_stands_there() -> None:
    model = ir.parse(CHAIN)
    report = compare_layers(model, damaged(model, "a", [3, 2, 1.5]), feeds=feeds(model))
    assert not report.equal
    assert report.first is not None
    assert (report.first.name, report.first.node, report.first.op, report.first.matched) == ("a", "a", "Add", "name")
    assert report.around == ("reference: [a] a = Add (m, b)", "candidate: [a] a = Add (m, damaged)")
    assert [layer.name for layer in report.layers if report.diverges(layer)] == ["a", "r", "e", "l", "y"]


def test_a_difference_that_reaches_no_output_does_not_count() -> None:
    model = ir.parse(CHAIN)
    other = ir.parse(CHAIN.replace("e = Exp (r) [l] l = Log (e)", "e = Neg (r) [l] l = Neg (e)"))
    report = compare_layers(model, other, feeds=feeds(model), tolerance=1e-3)
    assert report.equal
    assert [layer.name for layer in report.layers if report.diverges(layer)] == ["e"]


def test_counterparts_by_origin_value_and_place() -> None:
    model = ir.parse(CHAIN)
    renamed = ir.parse(CHAIN.replace(" m = Mul", " m2 = Mul").replace("(m, b)", "(m2, b)"))
    report = compare_layers(model, renamed, feeds=feeds(model))
    assert {(x.name, x.counterpart, x.matched) for x in report.layers if x.matched != "name"} == {("m", "m2", "value")}
    other = damaged(renamed, "m", [1, 2, 30])
    node = next(n for n in other.nodes() if n.name == "m")
    for name, origin, matched in (("m", ("m",), "node"), ("new", ("new",), "place"), ("new", ("m",), "origin")):
        node.name, node.origin = name, origin
        report = compare_layers(model, other, feeds=feeds(model))
        assert report.first is not None
        assert (report.first.name, report.first.counterpart, report.first.matched) == ("m", "m2", matched)
    layers.write_origins(other)
    report = compare_layers(model, ir.loads(ir.saves(other)), feeds=feeds(model))
    assert report.first is not None
    assert (report.first.counterpart, report.first.matched) == ("m2", "origin")


def test_a_wrong_fusion_is_found_where_it_happened() -> None:
    model = ir.load(next(p for p in NETS if p.name == "resnet.legacy.onnx"))
    after = Pipeline.parse("O2").run(model).model
    conv = [n for n in after.graph.nodes if n.op == "Conv"][3]
    conv.inputs[1] = ir.Constant("wrong", conv.inputs[1].values * np.float32(1.01))
    report = compare_layers(model, ir.loads(ir.saves(after)), feeds=feeds(model, 1))
    assert report.first is not None
    assert report.first.counterpart == conv.outputs[0].name
    assert report.first.op == "BatchNormalization"


def test_no_run_gives_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    body = " ".join(f"[n{i}] t{i} = Neg ({f't{i - 1}' if i else 'x'})" for i in range(100))
    model = ir.parse(f"g (float[1024] x) => (float[1024] y) {{ {body} y = Neg (t99) }}")
    sizes: list[int] = []
    real = Evaluator.run

    def run(self: Evaluator, sample: Any) -> Any:
        found = real(self, sample)
        sizes.append(sum(v.nbytes for v in found.values()))
        return found

    monkeypatch.setattr(Evaluator, "run", run)
    report = compare_layers(model, model.clone(), feeds=feeds(model, 1), budget=64 << 10)
    assert len(report.layers) == 101
    assert max(sizes) <= 64 << 10
    assert sum(sizes) >= 2 * 101 * 4096


def test_values_without_numbers_bodies_and_random_draws() -> None:
    text = """g (float[2] x, bool c) => (float[2] y, float[2] z) {
      [r] r = RandomNormal <shape = [2]> ()  [a] a = Add (x, r)
      [s] s = SequenceConstruct (a, x)  [t] z = SequenceAt (s, i)
      [if] b = If (c) <then_branch = g1 () => (float[2] p) { p = Neg (x) }, else_branch = g2 () => (float[2] q) { q = Abs (x) }>
      [l] l = Log (b)  [o] y = Identity (l) }""".replace("{\n      [r]", "<int64 i = {0}>\n{ [r]", 1)
    model = ir.parse(text)
    report = compare_layers(model, model.clone(), feeds=feeds(model))
    assert report.equal
    assert report.bodies == 2
    assert any(np.isnan(layer.sqnr) for layer in report.layers)  # a sequence, or NaN from Log


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.onnxtxt").write_text(CHAIN)
    ir.save(damaged(ir.parse(CHAIN), "a", [3, 2, 1.5]), tmp_path / "b.onnx")

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return cli.run([str(a) for a in arguments]), *capfd.readouterr()

    return call


def test_compare_layers_on_the_command_line(run: Callable[..., Any]) -> None:
    np.savez("d.npz", x=np.ones((2, 3), np.float32))
    code, out, err = run("compare", "a.onnxtxt", "b.onnx", "--layers", "--data", "d.npz", "--report", "r.json")
    assert code == 1
    assert "part at tensor 'a' of node 'a' (Add)" in err
    assert "candidate: [a] a = Add (m, damaged)" in err
    assert "Relu" in out
    report = json.loads(Path("r.json").read_text())
    assert report["first"]["tensor"] == "a"
    assert [row["tensor"] for row in report["layers"]] == ["m", "a", "r", "e", "l", "y"]
    code, out, err = run("compare", "a.onnxtxt", "a.onnxtxt", "--layers")
    assert code == 0
    assert "the outputs agree" in err


def test_opt_origins_keeps_what_nodes_stand_for(run: Callable[..., Any]) -> None:
    net = next(p for p in NETS if p.name == "resnet.legacy.onnx")
    assert run("opt", net, "-o", "o.onnx", "--origins")[0] == 0
    assert run("opt", "o.onnx", "-o", "p.onnx", "-O0")[0] == 0  # and a later run does not lose it
    code, _, _ = run("compare", net, "p.onnx", "--layers", "--report", "r.json")
    assert code == 0
    kinds = {row["matched"] for row in json.loads(Path("r.json").read_text())["layers"]}
    assert kinds == {"name", "origin"}


def test_other_interfaces_are_told() -> None:
    model = ir.parse(CHAIN)
    with pytest.raises(NotEquivalent, match="inputs differ"):
        compare_layers(model, ir.parse(CHAIN.replace("x", "z")), feeds=feeds(model))
