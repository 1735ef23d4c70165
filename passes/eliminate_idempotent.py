"""``f(f(x)) = f(x)`` for the operators that round, take the magnitude or the sign: the second one sees a value it leaves alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.pass_base import Context, Pass, Place

_ROUNDING: Final = ("Floor", "Ceil", "Round")


@dataclass(frozen=True)
class EliminateIdempotent(Pass):
    """Remove the second of two equal Abs, Sign, Floor, Ceil or Round, and any rounding of what is rounded.

    Before:
        g (float[N] x) => (float[N] y)
        { a = Floor (x)
          b = Round (a)
          y = Exp (b) }
    After:
        g (float[N] x) => (float[N] y)
        { a = Floor (x)
          y = Exp (a) }
    """

    places: ClassVar[tuple[Place, ...]] = (
        Place(("Abs",), ("Abs",)),
        Place(("Sign",), ("Sign",)),
        Place(_ROUNDING, _ROUNDING),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of nodes removed."""
        edit = Editor(model)
        removed = 0
        for node in list(model.nodes()):
            if node.op not in ("Abs", "Sign", *_ROUNDING) or not node.is_onnx:
                continue
            source, result = node.inputs[0], node.outputs[0]
            inner = edit.producer(source)
            if inner is None or not inner.is_onnx:
                continue
            if inner.op != node.op and not (inner.op in _ROUNDING and node.op in _ROUNDING):
                continue
            if not edit.can_replace(result, source):
                ctx.remark(node, f"changes nothing, but gives output {result.name!r} its name")
                continue
            if not ctx.admit():
                break
            edit.replace_uses(result, source)
            edit.erase(node)
            removed += 1
        edit.commit()
        return removed
