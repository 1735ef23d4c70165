"""Finding the single rewrite that broke a model, whatever it did, and going on without it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from culprits import NegToMul, chain, install

from graphopt import bisection, cli, ir, models, verdict
from graphopt.bisection import Bisection, Turn, turn
from graphopt.errors import UsageError
from graphopt.graph_diff import diff
from graphopt.ir import Model
from graphopt.pipeline import Fixpoint, Pipeline
from graphopt.recovery import Recovery
from graphopt.verdict import Command, Numbers, Verdict

NETS = Path(models.__file__).resolve().parent
PIPELINE = "fixpoint(eliminate-identity,neg-to-mul{{at=neg7,how={how}}}),eliminate-dead"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnxtxt").write_text(chain(12))

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        return Done(cli.run([str(a) for a in arguments]), *capfd.readouterr())

    return call


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("bad", [1, 2, 37, 99, 100])
def test_the_turn_is_found_in_few_questions(bad: int) -> None:
    asked: list[int] = []

    def judge(number: int) -> Verdict:
        asked.append(number)
        return Verdict.BAD if number >= bad else Verdict.GOOD

    assert turn(0, 100, judge) == Turn(bad - 1, bad)
    assert len(asked) <= 7
    assert len(set(asked)) == len(asked)


def test_the_turn_of_an_alternating_judge_is_one() -> None:
    def judge(number: int) -> Verdict:
        return Verdict.BAD if number % 7 in (3, 4) else Verdict.GOOD

    found = turn(0, 94, judge)
    assert found.bad == found.good + 1
    assert (judge(found.good), judge(found.bad)) == (Verdict.GOOD, Verdict.BAD)


def test_what_cannot_be_told_is_skipped_and_named_where_it_hides_the_turn() -> None:
    def judge(number: int) -> Verdict:
        return Verdict.UNKNOWN if 40 <= number <= 60 else Verdict.BAD if number >= self_bad else Verdict.GOOD

    self_bad = 70
    assert turn(0, 100, judge) == Turn(69, 70)
    self_bad = 50
    assert turn(0, 100, judge) == Turn(39, 61, tuple(range(40, 61)))


# ---------------------------------------------------------------------------------------------------------- bisect


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("numbers", "output 'y' differs by"),
        ("nan", "differ in NaN or infinity"),
        ("raise", "RuntimeError: on purpose"),
        ("dangling", "reads 'ghost' before it is defined"),
        ("interface", "output 'y' changed"),
        ("operator", "the candidate cannot"),
    ],
)
def test_bisect_finds_the_one_rewrite_of_many(run: Callable[..., Done], how: str, reason: str) -> None:
    done = run("bisect", "m.onnxtxt", "-p", PIPELINE.format(how=how), "--report", "r.json")
    assert done.code == 0, done
    found = json.loads(Path("r.json").read_text())["culprit"]
    assert (found["pass"], found["round"], found["nodes"]) == ("neg-to-mul", 1, ["neg7"])
    assert found["rewrite"] == 12 + 8  # 12 Identities first, then the eighth Neg
    assert reason in found["reason"]
    assert found["counted"]
    assert found["good_without_it"] is True
    if how != "raise":
        assert "- [neg7] n7 = Neg (a6)" in found["diff"]
        assert any(line.startswith("+ [neg7_mul]") for line in found["diff"])
    assert "neg-to-mul, round 1" in done.out
    assert json.loads(Path("r.json").read_text())["runs"] <= 12


def test_bisect_says_when_nothing_is_wrong(run: Callable[..., Done]) -> None:
    for arguments in (["-O2"], ["-p", "eliminate-identity", "--tolerance", "0"], ["-p", ""], ["--cmd", "true"]):
        done = run("bisect", "m.onnxtxt", *arguments)
        assert done.code == 0
        assert "nothing wrong" in done.out


def test_a_pass_that_does_not_ask_is_found_as_a_whole(run: Callable[..., Done]) -> None:
    done = run(
        "bisect",
        "m.onnxtxt",
        "-p",
        "eliminate-identity,neg-to-mul{at=neg7,asks=false},eliminate-dead",
        "--report",
        "r.json",
    )
    found = json.loads(Path("r.json").read_text())["culprit"]
    assert done.code == 0
    assert (found["pass"], found["rewrite"], found["rewrites"], found["counted"]) == (
        "neg-to-mul",
        13,
        14,
        False,
    )  # eliminate-dead asks too
    assert len(found["nodes"]) == 12
    assert "does not ask before each rewrite" in done.out


def test_a_pass_that_does_not_ask_is_not_run_beyond_the_limit() -> None:
    model, ctx = ir.parse(chain(4)), bisection._plain_context()
    ctx.limit = 0
    result = Pipeline((NegToMul(asks=False),)).run(model, ctx)
    assert (result.rewrites, ctx.admitted) == (0, 0)


def test_bisect_by_a_command(run: Callable[..., Done], tmp_path: Path) -> None:
    check = script(tmp_path / "check.sh", 'test -f "$1" && ! grep -q neg7_mul "$1"')
    done = run("bisect", "m.onnxtxt", "-p", PIPELINE.format(how="numbers"), "--cmd", str(check), "--report", "r.json")
    found = json.loads(Path("r.json").read_text())["culprit"]
    assert done.code == 0
    assert (found["pass"], found["nodes"], found["reason"]) == ("neg-to-mul", ["neg7"], "exit code 1")
    done = run("bisect", "m.onnxtxt", "-p", PIPELINE.format(how="numbers"), "--cmd", "sh -c '! grep -q neg7_mul {}'")
    assert "culprit: rewrite 20 of" in done.out


def test_a_command_that_cannot_tell_leaves_a_range(run: Callable[..., Done], tmp_path: Path) -> None:
    check = script(tmp_path / "check.sh", "grep -q neg9_mul $1 && exit 1; grep -q neg3_mul $1 && exit 125; exit 0")
    done = run("bisect", "m.onnxtxt", "-p", "neg-to-mul", "--cmd", check)
    assert done.code == 0
    assert "it may be one of 4 to 10" in done.out


def test_a_command_that_hangs_is_killed(run: Callable[..., Done], tmp_path: Path) -> None:
    check = script(tmp_path / "check.sh", "grep -q neg2_mul $1 && sleep 60; exit 0")
    done = run("bisect", "m.onnxtxt", "-p", "neg-to-mul", "--cmd", check, "--timeout", "0.4")
    assert done.code == 0
    assert "culprit: rewrite 3 of" in done.out
    assert "killed after 0.4 s" in done.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cmd", "no-such-program-here"], "no such program"),
        (["--cmd", ""], "--cmd is empty"),
        (["--cmd", "sh -c 'x"], "no closing quotation"),
        (["--cmd", "true", "--tolerance", "1"], "exclude each other"),
        (["--timeout", "1"], "belongs to --cmd"),
        (["--cmd", "true", "--timeout", "-1"], "positive number"),
        (["--data", "missing.npz"], "cannot read"),
        (["--tolerance", "nan"], "--tolerance"),
    ],
)
def test_wrong_use_is_told(run: Callable[..., Done], arguments: list[str], told: str) -> None:
    done = run("bisect", "m.onnxtxt", *arguments)
    assert done.code == 2, done
    assert told in done.err
    assert len(done.err.strip().splitlines()) <= 3


def test_what_approximates_needs_a_tolerance_or_a_command(run: Callable[..., Done]) -> None:
    arguments = ("bisect", NETS / "vit.legacy.onnx", "-p", "quantize-dynamic")
    done = run(*arguments)
    assert done.code == 2
    assert "--tolerance or --cmd" in done.err
    assert "nothing wrong" in run(*arguments, "--tolerance", "0.5").out
    assert "culprit: rewrite " in run(*arguments, "--tolerance", "1e-4").out


def test_a_model_without_inputs_that_fit_is_told(run: Callable[..., Done]) -> None:
    text = "g (float[N] x) => (float[N] y) <int64[1] s = {77}> { a = Identity (x) y = Reshape (a, s) }"
    Path("n.onnxtxt").write_text(text)
    done = run("bisect", "n.onnxtxt")
    assert done.code == 1
    assert "give --data or --shape" in done.err
    assert "nothing wrong" in run("bisect", "n.onnxtxt", "--shape", "x=77").out


def test_the_page_on_debugging_shows_what_is_printed(run: Callable[..., Done]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "debugging.md").read_text()
    done = run("bisect", "m.onnxtxt", "-p", PIPELINE.format(how="numbers"))
    assert done.out.strip().splitlines()[:-1] == page.partition("```text\n")[2].partition("```")[0].strip().splitlines()


def test_a_model_that_is_bad_before_any_rewrite_has_no_culprit(run: Callable[..., Done]) -> None:
    done = run("bisect", "m.onnxtxt", "--cmd", "false")
    assert done.code == 1
    assert "bad before any rewrite" in done.err
    assert "error: nothing can be told" in run("bisect", "m.onnxtxt", "--cmd", "sh -c 'exit 125'").err


def test_random_operators_get_a_seed_so_that_numbers_can_judge(run: Callable[..., Done]) -> None:
    Path("r.onnxtxt").write_text(
        "g (float[2] x) => (float[2] y) { [rand] r = RandomNormal <shape = [2]> () [s] s = Add (x, r) [neg0] y = Neg (s) }"
    )
    assert "nothing wrong" in run("bisect", "r.onnxtxt").out
    done = run("bisect", "r.onnxtxt", "-p", "neg-to-mul{at=neg0}")
    assert "culprit: rewrite 1 of 1" in done.out


def test_alternating_results_are_searched_all_the_same() -> None:
    """Wrong after an odd number of rewrites of a pass: some turn is found, and it is a real one."""

    class Alternating:
        def judge(self, model: Model) -> tuple[Verdict, str]:
            count = sum(n.op == "Mul" for n in model.nodes())
            return (Verdict.BAD if count % 2 else Verdict.GOOD), f"{count} products"

    found = Bisection(ir.parse(chain(11)), Pipeline((NegToMul(),)), Alternating()).find()
    assert found is not None
    assert found.number % 2 == 1
    assert found.nodes == (f"neg{found.number - 1}",)
    assert found.alone is True  # ten are made then


def test_numbering_is_stable_up_to_the_limit_on_real_passes() -> None:
    model = ir.load(NETS / "vit.legacy.onnx")
    full = bisection._plain_context()
    steps = Pipeline.parse("O2").run(model, full).steps
    for limit in (1, full.admitted // 2, full.admitted - 1):
        ctx = bisection._plain_context()
        ctx.limit = limit
        bounded = Pipeline.parse("O2").run(model, ctx).steps
        done = [s for s in bounded if s.rewrites]
        assert ctx.admitted == limit
        assert [s for s in steps if s.rewrites][: max(len(done) - 1, 0)] == done[:-1]


# ------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("how", ["numbers", "nan", "raise", "dangling", "interface", "operator"])
def test_only_the_failing_rewrite_is_left_out(how: str) -> None:
    model = ir.parse(chain(12))
    told: list[str] = []
    recovery = Recovery(say=told.append)
    steps = Pipeline.parse(PIPELINE.format(how=how))
    result = steps.run(model, recovery=recovery)
    left = [n.name for n in result.model.nodes() if n.op == "Neg"]
    assert left == ["neg7"]
    assert not [n for n in result.model.nodes() if n.op == "Identity"]
    (dropped,) = recovery.dropped
    assert (dropped.pass_name, dropped.nodes, dropped.rest) == ("neg-to-mul", ("neg7",), False)
    assert len(told) == 1
    assert "left out, since it fails" in told[0]
    assert any("'neg7'" in str(r) for r in result.remarks)
    assert Numbers(model, 1e-6).judge(result.model)[0] is Verdict.GOOD
    assert sum(s.rewrites for s in result.steps if s.pass_name == "neg-to-mul") == 11


def test_several_failing_rewrites_are_left_out_one_by_one() -> None:
    model = ir.parse(chain(6))
    pipeline = Pipeline((Fixpoint((NegToMul(at="neg1"), NegToMul(at="neg4", how="raise"))),))
    recovery = Recovery()
    result = pipeline.run(model, recovery=recovery)
    assert [d.nodes for d in recovery.dropped] == [("neg1",)]  # the second run finds only what the first may not touch
    assert [n.name for n in result.model.nodes() if n.op == "Neg"] == ["neg1"]


def test_a_pass_that_does_not_ask_and_fails_is_covered_where_it_touches_few_nodes() -> None:
    recovery = Recovery()
    result = Pipeline((NegToMul(at="neg1", asks=False),)).run(ir.parse(chain(3)), recovery=recovery)
    assert [n.name for n in result.model.nodes() if n.op == "Neg"] == ["neg0", "neg1", "neg2"]
    assert len(recovery.dropped) == 1


def test_two_culprits_are_told_apart_from_one(run: Callable[..., Done]) -> None:
    done = run("bisect", "m.onnxtxt", "-p", "neg-to-mul{at=neg2},neg-to-mul{at=neg2,how=raise}")
    assert "nodes: 'neg2'" in done.out
    assert "still bad: others fail too" not in done.out  # the second pass finds nothing where the first may not go
    done = run("bisect", "m.onnxtxt", "-p", "neg-to-mul{at=neg5,how=second}")
    assert "nodes: 'neg5'" in done.out
    assert "still bad: others fail too" in done.out


def test_without_a_failure_recovery_changes_nothing() -> None:
    model = ir.load(NETS / "resnet.dynamo.onnx")
    recovery = Recovery()
    there = Pipeline.parse("O2").run(model, recovery=recovery)
    plain = Pipeline.parse("O2").run(model)
    assert not recovery.dropped
    assert ir.saves(there.model) == ir.saves(plain.model)
    assert there.steps == plain.steps


# ----------------------------------------------------------------------------------------------------- small parts


def test_diff_tells_nodes_constants_types_and_what_stands_around() -> None:
    before = ir.parse(
        "g (float[2] x) => (float[2] y) <float[2] w = {1,2}> { [a] a = Relu (x) [b] b = Add (a, w) [c] y = Exp (b) }"
    )
    after = before.clone()
    assert not diff(before, after)
    node = next(n for n in after.nodes() if n.name == "b")
    node.inputs[1] = ir.Constant("w", np.array([1, 3], np.float32))
    change = diff(before, after)
    assert change.changed == ("b",)
    assert change.lines == (
        "  [a] a = Relu (x)",
        "- w = float32[2] {1.0, 2.0}",
        "+ w = float32[2] {1.0, 3.0}",
        "  [b] b = Add (a, w)",
        "  [c] y = Exp (b)  # float32[2]",
    )


def test_command_verdicts(tmp_path: Path) -> None:
    model = ir.parse(chain(1))
    for text, expected in (
        ("exit 0", Verdict.GOOD),
        ("exit 1", Verdict.BAD),
        ("exit 125", Verdict.UNKNOWN),
        ("exit 200", Verdict.BAD),
        ("kill -SEGV $$", Verdict.BAD),
    ):
        assert Command(str(script(tmp_path / "c.sh", text))).judge(model)[0] is expected
    assert (
        Command(str(script(tmp_path / "c.sh", "echo first >&2; echo why >&2; exit 3"))).judge(model)[1]
        == "exit code 3: why"
    )
    script(tmp_path / "c.sh", "kill -SEGV $$")
    assert "SIGSEGV" in Command(str(tmp_path / "c.sh")).judge(model)[1]


def test_a_command_gets_a_valid_model_and_its_children_do_not_outlive_it(tmp_path: Path) -> None:
    check = script(tmp_path / "c.sh", f"cp $1 {tmp_path}/seen.onnx; (sleep 30; touch {tmp_path}/late) & exit 0")
    assert Command(str(check)).judge(ir.parse(chain(1)))[0] is Verdict.GOOD
    assert len(list(ir.load(tmp_path / "seen.onnx").nodes())) == 5
    assert verdict._signal_name(9999) == "signal 9999"
    with pytest.raises(UsageError, match="cannot run"):
        Command(str(tmp_path))


# --------------------------------------------------------------------------------------------------- command line


def test_opt_goes_on_without_the_failing_rewrite_and_says_so(run: Callable[..., Done]) -> None:
    arguments = ("opt", "m.onnxtxt", "-o", "o.onnx", "-p", PIPELINE.format(how="raise"))
    assert run(*arguments).code == 3
    assert not Path("o.onnx").exists()
    done = run(*arguments, "--continue-without-failing", "--remarks", "--report", "r.json")
    assert done.code == 0, done
    assert "note: neg-to-mul: the rewrite of 'neg7' is left out, since it fails: RuntimeError: on purpose" in done.err
    assert "remark: neg-to-mul: the rewrite of 'neg7' is left out" in done.err
    assert json.loads(Path("r.json").read_text())["dropped"] == [
        {"pass": "neg-to-mul", "nodes": ["neg7"], "reason": "RuntimeError: on purpose", "rest": False}
    ]
    assert [n.name for n in ir.load("o.onnx").nodes() if n.op == "Neg"] == ["neg7"]


def test_build_goes_on_without_the_failing_rewrite_and_the_manifest_says_so(run: Callable[..., Done]) -> None:
    arguments = ("build", "m.onnxtxt", "-o", "out", "-t", "ort:cpu", "-p", PIPELINE.format(how="numbers"))
    assert run(*arguments).code == 1
    done = run(*arguments, "--continue-without-failing")
    assert done.code == 0, done
    assert done.err.count("left out") == 1
    manifest = json.loads(Path("out/manifest.json").read_text())
    jsonschema.validate(manifest, json.loads((Path(ir.__file__).parent / "manifest.schema.json").read_text()))
    (variant,) = manifest["variants"]
    assert variant["dropped"][0]["nodes"] == ["neg7"]
    assert any("left out" in remark for remark in variant["remarks"])
    assert variant["proof"]["relative"] <= variant["proof"]["tolerance"]


def test_reproduce_says_whether_it_still_fails(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez("d.npz", x=np.array([1, 2], np.float32))
    for how, extra in (
        ("raise", []),
        ("dangling", []),
        ("numbers", ["--compare-each", "--data", "d.npz"]),
        ("operator", ["--check"]),
    ):
        failing = ["opt", "m.onnxtxt", "-o", "o.onnx", "-p", PIPELINE.format(how=how), "--reproducer", "f.onnx", *extra]
        done = run(*failing)
        assert done.code == 3
        assert "graphopt reproduce f.onnx" in done.err
        done = run("reproduce", "f.onnx", "--report", "r.json")
        assert (done.code, done.err) == (1, ""), how
        assert done.out.startswith("it still fails: "), done.out
        assert json.loads(Path("r.json").read_text())["same"] is True
    with monkeypatch.context() as mended:
        mended.setattr(NegToMul, "run", lambda self, model, ctx: 0)
        done = run("reproduce", "f.onnx")
        assert done.code == 0
        assert "does not fail any more" in done.out
    with monkeypatch.context() as other:
        other.setattr(NegToMul, "run", lambda self, model, ctx: 7)
        done = run("reproduce", "f.onnx")
        assert done.code == 1
        assert "fails, though otherwise" in done.out


def test_what_is_no_reproducer_is_told(run: Callable[..., Done]) -> None:
    done = run("reproduce", "m.onnxtxt")
    assert done.code == 1
    assert "is no reproducer" in done.err
    for value in ("{", "[]", '{"pipeline": 3, "error": ""}', '{"pipeline": "", "error": "", "feeds": [{"x": 3}]}'):
        model = ir.parse(chain(1))
        entry = model.carried.metadata_props.add()
        entry.key, entry.value = "graphopt.reproduce", value
        ir.save(model, "bad.onnx")
        done = run("reproduce", "bad.onnx")
        assert done.code == 1
        assert "damaged" in done.err
    model.carried.metadata_props[0].value = '{"pipeline": "no-such-pass", "error": ""}'
    ir.save(model, "bad.onnx")
    done = run("reproduce", "bad.onnx")
    assert done.code == 2
    assert "unknown pass" in done.err
