"""Pads of one value add up, and so do Pads that repeat the edge: what the second repeats is what the first did.

Both must only add, or only (with a constant) take away: elements that the first takes away, the second cannot bring back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MergePads(Pass):
    """Replace a Pad of a Pad by one.

    Before:
        g (float[N,4] x) => (float[N,9] y)
        <int64[4] p = {0, 1, 0, 0}, int64[4] q = {0, 1, 0, 3}>
        { a = Pad (x, p)
          y = Pad (a, q) }
    After:
        g (float[N,4] x) => (float[N,9] y)
        <int64[4] both = {0, 2, 0, 3}>
        { y = Pad (x, both) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Pad"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Pad",), ("Pad",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of pairs merged."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        merged = 0
        for node in list(model.nodes()):
            first = edit.producer(node.inputs[0]) if node.op == "Pad" and node.is_onnx else None
            if first is None or first.op != "Pad" or not first.is_onnx:
                continue
            reason = _objection(first, node, shapes, edit)
            pads = [p for n in (first, node) if (p := _pads(n, shapes)) is not None]
            reason = reason or _mixed(pads, node.attrs.get("mode", "constant"))
            if reason is not None:
                ctx.remark(node, reason)
                continue
            if not ctx.admit():
                break
            _merge(first, node, pads[0] + pads[1], model.opset, edit)
            merged += 1
        edit.commit()
        return merged


def _objection(first: Node, node: Node, shapes: Shapes, edit: Editor) -> str | None:
    if edit.sole_consumer(node.inputs[0]) is not node or edit.graph_of(first) is not edit.graph_of(node):
        return f"{node.inputs[0].name!r} is read by others too"
    modes = [n.attrs.get("mode", "constant") for n in (first, node)]
    if modes[0] != modes[1] or modes[0] not in ("constant", "edge"):
        return f"modes {modes[0]!r} and {modes[1]!r} do not add up"
    values = [_value(n, edit) for n in (first, node)]
    if modes[0] == "constant" and (None in values or values[0] != values[1]):
        return "they pad with different values, or with some that are not constant"
    return None


def _mixed(pads: list[Array], mode: str) -> str | None:
    if len(pads) < 2:
        return "what both add is not known"
    less, more = any((p < 0).any() for p in pads), any((p > 0).any() for p in pads)
    if less and mode == "edge":
        return "an edge that is taken away is not the one that is repeated"
    return "one adds what the other takes away" if less and more else None


def _value(node: Node, edit: Editor) -> bytes | None:
    """The bits of the number that is padded with, so that zeros differ by their sign; None where it is not constant."""
    if len(node.inputs) > 2 and node.inputs[2].name:
        tensor = node.inputs[2]
        if not edit.is_fixed(tensor) or tensor.values.size != 1 or tensor.values.dtype.kind not in "fiub":
            return None
        return bytes(tensor.values.tobytes()).rstrip(b"\0")
    return np.float32(node.attrs.get("value", 0.0)).tobytes().rstrip(b"\0")


def _pads(node: Node, shapes: Shapes) -> Array | None:
    """Begins and ends of all axes; None where they are not known."""
    given = node.attrs.get("pads")
    known = (
        np.array(given, np.int64) if given is not None else shapes.integers(node.inputs[1]) if node.inputs[1:] else None
    )
    if known is None or len(node.inputs) < 4 or not node.inputs[3].name:
        return known
    axes, rank = shapes.integers(node.inputs[3]), shapes.rank(node.inputs[0])
    if axes is None or rank is None:
        return None
    full = np.zeros(2 * rank, np.int64)
    places = [int(a) % rank for a in axes.reshape(-1)]
    full[[*places, *(p + rank for p in places)]] = known
    return full


def _merge(first: Node, node: Node, pads: Array, opset: int, edit: Editor) -> None:
    attributes = dict(node.attrs)
    operands: list[gs.Tensor] = [first.inputs[0]]
    if opset < 11:
        attributes["pads"] = pads.tolist()
    else:
        operands.append(edit.constant(f"{node.name}_pads", pads.astype(np.int64)))
        if len(node.inputs) > 2 and node.inputs[2].name:
            operands.append(node.inputs[2])
    edit.take_over(node.outputs[0], Node("Pad", "merged", attributes, operands), (first, node))
    edit.erase(first)
