"""Passes that compute with constants: into the weights of convolutions and products, sums and products, padding, Min and Max."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import CASES, Case, cases
from test_merge_passes import check, optimized, same_numbers

from graphopt import equivalence, ir
from graphopt.pass_base import Context, Exactness
from graphopt.pipeline import Pipeline

COMPUTING = ["fuse-conv-bias", "fuse-conv-scale", "fuse-pad", "fuse-matmul-add", "fuse-gemm-transpose", "fuse-gemm-bn"]
COMPUTING += ["fuse-matmul-scale", "merge-matmul-scales", "simplify-arithmetic", "fuse-min-max", "fuse-conv-branches"]
COMPUTING += ["fuse-linear-chain", "fuse-input-shift", "fuse-negation"]


@pytest.mark.parametrize("case", [c for name in COMPUTING for c in cases(CASES / f"{name}.txt")], ids=str)
def test_case_is_idempotent_for_every_size(case: Case) -> None:
    check(case)


def test_minus_infinity_before_a_maximum_is_its_own_padding() -> None:
    model = ir.parse("""
        g (float[N,1,4,4] x) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, float big = {3e38}, float ten = {10}>
        { low = Mul (big, ten)
          minus = Neg (low)
          a = Pad (x, pads, minus)
          y = MaxPool <kernel_shape = [3, 3], pads = [1, 0, 0, 1]> (a) }
    """)
    result = optimized("fold-constants,fuse-pad", model)
    nodes = list(result.model.nodes())
    assert [n.op for n in nodes] == ["MaxPool"]
    assert nodes[0].attrs["pads"] == [2, 1, 1, 2]
    same_numbers(model, result.model, 0.0, special=False)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_affine_chains_around_convolutions_of_every_group(op: str, group: int) -> None:
    rng = np.random.default_rng(group)
    inner, outer = 6, 12
    shape = (outer, inner // group, 3, 3) if op == "Conv" else (inner, outer // group, 3, 3)

    def stored(name: str, *dims: int) -> str:
        values = ", ".join(f"{v:.6f}" for v in rng.uniform(0.5, 2, dims).ravel())
        return f"float[{','.join(map(str, dims))}] {name} = {{{values}}}"

    constants = [stored("w", *shape), stored("k", inner, 1, 1), stored("d", 1, outer, 1, 1), stored("c", outer, 1, 1)]
    model = ir.parse(f"""
        g (float[N,{inner},5,5] x) => (float[N,{outer},p,q] y) <{", ".join(constants)}, float half = {{0.5}}>
        {{ m = Div (x, k)
          a = {op} <group = {group}, pads = [1, 1, 1, 1]> (m, w)
          s = Add (c, a)
          t = Mul (s, d)
          u = Sub (t, half)
          y = Div (u, half) }}
    """)
    result = optimized("fixpoint(fuse-conv-bias,fuse-conv-scale)", model)
    assert [n.op for n in result.model.nodes()] == [op]
    allowed = equivalence.tolerance(Exactness.REASSOCIATING, result.rewrites, ["float32"])
    same_numbers(model, result.model, allowed, special=False)


REPVGG = """
g (float[1,2,5,5] x) => (float[1,2,5,5] y)
<float[2,2,3,3] w = {ONES}, float[2,2,1,1] v = {1, 2, 3, 4}, float[2] s = {1, 2}, float[2] t = {3, 4}>
{ a = Conv <pads = [1, 1, 1, 1]> (x, w)
  n = BatchNormalization (a, s, t, t, s)
  b = Conv (x, v)
  m = BatchNormalization (b, s, t, t, s)
  i = BatchNormalization (x, s, s, t, t)
  p = Add (n, m)
  q = Add (p, i)
  y = Relu (q) }
""".replace("ONES", ", ".join(map(str, range(36))))


@pytest.mark.parametrize("preset", ["O2", "O3", "O3,quantize-weights"])
def test_a_repvgg_block_is_one_convolution(preset: str) -> None:
    found = optimized(preset, ir.parse(REPVGG)).model
    assert [n.op for n in found.nodes() if n.op != "DequantizeLinear"] == ["Conv", "Relu"]


def test_the_identity_stays_out_of_a_lone_kernel_that_is_quantized_later() -> None:
    text = "g (float[1,1,4] x) => (float[1,1,4] y) <float[1,1,1] w = {0.01}> { a = Conv (x, w)  y = Add (a, x) }"
    kept = Pipeline.parse("O3").run(ir.parse(text), Context(products_stay=True))
    assert [n.op for n in kept.model.nodes()] == ["Conv", "Add"]
    assert [n.op for n in Pipeline.parse("O3").run(ir.parse(text)).model.nodes()] == ["Conv"]


@pytest.mark.parametrize(("rows", "fused"), [(64, True), (1 << 18, False)])
def test_products_of_large_weights_are_left_to_run_time(rows: int, fused: bool) -> None:
    model = ir.parse(
        "g (float[N,K] x) => (float[N,64] y) <float[1] a = {0}, float[1] b = {0}> { h = MatMul (x, a) y = MatMul (h, b) }"
    )
    first, second = model.graph.nodes
    first.inputs[1] = ir.Constant("a", np.broadcast_to(np.float32(1), (64, rows)))  # takes no memory
    second.inputs[1] = ir.Constant("b", np.broadcast_to(np.float32(1), (rows, 64)))
    model.graph.initializers.clear()
    result = Pipeline.parse("fuse-linear-chain").run(model)
    assert result.rewrites == fused
    assert fused or "elements" in str(result.remarks[0])
