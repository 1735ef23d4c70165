"""What a Slice leaves of its operand, where it cuts one axis into neighbouring elements."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.ir import Node


def slice_bounds(node: Node, shapes: Shapes) -> list[list[int] | None] | None:
    """Starts, ends, axes and steps of a Slice as they are written, None for those it does not give; None altogether where one is not known."""
    if "starts" in node.attrs:
        return [
            [int(v) for v in node.attrs[name]] if name in node.attrs else None for name in ("starts", "ends", "axes")
        ] + [None]
    given: list[list[int] | None] = [None] * 4
    for place, tensor in enumerate(node.inputs[1:5]):
        if tensor.name:
            known = shapes.integers(tensor)
            if known is None:
                return None
            given[place] = [int(v) for v in known.reshape(-1)]
    return given


def cut(node: gs.Node, shapes: Shapes) -> tuple[int, int, int] | None:
    """Axis, start and end of a Slice along one axis by step 1, with ``0 <= axis`` and ``0 <= start < end``.

    Where the size of the axis is a number, bounds are brought into it; where it is a symbol, the end may lie beyond it. None: another
    node, more axes or steps, bounds that are not known or count from the end of a symbol, or nothing is left.
    """
    shape = shapes.shape(node.inputs[0]) if node.op == "Slice" and node.domain in (None, "", "ai.onnx") else None
    bounds: Any = slice_bounds(node, shapes) if shape else None  # a scalar cannot be sliced
    if not shape or bounds is None:
        return None
    starts, ends, axes, steps = bounds
    if len(starts) != 1 or len(ends) != 1 or (steps or [1]) != [1]:
        return None
    axis = (axes or [0])[0] % len(shape)
    size = shape[axis]
    start, end = starts[0], ends[0]
    if isinstance(size, int):
        start, end, _ = slice(start, end).indices(size)
    return (axis, start, end) if 0 <= start < end else None
