"""One element of an axis is gathered with the axis by an index in a vector, and without it by a scalar; a reshape between the two is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

_RESHAPES = ("Squeeze", "Unsqueeze", "Reshape")


@dataclass(frozen=True)
class FuseGatherUnsqueeze(Pass):
    """Fold an Unsqueeze, Squeeze or Reshape behind a Gather of one element into the rank of its index.

    Before:
        g (float[N,3] x) => (float[N,1] y, float[N] z)
        <int64 one = {1}, int64[1] two = {2}, int64[1] axis = {1}>
        { a = Gather <axis = 1> (x, one)
          y = Unsqueeze (a, axis)
          b = Gather <axis = 1> (x, two)
          z = Squeeze (b, axis) }
    After:
        g (float[N,3] x) => (float[N,1] y, float[N] z)
        <int64[1] one = {1}, int64 two = {2}>
        { y = Gather <axis = 1> (x, one)
          z = Gather <axis = 1> (x, two) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Gather"})
    places: ClassVar[tuple[Place, ...]] = (Place(_RESHAPES, ("Gather",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of reshapes folded."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            gather = edit.producer(node.inputs[0]) if node.op in _RESHAPES and node.is_onnx else None
            if gather is None or gather.op != "Gather" or not gather.is_onnx:
                continue
            rank = _rank(gather, node, shapes, edit)
            if isinstance(rank, str):
                ctx.remark(node, rank)
                continue
            if not ctx.admit():
                break
            index = np.asarray(gather.inputs[1].values).reshape((1,) * rank)
            operands = [gather.inputs[0], edit.constant(gather.inputs[1].name, index)]
            edit.take_over(node.outputs[0], Node("Gather", "gather", dict(gather.attrs), operands), (gather, node))
            edit.erase(gather)
            fused += 1
        edit.commit()
        return fused


def _rank(gather: Node, node: Node, shapes: Shapes, edit: Editor) -> int | str:
    """The rank of the index by which the Gather gives what `node` does, or why there is none."""
    index, source, result = gather.inputs[1], shapes.shape(gather.inputs[0]), shapes.shape(node.outputs[0])
    if edit.sole_consumer(node.inputs[0]) is not node or edit.graph_of(gather) is not edit.graph_of(node):
        return f"{node.inputs[0].name!r} is read by others too"
    if not edit.is_fixed(index) or index.values.size != 1:
        return f"{gather.name!r} does not take one element by a constant index"
    if not source or result is None:
        return f"the shape of {gather.inputs[0].name!r} is not known"
    axis = int(gather.attrs.get("axis", 0)) % len(source)
    for rank in (0, 1):
        if result == (*source[:axis], *(1,) * rank, *source[axis + 1 :]):
            return rank
    return f"it does more than to add or drop axis {axis}"
