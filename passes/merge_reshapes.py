"""Reshape, Flatten, Squeeze and Unsqueeze keep the order of elements, so a chain of them is one of them.

So does a Transpose that moves nothing but axes of size 1; beside one of the others it is a Reshape, too.

The last one of a chain reads the first one's operand directly, where its shape can be said without computing it: each dimension is a
number, the dimension of the source at the same place (written 0, which copies), or one that is left (written -1); or Squeeze, Unsqueeze
or Flatten say it. For an empty tensor -1 is an error beside another dimension of 0, so it is written only where the others are surely
not, or where the original has it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Expr, is_positive, product
from graphopt.analyses.tensor_facts import Shape
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

_FAMILY: Final = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Replace a chain of Reshape, Flatten, Squeeze, Unsqueeze and Transposes of axes of size 1 by one of them, or by nothing.

    The values between are read by reshapes alone; a pair that cancels goes whoever reads the value between.

    Before:
        g (float[N,2,3] x) => (float[N,3,2] y)
        <int64[2] flat = {0, -1}, int64[3] back = {0, 3, 2}>
        { r = Relu (x)
          a = Reshape (r, flat)
          b = Reshape (a, back)
          y = Exp (b) }
    After:
        g (float[N,2,3] x) => (float[N,3,2] y)
        <int64[3] back = {0, 3, 2}>
        { r = Relu (x)
          b = Reshape (r, back)
          y = Exp (b) }
    """

    places: ClassVar[tuple[Place, ...]] = (Place(_FAMILY, (*_FAMILY, "Transpose")), Place(("Transpose",), _FAMILY))

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of links removed."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        merged = 0
        for node in list(model.nodes()):
            inner = _inner(node, edit, shapes)
            if inner is None:
                continue
            source, between, result = inner.inputs[0], node.inputs[0], node.outputs[0]
            cancels = _known_equal(shapes, source, result)
            if cancels and edit.can_replace(result, source):
                if not ctx.admit():
                    break
                edit.replace_uses(result, source)
                edit.erase(node)
                _erase_unread(edit, inner)
                merged += 1
                continue
            if edit.is_output(between) or not all(_keeps_order(n, shapes) for n in between.outputs):
                ctx.remark(node, f"{between.name!r} is read by others too")
                continue
            form = ("Identity", {}, []) if cancels else _form(node, inner, shapes, model.opset)
            if form is None:
                ctx.remark(node, f"the shape of {result.name!r} cannot be said in terms of that of {source.name!r}")
                continue
            if not ctx.admit():
                break
            op, attributes, operands = form
            node.outputs.clear()
            extra = [
                t if isinstance(t, gs.Tensor) else edit.constant(f"{result.name}_{op.lower()}", t) for t in operands
            ]
            new = Node(op, node.name, attributes, [source, *extra], [result])
            edit.insert_before(node, new, origin=(inner, node))
            edit.erase(node)
            _erase_unread(edit, inner)
            merged += 1
        edit.commit()
        return merged


def _is_reshape(node: Node) -> bool:
    return node.op in _FAMILY and node.is_onnx and (node.op != "Reshape" or len(node.inputs) == 2)


def _keeps_order(node: Node, shapes: Shapes) -> bool:
    """Whether `node` is one of the family, or a Transpose in which all that moves are axes of size 1."""
    if node.op != "Transpose" or not node.is_onnx:
        return _is_reshape(node)
    shape = shapes.shape(node.inputs[0])
    if shape is None:
        return False
    order = [axis for axis in node.attrs.get("perm", range(len(shape))[::-1]) if shape[axis] != 1]
    return order == sorted(order)


def _inner(node: Node, edit: Editor, shapes: Shapes) -> Node | None:
    """The node in the same graph that feeds `node`, where both keep the order of elements and one is of the family."""
    if node.op != "Transpose" and not _is_reshape(node):
        return None
    inner = edit.producer(node.inputs[0])
    if (
        inner is None
        or not (_is_reshape(node) or _is_reshape(inner))
        or edit.graph_of(inner) is not edit.graph_of(node)
    ):
        return None
    return inner if _keeps_order(node, shapes) and _keeps_order(inner, shapes) else None


def _erase_unread(edit: Editor, node: Node) -> None:
    if not node.outputs[0].outputs and not edit.is_output(node.outputs[0]):
        edit.erase(node)


def _known_equal(shapes: Shapes, a: gs.Tensor, b: gs.Tensor) -> bool:
    shape = shapes.shape(a)
    return shape is not None and shape == shapes.shape(b)


Form = tuple[str, dict[str, Any], list[Any]]  # operator, attributes, operands behind the first


def _form(node: Node, inner: Node, shapes: Shapes, opset: int) -> Form | None:
    """One operator from the operand of `inner` to the result of `node`, or None."""
    source, result = shapes.shape(inner.inputs[0]), shapes.shape(node.outputs[0])
    axes_only = {node.op, inner.op} <= {"Squeeze", "Unsqueeze"}
    forms = [_as_squeeze, _as_reshape, _as_flatten] if axes_only else [_as_reshape, _as_squeeze, _as_flatten]
    for form in forms:
        found = form(node, source, result, shapes, opset)
        if found is not None:
            return found
    return None


def _as_reshape(node: Node, source: Shape | None, result: Shape | None, shapes: Shapes, opset: int) -> Form | None:
    given = shapes.integers(node.inputs[1]) if node.op == "Reshape" else None
    attributes = {k: v for k, v in node.attrs.items() if k == "allowzero"} if node.op == "Reshape" else {}
    wanted = None if given is None else [int(d) for d in given.reshape(-1)]
    if wanted is not None and (0 not in wanted or attributes.get("allowzero", 0)):
        return "Reshape", attributes, [node.inputs[1]]  # it says nothing about the shape of its operand
    if result is None or opset < 5:
        return None
    target: list[int] = []
    for axis, dim in enumerate(result):
        if source is not None and axis < len(source) and source[axis] == dim:
            target.append(0)
        elif not isinstance(dim, Expr):
            if dim == 0:
                return None
            target.append(dim)
        elif -1 not in target and _may_infer(result, axis, wanted):
            target.append(-1)
        else:
            return None
    # Numbers where they are known: other passes and people read them more easily.
    target = [d if t == 0 and isinstance(d, int) and d > 0 else t for t, d in zip(target, result, strict=True)]
    return "Reshape", {}, [np.array(target, np.int64)]


def _may_infer(result: Shape, axis: int, wanted: list[int] | None) -> bool:
    if wanted is not None and len(wanted) == len(result) and wanted[axis] == -1:
        return True
    return all(is_positive(d) for i, d in enumerate(result) if i != axis)


def _as_squeeze(node: Node, source: Shape | None, result: Shape | None, shapes: Shapes, opset: int) -> Form | None:
    if source is None or result is None or len(source) == len(result):
        return None
    short, long = sorted((source, result), key=len)
    axes: list[int] = []
    at = 0
    for axis, dim in enumerate(long):
        if at < len(short) and short[at] == dim:
            at += 1
        elif dim == 1:
            axes.append(axis)
        else:
            return None
    if at < len(short):
        return None
    op = "Squeeze" if long is source else "Unsqueeze"
    return (op, {}, [np.array(axes, np.int64)]) if opset >= 13 else (op, {"axes": axes}, [])


def _as_flatten(node: Node, source: Shape | None, result: Shape | None, shapes: Shapes, opset: int) -> Form | None:
    if source is None or result is None or len(result) != 2:
        return None
    for axis in range(len(source) + 1):
        if (product(source[:axis]), product(source[axis:])) == result:
            return "Flatten", {"axis": axis}, []
    return None
