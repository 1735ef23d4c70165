"""``max(min(x, high), low)`` and ``min(max(x, low), high)`` are ``clip(x, low, high)`` for low <= high.

All but bitwise: which zero comes out where x and a bound are zeros of different sign is up to the kernel of Min and Max.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Exactness
from graphopt.rewrite import Match, Op, RewritePass, const, op


@dataclass(frozen=True)
class FuseMinMax(RewritePass):
    """Turn Min and Max with constant scalars into Clip.

    Before:
        g (float[N] x) => (float[N] y)
        <float low = {0}, float high = {6}>
        { a = Max (x, low)
          y = Min (high, a) }
    After:
        g (float[N] x) => (float[N] y)
        <float low = {0}, float high = {6}>
        { y = Clip (x, low, high) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    pattern: ClassVar[Op] = op(
        ("Min", "Max"),
        op(("Max", "Min"), "x", const("inner"), name="first", commutative=True),
        const("outer"),
        name="second",
        commutative=True,
    )

    def check(self, match: Match, model: Model) -> str | None:
        """Why the two are no Clip, or None."""
        if match.nodes["first"].op == match.nodes["second"].op:
            return "both bound the same side"
        if model.opset < 11:
            return f"Clip of opset {model.opset} has no operands for bounds"
        low, high = _bounds(match)
        if low.values.ndim or high.values.ndim:
            return "a bound is no scalar, so it might widen the operand"
        if low.values.dtype.kind != "f" or high.values.dtype != low.values.dtype:
            return f"bounds are {low.dtype}, fusing is for float16, float32 and float64"
        if not bool(low.values <= high.values):
            return f"bounds {low.name!r} and {high.name!r} are not in order"
        return None

    def rewrite(self, match: Match, edit: Editor) -> gs.Tensor:
        """Insert the Clip."""
        first, second = match.nodes["first"], match.nodes["second"]
        low, high = _bounds(match)
        result = edit.variable(second.outputs[0].name, second.outputs[0])
        edit.insert_after(
            second, Node("Clip", second.name, {}, [match["x"], low, high], [result]), origin=(first, second)
        )
        return result


def _bounds(match: Match) -> tuple[gs.Constant, gs.Constant]:
    inner, outer = match["inner"], match["outer"]
    return (inner, outer) if match.nodes["first"].op == "Max" else (outer, inner)
