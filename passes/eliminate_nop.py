"""Nodes that return an operand unchanged, by the facts of the shape analysis.

Exact only: ``x + 0.0`` is not among them for floating point, since ``-0.0 + 0.0`` is ``0.0``; ``x - 0.0`` and ``x * 1.0`` are.
A binary operator counts only where dtype and shape of the result are surely those of the operand (the other one must not broadcast it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node, onnx_dtype
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class EliminateNop(Pass):
    """Remove nodes that change nothing.

    Cast to the same dtype, Reshape and Expand to the same shape, Transpose in order, Slice of everything, Pad by nothing, Concat and
    Split of one, Gather of all in order, ScatterND of every row, Dropout, x * 1, and the like.

    Before:
        g (float[N,3] x) => (float[N,3] y)
        <float[1] one = {1}, int64[2] start = {0, 0}, int64[2] end = {9223372036854775807, 3}>
        { a = Relu (x)
          b = Cast <to = 1> (a)
          c = Transpose <perm = [0, 1]> (b)
          d = Slice (c, start, end)
          e = Mul (d, one)
          y = Exp (e) }
    After:
        g (float[N,3] x) => (float[N,3] y)
        { a = Relu (x)
          y = Exp (a) }
    """

    @classmethod
    def objection(cls, node: gs.Node, edit: Editor, shapes: Shapes) -> str | None:
        """What a node of its operator needs to change nothing."""
        needed = _NEEDED.get(node.op)
        return (
            f"it would change nothing only if {needed}"
            if needed is not None and node.domain in (None, "", "ai.onnx")
            else None
        )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of nodes removed."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        removed = 0
        for node in list(model.nodes()):
            rule = _RULES.get(node.op)
            if rule is None or not node.is_onnx or not node.outputs or not node.inputs:
                continue
            if any(t.outputs or edit.is_output(t) for t in node.outputs[1:]):
                continue
            source = rule(node, shapes, edit)
            if source is None:
                continue
            result = node.outputs[0]
            if not edit.can_replace(result, source):
                ctx.remark(node, f"changes nothing, but gives output {result.name!r} its name")
                continue
            if not ctx.admit():
                break
            edit.replace_uses(result, source)
            edit.erase(node)
            removed += 1
        edit.commit()
        return removed


Rule = Callable[[Node, Shapes, Editor], "gs.Tensor | None"]


def _same_shape(node: Node, source: gs.Tensor, shapes: Shapes) -> bool:
    """Whether result and source surely have one dtype and shape."""
    mine, other = shapes.info(node.outputs[0]), shapes.info(source)
    return mine.shape is not None and mine.shape == other.shape and mine.dtype is not None and mine.dtype == other.dtype


def _if_same_shape(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """Reshape, Expand, Tile, Flatten, Squeeze, Unsqueeze: they keep the order of elements, so an equal shape is an equal tensor."""
    return node.inputs[0] if _same_shape(node, node.inputs[0], shapes) else None


def _cast(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    dtype = shapes.dtype(node.inputs[0])
    return node.inputs[0] if dtype is not None and onnx_dtype(dtype) == node.attrs.get("to") else None


def _transpose(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    perm, rank = node.attrs.get("perm"), shapes.rank(node.inputs[0])
    if perm is None:
        return node.inputs[0] if rank is not None and rank <= 1 else None
    return node.inputs[0] if list(perm) == sorted(perm) else None


def _slice(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    steps = [1]
    if len(node.inputs) > 4 and node.inputs[4].name:
        known = shapes.integers(node.inputs[4])
        if known is None:
            return None
        steps = known.reshape(-1).tolist()
    return _if_same_shape(node, shapes, edit) if all(s == 1 for s in steps) else None


def _pad(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    pads = node.attrs.get("pads")
    if pads is None:
        known = shapes.integers(node.inputs[1]) if len(node.inputs) > 1 else None
        if known is None:
            return None
        pads = known.reshape(-1).tolist()
    return node.inputs[0] if not any(pads) else None


def _only_operand(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """Concat, Sum, Max, Min, Mean of one tensor."""
    return node.inputs[0] if len(node.inputs) == 1 else None


def _split(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    return _if_same_shape(node, shapes, edit) if len(node.outputs) == 1 else None


def _dropout(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """Inference mode: by definition before opset 12, unless training_mode is given and true after."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return node.inputs[0]
    training = shapes.integers(node.inputs[2])
    return node.inputs[0] if training is not None and not training.any() else None


def _resize(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """To the same size by the half_pixel family of coordinate maps every element falls on itself."""
    maps = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
    if node.attrs.get("coordinate_transformation_mode", "half_pixel") not in maps:
        return None
    shape = shapes.shape(node.inputs[0])
    if shape is None or node.attrs.get("mode", "nearest") == "cubic" or node.attrs.get("antialias", 0):
        return None
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    if scales is not None and scales.name and edit.is_fixed(scales) and scales.values.size:
        return node.inputs[0] if bool((scales.values == 1).all()) else None
    return _if_same_shape(node, shapes, edit) if len(node.inputs) > 3 and node.inputs[3].name else None


def _gather(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """All indices of an axis in order."""
    known = shapes.integers(node.inputs[1])
    if known is None or known.ndim != 1 or not np.array_equal(known, np.arange(known.size)):
        return None
    return _if_same_shape(node, shapes, edit)


def _scatter(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """ScatterND that writes every row of its operand once, in order, leaves the updates."""
    data, indices, updates = node.inputs
    shape = shapes.shape(indices)
    if node.attrs.get("reduction", "none") not in ("none", b"none") or not _same_shape(node, updates, shapes):
        return None
    rows = (shapes.shape(data) or (None,))[0]
    if shape is None or len(shape) != 2 or shape[1] != 1 or rows is None:
        return None
    known = shapes.integers(indices)
    if known is not None:
        return updates if known.shape[0] == rows and np.array_equal(known[:, 0], np.arange(len(known))) else None
    wide = edit.producer(indices)
    source = None if wide is None or wide.op not in ("Unsqueeze", "Reshape") else edit.producer(wide.inputs[0])
    if source is None or source.op != "Range" or not source.is_onnx:
        return None
    start, limit, step = (shapes.value(t) for t in source.inputs)
    if start is None or limit is None or step is None or start.size != 1 or limit.size != 1 or step.size != 1:
        return None
    return updates if start.item() == 0 and step.item() == 1 and limit.item() == rows else None


def _quantize(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """QuantizeLinear of what DequantizeLinear made of 8 or 16 bits by the same scale, which has to be a float32 of middling size: the
    quotient of their product, both in float32, then rounds to the number that it was."""
    inner = edit.producer(node.inputs[0])
    if inner is None or inner.op != "DequantizeLinear" or not inner.is_onnx or len(inner.inputs) != len(node.inputs):
        return None
    source, scale = inner.inputs[0], node.inputs[1]
    dtype = shapes.dtype(source)
    if (
        dtype is None
        or dtype.name not in ("int8", "uint8", "int16", "uint16")
        or dtype != shapes.dtype(node.outputs[0])
    ):
        return None
    if shapes.dtype(node.inputs[0]) != np.float32 or node.attrs.get("precision", 0) not in (0, 1):
        return None
    if inner.attrs.get("axis", 1) != node.attrs.get("axis", 1) or node.attrs.get(
        "block_size", inner.attrs.get("block_size", 0)
    ):
        return None
    if not all(_equal_constants(a, b, edit) for a, b in zip(inner.inputs[1:], node.inputs[1:], strict=True)):
        return None
    if scale.dtype != np.float32 or not bool(((scale.values >= 1e-30) & (scale.values <= 1e30)).all()):
        return None
    return source


def _equal_constants(a: gs.Tensor, b: gs.Tensor, edit: Editor) -> bool:
    if not edit.is_fixed(a) or not edit.is_fixed(b):
        return False
    return a is b or (
        a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape) and a.values.tobytes() == b.values.tobytes()
    )


def _upsample(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    scales = node.attrs.get("scales")
    if scales is None:
        scales = node.inputs[1].values if len(node.inputs) > 1 and edit.is_fixed(node.inputs[1]) else None
    return node.inputs[0] if scales is not None and len(scales) and all(s == 1 for s in scales) else None


def _neutral(neutral: float, *, right_only: bool, floats: bool = True) -> Rule:
    """``x op neutral``; on either side where the operator commutes."""

    def rule(node: Node, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
        if len(node.inputs) != 2:
            return None
        for index in (1,) if right_only else (1, 0):
            operand, source = node.inputs[index], node.inputs[1 - index]
            if not edit.is_fixed(operand) or operand.dtype is None or np.dtype(operand.dtype).kind not in "fiu":
                continue
            if np.dtype(operand.dtype).kind == "f" and not floats:
                continue
            values = np.asarray(operand.values)
            if np.signbit(values).any():  # -0.0 - -0.0 is 0.0
                continue
            if values.size and bool((values == neutral).all()) and _same_shape(node, source, shapes):
                return source
        return None

    return rule


_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Flatten", "Squeeze", "Unsqueeze"), _if_same_shape),
    "Cast": _cast,
    "Transpose": _transpose,
    "Slice": _slice,
    "Pad": _pad,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _only_operand),
    "Split": _split,
    "Dropout": _dropout,
    "Resize": _resize,
    "Upsample": _upsample,
    "Gather": _gather,
    "QuantizeLinear": _quantize,
    "ScatterND": _scatter,
    "Mul": _neutral(1, right_only=False),
    "Div": _neutral(1, right_only=True),
    "Pow": _neutral(1, right_only=True),
    "Sub": _neutral(0, right_only=True),
    "Add": _neutral(0, right_only=False, floats=False),
}
_SHAPE: Final = "its result surely had the shape of its first operand"
_NEEDED: Final[dict[str, str]] = {  # of each operator in _RULES, for `explain`
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Flatten", "Squeeze", "Unsqueeze"), _SHAPE),
    "Cast": "its operand surely had the type that it casts to",
    "Transpose": "its perm were in order",
    "Slice": f"{_SHAPE}, and all steps were known and 1",
    "Pad": "its pads were known and 0",
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), "it had one operand"),
    "Split": "it had one output",
    "Dropout": "its training_mode were known and false, and nothing read its mask",
    "Resize": "its scales were constant and 1, or its sizes surely those of its operand, by a coordinate map that keeps every element "
    "in its place, and not cubic or antialiased",
    "Upsample": "its scales were constant and 1",
    "Gather": "its indices were known and all of the axis, in order",
    "QuantizeLinear": "it undid a DequantizeLinear of 8 or 16 bits by equal constants, the scale a float32 between 1e-30 and 1e30, and both in float32",
    "ScatterND": "it wrote every row once, in order, without a reduction",
    **dict.fromkeys(
        ("Mul", "Div", "Pow"),
        "one operand (the right one of Div and Pow) were constant and 1 and did not broadcast the other",
    ),
    "Sub": "the right operand were constant and 0 and did not broadcast the other",
    "Add": "one operand were constant and 0, of integers: -0.0 + 0.0 is 0.0",
}
