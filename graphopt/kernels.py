"""NumPy kernels for operators whose result is the same bits in every evaluator.

They move elements, count them, or compute what has one right answer: integers, comparisons, and the operations of floats that IEEE 754
rounds correctly. Shape arithmetic and the layout of weights are all of that kind, so that most models are folded without a runtime, which would
take longer to load than to compute.

A kernel returns None for what it does not know, and an operand that does not fit makes NumPy raise: in both cases the evaluator of
`graphopt.evaluate` is asked, which knows everything, and has the words for what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.elements import numpy_dtype

Array = np.ndarray[Any, Any]
Operands = Sequence[Array | None]
Kernel = Callable[[gs.Node, int, Operands], "list[Array] | None"]

_OLDEST: Final = 7  # opset: before, arithmetic broadcasts in its own way


def compute(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    """The results of `node`; None where its kernel, if there is one, cannot tell.

    Args:
        node: of the default domain.
        opset: of the model.
        operands: None stands for an absent one.
    """
    kernel = _KERNELS.get(node.op)
    if kernel is None or opset < _OLDEST or any(a is not None and a.dtype.kind not in "biuf" for a in operands):
        return None
    try:
        results = kernel(node, opset, operands)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        return None
    if results is None or len(results) != len([t for t in node.outputs if t.name]):
        return None
    return [np.asarray(result, order="C") for result in results]


def _axes(node: gs.Node, operands: Operands) -> list[int] | None:
    """The axes of (Un)Squeeze, an attribute before opset 13."""
    if len(operands) > 1 and operands[1] is not None:
        return [int(a) for a in operands[1].reshape(-1)]
    axes = node.attrs.get("axes")
    return None if axes is None else [int(a) for a in axes]


def _unsqueeze(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    axes = _axes(node, operands)
    return None if axes is None else [np.expand_dims(_given(operands[0]), tuple(axes))]


def _squeeze(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    axes = _axes(node, operands)
    if axes == []:  # nothing, says the standard; ONNX Runtime takes all of size 1
        return None
    return [np.squeeze(_given(operands[0]), None if axes is None else tuple(axes))]


def _reshape(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    data, target = _given(operands[0]), [int(d) for d in _given(operands[1])]
    if not node.attrs.get("allowzero", 0):
        target = [data.shape[axis] if dim == 0 else dim for axis, dim in enumerate(target)]
    elif 0 in target and -1 in target:
        return None
    return [data.reshape(target)]


def _transpose(node: gs.Node, opset: int, operands: Operands) -> list[Array]:
    return [np.transpose(_given(operands[0]), node.attrs.get("perm"))]


def _concat(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    arrays = [_given(a) for a in operands]
    if len({a.dtype for a in arrays}) != 1:
        return None
    return [np.concatenate(arrays, int(node.attrs["axis"]))]


def _split(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    data, axis = _given(operands[0]), int(node.attrs.get("axis", 0))
    sizes = operands[1] if len(operands) > 1 else node.attrs.get("split")
    count, total = len(node.outputs), data.shape[axis]
    if sizes is None:
        if total % count:
            return None
        sizes = [total // count] * count
    lengths = [int(s) for s in sizes]
    if len(lengths) != count or sum(lengths) != total or min(lengths) < 0:
        return None
    return [
        np.array(part) for part in np.split(data, np.cumsum(lengths)[:-1].tolist(), axis)
    ]  # no views: they keep all


def _slice(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    data = _given(operands[0])
    if opset < 10:
        starts, ends, axes, steps = node.attrs["starts"], node.attrs["ends"], node.attrs.get("axes"), None
    else:
        starts, ends, axes, steps = (*operands[1:], None, None)[:4]
    count = len(starts)
    places = range(count) if axes is None else [int(a) for a in axes]
    strides = [1] * count if steps is None else [int(s) for s in steps]
    where = [slice(None)] * data.ndim
    for axis, start, end, step in zip(places, starts, ends, strides, strict=True):
        if step < 1:  # backwards, Python counts the end otherwise
            return None
        where[axis] = slice(int(start), int(end), step)
    if len({axis % data.ndim for axis in places}) != count:
        return None
    return [np.array(data[tuple(where)])]


def _gather(node: gs.Node, opset: int, operands: Operands) -> list[Array]:
    return [np.take(_given(operands[0]), _given(operands[1]), int(node.attrs.get("axis", 0)))]


def _expand(node: gs.Node, opset: int, operands: Operands) -> list[Array]:
    data, target = _given(operands[0]), tuple(int(d) for d in _given(operands[1]))
    return [np.array(np.broadcast_to(data, np.broadcast_shapes(data.shape, target)))]


def _shape(node: gs.Node, opset: int, operands: Operands) -> list[Array]:
    dims = _given(operands[0]).shape
    return [np.array(dims[node.attrs.get("start", 0) : node.attrs.get("end", len(dims))], np.int64)]


def _where(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    condition, a, b = map(_given, operands)
    return [np.where(condition, a, b)] if a.dtype == b.dtype and condition.dtype == np.bool_ else None


def _cast(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    """From integers; what a float becomes that is no number of the other type, nobody says."""
    data, dtype = _given(operands[0]), numpy_dtype(int(node.attrs["to"]))
    if data.dtype.kind not in "biu" or dtype.kind not in "iuf" or dtype.itemsize < 4:
        return None
    return [data.astype(dtype)]


def _arithmetic(operation: Callable[..., Array], kinds: str) -> Kernel:
    """Of two operands, or one; floats only where no NaN, infinity or underflow comes in, whose bits may differ."""

    def kernel(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
        arrays = [_given(a) for a in operands]
        dtype = arrays[0].dtype
        if dtype.kind not in kinds or any(a.dtype != dtype for a in arrays):
            return None
        if dtype.kind != "f":
            with np.errstate(all="ignore"):
                return [np.asarray(operation(*arrays))]
        if dtype.itemsize < 4:  # runtimes compute halves in float32
            return None
        with np.errstate(all="raise"):
            result = np.asarray(operation(*arrays))
        return [result] if np.isfinite(result).all() else None

    return kernel


def _mod(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    a, b = map(_given, operands)
    if node.attrs.get("fmod", 0) or a.dtype.kind not in "iu" or a.dtype != b.dtype or not b.all():
        return None
    return [np.mod(a, b)]


def _power(node: gs.Node, opset: int, operands: Operands) -> list[Array] | None:
    """Where the result is a float exactly, as 16 ** -0.5 is: then libraries agree."""
    a, b = map(_given, operands)
    if a.dtype != np.float32 or b.dtype != np.float32:
        return None
    with np.errstate(all="raise"):
        wide = np.power(a.astype(np.float64), b.astype(np.float64))
        result = wide.astype(np.float32)
    return [result] if (result == wide).all() else None


def _given(array: Array | None) -> Array:
    if array is None:
        raise ValueError("an operand is absent")
    return array


_KERNELS: Final[dict[str, Kernel]] = {
    "Add": _arithmetic(np.add, "iuf"),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _arithmetic(np.divide, "f"),
    "Equal": _arithmetic(np.equal, "biu"),
    "Expand": _expand,
    "Gather": _gather,
    "Identity": lambda node, opset, operands: [_given(operands[0])],
    "Mod": _mod,
    "Mul": _arithmetic(np.multiply, "iuf"),
    "Pow": _power,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda node, opset, operands: [np.array(math.prod(_given(operands[0]).shape), np.int64)],
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _arithmetic(np.sqrt, "f"),
    "Squeeze": _squeeze,
    "Sub": _arithmetic(np.subtract, "iuf"),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}


__all__ = ["compute"]
