"""Dead code elimination: liveness from the graph outputs backwards, through bodies and their captures."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.edit import remove_dead, sort
from graphopt.ir import Model
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Remove nodes whose results nobody reads and initializers that nothing uses.

    Graph inputs stay, used or not: they are the contract with callers.

    Before:
        g (float[2] x) => (float[2] y)
        <float[1] unused = {1}>
        { y = Relu (x)
          z = Neg (x) }
    After:
        g (float[2] x) => (float[2] y)
        { y = Relu (x) }
    """

    def run(self, model: Model, ctx: Context) -> int:
        """Sweep once; returns nodes plus initializers removed."""
        if not ctx.admit():
            return 0
        for graph in model.graphs():
            sort(graph)
        return remove_dead(model)
