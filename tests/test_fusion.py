"""Fusion for targets: what appears where, the page that lists it, what `explain` says of attention, and opsets that are raised."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from graphopt import equivalence, ir, models
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.evaluate import evaluate_node
from graphopt.explain import explain
from graphopt.ir import Model
from graphopt.opset import obstacle, raise_opset
from graphopt.pass_base import Context, Exactness
from graphopt.pipeline import Pipeline
from graphopt.target import Target

VIT = Path(models.__file__).parent / "vit.legacy.onnx"
QUERIES = """g (float[B,S,4] q, float[B,T,4] k, float[B,T,4] v, float[B,2,S,T] m) => (float[B,S,4] y, float[B,2,S,T] p)
<int64[4] split = {0,0,2,2}, int64[3] join = {0,0,4}>
{ qh = Reshape (q, split)  kh = Reshape (k, split)  vh = Reshape (v, split)
  qt = Transpose <perm = [0,2,1,3]> (qh)  kt = Transpose <perm = [0,2,3,1]> (kh)  vt = Transpose <perm = [0,2,1,3]> (vh)
  s = MatMul (qt, kt)  z = Add (s, m)  e = Softmax <axis = -1> (z)  a = MatMul (e, vt)
  c = Transpose <perm = [0,2,1,3]> (a)  y = Reshape (c, join)  p = Exp (READ) }"""


def fused(model: Model, passes: str, target: str | None) -> Model:
    ctx = Context(target=None if target is None else Target.parse(target), evaluate=evaluate_node)
    return Pipeline.parse(passes).run(model, ctx).model


def domains(model: Model) -> set[str]:
    return {node.domain or "" for node in model.nodes()}


@pytest.mark.parametrize(
    ("passes", "target", "contrib"),
    [
        ("O3", "ort:cpu", True),
        ("O3", "ort", True),
        ("O3", "ort:cpu-avx2", True),
        ("O3", "ort:cuda", True),
        ("O3", "ort:openvino", False),
        ("O3", "tensorrt", False),
        ("O3", "tensorrt-rtx:sm89", False),
        ("O3", None, False),
        ("O2", "ort:cpu", False),
    ],
)
def test_microsoft_operators_appear_for_onnx_runtime_at_o3_alone(
    passes: str, target: str | None, contrib: bool
) -> None:
    assert ("com.microsoft" in domains(fused(ir.load(VIT), passes, target))) == contrib


ACTIVATED = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,4,H,W] x) => (float[N,4,H,W] y)
<int64[3] r = {0,2,-1}, float[2] one = {1,1}, float[2] zero = {0,0}, float[4,1,1] k = {1,2,3,4}, float three = {3}, float low = {0}, float six = {6}>
{ v = Reshape (x, r)  n = InstanceNormalization (v, one, zero)  s = Shape (x)  u = Reshape (n, s)  t = Mul (u, k)
  p = Softplus (t)  h = Tanh (p)  m = Mul (t, h)  a = Add (m, three)  c = Clip (a, low, six)  f = Mul (m, c)  y = Div (f, six) }"""


@pytest.mark.parametrize(
    ("passes", "target", "opset", "written"),
    [
        ("O2", "tensorrt", 17, {"HardSwish"}),
        ("O3", None, 17, {"HardSwish"}),
        ("O3", "ort:cpu", 17, {"HardSwish"}),
        ("O3", "ort:cuda", 17, {"HardSwish"}),
        ("O3", "tensorrt", 21, {"GroupNormalization", "Mish", "HardSwish"}),
        ("O3", "tensorrt-rtx:sm89", 21, {"GroupNormalization", "Mish", "HardSwish"}),
    ],
)
def test_one_operator_for_several_is_written_where_the_target_gains(
    passes: str, target: str | None, opset: int, written: set[str]
) -> None:
    model = ir.parse(ACTIVATED)
    found = fused(model, passes, target)
    assert found.opset == opset
    assert {n.op for n in found.nodes()} & {"GroupNormalization", "Mish", "HardSwish"} == written
    allowed = equivalence.tolerance(Exactness.REASSOCIATING, 5, equivalence.float_types(model))
    equivalence.compare(model, found, allowed=allowed).require(passes)


# What TensorRT for RTX fuses better as it is: (passes, model, operator, how many for it, how many elsewhere).
LEFT = {
    "a bias of zeros behind a product": (
        "fuse-weights",
        """g (float[N,S,2] x) => (float[N,S,2] y) <float[2,2] w = {1,2,3,4}, float[2] b = {0,0}>
        { a = MatMul (x, w)  c = Add (a, b)  y = Exp (c) }""",
        "Add", 1, 0,
    ),
    "a normalization between a depthwise convolution and a mean": (
        "fuse-conv-bn",
        """g (float[N,2,4,4] x) => (float[N,2,1,1] y)
        <float[2,1,1,1] w = {2,3}, float[2] s = {3,1}, float[2] b = {1,1}, float[2] m = {1,0}, float[2] v = {1,1}>
        { c = Conv <group = 2> (x, w)  n = BatchNormalization (c, s, b, m, v)  r = Relu (n)  y = GlobalAveragePool (r) }""",
        "BatchNormalization", 1, 0,
    ),
    "the same, when the batch is fixed": (
        "fuse-conv-bn",
        """g (float[1,2,4,4] x) => (float[1,2,1,1] y)
        <float[2,1,1,1] w = {2,3}, float[2] s = {3,1}, float[2] b = {1,1}, float[2] m = {1,0}, float[2] v = {1,1}>
        { c = Conv <group = 2> (x, w)  n = BatchNormalization (c, s, b, m, v)  r = Relu (n)  y = GlobalAveragePool (r) }""",
        "BatchNormalization", 0, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_an_engine_fuses_better_is_left_for_it(name: str) -> None:
    passes, text, op, for_engine, elsewhere = LEFT[name]
    model = ir.parse(text)
    for target, count in (("tensorrt-rtx:sm89", for_engine), ("ort:cpu", elsewhere)):
        found = fused(model, passes, target)
        assert sum(n.op == op for n in found.nodes()) == count
        allowed = equivalence.tolerance(Exactness.REASSOCIATING, 3, equivalence.float_types(model))
        equivalence.compare(model, found, allowed=allowed).require(passes)


def test_a_guard_against_nan_is_behind_the_product_for_engines_alone() -> None:
    text = """g (float[2,3] s, float[3,4] v) => (float[2,4] y) <float zero = {0}>
    { p = Softmax (s)  n = IsNaN (p)  w = Where (n, zero, p)  y = MatMul (w, v) }"""
    behind = {
        t: next(n for n in fused(ir.parse(text), "O3", t).nodes() if n.op == "IsNaN") for t in ("tensorrt", "ort:cpu")
    }
    assert {t: n.inputs[0].inputs[0].op for t, n in behind.items()} == {"tensorrt": "MatMul", "ort:cpu": "Softmax"}


WHOLE = """g (float[B,S,8] q, float[B,T,8] k, float[B,T,8] v, bool[B,1,S,T] m) => (float[B,S,8] y)
{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, m) }"""


@pytest.mark.parametrize(
    ("target", "kernel"), [(None, "Attention"), ("tensorrt", "Softmax"), ("ort:cpu", "MultiHeadAttention")]
)
def test_attention_of_the_standard_is_what_the_target_runs_fastest(target: str | None, kernel: str) -> None:
    model = ir.parse(WHOLE)
    found = fused(model, "O3", target)
    assert {n.op for n in found.nodes()} & {"Attention", "Softmax", "MultiHeadAttention"} == {kernel}
    allowed = equivalence.tolerance(Exactness.REASSOCIATING, 5, equivalence.float_types(model))
    equivalence.compare(model, found, allowed=allowed).require("O3")


def test_eight_of_equal_channels_stay_for_engines() -> None:
    text = """g (float[1,1,2,2] x) => (float[1,1,2,2] y) <int64[4] s = {16,1,1,1}, int64[4] r = {1,16,1,1}>
    { w = ConstantOfShape <value = float[1] {0.5}> (s)  c = Conv (x, w)  v = ConstantOfShape <value = float[1] {0.25}> (r)  y = Conv (c, v) }"""
    for target, channels in (("tensorrt", 8), ("ort:cpu", 1)):
        convolution = next(n for n in fused(ir.parse(text), "merge-equal-channels", target).nodes() if n.op == "Conv")
        assert convolution.inputs[1].shape[0] == channels


def test_half_precision_does_not_keep_attention_apart() -> None:
    assert any(node.op == "Attention" for node in fused(ir.load(VIT), "O3,cast-float", "ort:cpu").nodes())


def test_one_model_for_one_target_is_the_same_bytes_each_time() -> None:
    first, second = (ir.saves(fused(ir.load(VIT), "O3", "ort:cpu")) for _ in range(2))
    assert first == second


def test_products_stay_apart_where_they_are_quantized_later() -> None:
    passes = "O3,quantize-weights"
    found = fused(ir.load(VIT), passes, "ort:cpu")
    assert not any(node.op == "Attention" for node in found.nodes())


@pytest.mark.parametrize("length", [1, 5])
def test_fused_attention_keeps_the_numbers_of_float64(length: int) -> None:
    model = ir.parse(QUERIES.replace("READ", "m"))
    found = fused(model, "fuse-attention", "ort:cpu")
    assert any(node.op == "MultiHeadAttention" for node in found.nodes())
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((2, length, 4)) for _ in range(3))
    m = rng.standard_normal((2, 2, length, length))
    heads = [x.reshape(2, length, 2, 2).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = heads[0] @ heads[1].swapaxes(2, 3) + m
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = (weights / weights.sum(-1, keepdims=True)) @ heads[2]
    feeds = {name: x.astype(np.float32) for name, x in zip("qkvm", (q, k, v, m), strict=True)}
    y = equivalence.Evaluator(found).run(feeds)["y"]
    np.testing.assert_allclose(y, exact.transpose(0, 2, 1, 3).reshape(2, length, 4), rtol=1e-5, atol=1e-6)


def test_explain_says_what_kept_attention_apart() -> None:
    told = explain(ir.parse(QUERIES.replace("READ", "e")), "e", Pipeline.parse("O3"), Target.parse("ort:cpu"))
    assert any(f.pass_name == "fuse-attention" and "also read by" in f.text for f in told.findings), told


def test_explain_says_into_what_attention_went() -> None:
    told = explain(ir.parse(QUERIES.replace("READ", "m")), "e", Pipeline.parse("O3"), Target.parse("ort:cpu"))
    assert "MultiHeadAttention" in told.fate


def test_the_page_lists_every_fusion_with_its_targets() -> None:
    fusion = importlib.import_module("docs.fusion")
    assert fusion.PAGE.read_text(encoding="utf-8") == fusion.page(), "python -m docs.fusion writes the table anew"


# ------------------------------------------------------------------------------------------------------------- opsets


def raised(text: str, version: int) -> Model | str:
    model = ir.parse(text)
    reason = obstacle(model, version, Shapes(model))
    if reason is not None:
        return reason
    edit = Editor(model)
    raise_opset(model, version, edit)
    edit.commit()
    return model


OLD = '<ir_version: 7, opset_import: ["" : VERSION]>\ng (float[N,4] x) => (float[N,M] y) { BODY }'


@pytest.mark.parametrize(
    ("version", "body", "operands"),
    [
        (11, "u = Unsqueeze <axes = [1]> (x) y = Squeeze <axes = [1]> (u)", 2),
        (13, "y = ReduceMean <axes = [1]> (x)", 2),
        (13, "a, b = Split <axis = 1> (x) y = Add (a, b)", 2),
        (11, "y = Softmax <axis = 1> (x)", 1),
        (13, "y = Cast <to = 1> (x)", 1),
    ],
)
def test_what_moved_between_opsets_is_moved(version: int, body: str, operands: int) -> None:
    text = OLD.replace("VERSION", str(version)).replace("BODY", body)
    found = raised(text, 18)
    assert isinstance(found, Model), found
    assert found.opset == 18
    assert len(list(found.nodes())[-1].inputs) == operands
    equivalence.compare(ir.parse(text), found).require(body)


@pytest.mark.parametrize(
    ("version", "body", "reason"),
    [
        (9, "y = Relu (x)", "older than"),
        (11, "y = Softmax <axis = 0> (x)", "means something else"),
        (11, "y = Hardmax (x)", "means something else"),
        (13, "y = com.microsoft.Gelu (x)", None),
    ],
)
def test_what_means_something_else_keeps_its_opset(version: int, body: str, reason: str | None) -> None:
    text = OLD.replace("VERSION", str(version)).replace("BODY", body)
    if "com.microsoft" in body:
        text = text.replace("]>", ', "com.microsoft" : 1]>')
    found = raised(text, 17)
    assert (reason in found) if isinstance(found, str) and reason else isinstance(found, Model)


# ---------------------------------------------------------------------------------------------------------------- gate


def gated(times: list[float], passes: str = "fuse-attention{measure=true}") -> tuple[Model, list[str], int]:
    """The model after `passes`, with a clock that tells `times` for the parts and what they become; the remarks; the calls."""
    calls = []

    def clock(parts: object, feeds: object) -> list[float]:
        calls.append(parts)
        return times

    ctx = Context(target=Target.parse("ort:cpu"), evaluate=evaluate_node, clock=clock)
    result = Pipeline.parse(passes).run(ir.parse(QUERIES.replace("READ", "m")), ctx)
    return result.model, list(map(str, result.remarks)), len(calls)


def test_a_fusion_that_is_slower_here_is_left_alone_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    model, remarks, calls = gated([1.0, 1.2])
    assert (calls, [n.op for n in model.nodes() if n.domain]) == (1, [])
    assert any("takes 1.20 of the time" in r and "skip=['y']" in r for r in remarks), remarks
    again, _, calls = gated([1.0, 0.1])
    assert (calls, [n.op for n in again.nodes() if n.domain]) == (0, []), "the decision is found in the cache"
    replayed, _, calls = gated([1.0, 0.1], "fuse-attention{skip=[y]}")
    assert (calls, [n.op for n in replayed.nodes() if n.domain]) == (0, [])


def test_a_fusion_that_is_faster_here_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    model, remarks, calls = gated([1.0, 0.7])
    assert (calls, [n.op for n in model.nodes() if n.domain]) == (1, ["MultiHeadAttention"])
    assert any("takes 0.70 of the time: fused" in r for r in remarks), remarks


def test_parts_run_as_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", "off")
    seen = []

    def clock(parts: list[Model], feeds: dict[str, np.ndarray]) -> list[float]:
        outputs = [equivalence.Evaluator(part).run(feeds) for part in parts]
        seen.append([[n.op for n in part.nodes()] for part in parts])
        for left, right in zip(outputs[0].values(), outputs[1].values(), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
        return [1.0, 0.5]

    ctx = Context(target=Target.parse("ort:cpu"), evaluate=evaluate_node, clock=clock)
    Pipeline.parse("measured").run(ir.load(VIT), ctx)
    assert ["Attention"] in [after for _, after in seen]
    assert ["Sum", "LayerNormalization"] in [after for _, after in seen]
