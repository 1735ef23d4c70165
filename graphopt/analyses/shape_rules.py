"""Rules of the shape analysis, an operator at a time: what its result's shape is.

A rule returns None for what it cannot tell, and what onnx infers for the node then stands. Rules may raise on a model that contradicts itself;
the analysis takes that as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from graphopt.analyses import symbolic
from graphopt.analyses.symbolic import Dim, Expr
from graphopt.analyses.tensor_facts import Call, Handler, Shape

SHAPE_RULES: dict[str, Handler] = {}


def _shape_of(*ops: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        SHAPE_RULES.update(dict.fromkeys(ops, handler))
        return handler

    return register


def broadcast(shapes: Sequence[Shape], fresh: Callable[[], Dim]) -> Shape:
    """NumPy's broadcasting on symbols: equal dimensions stay, 1 gives way, a number other than 1 wins over a symbol, ``min(S,512)``
    gives way to ``S`` (beside which it can be nothing but ``S`` or 1), and two other symbols give a dimension of which nothing is
    known (`fresh`)."""
    rank = max(map(len, shapes))
    result: list[Dim] = []
    for axis in range(-rank, 0):
        dims = [s[axis] for s in shapes if len(s) >= -axis]
        dims = list(dict.fromkeys(d for d in dims if d != 1))
        dims = [d for d in dims if not any(_is_cut(d, other) for other in dims)]
        numbers = [d for d in dims if isinstance(d, int)]
        if not dims:
            result.append(1)
        elif len(dims) == 1:
            result.append(dims[0])
        elif len(numbers) == 1:
            result.append(numbers[0])
        elif not numbers:
            result.append(fresh())
        else:
            raise ValueError(f"dimensions {numbers} do not broadcast")
    return tuple(result)


def _is_cut(dim: Dim, whole: Dim) -> bool:
    """Whether `dim` is ``min(whole, n)`` with a number above 1: as long as the two broadcast, `whole` is what comes out."""
    if not isinstance(dim, Expr) or not dim.is_atom:
        return False
    atom = dim.terms[0][0][0]
    if isinstance(atom, str) or atom.name != "min" or whole not in atom.arguments:
        return False
    return all(a == whole or (isinstance(a, int) and a > 1) for a in atom.arguments)


@_shape_of(
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Mean", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual",
    "Greater", "GreaterOrEqual", "Where", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "PRelu",
)  # fmt: skip
def _broadcasting(call: Call) -> Sequence[Any]:
    shapes = [call.shape(i) for i in range(len(call.node.inputs))]
    known = [s for s in shapes if s is not None]
    return [broadcast(known, call.shapes.opaque)] if len(known) == len(shapes) else [None]


@_shape_of("Reshape")
def _reshape(call: Call) -> Sequence[Any]:
    source, target = call.shape(0), call.value(1)
    if target is None or target.ndim != 1:
        return [None]
    dims: list[Dim | None] = []
    for axis, wanted in enumerate(target):
        if isinstance(wanted, int) and wanted == -1:
            dims.append(None)
        elif isinstance(wanted, int) and wanted == 0 and not call.attr("allowzero", 0):
            dims.append(source[axis] if source is not None else call.shapes.opaque())
        elif isinstance(wanted, Expr) and not symbolic.is_positive(wanted) and not _is_size(wanted):
            dims.append(call.shapes.opaque())  # may be -1 or 0 at run time
        else:
            dims.append(wanted)
    if None in dims:
        total = symbolic.product(source) if source is not None else None
        rest = symbolic.product(d for d in dims if d is not None)
        inferred = None if total is None or rest == 0 else symbolic.divide_exactly(total, rest)
        dims[dims.index(None)] = inferred if inferred is not None else call.shapes.opaque()
    return [tuple(d for d in dims if d is not None)]


def _is_size(value: Expr) -> bool:
    """Whether it is made of dimensions alone, so that it stands for itself in a shape (a 0 copies a 0)."""
    return symbolic.is_nonnegative(value)


@_shape_of("Concat")
def _concat(call: Call) -> Sequence[Any]:
    shapes = [call.shape(i) for i in range(len(call.node.inputs))]
    if any(s is None for s in shapes) or not shapes or len({len(s) for s in shapes if s is not None}) != 1:
        return [None]
    known = [s for s in shapes if s is not None]
    axis = int(call.attr("axis", 1)) % len(known[0])
    dims: list[Dim] = []
    for index in range(len(known[0])):
        if index == axis:
            total: Dim = 0
            for shape in known:
                total = symbolic.add(total, shape[index])
            dims.append(total)
        else:
            dims.append(next((s[index] for s in known if isinstance(s[index], int)), known[0][index]))
    return [tuple(dims)]


@_shape_of("GroupNormalization")  # a function for which onnx infers the type alone
def _group_normalization(call: Call) -> Sequence[Shape | None]:
    return [call.shape(0)]


@_shape_of("Flatten")
def _flatten(call: Call) -> Sequence[Any]:
    shape = call.shape(0)
    if shape is None:
        return [None]
    axis = int(call.attr("axis", 1))
    axis += len(shape) if axis < 0 else 0
    return [(symbolic.product(shape[:axis]), symbolic.product(shape[axis:]))]


@_shape_of("Expand")
def _expand(call: Call) -> Sequence[Any]:
    shape, target = call.shape(0), call.value(1)
    if shape is None or target is None:
        return [None]
    return [broadcast([shape, tuple(target)], call.shapes.opaque)]


@_shape_of("ConstantOfShape")
def _constant_of_shape(call: Call) -> Sequence[Any]:
    target = call.value(0)
    return [None if target is None else tuple(target)]


@_shape_of("Resize")
def _resize(call: Call) -> Sequence[Any]:
    """By sizes that are computed but known as symbols; scales onnx does itself."""
    sizes, shape = call.value(3), call.shape(0)
    if sizes is None or shape is None or call.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return []
    axes = call.attr("axes")
    places = range(len(shape)) if axes is None else [int(a) % len(shape) for a in axes]
    result = list(shape)
    for place, size in zip(places, sizes.flat, strict=True):
        result[place] = size
    return [tuple(result)]


@_shape_of("Tile")
def _tile(call: Call) -> Sequence[Any]:
    shape, repeats = call.shape(0), call.value(1)
    if shape is None or repeats is None:
        return [None]
    return [tuple(symbolic.multiply(d, r) for d, r in zip(shape, repeats, strict=True))]


@_shape_of("Slice")
def _slice(call: Call) -> Sequence[Any]:
    shape = call.shape(0)
    if shape is None:
        return [None]
    if call.opset < 10:
        starts, ends = ([*map(int, call.attr(n))] for n in ("starts", "ends"))
        axes, steps = list(call.attr("axes") or range(len(starts))), [1] * len(starts)
        bounds = list(zip(axes, starts, ends, steps, strict=True))
    else:
        first, last = call.value(1), call.value(2)
        axes_given = call.ints(3) if call.has(3) else list(range(len(shape)))
        steps_given = call.ints(4) if call.has(4) else None
        if axes_given is None or (call.has(4) and steps_given is None):
            return [None]
        count = len(axes_given) if call.has(3) else (first.size if first is not None else 0)
        if first is None or last is None:
            unknown = {a % len(shape) for a in axes_given}
            return [tuple(call.shapes.opaque() if i in unknown else d for i, d in enumerate(shape))]
        bounds = list(zip(axes_given[:count], first, last, steps_given or [1] * count, strict=True))
    dims = list(shape)
    for axis, start, end, step in bounds:
        dims[axis] = _slice_length(dims[axis], start, end, step, call.shapes.opaque)
    return [tuple(dims)]


def _slice_length(dim: Dim, start: Dim, end: Dim, step: int, fresh: Callable[[], Dim]) -> Dim:
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, end if end > -(1 << 62) else None, step).indices(dim)))
    if step != 1:
        return fresh()
    if isinstance(start, int) and start >= 0 and _clamped(end, dim) == dim:
        rest = symbolic.add(dim, -start)
        return rest if symbolic.is_nonnegative(rest) else symbolic.maximum(rest, 0)
    begin = _clamped(start, dim)
    finish = _clamped(end, dim)
    if begin is None or finish is None:
        return fresh()
    length = symbolic.add(finish, symbolic.multiply(begin, -1))
    return length if symbolic.is_nonnegative(length) else symbolic.maximum(length, 0)


def _clamped(bound: Dim, dim: Dim) -> Dim | None:
    """A slice bound brought into 0..dim, or None where that cannot be told."""
    if isinstance(bound, int):
        if bound == 0:
            return 0
        if bound >= 1 << 30:
            return dim
        if bound < 0:
            shifted = symbolic.add(dim, bound)
            return shifted if symbolic.is_nonnegative(shifted) else symbolic.maximum(shifted, 0)
        gap = symbolic.add(dim, -bound)
        return bound if symbolic.is_nonnegative(gap) else symbolic.minimum(dim, bound)
    gap = symbolic.add(dim, symbolic.multiply(bound, -1))
    if not symbolic.is_nonnegative(bound):
        return None
    return bound if symbolic.is_nonnegative(gap) else symbolic.minimum(dim, bound)


@_shape_of("Range")
def _range_shape(call: Call) -> Sequence[Any]:
    bounds = [call.value(i) for i in range(3)]
    if any(b is None or b.size != 1 for b in bounds):
        return [None]
    start, limit, delta = (b.reshape(-1)[0] for b in bounds if b is not None)
    if not isinstance(delta, int) or delta == 0:
        return [None]
    gap = symbolic.add(limit, symbolic.multiply(start, -1))
    if isinstance(gap, int):
        return [(max(0, -(-gap // delta)),)]
    if delta == 1:
        return [(gap if symbolic.is_nonnegative(gap) else symbolic.maximum(gap, 0),)]
    return [None]


@_shape_of("Pad")
def _pad(call: Call) -> Sequence[Any]:
    shape = call.shape(0)
    if shape is None:
        return [None]
    given = call.attr("pads")
    values = call.value(1)
    if given is None and values is None:
        return [None]
    pads: Sequence[Dim] = given if given is not None else list(values.flat) if values is not None else []
    axes = call.ints(3) if call.has(3) else list(range(len(shape)))
    if axes is None or len(pads) != 2 * len(axes):
        return [None]
    dims = list(shape)
    for index, axis in enumerate(axes):
        dims[axis] = symbolic.add(symbolic.add(dims[axis], pads[index]), pads[index + len(axes)])
    return [tuple(dims)]


@_shape_of("Conv", "MaxPool", "AveragePool", "LpPool", "ConvTranspose")
def _convolution(call: Call) -> Sequence[Any]:
    """Symbolic spatial dimensions; where all are numbers onnx has done it."""
    inferred = call.inferred[0].shape
    shape = call.shape(0)
    if shape is None or inferred is None or len(shape) < 3 or all(isinstance(d, int) for d in shape[2:]):
        return [None]
    rank = len(shape) - 2
    weight = call.shape(1) if call.node.op in ("Conv", "ConvTranspose") else None
    kernel = call.attr("kernel_shape") or (weight[2:] if weight is not None else None)
    if kernel is None or any(isinstance(k, Expr) for k in kernel) or call.attr("output_shape"):
        return [None]
    windows = [k for k in kernel if isinstance(k, int)]
    strides, dilations = (call.attr(n) or [1] * rank for n in ("strides", "dilations"))
    pads = call.attr("pads") or [0] * (2 * rank)
    auto = call.attr("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0] * (2 * rank)
    dims: list[Dim] = []
    for i in range(rank):
        size = shape[2 + i]
        reach = (windows[i] - 1) * int(dilations[i]) + 1
        if call.node.op == "ConvTranspose":
            if auto not in ("NOTSET", "VALID"):
                return [None]
            extra = (call.attr("output_padding") or [0] * rank)[i]
            dims.append(
                symbolic.add(
                    symbolic.multiply(symbolic.add(size, -1), int(strides[i])), reach + extra - pads[i] - pads[i + rank]
                )
            )
        elif auto in ("SAME_UPPER", "SAME_LOWER"):
            dims.append(symbolic.floor_divide(symbolic.add(size, int(strides[i]) - 1), int(strides[i])))
        elif call.attr("ceil_mode", 0):
            return [None]
        else:
            room = symbolic.add(size, int(pads[i]) + int(pads[i + rank]) - reach)
            dims.append(symbolic.add(symbolic.floor_divide(room, int(strides[i])), 1))
    return [(*inferred[:2], *dims)] + [(*inferred[:2], *dims)] * (len(call.node.outputs) - 1)


@_shape_of("Split")
def _split(call: Call) -> Sequence[Any]:
    shape = call.shape(0)
    if shape is None:
        return [None]
    axis = int(call.attr("axis", 0)) % len(shape)
    sizes = call.attr("split") or (list(call.value(1)) if call.has(1) and call.value(1) is not None else None)  # type: ignore[arg-type]
    if sizes is None and not call.has(1):
        each = symbolic.divide_exactly(shape[axis], len(call.node.outputs))
        sizes = None if each is None else [each] * len(call.node.outputs)
    if sizes is None:
        return [None]
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


# com.microsoft operators: they make one value of the dtype of their first operand, which onnx cannot infer.


def _attention(call: Call) -> Sequence[Shape | None]:
    source, weight = call.shape(0), call.shape(1)
    if source is None or weight is None or len(source) != 3 or len(weight) != 2:
        return [None]
    sizes = call.attr("qkv_hidden_sizes")
    width = sizes[2] if sizes else symbolic.divide_exactly(weight[1], 3)
    return [(source[0], source[1], call.shapes.opaque() if width is None else width)]


def _multi_head_attention(call: Call) -> Sequence[Shape | None]:
    query, value = call.shape(0), call.shape(2)
    if query is None or value is None or len(query) != 3 or len(value) != 3:
        return [None]
    return [(query[0], query[1], value[2])]


def _as_first(call: Call) -> Sequence[Shape | None]:
    return [call.shape(0)]


CONTRIB_RULES: Final[dict[str, Handler]] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
    **dict.fromkeys(
        (
            "BiasGelu",
            "FastGelu",
            "Gelu",
            "QuickGelu",
            "RotaryEmbedding",
            "SkipLayerNormalization",
            "SkipSimplifiedLayerNormalization",
        ),
        _as_first,
    ),
}
