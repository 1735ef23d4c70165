"""A call of a model-local function is the function's body, with the call's operands for its inputs and the call's attributes in it."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.analyses.inlining import inline_calls
from graphopt.ir import Model
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Put the body of a model-local function in place of each call.

    Functions that call themselves, or need other opsets than the model's, are left alone. The functions stay in the model;
    eliminate-unused removes those that nobody calls.

    Before:
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[2] x) => (float[2] y)
        { a = local.Scaled <alpha = 0.5> (x)
          y = Relu (a) }
        <domain: "local", opset_import: ["" : 21]>
        Scaled <alpha> (v) => (w)
        { e = Elu <alpha: float = @alpha> (v)
          w = Neg (e) }
    After:
        g (float[2] x) => (float[2] y)
        { e = Elu <alpha = 0.5> (x)
          w = Neg (e)
          y = Relu (w) }
    """

    def run(self, model: Model, ctx: Context) -> int:
        """Inline until no call is left that can be; returns the number of calls replaced."""
        return inline_calls(model, ctx)
