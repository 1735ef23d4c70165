"""inline-if, unroll-loop, inline-functions and eliminate-unused: what text cases cannot say; those are in tests/cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from graphopt import equivalence, ir
from graphopt.edit import Editor
from graphopt.evaluate import Evaluator
from graphopt.instruments import FullCheck, Verify
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline, Result

RUNS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


def run(text: str, model: ir.Model) -> Result:
    return Pipeline.parse(text).run(model, instruments=[Verify(), FullCheck()])


def operators(model: ir.Model) -> list[str]:
    return [node.op for node in model.nodes()]


def same_numbers(before: ir.Model, after: ir.Model) -> None:
    equivalence.compare(before, after).require("rewritten")


# ------------------------------------------------------------------------------------------------------ random bodies

info = onnx.helper.make_tensor_value_info


class _Maker:
    """Nested Ifs and Loops over float[2] values, with the same names in sibling bodies, captures from every level, constants in bodies."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.number = 0

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def name(self) -> str:
        self.number += 1
        return f"t{self.number}"

    def constants(self, graph: onnx.GraphProto, scope: list[str]) -> None:
        if self.pick(True, False):
            name = self.name()
            graph.initializer.append(onnx.numpy_helper.from_array(np.float32([self.pick(1, 2), 3]), name))
            scope.append(name)

    def step(self, graph: onnx.GraphProto, scope: list[str], depth: int) -> None:
        kind = self.pick("unary", "binary", "if", "loop") if depth < 3 else self.pick("unary", "binary")
        emit = graph.node.append
        if kind == "unary":
            emit(onnx.helper.make_node(self.pick("Neg", "Relu", "Identity"), [self.pick(*scope)], [self.name()]))
        elif kind == "binary":
            emit(onnx.helper.make_node(self.pick("Add", "Sub"), [self.pick(*scope), self.pick(*scope)], [self.name()]))
        elif kind == "if":
            start, bodies = self.number, {}
            highest = start
            same = self.pick(True, False, False)
            for branch in ("then_branch", "else_branch"):
                self.number = start  # both branches use the same names, as exporters do
                body = bodies["then_branch"] if same and bodies else self.body(scope, depth, [], 0)
                bodies[branch] = body
                highest = max(highest, self.number)
            self.number = highest
            emit(onnx.helper.make_node("If", [self.pick("flag", "yes", "no")], [self.name()], **bodies))
        else:
            trip, go, carried = self.name(), self.name(), self.name()
            inputs = [info(trip, 7, []), info(go, 9, []), info(carried, 1, [2])]
            body = self.body([*scope, carried], depth, inputs, 1)
            outputs = [self.name(), self.name()]
            emit(
                onnx.helper.make_node(
                    "Loop", [self.pick("none", "one", "three", "nine"), "yes", self.pick(*scope)], outputs, body=body
                )
            )
            graph.node.append(onnx.helper.make_node("ReduceSum", [outputs[1], "first"], [self.name()], keepdims=0))
        scope.append(graph.node[-1].output[0])

    def body(self, scope: list[str], depth: int, inputs: list[onnx.ValueInfoProto], scans: int) -> onnx.GraphProto:
        graph = onnx.GraphProto(name="body", input=inputs)
        inner = list(scope)
        self.constants(graph, inner)
        for _ in range(self.draw(st.integers(0, 2))):
            self.step(graph, inner, depth + 1)
        if inputs:
            go = self.name()
            graph.node.append(onnx.helper.make_node("Identity", [inputs[1].name], [go]))
            graph.output.append(info(go, 9, []))
        for _ in range(1 + scans):  # ONNX Runtime wants a node of the body behind each of its outputs
            result = self.name()
            graph.node.append(onnx.helper.make_node(self.pick("Identity", "Abs"), [self.pick(*inner[-3:])], [result]))
            graph.output.append(info(result, 1, [2]))
        return graph

    def make(self) -> ir.Model:
        graph = onnx.GraphProto(name="g", input=[info("x", 1, [2]), info("flag", 9, [])])
        for name, value in (("yes", True), ("no", False)):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
        for name, number in (("none", 0), ("one", 1), ("three", 3), ("nine", 9)):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(number), name))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
        scope = ["x"]
        for _ in range(self.draw(st.integers(1, 4))):
            self.step(graph, scope, 0)
        made = scope[1:]
        for name in self.draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True)):
            graph.output.append(info(name, 1, [2]))
        return ir.from_proto(
            onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
        )


@st.composite
def models(draw: st.DrawFn) -> ir.Model:
    return _Maker(draw).make()


@pytest.mark.parametrize("text", ["inline-if", "unroll-loop", "fixpoint(inline-if,unroll-loop,eliminate-identity)"])
def test_numbers_stay_and_a_second_run_finds_nothing(text: str) -> None:
    @RUNS
    @given(models())
    def law(model: ir.Model) -> None:
        result = run(text, model)
        assert run(text, result.model).rewrites == 0
        assert ir.saves(run(text, model).model) == ir.saves(result.model)
        first, second = Evaluator(model), Evaluator(result.model)
        assert first.engine == second.engine == "onnxruntime"
        for flag in (True, False):
            feeds = {"x": np.float32([1.5, -2]), "flag": np.array(flag)}
            expected, found = first.run(feeds), second.run(feeds)
            for name, value in expected.items():
                assert found[name].tobytes() == value.tobytes()

    law()


# ---------------------------------------------------------------------------------------------------------- inline-if


def test_ifs_as_deep_as_protobuf_admits_are_inlined_in_one_sweep() -> None:
    depth = 30
    text = "r = Neg (x)"
    for level in range(depth):
        text = (
            f"r = If (yes) <then_branch = t{level} () => (float[2] r) {{ {text} }}, "
            f"else_branch = e{level} () => (float[2] q) {{ q = Exp (x) }}>"
        )
    model = ir.parse(f"g (float[2] x) => (float[2] r) <bool yes = {{1}}> {{ {text} }}")
    result = run("inline-if", model)
    assert result.rewrites == depth
    assert operators(result.model) == ["Neg"]
    assert [o.name for o in result.model.outputs] == ["r"]


def test_branches_that_hold_sequences_are_inlined() -> None:
    model = ir.parse("""
        g (float[2] x) => (seq(float[2]) s)
        <bool yes = {1}>
        { s = If (yes) <then_branch = t () => (seq(float[2]) a) { a = SequenceConstruct (x, x) },
                        else_branch = e () => (seq(float[2]) b) { b = SequenceConstruct (x) }> }
    """)
    result = run("inline-if", model)
    assert operators(result.model) == ["SequenceConstruct"]
    same_numbers(model, result.model)


def test_a_weight_in_a_branch_is_moved_and_not_copied() -> None:
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    then = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["p"])], "t", [], [info("p", 1, [1, 64])], [weight]
    )
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["q"])], "e", [], [info("q", 1, [1, 64])])
    node = onnx.helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)
    yes = onnx.numpy_helper.from_array(np.array(True), "yes")
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, [1, 64])], [info("y", 1, [1, 64])], [yes])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8))
    result = run("inline-if", model).model
    kept = next(c for c in result.constants() if c.name == "w")
    assert kept._values is next(c for c in model.constants() if c.name == "w")._values


# -------------------------------------------------------------------------------------------------------- unroll-loop


def test_a_weight_in_the_body_is_stored_once_however_many_trips() -> None:
    model = ir.parse("""
        g (float[4] x) => (float[4] y, float[5,4] s)
        <int64 n = {5}, bool go = {1}>
        { y, s = Loop (n, go, x) <body = b (int64 i, bool c, float[4] a) => (bool d, float[4] e, float[4] f) <float[4] w = {1, 2, 3, 4}> {
            d = Identity (c)
            e = Mul (a, w)
            f = Add (e, w) }> }
    """)
    result = run("unroll-loop", model)
    assert sum(c.dtype == np.float32 for c in result.model.constants()) == 1
    same_numbers(model, result.model)


def test_a_loop_in_a_loop_is_unrolled_from_outside() -> None:
    model = ir.parse("""
        g (float[2] x) => (float[2] y)
        <int64 n = {2}, bool go = {1}>
        { y = Loop (n, go, x) <body = b (int64 i, bool c, float[2] a) => (bool d, float[2] e) {
            d = Identity (c)
            k = Neg (a)
            e = Loop (n, go, k) <body = bb (int64 j, bool f, float[2] p) => (bool h, float[2] q) {
                h = Identity (f)
                r = Exp (k)
                q = Sub (p, r) }> }> }
    """)
    result = run("fixpoint(unroll-loop)", model)
    assert result.rewrites == 3
    assert sorted(operators(result.model)) == ["Exp"] * 4 + ["Neg"] * 2 + ["Sub"] * 4
    same_numbers(model, result.model)


def test_scans_before_opset_13_are_stacked_with_axes_as_attribute() -> None:
    model = ir.parse("""
        <ir_version: 7, opset_import: ["" : 12]>
        g (float[2] x) => (float[1,2] s)
        <int64 n = {1}, bool go = {1}>
        { y, s = Loop (n, go, x) <body = b (int64 i, bool c, float[2] a) => (bool d, float[2] e, float[2] f) {
            d = Identity (c)
            e = Exp (a)
            f = Neg (e) }> }
    """)
    result = run("unroll-loop", model)
    assert operators(result.model) == ["Exp", "Neg", "Unsqueeze"]
    same_numbers(model, result.model)


def test_a_loop_without_trips_whose_scans_have_unknown_shapes_is_left_alone() -> None:
    model = ir.parse("""
        g (float[N] x) => (float[N] y, float[M,N] s)
        <int64 n = {0}, bool go = {1}>
        { y, s = Loop (n, go, x) <body = b (int64 i, bool c, float[N] a) => (bool d, float[N] e, float[N] f) {
            d = Identity (c)
            e = Exp (a)
            f = Neg (e) }> }
    """)
    result = run("unroll-loop", model)
    assert result.rewrites == 0
    assert any("shape of what it scans" in str(r) for r in result.remarks)


# --------------------------------------------------------------------------------------------------- inline-functions


def test_functions_that_call_each_other_in_a_circle_are_left_alone() -> None:
    model = ir.parse("""
        <ir_version: 10, opset_import: ["" : 21, "l" : 1]>
        g (float[2] x) => (float[2] y, float[2] z)
        { y = l.F (x)
          z = l.H (x) }
        <domain: "l", opset_import: ["" : 21, "l" : 1]> F (v) => (w) { w = l.G (v) }
        <domain: "l", opset_import: ["" : 21, "l" : 1]> G (v) => (w) { w = l.F (v) }
        <domain: "l", opset_import: ["" : 21]> H (v) => (w) { w = Neg (v) }
    """)
    result = Pipeline.parse("inline-functions").run(model)
    assert operators(result.model) == ["F", "Neg"]
    assert any("calls itself" in str(r) for r in result.remarks)


def test_inlining_agrees_with_onnx_on_functions_with_bodies_in_them() -> None:
    model = ir.parse("""
        <ir_version: 10, opset_import: ["" : 21, "l" : 1]>
        g (float[2] x, bool c) => (float[2] y, float[2] z)
        <float[2] big = {5, 6}>
        { t = Neg (x)
          y = l.Choose (x, c, big)
          z = l.Choose (t, c, big) }
        <domain: "l", opset_import: ["" : 21]>
        Choose (v, c, k) => (w)
        { t = Mul (v, k)
          w = If (c) <then_branch = a () => (p) { p = Add (t, k) }, else_branch = b () => (q) { q = Sub (t, v) }> }
    """)
    result = run("inline-functions", model)
    assert operators(result.model).count("If") == 2
    assert "Choose" not in operators(result.model)
    assert len([c for c in result.model.constants() if c.shape == (2,)]) == 1
    theirs = ir.from_proto(onnx.inliner.inline_local_functions(model.to_proto()))
    for flag in (True, False):
        feeds = [{"x": np.float32([1, -2]), "c": np.array(flag)}]
        equivalence.compare(model, result.model, feeds=feeds).require("inlined")
        equivalence.compare(theirs, result.model, feeds=feeds).require("inlined by onnx")


def test_the_domain_that_a_function_needs_is_imported() -> None:
    model = ir.parse("""
        <ir_version: 10, opset_import: ["" : 21, "l" : 1]>
        g (float[2] x) => (float[2] y)
        { y = l.F (x) }
        <domain: "l", opset_import: ["" : 21, "ai.onnx.ml" : 3]> F (v) => (w) { w = ai.onnx.ml.Binarizer <threshold = 0.5> (v) }
    """)
    result = Pipeline.parse("inline-functions,eliminate-unused").run(model)
    assert result.model.opsets == {"": 21, "ai.onnx.ml": 3}
    assert not result.model.functions
    assert operators(result.model) == ["Binarizer"]


def test_a_call_of_another_domain_or_overload_is_no_call() -> None:
    model = ir.parse("""
        <ir_version: 10, opset_import: ["" : 21, "l" : 1, "m" : 1]>
        g (float[2] x) => (float[2] y, float[2] z)
        { y = m.F (x)
          z = l.F (x) }
        <domain: "l", opset_import: ["" : 21]> F (v) => (w) { w = Neg (v) }
    """)
    result = Pipeline.parse("inline-functions").run(model)
    assert operators(result.model) == ["F", "Neg"]


# ------------------------------------------------------------------------------------------------------------- Editor


def test_unpacking_a_foreign_graph_gives_fresh_names_at_every_depth() -> None:
    text = "g (float[2] x, bool c) => (float[2] y) { a = Neg (x) y = If (c) <then_branch = t () => (float[2] p) { p = Exp (a) }, else_branch = e () => (float[2] q) { q = Abs (a) }> }"
    model, other = ir.parse(text), ir.parse(text)
    edit = Editor(model)
    anchor = model.graph.nodes[1]
    results = edit.unpack(anchor, other.graph, [model.graph.inputs[0], model.graph.inputs[1]])
    edit.replace_node(anchor, results)
    edit.commit()
    result = run("eliminate-dead,eliminate-identity", model).model
    names = [t.name for node in result.nodes() for t in node.outputs]
    assert len(set(names)) == len(names)
    assert operators(result) == ["Neg", "If", "Exp", "Abs"]
    same_numbers(ir.parse(text), result)


def test_bisection_stops_between_single_rewrites() -> None:
    model = ir.parse("""
        g (float[2] x) => (float[2] y, float[2] z)
        <bool yes = {1}>
        { y = If (yes) <then_branch = t () => (float[2] p) { p = Neg (x) }, else_branch = e () => (float[2] q) { q = Exp (x) }>
          z = If (yes) <then_branch = t () => (float[2] p) { p = Abs (x) }, else_branch = e () => (float[2] q) { q = Exp (x) }> }
    """)
    result = Pipeline.parse("inline-if").run(model, Context(limit=1))
    assert operators(result.model)[:2] == ["Neg", "If"]
    same_numbers(model, result.model)


def test_an_unused_function_beside_a_used_one_of_its_domain_is_removed() -> None:
    model = ir.parse("""
        <ir_version: 10, opset_import: ["" : 21, "l" : 1]>
        g (float[2] x) => (float[2] y)
        { y = l.F (x) }
        <domain: "l", opset_import: ["" : 21]> F (v) => (w) { w = Neg (v) }
        <domain: "l", opset_import: ["" : 21]> G (v) => (w) { w = Neg (v) }
    """)
    result = Pipeline.parse("eliminate-unused").run(model)
    assert [f.name for f in result.model.functions] == ["F"]
