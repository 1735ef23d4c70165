"""Sums and products with constants, and signs.

    x + 0 = x                               but -0.0 + 0.0 is 0.0, so the class is B
    (x + c) + d = x + (c + d)               and with - for +
    (x * c) * d = x * (c * d)               and with / by a constant for *
    a + -b = a - b,  a - -b = a + b,  --a = a,  sum(a, b) = a + b

The constants are combined in float64 and rounded once. They are left alone where the order matters beyond a rounding: sums that
cancel, and factors so large or small that x * c could overflow or vanish where x * (c * d) does not. Integers wrap around either way,
so theirs are combined as they are; they are never divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import TENSORRT, Context, Exactness, Pass, Place

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SimplifyArithmetic(Pass):
    """Combine constants of sums and products, drop + 0 and double signs.

    Before:
        g (float[2] x) => (float[2] y)
        <float c = {2}, float d = {3}, float zero = {0}>
        { a = Mul (x, c)
          b = Mul (d, a)
          e = Add (b, zero)
          n = Neg (e)
          y = Sub (x, n) }
    After:
        g (float[2] x) => (float[2] y)
        <float c = {6}>
        { b = Mul (x, c)
          y = Add (x, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    places: ClassVar[tuple[Place, ...]] = (
        Place(("Add", "Sub"), ("Add", "Sub", "Neg"), otherwise="add zeros"),
        Place(("Mul", "Div"), ("Mul", "Div")),
        Place(("Neg",), ("Neg",)),
        Place(("Sum",), otherwise="have two operands"),
        Place(("Add",), constant=True),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of nodes removed."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        engine = ctx.target is not None and ctx.target.family in TENSORRT
        total = 0
        for node in list(model.nodes()):
            if node.op not in ("Add", "Sub", "Mul", "Div", "Neg", "Sum") or not node.is_onnx or model.opset < 7:
                continue
            for rule in (_of_two, _biased if engine else _without_zero, _double_sign, _combined):
                found = rule(node, shapes, edit)
                if isinstance(found, str):
                    ctx.remark(node, found)
                if found is None or isinstance(found, str):
                    continue
                if not ctx.admit():
                    edit.commit()
                    return total
                total += 1
                _put(node, found, edit)
                break
        edit.commit()
        return total


Found = Any  # a tensor, an operator with operands, a reason why not, or None: nothing to say


def _put(node: Node, found: Any, edit: Editor) -> None:
    result = node.outputs[0]
    inner = [p for t in node.inputs if (p := edit.producer(t)) is not None]
    if isinstance(found, gs.Tensor):
        edit.replace_uses(result, found)
    else:
        op, operands = found
        node.outputs.clear()
        tensors = [t if isinstance(t, gs.Tensor) else edit.constant(f"{result.name}_constant", t) for t in operands]
        edit.insert_before(node, Node(op, node.name, {}, tensors, [result]), origin=(*inner, node))
    edit.erase(node)
    for other in inner:
        if not edit.is_erased(other) and not any(t.outputs or edit.is_output(t) for t in other.outputs):
            edit.erase(other)


def _made_by(tensor: gs.Tensor, ops: tuple[str, ...], node: Node, edit: Editor) -> Node | None:
    """The node of one of `ops` that makes `tensor` for `node` alone."""
    found = edit.producer(tensor)
    if found is None or found.op not in ops or not found.is_onnx or edit.sole_consumer(tensor) is not node:
        return None
    return found if edit.graph_of(found) is edit.graph_of(node) else None


def _of_two(node: Node, shapes: Shapes, edit: Editor) -> Found:
    return ("Add", list(node.inputs)) if node.op == "Sum" and len(node.inputs) == 2 else None


def _without_zero(node: Node, shapes: Shapes, edit: Editor) -> Found:
    if node.op != "Add":
        return None
    result = node.outputs[0]
    for index in (1, 0):
        zero, source = node.inputs[index], node.inputs[1 - index]
        if edit.is_fixed(zero) and np.dtype(zero.dtype).kind == "f" and zero.values.size and not zero.values.any():
            shape = shapes.shape(source)
            if shape is not None and shape == shapes.shape(result):
                return source if edit.can_replace(result, source) else None
    return None


def _biased(node: Node, shapes: Shapes, edit: Editor) -> Found:
    """As `_without_zero`, but for a bias of zeros behind a product: behind it TensorRT for RTX lays out queries, keys and values in one kernel each;
    reading the product itself, it computes strides in several."""
    made = [p for t in node.inputs if (p := edit.producer(t)) is not None and p.op == "MatMul"]
    row = any(edit.is_fixed(t) and len(t.shape) == 1 and t.values.size > 1 for t in node.inputs)
    return None if made and row else _without_zero(node, shapes, edit)


def _double_sign(node: Node, shapes: Shapes, edit: Editor) -> Found:
    if node.op == "Neg":
        inner = edit.producer(node.inputs[0])
        if (
            inner is not None
            and inner.op == "Neg"
            and inner.is_onnx
            and edit.can_replace(node.outputs[0], inner.inputs[0])
        ):
            return inner.inputs[0]
        return None
    if node.op not in ("Add", "Sub"):
        return None
    for index in (1, 0) if node.op == "Add" else (1,):
        neg = _made_by(node.inputs[index], ("Neg",), node, edit)
        if neg is not None:
            return "Sub" if node.op == "Add" else "Add", [node.inputs[1 - index], neg.inputs[0]]
    return None


def _combined(node: Node, shapes: Shapes, edit: Editor) -> Found:
    """Two operations with constants as one; the constant never grows by broadcasting."""
    additive = node.op in ("Add", "Sub")
    outer = _split(node, edit)
    if outer is None or node.op == "Neg":
        return None
    source, second, sign = outer
    inner = _made_by(source, ("Add", "Sub") if additive else ("Mul", "Div"), node, edit)
    if inner is None:
        return None
    first_split = _split(inner, edit)
    if first_split is None:
        return None
    start, first, first_sign = first_split
    c, d, dtype = first.values, second.values, np.dtype(first.dtype)
    if dtype != np.dtype(second.dtype) or dtype.kind not in "fiu":
        return f"constants {first.name!r} and {second.name!r} are of types that are not combined"
    if not c.size or not d.size:
        return None
    try:
        shape = np.broadcast_shapes(c.shape, d.shape)
    except ValueError:
        return None
    if int(np.prod(shape)) > max(c.size, d.size):
        return f"the combination of {first.name!r} and {second.name!r} would be larger than both"
    if dtype.kind != "f":
        if "Div" in (node.op, inner.op):
            return "integer division does not commute with products"
        with np.errstate(all="ignore"):
            wrapped: Array = np.asarray(_signed(c, first_sign) + _signed(d, sign) if additive else c * d, dtype)
        return ("Add" if additive else "Mul"), [start, wrapped]
    with np.errstate(all="ignore"):
        x, y = c.astype(np.float64), d.astype(np.float64)
        if additive:
            exact = np.asarray(x * first_sign + y * sign)
            careless = np.abs(exact) < 0.5 * np.maximum(np.abs(x), np.abs(y))
        else:
            x, y = (x if first_sign > 0 else 1 / x), (y if sign > 0 else 1 / y)
            exact = np.asarray(x * y)
            limit = 2.0 ** (np.finfo(dtype).maxexp // 4)
            careless = np.logical_or.reduce(
                [~((np.abs(v) <= limit) & (np.abs(v) >= 1 / limit)) for v in np.broadcast_arrays(x, y)]
            )
        rounded = exact.astype(dtype)
    if careless.any() or not np.isfinite(rounded).all():
        return f"the order of {first.name!r} and {second.name!r} matters beyond a rounding"
    return ("Add" if additive else "Mul"), [start, rounded]


def _signed(values: Array, sign: int) -> Array:
    return values if sign > 0 else np.asarray(0 - values, values.dtype)


def _split(node: Node, edit: Editor) -> tuple[gs.Tensor, gs.Constant, int] | None:
    """``x op constant`` as x, the constant, and -1 where it is subtracted or divided by."""
    if len(node.inputs) != 2:
        return None
    for index in (1, 0) if node.op in ("Add", "Mul") else (1,):
        if edit.is_fixed(node.inputs[index]) and not edit.is_fixed(node.inputs[1 - index]):
            return node.inputs[1 - index], node.inputs[index], 1 if node.op in ("Add", "Mul") else -1
    return None
