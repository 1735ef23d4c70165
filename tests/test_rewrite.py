"""The matcher and the laws that its driver holds for every rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from graphs import canonical

from graphopt import ir, verify
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.rewrite import Match, RewritePass, const, find, maybe, op


@dataclass(frozen=True)
class AddOfMul(RewritePass):
    """``x * k + b -> Affine``, written as Gemm-like Sum so that the result is easy to see."""

    pattern = op(
        "Add",
        op("Mul", "x", const("k", unshared=True), commutative=True, name="mul"),
        const("b"),
        commutative=True,
        name="add",
    )

    def rewrite(self, match: Match, edit: Editor):
        root = match.nodes["add"]
        node = Node("Sum", "sum", None, [match["x"], match["k"], match["b"]], [edit.variable("s", root.outputs[0])])
        return edit.insert_after(root, node, origin=match.nodes.values()).outputs[0]


def run(rule: RewritePass, text: str, limit: int | None = None) -> tuple[Model, int, list[str]]:
    model = ir.parse(text)
    ctx = Context(limit=limit)
    result = Pipeline((rule,)).run(model, ctx)
    assert verify.structure(result.model) == []
    return result.model, result.rewrites, [r.text for r in result.remarks]


def ops(model: Model) -> list[str]:
    return [n.op for n in model.nodes()]


WEIGHTS = "<float[2] k = {1,2}, float[2] b = {3,4}>"


@pytest.mark.parametrize("mul", ["Mul (x, k)", "Mul (k, x)"])
@pytest.mark.parametrize("add", ["Add (m, b)", "Add (b, m)"])
def test_commutative_operators_match_in_every_combination_of_orders(mul: str, add: str) -> None:
    model, rewrites, _ = run(AddOfMul(), f"g (float[2] x) => (float[2] y) {WEIGHTS} {{ m = {mul} y = {add} }}")
    assert (rewrites, ops(model)) == (1, ["Sum"])
    (node,) = model.nodes()
    assert [t.name for t in node.inputs] == ["x", "k", "b"]
    assert node.origin == ("y", "m")


def test_an_order_that_breaks_a_law_does_not_hide_one_that_keeps_all() -> None:
    """Both operands are constants; only one of them is unshared."""
    text = "g (float[2] x) => (float[2] y, float[2] z) <float[2] u = {1,2}, float[2] k = {1,2}, float[2] b = {3,4}>"
    model, rewrites, _ = run(AddOfMul(), f"{text} {{ m = Mul (k, u) y = Add (m, b) z = Mul (x, u) }}")
    assert (rewrites, sorted(ops(model))) == (1, ["Mul", "Sum"])


def refused(body: str, *, inputs: str = "float[2] x", outputs: str = "float[2] y", weights: str = WEIGHTS) -> str:
    text = f"g ({inputs}) => ({outputs}) {weights} {{ {body} }}"
    model, rewrites, remarks = run(AddOfMul(), text)
    assert rewrites == 0
    assert canonical(model) == canonical(ir.parse(text))
    return remarks[0] if remarks else ""


BRANCH = "else_branch = e () => (float[2] q) { q = Neg (x) }>"


def test_law_1_an_interior_value_has_no_reader_outside() -> None:
    assert "'m' is also read by" in refused(
        "m = Mul (x, k) y = Add (m, b) z = Neg (m)", outputs="float[2] y, float[2] z"
    )


def test_law_1_a_use_in_a_body_counts() -> None:
    body = f"m = Mul (x, k) y = Add (m, b) z = If (f) <then_branch = t () => (float[2] p) {{ p = Neg (m) }}, {BRANCH}"
    assert "'m' is also read by" in refused(body, inputs="bool f, float[2] x", outputs="float[2] y, float[2] z")


def test_law_2_an_interior_value_is_no_graph_output() -> None:
    assert "is a graph output" in refused("m = Mul (x, k) y = Add (m, b)", outputs="float[2] y, float[2] m")


def test_law_2_nor_an_output_of_a_body() -> None:
    body = f"m = Mul (x, k) y = Add (m, b) z = If (f) <then_branch = t () => (float[2] m) {{ }}, {BRANCH}"
    assert "is a graph output" in refused(body, inputs="bool f, float[2] x", outputs="float[2] y, float[2] z")


def test_law_3_a_constant_is_no_input() -> None:
    assert "'b' is a graph input" in refused(
        "m = Mul (x, k) y = Add (m, b)", inputs="float[2] x, float[2] b", weights="<float[2] k = {1,2}>"
    )


def test_law_3_a_constant_is_not_computed() -> None:
    assert "run fold-constants first" in refused("c = Neg (b) m = Mul (x, k) y = Add (m, c)")


def test_law_3_a_constant_cannot_be_overridden() -> None:
    told = refused(
        "m = Mul (x, k) y = Add (m, b)", inputs="float[2] x, float[2] b = {3,4}", weights="<float[2] k = {1,2}>"
    )
    assert "callers may override" in told


def test_law_4_all_nodes_lie_in_one_graph() -> None:
    body = f"m = Mul (x, k) y = If (f) <then_branch = t () => (float[2] p) {{ p = Add (m, b) }}, {BRANCH}"
    assert "lies in another graph" in refused(body, inputs="bool f, float[2] x")


def test_law_5_an_unshared_constant_has_no_other_user() -> None:
    told = refused("m = Mul (x, k) y = Add (m, b) z = Neg (k)", outputs="float[2] y, float[2] z")
    assert "k 'k' is shared with" in told


def test_law_5_nor_is_it_a_graph_output() -> None:
    assert "k 'k' is a graph output" in refused("m = Mul (x, k) y = Add (m, b)", outputs="float[2] y, float[2] k")


def test_a_constant_that_may_be_shared_may_be() -> None:
    text = f"g (float[2] x) => (float[2] y, float[2] z) {WEIGHTS} {{ m = Mul (x, k) y = Add (m, b) z = Neg (b) }}"
    assert run(AddOfMul(), text)[1] == 1


def test_in_a_body_with_captured_constants() -> None:
    body = f"y = If (f) <then_branch = t () => (float[2] p) {{ m = Mul (x, k) p = Add (m, b) }}, {BRANCH}"
    model, rewrites, _ = run(AddOfMul(), f"g (bool f, float[2] x) => (float[2] y) {WEIGHTS} {{ {body} }}")
    assert (rewrites, sorted(ops(model))) == (1, ["If", "Neg", "Sum"])


@dataclass(frozen=True)
class ClipToRelu(RewritePass):
    """``Clip(x, lo, [hi])``: an optional operand."""

    pattern = op("Clip", "x", const("low"), maybe(const("high")))

    def check(self, match: Match, model: Model) -> str | None:
        return "it has an upper bound" if match.has("high") else None if match.value("low") == 0 else "not at 0"

    def rewrite(self, match: Match, edit: Editor):
        root = match.root
        return edit.insert_before(
            root, Node("Relu", "", None, [match["x"]], [edit.variable("r", root.outputs[0])])
        ).outputs[0]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("Clip (x, l)", ""),
        ("Clip (x, l, )", ""),
        ("Clip (x, l, h)", "upper bound"),
        ("Clip (x, m)", "not at 0"),
        ("Clip (x, , h)", None),
    ],
)
def test_optional_operands(call: str, expected: str | None) -> None:
    model, rewrites, remarks = run(
        ClipToRelu(),
        f"g (float[2] x) => (float[2] y) <float l = {{0}}, float m = {{1}}, float h = {{6}}> {{ y = {call} }}",
    )
    assert rewrites == (expected == "")
    assert ops(model) == ["Relu" if rewrites else "Clip"]
    assert not expected or expected in remarks[0]
    assert expected is not None or remarks == []


def test_an_optional_operand_named_twice_must_be_absent_twice() -> None:
    pattern = op("Clip", "x", maybe("bound"), maybe("bound"))
    model = ir.parse(
        "g (float[2] x) => (float[2] y, float[2] z) <float l = {0}> { y = Clip (x, , l) z = Clip (x, l, l) }"
    )
    found = [find(pattern, n, Editor(model))[0] is not None for n in model.nodes()]
    assert found == [False, True]


@dataclass(frozen=True)
class DropDoubleNeg(RewritePass):
    """``-(-x) -> x``: the replacement is an operand."""

    pattern = op("Neg", op("Neg", "x", name="inner"), name="outer")

    def rewrite(self, match: Match, edit: Editor):
        return match["x"]


def test_a_chain_collapses_and_an_input_keeps_its_name_behind_an_identity() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) c = Neg (b) y = Neg (c) }"
    model, rewrites, _ = run(DropDoubleNeg(), text)
    assert (rewrites, ops(model)) == (2, ["Identity"])
    assert [t.name for t in model.graph.outputs] == ["y"]


def test_a_computed_replacement_takes_the_name_of_the_output() -> None:
    model, rewrites, _ = run(DropDoubleNeg(), "g (float[2] x) => (float[2] y) { a = Exp (x) b = Neg (a) y = Neg (b) }")
    assert (rewrites, ops(model)) == (1, ["Exp"])
    model, rewrites, _ = run(
        DropDoubleNeg(), "g (float[2] x) => (float[2] y, float[2] a) { a = Exp (x) b = Neg (a) y = Neg (b) }"
    )
    assert (rewrites, ops(model)) == (1, ["Exp", "Identity"])


def test_limit_counts_single_rewrites() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) c = Neg (b) d = Neg (c) y = Exp (d) }"
    for limit, left in ((0, 5), (1, 3), (2, 1), (3, 1)):
        model, rewrites, _ = run(DropDoubleNeg(), text, limit)
        assert (rewrites, len(ops(model))) == (min(limit, 2), left)


@dataclass(frozen=True)
class ThirdOutput(RewritePass):
    """Matches only through the first output of an interior node."""

    pattern = op("Neg", op("Split", "x", name="split"), name="neg")

    def rewrite(self, match: Match, edit: Editor):
        raise AssertionError("matched through the second output")


def test_an_interior_node_is_matched_through_its_first_output_only() -> None:
    _, rewrites, remarks = run(
        ThirdOutput(), "g (float[4] x) => (float[2] y) { a, b = Split <num_outputs = 2> (x) y = Neg (b) }"
    )
    assert (rewrites, remarks) == (0, [])


def test_a_root_of_which_two_outputs_are_used_is_left_alone() -> None:
    pattern = op("Split", "x")
    model = ir.parse("g (float[4] x) => (float[2] y, float[2] z) { y, z = Split <num_outputs = 2> (x) }")
    match, reason = find(pattern, model.graph.nodes[0], Editor(model))
    assert match is None
    assert "more than the first output" in str(reason)


@dataclass(frozen=True)
class Forever(RewritePass):
    """Undoes its own work."""

    pattern = op("Neg", "x")

    def rewrite(self, match: Match, edit: Editor):
        node = Node("Neg", "again", None, [match["x"]], [edit.variable("n", match.root.outputs[0])])
        return edit.insert_after(match.root, node).outputs[0]


def test_a_rule_that_undoes_its_own_work_is_stopped_and_told() -> None:
    model, rewrites, remarks = run(Forever(), "g (float[2] x) => (float[2] y) { a = Neg (x) y = Exp (a) }")
    assert 0 < rewrites < 100
    assert sorted(ops(model)) == ["Exp", "Neg"]
    assert "undoes its own work" in remarks[-1]


def test_two_nodes_of_a_pattern_need_two_names() -> None:
    with pytest.raises(ValueError, match="two nodes of the pattern are called 'relu'"):
        op("Add", op("Relu", "x"), op("Relu", "y"))


def test_a_node_named_twice_is_one_node() -> None:
    shared = op("Sigmoid", "x")
    pattern = op("Mul", shared, shared)
    model = ir.parse(
        "g (float[2] x) => (float[2] y, float[2] z) { a = Sigmoid (x) b = Sigmoid (x) y = Mul (a, a) z = Mul (a, b) }"
    )
    edit = Editor(model)
    assert find(pattern, model.graph.nodes[3], edit) == (None, None)
    assert "is also read by" in str(find(pattern, model.graph.nodes[2], edit)[1])


def test_another_domain_and_more_operands_look_different() -> None:
    model = ir.parse("""<ir_version: 10, opset_import: ["" : 18, "com.example" : 1]>
        g (float[2] x) => (float[2] y, float[2] z) <float l = {0}> { y = com.example.Clip (x, l) z = Clip (x, l) }""")
    edit = Editor(model)
    assert find(op("Clip", "x", "l"), model.graph.nodes[0], edit) == (None, None)
    assert find(op("Clip", "x"), model.graph.nodes[1], edit) == (None, None)


def test_values_of_a_match() -> None:
    model = ir.parse("g (float[2] x) => (float[2] y) <float l = {0}> { y = Clip (x, l) }")
    match, _ = find(op("Clip", "x", const("low"), maybe("high")), model.graph.nodes[0], Editor(model))
    assert match is not None
    assert match.value("low") == np.float32(0)
    assert not match.has("high")
    with pytest.raises(KeyError):
        match["high"]
