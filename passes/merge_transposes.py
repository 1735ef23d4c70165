"""``T_q(T_p(x))`` is one Transpose by ``[p[i] for i in q]``, and x where that is in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.layouts import compose, identity, permutation
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place


@dataclass(frozen=True)
class MergeTransposes(Pass):
    """Turn two Transposes in a row into one, or none where they cancel.

    Where others read the value between them, the two are left alone unless they cancel: one Transpose would only take the place of another.

    Before:
        g (float[2,3,4] x) => (float[3,2,4] y, float[2,3,4] z)
        { a = Transpose <perm = [2, 0, 1]> (x)
          b = Transpose <perm = [2, 1, 0]> (a)
          y = Relu (b)
          c = Transpose <perm = [1, 2, 0]> (a)
          z = Relu (c) }
    After:
        g (float[2,3,4] x) => (float[3,2,4] y, float[2,3,4] z)
        { b = Transpose <perm = [1, 0, 2]> (x)
          y = Relu (b)
          z = Relu (x) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Transpose",), ("Transpose",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """Sweep until nothing changes: a pair that cancels may free the first of another; returns the number of pairs."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        total = 0
        while True:
            merged = 0
            for node in [n for n in model.nodes() if n.op == "Transpose"]:
                if not edit.is_erased(node) and self._merge(node, shapes, edit, ctx):
                    merged += 1
            edit.commit()
            total += merged
            if not merged:
                return total

    def _merge(self, node: Node, shapes: Shapes, edit: Editor, ctx: Context) -> bool:
        first = edit.producer(node.inputs[0])
        perm = permutation(node, shapes)
        if first is None or first.op != "Transpose" or perm is None:
            return False
        inner = permutation(first, shapes)
        if inner is None or len(inner) != len(perm):
            return False
        both = compose(inner, perm)
        source, result = first.inputs[0], node.outputs[0]
        cancels = both == identity(len(both))
        if not cancels and edit.sole_consumer(node.inputs[0]) is not node:
            ctx.remark(node, f"{node.inputs[0].name!r}, which it transposes again, has other readers")
            return False
        if not ctx.admit():
            return False
        if cancels and edit.can_replace(result, source):
            edit.replace_uses(result, source)
        else:
            kind, attributes = ("Identity", {}) if cancels else ("Transpose", {"perm": list(both)})
            made = edit.variable(result.name, result)
            edit.insert_before(node, Node(kind, node.name, attributes, [source], [made]), origin=(first, node))
            edit.replace_uses(result, made)
        edit.erase(node)
        if not first.outputs[0].outputs and not edit.is_output(first.outputs[0]):
            edit.erase(first)
        return True
