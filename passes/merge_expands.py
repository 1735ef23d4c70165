"""Broadcasting is associative, and repetitions multiply:

expand(expand(x, p), q) = expand(x, broadcast(p, q))        and expand(x, q) where q surely is the shape of the result
tile(tile(x, p), q) = tile(x, p * q)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

Array = np.ndarray[Any, Any]
_MOST = (1 << 63) - 1  # an int64


@dataclass(frozen=True)
class MergeExpands(Pass):
    """Replace an Expand of an Expand, or a Tile of a Tile, by one.

    Before:
        g (float[3] x, float[N,4,3] z) => (float[N,4,3] y)
        <int64[2] p = {4, 3}>
        { a = Expand (x, p)
          s = Shape (z)
          y = Expand (a, s) }
    After:
        g (float[3] x, float[N,4,3] z) => (float[N,4,3] y)
        { s = Shape (z)
          y = Expand (x, s) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Expand", "Tile"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Expand",), ("Expand",)), Place(("Tile",), ("Tile",)))

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of pairs merged."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        merged = 0
        for node in list(model.nodes()):
            first = edit.producer(node.inputs[0]) if node.op in ("Expand", "Tile") and node.is_onnx else None
            if first is None or first.op != node.op or not first.is_onnx or len(node.inputs) != 2:
                continue
            if edit.sole_consumer(node.inputs[0]) is not node or edit.graph_of(first) is not edit.graph_of(node):
                ctx.remark(node, f"{node.inputs[0].name!r} is read by others too")
                continue
            target = (_expanded if node.op == "Expand" else _repeated)(first, node, shapes)
            if isinstance(target, str):
                ctx.remark(node, target)
                continue
            if not ctx.admit():
                break
            operand = target if isinstance(target, gs.Tensor) else edit.constant(node.inputs[1].name, target)
            edit.take_over(node.outputs[0], Node(node.op, "merged", {}, [first.inputs[0], operand]), (first, node))
            edit.erase(first)
            merged += 1
        edit.commit()
        return merged


def _expanded(first: Node, node: Node, shapes: Shapes) -> gs.Tensor | Array | str:
    value, result = shapes.value(node.inputs[1]), shapes.shape(node.outputs[0])
    if value is not None and result is not None and tuple(value) == result:
        return node.inputs[1]
    known = [shapes.integers(n.inputs[1]) for n in (first, node)]
    if known[0] is None or known[1] is None:
        return f"{node.inputs[1].name!r} is not surely the shape of the result"
    try:
        return np.array(np.broadcast_shapes(tuple(known[0]), tuple(known[1])), np.int64)
    except ValueError:
        return "the two shapes contradict each other"


def _repeated(first: Node, node: Node, shapes: Shapes) -> Array | str:
    known = [shapes.integers(n.inputs[1]) for n in (first, node)]
    if known[0] is None or known[1] is None or known[0].shape != known[1].shape:
        return "how often both repeat is not known"
    products = [int(a) * int(b) for a, b in zip(known[0], known[1], strict=True)]
    if math.prod(products) > _MOST:
        return "that many repetitions are no number of 64 bits"
    return np.array(products, np.int64)
