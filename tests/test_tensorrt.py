"""The TensorRT backend: real engines by TensorRT for RTX (no GPU needed), and sessions over a fake engine and driver.

Nothing here touches a GPU. What only a GPU can show (that an engine's numbers are right) is not tested.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import importlib.util
import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import ir
from graphopt.backend import Artifact, BuildOptions, Kernel, ShapeRange
from graphopt.backends import (
    _cuda_buffers,
    _tensorrt_kernels,
    _tensorrt_log,
    _tensorrt_profile,
    _tensorrt_refusals,
    tensorrt,
)
from graphopt.backends.tensorrt import TensorRT
from graphopt.errors import (
    BackendUnavailable,
    InvalidModel,
    ShapeError,
    UnknownTarget,
    UnsupportedModel,
    UsageError,
    UserError,
)
from graphopt.target import Target

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)
TITLE = r"tensorrt_rtx \d+\.\d+\.\d+\.\d+"
HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'

CONV = """
g (float[N,3,16,16] x) => (float[N,4] y)
<int64[4] ws = {8,3,3,3}, int64[2] fs = {4,8}, float[8] one = {1,1,1,1,1,1,1,1}, float[8] zero = {0,0,0,0,0,0,0,0}>
{ w = ConstantOfShape <value = float {0.01}> (ws)
  [conv] c = Conv <pads = [1,1,1,1]> (x, w)
  [bn] d = BatchNormalization (c, one, zero, zero, one)
  [relu] r = Relu (d)
  [pool] p = GlobalAveragePool (r)
  [flat] f = Flatten (p)
  v = ConstantOfShape <value = float {0.5}> (fs)
  [fc] y = Gemm <transB = 1> (f, v) }"""
MATMUL = """
g (float[1,8] x) => (float[1,4] y)
<int64[2] s = {8,4}>
{ w = ConstantOfShape <value = float {0.5}> (s)
  [mm] h = MatMul (x, w)
  y = Softmax (h) }"""
HALF = """
g (float[N,32,16,16] x) => (float[N,32,16,16] y)
<int64[4] ws = {32,32,3,3}>
{ w0 = ConstantOfShape <value = float {0.01}> (ws)
  w = Cast <to = 10> (w0)
  h = Cast <to = 10> (x)
  [conv] c = Conv <pads = [1,1,1,1]> (h, w)
  [relu] r = Relu (c)
  y = Cast <to = 1> (r) }"""
INT8 = """
g (float[N,32,16,16] x) => (float[N,32,16,16] y)
<int64[4] ws = {32,32,3,3}, float s = {0.05}, int8 z = {0}>
{ w0 = ConstantOfShape <value = float {0.01}> (ws)
  xq = QuantizeLinear (x, s, z)
  xd = DequantizeLinear (xq, s, z)
  wq = QuantizeLinear (w0, s, z)
  wd = DequantizeLinear (wq, s, z)
  [conv] c = Conv <pads = [1,1,1,1]> (xd, wd)
  [relu] y = Relu (c) }"""
RESHAPE = "g (float[N,C] x, int64[2] s) => (float[P,Q] y) { y = Reshape (x, s) }"


def build(
    text: str, folder: Path, target: str = "tensorrt-rtx:sm89", progress: Any = None, shapes: str = "", **options: Any
) -> Artifact:
    model = ir.parse(HEADER + text if not text.startswith("<") else text)
    ranges = dict(ShapeRange.parse(part) for part in shapes.split())
    return TensorRT().emit(model, Target.parse(target), folder, BuildOptions(shapes=ranges, **options), progress)


def kernel_of(artifact: Artifact, node: str) -> Kernel:
    return next(kernel for kernel in artifact.kernels if node in kernel.origin)


# ------------------------------------------------------------------------------------------------------ real engines


@needs_rtx
@pytest.mark.parametrize("device", ["sm80", "sm89", "sm80+sm89"])
def test_a_conv_net_becomes_an_engine(device: str, tmp_path: Path) -> None:
    artifact = build(CONV, tmp_path, f"tensorrt-rtx:{device}")
    assert artifact.files == (f"tensorrt-rtx-{device}.engine",)
    assert [path.name for path in tmp_path.iterdir()] == [*artifact.files]
    assert artifact.details["engine_bytes"] == (tmp_path / artifact.files[0]).stat().st_size > 100_000
    assert artifact.details["gpus"] == device.split("+")
    assert artifact.details["kernels"] == len(artifact.kernels) >= 3
    assert artifact.details["network_layers"] >= 6
    assert artifact.details["build_seconds"] > 0
    assert list(artifact.versions) == ["tensorrt_rtx"]
    json.dumps(dict(artifact.details))


@needs_rtx
def test_without_a_device_the_engine_is_for_all_recent_gpus(tmp_path: Path) -> None:
    artifact = build(MATMUL, tmp_path, "tensorrt-rtx")
    assert artifact.files == ("tensorrt-rtx-default.engine",)
    assert artifact.details["gpus"] == ["sm80 and newer"]
    assert artifact.shapes == {}


@needs_rtx
def test_default_ranges_are_said_aloud(tmp_path: Path) -> None:
    artifact = build(CONV, tmp_path)
    assert artifact.shapes == {"x": ShapeRange((1, 3, 16, 16), (8, 3, 16, 16), (32, 3, 16, 16))}
    assert artifact.remarks == (
        "input 'x': range 1x3x16x16:8x3x16x16:32x3x16x16 taken, by default in dimension 0 (N); "
        'set it with --shape "x=MIN:OPT:MAX"',
    )


@needs_rtx
def test_a_given_range_is_taken_without_a_remark(tmp_path: Path) -> None:
    artifact = build(CONV, tmp_path, shapes="x=1x3x16x16:2x3x16x16:4x3x16x16")
    assert str(artifact.shapes["x"]) == "1x3x16x16:2x3x16x16:4x3x16x16"
    assert artifact.remarks == ()


@needs_rtx
def test_a_range_given_for_one_input_holds_for_the_same_symbol_in_another(tmp_path: Path) -> None:
    text = "g (float[N,4] a, float[N,M] b) => (float[N,4] y, float[N,M] z) { y = Relu (a) z = Relu (b) }"
    artifact = build(text, tmp_path, shapes="a=2x4:3x4:5x4")
    assert str(artifact.shapes["b"]) == "2x1:3x128:5x512"
    assert artifact.remarks == (
        "input 'b': range 2x1:3x128:5x512 taken, by default in dimension 1 (M); set it with --shape \"b=MIN:OPT:MAX\"",
    )


@needs_rtx
def test_an_input_that_holds_a_shape_takes_a_range_of_values(tmp_path: Path) -> None:
    artifact = build(RESHAPE, tmp_path, shapes="x=2x6:4x6:4x6 s=2x6:4x6:4x6")
    assert str(artifact.shapes["s"]) == "2x6:4x6:4x6"


@needs_rtx
def test_half_precision_runs_in_half_and_kernels_name_their_nodes(tmp_path: Path) -> None:
    kernel = kernel_of(build(HALF, tmp_path), "conv")
    assert kernel.inputs == ("Half",)
    assert kernel.constants[0] == "Half"
    assert kernel.outputs == ("Half",)
    assert "relu" in kernel.origin


@needs_rtx
def test_quantized_convolutions_run_in_int8(tmp_path: Path) -> None:
    kernel = kernel_of(build(INT8, tmp_path), "conv")
    assert kernel.inputs == ("Int8",)
    assert kernel.constants[0] == "Int8"


@needs_rtx
def test_an_engine_shared_with_sm75_is_remarked_to_lose_int8(tmp_path: Path) -> None:
    artifact = build(INT8, tmp_path, "tensorrt-rtx:sm75+sm89", shapes="x=1x32x16x16")
    assert kernel_of(artifact, "conv").inputs[0] == "Float"
    assert artifact.remarks == (
        "sm75 has no int8 kernels and runs quantized nodes in float, and so do all GPUs that share its engine: "
        "give sm75 a target of its own",
    )


@needs_rtx
def test_a_failed_build_does_not_change_the_next_one(tmp_path: Path) -> None:
    # RTX 1.7.1 keeps the GPUs of a failed build for the next engine of the process, which then has no int8 kernels.
    with pytest.raises(UnsupportedModel):
        build(MATMUL, tmp_path, "tensorrt-rtx:sm75")
    assert kernel_of(build(INT8, tmp_path), "conv").inputs == ("Int8",)


@needs_rtx
def test_the_origin_of_a_kernel_is_what_the_loaded_model_called_its_nodes(tmp_path: Path) -> None:
    model = ir.parse(HEADER + CONV)
    conv = next(node for node in model.nodes() if node.op == "Conv")
    conv.name, conv.origin = "fused", ("first", "second")
    artifact = TensorRT().emit(model, Target.parse("tensorrt-rtx:sm89"), tmp_path, BuildOptions())
    assert {"first", "second"} <= set(kernel_of(artifact, "first").origin)


@needs_rtx
@pytest.mark.parametrize("text", [CONV, INT8], ids=["float", "int8"])
def test_two_processes_build_the_same_bytes(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnxtxt").write_text(HEADER + text)
    script = f"""
import sys
from pathlib import Path
from graphopt import ir
from graphopt.backend import BuildOptions
from graphopt.backends.tensorrt import TensorRT
from graphopt.target import Target
folder = Path({str(tmp_path)!r}) / sys.argv[1]
folder.mkdir()
TensorRT().emit(ir.load(folder.parent / "m.onnxtxt"), Target.parse("tensorrt-rtx:sm80+sm89"), folder, BuildOptions())
"""
    digests = set()
    for run in ("a", "b"):
        subprocess.run([sys.executable, "-c", script, run], check=True, env=None)
        digests.add(hashlib.sha256((tmp_path / run / "tensorrt-rtx-sm80+sm89.engine").read_bytes()).hexdigest())
    build(text, tmp_path, "tensorrt-rtx:sm80+sm89")
    digests.add(hashlib.sha256((tmp_path / "tensorrt-rtx-sm80+sm89.engine").read_bytes()).hexdigest())
    assert len(digests) == 1


@needs_rtx
def test_weights_in_a_data_file_give_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[4,64] x) => (float[4,64] y) { y = MatMul (x, w) }"
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    names = ", ".join(f"{float(v):.8f}" for v in weights.reshape(-1))
    text = text.replace("{ y", f"<float[64,64] w = {{{names}}}> {{ y")
    ir.save(ir.parse(HEADER + text), tmp_path / "m.onnx", external=True)
    assert (tmp_path / "m.onnx.data").stat().st_size == 64 * 64 * 4
    target = Target.parse("tensorrt-rtx:sm89")
    model = ir.load(tmp_path / "m.onnx")
    inline = TensorRT().emit(model, target, tmp_path, BuildOptions())
    first = (tmp_path / inline.files[0]).read_bytes()
    monkeypatch.setattr(tensorrt, "EXTERNAL_ABOVE", 0)
    TensorRT().emit(model, target, tmp_path, BuildOptions())
    assert (tmp_path / inline.files[0]).read_bytes() == first


@needs_rtx
def test_progress_grows_from_parsing_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []

    def progress(phase: str, share: float) -> bool:
        seen.append((phase, share))
        return True

    build(CONV, tmp_path, progress=progress)
    assert seen[0] == ("Parsing", 0.0)
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert seen[-1] == ("Built", 1.0)
    assert len(seen) > 20
    assert len({phase for phase, _ in seen}) > 3


@needs_rtx
@pytest.mark.parametrize("after", [0.0, 0.3], ids=["before the parser", "amid the build"])
def test_progress_that_says_no_cancels_and_leaves_nothing(after: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the build for tensorrt-rtx:sm89 was cancelled; nothing was written$"):
        build(CONV, tmp_path, progress=lambda phase, share: share < after)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_what_the_progress_function_raises_reaches_the_caller(tmp_path: Path) -> None:
    def progress(phase: str, share: float) -> bool:
        if share > 0.2:
            raise KeyError("mine")
        return True

    with pytest.raises(KeyError, match="mine"):
        build(CONV, tmp_path, progress=progress)


@needs_rtx
def test_an_opset_that_tensorrt_does_not_document_is_remarked(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 25]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    (remark,) = build(text, tmp_path).remarks
    assert remark.startswith("opset 25 is newer than 24, the newest that TensorRT documents;")


@needs_rtx
def test_options_without_meaning_for_other_runtimes_change_the_build(tmp_path: Path) -> None:
    artifact = build(
        CONV, tmp_path, workspace=1 << 28, optimization_level=1, tf32=False, sparse_weights=True, shapes="x=1x3x16x16"
    )
    assert artifact.remarks == ()


@needs_rtx
def test_a_timing_cache_is_said_to_have_no_effect(tmp_path: Path) -> None:
    artifact = build(MATMUL, tmp_path, timing_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (remark,) = artifact.remarks
    assert remark.endswith("timing caches are no-ops here; the file is neither read nor written")


@needs_rtx
def test_warnings_go_to_logging_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build("g (float[2] x, float[3] unused) => (float[2] y) { y = Relu (x) }", tmp_path)
    assert "Unused Input: unused" in caplog.messages
    assert len(caplog.messages) == len(set(caplog.messages))


@needs_rtx
@pytest.mark.parametrize("net", ["resnet", "mobilenet", "concat", "vit"])
def test_the_digits_nets_build_as_torchs_legacy_exporter_leaves_them(net: str, tmp_path: Path) -> None:
    model = ir.load(Path(__file__).parent.parent / "models" / f"{net}.legacy.onnx")
    artifact = TensorRT().emit(model, Target.parse("tensorrt-rtx:sm89"), tmp_path, BuildOptions())
    named = {node.name for node in model.nodes()}
    traced = {name for kernel in artifact.kernels for name in kernel.origin}
    assert traced <= named
    assert len(traced) > 10


# --------------------------------------------------------------------------------------------------------- bad input


def refused(kind: type[UserError], tmp_path: Path, text: str, *arguments: Any, **options: Any) -> str:
    """The message of the error, which fits three lines and leaves nothing behind."""
    with pytest.raises(kind) as caught:
        build(text, tmp_path, *arguments, **options)
    assert type(caught.value) is kind
    assert list(tmp_path.iterdir()) == []
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "cudaError" not in message
    assert "/_src/" not in message
    return message.split(" ", 2)[2] if message.startswith("tensorrt_rtx") else message


@needs_rtx
def test_all_unsupported_nodes_are_named_at_once_with_where_they_stand(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
g (float[N,3,16,16] x) => (float[N,3] y, float[M,K] z, float[N,3,16,16] f)
{ [det0] y = Det (x)
  [foo] r = Foo (x)
  f = local.Block (x)
  z = Det (r) }
<domain: "local", opset_import: ["" : 20]>
Block (a) => (o) { [inner] d = Det (a)  o = Relu (d) }"""
    assert refused(UnsupportedModel, tmp_path, text) == (
        "cannot take 4 nodes: 'det0' (Det), 'inner' (Det) in node_of_f (Block), unnamed node of 'z' (Det): not supported; "
        "'foo' (Foo): no importer or plugin for this operator\nreplace or remove them, or build for ort"
    )


@needs_rtx
def test_an_unsupported_node_in_a_branch_is_named_with_its_branch(tmp_path: Path) -> None:
    text = """g (float[N,3,3] x, bool b) => (float[P] y)
              { [if] y = If <then_branch = t () => (float[N] a) { [inner] a = Det (x) },
                             else_branch = e () => (float[N] o) { o = Det (x) }> (b) }"""
    assert refused(UnsupportedModel, tmp_path, text).startswith(
        "cannot take 1 node: 'inner' (Det) in if (If) > t (then_branch): not supported\n"
    )


@needs_rtx
def test_axes_that_are_computed_ask_for_constant_folding(tmp_path: Path) -> None:
    # torch's dynamo exporter writes the axes of ReduceMean so
    text = """g (float[2,3,4] x) => (float[2,3] y) <int64[1,1] a = {2}, int64[1] s = {-1}>
              { axes = Reshape (a, s) [mean] y = ReduceMean <keepdims = 0> (x, axes) }"""
    assert refused(UnsupportedModel, tmp_path, text).startswith(
        "cannot take 1 node: 'mean' (ReduceMean): an input that must be constant is computed: run fold-constants first\n"
    )


@needs_rtx
def test_nodes_made_by_passes_are_traced_to_the_loaded_model(tmp_path: Path) -> None:
    model = ir.parse(HEADER + "g (float[2,3,3] x) => (float[2] y) { [made] y = Det (x) }")
    model.graph.nodes[0].origin = ("first", "second")
    with pytest.raises(UnsupportedModel, match=r"'made' \(Det\) from 'first', 'second': not supported"):
        TensorRT().emit(model, Target.parse("tensorrt-rtx:sm89"), tmp_path, BuildOptions())


@needs_rtx
def test_many_unsupported_nodes_are_counted(tmp_path: Path) -> None:
    body = " ".join(f"[d{i}] y{i} = Det (x)" for i in range(14))
    outputs = ", ".join(f"float[2] y{i}" for i in range(14))
    message = refused(UnsupportedModel, tmp_path, f"g (float[2,3,3] x) => ({outputs}) {{ {body} }}")
    assert message.startswith("cannot take 14 nodes: 'd0' (Det), ")
    assert "'d9' (Det): not supported; and 4 more\n" in message


@needs_rtx
def test_a_node_that_breaks_the_rules_keeps_tensorrts_reason(tmp_path: Path) -> None:
    text = "g (float[2,5] x) => (float[2,5] y) <float[3] w = {1,2,3}> { [add] y = Add (x, w) }"
    assert refused(UnsupportedModel, tmp_path, text).startswith(
        "cannot take 1 node: 'add' (Add): broadcast dimensions must be conformable"
    )


@needs_rtx
@pytest.mark.parametrize(("text", "message"), [
    ("g (string[2] x) => (string[2] y) { y = Identity (x) }", "cannot keep the type of 'x' (string), 'y' (string); an engine takes"),
    ("g (double[2] x) => (double[2] y) { y = Relu (x) }", "cannot keep the type of 'x' (float64), 'y' (float64); an engine takes"),
    ("g (seq(float[2]) x) => (float[2] y) <int64 i = {0}> { y = SequenceAt (x, i) }", "cannot keep the type of 'x' (no dense tensor); an"),
])  # fmt: skip
def test_types_that_an_engine_cannot_keep_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert refused(UnsupportedModel, tmp_path, text).startswith(message)


@needs_rtx
def test_an_input_without_rank_is_refused_since_tensorrt_takes_it_for_a_scalar(tmp_path: Path) -> None:
    message = refused(ShapeError, tmp_path, "g (float[] x) => (float[] y) { y = Relu (x) }")
    assert message.startswith("input 'x' declares no rank, and TensorRT would take it for a scalar;")


@needs_rtx
@pytest.mark.parametrize(("text", "message"), [
    ("g (float[2,4] x) => (float[2,4] y) <float s = {0.1}, uint8 z = {0}> "
     "{ [q] q = QuantizeLinear (x, s, z) [d] y = DequantizeLinear (q, s, z) }",
     "'q' (QuantizeLinear), 'd' (DequantizeLinear): uint8, which would be read as int8: quantize to int8"),
    ("g (float[2,4] x) => (float[2,4] y) <float s = {0.1}> { [q] q = QuantizeLinear (x, s) y = DequantizeLinear (q, s) }",
     "'q' (QuantizeLinear): uint8, which would be read as int8: quantize to int8"),
    ("g (float[2,4] x) => (float[2,4] y) <float s = {0.1}, int8 z = {3}> "
     "{ [q] q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }",
     "'q' (QuantizeLinear), unnamed node of 'y' (DequantizeLinear): zero points other than 0: quantize symmetrically"),
    ("g (float[2,4] x) => (float[2,4] y) <float s = {0.1}, int32[4] b = {1,2,3,4}> "
     "{ [bias] f = DequantizeLinear (b, s) y = Add (x, f) }",
     "'bias' (DequantizeLinear): a bias quantized to int32: keep biases in float (onnxruntime: QuantizeBias=False)"),
])  # fmt: skip
def test_quantization_that_tensorrt_misreads_is_refused_by_node(text: str, message: str, tmp_path: Path) -> None:
    assert refused(UnsupportedModel, tmp_path, text) == f"takes symmetric int8 and float biases only: {message}"


@needs_rtx
def test_activations_quantized_per_channel_are_remarked_and_weights_are_not(tmp_path: Path) -> None:
    text = INT8.replace("float s = {0.05}, int8 z = {0}", "float s = {0.05}, int8 z = {0}, float[32] t, int8[32] u")
    text = text.replace("float[32] t", f"float[32] t = {{{','.join(['0.05'] * 32)}}}")
    text = text.replace("int8[32] u", f"int8[32] u = {{{','.join(['0'] * 32)}}}")
    per_channel = text.replace("QuantizeLinear (w0, s, z)", "QuantizeLinear <axis = 0> (w0, t, u)")
    per_channel = per_channel.replace("DequantizeLinear (wq, s, z)", "DequantizeLinear <axis = 0> (wq, t, u)")
    assert build(per_channel, tmp_path, shapes="x=1x32x16x16").remarks == ()
    activation = per_channel.replace("QuantizeLinear (x, s, z)", "QuantizeLinear (x, t, u)")
    activation = activation.replace("DequantizeLinear (xq, s, z)", "DequantizeLinear (xq, t, u)")
    assert build(activation, tmp_path, shapes="x=1x32x16x16").remarks == (
        "activations quantized per channel run in float, quantize them per tensor: unnamed node of 'xq'",
    )


@needs_rtx
@pytest.mark.parametrize(("shapes", "message"), [
    ("nope=1x3x16x16", "shape for 'nope': the model has no such input; its inputs are x"),
    ("x=1x3x16", "shape for 'x' has 3 dimensions, the model declares float32[N,3,16,16] x"),
    ("x=1x4x16x16", "shape for 'x': dimension 1 is fixed to 3 in the model (float32[N,3,16,16] x)"),
])  # fmt: skip
def test_shapes_that_contradict_the_model_are_refused(shapes: str, message: str, tmp_path: Path) -> None:
    assert refused(ShapeError, tmp_path, CONV, shapes=shapes) == message


@needs_rtx
@pytest.mark.parametrize(("shapes", "message"), [
    ("", "input 's' holds a shape, and TensorRT needs the range of its 2 values: give --shape \"s=MIN:OPT:MAX\" "
         "with values in place of dimensions, as in s=2x2"),
    ("s=2", "shape for 's': it holds 2 values that are a shape, so the range has 2 numbers as in 2x2, not 1"),
])  # fmt: skip
def test_values_of_a_shape_input_have_no_default(shapes: str, message: str, tmp_path: Path) -> None:
    assert refused(ShapeError, tmp_path, RESHAPE, shapes=shapes) == message


@needs_rtx
def test_ranges_that_disagree_on_a_symbol_are_refused(tmp_path: Path) -> None:
    text = "g (float[N,4] a, float[N,4] b) => (float[N,4] y) { y = Add (a, b) }"
    assert refused(ShapeError, tmp_path, text, shapes="a=1x4:2x4:8x4 b=1x4:2x4:9x4") == (
        "shapes of 'a' and 'b' disagree on dimension 'N', which the model says is one: 1:2:8 and 1:2:9; give both the same"
    )


@needs_rtx
def test_a_default_that_the_model_cannot_take_names_the_input_to_give(tmp_path: Path) -> None:
    text = "g (float[N,3,H] x) => (float[1,30] y) <int64[2] s = {1,30}> { [r] y = Reshape (x, s) }"
    assert refused(ShapeError, tmp_path, text) == (
        'the model cannot be computed at the opt of --shape "x=1x3x1:8x3x128:32x3x512": IShuffleLayer r: reshaping failed '
        "for tensor: x reshape would change volume 3072 to 30; 'x' got defaults: give --shape NAME=MIN:OPT:MAX"
    )


@needs_rtx
def test_a_smallest_shape_of_which_tensorrt_only_warns_is_an_error(tmp_path: Path) -> None:
    text = """g (float[N,8,H,16] x) => (float[N,8,K,10] y) <int64[4] s = {8,8,7,7}>
              { w = ConstantOfShape <value = float {0.1}> (s) [conv] y = Conv (x, w) }"""
    message = refused(ShapeError, tmp_path, text, shapes="x=1x8x2x16:1x8x16x16:1x8x16x16")
    assert message.startswith(
        'the model cannot be computed at the min of --shape "x=1x8x2x16:1x8x16x16:1x8x16x16": '
        "conv: spatial dimension of convolution/deconvolution output cannot be negative"
    )
    assert message.endswith("axis 2 is (+ H -6))")


@needs_rtx
def test_an_unknown_gpu_is_answered_with_those_known(tmp_path: Path) -> None:
    message = refused(UnknownTarget, tmp_path, CONV, "tensorrt-rtx:sm89+sm99")
    assert message.startswith("target 'tensorrt-rtx:sm89+sm99': tensorrt_rtx ")
    assert message.endswith("cannot compile for sm99; it knows sm75, sm80, sm86, sm89, sm120, sm121")


@needs_rtx
def test_float_matmul_for_sm75_says_what_to_do(tmp_path: Path) -> None:
    assert refused(UnsupportedModel, tmp_path, MATMUL, "tensorrt-rtx:sm75+sm89") == (
        "has no float32 MatMul or Gemm for sm75 (node 'mm'): convert the model to float16, or leave sm75 out"
    )


@needs_rtx
@pytest.mark.parametrize(("options", "message"), [
    ({"version_compatible": True}, "has no version compatible engines: it needs libnvinfer_lean, which this package lacks; "
                                   "build again for each version"),
    ({"hardware_compatible": "ampere-plus"}, "has no hardware compatible engines: name the GPUs in the target instead, "
                                             "as in tensorrt-rtx:sm86+sm89"),
])  # fmt: skip
def test_an_option_that_rtx_lacks_names_package_and_version(options: Any, message: str, tmp_path: Path) -> None:
    assert refused(UsageError, tmp_path, CONV, **options) == message


@needs_rtx
def test_refitting_on_rtx_asks_for_a_driver(tmp_path: Path) -> None:
    if TensorRT().availability("tensorrt-rtx").run is None:
        pytest.skip("there is a GPU here")
    assert refused(BackendUnavailable, tmp_path, CONV, refit=True) == (
        "needs a GPU here (refit: its builder loads refittable kernels through the NVIDIA driver), and there is "
        f"{TensorRT().availability('tensorrt-rtx').run}; build without refit"
    )


@needs_rtx
@pytest.mark.parametrize(("options", "message"), [
    ({"optimization_level": 6}, "optimization level 6: tensorrt_rtx "),
    ({"optimization_level": -1}, "optimization level -1: tensorrt_rtx "),
    ({"workspace": 0}, "workspace 0: expected a number of bytes above 0, as in 1073741824"),
])  # fmt: skip
def test_option_values_out_of_range_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    assert refused(UsageError, tmp_path, CONV, **options).startswith(message)


@needs_rtx
def test_a_workspace_too_small_is_named_as_the_cause(tmp_path: Path) -> None:
    message = refused(UnsupportedModel, tmp_path, CONV, workspace=1)
    assert message.startswith(
        "built no engine: Tactic Selection: no tactics to implement the operation within workspace limit"
    )
    assert message.endswith("raise the workspace limit, or leave it out")


@pytest.mark.parametrize(("text", "cleaned"), [
    ("IBuilder::build: Error Code 4: API Usage Error (Bad thing. In validate at /_src/a/b.cpp:40)", "Bad thing"),
    ("[a.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/c.cpp:250 (cudaError 35: old))", ""),
    ("IBuilder::b: Error Code 1: Cuda Runtime (In generate at /_src/r.cpp:221 (cudaError 35: CUDA driver version is old))",
     "CUDA driver version is old"),
    ('Assertion failed: f(x.y(), &z) && "Failed to convert."', "Failed to convert"),
    ("Assertion failed: creator && g(c) == V::kV3: NonZero was not found.", "NonZero was not found"),
])  # fmt: skip
def test_messages_lose_source_places_and_error_codes(text: str, cleaned: str) -> None:
    assert _tensorrt_log.cleaned(text) == cleaned


@pytest.mark.parametrize(("text", "kind", "message"), [
    ("[x] Error Code 2: OutOfMemory (Requested size was 9 bytes.)", UnsupportedModel, "ran out of memory"),
    ("graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed", BackendUnavailable, "needs an NVIDIA driver"),
    ("something new", UnsupportedModel, "t built no engine: something new; 'x' got defaults: give --shape"),
    ("", UnsupportedModel, "t built no engine: no reason given"),
])  # fmt: skip
def test_other_failures_say_what_to_do(text: str, kind: type[UserError], message: str) -> None:
    log = types.SimpleNamespace(errors=[text], inconsistent=[])
    log.first = lambda: _tensorrt_log.Log.first(log)  # type: ignore[arg-type]
    error = _tensorrt_refusals.failure(log, "t", _tensorrt_profile.Ranges(assumed=["x"]))  # type: ignore[arg-type]
    assert type(error) is kind
    assert message in str(error)


# ------------------------------------------------------------------------------------- what is not installed, no GPU


def no_gpu() -> Any:
    raise BackendUnavailable("no CUDA device: test")


@needs_rtx
def test_rtx_builds_without_a_gpu_and_says_that_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "open_cuda", no_gpu)
    seen = TensorRT().availability("tensorrt-rtx")
    assert seen.version
    assert seen.build is None
    assert seen.run == "no CUDA device: test"
    assert seen.devices == ()


@needs_rtx
def test_opening_without_a_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "open_cuda", no_gpu)
    artifact = build(MATMUL, tmp_path)
    with pytest.raises(BackendUnavailable, match=r"^no CUDA device: test$"):
        TensorRT().open(tmp_path, artifact, Target.parse("tensorrt-rtx:sm89"), BuildOptions())


@pytest.mark.parametrize(
    ("runtime", "module", "extra"), [("tensorrt", "tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx", "rtx")]
)
def test_a_package_that_is_missing_names_the_extra(
    runtime: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    seen = TensorRT().availability(runtime)
    assert seen.version is None
    assert seen.build == seen.run
    assert seen.build is not None
    assert seen.build.startswith(f"{module} ")
    assert seen.build.endswith(f': pip install "graphopt[{extra}]"')
    with pytest.raises(BackendUnavailable, match=rf"graphopt\[{extra}\]"):
        build(MATMUL, tmp_path, runtime)


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="8.6.1"))
    reason = TensorRT().availability("tensorrt").build
    assert reason == 'tensorrt 8.6.1 is older than 10: pip install "graphopt[tensorrt]"'


def test_a_package_with_broken_libraries_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    reason = TensorRT().availability("tensorrt").run
    assert reason is not None
    assert reason.startswith(
        "tensorrt cannot be imported (libnvinfer.so.11: cannot open shared object file): pip install"
    )


def test_without_any_cuda_package_the_reason_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pycuda", "pycuda.driver", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        BackendUnavailable, match=r"^no CUDA device: neither pycuda nor cuda-python can be imported; pip install"
    ):
        _cuda_buffers.open_cuda()


def test_what_a_cuda_package_raises_becomes_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("cuInit failed:\nno CUDA-capable device is detected")

    monkeypatch.setattr(_cuda_buffers, "_pycuda", broken)
    with pytest.raises(
        BackendUnavailable, match=r"^no CUDA device: cuInit failed: no CUDA-capable device is detected$"
    ):
        _cuda_buffers.open_cuda()


# ------------------------------------------------------------- enterprise TensorRT, played by RTX on a pretended GPU


class Enterprise:
    """tensorrt_rtx under the name and number of TensorRT 10, without compute capabilities."""

    __version__ = "10.16.1.11"

    def __getattr__(self, name: str) -> Any:
        if name == "ComputeCapability":
            raise AttributeError(name)
        return getattr(importlib.import_module("tensorrt_rtx"), name)


@pytest.fixture
def enterprise(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "tensorrt", Enterprise())
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: cuda)
    return cuda


@needs_rtx
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # RTX says that timing caches are no-ops
def test_enterprise_tensorrt_builds_for_the_gpu_at_hand_and_keeps_a_timing_cache(
    enterprise: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = (Kernel("k", (), (), ()),)
    monkeypatch.setattr(tensorrt, "inspected_kernels", lambda *_: found)  # the inspector needs a GPU
    cache = tmp_path / "timings"
    artifact = build(MATMUL, tmp_path, "tensorrt:sm89", timing_cache=cache)
    assert artifact.files == ("tensorrt-sm89.engine",)
    assert artifact.versions == {"tensorrt": "10.16.1.11"}
    assert artifact.details["gpus"] == ["sm89"]
    assert artifact.kernels == (Kernel("k", (), (), ()),)
    assert artifact.remarks == ()
    assert cache.stat().st_size > 0
    assert build(MATMUL, tmp_path, "tensorrt", timing_cache=cache).files == ("tensorrt-default.engine",)
    assert enterprise.closed
    assert enterprise.depth == 0


@needs_rtx
def test_enterprise_tensorrt_refuses_another_gpu(enterprise: FakeCuda, tmp_path: Path) -> None:
    assert refused(BackendUnavailable, tmp_path, MATMUL, "tensorrt:sm80") == (
        "target 'tensorrt:sm80': tensorrt 10.16.1.11 builds for the GPU at hand only, Fake GPU (sm89); "
        "build on a machine with sm80, or for tensorrt-rtx:sm80"
    )


@needs_rtx
def test_enterprise_tensorrt_without_a_gpu_points_at_rtx(
    enterprise: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "open_cuda", no_gpu)
    assert refused(BackendUnavailable, tmp_path, MATMUL, "tensorrt") == (
        "tensorrt 10.16.1.11 needs a GPU here (it builds for the GPU at hand only), and there is no CUDA device: test; "
        "build there, or for tensorrt-rtx, which needs none"
    )
    assert TensorRT().availability("tensorrt").build == "no CUDA device: test"


@needs_rtx
def test_an_unknown_hardware_compatibility_is_answered_with_those_known(enterprise: FakeCuda, tmp_path: Path) -> None:
    assert refused(UsageError, tmp_path, MATMUL, "tensorrt", hardware_compatible="pascal") == (
        "hardware compatibility 'pascal': tensorrt 10.16.1.11 has 'ampere-plus' and 'same-compute-capability'"
    )


def test_the_inspector_of_10_and_of_11_are_both_read() -> None:
    ten = {
        "Layers": [
            {
                "Name": "conv + relu",
                "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
                "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}],
                "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: re[l]u]",
            }
        ],
        "Bindings": ["x", "y"],
    }
    eleven = {
        "Layers": [
            "names only",
            {
                "Name": "k",
                "Inputs": [{"Datatype": "Int8"}],
                "Constants": [{"Datatype": "Int8"}],
                "Outputs": [{"Datatype": "Half"}],
                "Metadata": "[ONNX Layer: a][ONNX Layer: b]",
            },
        ],
        "I/O Tensors": [{"Name": "x"}],
    }
    assert _tensorrt_kernels.from_inspector(json.dumps(ten), {"conv": ("c1", "bn1")}) == (
        Kernel("conv + relu", ("Row major linear FP32",), (), ("Row major linear FP32",), ("c1", "bn1", "re[l]u")),
    )
    assert _tensorrt_kernels.from_inspector(json.dumps(eleven), {}) == (
        Kernel("names only", (), (), ()),
        Kernel("k", ("Int8",), ("Int8",), ("Half",), ("a", "b")),
    )


# ------------------------------------------------------------------------ sessions over a fake engine, driver and GPU


class FakeCuda:
    """A `CudaDriver` whose device memory is host memory; fails when used outside ``current``."""

    package = "fake"
    device = "Fake GPU"
    capability = "sm89"
    stream = 77

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.pins = 0
        self.depth = 0
        self.pending: list[Callable[[], None]] = []
        self.closed = False

    def current(self) -> Any:
        cuda = self

        class Current:
            def __enter__(self) -> None:
                cuda.depth += 1

            def __exit__(self, *_: object) -> None:
                cuda.depth -= 1

        return Current()

    def allocate(self, nbytes: int) -> int:
        assert self.depth
        array = np.full(nbytes, 0xAA, np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address: int) -> None:
        assert self.depth
        del self.memory[address]

    def pinned(self, nbytes: int) -> Any:
        assert self.depth
        self.pins += 1
        return np.full(nbytes, 0xBB, np.uint8)

    def free_pinned(self, array: Any) -> None:
        self.pins -= 1

    def upload(self, address: int, array: Any) -> None:
        assert self.depth
        self.memory[address][: array.nbytes] = array

    def download(self, array: Any, address: int) -> None:
        assert self.depth
        self.pending.append(lambda: array.__setitem__(slice(None), self.memory[address][: array.nbytes]))

    def synchronize(self) -> None:
        for copy in self.pending:
            copy()
        self.pending.clear()

    def close(self) -> None:
        self.closed = True


class FakeTensorRT:
    """As much of the module as a session needs; its engine takes x[N,3], scale[] and k[1] (a shape, on the host).

    Outputs: y = x * scale; large = the elements of y above 1 (their number depends on data); size = k + 1, on the host.
    """

    __version__ = "11.4.0"

    class ILogger:
        VERBOSE, WARNING, ERROR, INTERNAL_ERROR = range(4)

    class IOutputAllocator:
        pass

    class TensorIOMode:
        INPUT, OUTPUT = "in", "out"

    class TensorLocation:
        DEVICE, HOST = "device", "host"

    tensors = {  # noqa: RUF012
        "x": ("FLOAT", (-1, 3), "in", "device"),
        "scale": ("HALF", (), "in", "device"),
        "k": ("INT64", (1,), "in", "host"),
        "y": ("FLOAT", (-1, 3), "out", "device"),
        "large": ("FLOAT", (-1,), "out", "device"),
        "size": ("INT64", (1,), "out", "host"),
    }

    def __init__(self) -> None:
        self.loads = True
        self.context = FakeContext()
        trt = self

        class Engine:
            num_io_tensors = len(trt.tensors)

            def get_tensor_name(self, index: int) -> str:
                return list(trt.tensors)[index]

            def get_tensor_dtype(self, name: str) -> Any:
                return types.SimpleNamespace(name=trt.tensors[name][0])

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return trt.tensors[name][1]

            def get_tensor_mode(self, name: str) -> str:
                return trt.tensors[name][2]

            def get_tensor_location(self, name: str) -> str:
                return trt.tensors[name][3]

            def is_shape_inference_io(self, name: str) -> bool:
                return trt.tensors[name][3] == "host"

            def create_execution_context(self) -> FakeContext:
                return trt.context

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: Any) -> Any:
                if not trt.loads or bytes(data) != b"engine":
                    self.logger.log(
                        trt.ILogger.ERROR, "IRuntime::d: Error Code 1: Serialization (Version tag does not match.)"
                    )
                    return None
                return Engine()

        self.Runtime = Runtime


def at(address: int, dtype: str, count: int) -> np.ndarray[Any, Any]:
    """The memory at an address, as the native code sees it."""
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype)


class FakeContext:
    """An execution context that computes with NumPy."""

    fails = False

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in ("x", "scale", "k") if name not in self.shapes]

    def get_max_output_size(self, name: str) -> int:
        return 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"size": (1,)}[name]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        if self.fails:
            return False
        count = int(np.prod(self.shapes["x"]))
        y = at(self.addresses["x"], "float32", count) * at(self.addresses["scale"], "float16", 1).astype(np.float32)
        large = y[y > 1]
        for name, value, shape in (("y", y, self.shapes["x"]), ("large", large, large.shape)):
            address = self.allocators[name].reallocate_output_async(name, None, value.nbytes, 256, stream)
            assert address
            at(address, "float32", value.size)[:] = value
            self.allocators[name].notify_shape(name, shape)
        at(self.addresses["size"], "int64", 1)[:] = at(self.addresses["k"], "int64", 1) + 1
        return True


ARTIFACT = Artifact(
    ("e.engine",),
    {"tensorrt": "10.1"},
    {"x": ShapeRange((1, 3), (2, 3), (4, 3)), "k": ShapeRange((0,), (2,), (9,))},
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, FakeTensorRT, FakeCuda]:
    trt, cuda = FakeTensorRT(), FakeCuda()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: cuda)
    (tmp_path / "e.engine").write_bytes(b"engine")
    session = TensorRT().open(tmp_path, ARTIFACT, Target.parse("tensorrt:sm89"), BuildOptions())
    return session, trt, cuda


def feeds(rows: int = 2, k: int = 3) -> dict[str, Any]:
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return {"x": x, "scale": np.float16(0.5), "k": np.array([k], np.int64)}


def test_a_session_says_what_its_engine_takes_and_gives(opened: Any) -> None:
    session, _, _ = opened
    assert [str(spec) for spec in session.inputs] == ["float32[?,3] x", "float16[] scale", "int64[1] k"]
    assert [str(spec) for spec in session.outputs] == ["float32[?,3] y", "float32[?] large", "int64[1] size"]


def test_runs_give_outputs_of_each_shape_and_keep_earlier_ones(opened: Any) -> None:
    session, _, cuda = opened
    first = session.run(feeds(2))
    np.testing.assert_array_equal(first["y"], [[0, 0.5, 1], [1.5, 2, 2.5]])
    np.testing.assert_array_equal(first["large"], np.array([1.5, 2, 2.5], np.float32))
    np.testing.assert_array_equal(first["size"], [4])
    larger = session.run(feeds(4, k=9))
    assert larger["y"].shape == (4, 3)
    assert larger["large"].shape == (9,)
    np.testing.assert_array_equal(larger["size"], [10])
    smaller = session.run({**feeds(1), "x": np.zeros((1, 3), np.float32)})
    assert smaller["large"].shape == (0,)
    np.testing.assert_array_equal(first["y"], [[0, 0.5, 1], [1.5, 2, 2.5]])
    assert cuda.depth == 0


def test_inputs_that_are_not_contiguous_are_copied_right(opened: Any) -> None:
    session, _, _ = opened
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[:, ::-1]
    y = session.run({**feeds(), "x": x})["y"]
    np.testing.assert_array_equal(y, x * 0.5)


@pytest.mark.parametrize(("change", "message"), [
    ({"x": None}, "input 'x' is missing; the inputs are float32[?,3] x, float16[] scale, int64[1] k"),
    ({"z": np.zeros(1)}, "no input 'z'; the inputs are float32[?,3] x, float16[] scale, int64[1] k"),
    ({"x": np.zeros((2, 3))}, "input 'x' is float64, the engine takes float32"),
    ({"x": np.zeros((2, 4), np.float32)}, "input 'x' has shape 2x4, the engine takes 1x3:2x3:4x3 (min:opt:max)"),
    ({"x": np.zeros((5, 3), np.float32)}, "input 'x' has shape 5x3, the engine takes 1x3:2x3:4x3 (min:opt:max)"),
    ({"x": np.zeros((), np.float32)}, "input 'x' has shape () (a scalar), the engine takes 1x3:2x3:4x3 (min:opt:max)"),
    ({"scale": np.zeros(2, np.float16)}, "input 'scale' has shape 2, the engine takes float16[] scale"),
    ({"k": np.array([11])}, "input 'k' holds [11], the engine takes 0:2:9 (min:opt:max)"),
])  # fmt: skip
def test_feeds_that_do_not_fit_are_refused(opened: Any, change: dict[str, Any], message: str) -> None:
    session, _, _ = opened
    given = {name: value for name, value in {**feeds(), **change}.items() if value is not None}
    with pytest.raises(UsageError) as caught:
        session.run(given)
    assert str(caught.value) == message


def test_an_engine_that_fails_says_why(opened: Any) -> None:
    session, trt, _ = opened
    session.run(feeds())
    trt.context.fails = True
    with pytest.raises(BackendUnavailable, match=r"^the engine failed on Fake GPU: no reason given$"):
        session.run(feeds())


def test_closing_frees_everything_and_ends_the_session(opened: Any) -> None:
    session, _, cuda = opened
    session.run(feeds())
    assert cuda.memory
    assert cuda.pins
    session.close()
    session.close()
    assert cuda.memory == {}
    assert cuda.pins == 0
    assert cuda.closed
    with pytest.raises(UsageError, match=r"^the session is closed; open the bundle again$"):
        session.run(feeds())


def test_an_engine_of_another_version_is_refused_with_what_made_it(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trt, cuda = opened
    trt.loads = False
    with pytest.raises(BackendUnavailable) as caught:
        TensorRT().open(tmp_path, ARTIFACT, Target.parse("tensorrt:sm80"), BuildOptions())
    assert str(caught.value) == (
        "e.engine does not load on Fake GPU (sm89) with tensorrt 11.4.0: Version tag does not match; "
        "tensorrt 10.1 made it for tensorrt:sm80: build again for this machine"
    )
    assert cuda.closed


def test_a_runtime_that_does_not_start_is_unavailable(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(logger: Any) -> Any:
        logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    _, trt, _ = opened
    monkeypatch.setattr(trt, "Runtime", start)
    with pytest.raises(
        BackendUnavailable, match="does not start: CUDA initialization failure with error: 35; its NVIDIA"
    ):
        TensorRT().open(tmp_path, ARTIFACT, Target.parse("tensorrt:sm89"), BuildOptions())


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_an_engine_file_that_cannot_be_read_is_named(opened: Any, tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "e.engine").unlink()
    if content is not None:
        (tmp_path / "e.engine").write_bytes(content)
    with pytest.raises(InvalidModel, match=r"^cannot read engine '.*e\.engine': .*; build the bundle again$"):
        TensorRT().open(tmp_path, ARTIFACT, Target.parse("tensorrt:sm89"), BuildOptions())


# --------------------------------------------------------------------------------------- the two bindings, over fakes


class FakeDriver:
    """``cuda.bindings.driver`` over host memory: every call returns (status, values...)."""

    class CUresult:
        CUDA_SUCCESS = 0

    class CUdevice_attribute:  # noqa: N801
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = "major"
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = "minor"

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.contexts: list[str] = []
        self.alive: dict[int, Any] = {}
        self.released = False
        self.out_of_memory = False

    def _new(self, nbytes: int) -> int:
        block = (ctypes.c_uint8 * nbytes)()
        self.alive[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def __getattr__(self, name: str) -> Any:
        def copy(to: int, source: int, count: int, stream: Any) -> tuple[int]:
            assert stream == 5
            assert self.contexts
            ctypes.memmove(to, source, count)
            return (0,)

        calls: dict[str, Callable[..., Any]] = {
            "cuInit": lambda flags: (0,),
            "cuDeviceGetCount": lambda: (0, self.devices),
            "cuDeviceGet": lambda i: (0, i),
            "cuDeviceGetName": lambda n, d: (0, b"NVIDIA Fake" + bytes(n - 11)),
            "cuDeviceGetAttribute": lambda a, d: (0, {"major": 12, "minor": 0}[a]),
            "cuDevicePrimaryCtxRetain": lambda d: (0, "primary"),
            "cuDevicePrimaryCtxRelease": lambda d: setattr(self, "released", True) or (0,),
            "cuCtxPushCurrent": lambda c: self.contexts.append(c) or (0,),
            "cuCtxPopCurrent": lambda: (0, self.contexts.pop()),
            "cuStreamCreate": lambda flags: (0, 5),
            "cuStreamDestroy": lambda s: (0,),
            "cuStreamSynchronize": lambda s: (0,),
            "cuMemAlloc": lambda n: (types.SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"),) if self.out_of_memory else (0, self._new(n)),
            "cuMemFree": lambda p: (self.alive.pop(p), (0,))[1],
            "cuMemHostAlloc": lambda n, flags: (0, self._new(n)),
            "cuMemFreeHost": lambda p: (self.alive.pop(p), (0,))[1],
            "cuMemcpyHtoDAsync": copy,
            "cuMemcpyDtoHAsync": copy,
        }  # fmt: skip
        call = calls[name]
        call.__name__ = name
        return call


class FakePyCuda:
    """``pycuda.driver`` over host memory."""

    class Error(Exception):
        pass

    stack: list[Any] = []  # noqa: RUF012

    class Context:
        def push(self) -> None:
            FakePyCuda.stack.append(self)

        @staticmethod
        def pop() -> None:
            FakePyCuda.stack.pop()

    class Stream:
        handle = 5

        def synchronize(self) -> None:
            pass

    class Device:
        count = staticmethod(lambda: 1)

        def __init__(self, index: int) -> None:
            pass

        def name(self) -> str:
            return "NVIDIA Fake"

        def compute_capability(self) -> tuple[int, int]:
            return (12, 0)

        def retain_primary_context(self) -> FakePyCuda.Context:
            return FakePyCuda.Context()

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}
        self.out_of_memory = False

    def init(self) -> None:
        pass

    def mem_alloc(self, nbytes: int) -> Any:
        if self.out_of_memory:
            raise self.Error("cuMemAlloc failed: out of memory")
        block, alive = (ctypes.c_uint8 * nbytes)(), self.alive
        address = ctypes.addressof(block)
        alive[address] = block

        class Allocation:
            def __int__(self) -> int:
                return address

            def free(self) -> None:
                del alive[address]

        return Allocation()

    def pagelocked_empty(self, nbytes: int, dtype: Any) -> Any:
        return np.empty(nbytes, dtype)

    def memcpy_htod_async(self, address: int, array: Any, stream: Any) -> None:
        assert self.stack
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def memcpy_dtoh_async(self, array: Any, address: int, stream: Any) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


@pytest.mark.parametrize("make", [
    lambda: (_cuda_buffers.CudaPython, FakeDriver()), lambda: (_cuda_buffers.PyCuda, FakePyCuda())
], ids=["cuda-python", "pycuda"])  # fmt: skip
def test_each_binding_copies_there_and_back_and_frees(make: Any) -> None:
    kind, module = make()
    cuda = kind(module)
    assert (cuda.package, cuda.device, cuda.capability, cuda.stream) == (kind.package, "NVIDIA Fake", "sm120", 5)
    with cuda.current():
        one, two = _cuda_buffers.Buffer(cuda), _cuda_buffers.Buffer(cuda)
        host = one.host(5)
        host[:] = [1, 2, 3, 4, 5]
        address = one.reserve(5)
        assert one.reserve(3) == address
        cuda.upload(address, host)
        back = two.host(5)
        cuda.download(back, address)
        cuda.synchronize()
        assert back.tolist() == [1, 2, 3, 4, 5]
        assert one.reserve(0)
        assert one.reserve(4096)
        del host, back
        one.release()
        two.release()
        gc.collect()
    assert module.alive == {}
    cuda.close()
    if isinstance(module, FakeDriver):
        assert module.released
        assert module.contexts == []
    else:
        assert module.stack == []


@pytest.mark.parametrize(("make", "message"), [
    (lambda: (_cuda_buffers.CudaPython, FakeDriver()), "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"),
    (lambda: (_cuda_buffers.PyCuda, FakePyCuda()), "CUDA failed: cuMemAlloc failed: out of memory"),
], ids=["cuda-python", "pycuda"])  # fmt: skip
def test_each_binding_turns_its_errors_into_ours(make: Any, message: str) -> None:
    kind, module = make()
    cuda = kind(module)
    module.out_of_memory = True
    with pytest.raises(BackendUnavailable) as caught, cuda.current():
        cuda.allocate(8)
    assert str(caught.value) == message


def test_a_driver_without_gpus_is_no_device() -> None:
    with pytest.raises(BackendUnavailable, match=r"^the driver sees no GPU$"):
        _cuda_buffers.CudaPython(FakeDriver(devices=0))
