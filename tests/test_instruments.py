"""What is called around passes: order, proof, and files that fail again."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from graphopt import equivalence, ir
from graphopt.errors import PassError, VerifyError
from graphopt.instruments import (
    Compare,
    Dump,
    FullCheck,
    PrintAfterChange,
    Reproducer,
    Statistics,
    Timing,
    Verify,
    _Silent,
)
from graphopt.ir import Constant, Model
from graphopt.pass_base import Context, Exactness, Pass
from graphopt.pipeline import Pipeline

TEXT = "g (float[2] x) => (float[2] y) <float[2] w = {1,2}> { a = Identity (x) b = Add (a, w) y = Exp (b) }"


@dataclass(frozen=True)
class Wrong(Pass):
    """Break the model in one way."""

    how: str = "numbers"

    def run(self, model: Model, ctx: Context) -> int:
        if not ctx.admit():
            return 0
        add = next(n for n in model.nodes() if n.op == "Add")
        match self.how:
            case "numbers" | "slightly":
                factor = 2 if self.how == "numbers" else 1 + 2**-23
                add.inputs[1] = Constant("w2", (add.inputs[1].values * factor).astype(np.float32))
            case "op":
                add.op = "NoSuchOp"
            case "attribute":
                add.attrs["axis"] = 3
            case "interface":
                model.graph.outputs[0].shape = (3,)
            case "input":
                model.graph.inputs[0].shape = (None,)
            case "dangling":
                add.inputs[0] = ir.Variable("ghost", np.dtype(np.float32), (2,))
            case "raise":
                raise RuntimeError("on purpose")
        return 1


@dataclass(frozen=True)
class Slightly(Wrong):
    """Re-associate."""

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING


class Journal(_Silent):
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        self.calls.append(f"{self.name} begin")

    def before_pass(self, step: Pass, model: Model, ctx: Context) -> None:
        self.calls.append(f"{self.name} before {step.pass_name()}")

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        self.calls.append(f"{self.name} after {step.pass_name()} {rewrites}")

    def pass_failed(self, step: Pass, model: Model, ctx: Context, error: Exception) -> None:
        self.calls.append(f"{self.name} failed {type(error).__name__}")

    def after_pipeline(self, model: Model, ctx: Context) -> None:
        self.calls.append(f"{self.name} end")


def test_instruments_are_called_in_the_order_given() -> None:
    calls: list[str] = []
    Pipeline.parse("eliminate-identity").run(ir.parse(TEXT), instruments=[Journal("a", calls), Journal("b", calls)])
    assert calls == [
        f"{n} {what}"
        for what in ("begin", "before eliminate-identity", "after eliminate-identity 1", "end")
        for n in "ab"
    ]


def test_a_failure_is_told_to_all_and_ends_the_pipeline() -> None:
    calls: list[str] = []
    with pytest.raises(PassError, match="on purpose"):
        Pipeline((Wrong("raise"), Wrong())).run(ir.parse(TEXT), instruments=[Journal("a", calls), Journal("b", calls)])
    assert calls[-2:] == ["a failed RuntimeError", "b failed RuntimeError"]
    assert sum("before" in c for c in calls) == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("interface", r"output .y. changed from float32\[2\] y to float32\[3\] y"),
        ("input", "input .x. changed from float32"),
        ("dangling", "reads 'ghost' before it is defined"),
    ],
)
def test_verify_is_the_default_and_catches(how: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        Pipeline((Wrong(how),)).run(ir.parse(TEXT))


def test_full_check_catches_what_structure_cannot_see() -> None:
    for how in ("op", "attribute"):
        Pipeline((Wrong(how),)).run(ir.parse(TEXT))
        with pytest.raises(VerifyError, match=r"left an invalid model: onnx\.checker"):
            Pipeline((Wrong(how),)).run(ir.parse(TEXT), instruments=[FullCheck()])


def test_compare_catches_a_wrong_pass() -> None:
    with pytest.raises(PassError, match=r"test-instruments changed the numbers: output 'y' differs by .* 0 allowed"):
        Pipeline((Wrong(),)).run(ir.parse(TEXT), instruments=[Compare()])


def test_compare_allows_what_the_class_of_the_pass_argues() -> None:
    with pytest.raises(PassError, match="changed the numbers"):
        Pipeline((Wrong("slightly"),)).run(ir.parse(TEXT), instruments=[Compare()])
    compare = Compare()
    Pipeline((Slightly("slightly"),)).run(ir.parse(TEXT), instruments=[compare])
    assert 0 < compare.reports[0][1].differences[0].relative <= compare.reports[0][1].tolerance
    with pytest.raises(PassError, match="changed the numbers"):
        Pipeline((Slightly("numbers"),)).run(ir.parse(TEXT), instruments=[Compare()])


def test_compare_catches_a_pass_that_leaves_nothing_to_run() -> None:
    with pytest.raises(PassError, match="the candidate cannot"):
        Pipeline((Wrong("op"),)).run(ir.parse(TEXT), instruments=[Compare()])


def test_compare_says_when_nothing_is_proven() -> None:
    model = ir.parse("g (float[N] x) => (float[N] y) <int64[1] s = {77}> { a = Identity (x) y = Reshape (a, s) }")
    compare = Compare()
    result = Pipeline.parse("O2").run(model, instruments=[compare])
    assert "nothing is proven" in str(compare.unproven)
    assert any("not compared" in str(r) for r in result.remarks)


def test_compare_knows_that_a_float16_model_with_float32_outputs_rounds_in_float16() -> None:
    compare = Compare()
    model = ir.parse(
        "g (float[1,1,1,1] x) => (float[1,1,1,1] y) <float16[1,1,1,1] w = {11878}, float16[1] s = {11878}, float16[1] b = {0}, float16[1] m = {0}, float16[1] v = {13107}>"
        "{ h = Cast <to = 10> (x) c = Conv (h, w) n = BatchNormalization (c, s, b, m, v) y = Cast <to = 1> (n) }"
    )
    Pipeline.parse("fuse-conv-bn").run(model, instruments=[compare])
    assert compare.reports[0][1].tolerance >= 64 * 2.0**-10


def test_timing_statistics_and_dump(tmp_path: Path) -> None:
    timing, statistics, dump = Timing(), Statistics(), Dump(tmp_path / "steps")
    Pipeline.parse("eliminate-identity,eliminate-dead").run(ir.parse(TEXT), instruments=[timing, statistics, dump])
    assert [t.pass_name for t in timing.times] == ["eliminate-identity", "eliminate-dead"]
    assert all(t.wall_seconds >= 0 and t.cpu_seconds >= 0 for t in timing.times)
    assert [(c.pass_name, c.nodes, c.initializer_bytes) for c in statistics.history] == [
        ("", 3, 8),
        ("eliminate-identity", 2, 8),
        ("eliminate-dead", 2, 8),
    ]
    assert statistics.history[0].operators == {"Add": 1, "Exp": 1, "Identity": 1}
    files = sorted(p.name for p in (tmp_path / "steps").iterdir())
    assert files == ["000-input.onnx", "001-eliminate-identity.onnx", "002-eliminate-dead.onnx"]
    assert [len(list(ir.load(tmp_path / "steps" / f).nodes())) for f in files] == [3, 2, 2]


def test_print_after_change_emits_a_diff() -> None:
    texts: list[str] = []
    Pipeline.parse("eliminate-identity,eliminate-identity").run(
        ir.parse(TEXT), instruments=[PrintAfterChange(texts.append)]
    )
    assert len(texts) == 1
    assert "+++ after eliminate-identity" in texts[0]
    assert any(line.startswith("-") and "Identity" in line for line in texts[0].splitlines())


def test_reproducer_writes_a_file_that_fails_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import pipeline

    real = pipeline.find_pass
    known = {**pipeline.pass_modules(), "wrong": "tests"}
    monkeypatch.setattr(pipeline, "pass_modules", lambda: known)
    monkeypatch.setattr(pipeline, "find_pass", lambda name: Wrong if name == "wrong" else real(name))
    monkeypatch.setattr(Wrong, "pass_name", classmethod(lambda cls: "wrong"))
    path = tmp_path / "a b.onnx"
    for how, kind in (("raise", PassError), ("dangling", VerifyError), ("numbers", PassError)):
        instruments = [Verify(), Compare(), Reproducer(path)]
        with pytest.raises(kind) as first:
            Pipeline.parse(f"eliminate-identity,wrong{{how={how}}}").run(ir.parse(TEXT), instruments=instruments)
        model = ir.load(path)
        assert sorted(n.op for n in model.nodes()) == ["Add", "Exp"]  # right before the failing pass
        for _ in range(2):  # a reproducer of a reproducer holds the same
            facts = json.loads({p.key: p.value for p in model.carried.metadata_props}[Reproducer.KEY])
            assert facts["pipeline"] == f"wrong{{how={how}}}" if how != "numbers" else "wrong"
            assert shlex.split(facts["command"]) == [
                "graphopt",
                "opt",
                str(path),
                "-o",
                "out.onnx",
                "-p",
                facts["pipeline"],
            ]
            with pytest.raises(kind) as again:
                Pipeline.parse(facts["pipeline"]).run(model, instruments=[Verify(), Compare(), Reproducer(path)])
            assert str(again.value).split("; passes before")[0] == str(first.value).split("; passes before")[0]
            assert f"reproduce with: {facts['command']}" in first.value.__notes__
            model = ir.load(path)
            assert len(model.carried.metadata_props) == 1


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="on purpose") as caught:
        Pipeline((Wrong("raise"),)).run(ir.parse(TEXT), instruments=[Reproducer(tmp_path / "missing" / "a.onnx")])
    assert any("no reproducer: cannot write" in n for n in caught.value.__notes__)


def test_comparison_of_a_whole_preset_on_given_feeds() -> None:
    compare = Compare([{"x": np.array([1, 2], np.float32)}])
    Pipeline.parse("O2").run(ir.parse(TEXT), instruments=[Verify(), FullCheck(), compare])
    name, report = compare.reports[0]
    assert (name, report.samples, report.equal) == ("eliminate-identity", 1, True)
    assert equivalence.tolerance(Exactness.EXACT, 0, []) == 0
