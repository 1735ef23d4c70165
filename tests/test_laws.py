"""Laws of passes, held on random graphs: valid, equivalent, idempotent, deterministic, interface kept, input untouched, bisectable."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from graphs import models
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from graphopt import equivalence, ir, verify
from graphopt.discovery import find_pass, pass_modules
from graphopt.errors import UserError
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.pass_base import Context, Exactness
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.signature import Signature

PIPELINES = [*pass_modules(), "O1", "O2"]
REFUSING = ("prune-channels",)  # where they cannot do what was asked for, this is an error and not a remark
INLINING = ("inline-functions", "cast-float")
RUNS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


def run(text: str, model: ir.Model, ctx: Context | None = None):
    try:
        return Pipeline.parse(text).run(model, ctx or Context(evaluate=evaluate_node))
    except UserError:
        if text not in REFUSING:
            raise
        reject()


def check_valid(before: ir.Model, after: ir.Model) -> None:
    assert verify.structure(after) == []
    verify.full(after)
    assert verify.interface(before, after) == []
    assert before.graph.inputs is not after.graph.inputs


def check_equivalent(before: ir.Model, after: ir.Model, exactness: Exactness, rewrites: int) -> None:
    first, second = Evaluator(before), Evaluator(after)
    assert first.engine == second.engine == "onnxruntime"
    allowed = equivalence.tolerance(exactness, rewrites, equivalence.float_types(before))
    for flag in (True, False):
        rng = np.random.default_rng(1)
        feeds = {"x": rng.standard_normal((2, 4, 3, 3)).astype(np.float32), "flag": np.array(flag)}
        expected, found = first.run(feeds), second.run(feeds)
        for name, value in expected.items():
            if exactness is Exactness.EXACT:
                assert value.tobytes() == found[name].tobytes() or np.array_equal(value, found[name], equal_nan=True)
                assert (np.signbit(value) == np.signbit(found[name]))[~np.isnan(value)].all()
            else:
                assert equivalence.difference(name, value, found[name]).relative <= allowed


@pytest.mark.parametrize("text", PIPELINES)
def test_result_is_valid_equivalent_idempotent_and_the_input_untouched(text: str) -> None:
    @settings(RUNS, max_examples=RUNS.max_examples if text in PRESETS else 15)
    @given(models())
    def law(model: ir.Model) -> None:
        untouched, fingerprint = Signature(model), model.fingerprint()
        result = run(text, model)
        assert Signature(model) == untouched
        assert model.fingerprint() == fingerprint
        check_valid(model, result.model)
        check_equivalent(model, result.model, Pipeline.parse(text).exactness, result.rewrites)
        assert run(text, model).model.fingerprint() == result.model.fingerprint()
        again = run(text, result.model)
        assert again.rewrites == 0, f"{again.steps}\n{result.model.text()}"
        assert ir.saves(again.model) == ir.saves(result.model)

    law()


@pytest.mark.parametrize("text", [*pass_modules(), "O2"])
def test_any_number_of_single_rewrites_leaves_a_valid_equivalent_model(text: str) -> None:
    @settings(RUNS, max_examples=5 if text in PRESETS else 4)
    @given(models())
    def law(model: ir.Model) -> None:
        ctx = Context(evaluate=evaluate_node)
        run(text, model, ctx)
        for limit in range(min(ctx.admitted, 12) + 1):
            bounded = Context(evaluate=evaluate_node, limit=limit)
            result = run(text, model, bounded)
            assert bounded.admitted == limit
            check_valid(model, result.model)
            check_equivalent(model, result.model, Pipeline.parse(text).exactness, result.rewrites)
            if text in pass_modules() and text not in ("eliminate-dead", "fold-constants"):
                assert result.rewrites == limit

    law()


def fingerprints() -> str:
    """Of a few models after O2; equal in every process."""
    digest = hashlib.sha256()

    @settings(RUNS, max_examples=12)
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        digest.update(ir.saves(run("O2", data.draw(models())).model))

    collect()
    return digest.hexdigest()


def test_bytes_are_the_same_under_every_hash_seed() -> None:
    code = "import test_laws; print(test_laws.fingerprints())"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{fingerprints()}\n"}


@pytest.mark.parametrize("name", [n for n in pass_modules() if n not in REFUSING])
def test_a_pass_alone_keeps_what_it_does_not_understand(name: str) -> None:
    """Custom domains, model-local functions, Loop and Scan bodies, sequences and optional types pass through."""
    model = ir.parse("""
        <ir_version: 10, opset_import: ["" : 18, "local" : 1, "com.example" : 1]>
        g (float[2] x, int64 n, bool c) => (float[2] y, seq(float[2]) s, float[2] z)
        <float[2] k = {1, 2}>
        {
           i = Identity (x)
           f = local.Twice (i)
           y = Loop (n, c, f) <body = b (int64 j, bool p, float[2] a) => (bool q, float[2] r) {
              q = Identity (p)
              e = Add (a, i)
              r = Add (e, k)
           }>
           s = SequenceConstruct (y, i)
           z = com.example.Odd <strange = "1"> (k, i)
           dead = com.example.Odd (k)
        }
        <domain: "local", opset_import: ["" : 18]> Twice (v) => (w) { w = Add (v, v) }
    """)
    result = run(name, model).model
    assert verify.structure(result) == []
    assert verify.interface(model, result) == []
    kept = {"Loop", "SequenceConstruct", "Odd", "Twice"} - ({"Twice"} if name in INLINING else set())
    assert kept <= {n.op for n in result.nodes()}
    assert [f.name for f in result.functions] == ([] if name == "cast-float" else ["Twice"])
    assert find_pass(name)().options() == {}
