"""sink-transposes, through float sums as well: the elements of each sum stay the same, their order does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir import Model
from graphopt.pass_base import Context, Exactness, Pass
from graphopt.relayout import relayout


@dataclass(frozen=True)
class SinkTransposesThroughSums(Pass):
    """Compute in the layout that needs fewest Transposes, where ReduceMean, ReduceSum and the like may sum in another order.

    Before:
        g (float[1,2,4,4] x) => (float[1,2] y)
        <int64[2] axes = {1, 2}>
        { a = Transpose <perm = [0, 2, 3, 1]> (x)
          b = Relu (a)
          y = ReduceMean <keepdims = 0> (b, axes) }
    After:
        g (float[1,2,4,4] x) => (float[1,2] y)
        <int64[2] axes = {2, 3}>
        { b = Relu (x)
          y = ReduceMean <keepdims = 0> (b, axes) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})

    def run(self, model: Model, ctx: Context) -> int:
        """Choose layouts until nothing improves; returns the number of regions rewritten."""
        return relayout(model, ctx, sums=True)
