"""Clips compose: [c, d] followed by [a, b] is [clip(c; a, b), clip(d; a, b)], where c <= d and a <= b. Relu is [0, inf].

A bound that Clip does not give is the largest, or lowest, finite number of the type, as the operator's definition says, so
that infinities end there. Likewise max(max(x, c), d) = max(x, max(c, d)), and min. NaN passes through each of them, and a zero that lies on a bound keeps its sign.
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


@dataclass(frozen=True)
class MergeClips(Pass):
    """Merge chains of Relu and Clip, of Max, and of Min, with constant bounds.

    Before:
        g (float[N] x) => (float[N] y)
        <float low = {-1}, float high = {6}>
        { a = Relu (x)
          b = Clip (a, low, high)
          c = Relu (b)
          y = Exp (c) }
    After:
        g (float[N] x) => (float[N] y)
        <float low = {0}, float high = {6}>
        { b = Clip (x, low, high)
          y = Exp (b) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Relu", "Clip", "Max", "Min"})
    places: ClassVar[tuple[Place, ...]] = (
        Place(("Relu", "Clip"), ("Relu", "Clip")),
        Place(("Max",), ("Max",)),
        Place(("Min",), ("Min",)),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of links removed."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        merged = 0
        for node in list(model.nodes()):
            if node.op in ("Max", "Min"):
                found = _extremes(node, edit) if model.opset >= 8 else None
                if found is None:
                    continue
                if not ctx.admit():
                    break
                link, source, bound = found
                result = node.outputs[0]
                node.outputs.clear()
                operands = [source, edit.constant(f"{result.name}_bound", bound)]
                edit.insert_before(node, Node(node.op, node.name, {}, operands, [result]), origin=(link, node))
                edit.erase(node)
                edit.erase(link)
                merged += 1
                continue
            inner = edit.producer(node.inputs[0]) if _is_clip(node) else None
            if inner is None or not _is_clip(inner):
                continue
            between, result = node.inputs[0], node.outputs[0]
            dtype = shapes.dtype(result)
            if dtype is None or dtype.kind != "f":
                continue
            first, second = _bounds(inner, dtype, edit), _bounds(node, dtype, edit)
            if first is None or second is None:
                ctx.remark(node, "the bounds of both are not constant numbers in order")
                continue
            both = _clip(first[0], second), _clip(first[1], second)
            alone = edit.sole_consumer(between) is node and edit.graph_of(inner) is edit.graph_of(node)
            if _same(both, first) and edit.can_replace(result, between):
                if not ctx.admit():
                    break
                edit.replace_uses(result, between)
                edit.erase(node)
                merged += 1
                continue
            if not alone:
                ctx.remark(node, f"{between.name!r} is read by others too")
                continue
            if not ctx.admit():
                break
            node.outputs.clear()
            new = _clip_node(node, inner.inputs[0], result, both, dtype, model.opset, edit)
            edit.insert_before(node, new, origin=(inner, node))
            edit.erase(node)
            edit.erase(inner)
            merged += 1
        edit.commit()
        return merged


def _extremes(node: Node, edit: Editor) -> tuple[Node, gs.Tensor, np.ndarray[Any, Any]] | None:
    """The Max that a Max of a constant reads alone, or Min, what that one reads, and the constant that stands for both."""
    outer = _with_constant(node, edit)
    inner = None if outer is None else edit.producer(outer[0])
    if outer is None or inner is None or inner.op != node.op or edit.sole_consumer(outer[0]) is not node:
        return None
    found = _with_constant(inner, edit)
    if found is None or edit.graph_of(inner) is not edit.graph_of(node):
        return None
    (source, first), second = found, outer[1]
    if first.shape != second.shape and first.size != 1 != second.size:
        return None  # the result may be larger than both
    if max(first.ndim, second.ndim) != (first if first.size >= second.size else second).ndim:
        return None
    if first.dtype.kind not in "fiu" or bool((first != first).any()) or bool((second != second).any()):
        return None
    if first.dtype.kind == "f" and bool(((first == second) & (np.signbit(first) != np.signbit(second))).any()):
        return None  # which zero it is depends on the order
    return inner, source, np.asarray((np.maximum if node.op == "Max" else np.minimum)(first, second), first.dtype)


def _with_constant(node: Node, edit: Editor) -> tuple[gs.Tensor, np.ndarray[Any, Any]] | None:
    """The operand and the constant of an operator of two."""
    if len(node.inputs) != 2 or not node.is_onnx:
        return None
    for operand, constant in (node.inputs, reversed(node.inputs)):
        if edit.is_fixed(constant) and not edit.is_fixed(operand):
            return operand, np.asarray(constant.values)
    return None


Bounds = tuple[float, float]


def _is_clip(node: Node) -> bool:
    return node.op in ("Relu", "Clip") and node.is_onnx


def _bounds(node: Node, dtype: np.dtype[Any], edit: Editor) -> Bounds | None:
    if node.op == "Relu":
        return 0.0, math.inf
    limits = np.finfo(dtype)
    found = [float(node.attrs.get("min", limits.min)), float(node.attrs.get("max", limits.max))]
    for place, tensor in enumerate(node.inputs[1:3]):
        if not tensor.name:
            continue
        if not edit.is_fixed(tensor) or tensor.values.size != 1:
            return None
        found[place] = float(tensor.values.reshape(-1)[0])
    return (found[0], found[1]) if found[0] <= found[1] else None


def _clip(value: float, bounds: Bounds) -> float:
    low, high = bounds
    return low if value < low else high if value > high else value


def _same(a: Bounds, b: Bounds) -> bool:
    return all(x == y and math.copysign(1, x) == math.copysign(1, y) for x, y in zip(a, b, strict=True))


def _clip_node(
    node: Node, source: gs.Tensor, result: gs.Tensor, bounds: Bounds, dtype: np.dtype[Any], opset: int, edit: Editor
) -> Node:
    if _same(bounds, (0.0, math.inf)):
        return Node("Relu", node.name, {}, [source], [result])
    if opset < 11:
        return Node("Clip", node.name, {"min": bounds[0], "max": bounds[1]}, [source], [result])
    constants = [
        edit.constant(f"{result.name}_{n}", np.array(v, dtype)) for n, v in zip(("min", "max"), bounds, strict=True)
    ]
    return Node("Clip", node.name, {}, [source, *constants], [result])
