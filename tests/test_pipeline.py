"""Pipelines: their text form, and what the driver demands of passes."""

from __future__ import annotations

import dataclasses
import enum
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from graphopt import ir, pipeline, verify
from graphopt.errors import InternalError, InvalidModel, PassError, PipelineSyntaxError, UnknownPass
from graphopt.evaluate import evaluate_node
from graphopt.garbage import patient_collector
from graphopt.ir import Model
from graphopt.pass_base import Context, Exactness, Pass
from graphopt.pipeline import PRESETS, Fixpoint, Pipeline

TEXT = "g (float[2] x) => (float[2] y) { a = Identity (x) b = Identity (a) y = Exp (b) }"


class Color(enum.Enum):
    RED = "red"
    ODD = "a,b"
    UPPER = "Up"


@dataclass(frozen=True)
class Everything(Pass):
    """One option of every type."""

    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    word: str = "w"
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (0, "")
    nested: tuple[tuple[int, ...], ...] = ()
    maybe: int | None = None
    either: int | str = 0
    kind: Literal["entropy", "none"] = "entropy"
    color: Color = Color.RED
    path: Path = Path()
    listed: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")

    def run(self, model: Model, ctx: Context) -> int:
        return 0


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.find_pass
    known = {**pipeline.pass_modules(), "everything": "tests"}
    monkeypatch.setattr(pipeline, "pass_modules", lambda: known)
    monkeypatch.setattr(pipeline, "find_pass", lambda name: Everything if name == "everything" else real(name))
    monkeypatch.setattr(Everything, "pass_name", classmethod(lambda cls: "everything"))


# ------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flag": True, "count": -0, "ratio": 1e-30},
        {"count": 1 << 70},
        {"ratio": float("inf")},
        {"ratio": 3.0},
        *(
            {"word": w}
            for w in ("", "a b", "a,b", "it's", '"', "true", "none", "5", "0", "1e5", "\\d+", "ä\n", "a{b}", "[", "=")
        ),
        *({"names": n} for n in (("a",), ("/head/*", "a,b", ""), ("none", "1"))),
        {"pair": (3, "4")},
        {"nested": ((1, 2), (), (3,))},
        {"maybe": 7},
        *({"either": e} for e in ("5", 5, "x", "none")),
        {"kind": "none"},
        *({"color": c} for c in Color),
        {"path": Path("a b/c")},
        *({"listed": value} for value in ((), ("none",), ("a", "b"))),
    ],
    ids=str,
)
@pytest.mark.usefixtures("everything")
def test_text_form_reads_back(options: dict[str, Any]) -> None:
    written = Pipeline((Fixpoint((Everything(**options),)), Everything(**options)))
    assert Pipeline.parse(str(written)) == written
    read = Pipeline.parse(str(written)).passes[0]
    assert {f.name: type(getattr(read, f.name)) for f in dataclasses.fields(Everything)} == {
        f.name: type(getattr(written.passes[0], f.name)) for f in dataclasses.fields(Everything)
    }


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("everything{flag=TRUE , count = 3}", {"flag": True, "count": 3}),
        ("everything{names=a}", {"names": ("a",)}),
        ("everything{names=[a,'b,c',\"d\"],}", {"names": ("a", "b,c", "d")}),
        (r"everything{word='\d+'}", {"word": r"\d+"}),
        ("everything{maybe=none}", {}),
        ("everything{maybe=None,either=1.5}", {"either": "1.5"}),
        ("everything{}", {}),
        ("everything{color=RED}", {"color": Color.RED}),
        ("everything{flag=1}", {"flag": True}),
    ],
)
@pytest.mark.usefixtures("everything")
def test_spellings(text: str, options: dict[str, Any]) -> None:
    assert Pipeline.parse(text).passes == (Everything(**options),)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("fold-constant", 0, "unknown pass 'fold-constant' (did you mean 'fold-constants'?)"),
        ("fold_constants", 0, "did you mean 'fold-constants'?"),
        ("O2,xyzzy", 3, "unknown pass 'xyzzy'; `graphopt passes` lists them"),
        ("fixpont(eliminate-dead)", 0, "did you mean 'fixpoint'?"),
        ("eliminate-dead,", 15, "expected the name of a pass"),
        ("eliminate-dead,,O1", 15, "expected the name of a pass"),
        (",", 0, "expected the name of a pass"),
        ("eliminate-dead O1", 15, "expected ',' or the end, found 'O'"),
        ("eliminate-dead)", 14, "expected ',' or the end, found ')'"),
        ("O2{}", 2, "expected ',' or the end, found '{'"),
        ("fixpoint", 8, "expected '(' after fixpoint"),
        ("fixpoint(O1", 11, "expected ')' or ','"),
        ("everything{", 11, "expected the name of an option or '}'"),
        ("everything{count", 16, "expected '=' after option 'count'"),
        ("everything{count=}", 17, "expected a value"),
        ("everything{count=1", 18, "expected ',' or '}'"),
        ("everything{count=1 ratio=2}", 19, "expected ',' or '}'"),
        ("everything{coumt=1}", 11, "everything has no option 'coumt' (did you mean 'count'?)"),
        ("everything{count=1,count=2}", 19, "option 'count' is given twice"),
        ("everything{count=many}", 17, "option 'count': 'many' is no integer"),
        ("everything{count=1.5}", 17, "'1.5' is no integer"),
        ("everything{ratio=x}", 17, "'x' is no number"),
        ("everything{flag=yes}", 16, "'yes' is none of true, false"),
        ("everything{kind=entropie}", 16, "'entropie' is none of entropy, none"),
        ("everything{color=blue}", 17, "'blue' is none of red, a,b, Up"),
        ("everything{count=[1,2]}", 17, "takes one value, not a list"),
        ("everything{pair=[1,a,b]}", 16, "takes 2 values, found 3"),
        ("everything{names=[a}", 19, "expected ',' or ']'"),
        ("everything{names=[a", 19, "expected ',' or ']'"),
        ("everything{word='a}", 16, "string without an end"),
        ("everything{word='a\\'}", 16, "string without an end"),
        ("everything{word='\\x'}", 16, "no valid string"),
        ("everything{count=-1}", 10, "count must not be negative"),
    ],
)
@pytest.mark.usefixtures("everything")
def test_errors_have_a_caret_and_the_nearest_name(text: str, column: int, message: str) -> None:
    with pytest.raises((PipelineSyntaxError, UnknownPass)) as caught:
        Pipeline.parse(text)
    first, shown, caret = str(caught.value).split("\n")
    assert message in first
    assert shown == f"  {text}"
    assert caret == " " * (column + 2) + "^"
    assert isinstance(caught.value, UnknownPass) == ("unknown pass" in message or "did you mean 'f" in message)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_stand_for_their_passes(name: str) -> None:
    preset = Pipeline.parse(name)
    assert preset == Pipeline.parse(PRESETS[name])
    assert Pipeline.parse(str(preset)) == preset
    assert preset.exactness is not Exactness.APPROXIMATE
    assert Pipeline.parse("O0") == Pipeline.parse("") == Pipeline()
    assert Pipeline.parse("default") == Pipeline.parse("O3")
    assert Pipeline.parse(f"{name},eliminate-dead") == preset + Pipeline.parse("eliminate-dead")


def test_empty_fixpoint_reads_back() -> None:
    nothing = Pipeline.parse("fixpoint(O0)")
    assert Pipeline.parse(str(nothing)) == nothing == Pipeline.parse("fixpoint( )")


def test_exactness_is_the_loosest() -> None:
    assert Pipeline().exactness is Exactness.EXACT
    assert Pipeline.parse("fixpoint(eliminate-dead,fixpoint(fuse-conv-bn))").exactness is Exactness.REASSOCIATING


# --------------------------------------------------------------------------------------------------------- fixpoint


def test_fixpoint_stops_when_a_round_changes_nothing_and_says_so() -> None:
    result = Pipeline.parse("fixpoint(eliminate-identity,eliminate-dead)").run(ir.parse(TEXT))
    assert [(s.pass_name, s.rewrites, s.round) for s in result.steps] == [
        ("eliminate-identity", 2, 1),
        ("eliminate-dead", 0, 1),
        ("eliminate-identity", 0, 2),
        ("eliminate-dead", 0, 2),
    ]
    assert result.stops == ("fixpoint(eliminate-identity,eliminate-dead): nothing left to do after 2 rounds",)


@dataclass(frozen=True)
class Flip(Pass):
    """Swap Exp and Log for ever."""

    def run(self, model: Model, ctx: Context) -> int:
        for node in model.nodes():
            node.op = {"Exp": "Log", "Log": "Exp"}.get(node.op, node.op)
        return 1


def test_fixpoint_stops_at_its_cap_and_says_so() -> None:
    result = Pipeline((Fixpoint((Flip(),)),)).run(ir.parse(TEXT))
    assert "stopped at the cap of 20 rounds, still changing" in result.stops[0]
    assert result.rewrites == 20


def test_nested_fixpoints() -> None:
    text = "fixpoint(fixpoint(eliminate-identity),eliminate-common-subexpression)"
    assert str(Pipeline.parse(text)) == text
    result = Pipeline.parse(text).run(ir.parse(TEXT))
    rounds = [(s.pass_name, s.rewrites, s.round) for s in result.steps]
    assert rounds == [
        ("eliminate-identity", 2, 1),
        ("eliminate-identity", 0, 2),
        ("eliminate-common-subexpression", 0, 1),
        ("eliminate-identity", 0, 1),
        ("eliminate-common-subexpression", 0, 2),
    ]
    assert len(result.stops) == 3


# ------------------------------------------------------------------------------------------------- passes that lie


@dataclass(frozen=True)
class Liar(Pass):
    """Say what it did not do."""

    change: str = ""
    says: int = 0

    def run(self, model: Model, ctx: Context) -> int:
        node = model.graph.nodes[-1]
        match self.change:
            case "op":
                node.op = "Log"
            case "attribute":
                node.attrs["alpha"] = 1.0
            case "dtype":
                node.inputs[0].dtype = None
            case "shape":
                node.inputs[0].shape = ("N",)
            case "name":
                node.name = "new"
            case "order":
                model.graph.nodes[:] = model.graph.nodes[::-1]
            case "boom":
                raise ZeroDivisionError("boom")
        return self.says


@pytest.mark.parametrize("change", ["op", "attribute", "shape", "name", "order"])
def test_a_change_that_is_not_reported_is_an_error_of_the_author(change: str) -> None:
    with pytest.raises(PassError, match="reports 0 rewrites but changed the graph; pass author"):
        Pipeline((Liar(change),)).run(ir.parse(TEXT))


def test_a_report_without_a_change_is_an_error_of_the_author() -> None:
    with pytest.raises(PassError, match="reports 3 rewrites but left the graph as it was; pass author"):
        Pipeline((Liar(says=3),)).run(ir.parse(TEXT))


def test_an_exception_names_the_pass_and_what_ran_before() -> None:
    steps = Pipeline.parse("eliminate-identity").steps + (Liar("boom"),)
    with pytest.raises(
        PassError, match=r"test-pipeline failed \(ZeroDivisionError: boom\); passes before it: eliminate-identity"
    ):
        Pipeline(steps).run(ir.parse(TEXT))


# -------------------------------------------------------------------------------------------------------- the input


def test_unsorted_nodes_are_sorted_before_the_first_pass() -> None:
    model = ir.parse("g (float[2] x) => (float[2] y) { y = Exp (a) a = Neg (x) }")
    for text in ("eliminate-dead", "eliminate-common-subexpression", "fold-constants", "O2"):
        result = Pipeline.parse(text).run(model)
        assert [n.op for n in result.model.nodes()] == ["Neg", "Exp"]
        assert verify.structure(result.model) == []
    assert [n.op for n in model.nodes()] == ["Exp", "Neg"]


def test_a_cycle_is_an_invalid_model() -> None:
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Add (x, b) b = Neg (a) y = Exp (b) }")
    with pytest.raises(InvalidModel, match="cycle"):
        Pipeline.parse("O1").run(model)


def test_nodes_without_names_get_some() -> None:
    result = Pipeline.parse("eliminate-dead").run(ir.parse(TEXT))
    assert [n.name for n in result.model.nodes()] == ["Identity_a", "Identity_b", "Exp_y"]


def test_no_pass_no_change() -> None:
    model = ir.parse("g (float[2] x) => (float[2] y) { y = Exp (a) a = Neg (x) }")
    assert ir.saves(Pipeline().run(model).model) == ir.saves(model)


def test_limit_stops_in_the_middle_of_a_pipeline() -> None:
    ctx = Context(evaluate=evaluate_node, limit=1)
    result = Pipeline.parse("eliminate-identity,eliminate-identity").run(ir.parse(TEXT), ctx)
    assert [s.rewrites for s in result.steps] == [1, 0]


def test_a_file_with_two_passes_or_another_name_is_an_error_of_the_author(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import discovery

    found = {"other-name": "graphopt.passes.eliminate_dead", "no-pass": "graphopt.errors"}
    monkeypatch.setattr(discovery, "pass_modules", lambda: found)
    with pytest.raises(InternalError, match="rename the file"):
        discovery.find_pass("other-name")
    with pytest.raises(InternalError, match="must define one public subclass of Pass, found 0"):
        discovery.find_pass("no-pass")
    with pytest.raises(UnknownPass, match="did you mean 'no-pass'"):
        discovery.find_pass("no-pas")


def test_a_context_used_twice_knows_the_second_model() -> None:
    """Analyses of the first model must not speak of the second."""
    ctx = Context(evaluate=evaluate_node)
    for shape in ("2", "3"):
        model = ir.parse(f"g (float[{shape}] x) => (float[{shape}] y) {{ a = Cast <to = 1> (x) y = Exp (a) }}")
        assert [n.op for n in Pipeline.parse("O2").run(model, ctx).model.nodes()] == ["Exp"]


def test_the_collector_of_garbage_has_its_pace_back_whatever_happens():
    before = gc.get_threshold()
    seen = []

    class Spy:
        def __getattr__(self, name):
            return lambda *arguments: seen.append(gc.get_threshold()[0])

    model = ir.parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    Pipeline.parse("eliminate-dead").run(model, instruments=[Spy()])
    assert set(seen) == {1_000_000}
    assert gc.get_threshold() == before
    with pytest.raises(RuntimeError), patient_collector():
        raise RuntimeError
    assert gc.get_threshold() == before
