"""``gather(gather(x, i), j) = gather(x, i[j])`` along one axis, for constant indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place


@dataclass(frozen=True)
class MergeGathers(Pass):
    """Replace a Gather of a Gather along the same axis by one.

    Before:
        g (float[N,8] x) => (float[N] y)
        <int64[3] i = {1, 5, -1}, int64 j = {2}>
        { a = Gather <axis = 1> (x, i)
          y = Gather <axis = 1> (a, j) }
    After:
        g (float[N,8] x) => (float[N] y)
        <int64 both = {-1}>
        { y = Gather <axis = 1> (x, both) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Gather"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Gather",), ("Gather",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of pairs merged."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        merged = 0
        for node in list(model.nodes()):
            first = edit.producer(node.inputs[0]) if node.op == "Gather" and node.is_onnx else None
            if first is None or first.op != "Gather" or not first.is_onnx:
                continue
            reason = _objection(first, node, shapes, edit)
            if reason is not None:
                ctx.remark(node, reason)
                continue
            if not ctx.admit():
                break
            indices = np.asarray(first.inputs[1].values)[np.asarray(node.inputs[1].values)]
            both = edit.constant(node.inputs[1].name, np.asarray(indices, first.inputs[1].dtype))
            new = Node("Gather", "merged", dict(first.attrs), [first.inputs[0], both])
            edit.take_over(node.outputs[0], new, (first, node))
            edit.erase(first)
            merged += 1
        edit.commit()
        return merged


def _objection(first: Node, node: Node, shapes: Shapes, edit: Editor) -> str | None:
    between, rank = node.inputs[0], shapes.rank(node.inputs[0])
    if edit.sole_consumer(between) is not node or edit.graph_of(first) is not edit.graph_of(node):
        return f"{between.name!r} is read by others too"
    outer, inner = node.inputs[1], first.inputs[1]
    if not edit.is_fixed(outer) or not edit.is_fixed(inner) or len(inner.shape) != 1:
        return "the indices of both are not constant, or the first gathers by more than a vector"
    axes = [int(n.attrs.get("axis", 0)) for n in (first, node)]
    if axes[0] != axes[1] and (rank is None or axes[0] % rank != axes[1] % rank):
        return "they gather along different axes"
    count, places = inner.shape[0], np.asarray(outer.values)
    if places.size and not (-count <= places.min() and places.max() < count):
        return "an index of the second lies outside of what the first leaves"
    return None
