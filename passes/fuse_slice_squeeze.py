"""One element of an axis, cut out by Slice or Split and squeezed, is a Gather with a scalar index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place


@dataclass(frozen=True)
class FuseSliceSqueeze(Pass):
    """Turn a Slice of one element and its Squeeze into Gather; a Split, when all its outputs are such.

    Before:
        g (float[3,N] x) => (float[N] y)
        <int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0}>
        { a = Slice (x, one, two, zero)
          y = Squeeze (a, zero) }
    After:
        g (float[3,N] x) => (float[N] y)
        <int64 one = {1}>
        { y = Gather <axis = 0> (x, one) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Slice", "Split"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Slice", "Split"), read_by=("Squeeze", "Reshape")),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of Slices and Splits replaced."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op not in ("Slice", "Split") or not node.is_onnx:
                continue
            cut = _cut(node, shapes)
            if cut is None:
                continue
            axis, first = cut
            readers = [edit.sole_consumer(t) for t in node.outputs]
            if not all(r is not None and _drops(r, node, axis, shapes, edit) for r in readers):
                ctx.remark(node, f"not every part is read by one Squeeze of axis {axis} alone")
                continue
            if not ctx.admit():
                break
            source = node.inputs[0]
            squeezes = [r for r in readers if r is not None]
            for place, squeeze in enumerate(squeezes):
                results = list(squeeze.outputs)
                squeeze.outputs.clear()
                index: gs.Tensor = edit.constant(f"{results[0].name}_index", np.array(first + place, np.int64))
                gather = Node("Gather", squeeze.name, {"axis": axis}, [source, index], results)
                edit.insert_before(squeeze, gather, origin=(node, squeeze))
                edit.erase(squeeze)
            edit.erase(node)
            fused += 1
        edit.commit()
        return fused


def _cut(node: Node, shapes: Shapes) -> tuple[int, int] | None:
    """The axis along which every output has one element, and the place of the first; the others are equal to the input's."""
    source = shapes.shape(node.inputs[0])
    if source is None:
        return None
    axes = [i for i, d in enumerate(source) if d != 1 and all(_is_one(shapes, t, i, len(source)) for t in node.outputs)]
    if len(axes) != 1:
        return None
    axis = axes[0]
    if node.op == "Split":
        return (axis, 0) if axis == int(node.attrs.get("axis", 0)) % len(source) else None
    if "starts" in node.attrs:
        starts, given = list(node.attrs["starts"]), list(node.attrs.get("axes") or [])
    else:
        known = shapes.integers(node.inputs[1])
        chosen = shapes.integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3].name else np.empty(0)
        if known is None or chosen is None:
            return None
        starts, given = known.reshape(-1).tolist(), chosen.reshape(-1).tolist()
    given = given or list(range(len(starts)))
    if len(starts) != 1 or int(given[0]) % len(source) != axis:
        return None
    start, size = int(starts[0]), source[axis]
    if isinstance(size, int):
        return axis, min(max(start + size if start < 0 else start, 0), size - 1)
    # One element is left for sure, so a start from the front, or the last element, lies inside.
    return (axis, start) if start >= 0 or start == -1 else None


def _is_one(shapes: Shapes, tensor: gs.Tensor, axis: int, rank: int) -> bool:
    shape = shapes.shape(tensor)
    return shape is not None and len(shape) == rank and shape[axis] == 1


def _drops(reader: Node, node: Node, axis: int, shapes: Shapes, edit: Editor) -> bool:
    """Whether `reader` takes `axis` out of its operand and does nothing else."""
    if (
        reader.op not in ("Squeeze", "Reshape")
        or not reader.is_onnx
        or edit.graph_of(reader) is not edit.graph_of(node)
    ):
        return False
    source, result = shapes.shape(node.inputs[0]), shapes.shape(reader.outputs[0])
    return source is not None and result == (*source[:axis], *source[axis + 1 :])
