"""O2 on models that we did not write: ONNX's operator tests, the light topologies, the digits nets."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from graphopt import equivalence, ir, models, verify
from graphopt.discovery import find_pass
from graphopt.errors import InvalidModel, UnsupportedModel
from graphopt.evaluate import Evaluator
from graphopt.pass_base import Exactness
from graphopt.pipeline import Pipeline, Result

O2 = Pipeline.parse("O2")
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


@functools.cache
def operator_cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference implementations, which compute the expected outputs
        return collect_testcases(None)


def check(case: Any) -> str:
    """Run one operator model through O2; returns how it was compared."""
    before = ir.from_proto(case.model)
    outcome = O2.run(before)
    result = outcome.model
    assert verify.structure(result) == [], case.name
    assert verify.interface(before, result) == [], case.name
    try:
        verify.full(before)
    except InvalidModel:
        pass  # onnx's own checker refuses a few of onnx's own models
    else:
        verify.full(result)
    if any(n.op in ("Dropout", "Bernoulli") or n.op.startswith("Random") for n in before.nodes()):
        return "random"
    for engine in ("onnxruntime", "reference"):
        try:
            return compare(case, before, result, engine, allowed(before, outcome))
        except _DoesNotRun:
            continue
    return "original does not run"


class _DoesNotRun(Exception):
    """The original model cannot be run by this engine, so it cannot be compared."""


def allowed(before: ir.Model, outcome: Result) -> float:
    """The tolerance that the passes that fired ask for: 0 unless one of them re-associates."""
    fired = [s for s in outcome.steps if s.rewrites and find_pass(s.pass_name).exactness is not Exactness.EXACT]
    exactness = Exactness.REASSOCIATING if fired else Exactness.EXACT
    return equivalence.tolerance(exactness, sum(s.rewrites for s in fired), equivalence.float_types(before))


def compare(case: Any, before: ir.Model, after: ir.Model, engine: str, tolerance: float) -> str:
    """The outputs of the original, and where no pass re-associates the expected ones as closely; returns the engine."""
    try:
        first = Evaluator(before, engine)
    except UnsupportedModel:
        raise _DoesNotRun from None
    second = Evaluator(after, first.engine)
    assert first.engine == second.engine, case.name
    for inputs, outputs in case.data_sets:
        feeds = {spec.name: _array(value) for spec, value in zip(before.inputs, inputs, strict=False)}
        try:
            expected = first.run(feeds)
        except UnsupportedModel:
            raise _DoesNotRun from None
        found = second.run(feeds)
        for name, value, ideal in zip(expected, expected.values(), outputs, strict=False):
            gap = equivalence.difference(name, value, found[name])
            assert gap.relative <= tolerance, (case.name, gap)
            right = equivalence.difference(name, _array(ideal), value)
            held = equivalence.difference(name, _array(ideal), found[name])
            assert tolerance or held.max_abs <= right.max_abs, (case.name, held)
    return first.engine


def _array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def test_operator_models_keep_their_outputs() -> None:
    assert len(operator_cases()) >= 1884
    counts = Counter(map(check, operator_cases()))
    print(dict(counts))  # onnx 1.23.2 and ONNX Runtime 1.32: 1,857 of 1,884 are compared
    assert counts["onnxruntime"] + counts["reference"] > 0.95 * counts.total(), counts


# Nodes left by O2: not more than.
DIGITS = {
    "concat.dynamo": 59,  # of 195
    "concat.legacy": 59,  # of 149
    "mobilenet.dynamo": 34,  # of 188
    "mobilenet.legacy": 34,  # of 75
    "resnet.dynamo": 36,  # of 137
    "resnet.legacy": 37,  # of 54
    "vit.dynamo": 92,  # of 268
    "vit.legacy": 99,  # of 290
}


@pytest.mark.parametrize("name", sorted(p.stem for p in Path(models.__file__).parent.glob("*.onnx")))
def test_digits_nets_keep_outputs_and_accuracy(name: str) -> None:
    before = ir.load(models.path(name))
    result = O2.run(before)
    verify.full(result.model)
    assert verify.interface(before, result.model) == []
    assert sum(1 for _ in result.model.nodes()) <= DIGITS[name]
    data = models.digits()
    feeds = {before.inputs[0].name: data["x_test"]}
    (expected,), (found,) = (Evaluator(m).run(feeds).values() for m in (before, result.model))
    allowed = equivalence.tolerance(O2.exactness, result.rewrites, ["float32"])
    assert equivalence.difference("y", expected, found).relative <= allowed
    right = [int((y.argmax(1) == data["y_test"]).sum()) for y in (expected, found)]
    assert right[0] == right[1] > 0.9 * len(data["y_test"])


# The fewest nodes among the peers' valid results; docs/simplify.md has the table.
PEERS_BEST = {
    "light_bvlc_alexnet": 24,
    "light_densenet121": 550,
    "light_inception_v1": 139,
    "light_inception_v2": 226,
    "light_resnet50": 123,
    "light_shufflenet": 154,
    "light_squeezenet": 66,
    "light_vgg19": 46,
    "light_zfnet512": 22,
}


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda p: p.stem)
def test_light_topologies_stay_valid_and_small(path: Path) -> None:
    before = ir.load(path)
    result = O2.run(before)
    verify.full(result.model)
    assert verify.interface(before, result.model) == []
    assert sum(1 for _ in result.model.nodes()) < sum(1 for _ in before.nodes())
    grown = len(ir.saves(result.model)) - path.stat().st_size
    assert grown <= (1 << 20) + 128 * sum(1 for _ in before.nodes())  # the rest is what infer-shapes wrote down
    assert np.isfinite(result.model.nbytes)
    counts = Counter(node.op for node in result.model.nodes())
    assert sum(counts.values()) - counts["ConstantOfShape"] <= PEERS_BEST[path.stem]
    assert counts["ConstantOfShape"] <= (path.stem == "light_shufflenet")  # where groups of channels differ
