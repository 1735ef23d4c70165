"""The numeric comparison: what counts as equal, how much may differ, and the inputs it draws."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphopt import equivalence, ir
from graphopt.backend import ShapeRange
from graphopt.equivalence import (
    Difference,
    Report,
    check_feeds,
    compare,
    difference,
    generate_inputs,
    input_samples,
    tolerance,
)
from graphopt.errors import NotEquivalent, ShapeError, UnsupportedModel, UsageError
from graphopt.ir import TensorSpec
from graphopt.pass_base import Exactness

INF, NAN = math.inf, math.nan


def gap(a: Any, b: Any, dtype: Any = np.float32) -> float:
    return difference("y", np.array(a, dtype), np.array(b, dtype)).relative


@pytest.mark.parametrize(
    ("a", "b", "dtype", "relative"),
    [
        ([1, 2], [1, 2], np.float32, 0),
        ([1, 4], [1, 5], np.float32, 0.25),
        ([0, 0], [0, 1], np.float32, INF),
        ([NAN, 1], [NAN, 1], np.float32, 0),
        ([NAN, 1], [1, 1], np.float32, INF),
        ([1, 1], [NAN, 1], np.float32, INF),
        ([INF, 1], [INF, 1], np.float32, 0),
        ([INF, 1], [-INF, 1], np.float32, INF),
        ([INF, 1], [NAN, 1], np.float32, INF),
        ([INF, 1], [1, 1], np.float32, INF),
        ([NAN], [NAN], np.float32, 0),
        ([1.7e308, 0], [-1.7e308, 0], np.float64, INF),
        ([], [], np.float32, 0),
        ([[]], [[]], np.int64, 0),
        (3, 3, np.int32, 0),
        ([2**63 - 1], [2**63 - 1], np.int64, 0),
        ([-(2**63)], [-(2**63)], np.int64, 0),
        ([2**64 - 1], [2**64 - 1], np.uint64, 0),
        ([True, False], [True, False], bool, 0),
        ([True, False], [True, True], bool, INF),
        (["a", "bc"], ["a", "bc"], object, 0),
        (["a", "bc"], ["a", "b"], object, INF),
        ([1 + 2j], [1 + 2j], np.complex64, 0),
        ([1 + 2j], [1 - 2j], np.complex64, 4 / math.sqrt(5)),
        ([1, 2], [1, 2], ml_dtypes.bfloat16, 0),
        ([1, 2], [1, 4], ml_dtypes.bfloat16, 1),
        ([1, 2], [1, 2], ml_dtypes.int4, 0),
        ([1, 2], [1, -4], ml_dtypes.int4, 3),
    ],
)
def test_difference(a: Any, b: Any, dtype: Any, relative: float) -> None:
    assert gap(a, b, dtype) == pytest.approx(relative, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "dtype"),
    [(2**63 - 1, 2**63 - 2, np.int64), (-(2**63), 1 - 2**63, np.int64), (2**64 - 1, 2**64 - 2, np.uint64)],
)
def test_the_last_bit_of_a_64_bit_integer_counts(a: int, b: int, dtype: Any) -> None:
    assert 0 < gap([a], [b], dtype) < 1e-18


def test_dtype_and_shape_must_agree() -> None:
    assert difference("y", np.zeros(2, np.float32), np.zeros(2)).note == "dtype float32 became float64"
    assert difference("y", np.zeros(2), np.zeros((2, 1))).note == "shape [2] became [2, 1]"
    assert difference("y", np.zeros((0, 2)), np.zeros((2, 0))).relative == INF


def test_strings_are_compared_whatever_array_holds_them() -> None:
    assert difference("y", np.array(["a", "bc"]), np.array(["a", "bc"], object)).relative == 0
    assert difference("y", np.array(["a", "bc"]), np.array(["a", "b"])).relative == INF
    assert difference("y", np.array(["a"]), np.array(["abc"])).note == "1 elements differ"


def test_sequences_and_optionals() -> None:
    one, two = np.ones(2), np.full(2, 2.0)
    assert difference("y", [one, two], [one, two]).relative == 0
    assert difference("y", [one, two], [one, one]).relative == 0.5
    assert difference("y", [one, [two]], [one, [two]]).relative == 0
    assert difference("y", [], []).relative == 0
    assert difference("y", [one], []).note == "1 elements became 0"
    assert difference("y", None, None).relative == 0
    assert difference("y", None, one).note == "kinds differ"
    assert difference("y", [one], one).note == "kinds differ"


def test_tolerance_is_what_the_docstring_argues() -> None:
    eps = 2.0**-23
    assert tolerance(Exactness.EXACT, 100, ["float32", "int8"]) == 0
    assert tolerance(Exactness.EXACT, 100, ["float16"]) == 64 * 2.0**-10  # ONNX Runtime rounds where it likes
    assert tolerance(Exactness.REASSOCIATING, 0, ["float32"]) == 64 * eps
    assert tolerance(Exactness.REASSOCIATING, 3, ["float32"]) == 2 * 64 * eps
    assert tolerance(Exactness.REASSOCIATING, 0, ["float64"]) == 64 * eps  # constants were rounded in float32 anyway
    assert tolerance(Exactness.REASSOCIATING, 0, ["float16", "float32"]) == 64 * 2.0**-10
    assert tolerance(Exactness.REASSOCIATING, 0, ["bfloat16"]) == 64 * 2.0**-7
    assert tolerance(Exactness.REASSOCIATING, 0, ["int64"]) == 64 * eps
    assert tolerance(Exactness.APPROXIMATE, 0, []) == INF


def test_types_that_a_model_computes_in_are_found_inside() -> None:
    model = ir.parse(
        "g (float[2] x) => (float[2] y) <int64[2] i = {1,2}, float16[2] w = {1,2}> { y = Cast <to = 1> (w) }"
    )
    assert equivalence.float_types(model) == ["float16", "float32"]


def test_report_names_the_worst_output() -> None:
    report = Report((Difference("a", 1, 0.1), Difference("b", 2, 0.2, "why")), 0.15, 1, "onnxruntime")
    assert not report.equal
    with pytest.raises(NotEquivalent, match=r"here: output 'b' differs by 2 \(0.2 relative, 0.15 allowed\): why"):
        report.require("here")
    Report((), 0, 0, "onnxruntime").require("nothing")
    assert Report((), 0, 0, "onnxruntime").worst is None
    assert not Report((Difference("a", INF, INF),), 0.5, 1, "onnxruntime").equal


# -------------------------------------------------------------------------------------------------------------- inputs

TYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int4", "uint4", "int8", "uint8", "int32", "int64", "uint64", "bool", "string", "complex64"]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), ("N", 2), (None,), None])
def test_generated_inputs_fit_and_are_deterministic(dtype: str, shape: Any) -> None:
    spec = TensorSpec("x", dtype, shape)
    first, again, other = (generate_inputs([spec], seed=s)["x"] for s in (3, 3, 4))
    assert isinstance(first, np.ndarray)
    assert ir.dtype_name(first.dtype) == dtype
    assert first.shape == tuple(d if isinstance(d, int) else 2 for d in (shape if shape is not None else (2,)))
    assert (first == again).all()
    check_feeds([spec], {"x": first})
    assert (
        first.size < 3 or dtype in ("bool", "string", "int4", "uint4") or not (first == other).all() or dtype[0] in "iu"
    )


def test_equal_symbols_get_equal_dimensions_and_samples_differ_in_them() -> None:
    model = ir.parse("g (float[N,M] x, float[N] z) => (float[N,M] y) { y = Relu (x) }")
    shapes = [(s["x"].shape, s["z"].shape) for s in input_samples(model)]
    assert shapes == [((2, 2), (2,)), ((3, 3), (3,))]
    ranged = {"x": ShapeRange((1, 4), (5, 4), (8, 4)), "z": ShapeRange((1,), (5,), (8,))}
    assert [s["x"].shape for s in input_samples(model, shapes=ranged, count=3)] == [(5, 4), (1, 4), (8, 4)]
    assert generate_inputs(model.inputs, dims={"N": 7})["x"].shape == (7, 2)


def test_a_model_that_takes_no_small_input_is_compared_on_larger_ones() -> None:
    text = """g (float[N,1,H,W] x) => (float[N,1,H,W] y) <float[1,1,2,2] w = {1, 2, 3, 4}>
    { a = MaxPool <kernel_shape = [4, 4], strides = [4, 4]> (x)
      b = ConvTranspose <kernel_shape = [2, 2], strides = [2, 2]> (a, w)
      c = ConvTranspose <kernel_shape = [2, 2], strides = [2, 2]> (b, w)
      y = Add (c, x) }"""
    found = compare(ir.parse(text), ir.parse(text))
    assert found.equal
    assert found.samples == 2
    with pytest.raises(UnsupportedModel, match="nothing is proven"):
        compare(ir.parse(text), ir.parse(text), shapes={"x": ShapeRange.parse("x=1x1x6x6")[1]})


def test_an_input_that_is_no_tensor_must_be_given() -> None:
    model = ir.parse("g (seq(float[2]) s) => (float[2] y) <int64 i = {0}> { y = SequenceAt (s, i) }")
    with pytest.raises(UnsupportedModel, match="input 's' is no dense tensor"):
        generate_inputs(model.inputs)


SPECS = [TensorSpec("x", "float32", ("N", 3)), TensorSpec("m", "bool", ("N",))]
GOOD = {"x": np.zeros((2, 3), np.float32), "m": np.zeros(2, bool)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, UsageError, "missing ['x']; it takes float32[N,3] x, bool[N] m"),
        ({"z": np.zeros(1)}, UsageError, "unknown ['z']"),
        (
            {"x": np.zeros((2, 3))},
            UsageError,
            "input 'x' is float64, the model takes float32[N,3] x; convert it with .astype",
        ),
        ({"x": np.zeros(3, np.float32)}, ShapeError, "input 'x' has shape [3], the model takes float32[N,3] x"),
        (
            {"x": np.zeros((2, 4), np.float32)},
            ShapeError,
            "input 'x' has shape [2, 4], but the model takes float32[N,3] x",
        ),
        ({"m": np.zeros(5, bool)}, ShapeError, "'N' is 2 in input 'x' and 5 in 'm'; they must agree"),
    ],
)
def test_feeds_that_do_not_fit_are_told_apart(change: dict[str, Any], error: type[Exception], message: str) -> None:
    check_feeds(SPECS, GOOD)
    feeds = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(error) as caught:
        check_feeds(SPECS, feeds)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- models

MODEL = "g (float[N] x) => (float[N] y) { y = Exp (x) }"


def test_compare() -> None:
    model, other = (
        ir.parse(MODEL),
        ir.parse("g (float[N] x) => (float[N] y) <float[1] k = {1.5}> { a = Exp (x) y = Mul (a, k) }"),
    )
    same = compare(model, model)
    assert same.equal
    assert (same.samples, same.engine, same.tolerance) == (2, "onnxruntime", 0)
    report = compare(model, other)
    assert report.worst is not None
    assert report.worst.relative == pytest.approx(0.5)
    assert compare(model, other, allowed=0.6).equal
    feeds = [{"x": np.array([0], np.float32)}]
    worst = compare(model, other, feeds=feeds).worst
    assert worst is not None
    assert worst.max_abs == pytest.approx(0.5)


def test_models_with_other_names_are_not_comparable() -> None:
    with pytest.raises(NotEquivalent, match="inputs differ"):
        compare(ir.parse(MODEL), ir.parse("g (float[N] z) => (float[N] y) { y = Exp (z) }"))
    with pytest.raises(NotEquivalent, match="outputs differ"):
        compare(ir.parse(MODEL), ir.parse("g (float[N] x) => (float[N] z) { z = Exp (x) }"))


def test_a_candidate_that_cannot_run_is_not_equivalent() -> None:
    broken = ir.parse(
        '<ir_version: 10, opset_import: ["" : 18, "com.example" : 1]> g (float[N] x) => (float[N] y) { y = com.example.Odd (x) }'
    )
    with pytest.raises(NotEquivalent, match="the original can be run, the candidate cannot"):
        compare(ir.parse(MODEL), broken)
    fussy = ir.parse("g (float[N] x) => (float[N] y) <int64[1] s = {77}> { a = Exp (x) y = Reshape (a, s) }")
    with pytest.raises(NotEquivalent, match="the original runs on this sample, the candidate does not"):
        compare(ir.parse(MODEL), fussy)


def test_an_original_that_cannot_run_proves_nothing() -> None:
    fussy = ir.parse("g (float[N] x) => (float[N] y) <int64[1] s = {77}> { a = Exp (x) y = Reshape (a, s) }")
    with pytest.raises(UnsupportedModel, match="nothing is proven"):
        compare(fussy, fussy)
    with pytest.raises(UnsupportedModel):
        compare(fussy, fussy, feeds=[{"x": np.zeros(2, np.float32)}])


def test_both_models_run_in_one_engine() -> None:
    """A dead node that ONNX Runtime refuses sends the original to the reference; the candidate follows it there."""
    text = "g (float[3] x) => (float[3] y) {{ {} y = Exp (x) }}"
    old = ir.parse(text.format('z = BitShift <direction = "LEFT"> (a, a) a = Cast <to = 3> (x)'))
    assert compare(ir.parse(text.format("")), ir.parse(text.format(""))).engine == "onnxruntime"
    assert old.inputs
    reference = ir.parse("g (bfloat16[3] x) => (bfloat16[3] y) { y = Exp (x) }")
    assert compare(reference, reference).engine == "reference"


TAIL = """g (float[4,8] x) => (float[4,1] y)
<float[8,1] w = {1, 1, 1, 1, 1, 1, 1, 1}, float b = {BIAS}>
{ s = MatMul (x, w)
  t = Add (s, b)
  y = Sigmoid (t) }"""


def test_a_sigmoid_in_its_tail_is_judged_by_its_own_sensitivity() -> None:
    reference = ir.parse(TAIL.replace("BIAS", "-14"))
    rounded = ir.parse(TAIL.replace("BIAS", "-14.000002"))
    found = equivalence.compare(reference, rounded, allowed=1e-7)
    assert found.worst is not None
    assert found.worst.relative > 1e-7
    assert found.worst.sensitivity > 0
    assert found.equal


def test_a_sigmoid_in_its_tail_that_moved_further_is_refused() -> None:
    reference = ir.parse(TAIL.replace("BIAS", "-14"))
    wrong = ir.parse(TAIL.replace("BIAS", "-13.9"))
    assert not equivalence.compare(reference, wrong, allowed=1e-7).equal


def test_an_exact_rewrite_gets_no_allowance_for_sensitivity() -> None:
    reference = ir.parse(TAIL.replace("BIAS", "-14"))
    rounded = ir.parse(TAIL.replace("BIAS", "-14.000002"))
    assert not equivalence.compare(reference, rounded).equal
