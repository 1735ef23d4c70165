"""Int8: placement for both runtimes, weights that cannot saturate, accuracy on the kernels that run."""

from __future__ import annotations

import collections
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graphopt import int8, ir, models
from graphopt.analyses import weights
from graphopt.analyses.quantized import forms
from graphopt.analyses.rounding import gptq, loss
from graphopt.coverage import kernel_coverage, onnxruntime_coverage
from graphopt.data import open_data
from graphopt.elements import Node
from graphopt.errors import UnsupportedModel, UsageError
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.int8_layers import examine
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.target import Target

CPU, RTX = Target("ort", "cpu"), Target("tensorrt-rtx", "sm89")
DIGITS = models.digits()
RNG = np.random.default_rng(0)


def run(text: str, model: ir.Model, target: Target | None = CPU, data=None, limit: int | None = None):
    return Pipeline.parse(text).run(model, Context(target=target, data=data, evaluate=evaluate_node, limit=limit))


def net(name: str) -> tuple[ir.Model, object]:
    model = ir.load(f"models/{name}.legacy.onnx")
    data = open_data({"x": DIGITS["x_calib"]}, model.inputs)
    return run("O2", model).model, data


def ops(model: ir.Model) -> collections.Counter:
    return collections.Counter(n.op for n in model.nodes())


def random_model(text: str, **arrays: np.ndarray) -> ir.Model:
    opset = onnx.helper.make_opsetid("", 17)
    proto = onnx.helper.make_model(onnx.parser.parse_graph(text), opset_imports=[opset], ir_version=8)
    for name, value in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    return ir.loads(proto.SerializeToString())


def kernels_of(model: ir.Model) -> collections.Counter:
    """Operators that ONNX Runtime's CPU provider runs."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        ort.InferenceSession(ir.saves(model), options, providers=["CPUExecutionProvider"])
        return collections.Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


CHAIN = """
    g (float[N,8,6,6] x) => (float[N,16,6,6] y)
    { a = Conv <pads = [1,1,1,1]> (x, w1, b1)
      r = Relu (a)
      c = Conv <pads = [1,1,1,1]> (r, w2)
      s = Add (c, r)
      y = Relu (s) }
"""


def chain() -> tuple[ir.Model, object]:
    model = random_model(
        CHAIN, w1=RNG.standard_normal((16, 8, 3, 3)), b1=RNG.standard_normal(16), w2=RNG.standard_normal((16, 16, 3, 3))
    )
    return model, open_data({"x": RNG.standard_normal((16, 8, 6, 6)).astype(np.float32)}, model.inputs)


# ----------------------------------------------------------------------------------------------------------- weights


def saturating(activations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """u8 [M,K] by s8 [K,N] as ``vpmaddubsw`` computes it: neighbours along K are added in 16 bits."""
    if activations.shape[1] % 2:
        activations, codes = np.pad(activations, ((0, 0), (0, 1))), np.pad(codes, ((0, 1), (0, 0)))
    a, w = activations.astype(np.int64), codes.astype(np.int64)
    pairs = a[:, 0::2, None] * w[None, 0::2] + a[:, 1::2, None] * w[None, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)


@pytest.mark.parametrize("k", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-20])
def test_pair_safe_codes_never_saturate(k: int, scale: float) -> None:
    node = Node("MatMul")
    values = (RNG.laplace(size=(k, 40)) * scale).astype(np.float32)
    values[:, 3] = 0
    values[: k // 2 * 2, 4] = scale
    safe, plain = (weights.quantize(node, values, pair_safe=flag) for flag in (True, False))
    assert safe.axis == 1
    assert (safe.scale > 0).all()
    assert weights.pairs_at_risk(node, safe.codes) == 0
    for bright in (np.full((1, k), 255), RNG.integers(0, 256, (8, k))):
        np.testing.assert_array_equal(saturating(bright, safe.codes), bright @ safe.codes.astype(np.int64))
    if k == 64:
        bright = np.full((1, k), 255)
        assert weights.pairs_at_risk(node, plain.codes)
        assert (saturating(bright, plain.codes) != bright @ plain.codes.astype(np.int64)).any()
        noise = [np.square(q.values() / scale - values / scale)[:, 5:].mean() for q in (plain, safe)]
        assert 1 < noise[1] / noise[0] < 10 ** (4 / 10)


def multiply(activations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """By ONNX Runtime's u8 x s8 kernel of this CPU."""
    text = f"g (uint8[M,{len(codes)}] a, int8[{','.join(map(str, codes.shape))}] w) => (int32[M,N] y) {{ y = MatMulInteger (a, w) }}"
    proto = onnx.helper.make_model(
        onnx.parser.parse_graph(text), opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"a": activations.astype(np.uint8), "w": codes.astype(np.int8)})[0]


def test_the_emulator_tells_what_a_cpu_without_vnni_computes(tmp_path) -> None:
    """One value as ONNX Runtime 1.31 gave it on an AVX2 machine, then the kernel itself under qemu where that is installed."""
    assert saturating(np.full((1, 64), 255), np.full((64, 1), 127)).item() == 1_048_544  # exact: 2,072,640
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("the kernel itself needs qemu-user")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import numpy as np; from test_quantize import multiply; "
        "f = np.load(sys.argv[2]); np.save(sys.argv[3], np.concatenate([multiply(f[f'a{i}'], f[f'w{i}']).ravel() for i in range(4)]))"
    )
    shapes = ((1, 64, 8), (8, 64, 16), (5, 33, 7), (3, 256, 40))
    cases = [(RNG.integers(0, 256, (m, k)), RNG.integers(-127, 128, (k, n))) for m, k, n in shapes]
    named = {f"{kind}{i}": array for i, case in enumerate(cases) for kind, array in zip("aw", case, strict=True)}
    np.savez(tmp_path / "cases.npz", **named)
    words = [str(Path(__file__).parent), str(tmp_path / "cases.npz"), str(tmp_path / "found.npy")]
    subprocess.run([qemu, "-cpu", "max,avx512f=off", sys.executable, "-c", script, *words], check=True)
    expected = np.concatenate([saturating(*case).ravel() for case in cases])
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)
    exact = np.concatenate([(a @ w).ravel() for a, w in cases])
    assert (expected != exact).mean() > 0.5


def test_pairs_follow_the_order_in_which_kernels_pack_convolutions() -> None:
    conv = Node("Conv", attrs={"group": 1})
    along_channels = np.zeros((1, 4, 3, 3), np.int8)
    along_channels[0, :2, 1, 1] = 127  # two channels of one tap are neighbours
    across_taps = np.zeros((1, 4, 3, 3), np.int8)
    across_taps[0, 0, 1, :] = 127  # one channel of three taps is not
    assert weights.pairs_at_risk(conv, along_channels) == 1
    assert weights.pairs_at_risk(conv, across_taps) == 0
    depthwise = Node("Conv", attrs={"group": 8})
    filters = RNG.standard_normal((8, 1, 3, 3)).astype(np.float32)
    full = weights.quantize(depthwise, filters, pair_safe=True)
    assert np.abs(full.codes).max(axis=(1, 2, 3)).tolist() == [127] * 8


@pytest.mark.parametrize(
    ("op", "attributes", "shape", "axis"),
    [
        ("Conv", {}, (4, 3, 3, 3), 0),
        ("Conv", {"group": 2}, (4, 3, 3), 0),
        ("ConvTranspose", {}, (3, 4, 2, 2), 1),
        ("Gemm", {}, (5, 4), 1),
        ("Gemm", {"transB": 1}, (4, 5), 0),
        ("MatMul", {}, (5, 4), 1),
    ],
)
def test_scales_lie_on_the_axis_of_output_channels(op: str, attributes, shape, axis: int) -> None:
    values = RNG.standard_normal(shape) * np.moveaxis(
        np.geomspace(1, 1e6, 4).reshape(-1, *[1] * (len(shape) - 1)), 0, axis
    )
    found = weights.quantize(Node(op, attrs=attributes), values.astype(np.float32), pair_safe=False)
    assert found.axis == axis
    others = tuple(i for i in range(len(shape)) if i != axis)
    assert (np.abs(found.values() - values) <= 0.004 * np.abs(values).max(axis=others, keepdims=True)).all()


def test_dead_channels_and_large_biases_get_a_scale_that_works() -> None:
    values = np.zeros((2, 3, 1, 1))
    values[1] = 1e-12
    model = random_model(
        "g (float[N,3,2,2] x) => (float[N,2,2,2] y) { y = Conv (x, w, b) }", w=values, b=np.array([5.0, 100.0])
    )
    data = open_data({"x": RNG.standard_normal((4, 3, 2, 2)).astype(np.float32)}, model.inputs)
    result = run("quantize-qdq", model, data=data).model
    sample = {"x": np.ones((1, 3, 2, 2), np.float32)}
    y = Evaluator(result).run(sample)["y"]
    np.testing.assert_allclose(y[0, :, 0, 0], [5, 100], atol=0.5 * 100 / 255)


@pytest.mark.parametrize(("value", "told"), [(0.0, True), (2.5, True), (None, False)])
def test_samples_that_do_not_vary_are_told(value: float | None, told: bool) -> None:
    model, _ = chain()
    x = RNG.standard_normal((4, 8, 6, 6)).astype(np.float32) if value is None else np.full((4, 8, 6, 6), value, "f")
    result = run("quantize-qdq", model, data=open_data({"x": x}, model.inputs))
    remarks = [str(r) for r in result.remarks if "throughout all samples" in str(r)]
    assert any(f"'x' is {value or 0:g} throughout" in r for r in remarks) == told


# --------------------------------------------------------------------------------------------------------- placement


def test_onnxruntime_keeps_int8_from_one_convolution_to_the_next() -> None:
    model, data = chain()
    result = run("quantize-qdq", model, data=data)
    assert result.rewrites == 2
    assert ops(result.model)["Relu"] == 1  # the last one, which no int8 operator reads
    layers = onnxruntime_coverage(result.model)
    assert [layer.kernel for layer in layers] == ["QLinearConv", "QLinearConv"]
    scalars = [n.inputs[1].shape for n in result.model.nodes() if n.op == "QuantizeLinear"]
    assert scalars
    assert set(scalars) == {()}
    assert {str(n.inputs[2].dtype) for n in result.model.nodes() if n.op == "QuantizeLinear"} == {"uint8"}


SHUFFLE = """
    g (float[1,8,6,6] x) => (float[1,8,6,6] y)
    <int64[2] halves = {4, 4}, int64[5] apart = {1, 2, 4, 6, 6}, int64[4] whole = {1, 8, 6, 6}>
    { p = Conv (x, w1)
      a, b = Split <axis = 1> (p, halves)
      c = Conv <pads = [1,1,1,1]> (a, w2)
      d = Concat <axis = 1> (b, c)
      e = Reshape (d, apart)
      f = Transpose <perm = [0,2,1,3,4]> (e)
      h = Reshape (f, whole)
      y = Conv (h, w3) }
"""


def test_int8_goes_through_a_split_and_a_channel_shuffle() -> None:
    model = random_model(
        SHUFFLE,
        w1=RNG.standard_normal((8, 8, 1, 1)),
        w2=RNG.standard_normal((4, 4, 3, 3)),
        w3=RNG.standard_normal((8, 8, 1, 1)),
    )
    data = open_data({"x": RNG.standard_normal((16, 8, 6, 6)).astype(np.float32)}, model.inputs)
    result = run("quantize-qdq", model, data=data)
    kernels = kernels_of(result.model)
    assert kernels["QLinearConv"] == 3
    assert kernels["QLinearConcat"] == kernels["QuantizeLinear"] == kernels["DequantizeLinear"] == 1
    judge = int8.Judge(model, data, None)
    assert judge.score(result.model, True).sqnr > 30


def test_tensorrt_gets_symmetric_inputs_of_weighted_operators_and_a_shared_skip() -> None:
    model, data = chain()
    result = run("quantize-qdq{min-channels=1}", model, RTX, data)
    quantizers = [n for n in result.model.nodes() if n.op == "QuantizeLinear"]
    assert [n.inputs[0].name for n in quantizers] == ["x", "r"]  # one pair for the second Conv and the sum
    assert all(str(n.inputs[2].dtype) == "int8" and not n.inputs[2].values.any() for n in quantizers)
    add = next(n for n in result.model.nodes() if n.op == "Add")
    assert [t.inputs[0].op for t in add.inputs] == ["Conv", "DequantizeLinear"]
    assert "int32" not in {str(c.dtype) for c in result.model.constants()}
    assert ops(result.model)["Relu"] == 2


def test_a_model_is_never_quantized_twice() -> None:
    model, data = chain()
    first = run("quantize-qdq", model, data=data)
    again = run("quantize-qdq", first.model, data=data)
    assert again.rewrites == 0
    assert any("quantized already" in str(r) for r in again.remarks)


def test_every_form_of_quantization_is_recognised() -> None:
    vit, data = net("vit")
    assert forms(vit) == {}
    assert forms(run("quantize-dynamic", vit).model) == {"dynamic codes": 26}  # 13 activations, 13 products
    assert forms(run("quantize-weights", vit).model) == {"weights alone": 14}
    assert list(forms(run("quantize-qdq", vit, data=data).model)) == ["Q/DQ pairs"]


def test_a_quantized_model_is_made_float_again_by_choice(tmp_path) -> None:
    resnet, data = net("resnet")
    judge = int8.Judge(resnet, open_data({"x": DIGITS["x_test"][:100]}, resnet.inputs), None)
    for text in ("quantize-qdq", "quantize-weights"):
        again = run("dequantize,default", run(text, resnet, data=data).model).model
        assert forms(again) == {}
        assert judge.score(again, True).sqnr > 40
    vit, _ = net("vit")
    again = run("dequantize,O2", run("quantize-dynamic", vit).model).model
    assert forms(again) == {}
    assert ops(again)["MatMul"] == ops(vit)["MatMul"]


@pytest.mark.parametrize(("bits", "zeros"), [(8, False), (4, False), (4, True), (2, True)])
def test_weights_in_blocks_are_recognised_and_decoded_by_choice(bits: int, zeros: bool) -> None:
    blob, text = 32 * bits // 8, "x, b, s, z" if zeros else "x, b, s"
    proto = onnx.helper.make_model(
        onnx.parser.parse_graph(
            f"g (float[N,50] x) => (float[N,8] y) {{ y = com.microsoft.MatMulNBits <K=50,N=8,bits={bits},block_size=32> ({text}) }}"
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    arrays = {
        "b": RNG.integers(0, 256, (8, 2, blob)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, 16).astype(np.float32),
    }
    if zeros:
        arrays["z"] = RNG.integers(0, 256, 8 * -(-2 * bits // 8)).astype(np.uint8)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    model = ir.loads(proto.SerializeToString())
    assert forms(model) == {"weights alone": 1}
    result = run("dequantize", model).model
    assert ops(result) == {"MatMul": 1}
    sample = {"x": RNG.standard_normal((3, 50)).astype(np.float32)}
    before, after = (Evaluator(m).run(sample)["y"] for m in (model, result))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def test_blocks_of_a_decoder_are_decoded_by_choice() -> None:
    text = (
        "g (float[N,40] x) => (float[N,8] y) { w = DequantizeLinear <axis=0,block_size=16> (c, s) y = MatMul (x, w) }"
    )
    proto = onnx.helper.make_model(
        onnx.parser.parse_graph(text), opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    arrays = {
        "c": RNG.integers(-127, 128, (40, 8)).astype(np.int8),
        "s": RNG.uniform(0.01, 0.1, (3, 8)).astype(np.float32),
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    model = ir.loads(proto.SerializeToString())
    result = run("dequantize", model).model
    assert ops(result) == {"MatMul": 1}
    sample = {"x": RNG.standard_normal((3, 40)).astype(np.float32)}
    before, after = (Evaluator(m).run(sample)["y"] for m in (model, result))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def test_operators_on_codes_become_their_float_selves() -> None:
    text = """g (float[1,2,3,3] x) => (float[1,3,3,3] y)
    <float s = {0.01}, uint8 z = {128}, float[3] v = {0.01, 0.02, 0.03}, int8[3] n = {0, 0, 0}, int8[3,2,1,1] w = {1, 2, 3, 4, 5, 6},
     int32[3] b = {1000, 2000, 3000}, float t = {0.02}>
    { q = QuantizeLinear (x, s, z) c = QLinearConv (q, s, z, w, v, n, t, z, b) y = DequantizeLinear (c, t, z) }"""
    model = random_model(text)
    result = run("dequantize", model).model
    assert ops(result) == {"Conv": 1}
    sample = {"x": RNG.uniform(-1, 1, (1, 2, 3, 3)).astype(np.float32)}
    before, after = (Evaluator(m).run(sample)["y"] for m in (model, result))
    np.testing.assert_allclose(before, after, atol=0.012)


def test_dynamic_products_run_in_int8_and_weights_alone_shrink_the_file() -> None:
    vit, _ = net("vit")
    judge = int8.Judge(vit, open_data({"x": DIGITS["x_test"]}, vit.inputs), DIGITS["y_test"])
    dynamic = judge.score(run("quantize-dynamic", vit).model, True)
    assert dynamic.sqnr > 33
    assert dynamic.metric >= dynamic.reference - 0.3
    stored = run("quantize-weights", vit).model
    assert stored.nbytes < 0.35 * vit.nbytes
    assert judge.score(stored, True).sqnr > 38


@pytest.mark.parametrize(("text", "gain"), [("quantize-weights", 3), ("quantize-dynamic", 1)])
def test_samples_make_better_codes_for_weights_alone_and_dynamic_products(text: str, gain: float) -> None:
    vit, data = net("vit")
    judge = int8.Judge(vit, open_data({"x": DIGITS["x_test"]}, vit.inputs), None)
    nearest, better = (judge.score(run(text, vit, data=given).model, False).sqnr for given in (None, data))
    assert better > nearest + gain
    same = run(f"{text}{{rounding=nearest}}", vit, data=data).model
    assert same.fingerprint() == run(text, vit).model.fingerprint()


def test_embeddings_get_a_scale_for_each_row() -> None:
    rows = RNG.standard_normal((50, 16)) * np.geomspace(1e-3, 1e3, 50)[:, None]
    model = random_model("g (int64[2,3] i) => (float[2,3,16] y) { y = Gather (table, i) }", table=rows)
    result = run("quantize-weights", model)
    assert result.rewrites == 1
    sample = {"i": np.array([[0, 1, 49], [7, 7, 30]])}
    before, after = (Evaluator(m).run(sample)["y"] for m in (model, result.model))
    assert (np.abs(before - after) <= np.abs(before).max(axis=-1, keepdims=True) / 253).all()


def test_tied_weights_are_quantized_once() -> None:
    text = "g (float[N,8,6,6] x) => (float[N,8,6,6] y) { a = Conv (x, w) b = Relu (a) y = Conv (b, w) }"
    model = random_model(text, w=RNG.standard_normal((8, 8, 1, 1)))
    data = open_data({"x": RNG.standard_normal((8, 8, 6, 6)).astype(np.float32)}, model.inputs)
    result = run("quantize-qdq{correct-bias=false}", model, data=data)
    assert result.rewrites == 2
    assert sum(str(c.dtype) == "int8" and c.shape == (8, 8, 1, 1) for c in result.model.constants()) == 1


def test_without_data_nothing_is_guessed() -> None:
    model, _ = chain()
    result = run("quantize-qdq", model)
    assert result.rewrites == 0
    assert any("no calibration data" in str(r) for r in result.remarks)


@pytest.mark.parametrize("text", ["quantize-weights", "quantize-dynamic"])
def test_other_passes_refuse_such_a_pattern_too(text: str) -> None:
    with pytest.raises(UsageError, match="'nothing' matches no node"):
        run(f"{text}{{exclude='nothing'}}", chain()[0])


def test_a_pattern_that_means_nothing_is_an_error() -> None:
    model, data = chain()
    with pytest.raises(UsageError, match=r"'/head/\*' matches no node"):
        run("quantize-qdq{exclude='/head/*'}", model, data=data)


@pytest.mark.parametrize("options", ["samples=0", "samples=-3", "min-channels=0", "share=2", "share=0"])
def test_options_outside_their_range_are_refused(options: str) -> None:
    with pytest.raises(UsageError, match=f"quantize-qdq: {options.partition('=')[0]} is "):
        Pipeline.parse(f"quantize-qdq{{{options}}}")


def test_more_samples_than_there_are_is_an_error() -> None:
    model, data = chain()
    with pytest.raises(UsageError, match="100 samples asked for"):
        run("quantize-qdq{samples=100}", model, data=data)


def test_a_gpu_without_int8_is_refused() -> None:
    model, data = chain()
    with pytest.raises(UnsupportedModel, match="sm75"):
        run("quantize-qdq", model, Target("tensorrt-rtx", "sm75"), data)


def test_an_old_opset_is_raised() -> None:
    model, data = chain()
    model.set_opset("", 11)
    result = run("quantize-qdq", model, data=data)
    assert result.rewrites == 2
    assert result.model.opset == 13
    assert any("opset raised from 11 to 13" in str(r) for r in result.remarks)


def test_excluded_layers_stay_float_with_a_reason() -> None:
    model, data = chain()
    name = next(n.name for n in run("eliminate-dead", model).model.nodes() if n.op == "Conv")
    result = run(f"quantize-qdq{{exclude='{name}'}}", model, data=data)
    layers = onnxruntime_coverage(result.model, result.remarks)
    assert [(layer.int8, layer.why) for layer in layers] == [(False, "excluded"), (True, "")]


# ---------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(
    ("name", "floor", "int8_layers"),
    [("mobilenet", 35, 18), ("resnet", 40.5, 16), ("concat", 36, 22), ("vit", 37.5, 13)],
)
def test_digits_nets_keep_their_accuracy_on_the_kernels_that_run(name: str, floor: float, int8_layers: int) -> None:
    model, data = net(name)
    result = run("quantize-qdq", model, data=data)
    test = open_data({"x": DIGITS["x_test"]}, model.inputs)
    judge = int8.Judge(model, test, DIGITS["y_test"])
    written, kernels = judge.score(result.model, False), judge.score(result.model, True)
    assert written.sqnr >= floor
    assert kernels.sqnr >= written.sqnr - 1
    assert kernels.metric >= kernels.reference - 0.3
    layers = onnxruntime_coverage(result.model, result.remarks)
    assert sum(layer.int8 for layer in layers) == int8_layers
    assert all(layer.why for layer in layers if not layer.int8)
    for node in result.model.nodes():
        if node.op in ("Conv", "MatMul", "Gemm") and node.inputs[1].inputs:
            codes = node.inputs[1].inputs[0].inputs[0]
            if isinstance(codes, ir.Constant):
                assert weights.pairs_at_risk(node, codes.values) == 0


def test_gptq_codes_err_less_on_the_inputs_and_stay_pair_safe() -> None:
    x = RNG.standard_normal((500, 6)) @ RNG.standard_normal((6, 32)) + 0.1 * RNG.standard_normal((500, 32))
    moment = (x.T @ x / len(x))[None]
    node, values = Node("MatMul"), RNG.standard_normal((32, 20)).astype(np.float32)
    nearest = weights.quantize(node, values, pair_safe=True)
    matrix, scale = values.T[None].astype(np.float64), nearest.scale[None].astype(np.float64)
    codes = gptq(matrix, moment, scale, pair_safe=True)
    assert np.abs(codes).max() <= 127
    assert weights.pairs_at_risk(node, codes[0].T.astype(np.int8)) == 0
    before = loss(matrix - nearest.codes.T * scale[..., None], moment).sum()
    assert loss(matrix - codes * scale[..., None], moment).sum() < 0.5 * before
    unordered = gptq(matrix, moment, scale, pair_safe=True, ordered=False)
    assert (np.sort(np.maximum(unordered, 0), axis=-1)[..., -2:].sum(axis=-1) <= 128).all()


def test_equalizing_saves_the_quiet_channels() -> None:
    loud = np.geomspace(1, 300, 16)
    first = (RNG.standard_normal((16, 8, 1, 1)) * loud[:, None, None, None]).astype(np.float32)
    second = (RNG.standard_normal((4, 16, 1, 1)) / loud[:, None, None]).astype(np.float32)
    text = "g (float[N,8,4,4] x) => (float[N,4,4,4] y) { a = Conv (x, w1) r = Relu (a) y = Conv (r, w2) }"
    model = random_model(text, w1=first, w2=second)
    data = open_data({"x": RNG.standard_normal((16, 8, 4, 4)).astype(np.float32)}, model.inputs)
    judge = int8.Judge(model, data, None)
    plain, scaled = (
        judge.score(run(t, model, data=data).model, False).sqnr
        for t in ("quantize-qdq", "equalize-channels,quantize-qdq")
    )
    assert scaled > plain + 10
    found = int8.search(model, CPU, Pipeline(), data, wish=int8.Wish(gate=False))
    assert str(found.pipeline) == "equalize-channels,quantize-qdq"


def test_smoothquant_scales_a_layer_normalization_and_its_readers_alike() -> None:
    gamma = np.where(np.arange(16) == 3, 80.0, 1.0)
    text = """g (float[N,16] x) => (float[N,8] y)
    { n = LayerNormalization (x, gamma, beta) y = MatMul (n, w) }"""
    model = random_model(text, gamma=gamma, beta=np.zeros(16), w=RNG.standard_normal((16, 8)) / gamma[:, None])
    data = open_data({"x": RNG.standard_normal((64, 16)).astype(np.float32)}, model.inputs)
    judge = int8.Judge(model, data, None)
    same = judge.score(run("equalize-channels", model, data=data).model, False).sqnr
    plain, scaled = (
        judge.score(run(t, model, data=data).model, False).sqnr
        for t in ("quantize-qdq", "equalize-channels,quantize-qdq")
    )
    assert same > 100
    assert scaled > plain + 6


def test_the_search_returns_layers_to_float_until_the_drop_holds() -> None:
    model, data = net("mobilenet")
    wish = int8.Wish(
        labels=DIGITS["y_calib"], max_drop=0.0, gate=False, options={"calibration": "entropy", "correct_bias": False}
    )
    found = int8.search(model, CPU, Pipeline(), data, wish=wish)
    assert found.met
    assert found.after >= found.before
    replayed = found.pipeline.run(model, Context(target=CPU, data=data, evaluate=evaluate_node))
    assert replayed.model.fingerprint() == found.result.model.fingerprint()
    assert Pipeline.parse(str(found.pipeline)) == found.pipeline


def test_labels_that_are_no_classes_are_refused() -> None:
    model, data = net("mobilenet")
    for shift in (10, -10):
        wish = int8.Wish(labels=DIGITS["y_calib"] + shift, max_drop=1.0)
        with pytest.raises(UsageError, match="is no class: the model's first output has 10, 0 to 9"):
            int8.search(model, CPU, Pipeline(), data, wish=wish)


@pytest.mark.parametrize("text", ["quantize-weights", "quantize-dynamic"])
def test_layers_in_bodies_and_functions_are_named(text: str) -> None:
    model = ir.parse("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[1,4] x, bool c) => (float[1,4] y) <float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}>
        { h = MatMul (x, w)
          i = If (c) <then_branch = t () => (float[1,4] p) { p = MatMul (h, w) }, else_branch = e () => (float[1,4] q) { q = Neg (h) }>
          y = local.Product (i, w) }
        <domain: "local", opset_import: ["" : 21]>
        Product (a, b) => (r) { r = MatMul (a, b) }""")
    told = [str(r) for r in run(text, model).remarks]
    assert any("stays float: it runs inside the body of an If, Loop or Scan" in text for text in told)
    assert any("1 layers of function 'Product' stay float; put inline-functions first" in text for text in told)


@pytest.mark.filterwarnings("error")
def test_operands_too_large_to_square_get_the_nearest_codes(tmp_path) -> None:
    model = ir.parse("""<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x) => (float[N,2] y)
        <float[2,2] a = {1e30, 2e30, -1e30, 3e30}, float[2,2] b = {1, 2, 3, -4}>
        { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }""")
    data = open_data({"x": RNG.standard_normal((16, 2)).astype(np.float32)}, model.inputs)
    found = int8.search(model, CPU, Pipeline(), data, wish=int8.Wish(gate=False))
    assert "NaN" not in json.dumps(found.as_dict())
    assert sum(layer.int8 for layer in found.layers) == 2


def test_sensitivity_ranks_every_quantized_layer() -> None:
    model, data = net("resnet")
    found = int8.sensitivity(model, CPU, data, limit=32)
    assert len(found) == 16
    assert [s.sqnr for s in found] == sorted(s.sqnr for s in found)
    assert all(20 < s.sqnr < 120 for s in found)


def test_every_layer_is_told_with_its_kernel_its_cost_and_its_time() -> None:
    model, data = net("vit")
    found = examine(model, CPU, data, limit=16)
    assert len(found.layers) == 20
    for layer in found.layers:
        assert layer.int8 is not None
        assert bool(layer.why) != layer.int8
        assert (layer.sqnr is not None) == layer.int8
        assert not layer.int8 or layer.microseconds is not None
    assert sum(bool(layer.int8) for layer in found.layers) == 13
    known = [layer.sqnr for layer in found.layers if layer.sqnr is not None]
    assert known == sorted(known)
    patch = next(layer for layer in found.layers if layer.op == "Conv")
    assert patch.float_microseconds is not None  # ONNX Runtime calls its blocked convolutions by other names


def test_rtx_runs_every_placed_layer_in_int8_without_round_trips(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from graphopt.backend import BuildOptions, ShapeRange
    from graphopt.discovery import backend_for

    model, data = net("resnet")
    result = run("quantize-qdq", model, RTX, data)
    shapes = {"x": ShapeRange((8, 1, 8, 8), (8, 1, 8, 8), (8, 1, 8, 8))}
    artifact = backend_for(RTX.runtime)[1].emit(result.model, RTX, tmp_path, BuildOptions(shapes=shapes))
    layers = kernel_coverage(result.model, artifact.kernels, result.remarks)
    assert [layer.name for layer in layers if not layer.int8] == ["/fc/Gemm"]
    assert sum(layer.int8 for layer in layers) == result.rewrites == 15
    sums = [k for k in artifact.kernels if "AddRelu" in k.name and "Add_output" not in k.name and "Int8" in k.inputs]
    assert sums
    assert all(k.outputs == ("Int8",) for k in sums)
    assert not [k.name for k in artifact.kernels if "RounCastCast" in k.name]


def test_onnxruntime_is_the_version_whose_fusions_were_measured() -> None:
    assert tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)


def test_operators_that_hold_weights_are_fused_after_quantizing() -> None:
    late = int8.fusions_last(Pipeline.parse("fuse-attention,fold-constants,quantize-qdq,eliminate-dead"))
    assert str(late) == "fold-constants,quantize-qdq,fuse-attention,eliminate-dead"
    plain = Pipeline.parse("fuse-attention,fold-constants")
    assert int8.fusions_last(plain) == plain
    model = ir.load("models/vit.legacy.onnx")
    data = open_data({"x": DIGITS["x_calib"]}, model.inputs)
    found = int8.search(model, CPU, Pipeline.parse("default"), data, wish=int8.Wish(gate=False, equalize=False))
    assert sum(layer.int8 for layer in found.layers) == 13
    assert found.sqnr > 37.5
