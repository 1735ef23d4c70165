"""An elementwise operator broadcasts by itself: ``x + expand(z, shape of x) = x + z``.

The result must have the shape of another operand of the reader, surely. Then every operand broadcasts into that shape, and so does what
an Expand made wider; without it the result is the same, number by number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_graphsurgeon as gs

from graphopt.analyses.channels_elementwise import BROADCASTING
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

# Not PRelu, whose slope alone broadcasts, nor Pow, which runtimes compute another way where the exponent is one number.
_BROADCASTING: Final = frozenset(BROADCASTING) - {"PRelu", "Pow"}


@dataclass(frozen=True)
class EliminateExpand(Pass):
    """Remove an Expand whose readers broadcast its operand by themselves.

    Before:
        g (float[N,3] x, float[3] z) => (float[N,3] y)
        { s = Shape (x)
          e = Expand (z, s)
          y = Add (x, e) }
    After:
        g (float[N,3] x, float[3] z) => (float[N,3] y)
        { y = Add (x, z) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Expand"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Expand",), read_by=tuple(sorted(_BROADCASTING))),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of nodes removed."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        removed = 0
        for node in list(model.nodes()):
            if node.op != "Expand" or not node.is_onnx:
                continue
            source, result = node.inputs[0], node.outputs[0]
            if not result.outputs or not edit.can_replace(result, source) or edit.is_output(result):
                continue
            needing = next((n for n in result.outputs if not _broadcasts(n, result, shapes)), None)
            if needing is not None:
                ctx.remark(
                    node,
                    f"{needing.name!r} ({needing.op}) needs it: nothing else it reads surely has the shape of its result",
                )
                continue
            if not ctx.admit():
                break
            edit.replace_uses(result, source)
            edit.erase(node)
            removed += 1
        edit.commit()
        return removed


def _broadcasts(reader: Node, expanded: gs.Tensor, shapes: Shapes) -> bool:
    """Whether the result of `reader` surely has the shape of another operand than `expanded`."""
    if reader.op not in _BROADCASTING or not reader.is_onnx:
        return False
    shape = shapes.shape(reader.outputs[0])
    return shape is not None and any(t is not expanded and shapes.shape(t) == shape for t in reader.inputs)
