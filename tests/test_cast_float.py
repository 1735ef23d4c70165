"""Half precision: valid on every model, close where it can be run, and what an engine makes of it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graphs import models as random_models
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx.backend.test.case.node import collect_testcases

import graphopt
from graphopt import cli, equivalence, ir, models, verify
from graphopt.data import open_data
from graphopt.emulation import in_float32
from graphopt.errors import InvalidModel, NotEquivalent, UnsupportedModel, UsageError
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline, Result
from graphopt.target import Target

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)
NETS = sorted(p.stem for p in Path(models.__file__).parent.glob("*.onnx"))
FLOAT = np.dtype(np.float32)


def run(text: str, model: ir.Model, **context: Any) -> Result:
    return Pipeline.parse(text).run(model, Context(evaluate=evaluate_node, **context))


def bound(text: str, model: ir.Model, result: Result) -> equivalence.Bound:
    counts = dict.fromkeys(Pipeline.parse(text).passes, result.rewrites)
    return equivalence.Bound.of(counts, equivalence.float_types(model))


def array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


# ------------------------------------------------------------------------------------------------------ every model


@pytest.fixture(scope="module")
def operator_cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference implementations, which compute the expected outputs
        return collect_testcases(None)


def check_valid(before: ir.Model, after: ir.Model, name: str) -> None:
    assert verify.structure(after) == [], name
    try:
        verify.full(after)
    except InvalidModel as error:
        reason = str(error)
    else:
        return
    try:
        verify.full(before)
    except InvalidModel:
        return  # onnx's own checker refuses a few of onnx's own models
    pytest.fail(f"{name}: {reason}")


@pytest.mark.parametrize(
    ("text", "share"),
    [("cast-float{convert=['*'],io=convert}", 1), ("cast-float{dtype=bfloat16,convert=['*']}", 4)],
)
def test_operator_models_stay_valid(text: str, share: int, operator_cases: list[Any]) -> None:
    """One of `share`: raising the opset for bfloat16 takes its time; all of them hold it, too."""
    converted = 0
    for case in operator_cases[::share]:
        before = ir.from_proto(case.model)
        result = run(text, before)
        if result.rewrites:
            check_valid(before, result.model, case.name)
            converted += 1
    assert converted > 1300 / share  # the others hold no float32


def test_operator_models_keep_their_outputs_up_to_half(operator_cases: list[Any]) -> None:
    compared = 0
    for case in operator_cases:
        before = ir.from_proto(case.model)
        result = run("cast-float", before)
        if not result.rewrites:
            continue
        check_valid(before, result.model, case.name)
        if any(n.op in ("Dropout", "Bernoulli") or "Random" in n.op for n in before.nodes()):
            continue
        first, second = Evaluator(before), Evaluator(result.model)
        assert first.engine == second.engine, case.name
        allowed = bound("cast-float", before, result).tolerance
        for inputs, _ in case.data_sets:
            feeds = {spec.name: array(value) for spec, value in zip(before.inputs, inputs, strict=False)}
            try:
                expected = first.run(feeds)
            except UnsupportedModel:
                continue
            for name, value in second.run(feeds).items():
                assert equivalence.difference(name, expected[name], value).relative <= allowed, case.name
            compared += 1
    assert compared > 300


RUNS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
TEXTS = [
    "cast-float{dtype=bfloat16}",
    "cast-float{convert=['*']}",
    "cast-float{io=convert}",
    "cast-float{dtype=bfloat16,convert=['*'],io=convert}",
    "O2,cast-float",
]


@RUNS
@given(random_models(), st.sampled_from(TEXTS))
def test_random_graphs_stay_valid_and_close(model: ir.Model, text: str) -> None:
    result = run(text, model)
    verify.full(result.model)
    assert verify.interface(model, result.model, "io=convert" in text) == []
    feeds = [
        {"x": np.random.default_rng(1).standard_normal((2, 4, 3, 3)).astype(np.float32), "flag": np.array(flag)}
        for flag in (True, False)
    ]
    if not any(n.op in ("Floor", "Exp") for n in model.nodes()):  # which turn a rounding into a step
        report = equivalence.compare(model, result.model, feeds=feeds, allowed=bound(text, model, result))
        report.require(text)
        assert report.doubt is None, result.model.text()


# ------------------------------------------------------------------------------------------------------ few casts


def to(node: ir.Node) -> int | None:
    return int(node.attrs["to"]) if node.op == "Cast" else None


@pytest.mark.parametrize("name", NETS)
def test_no_cast_follows_a_cast_and_each_weight_is_there_once(name: str) -> None:
    result = run("default,cast-float", ir.load(models.path(name))).model
    verify.full(result)
    for node in result.nodes():
        if node.op == "Cast" and node.inputs[0].inputs:
            assert node.inputs[0].inputs[0].op != "Cast"
    stored = [c for c in result.constants() if c.nbytes > 64 and c.dtype in (FLOAT, np.float16)]
    assert len({np.asarray(c.values).tobytes() for c in stored}) == len(stored)
    assert sum(to(n) is not None for n in result.nodes()) <= (2 if "resnet.l" in name else 22)


@pytest.mark.parametrize(("dtype", "fewest"), [("float16", 0.995), ("bfloat16", 0.98)])
@pytest.mark.parametrize("name", ["resnet.legacy", "vit.dynamo"])
def test_digits_nets_classify_as_before(name: str, dtype: str, fewest: float) -> None:
    before = ir.load(models.path(name))
    result = run(f"default,cast-float{{dtype={dtype}}}", before).model
    if dtype == "bfloat16":
        result = in_float32(result, np.dtype(ml_dtypes.bfloat16))
    feeds = {before.inputs[0].name: models.digits()["x_test"]}
    (expected,), (found,) = (Evaluator(m).run(feeds).values() for m in (before, result))
    assert np.mean(expected.argmax(1) == found.argmax(1)) >= fewest


def test_the_emulation_rounds_every_result() -> None:
    model = ir.parse("""g (float[2,2] x) => (float[2,2] y) { a = Cast <to = 16> (x)
        b = Mul (a, a)
        y = Cast <to = 1> (b) }""")
    typed = run("infer-shapes", model).model
    x = np.array([[1.01, 2.03], [3.07, -4.09]], np.float32)
    (found,) = Evaluator(in_float32(typed, np.dtype(ml_dtypes.bfloat16))).run({"x": x}).values()
    halves = x.astype(ml_dtypes.bfloat16)
    assert np.array_equal(found, (halves * halves).astype(np.float32))


# --------------------------------------------------------------------------------------------------- out of range


MASK = """g (float[2,4] x, bool[2,2] m) => (float[2,2] y) <float far = {-3.4028235e38}, float zero = {0}, int64[2] s = {4,2}> {
    t = Reshape (x, s)
    a = MatMul (x, t)
    k = Where (m, far, zero)
    b = Add (a, k)
    c = Softmax (b)
    y = MatMul (c, c) }"""


@pytest.mark.parametrize("text", ["cast-float", "cast-float{convert=['*']}", "cast-float{convert=[Softmax,Add]}"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_row_of_nothing_but_masked_places_stays_a_number(text: str, dtype: str) -> None:
    options = text.removeprefix("cast-float").strip("{}")
    text = f"cast-float{{dtype={dtype}{',' if options else ''}{options}}}"
    model = ir.parse(MASK)
    feeds = {"x": np.linspace(-9, 2, 8, dtype=np.float32).reshape(2, 4), "m": np.array([[True, True], [False, True]])}
    result = run(text, model)
    report = equivalence.compare(model, result.model, feeds=[feeds], allowed=bound(text, model, result))
    report.require(text)
    if text == "cast-float{dtype=float16}":
        assert report.equal


LARGE = """g (float[1,4] x) => (float[1,4] y) <float[4,4] w = {300,0,0,0, 0,300,0,0, 0,0,300,0, 0,0,0,300}> {
    a = MatMul (x, w)
    b = MatMul (a, w)
    c = Neg (b)
    d = Tanh (c)
    y = MatMul (d, w) }"""


def test_without_data_an_overflow_is_an_error_that_names_the_remedy() -> None:
    model = ir.parse(LARGE.replace("d = Tanh (c)", "d = Neg (c)"))  # tanh of an infinity is a number
    result = run("cast-float", model)
    feeds = [{"x": np.ones((1, 4), np.float32)}]  # 300 * 300 is beyond 65504
    report = equivalence.compare(model, result.model, feeds=feeds, allowed=bound("cast-float", model, result))
    with pytest.raises(NotEquivalent, match="overflows float16: give --data"):
        report.require("it")


def test_what_data_drives_out_of_range_stays_float32() -> None:
    model = ir.parse(LARGE)
    data = open_data({"x": np.ones((3, 4), np.float32)}, model.inputs)
    result = run("cast-float", model, data=data)
    half = {t.name for n in result.model.nodes() for t in n.outputs if t.dtype == np.float16}
    assert not half & {"b", "c"}
    assert any("'b' reaches 9e+04 on the data" in str(r) for r in result.remarks)
    feeds = [{"x": np.ones((1, 4), np.float32)}]
    assert equivalence.compare(model, result.model, feeds=feeds, allowed=bound("cast-float", model, result)).equal
    wide = run("cast-float{margin=1000}", model, data=data)
    assert sum(t.dtype == np.float16 for n in wide.model.nodes() for t in n.outputs) < len(half)
    assert run("cast-float{dtype=bfloat16}", model, data=data).rewrites == 5


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ("keep=[nobody]", UsageError, "'nobody' matches no node"),
        ("convert=['/x/*']", UsageError, "matches no node"),
        ("margin=0.5", UsageError, "less than 1"),
        ("samples=0", UsageError, "less than 1"),
        ("dtype=float8", UsageError, "none of float16, bfloat16"),
    ],
)
def test_wrong_options_are_told(options: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        run(f"cast-float{{{options}}}", ir.parse(LARGE))


def test_old_gpus_have_no_bfloat16() -> None:
    with pytest.raises(UnsupportedModel, match="sm75 cannot compute bfloat16"):
        run("cast-float{dtype=bfloat16}", ir.parse(LARGE), target=Target.parse("tensorrt-rtx:sm75"))


# ---------------------------------------------------------------------------------------------- builds and engines


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_the_proof_of_a_half_model_has_a_bound(tmp_path: Path) -> None:
    graphopt.build(models.path("resnet.legacy"), tmp_path / "out", ["ort"], "default,cast-float")
    proof = manifest(tmp_path / "out")["variants"][0]["proof"]
    assert 0 < proof["relative"] < proof["tolerance"] < 0.05
    written = ir.load(tmp_path / "out" / "ort-cpu.onnx")
    assert {n.op for n in written.nodes() if any(t.dtype == np.float16 for t in n.inputs)} == {"Cast"}
    session = graphopt.open(tmp_path / "out")
    x = models.digits()["x_test"][:4]
    (y,) = session.run({session.inputs[0].name: x}).values()
    assert y.dtype == np.float32


def test_inputs_and_outputs_become_half_when_asked(tmp_path: Path) -> None:
    graphopt.build(models.path("resnet.legacy"), tmp_path / "out", ["ort"], "default,cast-float{io=convert}")
    told = manifest(tmp_path / "out")
    assert [s["dtype"] for s in (*told["inputs"], *told["outputs"])] == ["float16", "float16"]
    assert told["variants"][0]["proof"]["relative"] < 0.01
    session = graphopt.open(tmp_path / "out")
    x = models.digits()["x_test"][:4].astype(np.float16)
    (y,) = session.run({session.inputs[0].name: x}).values()
    assert y.dtype == np.float16


@needs_rtx
def test_engines_have_half_kernels(tmp_path: Path) -> None:
    said: list[str] = []
    for text, half in (("default", False), ("default,cast-float", True)):
        graphopt.build(models.path("resnet.legacy"), tmp_path / "out", ["tensorrt-rtx:sm89"], text, say=said.append)
        kernels = manifest(tmp_path / "out")["variants"][0]["kernels"]
        found = [any("Half" in types for types in (k["inputs"], k["constants"], k["outputs"])) for k in kernels]
        assert all(found) if half else not any(found)
    assert any("37 nodes in float16, 0 stay float32, 2 casts" in text for text in said)


@needs_rtx
def test_bfloat16_reaches_the_engine_and_the_cpu_computes_in_float32(tmp_path: Path) -> None:
    text = "default,cast-float{dtype=bfloat16}"
    targets = ["tensorrt-rtx:sm89", "ort:cpu"]
    graphopt.build(models.path("resnet.dynamo"), tmp_path / "out", targets, text)
    engine, cpu = manifest(tmp_path / "out")["variants"]
    assert all("BFloat16" in str(k) or "BF16" in str(k) for k in engine["kernels"])
    assert engine["proof"]["evaluator"] == "onnxruntime"  # emulated, since no CPU kernel computes it
    assert 1e-3 < engine["proof"]["relative"] < engine["proof"]["tolerance"]
    assert 1e-4 < cpu["proof"]["relative"] < cpu["proof"]["tolerance"]
    assert cpu["weights"]["after"] < 0.6 * cpu["weights"]["before"]


@needs_rtx
def test_turing_gets_its_matrix_products_in_half(tmp_path: Path) -> None:
    graphopt.build(
        models.path("vit.legacy"), tmp_path / "out", ["tensorrt-rtx:sm75"], "default,cast-float", fallback=False
    )
    kernels = manifest(tmp_path / "out")["variants"][0]["kernels"]
    assert any("Half" in {*k["inputs"], *k["constants"], *k["outputs"]} for k in kernels)


@needs_rtx
def test_int8_and_half_go_together(tmp_path: Path) -> None:
    digits = models.digits()
    data = {"x": digits["x_train"][:64]}
    graphopt.build(
        models.path("resnet.legacy"),
        tmp_path / "out",
        ["tensorrt-rtx:sm89", "ort:cpu"],
        "default,quantize-qdq{calibration=minmax},cast-float",
        data=data,
    )
    engine, cpu = manifest(tmp_path / "out")["variants"]
    kinds = [{*k["inputs"], *k["constants"], *k["outputs"]} for k in engine["kernels"]]
    assert any("Int8" in k for k in kinds)
    assert any("Half" in k for k in kinds)
    written = ir.load(tmp_path / "out" / cpu["files"][0]["name"])
    for node in written.nodes():  # ONNX Runtime's int8 kernels know no half
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            assert isinstance(node.inputs[1], gs.Constant)
            assert node.inputs[1].dtype == FLOAT
            assert not node.attrs.get("output_dtype")


def test_the_command_line_looks_at_the_samples(tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnxtxt", tmp_path / "o.onnx"
    model.write_text(
        "g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 0, 0, 1}> { a = Add (x, x) y = MatMul (a, w) }"
    )
    np.savez(tmp_path / "calib.npz", x=np.full((5, 2), 3e4, np.float32))
    for more, casts in (((), 2), (("--data", str(tmp_path / "calib.npz")), 0)):
        assert cli.run(["opt", str(model), "-o", str(out), "-p", "cast-float", *more]) == 0
        assert sum(node.op == "Cast" for node in ir.load(out).nodes()) == casts
