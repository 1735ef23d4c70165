"""Rules of the shape analysis, an operator at a time: the values of its result where they are small integers, numbers or symbols.

A rule returns nothing for what it cannot tell, and may raise on a model that contradicts itself; the analysis takes that as unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import symbolic
from graphopt.analyses.shape_rules import SHAPE_RULES
from graphopt.analyses.symbolic import Dim, Expr
from graphopt.analyses.tensor_facts import MAX_VALUES, Call, Handler, Values

VALUE_RULES: dict[str, Handler] = {}


def _value_of(*ops: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        VALUE_RULES.update(dict.fromkeys(ops, handler))
        return handler

    return register


@_value_of("Shape")
def _shape_value(call: Call) -> Sequence[Any]:
    shape = call.shape(0)
    if shape is None:
        return []
    return [_array(list(shape[slice(call.attr("start"), call.attr("end"))]))]


@_value_of("Size")
def _size_value(call: Call) -> Sequence[Any]:
    shape = call.shape(0)
    return [] if shape is None else [_array(symbolic.product(shape))]


def _array(items: Any) -> Values:
    """An object array; a plain number gives rank 0."""
    if isinstance(items, list):
        array = np.empty(len(items), object)
        array[:] = items
        return array
    array = np.empty((), object)
    array[()] = items
    return array


@_value_of("Constant")
def _constant_value(call: Call) -> Sequence[Any]:
    for name, value in call.node.attrs.items():
        if name == "value" and isinstance(value, gs.Constant) and math.prod(value.shape) <= MAX_VALUES:
            return [np.asarray(value.values).astype(object)]
        if name == "value_int":
            return [_array(int(value))]
        if name == "value_ints":
            return [_array([int(v) for v in value])]
    return []


@_value_of("Identity")
def _identity_value(call: Call) -> Sequence[Any]:
    return [call.value(0)]


@_value_of("Cast")
def _cast_value(call: Call) -> Sequence[Any]:
    value, before, after = call.value(0), call.info(0).dtype, call.inferred[0].dtype
    if value is None or before is None or after is None:
        return []
    if after.kind == "b" or before.kind == "b":
        known = not any(isinstance(v, Expr) for v in value.flat)
        return [value.astype(before).astype(after).astype(object)] if known else []
    limits = np.iinfo(after)
    # A dimension fits every integer type of 32 bits and more; smaller ones may wrap.
    fits = all(limits.bits >= 32 if isinstance(v, Expr) else limits.min <= v <= limits.max for v in value.flat)
    return [value] if fits else []


@_value_of("CastLike")
def _cast_like_value(call: Call) -> Sequence[Any]:
    return _cast_value(call)


@_value_of("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Expand")
def _reshaped_value(call: Call) -> Sequence[Any]:
    value, shape = call.value(0), _final_shape(call)
    if value is None or shape is None:
        return []
    if call.node.op == "Expand":
        return [np.broadcast_to(value, shape)]
    return [value.reshape(shape)]


def _final_shape(call: Call) -> tuple[int, ...] | None:
    """The output's shape as numbers, by our handler or onnx's inference."""
    handler = SHAPE_RULES.get(call.node.op)
    shape = handler(call)[0] if handler is not None else None
    shape = call.inferred[0].shape if shape is None else shape
    if shape is None:
        return None
    numbers = tuple(d for d in shape if isinstance(d, int))
    return numbers if len(numbers) == len(shape) and math.prod(numbers) <= MAX_VALUES else None


@_value_of("Concat")
def _concat_value(call: Call) -> Sequence[Any]:
    values = [call.value(i) for i in range(len(call.node.inputs))]
    known = [v for v in values if v is not None]
    return [np.concatenate(known, axis=int(call.attr("axis", 1)))] if len(known) == len(values) else []


@_value_of("Gather")
def _gather_value(call: Call) -> Sequence[Any]:
    value, indices = call.value(0), call.value(1)
    if value is None or indices is None or any(isinstance(i, Expr) for i in indices.flat):
        return []
    return [np.asarray(np.take(value, indices.astype(np.int64), axis=int(call.attr("axis", 0))), object)]


@_value_of("Split")
def _split_value(call: Call) -> Sequence[Any]:
    value, parts = call.value(0), SHAPE_RULES["Split"](call)
    if value is None or any(part is None for part in parts):
        return []
    axis = int(call.attr("axis", 0)) % value.ndim
    sizes = [part[axis] for part in parts]
    if not all(isinstance(size, int) for size in sizes) or sum(sizes) != value.shape[axis]:
        return []
    return np.split(value, np.cumsum(sizes)[:-1], axis)


@_value_of("Slice")
def _slice_value(call: Call) -> Sequence[Any]:
    value = call.value(0)
    if value is None:
        return []
    if call.opset < 10:
        starts, ends = list(call.attr("starts")), list(call.attr("ends"))
        axes, steps = list(call.attr("axes") or range(len(starts))), [1] * len(starts)
    else:
        found = [call.ints(i) if call.has(i) else None for i in range(1, 5)]
        if any(call.has(i) and found[i - 1] is None for i in range(1, 5)) or found[0] is None or found[1] is None:
            return []
        starts, ends = found[0], found[1]
        axes, steps = found[2] or list(range(len(starts))), found[3] or [1] * len(starts)
    index = [slice(None)] * value.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, None if end < -(1 << 30) and step < 0 else end, step)
    return [value[tuple(index)]]


@_value_of("Transpose")
def _transpose_value(call: Call) -> Sequence[Any]:
    value = call.value(0)
    return [] if value is None else [np.transpose(value, call.attr("perm"))]


def _elementwise(function: Callable[..., Any]) -> Handler:
    def handler(call: Call) -> Sequence[Any]:
        values = [call.value(i) for i in range(len(call.node.inputs))]
        known = [v for v in values if v is not None]
        if len(known) != len(values):
            return []
        arrays = np.broadcast_arrays(*known)
        result = np.empty(arrays[0].shape, object)
        for index in np.ndindex(*arrays[0].shape):
            item = function(*(a[index] for a in arrays))
            if item is None:
                return []
            result[index] = item
        return [result]

    return handler


def _divide(a: Dim, b: Dim) -> Dim | None:
    """ONNX integer division truncates towards zero, as C does; equal to flooring where nothing is negative."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    if b == 0 or not symbolic.is_nonnegative(a):
        return None
    return symbolic.floor_divide(a, b) if symbolic.is_positive(b) else symbolic.divide_exactly(a, b)


def _modulo(a: Dim, b: Dim) -> Dim | None:
    if b == 0 or not symbolic.is_positive(b) or not symbolic.is_nonnegative(a):
        return None
    return symbolic.remainder(a, b)


def _equal(a: Dim, b: Dim) -> bool | None:
    if isinstance(a, bool | int) and isinstance(b, bool | int):
        return a == b
    if a == b:
        return True
    gap = symbolic.add(a, symbolic.multiply(b, -1))
    if isinstance(gap, int):
        return gap == 0
    surely = symbolic.is_positive(gap) or symbolic.is_positive(symbolic.multiply(gap, -1))
    return False if surely else None


def _less(a: Dim, b: Dim) -> bool | None:
    gap = symbolic.add(b, symbolic.multiply(a, -1))
    if symbolic.is_positive(gap):
        return True
    return False if symbolic.is_nonnegative(symbolic.multiply(gap, -1)) else None


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def over(*items: Any) -> Any:
        result = items[0]
        for item in items[1:]:
            result = function(result, item)
        return result

    return over


def _negated(flag: bool | None) -> bool | None:
    return None if flag is None else not flag


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Expr):
        return a if _equal(a, b) else None
    return a if condition else b


VALUE_RULES.update(
    {
        "Add": _elementwise(symbolic.add),
        "Sub": _elementwise(lambda a, b: symbolic.add(a, symbolic.multiply(b, -1))),
        "Mul": _elementwise(symbolic.multiply),
        "Div": _elementwise(_divide),
        "Mod": _elementwise(_modulo),
        "Neg": _elementwise(lambda a: symbolic.multiply(a, -1)),
        "Min": _elementwise(_fold(symbolic.minimum)),
        "Max": _elementwise(_fold(symbolic.maximum)),
        "Equal": _elementwise(_equal),
        "Less": _elementwise(_less),
        "Greater": _elementwise(lambda a, b: _less(b, a)),
        "LessOrEqual": _elementwise(lambda a, b: _negated(_less(b, a))),
        "GreaterOrEqual": _elementwise(lambda a, b: _negated(_less(a, b))),
        "Not": _elementwise(lambda a: None if isinstance(a, Expr) else not a),
        "And": _elementwise(lambda a, b: None if isinstance(a, Expr) or isinstance(b, Expr) else bool(a and b)),
        "Or": _elementwise(lambda a, b: None if isinstance(a, Expr) or isinstance(b, Expr) else bool(a or b)),
        "Where": _elementwise(_where),
    }
)


@_value_of("ConstantOfShape")
def _filled_value(call: Call) -> Sequence[Any]:
    shape = call.ints(0)
    fill = call.attr("value")
    if (
        shape is None
        or math.prod(shape) > MAX_VALUES
        or not isinstance(fill, gs.Constant)
        or np.dtype(fill.dtype).kind not in "iub"
    ):
        return []
    return [np.full(shape, np.asarray(fill.values).reshape(-1)[0].item(), object)]


@_value_of("Range")
def _range_value(call: Call) -> Sequence[Any]:
    bounds = [call.ints(i) for i in range(3)]
    if any(b is None or len(b) != 1 or (b[0] == 0 and i == 2) for i, b in enumerate(bounds)):
        return []
    start, limit, delta = (b[0] for b in bounds if b is not None)
    items = range(start, limit, delta)
    return [_array(list(items))] if len(items) <= MAX_VALUES else []


@_value_of("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduced_value(call: Call) -> Sequence[Any]:
    value, axes = call.value(0), call.axes()
    if value is None or value.ndim != 1 or axes is None or value.size == 0 or any(a not in (0, -1) for a in axes):
        return []
    if not axes and call.attr("noop_with_empty_axes", 0):
        return [value]
    functions = {
        "ReduceProd": symbolic.multiply,
        "ReduceSum": symbolic.add,
        "ReduceMax": symbolic.maximum,
        "ReduceMin": symbolic.minimum,
    }
    result = _array(_fold(functions[call.node.op])(*value))
    return [result.reshape(1) if call.attr("keepdims", 1) else result]
