"""Changes that users ask for: keep, extract, set shapes, rename dimensions; MACs; explanations."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import interface, ir, models, verify
from graphopt.analyses.macs import macs
from graphopt.errors import ShapeError, UsageError
from graphopt.evaluate import Evaluator
from graphopt.explain import explain
from graphopt.ir import Model
from graphopt.passes import eliminate_nop
from graphopt.pipeline import Pipeline

CHAIN = """g (float[N,4] x, float[N,4] z) => (float[N,4] y)
<float[4] w = {1, 2, 3, 4}>
{ a = Relu (x)
  b = Mul (a, w)
  c = Add (b, z)
  y = Neg (c) }"""


def chain() -> Model:
    return ir.parse(CHAIN)


def test_a_kept_tensor_survives_every_pass_under_its_name() -> None:
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Identity (x) b = Relu (a) c = Identity (b) y = Neg (c) }")
    interface.keep(model, ["c"])
    result = Pipeline.parse("O2").run(model).model
    assert [s.name for s in result.outputs] == ["y", "c"]
    assert result.outputs[1].dtype == "float32"


def test_keeping_an_unknown_tensor_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no tensor 'bb' \(did you mean 'b'\?\)"):
        interface.keep(chain(), ["bb"])


def test_keeping_an_input_is_refused() -> None:
    with pytest.raises(UsageError, match="only computed tensors"):
        interface.keep(chain(), ["x"])


def test_a_part_between_tensors_computes_what_it_did() -> None:
    model = chain()
    interface.extract(model, ["a", "z"], ["c"])
    verify.full(model)
    assert [(s.name, s.shape) for s in model.inputs] == [("a", ("N", 4)), ("z", ("N", 4))]
    a, z = np.ones((2, 4), np.float32), np.full((2, 4), 5, np.float32)
    np.testing.assert_array_equal(Evaluator(model).run({"a": a, "z": z})["c"], a * [1, 2, 3, 4] + z)


def test_a_part_that_needs_more_than_was_named_is_refused() -> None:
    with pytest.raises(UsageError, match="also need 'z'"):
        interface.extract(chain(), ["a"], ["c"])


def test_extract_without_inputs_keeps_those_of_the_model() -> None:
    model = chain()
    interface.extract(model, [], ["b"])
    assert [n.op for n in model.nodes()] == ["Relu", "Mul"]
    verify.full(model)


def test_a_shape_set_on_an_input_reaches_the_outputs() -> None:
    model = chain()
    interface.set_shape(model, "x", [3, 4])
    interface.set_shape(model, "z", [3, 4])
    assert model.outputs[0].shape == (3, 4)
    verify.full(model)


def test_a_fixed_batch_can_be_made_dynamic() -> None:
    model = ir.parse("g (float[1,4] x) => (float[1,4] y) <float[1,4] a> { a = Relu (x) y = Neg (a) }")
    interface.set_shape(model, "x", ["N", 4])
    assert model.outputs[0].shape == ("N", 4)


def test_another_rank_is_refused() -> None:
    with pytest.raises(ShapeError, match="has 2 dimensions, not 3"):
        interface.set_shape(chain(), "x", [1, 2, 3])


def test_a_dimension_is_renamed_everywhere_or_fixed() -> None:
    model = chain()
    interface.rename_dim(model, "N", "batch")
    assert [s.shape for s in [*model.inputs, *model.outputs]] == [("batch", 4)] * 3
    interface.rename_dim(model, "batch", 7)
    assert [s.shape for s in [*model.inputs, *model.outputs]] == [(7, 4)] * 3


def test_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(UsageError, match="no input or output has a dimension 'M'"):
        interface.rename_dim(chain(), "M", "K")


def test_macs_follow_the_formulas() -> None:
    text = """g (float[N,4,8,8] x) => (float y)
    <float[6,2,3,3] w, int64[2] t = {0, -1}, float[216,5] k>
    { c = Conv <group = 2> (x, w) r = Reshape (c, t) y = MatMul (r, k) }"""
    model = ir.parse(
        text.replace("float[6,2,3,3] w, ", "")
        .replace(", float[216,5] k", "")
        .replace("(x, w)", "(x, w)")
        .replace("g (float[N,4,8,8] x)", "g (float[N,4,8,8] x, float[6,2,3,3] w, float[216,5] k)")
    )
    total, counts = macs(model)
    assert str(total) == f"{6 * 36 * 18 + 216 * 5}*N"
    assert len(counts) == 2


def test_macs_of_the_digits_resnet_are_those_of_its_layers() -> None:
    total, _ = macs(ir.load(models.path("resnet.legacy")))
    assert str(total).endswith("*batch")


def test_explain_tells_why_a_fusion_did_not_fire() -> None:
    model = ir.parse("""g (float[1,1,4,4] x) => (float[1,1,4,4] y, float[1,1,4,4] z)
    <float[1,1,1,1] w = {2}, float[1] s = {3}, float[1] b = {0}, float[1] m = {0}, float[1] v = {1}>
    { [conv] c = Conv (x, w) [bn] y = BatchNormalization (c, s, b, m, v) z = Neg (c) }""")
    found = explain(model, "bn", Pipeline.parse("fuse-conv-bn"))
    assert found.fate == "nothing changed it"
    assert any(f.pass_name == "fuse-conv-bn" and "is also read by" in f.text for f in found.findings)


@pytest.mark.parametrize(
    ("node", "pass_name", "told"),
    [
        ("s", "merge-slices", "it would have to read Slice, but reads Relu"),
        ("s", "fuse-slice-squeeze", "Squeeze or Reshape would have to read it, but Exp does"),
        ("s", "split-slices", "axis 1, which has 8 elements, do not tile it: 1:4"),
        ("i", "fuse-arg-max", "it would have to read Softmax or LogSoftmax, but reads Sigmoid"),
        ("m", "merge-reductions", "but reads Exp (or it would have to reduce axes of one element alone)"),
        ("d", "fold-shapes", "N in its result ['N', 3] is known at run time alone"),
    ],
)
def test_explain_tells_what_a_rule_wanted_beside_a_node(node: str, pass_name: str, told: str) -> None:
    model = ir.parse("""g (float[N,8] x, float[N,3] z) => (float[N,1] y, int64[N,1] w, float[N,3] v)
    <int64[1] one = {1}, int64[1] four = {4}, int64[1] three = {3}>
    { a = Relu (x) [s] b = Slice (a, one, four, one) c = Exp (b) [m] y = ReduceMax (c, one)
      p = Sigmoid (x) [i] w = ArgMax <axis = 1> (p)
      n = Shape <start = 0, end = 1> (x) [d] t = Concat <axis = 0> (n, three) v = Expand (z, t) }""")
    found = explain(model, node, Pipeline.parse("merge-slices")).findings
    assert any(f.pass_name == pass_name and told in f.text for f in found), found


def test_explain_tells_what_became_of_a_node() -> None:
    model = ir.parse("""g (float[1,1,4,4] x) => (float[1,1,4,4] y)
    <float[1,1,1,1] w = {2}, float[1] s = {3}, float[1] b = {0}, float[1] m = {0}, float[1] v = {1}>
    { [conv] c = Conv (x, w) [bn] y = BatchNormalization (c, s, b, m, v) }""")
    assert "fuse-conv-bn" in explain(model, "bn", Pipeline.parse("fuse-conv-bn")).fate


@pytest.mark.parametrize(
    ("text", "pass_name", "told"),
    [
        (
            "<float[4] s = {1, 1, 2, 2}> { a = Relu (x) [n] y = Resize (a, , s) }",
            "eliminate-nop",
            "scales were constant and 1",
        ),
        ("<float s = {1}> { a = Relu (x) [n] y = Add (a, s) }", "eliminate-nop", "-0.0 + 0.0 is 0.0"),
        (
            "{ a = Relu (x) [n] y = Exp (a) }",
            "fold-constants",
            "'a' is not constant: it is the result of 'Relu_a' (Relu)",
        ),
        ("{ [n] y = Exp (x) }", "fold-constants", "'x' is not constant: it is a graph input"),
        (
            "<float[1] s = {3}> { a = Relu (x) [n] y = BatchNormalization (a, s, s, s, s) }",
            "fuse-conv-bn",
            "'n' (BatchNormalization) would have to read Conv or ConvTranspose, but reads 'Relu_a' (Relu)",
        ),
        (
            "<float[1,1,1,1] w = {2}> { [n] a = Conv (x, w) y = Relu (a) }",
            "fuse-conv-bn",
            "would need BatchNormalization behind it, but Relu reads it",
        ),
        (
            "<int64[4] s = {0, 1, 4, 4}> { a = Relu (x) [n] y = Tile (a, s) }",
            "eliminate-nop",
            "the shape of its first operand",
        ),
    ],
)
def test_explain_names_the_nearest_rules_and_what_each_misses(text: str, pass_name: str, told: str) -> None:
    found = explain(ir.parse(f"g (float[1,1,4,4] x) => (float[p,q,r,s] y) {text}"), "n", Pipeline.parse("O2"))
    assert any(f.pass_name == pass_name and told in f.text for f in found.findings), found


def test_explain_shows_the_shapes_of_what_stands_and_the_remarks_on_its_neighbours() -> None:
    model = ir.parse(
        """g (float[N,2] x, bool f) => (float[N,2] y)
    { a = Exp (x) [n] b = Relu (a) [c] y = Clip (b, lo, lo) }""".replace("bool f", "float lo")
    )
    found = explain(model, "n", Pipeline.parse("O2"))
    assert found.facts == ("float32[N,2] b = Relu (float32[N,2] a)",)
    assert any("of its neighbour 'c' (Clip): the bounds" in f.text for f in found.findings), found


def test_every_rule_of_a_nop_says_what_it_needs() -> None:
    assert set(eliminate_nop._RULES) == set(eliminate_nop._NEEDED)


def test_explain_of_an_unknown_node_names_the_nearest() -> None:
    model = ir.load(models.path("resnet.legacy"))
    with pytest.raises(UsageError, match="did you mean"):
        explain(model, f"{model.graph.nodes[0].name}x", Pipeline.parse("O2"))
