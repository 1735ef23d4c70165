"""Channel relations of what works index by index, and of what normalizes or works along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from graphopt.analyses.channel_call import Call, broadcast, relation

if TYPE_CHECKING:
    from graphopt.analyses.channel_groups import Labels

Array = np.ndarray[Any, Any]

UNARY: Final = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Gelu", "HardSwish", "HardSigmoid", "Elu", "Selu", "Celu", "Mish"),
    *(
        "Softplus",
        "Softsign",
        "ThresholdedRelu",
        "Shrink",
        "Exp",
        "Log",
        "Sqrt",
        "Abs",
        "Neg",
        "Floor",
        "Ceil",
        "Round",
    ),
    *("Reciprocal", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh"),
    *("Identity", "Cast", "CastLike", "Dropout", "Not", "IsNaN", "IsInf", "Swish", "Clip", "Trunc"),
    *("com.microsoft.QuickGelu", "com.microsoft.Gelu"),
)  # each element by itself; further operands are the same for all
BROADCASTING: Final = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "Mod", "And", "Or", "Xor", "PRelu"),
    *("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
    *("com.microsoft.BiasGelu", "com.microsoft.FastGelu"),
)


@relation(*UNARY)
def _unary(call: Call) -> Sequence[Labels | None]:
    labels = tuple(call.axes(0))
    for index in range(1, len(call.node.inputs)):  # bounds, ratios: of rank 0, or read for their dtype only
        if call.node.op == "CastLike" or (call.has(index) and not call.dims(index)):
            call.touched.add(index)
    return [labels] * len(call.node.outputs)


@relation(*BROADCASTING)
def _broadcasting(call: Call) -> Sequence[Labels | None]:
    operands = [(call.axes(i), call.dims(i)) for i in range(len(call.node.inputs)) if call.has(i)]
    return [broadcast(call, operands)]


@relation("BatchNormalization", "InstanceNormalization")
def _per_channel(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    if len(labels) < 2 or call.attr("training_mode", 0):
        return None
    for index in range(1, len(call.node.inputs)):
        if call.has(index):
            labels[1] = call.join(labels[1], call.axes(index)[0])
    if call.node.op == "InstanceNormalization":
        for axis in range(2, len(labels)):
            call.pin(labels[axis], "normalizes over it")
            labels[axis] = None
    return [tuple(labels)] + [None] * (len(call.node.outputs) - 1)


@relation("GroupNormalization")
def _group_norm(call: Call) -> Sequence[Labels | None] | None:
    """Only whole groups may go, since others are normalized together with what is left of theirs."""
    labels, count = call.axes(0), int(call.attr("num_groups", 1))
    channels = labels[1] if len(labels) > 1 else None
    for axis in labels[2:]:
        call.pin(axis, "normalizes over it")
    if channels is None or len(channels) % count:
        return None
    groups = call.together(channels.reshape(count, -1))
    for index in (1, 2):
        scale = call.axes(index)[0]
        call.join(channels if scale is not None and len(scale) == len(channels) else groups, scale)
    call.fix(lambda kept, edit: call.set("num_groups", kept.count(groups)))
    return [(labels[0], channels, *[None] * (len(labels) - 2))]


@relation("LayerNormalization", "RMSNormalization", "com.microsoft.SimplifiedLayerNormalization")
def _layer_norm(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    axis = int(call.attr("axis", -1)) % len(labels)
    for index in range(axis, len(labels)):
        call.pin(labels[index], "normalizes over it")
        labels[index] = None
    return [tuple(labels)] + [None] * (len(call.node.outputs) - 1)


@relation("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization")
def _skip_layer_norm(call: Call) -> Sequence[Labels | None]:
    labels = list(broadcast(call, [(call.axes(0), call.dims(0)), (call.axes(1), call.dims(1))]))
    for axis in (call.axes(0)[-1], call.axes(1)[-1]):
        call.pin(axis, "normalizes over it")
    labels[-1] = None
    return [tuple(labels) if index in (0, 3) else None for index in range(len(call.node.outputs))]


@relation("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum")
def _along_axis(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    op = call.node.op
    axis = call.attr("axis", 1 if op.endswith("max") and call.groups.model.opset < 13 else -1)
    if op == "CumSum":
        known = call.ints(1)
        if known is None:
            return None
        axis = known[0]
    axis %= len(labels)
    last = len(labels) if op.endswith("max") and call.groups.model.opset < 13 else axis + 1
    for index in range(axis, last):
        call.pin(labels[index], "works along it")
        labels[index] = None
    return [tuple(labels)]


@relation("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _pool(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    for axis in labels[2:]:
        call.pin(axis, "slides over it")
    result = (*labels[:2], *[None] * (len(labels) - 2))
    return [result] + [None] * (len(call.node.outputs) - 1)


@relation(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum"),
    *("ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin"),
)
def _reduce(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    axes = [call.attr("axis", 0)] if call.node.op.startswith("Arg") else call.attr("axes")
    if axes is None and call.has(1):
        axes = call.ints(1)
        if axes is None:
            return None
    if not axes:
        axes = [] if call.attr("noop_with_empty_axes", 0) else range(len(labels))
    gone = {int(a) % len(labels) for a in axes}
    for axis in sorted(gone):
        call.pin(labels[axis], "reduces over it")
    if call.attr("keepdims", 1):
        return [tuple(None if i in gone else axis for i, axis in enumerate(labels))]
    return [tuple(axis for i, axis in enumerate(labels) if i not in gone)]


@relation("GridSample", "RoiAlign", "MaxRoiPool")
def _sample(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    for axis in labels[2:]:
        call.pin(axis, "samples from it")
    if call.node.op != "GridSample":
        call.pin(labels[0], "picks from it by index")
        labels[0] = None
    return [(*labels[:2], *[None] * (len(labels) - 2))]


@relation("Trilu")
def _triangle(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    for axis in labels[-2:]:
        call.pin(axis, "cuts a triangle from it")
    return [(*labels[:-2], None, None)]


@relation("QuantizeLinear", "DequantizeLinear")
def _quantize(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    axis = int(call.attr("axis", 1)) % max(1, len(labels))
    for index in (1, 2):
        dims = call.dims(index) if call.has(index) else ()
        if call.attr("block_size", 0) or len(dims) > 1:
            return None
        parameters = call.axes(index) if call.has(index) else []
        if dims and dims[0] != 1:
            labels[axis] = call.join(labels[axis], parameters[0])
    return [tuple(labels)]
