"""Making a failing model small: what goes, what stays, and that it is valid and the same every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import cli, ir, models, verify
from graphopt.errors import UserError
from graphopt.ir import Model
from graphopt.reduction import Reduction
from graphopt.verdict import Verdict

NETS = Path(models.__file__).resolve().parent


class Bad:
    """Bad is what holds all of these operators; counts and checks what it is asked."""

    def __init__(self, *ops: str, least: int = 0) -> None:
        self.ops, self.least, self.asked = set(ops), least, 0

    def judge(self, model: Model) -> tuple[Verdict, str]:
        self.asked += 1
        verify.full(model)
        bad = self.ops <= {n.op for n in model.nodes()} and model.nbytes >= self.least
        return (Verdict.BAD if bad else Verdict.GOOD), ""


@pytest.mark.parametrize(
    ("net", "op"),
    [("vit.legacy.onnx", "Softmax"), ("resnet.legacy.onnx", "GlobalAveragePool"), ("mobilenet.legacy.onnx", "Conv")],
)
def test_one_operator_is_left_of_a_network(net: str, op: str) -> None:
    judge = Bad(op)
    model = ir.load(NETS / net)
    before = model.fingerprint()
    search = Reduction(model, judge)
    small = search.run()
    assert [n.op for n in small.nodes()] == [op]
    assert search.size()[1] <= 8
    assert judge.asked == search.runs <= 60
    assert not search.stopped
    assert model.fingerprint() == before
    assert small.fingerprint() == Reduction(ir.load(NETS / net), Bad(op)).run().fingerprint()


def test_two_operators_far_apart_are_both_left() -> None:
    small = Reduction(ir.load(NETS / "resnet.legacy.onnx"), Bad("GlobalAveragePool", "Conv", "Add")).run()
    assert sorted(n.op for n in small.nodes()) == ["Add", "Conv", "GlobalAveragePool"]


def test_shapes_become_constants_and_bodies_stay_whole() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N,4] x, bool c) => (float[M,2] y) <int64[2] two = {-1, 2}, float[4] w = {1,2,3,4}>
    { a = Mul (x, w)  s = Shape (a)  i = Gather (s, z)  q = Mul (i, z2)  f = Concat <axis = 0> (q, z3)
      r = Reshape (a, f)
      b = If (c) <then_branch = t () => (float[K,2] p) { p = Neg (r) }, else_branch = e () => (float[K,2] o) { o = Abs (r) }>
      y = Relu (b) }""".replace(
        "float[4] w = {1,2,3,4}>",
        "float[4] w = {1,2,3,4}, int64[1] z = {0}, int64[1] z2 = {2}, int64[1] z3 = {2}>",
    )
    small = Reduction(ir.parse(text), Bad("Reshape")).run()
    assert [n.op for n in small.nodes()] == ["Reshape"]
    assert [c.dtype for c in small.constants()] == [np.int64]
    small = Reduction(ir.parse(text), Bad("Neg")).run()
    assert sorted(n.op for n in small.nodes()) == ["Abs", "If", "Neg"]


def test_the_cap_stops_the_search_at_the_best_so_far() -> None:
    search = Reduction(ir.load(NETS / "resnet.legacy.onnx"), Bad("Gemm"), most=3)
    small = search.run()
    assert search.stopped
    assert search.runs == 3
    assert "Gemm" in {n.op for n in small.nodes()}
    assert len(list(small.nodes())) < 54


def test_a_model_that_cannot_be_run_is_reduced_all_the_same() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "my.ops" : 1]>
    g (float[2] x) => (float[2] y) { a = Neg (x) b = my.ops.Own (a) c = Abs (b) y = Exp (c) }"""

    class Own:
        def judge(self, model: Model) -> tuple[Verdict, str]:
            return (Verdict.BAD if any(n.op == "Own" for n in model.nodes()) else Verdict.GOOD), ""

    small = Reduction(ir.parse(text), Own()).run()
    assert [n.op for n in small.nodes()] == [
        "Own",
        "Abs",
        "Exp",
    ]  # nothing is known of what Own gives, so it cannot end there


def test_a_model_on_which_the_command_does_not_fail_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to reduce"):
        Reduction(ir.parse("g (float[2] x) => (float[2] y) { y = Neg (x) }"), Bad("Conv")).run()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return cli.run([str(a) for a in arguments]), *capfd.readouterr()

    return call


def test_reduce_on_the_command_line(run: Callable[..., Any]) -> None:
    code, _, err = run(
        "reduce",
        NETS / "concat.legacy.onnx",
        "--cmd",
        "sh -c '! grep -q MaxPool {}'",
        "-o",
        "small.onnx",
        "--report",
        "r.json",
    )
    assert code == 0, err
    small = ir.load("small.onnx")
    verify.full(small)
    assert "MaxPool" in {n.op for n in small.nodes()}
    report = json.loads(Path("r.json").read_text())
    assert report["nodes"]["after"] == 1
    assert f"{report['runs']} runs: small.onnx" in err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--cmd", "no-such-program-here"], 2, "no such program"),
        (["--cmd", "true"], 1, "does not fail on the model (exit code 0)"),
        (["--cmd", "sh -c 'exit 125'"], 1, "exit code 125"),
        (["--cmd", "false", "-o", "missing/x.onnx"], 1, "no folder"),
        ([], 2, "--cmd"),
    ],
)
def test_wrong_use_of_reduce_is_told(run: Callable[..., Any], arguments: list[str], code: int, told: str) -> None:
    done, out, err = run("reduce", NETS / "concat.legacy.onnx", *arguments)
    assert (done, out) == (code, "")
    assert told in err
    assert not list(Path.cwd().iterdir())
