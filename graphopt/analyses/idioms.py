"""Operators that exporters write out in parts: normalizations and activations, found by what they compute.

A finder starts at the one node that cannot be missing (the second ReduceMean, the Erf) and answers with all parts, or None. Parts are closed:
nothing outside reads what lies between. The order of commutative operands, a factor moved from one side of a product to the
other, Pow or Mul for a square: all the same here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.views import Array, scalar
from graphopt.edit import Editor
from graphopt.ir import Model, Node

_CLOSE: Final = 1e-6  # relative; constants come as float32 at best, 6e-8, or were printed with seven digits
_AXES_ARE_OPERAND: Final = 18  # of ReduceMean, ReduceL2, ReduceSumSquare; of ReduceSum since 13


@dataclass(frozen=True)
class Norm:
    """``(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias`` over `axes`; without the mean where `centred` is not set."""

    x: gs.Tensor
    result: gs.Tensor
    scale: gs.Tensor | None  # as written: may be a constant of any shape that broadcasts
    bias: gs.Tensor | None
    epsilon: float
    axes: tuple[int, ...]  # as written
    centred: bool
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Activation:
    """A function of one value. `kind`: ``erf`` and ``tanh`` (Gelu), ``sigmoid`` (x * sigmoid(alpha * x)), ``mish``, ``hardswish``."""

    kind: str
    x: gs.Tensor
    result: gs.Tensor
    nodes: tuple[Node, ...]
    alpha: float = 1.0


def members(model: Model, edit: Editor) -> set[int]:
    """The ids of all nodes that are part of a normalization or a Gelu: folding one of them into a weight would hide the rest from a
    runtime that fuses them."""
    found: set[int] = set()
    for node in model.nodes():
        idiom = normalization(node, edit) or gelu(node, edit)
        if idiom is not None:
            found.update(id(n) for n in idiom.nodes)
    return found


def close(a: float | None, b: float) -> bool:
    """Whether two constants are meant to be the same."""
    return a is not None and abs(a - b) <= _CLOSE * abs(b)


def widened(found: Activation, shapes: Shapes) -> str | None:
    """Why the result may have more dimensions than x, by constants such as ``[[6]]``; None where it has as many."""
    widest = max((len(t.shape or ()) for n in found.nodes for t in n.inputs if isinstance(t, gs.Constant)), default=0)
    rank = shapes.rank(found.x)
    if widest and (rank is None or rank < widest):
        return f"a constant of {widest} dimensions may add some to {found.x.name!r}"
    return None


def closed(nodes: Sequence[Node], result: gs.Tensor, edit: Editor) -> bool:
    """Whether only `nodes` read what they compute, but for `result`, and all lie in one graph."""
    inside = {id(n) for n in nodes}
    graphs = {id(edit.graph_of(n)) for n in nodes}
    between = [t for n in nodes for t in n.outputs if t is not result]
    return len(graphs) == 1 and not any(
        edit.is_output(t) or any(id(r) not in inside for r in t.outputs) for t in between
    )


def _is(node: Node | None, *ops: str) -> bool:
    return node is not None and node.is_onnx and node.op in ops


def _other(node: Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


# ------------------------------------------------------------------------------------------------------- normalizations


def normalization(node: Node, edit: Editor) -> Norm | None:
    """The normalization whose variance `node` computes."""
    axes = _mean_axes(node, edit)
    square = edit.producer(node.inputs[0]) if axes is not None else None
    if axes is None or square is None:
        return None
    centre = squared(square, edit)
    shift = edit.sole_consumer(node.outputs[0])
    if centre is None or shift is None or not _is(shift, "Add"):
        return None
    epsilon = scalar(_other(shift, node.outputs[0]), edit)
    if epsilon is None or epsilon < 0:
        return None
    inverse = _inverse_root(shift, edit)
    if inverse is None:
        return None
    root, parts = inverse
    x, mean_nodes = centre, []
    subtract = edit.producer(centre)
    if subtract is not None and _is(subtract, "Sub"):
        mean = edit.producer(subtract.inputs[1])
        if mean is not None and _mean_axes(mean, edit) == axes and mean.inputs[0] is subtract.inputs[0]:
            x, mean_nodes = subtract.inputs[0], [mean, subtract]
    nodes = [*mean_nodes, square, node, shift, *parts]
    whole = _scaled(centre, root, nodes, edit) or (
        _unfolded(x, mean_nodes[0], root, nodes, edit) if mean_nodes else None
    )
    if whole is None:
        return None
    result, scale, bias = whole
    if not closed(nodes, result, edit):
        return None
    return Norm(x, result, scale, bias, epsilon, axes, bool(mean_nodes), tuple(nodes))


def _mean_axes(node: Node, edit: Editor) -> tuple[int, ...] | None:
    if not _is(node, "ReduceMean") or not node.attrs.get("keepdims", 1):
        return None
    return reduced_axes(node, edit)


def reduced_axes(node: Node, edit: Editor) -> tuple[int, ...] | None:
    """The axes of a reduction, attribute or fixed operand, as written; None where they are neither, or none are named."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1].name:
        axes = node.inputs[1].values.reshape(-1).tolist() if edit.is_fixed(node.inputs[1]) else None
    return tuple(int(a) for a in axes) if axes else None


def reduction(op: str, total: Node, x: gs.Tensor, last: Node, opset: int, edit: Editor) -> Node:
    """An `op` (an operator whose axes are an operand from opset 18 on) of `x` over the axes of the ReduceSum `total`, which writes the result
    of `last`; `last` gives it up."""
    attributes: dict[str, Any] = {} if total.attrs.get("keepdims", 1) else {"keepdims": 0}
    inputs, result = [x], last.outputs[0]
    axes = reduced_axes(total, edit) or ()
    if opset < _AXES_ARE_OPERAND:
        attributes["axes"] = list(axes)
    else:
        inputs.append(total.inputs[1] if len(total.inputs) > 1 else edit.constant(f"{total.name}_axes", np.array(axes)))
    last.outputs.clear()
    return Node(op, last.name, attributes, inputs, [result])


def squared(node: Node, edit: Editor) -> gs.Tensor | None:
    """What `node` squares, by Pow or by Mul."""
    if _is(node, "Pow") and scalar(node.inputs[1], edit) == 2:
        return node.inputs[0]
    return node.inputs[0] if _is(node, "Mul") and node.inputs[0] is node.inputs[1] else None


def _inverse_root(shift: Node, edit: Editor) -> tuple[tuple[gs.Tensor, bool], list[Node]] | None:
    """What ``variance + epsilon`` becomes: the square root or its inverse, and whether it is the inverse."""
    root = edit.sole_consumer(shift.outputs[0])
    if root is None or not (_is(root, "Sqrt") or (_is(root, "Pow") and root.inputs[0] is shift.outputs[0])):
        return None
    parts = [root]
    inverse = False
    if root.op == "Pow":
        power = scalar(root.inputs[1], edit)
        if power not in (0.5, -0.5):
            return None
        inverse = power == -0.5
    turned = edit.sole_consumer(root.outputs[0])
    if (
        not inverse
        and turned is not None
        and (
            _is(turned, "Reciprocal")
            or (_is(turned, "Div") and turned.inputs[1] is root.outputs[0] and scalar(turned.inputs[0], edit) == 1)
        )
    ):
        parts.append(turned)
        inverse = True
    return (parts[-1].outputs[0], inverse), parts


def _scaled(
    centre: gs.Tensor, root: tuple[gs.Tensor, bool], nodes: list[Node], edit: Editor
) -> tuple[gs.Tensor, gs.Tensor | None, gs.Tensor | None] | None:
    """``centre / root * scale + bias``; appends the nodes."""
    tensor, inverse = root
    apply = edit.sole_consumer(tensor)
    if apply is None or not _is(apply, "Mul" if inverse else "Div"):
        return None
    if (_other(apply, tensor) if inverse else apply.inputs[0]) is not centre or (
        not inverse and apply.inputs[1] is not tensor
    ):
        return None
    nodes.append(apply)
    result, scale, bias = apply.outputs[0], None, None
    following = edit.sole_consumer(result)
    if following is not None and _is(following, "Mul") and edit.is_fixed(_other(following, result)):
        scale = _other(following, result)
        nodes.append(following)
        result = following.outputs[0]
        following = edit.sole_consumer(result)
    if following is not None and _is(following, "Add") and edit.is_fixed(_other(following, result)):
        bias = _other(following, result)
        if scale is not None or bias.values.ndim > 0:
            nodes.append(following)
            result = following.outputs[0]
        else:
            bias = None
    return result, scale, bias


def _unfolded(
    x: gs.Tensor, mean: Node, root: tuple[gs.Tensor, bool], nodes: list[Node], edit: Editor
) -> tuple[gs.Tensor, gs.Tensor | None, gs.Tensor | None] | None:
    """TensorFlow's ``x * (scale / root) + (bias - mean * (scale / root))``; appends the nodes."""
    tensor, inverse = root
    factor = edit.sole_consumer(tensor)
    if not inverse or factor is None or not _is(factor, "Mul") or not edit.is_fixed(_other(factor, tensor)):
        return None
    readers = list({id(n): n for n in factor.outputs[0].outputs}.values())
    if len(readers) != 2 or not all(_is(n, "Mul") for n in readers):
        return None
    big = next((n for n in readers if _other(n, factor.outputs[0]) is x), None)
    small = next((n for n in readers if _other(n, factor.outputs[0]) is mean.outputs[0]), None)
    if big is None or small is None:
        return None
    rest = edit.sole_consumer(small.outputs[0])
    if (
        rest is None
        or not _is(rest, "Sub")
        or rest.inputs[1] is not small.outputs[0]
        or not edit.is_fixed(rest.inputs[0])
    ):
        return None
    total = edit.sole_consumer(rest.outputs[0])
    if total is None or not _is(total, "Add") or _other(total, rest.outputs[0]) is not big.outputs[0]:
        return None
    nodes += [factor, big, small, rest, total]
    return total.outputs[0], _other(factor, tensor), rest.inputs[0]


# ---------------------------------------------------------------------------------------------------------- activations


def gelu(node: Node, edit: Editor) -> Activation | None:
    """The Gelu, exact or by tanh, whose Erf or Tanh `node` is: ``0.5 * x * (1 + erf(x / sqrt(2)))``."""
    if not _is(node, "Erf", "Tanh"):
        return None
    plus = edit.sole_consumer(node.outputs[0])
    if plus is None or not _is(plus, "Add") or scalar(_other(plus, node.outputs[0]), edit) != 1:
        return None
    if node.op == "Erf":
        wanted, kind = {1: math.sqrt(0.5)}, "erf"
    else:
        wanted, kind = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}, "tanh"
    found = _times(plus.outputs[0], 0.5, edit)
    for x, result, nodes in found:
        inner: list[Node] = []
        terms = _polynomial(node.inputs[0], x, edit, inner)
        if terms is not None and terms.keys() == wanted.keys() and all(close(terms[k], wanted[k]) for k in wanted):
            every = [*inner, node, plus, *nodes]
            if closed(every, result, edit):
                return Activation(kind, x, result, tuple({id(n): n for n in every}.values()))
    return None


def gated(node: Node, edit: Editor) -> Activation | None:
    """``x * f(x)``: with f a Sigmoid of alpha * x, the Tanh of a Softplus, or a HardSigmoid of slope 1/6, which may be written as a Clip."""
    if _is(node, "Clip"):
        return _hard_swish(node, edit)
    if not _is(node, "Sigmoid", "Tanh", "HardSigmoid"):
        return None
    for x, result, nodes in _times(node.outputs[0], 1.0, edit):
        inner: list[Node] = []
        if node.op == "Tanh":
            soft = edit.producer(node.inputs[0])
            if soft is None or not _is(soft, "Softplus") or soft.inputs[0] is not x:
                continue
            found = Activation("mish", x, result, (soft, node, *nodes))
        elif node.op == "HardSigmoid":
            if (
                node.inputs[0] is not x
                or not close(node.attrs.get("alpha", 0.2), 1 / 6)
                or node.attrs.get("beta", 0.5) != 0.5
            ):
                continue
            found = Activation("hardswish", x, result, (node, *nodes))
        else:
            terms = _polynomial(node.inputs[0], x, edit, inner)
            if terms is None or terms.keys() != {1}:
                continue
            found = Activation("sigmoid", x, result, (*inner, node, *nodes), terms[1])
        if closed(found.nodes, result, edit):
            return found
    return None


def _hard_swish(clip: Node, edit: Editor) -> Activation | None:
    """``x * clip(a * x + a * 3, 0, a * 6) / (a * 6)``, for any a: exporters write a = 1, and a = 1/6 where they round early."""
    low, high = (_bound(clip, place, name, edit) for place, name in ((1, "min"), (2, "max")))
    if low != 0 or high is None or high <= 0:
        return None
    for x, result, nodes in _times(clip.outputs[0], 1 / high, edit):
        inner: list[Node] = []
        terms = _polynomial(clip.inputs[0], x, edit, inner)
        if terms is None or terms.keys() != {0, 1}:
            continue
        every = tuple({id(n): n for n in (*inner, clip, *nodes)}.values())
        if close(terms[1], high / 6) and close(terms[0], high / 2) and closed(every, result, edit):
            return Activation("hardswish", x, result, every)
    return None


def _bound(clip: Node, place: int, name: str, edit: Editor) -> float | None:
    """A bound of a Clip, operand or, before opset 11, attribute; None where there is none or it is not fixed."""
    if len(clip.inputs) > place and clip.inputs[place].name:
        return scalar(clip.inputs[place], edit)
    value = clip.attrs.get(name)
    return None if value is None else float(value)


def _times(tensor: gs.Tensor, number: float, edit: Editor) -> Iterator[tuple[gs.Tensor, gs.Tensor, list[Node]]]:
    """Products ``number * x * tensor`` that grow from `tensor`: x, the product, and its nodes."""
    factor, x = 1.0, None
    nodes: list[Node] = []
    current = tensor
    for _ in range(3):
        reader = edit.sole_consumer(current)
        if reader is None or not _is(reader, "Mul", "Div"):
            return
        other = _other(reader, current)
        if other is current or (reader.op == "Div" and reader.inputs[0] is not current):
            return
        constant = scalar(other, edit)
        nodes.append(reader)
        if constant is not None:
            if constant == 0:
                return
            factor = factor / constant if reader.op == "Div" else factor * constant
        elif x is None and reader.op == "Mul":
            x = other
            half = edit.producer(other)
            if half is not None and _is(half, "Mul", "Div") and edit.sole_consumer(other) is reader:
                for index in (0, 1) if half.op == "Mul" else (0,):
                    part = scalar(half.inputs[1 - index], edit)
                    if part and close(factor * part if half.op == "Mul" else factor / part, number):
                        yield half.inputs[index], reader.outputs[0], [half, *nodes]
        else:
            return
        current = reader.outputs[0]
        if x is not None and close(factor, number):
            yield x, current, list(nodes)
            return


def _polynomial(
    tensor: gs.Tensor, x: gs.Tensor, edit: Editor, nodes: list[Node], depth: int = 0
) -> dict[int, float] | None:
    """`tensor` as powers of `x` with coefficients; appends the nodes that compute it."""
    if tensor is x:
        return {1: 1.0}
    constant = scalar(tensor, edit)
    if constant is not None:
        return {0: constant}
    node = edit.producer(tensor)
    if node is None or depth > 6 or not _is(node, "Mul", "Div", "Add", "Pow"):
        return None
    if not any(n is node for n in nodes):
        nodes.append(node)
    left = _polynomial(node.inputs[0], x, edit, nodes, depth + 1)
    right = _polynomial(node.inputs[1], x, edit, nodes, depth + 1)
    if left is None or right is None:
        return None
    if node.op == "Add":
        return {k: left.get(k, 0.0) + right.get(k, 0.0) for k in {**left, **right}}
    if node.op == "Mul":
        return _multiply(left, right)
    if right.keys() != {0} or right[0] == 0:
        return None
    if node.op == "Div":
        return {k: v / right[0] for k, v in left.items()}
    power = right[0]
    if power not in (2, 3):
        return None
    result = left
    for _ in range(int(power) - 1):
        result = _multiply(result, left)
    return result


def _multiply(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    result: dict[int, float] = {}
    for a, x in left.items():
        for b, y in right.items():
            result[a + b] = result.get(a + b, 0.0) + x * y
    return result


def trailing(constant: gs.Tensor | None, shape: Sequence[int]) -> Array | None:
    """A constant as an array of exactly `shape`, where broadcasting it to values that end in `shape` varies along these axes alone."""
    if constant is None:
        return None
    values = np.asarray(constant.values)
    while values.ndim > len(shape) and values.shape[0] == 1:
        values = values[0]
    try:
        return np.broadcast_to(values, tuple(shape)) if values.ndim <= len(shape) else None
    except ValueError:
        return None


def by_channel(constant: gs.Tensor, rank: int, channels: int) -> Array | None:
    """A constant as a vector of `channels`, where broadcasting it to values of `rank` dimensions varies along axis 1 alone."""
    values = np.asarray(constant.values)
    if values.ndim > rank:
        return None
    wide = values.reshape((1,) * (rank - values.ndim) + values.shape)
    if wide.shape[0] != 1 or wide.shape[1] not in (1, channels) or any(d != 1 for d in wide.shape[2:]):
        return None
    return np.array(np.broadcast_to(wide.reshape(-1), (channels,)))
