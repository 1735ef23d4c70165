"""-O2 on wide random models: valid, the same interface, the same numbers at every size, idempotent; bit by bit where it promises so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from random_models import feeds, wide_models

from graphopt import equivalence, ir, verify
from graphopt.evaluate import Evaluator
from graphopt.pipeline import Pipeline

O2, SIMPLIFY = Pipeline.parse("O2"), Pipeline.parse("simplify")
RUNS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


def check_optimized(model: ir.Model) -> None:
    """-O2 leaves a valid model that computes the same, within what re-association moves, and has nothing left to do."""
    result = O2.run(model)
    assert verify.structure(result.model) == []
    verify.full(result.model)
    assert verify.interface(model, result.model) == []
    before, after = Evaluator(model), Evaluator(result.model)
    allowed = equivalence.tolerance(O2.exactness, result.rewrites, equivalence.float_types(model))
    for which in range(3):
        given_feeds = feeds(which, False, which)
        expected, found = before.run(given_feeds), after.run(given_feeds)
        for name, value in expected.items():
            assert value.dtype == found[name].dtype
            assert value.shape == found[name].shape
            assert equivalence.difference(name, value, found[name]).relative <= allowed, name
    again = O2.run(result.model)
    assert again.rewrites == 0, [s for s in again.steps if s.rewrites]


def check_simplified(model: ir.Model) -> None:
    """What calls itself exact is so bit by bit, whatever the numbers are."""
    result = SIMPLIFY.run(model)
    before, after = Evaluator(model), Evaluator(result.model)
    signed = not any(n.op == "Where" for n in model.nodes())  # ONNX Runtime's Where gives 0.0 for -0.0 beside 0.0
    for which in range(3):
        given_feeds = feeds(which, True, which)
        expected, found = before.run(given_feeds), after.run(given_feeds)
        for name, value in expected.items():
            assert np.array_equal(value, found[name], equal_nan=value.dtype.kind == "f"), name
            if value.dtype.kind == "f" and signed:
                assert (np.signbit(value) == np.signbit(found[name]))[~np.isnan(value)].all(), name


LAWS = {"O2": check_optimized, "simplify": check_simplified}


def test_optimized_models_compute_the_same_at_every_size() -> None:
    RUNS(given(wide_models())(check_optimized))()


def test_exact_passes_are_exact_for_every_number() -> None:
    RUNS(given(wide_models())(check_simplified))()


HEAD = (
    '<ir_version: 8, opset_import: ["" : 17]> '
    "g (float[N,3,S] x, float[N,4,3,3] u, float[3,4] v, int64[N,3] i, bool c) => "
)
FOUND = {
    "a CastLike after the dtype of another CastLike": """(float[N,4,3,3] y) {
        s = Shape (x) z = Shape (v) f = ConstantOfShape <value = float[1] {2}> (s)
        a = Cast <to = 1> (z) b = CastLike (a, f) d = Add (u, u) e = Cast <to = 11> (d) g = CastLike (e, b)
        y = Sub (g, d) }""",
    "branches that are the same without what nobody reads": """(float[N,3,S] y) {
        y = If (c) <then_branch = t () => (float[N,3,S] p) { p = Identity (x) },
                    else_branch = e () => (float[N,3,S] q) { d = Add (u, u)  q = Identity (x) }> }""",
    "a mask turned round, whose zeros have signs": """(float[N,3,S] y) {
        zero = Constant <value_float = 0.0> () m = Equal (x, zero) n = Not (m) y = Where (n, zero, x) }""",
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND)
def test_what_fuzzing_found(text: str) -> None:
    check_optimized(ir.parse(HEAD + text))
    check_simplified(ir.parse(HEAD + text))
