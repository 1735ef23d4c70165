"""NumPy's kernels against ONNX Runtime: the same bits, or nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import graphopt
from graphopt import kernels
from graphopt.evaluate import Evaluator

# The graph, and what is fed: small integers where a shape, an axis or an index is meant, else random numbers.
SAME_BITS = """
13: g (float[2,3] x, int64[2] a) => (float[N,N,N,N] y) { y = Unsqueeze (x, a) } | a = 0 -1
11: g (float[2,3] x) => (float[N,N,N] y) { y = Unsqueeze <axes = [1]> (x) }
13: g (float[1,3,1] x) => (float[3] y) { y = Squeeze (x) }
11: g (float[1,3,1] x) => (float[1,3] y) { y = Squeeze <axes = [-1]> (x) }
13: g (int64[1,3,1] x, int64[1] a) => (int64[3,1] y) { y = Squeeze (x, a) } | a = 0
14: g (float[2,3,4] x, int64[3] s) => (float[M,N,K] y) { y = Reshape (x, s) } | s = 0 -1 2
14: g (float[0,3] x, int64[2] s) => (float[M,N] y) { y = Reshape <allowzero = 1> (x, s) } | s = 3 0
14: g (float[2,3,4] x) => (float[4,3,2] y) { y = Transpose (x) }
14: g (double[2,3,4] x) => (double[3,2,4] y) { y = Transpose <perm = [1, 0, 2]> (x) }
13: g (float[2,3] x, float[2,1] z) => (float[2,4] y) { y = Concat <axis = -1> (x, z) }
13: g (float[6,2] x) => (float[3,2] y, float[3,2] z) { y, z = Split (x) }
11: g (float[6,2] x) => (float[4,2] y, float[2,2] z) { y, z = Split <split = [4, 2]> (x) }
13: g (float[2,6] x, int64[3] s) => (float[2,1] y, float[2,0] z, float[2,5] w) { y, z, w = Split <axis = 1> (x, s) } | s = 1 0 5
13: g (float[5,4] x, int64[2] s, int64[2] e, int64[2] a, int64[2] t) => (float[M,N] y) { y = Slice (x, s, e, a, t) } | s = -3 1; e = 1000 -1; a = 0 -1; t = 1 2
13: g (float[5,4] x, int64[1] s, int64[1] e) => (float[M,N] y) { y = Slice (x, s, e) } | s = -100; e = -100
9: g (float[5,4] x) => (float[M,N] y) { y = Slice <starts = [1], ends = [3], axes = [1]> (x) }
13: g (float[5,4] x, int64[2,2] i) => (float[5,2,2] y) { y = Gather <axis = 1> (x, i) } | i = 0 -1 3 2
13: g (float[5] x, int64 i) => (float y) { y = Gather (x, i) } | i = -5
13: g (float[3,1] x, int64[3] s) => (float[M,N,K] y) { y = Expand (x, s) } | s = 2 1 4
15: g (float[2,3,4] x) => (int64[N] y) { y = Shape <start = 1, end = -1> (x) }
15: g (float[2,3,4] x) => (int64 y) { y = Size (x) }
16: g (bool[3] c, int64[2,1] x, int64[3] z) => (int64[2,3] y) { y = Where (c, x, z) }
13: g (int64[4] x) => (float[4] y) { y = Cast <to = 1> (x) } | x = -9223372036854775808 9223372036854775807 16777217 0
13: g (int64[3] x) => (int32[3] y) { y = Cast <to = 6> (x) } | x = 4294967297 -4294967298 7
13: g (bool[3] x) => (int64[3] y) { y = Cast <to = 7> (x) }
14: g (int64[2] x, int64[2] z) => (int64[2] y) { y = Add (x, z) } | x = 9223372036854775807 1; z = 1 1
14: g (int32[2,1] x, int32[3] z) => (int32[2,3] y) { y = Mul (x, z) }
14: g (float[2,3] x, float[3] z) => (float[2,3] y) { y = Sub (x, z) }
14: g (float[2,3] x, float[3] z) => (float[2,3] y) { y = Div (x, z) }
14: g (double[5] x, double[5] z) => (double[5] y) { y = Mul (x, z) }
13: g (int64[4] x, int64[4] z) => (int64[4] y) { y = Mod (x, z) } | x = 7 -7 7 -7; z = 3 3 -3 -3
13: g (int64[2,1] x, int64[3] z) => (bool[2,3] y) { y = Equal (x, z) }
13: g (float[1] x) => (float[1] y) { y = Sqrt (x) } | x = 32
15: g (float x, float z) => (float y) { y = Pow (x, z) } | x = 64; z = -0.5
"""
# What is not the same everywhere, or nobody's business here: the evaluator decides.
LEFT_ALONE = """
14: g (float[1] x, float[1] z) => (float[1] y) { y = Div (x, z) } | x = 0; z = 0
14: g (float[1] x, float[1] z) => (float[1] y) { y = Mul (x, z) } | x = 1e-30; z = 1e-30
14: g (float[1] x, float[1] z) => (float[1] y) { y = Add (x, z) } | x = inf; z = 1
14: g (float16[1] x, float16[1] z) => (float16[1] y) { y = Mul (x, z) } | x = 3; z = 0.3
14: g (int64[1] x, int64[1] z) => (int64[1] y) { y = Div (x, z) } | x = 7; z = 2
13: g (int64[1] x, int64[1] z) => (int64[1] y) { y = Mod (x, z) } | x = 7; z = 0
15: g (float x, float z) => (float y) { y = Pow (x, z) } | x = 32; z = -0.5
13: g (float[1] x) => (int64[1] y) { y = Cast <to = 7> (x) } | x = nan
13: g (float[1] x) => (float[1] y) { y = Sqrt (x) } | x = -1
13: g (float[5] x, int64[1] s, int64[1] e, int64[1] a, int64[1] t) => (float[N] y) { y = Slice (x, s, e, a, t) } | s = -1; e = -100; a = 0; t = -1
13: g (float[5] x, int64[1] i) => (float[1] y) { y = Gather (x, i) } | i = 5
13: g (float[5] x) => (float[3] y, float[2] z) { y, z = Split (x) }
14: g (float[0,3] x, int64[2] s) => (float[M,N] y) { y = Reshape <allowzero = 1> (x, s) } | s = 0 -1
6: g (float[2] x, float[2] z) => (float[2] y) { y = Add (x, z) }
13: g (float[2] x) => (float[2] y) { y = Exp (x) }
"""


def case(line: str) -> tuple[graphopt.Model, dict[str, np.ndarray]]:
    """The model of a line, and its operands."""
    opset, _, rest = line.partition(":")
    graph, _, values = rest.partition(" | ")
    model = graphopt.parse(f'<ir_version: 8, opset_import: ["" : {opset}]> {graph}')
    given = dict(part.split(" = ") for part in values.split("; ") if part)
    random = np.random.default_rng(0)
    feeds = {}
    for spec in model.inputs:
        dtype, shape = np.dtype(str(spec.dtype)), tuple(int(d) for d in spec.shape or () if d is not None)
        if spec.name in given:
            number = int if dtype.kind == "i" else float
            feeds[spec.name] = np.array([number(v) for v in given[spec.name].split()], dtype).reshape(shape)
        else:
            drawn = random.integers(0, 2, shape) if dtype.kind in "b" else random.standard_normal(shape) * 8
            feeds[spec.name] = np.asarray(drawn).astype(dtype)
    return model, feeds


def computed(model: graphopt.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    (node,) = model.graph.nodes
    return kernels.compute(node, model.opset, [feeds[t.name] for t in node.inputs])


@pytest.mark.parametrize("line", SAME_BITS.strip().splitlines())
def test_a_kernel_computes_the_bits_of_onnxruntime(line: str) -> None:
    model, feeds = case(line)
    found = computed(model, feeds)
    assert found is not None
    for mine, theirs in zip(found, Evaluator(model).run(feeds).values(), strict=True):
        assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
        assert mine.flags.c_contiguous


@pytest.mark.parametrize("line", LEFT_ALONE.strip().splitlines())
def test_what_evaluators_may_compute_otherwise_is_left_to_them(line: str) -> None:
    assert computed(*case(line)) is None


def test_shape_arithmetic_is_folded_without_a_runtime() -> None:
    code = """
import sys
import graphopt
model = graphopt.parse('''g (float[2,3,4] x) => (float[N] y)
    { s = Shape (x) i = Constant <value = int64[1] {1}> () d = Gather (s, i)
      a = Constant <value = int64[1] {8}> () t = Mul (d, a) y = Reshape (x, t) }''')
result = graphopt.Pipeline.parse("O2").run(model)
assert [n.op for n in result.model.nodes()] == ["Reshape"]
sys.exit("onnxruntime" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
