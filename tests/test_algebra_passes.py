"""Passes that compute with constants: into the weights of convolutions and products, sums and products, padding, Min and Max."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import CASES, Case, cases
from test_merge_passes import check, optimized, same_numbers

from graphopt import equivalence, ir
from graphopt.pass_base import Exactness

COMPUTING = ["fuse-conv-bias", "fuse-conv-scale", "fuse-pad", "fuse-matmul-add", "fuse-gemm-transpose", "fuse-gemm-bn"]
COMPUTING += ["fuse-matmul-scale", "merge-matmul-scales", "simplify-arithmetic", "fuse-min-max"]


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
