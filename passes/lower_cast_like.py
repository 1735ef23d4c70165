"""CastLike needs the dtype of its second operand and nothing else; torch's dynamo exporter writes one for every constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node, onnx_dtype
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class LowerCastLike(Pass):
    """Turn CastLike into Cast where the dtype of its second operand is known.

    The second operand is often an activation; without it, constants behind the CastLike can be folded.

    Before:
        g (float[2] x, float[2] like) => (float[2] y)
        { r = Relu (x)
          h = Exp (like)
          c = CastLike (r, h)
          y = Neg (c) }
    After:
        g (float[2] x, float[2] like) => (float[2] y)
        { r = Relu (x)
          c = Cast <to = 1> (r)
          y = Neg (c) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"CastLike"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of nodes lowered."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        lowered = 0
        for node in list(model.nodes()):
            if node.op != "CastLike" or not node.is_onnx:
                continue
            dtype = shapes.dtype(node.inputs[1])
            if dtype is None:
                ctx.remark(node, f"the dtype of {node.inputs[1].name!r} is not known")
                continue
            if not ctx.admit():
                break
            attributes = {k: v for k, v in node.attrs.items() if k in ("saturate", "round_mode")}
            result = edit.variable(node.outputs[0].name, node.outputs[0])
            cast = Node("Cast", node.name, {"to": onnx_dtype(dtype), **attributes}, [node.inputs[0]], [result])
            edit.insert_before(node, cast)
            edit.replace_uses(node.outputs[0], result)
            edit.erase(node)
            lowered += 1
        edit.commit()
        return lowered
