"""``y = Identity(x)``: whoever reads y reads x; where a graph returns y, the producer of x writes y."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Remove Identity nodes.

    One stays where it gives a graph output its name and the value has a name of its own to keep: an input, an initializer,
    another output, or a value of an outer graph.

    Before:
        g (float[2] x) => (float[2] y)
        { a = Relu (x)
          b = Identity (a)
          c = Neg (b)
          y = Identity (c) }
    After:
        g (float[2] x) => (float[2] y)
        { a = Relu (x)
          y = Neg (a) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Identity"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of nodes removed."""
        edit = Editor(model)
        removed = 0
        for node in list(model.nodes()):
            if node.op != "Identity" or not node.is_onnx:
                continue
            source, result = node.inputs[0], node.outputs[0]
            if not edit.can_replace(result, source):
                ctx.remark(node, f"output {result.name!r} needs a name of its own beside {source.name!r}")
                continue
            if not ctx.admit():
                break
            edit.replace_uses(result, source)
            edit.erase(node)
            removed += 1
        edit.commit()
        return removed
