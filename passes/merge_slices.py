"""A slice of a slice is one slice: per axis, the positions of one range taken from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from graphopt.analyses.cuts import slice_bounds
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

_END: Final = 1 << 62  # an end, or with a minus a begin, beyond every dimension

Cut = tuple[int, int, int]  # start, end, step, as Slice has them


@dataclass(frozen=True)
class MergeSlices(Pass):
    """Replace a Slice of a Slice by one, where both have constant bounds.

    Before:
        g (float[N,8] x) => (float[N,3] y)
        <int64[1] one = {1}, int64[1] four = {4}, int64[1] seven = {7}>
        { r = Relu (x)
          a = Slice (r, one, seven, one)
          b = Slice (a, one, four, one)
          y = Exp (b) }
    After:
        g (float[N,8] x) => (float[N,3] y)
        <int64[1] start = {2}, int64[1] end = {5}, int64[1] axis = {1}, int64[1] step = {1}>
        { r = Relu (x)
          b = Slice (r, start, end, axis, step)
          y = Exp (b) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Slice"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Slice",), ("Slice",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of pairs merged."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        merged = 0
        for node in list(model.nodes()):
            inner = edit.producer(node.inputs[0]) if _is_slice(node) else None
            if inner is None or not _is_slice(inner):
                continue
            between = node.inputs[0]
            if edit.sole_consumer(between) is not node or edit.graph_of(inner) is not edit.graph_of(node):
                ctx.remark(node, f"{between.name!r} is read by others too")
                continue
            first, second = _cuts(inner, shapes), _cuts(node, shapes)
            if first is None or second is None:
                ctx.remark(node, "the bounds of both slices are not constant")
                continue
            cuts = dict(first)
            for axis, cut in second.items():
                both = _compose(first[axis], cut, inner, axis, shapes) if axis in first else cut
                if both is None:
                    break
                cuts[axis] = both
            else:
                if not ctx.admit():
                    break
                result = node.outputs[0]
                node.outputs.clear()
                new = Node("Slice", node.name, {}, [inner.inputs[0]], [result])
                _write(new, cuts, model, edit)
                edit.insert_before(node, new, origin=(inner, node))
                edit.erase(node)
                edit.erase(inner)
                merged += 1
                continue
            ctx.remark(node, f"both cut axis {axis}, and how depends on its size")
        edit.commit()
        return merged


def _is_slice(node: Node) -> bool:
    return node.op == "Slice" and node.is_onnx


def _cuts(node: Node, shapes: Shapes) -> dict[int, Cut] | None:
    """The bounds by axis, counted from 0; None where one is not known."""
    rank = shapes.rank(node.inputs[0])
    given: Any = slice_bounds(node, shapes)
    if given is None:
        return None
    starts, ends, axes, steps = given
    axes = list(range(len(starts))) if axes is None else [int(a) for a in axes]
    if rank is None and min(axes, default=0) < 0:
        return None
    axes = [a + rank if a < 0 and rank is not None else a for a in axes]
    if len(set(axes)) < len(axes):
        return None
    return dict(zip(axes, zip(starts, ends, steps or [1] * len(axes), strict=True), strict=True))


def _compose(first: Cut, second: Cut, inner: Node, axis: int, shapes: Shapes) -> Cut | None:
    """What `second` leaves of what `first` leaves of an axis, or None where that depends on its size."""
    shape = shapes.shape(inner.inputs[0])
    size = shape[axis] if shape is not None and axis < len(shape) else None
    if isinstance(size, int):
        left = _positions(_positions(range(size), first), second)
        if not len(left):
            return 0, 0, 1
        end = left.stop if left.stop >= 0 else -_END
        return left.start, end, left.step
    (start, end, step), (begin, finish, stride) = first, second
    if step != 1 or stride != 1 or start < 0 or begin < 0:
        return None
    if end >= 0 and finish >= 0:
        return start + begin, min(end, start + finish), 1
    if end >= 1 << 30:  # the rest of the axis, so that a finish from behind is one of the axis
        return start + begin, finish, 1
    return None


def _positions(positions: range, cut: Cut) -> range:
    start, end, step = cut
    return positions[slice(start, None if step < 0 and end < -len(positions) else end, step)]


def _write(node: Node, cuts: dict[int, Cut], model: Model, edit: Editor) -> None:
    columns: list[list[int]] = [
        list(column) for column in zip(*((*cuts[a][:2], a, cuts[a][2]) for a in sorted(cuts)), strict=True)
    ]
    if model.opset < 10:
        node.attrs.update(zip(("starts", "ends", "axes"), columns, strict=False))
        return
    names = ("starts", "ends", "axes", "steps")
    node.inputs.extend(
        [edit.constant(f"{node.name}_{n}", np.array(c, np.int64)) for n, c in zip(names, columns, strict=True)]
    )
