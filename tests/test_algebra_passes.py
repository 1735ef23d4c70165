"""Passes that compute with constants: into the weights of convolutions and products, sums and products, padding, Min and Max."""

from __future__ import annotations

import numpy as np
import pytest
from test_merge_passes import Case, check, optimized, same_numbers

from graphopt import equivalence, ir
from graphopt.pass_base import Exactness

X = "float[N,2,4,4] x"
W = "float[2,2,1,1] w = {1, 2, 3, 4}"

# ONNX text gives float16 by its bits: 15360 is 1, 31571 is 60000, 5145 is 0.001, 1678 is 0.0001.
CONVS = [
    Case(
        "bias of a convolution that has one, constant on the left",
        "fuse-conv-bias",
        f"g ({X}) => (float[N,2,4,4] y) <{W}, float[2] b = {{1, 2}}, float[1,2,1,1] c = {{3, 5}}> {{ a = Conv (x, w, b)\n y = Add (c, a) }}",
        f"g ({X}) => (float[N,2,4,4] y) <{W}, float[2] b = {{4, 7}}> {{ y = Conv (x, w, b) }}",
    ),
    Case(
        "subtracted scalar, weight shared",
        "fuse-conv-bias",
        f"g ({X}) => (float[N,2,4,4] y) <{W}, float c = {{3}}> {{ a = Conv (x, w)\n b = Conv (a, w)\n y = Sub (b, c) }}",
        f"g ({X}) => (float[N,2,4,4] y) <{W}, float[2] c = {{-3, -3}}> {{ a = Conv (x, w)\n y = Conv (a, w, c) }}",
    ),
    Case(
        "transposed, by groups",
        "fuse-conv-bias",
        f"""g ({X}) => (float[N,4,4,4] y) <{W}, float[4,1,1] c = {{1, 2, 3, 4}}>
        {{ a = ConvTranspose <group = 2> (x, w)
          y = Add (a, c) }}""",
        f"g ({X}) => (float[N,4,4,4] y) <{W}, float[4] c = {{1, 2, 3, 4}}> {{ y = ConvTranspose <group = 2> (x, w, c) }}",
    ),
    Case(
        "of Gemm with beta",
        "fuse-conv-bias",
        """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[1,2] b = {1, 2}, float[2] c = {3, 5}>
        { a = Gemm <beta = 0.5, transB = 1> (x, w, b)
          y = Add (a, c) }""",
        """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {3.5, 6}>
        { y = Gemm <transB = 1> (x, w, b) }""",
    ),
    Case(
        "a constant along the last axis stays",
        "fuse-conv-bias",
        "g (float[N,2,4,2] x) => (float[N,2,4,2] y) <"
        + W
        + ", float[2] c = {3, 5}> { a = Conv (x, w)\n y = Add (a, c) }",
        None,
        "not constant per channel",
    ),
    Case(
        "a constant of higher rank stays",
        "fuse-conv-bias",
        f"g ({X}) => (float[1,N,2,4,4] y) <{W}, float[1,1,1,1,1] c = {{3}}> {{ a = Conv (x, w)\n y = Add (a, c) }}",
        None,
        "not constant per channel",
    ),
    Case(
        "a constant that differs by image stays",
        "fuse-conv-bias",
        "g (float[2,2,4,4] x) => (float[2,2,4,4] y) <"
        + W
        + ", float[2,1,1,1] c = {3, 5}> { a = Conv (x, w)\n y = Add (a, c) }",
        None,
        "not constant per channel",
    ),
    Case(
        "the convolution subtracted from the constant stays",
        "fuse-conv-bias",
        f"g ({X}) => (float[N,2,4,4] y) <{W}, float c = {{3}}> {{ a = Conv (x, w)\n y = Sub (c, a) }}",
    ),
    Case(
        "two readers stay",
        "fuse-conv-bias,fuse-conv-scale",
        f"""g ({X}) => (float[N,2,4,4] y, float[N,2,4,4] z, float[N,2,4,4] v) <{W}, float c = {{3}}>
        {{ a = Conv (x, w)
          y = Add (a, c)
          v = Mul (a, c)
          z = Exp (a) }}""",
        None,
        "is read by others",
    ),
    Case(
        "a residual sum stays",
        "fuse-conv-bias",
        f"g ({X}) => (float[N,2,4,4] y) <{W}> {{ a = Conv (x, w)\n y = Add (a, x) }}",
        None,
        "is not constant",
    ),
    Case(
        "an overflowing half stays",
        "fuse-conv-bias",
        """g (float16[N,1,2,2] x) => (float16[N,1,2,2] y) <float16[1,1,1,1] w = {15360}, float16[1] b = {31571}, float16[1] c = {31571}>
        { a = Conv (x, w, b)
          y = Add (a, c) }""",
        None,
        "infinite or NaN",
    ),
    Case(
        "factors before and behind, by channel",
        "fuse-conv-scale",
        f"""g ({X}) => (float[N,2,4,4] y) <{W}, float[2] b = {{1, 2}}, float[2,1,1] k = {{2, 4}}, float[1,2,1,1] d = {{2, 4}}>
        {{ m = Mul (k, x)
          a = Conv (m, w, b)
          y = Div (a, d) }}""",
        f"""g ({X}) => (float[N,2,4,4] y) <float[2,2,1,1] w = {{1, 4, 1.5, 4}}, float[2] b = {{0.5, 0.5}}>
        {{ y = Conv (x, w, b) }}""",
    ),
    Case(
        "factors by group",
        "fuse-conv-scale",
        f"""g ({X}) => (float[N,2,4,4] y) <float[2,1,1,1] w = {{1, 2}}, float[2,1,1] k = {{2, 4}}>
        {{ m = Mul (x, k)
          y = Conv <group = 2> (m, w) }}""",
        f"g ({X}) => (float[N,2,4,4] y) <float[2,1,1,1] w = {{2, 8}}> {{ y = Conv <group = 2> (x, w) }}",
    ),
    Case(
        "factors of a transposed convolution by group",
        "fuse-conv-scale",
        f"""g ({X}) => (float[N,4,4,4] y) <{W}, float[2,1,1] k = {{2, 4}}, float[4,1,1] d = {{1, 2, 3, 4}}>
        {{ m = Mul (x, k)
          a = ConvTranspose <group = 2> (m, w)
          y = Mul (a, d) }}""",
        f"""g ({X}) => (float[N,4,4,4] y) <float[2,2,1,1] w = {{2, 8, 36, 64}}>
        {{ y = ConvTranspose <group = 2> (x, w) }}""",
    ),
    Case(
        "a shared weight stays",
        "fuse-conv-scale",
        f"g ({X}) => (float[N,2,4,4] y) <{W}, float k = {{2}}> {{ a = Conv (x, w)\n b = Conv (a, w)\n y = Mul (b, k) }}",
        None,
        "is shared",
    ),
    Case(
        "a weight that callers may override stays",
        "fuse-conv-scale",
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[N,1,2,2] x, float[1,1,1,1] w = {1}) => (float[N,1,2,2] y) <float k = {2}> { a = Conv (x, w)
          y = Mul (a, k) }""",
        None,
        "is not constant",
    ),
    Case(
        "a factor before that widens its operand stays",
        "fuse-conv-scale",
        f"g (float[N,1,4,4] x) => (float[N,2,4,4] y) <{W}, float[2,1,1] k = {{2, 4}}> {{ m = Mul (x, k)\n y = Conv (m, w) }}",
        None,
        "may broadcast",
    ),
    Case(
        "a division by zero stays",
        "fuse-conv-scale",
        f"g ({X}) => (float[N,2,4,4] y) <{W}, float k = {{0}}> {{ a = Conv (x, w)\n y = Div (a, k) }}",
        None,
        "infinite or NaN",
    ),
    Case(
        "a factor that vanishes in half stays",
        "fuse-conv-scale",
        """g (float16[N,1,2,2] x) => (float16[N,1,2,2] y) <float16[1,1,1,1] w = {5145}, float16 k = {1678}>
        { a = Conv (x, w)
          y = Mul (a, k) }""",
        None,
        "too small",
    ),
]

PADS = [
    Case(
        "onto the convolution's own",
        "fuse-pad",
        """g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y) <int64[4] pads = {1, 0, 2, 1}, int64[2] axes = {2, -1}>
        { a = Pad (x, pads, , axes)
          y = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (a, w) }""",
        """g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y)
        { y = Conv <pads = [2, 1, 3, 2], strides = [2, 1]> (x, w) }""",
    ),
    Case(
        "behind VALID, by attribute",
        "fuse-pad",
        """<ir_version: 8, opset_import: ["" : 10]>
        g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y) { a = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1]> (x)
          y = Conv <auto_pad = "VALID"> (a, w) }""",
        """<ir_version: 8, opset_import: ["" : 10]>
        g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w) }""",
    ),
    Case(
        "into an average that counts it",
        "fuse-pad",
        """g (float[N,1,4,4] x) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
        { a = Pad (x, pads)
          y = AveragePool <kernel_shape = [3, 3]> (a) }""",
        """g (float[N,1,4,4] x) => (float[N,1,p,q] y)
        { y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x) }""",
    ),
    Case(
        "an average that pads without counting stays",
        "fuse-pad",
        """g (float[N,1,4,4] x) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
        { a = Pad (x, pads)
          y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a) }""",
        None,
        "does not count",
    ),
    Case(
        "zeros before a maximum stay",
        "fuse-pad",
        """g (float[N,1,4,4] x) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
        { a = Pad (x, pads)
          y = MaxPool <kernel_shape = [3, 3]> (a) }""",
        None,
        "does not pad with a constant -inf",
    ),
    Case(
        "a window in the padding alone stays",
        "fuse-pad",
        """g (float[N,1,4,4] x) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 2, 1, 0, 0, 1, 1}>
        { a = Pad (x, pads)
          y = AveragePool <kernel_shape = [2, 2]> (a) }""",
        None,
        "padding alone",
    ),
    Case(
        "ones stay",
        "fuse-pad",
        """g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, float one = {1}>
        { a = Pad (x, pads, one)
          y = Conv (a, w) }""",
        None,
        "does not pad with a constant 0",
    ),
    Case(
        "padded channels stay",
        "fuse-pad",
        """g (float[N,1,4,4] x, float[1,2,3,3] w) => (float[N,1,p,q] y) <int64[8] pads = {0, 1, 0, 0, 0, 0, 0, 0}>
        { a = Pad (x, pads)
          y = Conv (a, w) }""",
        None,
        "batch or channels",
    ),
    Case(
        "cropping stays",
        "fuse-pad",
        """g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, -1, 0, 0, 0, 1, 0}>
        { a = Pad (x, pads)
          y = Conv (a, w) }""",
        None,
        "crops",
    ),
    Case(
        "reflection stays",
        "fuse-pad",
        """g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
        { a = Pad <mode = "reflect"> (x, pads)
          y = Conv (a, w) }""",
        None,
        "by reflect",
    ),
    Case(
        "before SAME stays",
        "fuse-pad",
        """g (float[N,1,4,4] x, float[1,1,3,3] w) => (float[N,1,p,q] y) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
        { a = Pad (x, pads)
          y = Conv <auto_pad = "SAME_UPPER"> (a, w) }""",
        None,
        "depends on the size",
    ),
]

PRODUCTS = [
    Case(
        "a bias that is computed",
        "fuse-matmul-add",
        "g (float[N,2] x, float[2,M] w, float[N,1] c) => (float[N,M] y) { e = Exp (c)\n a = MatMul (x, w)\n y = Add (e, a) }",
        "g (float[N,2] x, float[2,M] w, float[N,1] c) => (float[N,M] y) { e = Exp (c)\n y = Gemm (x, w, e) }",
    ),
    Case(
        "a product of three dimensions stays",
        "fuse-matmul-add",
        "g (float[N,S,2] x, float[2,3] w, float[3] c) => (float[N,S,3] y) { a = MatMul (x, w)\n y = Add (a, c) }",
        None,
        "no matrix",
    ),
    Case(
        "a bias that widens stays",
        "fuse-matmul-add",
        "g (float[1,2] x, float[2,3] w, float[N,3] c) => (float[N,3] y) { a = MatMul (x, w)\n y = Add (a, c) }",
        None,
        "may widen",
    ),
    Case(
        "integers stay",
        "fuse-matmul-add",
        "g (int32[N,2] x, int32[2,3] w, int32[3] c) => (int32[N,3] y) { a = MatMul (x, w)\n y = Add (a, c) }",
        None,
        "not available",
    ),
    Case(
        "both operands transposed, one of them already by flag",
        "fuse-gemm-transpose",
        """g (float[2,N] x, float[2,3] w, float[3] c) => (float[N,3] y)
        { a = Transpose (x)
          b = Transpose <perm = [1, 0]> (w)
          y = Gemm <transB = 1> (a, b, c) }""",
        "g (float[2,N] x, float[2,3] w, float[3] c) => (float[N,3] y) { y = Gemm <transA = 1, transB = 0> (x, w, c) }",
    ),
    Case(
        "a product of matrices becomes a Gemm",
        "fuse-gemm-transpose",
        "g (float[N,2] x, float[3,2] w) => (float[N,3] y) { b = Transpose (w)\n y = MatMul (x, b) }",
        "g (float[N,2] x, float[3,2] w) => (float[N,3] y) { y = Gemm <transB = 1> (x, w) }",
    ),
    Case(
        "a batch of matrices stays",
        "fuse-gemm-transpose",
        "g (float[N,S,2] x, float[3,2] w) => (float[N,S,3] y) { b = Transpose (w)\n y = MatMul (x, b) }",
        None,
        "no Gemm",
    ),
    Case(
        "a transpose that is a graph output stays",
        "fuse-gemm-transpose",
        "g (float[2,N] x, float[2,3] w) => (float[N,2] a, float[N,3] y) { a = Transpose (x)\n y = Gemm (a, w) }",
        None,
        "is a graph output",
    ),
    Case(
        "normalization of a Gemm with transposed weight",
        "fuse-gemm-bn",
        """g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] c = {2, 2}, float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {1, 1}, float[2] v = {1, 4}>
        { a = Gemm <transB = 1, beta = 0.5> (x, w, c)
          y = BatchNormalization <epsilon = 0.0> (a, s, b, m, v) }""",
        """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] c = {0, 1}>
        { y = Gemm <transB = 1> (x, w, c) }""",
    ),
    Case(
        "normalization of a product with a shared weight stays",
        "fuse-gemm-bn",
        """g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {1, 1}, float[2] v = {1, 4}>
        { a = MatMul (x, w)
          d = MatMul (a, w)
          y = BatchNormalization (d, s, b, m, v) }""",
        None,
        "is shared",
    ),
    Case(
        "normalization of axis 1 of three stays",
        "fuse-gemm-bn",
        """g (float[N,2,2] x) => (float[N,2,2] y)
        <float[2,2] w = {1, 2, 3, 4}, float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {1, 1}, float[2] v = {1, 4}>
        { a = MatMul (x, w)
          y = BatchNormalization (a, s, b, m, v) }""",
        None,
        "no product of matrices",
    ),
    Case(
        "factors around a Gemm with transposed weight",
        "fuse-matmul-scale",
        """g (float[N,2] x) => (float[N,3] y)
        <float[3,2] w = {1, 2, 3, 4, 5, 6}, float[3] c = {1, 1, 1}, float[2] k = {2, 4}, float[3] d = {1, 2, 3}>
        { m = Mul (x, k)
          a = Gemm <transB = 1, alpha = 0.5> (m, w, c)
          y = Mul (a, d) }""",
        """g (float[N,2] x) => (float[N,3] y) <float[3,2] w = {2, 8, 12, 32, 30, 72}, float[3] c = {1, 2, 3}>
        { y = Gemm <transB = 1, alpha = 0.5> (x, w, c) }""",
    ),
    Case(
        "a factor by row of the result stays",
        "fuse-matmul-scale",
        "g (float[3,2] x) => (float[3,2] y) <float[2,2] w = {1, 2, 3, 4}, float[3,1] k = {1, 2, 3}> { a = MatMul (x, w)\n y = Mul (a, k) }",
        None,
        "not constant per column",
    ),
    Case(
        "a factor that widens a vector stays",
        "fuse-matmul-scale",
        "g (float[2] x) => (float[1,2] y) <float[2,2] w = {1, 2, 3, 4}, float[1,1] k = {2}> { a = MatMul (x, w)\n y = Mul (a, k) }",
        None,
        "may broadcast",
    ),
    Case(
        "a factor before that widens the operand stays",
        "fuse-matmul-scale",
        "g (float[N,1] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] k = {2, 3}> { m = Mul (x, k)\n y = MatMul (m, w) }",
        None,
        "may broadcast",
    ),
    Case(
        "query and key scaled by the root",
        "merge-matmul-scales",
        """g (float[N,3,2] x, float[N,2,3] z) => (float[N,3,3] y) <float[1] c = {0.5}, float d = {4}>
        { a = Mul (c, x)
          b = Div (z, d)
          y = MatMul (a, b) }""",
        """g (float[N,3,2] x, float[N,2,3] z) => (float[N,3,3] y) <float e = {0.125}>
        { a = Mul (x, e)
          y = MatMul (a, z) }""",
    ),
    Case(
        "factors by column stay",
        "merge-matmul-scales",
        """g (float[N,2] x, float[2,3] z) => (float[N,3] y) <float[2] c = {0.5, 2}, float d = {4}>
        { a = Mul (c, x)
          b = Mul (z, d)
          y = MatMul (a, b) }""",
    ),
    Case(
        "factors that others read stay",
        "merge-matmul-scales",
        """g (float[N,2] x, float[2,N] z) => (float[N,N] y, float[N,2] v) <float c = {0.5}, float d = {4}>
        { a = Mul (x, c)
          b = Mul (z, d)
          v = Exp (a)
          y = MatMul (a, b) }""",
    ),
    Case(
        "huge factors stay",
        "merge-matmul-scales",
        """g (float[N,2] x, float[2,N] z) => (float[N,N] y) <float c = {1e30}, float d = {1e-30}>
        { a = Mul (x, c)
          b = Mul (z, d)
          y = MatMul (a, b) }""",
        None,
        "too large or small",
    ),
]

SUMS = [
    Case(
        "sums and differences of constants",
        "simplify-arithmetic",
        """g (float[N,2] x) => (float[N,2] y) <float[2] a = {1, 2}, float b = {3}, float c = {1}>
        { r = Add (a, x)
          s = Add (r, b)
          y = Sub (s, c) }""",
        "g (float[N,2] x) => (float[N,2] y) <float[2] a = {3, 4}> { y = Add (x, a) }",
    ),
    Case(
        "products and quotients of constants",
        "simplify-arithmetic",
        """g (float[N] x) => (float[N] y) <float a = {3}, float b = {4}>
        { r = Mul (x, a)
          y = Div (r, b) }""",
        "g (float[N] x) => (float[N] y) <float a = {0.75}> { y = Mul (x, a) }",
    ),
    Case(
        "integers that wrap around",
        "simplify-arithmetic",
        """g (int32[N] x) => (int32[N] y) <int32 a = {2147483647}, int32 b = {2}>
        { r = Add (x, a)
          y = Add (r, b) }""",
        "g (int32[N] x) => (int32[N] y) <int32 a = {-2147483647}> { y = Add (x, a) }",
    ),
    Case(
        "a zero that is added, and signs",
        "simplify-arithmetic",
        """g (float[N] x, float[N] z) => (float[N] y, float[N] v) <float zero = {0}>
        { e = Exp (x)
          a = Add (zero, e)
          n = Neg (z)
          m = Neg (n)
          k = Neg (a)
          y = Add (k, m)
          l = Neg (m)
          v = Sub (a, l) }""",
        """g (float[N] x, float[N] z) => (float[N] y, float[N] v)
        { e = Exp (x)
          y = Sub (z, e)
          v = Add (e, z) }""",
    ),
    Case(
        "a zero that widens stays",
        "simplify-arithmetic",
        "g (float[N] x) => (float[1,N] y) <float[1,1] zero = {0}> { e = Exp (x)\n y = Add (e, zero) }",
    ),
    Case(
        "sums that cancel stay",
        "simplify-arithmetic",
        "g (float[N] x) => (float[N] y) <float a = {1e8}, float b = {-1e8}> { r = Add (x, a)\n y = Add (r, b) }",
        None,
        "matters beyond a rounding",
    ),
    Case(
        "factors that overflow in between stay",
        "simplify-arithmetic",
        "g (float[N] x) => (float[N] y) <float a = {1e38}, float b = {1e-38}> { r = Mul (x, a)\n y = Mul (r, b) }",
        None,
        "matters beyond a rounding",
    ),
    Case(
        "constants that would make a larger one stay",
        "simplify-arithmetic",
        "g (float[2,2] x) => (float[2,2] y) <float[2,1] a = {1, 2}, float[1,2] b = {3, 4}> { r = Add (x, a)\n y = Add (r, b) }",
        None,
        "larger than both",
    ),
    Case(
        "integer division stays",
        "simplify-arithmetic",
        "g (int32[N] x) => (int32[N] y) <int32 a = {3}, int32 b = {2}> { r = Mul (x, a)\n y = Div (r, b) }",
        None,
        "integer division",
    ),
    Case(
        "a product that is added to stays",
        "simplify-arithmetic",
        "g (float[N] x) => (float[N] y) <float a = {3}, float b = {2}> { r = Mul (x, a)\n y = Add (r, b) }",
    ),
    Case(
        "a sum that others read stays",
        "simplify-arithmetic",
        "g (float[N] x) => (float[N] y, float[N] z) <float a = {3}, float b = {2}> { r = Add (x, a)\n y = Add (r, b)\n z = Exp (r) }",
    ),
    Case(
        "maximum of a minimum",
        "fuse-min-max",
        "g (float[N] x) => (float[N] y) <float a = {6}, float b = {-1}> { r = Min (a, x)\n y = Max (r, b) }",
        "g (float[N] x) => (float[N] y) <float b = {-1}, float a = {6}> { y = Clip (x, b, a) }",
    ),
    Case(
        "bounds out of order stay",
        "fuse-min-max",
        "g (float[N] x) => (float[N] y) <float a = {-1}, float b = {6}> { r = Min (a, x)\n y = Max (r, b) }",
    ),
    Case(
        "bounds that are no scalars stay",
        "fuse-min-max",
        "g (float[N] x) => (float[N] y) <float[1] a = {6}, float b = {0}> { r = Min (a, x)\n y = Max (r, b) }",
    ),
    Case(
        "two minima stay",
        "fuse-min-max",
        "g (float[N] x) => (float[N] y) <float a = {6}, float b = {0}> { r = Min (a, x)\n y = Min (r, b) }",
    ),
]


@pytest.mark.parametrize("case", [*CONVS, *PADS, *PRODUCTS, *SUMS], ids=str)
def test_case(case: Case) -> None:
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
