"""What is added to every input of a linear operator per channel is added to its outputs, and a BatchNormalization ahead is a factor, too:

    (x + a) @ W + c = x @ W + (a @ W + c)                   Gemm, and MatMul whose result has a constant added
    conv(x + a, W, c) = conv(x, W, sum(W, taps) @ a + c)    Conv that does not pad
    conv(BN(x), W, c) = conv(x, W * k, sum(W, taps) @ (bias - mean * k) + c)

with ``k = scale / sqrt(var + epsilon)`` by input channel; each group of a Conv has its own. A Conv that pads adds zeros behind the shift, which is no shift
of x: it stays, unless the shift is zero.
So does the shift of what is exact, such as an input: ``x - a`` has all digits of a small difference of large numbers, which ``x @ W`` rounds
away. A computed x has lost them before; and a BatchNormalization whose means lie within a few spreads of zero has few to lose. Folded in
float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.batch_norm import channel_affine
from graphopt.analyses.idioms import members
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

Array = np.ndarray[Any, Any]
_FAR: Final = 16.0  # spreads between zero and the mean: four bits of the difference are lost at most
_ROUNDING: Final = frozenset(
    [
        "Add",
        "AveragePool",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "Div",
        "Exp",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "HardSwish",
        "LayerNormalization",
        "MatMul",
        "Mul",
        "ReduceMean",
        "Sigmoid",
        "Softmax",
        "Sub",
        "Tanh",
    ]
)
_SELECTING: Final = frozenset(
    ["Flatten", "Identity", "LeakyRelu", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]
)


@dataclass(frozen=True)
class FuseInputShift(Pass):
    """Fold a constant added to or subtracted from the input of Conv, Gemm or a biased MatMul, or a BatchNormalization of it, into weight and bias.

    Before:
        g (float[N,2,4] x) => (float[N,1,4] y)
        <float[2,1] mean = {1, 2}, float[1,2,1] w = {3, 4}, float[1] b = {5}>
        { s = Mul (x, x)
          a = Sub (s, mean)
          y = Conv (a, w, b) }
    After:
        g (float[N,2,4] x) => (float[N,1,4] y)
        <float[1,2,1] w = {3, 4}, float[1] b = {-6}>
        { s = Mul (x, x)
          y = Conv (s, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Conv", "Gemm", "MatMul"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of shifts folded."""
        if model.opset < 9:  # up to then Add and BatchNormalization have other modes
            return 0
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        idioms = members(model, edit)
        fused = 0
        for node in list(model.nodes()):
            shift = edit.producer(node.inputs[0]) if node.is_onnx and node.op in ("Conv", "Gemm", "MatMul") else None
            if shift is None or not shift.is_onnx or shift.op not in ("Add", "Sub", "BatchNormalization"):
                continue
            if id(shift) in idioms:
                ctx.remark(shift, "it stays part of a normalization or a Gelu, which runtimes fuse")
                continue
            found = _folded(node, shift, shapes, edit)
            if isinstance(found, str):
                ctx.remark(node, found)
                continue
            if not ctx.admit():
                break
            last = found.last
            result = last.outputs[0]
            last.outputs.clear()
            attributes = {k: v for k, v in node.attrs.items() if k != "beta"}
            weight = node.inputs[1] if found.weight is None else edit.constant(node.inputs[1].name, found.weight)
            bias = edit.constant(found.bias_name, found.bias)
            if node.op == "MatMul":
                product = Node(
                    "MatMul",
                    node.name,
                    attributes,
                    [found.source, weight],
                    [edit.variable(node.outputs[0].name, result)],
                )
                edit.insert_before(last, product, origin=(shift, node))
                new = Node("Add", last.name, {}, [product.outputs[0], bias], [result])
            else:
                new = Node(node.op, node.name, attributes, [found.source, weight, bias], [result])
                new.attr_types = dict(node.attr_types)
                new.carried = node.carried
            edit.insert_before(last, new, origin=(shift, node))
            if last is not node:
                edit.erase(last)
            edit.erase(node)
            edit.erase(shift)
            fused += 1
        edit.commit()
        return fused


@dataclass(frozen=True)
class _Folded:
    source: gs.Tensor
    weight: Array | None  # None: it stays
    bias: Array
    bias_name: str
    last: Node  # the node whose result this is: the product, or the Add behind a MatMul


def _folded(node: Node, shift: Node, shapes: Shapes, edit: Editor) -> _Folded | str:
    """What the operator becomes, or why it stays."""
    if edit.sole_consumer(shift.outputs[0]) is not node or edit.graph_of(shift) is not edit.graph_of(node):
        return f"{shift.outputs[0].name!r} is read by others too"
    w = node.inputs[1]
    if not all(edit.is_fixed(t) for t in node.inputs[1:] if t.name):
        return f"weight or bias of {node.name!r} is not constant"
    dtype = np.dtype(w.dtype)
    if dtype.kind != "f":
        return f"weight {w.name!r} is {dtype}, folding is for float16, float32 and float64"
    by_channel = _by_input_channel(node)
    if isinstance(by_channel, str):
        return by_channel
    group = int(node.attrs.get("group", 1)) if node.op == "Conv" else 1
    affine = _affine(node, shift, by_channel.shape[1] * group, shapes, edit)
    if isinstance(affine, str):
        return affine
    source, k, a = affine
    if a.any() and _pads(node):
        return f"{node.name!r} pads with zeros behind the shift"
    last, own = _own_bias(node, by_channel.shape[0], edit)
    if isinstance(own, str):
        return own
    if k is not None and edit.sole_consumer(w) is not node:
        return f"weight {w.name!r} is shared"
    with np.errstate(all="ignore"):
        total = (by_channel * _by_group(a, group, by_channel.shape[0])).sum(1)
        name = f"{node.name}_bias"
        if own is not None:
            tensor, values, sign = own
            total, name = total + sign * values, tensor.name
        bias = np.asarray(total).astype(dtype)
        weight = None
        if k is not None:
            exact = w.values.astype(np.float64) * _along_input(k, group, node)
            weight = exact.astype(dtype)
            if not np.isfinite(weight).all():
                return f"folding would make weight {w.name!r} infinite or NaN in {dtype}"
            if np.abs(weight - exact).max(initial=0) > np.finfo(dtype).eps * np.abs(exact).max(initial=0):
                return f"folding would make weight {w.name!r} too small for {dtype}"
    if not np.isfinite(bias).all():
        return f"the bias would be infinite or NaN in {dtype}"
    return _Folded(source, weight, bias, name, last)


def _is_rounded(tensor: gs.Tensor, edit: Editor) -> bool:
    """Whether the elements of `tensor` carry roundings as large as their own last digit."""
    node = edit.producer(tensor)
    while node is not None and node.is_onnx and node.op in _SELECTING:
        node = edit.producer(node.inputs[0])
    return node is not None and node.is_onnx and node.op in _ROUNDING


def _pads(node: Node) -> bool:
    return node.op == "Conv" and (
        node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(node.attrs.get("pads") or ())
    )


def _by_input_channel(node: Node) -> Array | str:
    """What one more in each input channel (of its group) adds to each output channel, as float64 [out, in], or why that is not known."""
    w = node.inputs[1].values.astype(np.float64)
    if node.op == "Conv":
        group = int(node.attrs.get("group", 1))
        if w.ndim < 3 or group < 1 or w.shape[0] % group:
            return f"{node.name!r} has a weight of another shape than its groups"
        return np.asarray(w.reshape(*w.shape[:2], -1).sum(2))
    if w.ndim != 2 or node.attrs.get("transA", 0):
        return f"{node.name!r} is no product of rows with one matrix"
    wide = w if node.attrs.get("transB", 0) else w.T
    return np.asarray(wide * float(node.attrs.get("alpha", 1.0)))


def _by_group(values: Array, group: int, outputs: int) -> Array:
    """Of one number for each input channel those that each output channel reads, as [out, in of a group]; of one group as [1, in]."""
    rows = values.reshape(group, -1)
    return rows if group == 1 else np.repeat(rows, outputs // group, axis=0)


def _along_input(k: Array, group: int, node: Node) -> Array:
    """`k` by input channel, as a factor of the weight."""
    if node.op == "Conv":
        shape = node.inputs[1].shape
        local = _by_group(k, group, shape[0])
        return local.reshape(*local.shape, *[1] * (len(shape) - 2))
    return k.reshape(1, -1) if node.attrs.get("transB", 0) else k.reshape(-1, 1)


def _affine(
    node: Node, shift: Node, channels: int, shapes: Shapes, edit: Editor
) -> tuple[gs.Tensor, Array | None, Array] | str:
    """What is shifted, the factor (None: 1) and the shift by channel; or why there are none."""
    if shift.op == "BatchNormalization":
        affine = channel_affine(shift, edit)
        if isinstance(affine, str):
            return affine
        if node.op == "MatMul" and shapes.rank(shift.inputs[0]) != 2:
            return f"{shift.name!r} normalizes another axis than {node.name!r} multiplies"
        if affine.scale.size != channels:
            return f"{shift.name!r} has {affine.scale.size} channels, {node.name!r} {channels}"
        if not affine.distance <= _FAR and not _is_rounded(shift.inputs[0], edit):
            return f"{shift.inputs[0].name!r} may be exact, and {shift.name!r} what keeps its digits"
        return shift.inputs[0], affine.scale, affine.shift
    for index in (0, 1) if shift.op == "Add" else (0,):
        constant, source = shift.inputs[1 - index], shift.inputs[index]
        if not edit.is_fixed(constant):
            continue
        rank, shape = shapes.rank(source), shapes.shape(source)
        behind = node.inputs[1].values.ndim - 1 if node.op == "Conv" else 1  # the place of the channels from behind
        if rank is None or shape is None or rank < behind or constant.values.ndim > rank or shape[-behind] != channels:
            return f"{constant.name!r} may broadcast its operand"
        values: Array = constant.values
        by_channel = values.ndim >= behind and values.shape[-behind] == channels == values.size
        if values.size != 1 and not by_channel:
            return f"{constant.name!r} of shape {list(values.shape)} is not constant per channel"
        a = np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,))
        if not _is_rounded(source, edit):
            return f"{source.name!r} may be exact, and the shift what keeps its digits"
        return source, None, a if shift.op == "Add" else -a
    return f"neither operand of {shift.name!r} is constant"


Bias = tuple[gs.Tensor, Array, float]  # where it comes from, its float64 values per output channel, its sign


def _own_bias(node: Node, channels: int, edit: Editor) -> tuple[Node, Bias | str | None]:
    """The last node of the operator, and the bias that it has already; or why it cannot take another."""
    last, factor = node, 1.0
    tensor: gs.Tensor | None = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if node.op == "Gemm":
        factor = float(node.attrs.get("beta", 1.0))
    if node.op == "MatMul":
        add = edit.sole_consumer(node.outputs[0])
        if add is None or add.op != "Add" or not add.is_onnx or edit.graph_of(add) is not edit.graph_of(node):
            return node, f"nothing is added to {node.outputs[0].name!r} that could take the shift"
        last, tensor = add, next((t for t in add.inputs if edit.is_fixed(t)), None)
        if tensor is None:
            return node, f"what is added to {node.outputs[0].name!r} is not constant"
    if tensor is None:
        return last, None
    values = tensor.values
    if values.size != 1 and (values.size != channels or values.shape[-1] != channels):
        return last, f"bias {tensor.name!r} of shape {list(values.shape)} is not constant per channel"
    if node.op == "MatMul" and values.ndim > 1:
        return last, f"bias {tensor.name!r} of {values.ndim} dimensions may widen the product"
    return last, (tensor, np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,)), factor)
