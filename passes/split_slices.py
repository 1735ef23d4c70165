"""Slices of one tensor that lie side by side and cover it are the outputs of one Split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.cuts import cut
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class SplitSlices(Pass):
    """Replace Slices that tile a tensor along one axis by one Split.

    Before:
        g (float[N,6] x) => (float[N,2] y, float[N,4] z)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] six = {6}>
        { y = Slice (x, zero, two, one)
          z = Slice (x, two, six, one) }
    After:
        g (float[N,6] x) => (float[N,2] y, float[N,4] z)
        <int64[2] sizes = {2, 4}>
        { y, z = Split <axis = 1> (x, sizes) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Slice"})

    @classmethod
    def objection(cls, node: gs.Node, edit: Editor, shapes: Shapes) -> str | None:
        """What the Slices of the same tensor leave out, or where they overlap."""
        if node.op != "Slice" or node.domain not in (None, "", "ai.onnx"):
            return None
        found = cut(node, shapes)
        if found is None:
            return "it does not cut one axis of known rank, by step 1 and bounds that are known"
        axis, source = found[0], node.inputs[0]
        cuts = [other for reader in source.outputs if (other := cut(reader, shapes)) is not None and other[0] == axis]
        parts = ", ".join(f"{start}:{end}" for _, start, end in sorted(cuts))
        size = (shapes.shape(source) or {axis: "?"})[axis]
        return f"the Slices of {source.name!r} along axis {axis}, which has {size} elements, do not tile it: {parts}"

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of Splits made."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        made = 0
        groups: dict[tuple[int, int, int], list[tuple[int, int, Node]]] = {}
        for node in model.nodes():
            found = cut(node, shapes)
            if found is not None:
                axis, start, end = found
                key = (id(edit.graph_of(node)), id(node.inputs[0]), axis)
                groups.setdefault(key, []).append((start, end, node))
        for (_, _, axis), parts in groups.items():
            tiles = _tiles(parts, axis, shapes)
            if tiles is None or model.opset < 2:
                continue
            if not ctx.admit():
                break
            source, anchor = tiles[0].inputs[0], parts[0][2]
            results = [n.outputs[0] for n in tiles]
            sizes = [end - start for start, end, _ in sorted(parts, key=lambda p: p[:2])]
            for node in tiles:
                node.outputs.clear()
            operands: list[gs.Tensor] = [source]
            attributes: dict[str, object] = {"axis": axis}
            if model.opset >= 13:
                operands.append(edit.constant(f"{source.name}_sizes", np.array(sizes, np.int64)))
            else:
                attributes["split"] = sizes
            edit.insert_before(anchor, Node("Split", anchor.name, attributes, operands, results), origin=tiles)
            for node in tiles:
                edit.erase(node)
            made += 1
        edit.commit()
        return made


def _tiles(parts: list[tuple[int, int, Node]], axis: int, shapes: Shapes) -> list[Node] | None:
    """The Slices in the order of their starts, where they cover the axis and do not overlap."""
    if len(parts) < 2:
        return None
    ordered = sorted(parts, key=lambda p: p[:2])
    shape = shapes.shape(ordered[0][2].inputs[0])
    assert shape is not None
    at = 0
    for start, end, _ in ordered:
        if start != at:
            return None
        at = end
    return [n for _, _, n in ordered] if at == shape[axis] else None
