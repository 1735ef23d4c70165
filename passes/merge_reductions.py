"""A reduction of one element, and a reduction of a reduction:

    reduce(x) over axes of size 1 = x, without these axes        for sums, means, products, maxima and minima, and averages of a window of one
    reduce(reduce(x, A), B) = reduce(x, A and B)                 for these, and for L1 and L2 norms and log-sum-exp; products of integers alone

A sum of one number begins with 0 in some runtimes, for which -0.0 becomes 0.0, and sums in another order round otherwise: class B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place

_OF_ONE: Final = ("ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin")
_MERGE: Final = (*_OF_ONE, "ReduceL1", "ReduceL2", "ReduceLogSumExp")
_FLOATS_ALONE: Final = ("ReduceMean", "ReduceL2", "ReduceLogSumExp")  # integers are rounded twice


@dataclass(frozen=True)
class MergeReductions(Pass):
    """Drop reductions over axes of one element, and reduce once instead of axis by axis.

    Before:
        g (float[N,3,4,5] x) => (float[N,3] y)
        <int64[1] last = {-1}, int64[1] one = {2}>
        { u = Unsqueeze (x, one)
          v = ReduceSum <keepdims = 0> (u, one)
          a = ReduceMean <keepdims = 0> (v, last)
          y = ReduceMean <keepdims = 0> (a, last) }
    After:
        g (float[N,3,4,5] x) => (float[N,3] y)
        <int64[2] axes = {2, 3}>
        { y = ReduceMean <keepdims = 0> (x, axes) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset((*_MERGE, "AveragePool"))
    places: ClassVar[tuple[Place, ...]] = (
        *(Place((op,), (op,), otherwise="reduce axes of one element alone") for op in _MERGE),
        Place(("AveragePool",), otherwise="have windows and strides of one element"),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of reductions that went."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        merged = 0
        for node in list(model.nodes()):
            if node.op == "AveragePool" and node.is_onnx and _is_whole(node, shapes):
                if not ctx.admit():
                    break
                edit.replace_node(node, [node.inputs[0]])
                merged += 1
                continue
            if node.op not in _MERGE or not node.is_onnx:
                continue
            axes = _axes(node, shapes)
            if axes is None:
                continue
            one = _only_ones(node, axes, shapes)
            first = None if one else edit.producer(node.inputs[0])
            both: list[int] | None = None
            if first is not None and first.op == node.op and first.is_onnx:
                found = _both(first, node, axes, shapes, edit)
                if isinstance(found, str):
                    ctx.remark(node, found)
                else:
                    both = found
            if not one and both is None:
                continue
            if not ctx.admit():
                break
            if one:
                _drop(node, axes, shapes, model.opset, edit)
            elif first is not None and both is not None:
                _put(node, first.inputs[0], both, node.op, model.opset, (first, node), edit)
                edit.erase(first)
            merged += 1
        edit.commit()
        return merged


def _is_whole(node: Node, shapes: Shapes) -> bool:
    """Whether an AveragePool averages each element alone."""
    shape = shapes.shape(node.inputs[0])
    ones = all(int(n) == 1 for name in ("kernel_shape", "strides") for n in node.attrs.get(name, ()))
    return ones and shape is not None and shape == shapes.shape(node.outputs[0])


def _axes(node: Node, shapes: Shapes) -> list[int] | None:
    """The axes that a reduction reduces, from 0 and in order; None where they are not known."""
    rank = shapes.rank(node.inputs[0])
    if rank is None:
        return None
    if "axes" in node.attrs:
        given = [int(a) for a in node.attrs["axes"]]
    elif len(node.inputs) > 1 and node.inputs[1].name:
        known = shapes.integers(node.inputs[1])
        if known is None:
            return None
        given = [int(a) for a in known.reshape(-1)]
    else:
        given = []
    if not given:
        return [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({a % rank for a in given})


def _only_ones(node: Node, axes: list[int], shapes: Shapes) -> bool:
    """Whether each result is one number of the operand."""
    shape = shapes.shape(node.inputs[0])
    return node.op in _OF_ONE and shape is not None and all(shape[a] == 1 for a in axes)


def _both(first: Node, node: Node, axes: list[int], shapes: Shapes, edit: Editor) -> list[int] | str:
    """The axes of the operand of `first` that the two reduce, or why they stay two."""
    if edit.sole_consumer(node.inputs[0]) is not node or edit.graph_of(first) is not edit.graph_of(node):
        return f"{node.inputs[0].name!r} is read by others too"
    keeps = [int(n.attrs.get("keepdims", 1)) for n in (first, node)]
    if keeps[0] != keeps[1]:
        return f"one of it and {first.name!r} keeps the axes it reduces, the other does not"
    dtype = shapes.dtype(first.inputs[0])
    if dtype is None or (dtype.kind != "f" and node.op in _FLOATS_ALONE):
        return "integers are rounded at each of the two"
    if node.op == "ReduceProd" and dtype.kind not in "iu":
        return "a product may overflow or vanish in another order"
    inner, rank = _axes(first, shapes), shapes.rank(first.inputs[0])
    if not inner or not axes or rank is None:
        return f"the axes of {first.name!r} are not known, or there are none"
    left = list(range(rank)) if keeps[0] else [a for a in range(rank) if a not in inner]
    return sorted({*inner, *(left[a] for a in axes)})


def _drop(node: Node, axes: list[int], shapes: Shapes, opset: int, edit: Editor) -> None:
    """Let the operand of a reduction of one element, or a Squeeze of it, stand for the result."""
    source, result = node.inputs[0], node.outputs[0]
    if not axes or node.attrs.get("keepdims", 1):
        edit.replace_node(node, [source])
        return
    inner = edit.producer(source)
    shape = shapes.shape(result)
    widened = inner is not None and inner.op in ("Unsqueeze", "Reshape") and inner.is_onnx
    if inner is not None and widened and shape is not None and shape == shapes.shape(inner.inputs[0]):
        edit.replace_node(node, [inner.inputs[0]])
        return
    _put(node, source, axes, "Squeeze", opset, (node,), edit)


def _put(
    node: Node, source: gs.Tensor, axes: list[int], op: str, opset: int, origin: tuple[Node, ...], edit: Editor
) -> None:
    """Let a reduction or Squeeze of `source` over `axes` compute the result of `node`."""
    as_operand = 13 if op in ("Squeeze", "ReduceSum") else 18
    attributes: dict[str, object] = {} if op == "Squeeze" else {"keepdims": int(node.attrs.get("keepdims", 1))}
    operands = [source]
    if opset < as_operand:
        attributes["axes"] = axes
    else:
        operands.append(edit.constant(f"{node.name}_axes", np.array(axes, np.int64)))
    edit.take_over(node.outputs[0], Node(op, "reduced", attributes, operands), origin)
