"""Transposes move through whatever computes the same on permuted operands, to where they meet their inverses.

``f(T_p(x)) = T_p(f(x))`` for elementwise f, and with renumbered axes for Concat, Split, Slice, Pad, Softmax, ArgMax, ReduceMax, Squeeze and
the like; ``T_p(x) + c = T_p(x + T_q(c))`` with q the inverse of p, where c is constant and can be stored permuted. Nothing is moved for its own
sake: only where fewer Transposes are left (graphopt/relayout.py says how that is found out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir import Model
from graphopt.pass_base import Context, Pass
from graphopt.relayout import relayout


@dataclass(frozen=True)
class SinkTransposes(Pass):
    """Compute in the layout that needs fewest Transposes; their number never rises.

    A float sum or mean in another order is not the same to the last bit: sink-transposes-through-sums moves through those, too.

    Before:
        g (float[1,2,4,4] x, float[2,2,3,3] w) => (float[1,2,4,4] y)
        <float[2] bias = {1, -1}>
        { a = Transpose <perm = [0, 2, 3, 1]> (x)
          b = Add (a, bias)
          c = Relu (b)
          d = Transpose <perm = [0, 3, 1, 2]> (c)
          y = Conv <pads = [1, 1, 1, 1]> (d, w) }
    After:
        g (float[1,2,4,4] x, float[2,2,3,3] w) => (float[1,2,4,4] y)
        <float[1,2,1,1] bias = {1, -1}>
        { b = Add (x, bias)
          c = Relu (b)
          y = Conv <pads = [1, 1, 1, 1]> (c, w) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})

    def run(self, model: Model, ctx: Context) -> int:
        """Choose layouts until nothing improves; returns the number of regions rewritten."""
        return relayout(model, ctx, sums=False)
