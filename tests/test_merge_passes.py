"""Passes that merge what moves data: reshapes, slices, concats, casts, reductions, clips, masks; exact ones are held to the bit."""

from __future__ import annotations

import time

import ml_dtypes
import numpy as np
import pytest
from graphs import CASES, Case, canonical, cases

from graphopt import equivalence, ir
from graphopt.errors import UnsupportedModel
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.instruments import FullCheck, Verify
from graphopt.pass_base import Context, Exactness
from graphopt.pipeline import Pipeline, Result

SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3e38]


def optimized(pipeline: str, model: ir.Model) -> Result:
    return Pipeline.parse(pipeline).run(model, Context(evaluate=evaluate_node), [Verify(), FullCheck()])


def written(model: ir.Model) -> list[str]:
    return canonical(ir.loads(ir.saves(model)))


def check(case: Case) -> None:
    """Structure, idempotence, interface (by FullCheck and Verify), and numbers on random draws."""
    model = ir.parse(case.before)
    result = optimized(case.pipeline, model)
    expected = model if case.after is None else ir.parse(case.after)
    assert written(result.model) == written(expected), result.model.text()
    assert (result.rewrites == 0) == (case.after is None)
    assert (case.remark or "") in "\n".join(map(str, result.remarks))
    assert optimized(case.pipeline, result.model).rewrites == 0
    exactness = Pipeline.parse(case.pipeline).exactness
    allowed = equivalence.tolerance(exactness, result.rewrites, equivalence.float_types(model))
    if case.after is not None:
        same_numbers(model, result.model, allowed, special=exactness is Exactness.EXACT)


def same_numbers(before: ir.Model, after: ir.Model, allowed: float, special: bool) -> None:
    """Equal outputs for several values of the dynamic dimensions, 0 among them, with NaN, infinities and -0.0 where `special`."""
    first, second = Evaluator(before), Evaluator(after)
    assert first.engine in (second.engine, "reference")  # what is left may be what ONNX Runtime, too, can run
    symbols = sorted({d for s in before.inputs for d in s.shape or () if isinstance(d, str)})
    ran = 0
    for seed, size in enumerate((0, 1, 2, 5, 7)):
        feeds = equivalence.generate_inputs(before.inputs, seed=seed, dims={s: size + i for i, s in enumerate(symbols)})
        if special:
            rng = np.random.default_rng(seed)
            for name, array in feeds.items():
                if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16:
                    with np.errstate(all="ignore"):
                        drawn = rng.choice(np.array(SPECIAL), array.shape).astype(array.dtype)
                    feeds[name] = np.where(rng.random(array.shape) < 0.5, drawn, array)
        try:
            expected = first.run(feeds)
        except UnsupportedModel:  # what the original refuses is nobody's claim
            continue
        ran += 1
        found = second.run(feeds)
        for name, value in expected.items():
            if not special:
                assert equivalence.difference(name, value, found[name]).relative <= allowed, (name, size)
                continue
            assert value.dtype == found[name].dtype
            assert value.shape == found[name].shape
            np.testing.assert_array_equal(value, found[name])
            if value.dtype.kind == "f":
                numbers = ~np.isnan(value)
                assert (np.signbit(value) == np.signbit(found[name]))[numbers].all(), (name, size)
    assert ran


# test_passes.py holds every case to structure and numbers; these are held to the bit on special numbers, and to idempotence.
MOVING = [
    "merge-reshapes",
    "fuse-reduce-unsqueeze",
    "merge-slices",
    "split-slices",
    "fuse-slice-squeeze",
    "merge-concats",
]
MOVING += ["bypass-concats", "merge-pads", "merge-gathers", "merge-expands", "fuse-gather-unsqueeze", "eliminate-nop"]
MOVING += ["merge-casts", "merge-clips", "eliminate-idempotent", "simplify-masks"]


@pytest.mark.parametrize("case", [c for name in MOVING for c in cases(CASES / f"{name}.txt")], ids=str)
def test_case_is_idempotent_and_holds_on_special_numbers(case: Case) -> None:
    check(case)


def test_an_initializer_that_callers_may_override_is_no_bound() -> None:
    check(
        Case(
            "default",
            "merge-slices,merge-clips,split-slices",
            """<ir_version: 10, opset_import: ["" : 18]>
            g (float[9] x, float low = {1}, int64[1] one = {1}) => (float[p] y) <int64[1] zero = {0}, int64[1] seven = {7}>
            { a = Slice (x, one, seven, zero)
              b = Slice (a, zero, one, zero)
              c = Clip (b, low)
              y = Relu (c) }""",
        )
    )


def test_equal_initializers_are_shared_by_their_bytes() -> None:
    model = ir.parse("""
        g (float[2] x, bool flag) => (float[2] y, float[2] z)
        <float[2] a = {0, 1}, float[2] b = {0, 1}, float[2] c = {-0.0, 1}, float[1,2] d = {0, 1}, double[2] e = {0, 1}>
        { f = Add (x, a)
          h = Add (f, b)
          i = Add (h, c)
          j = Add (i, d)
          k = Cast <to = 1> (e)
          y = If (flag) <then_branch = t () => (float[2] o) { o = Add (f, b) }, else_branch = u () => (float[2] p) { p = Add (f, a) }>
          l = Squeeze (j)
          z = Add (l, k) }
    """)
    result = optimized("share-initializers", model)
    assert result.rewrites == 1
    assert sorted(c.name for c in result.model.constants()) == ["a", "c", "d", "e"]
    assert optimized("share-initializers", result.model).rewrites == 0


def test_initializers_of_two_bodies_are_not_shared_but_with_the_root_they_are() -> None:
    model = ir.parse("""
        g (float[2] x, bool flag) => (float[2] y) <float[2] a = {0, 1}>
        { f = Add (x, a)
          y = If (flag) <then_branch = t () => (float[2] o) <float[2] b = {0, 1}, float[2] k = {3, 3}> { m = Mul (f, k)
              o = Add (m, b) },
            else_branch = u () => (float[2] p) <float[2] l = {3, 3}> { p = Add (f, l) }> }
    """)
    result = optimized("share-initializers", model)
    assert result.rewrites == 1
    assert sorted(c.name for c in result.model.constants()) == ["a", "k", "l"]


def test_the_time_of_a_chain_grows_with_its_length() -> None:
    seconds = []
    for links in (1000, 4000):
        lines = [f"  v{i + 1} = {('Unsqueeze', 'Squeeze')[i % 2]} (v{i}, a)" for i in range(links)]
        text = (
            "g (float[2] v0) => (float[2] y) <int64[1] a = {0}> {\n" + "\n".join(lines) + f"\n  y = Exp (v{links})\n}}"
        )
        model = ir.parse(text)
        begin = time.perf_counter()
        result = Pipeline.parse("merge-reshapes").run(model)
        seconds.append(time.perf_counter() - begin)
        assert [n.op for n in result.model.nodes()] == ["Exp"]
    assert seconds[1] < 12 * seconds[0] + 0.5
