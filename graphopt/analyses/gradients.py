"""Gradients without a framework: vector-Jacobian products of the operators between layers and outputs, in numpy.

``squares`` gives what Fisher importance needs: for each class of channels the mean over samples of ``(dL/dm)^2``, m a factor on the channels
where they are summed over and L the log-likelihood of the outputs under unit noise relative to their spread: its gradient at the
outputs is drawn, so no labels are needed. An operator that is not in the table ends it: `Untold` names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.channel_groups import ChannelGroups
from graphopt.analyses.gram import convolution
from graphopt.errors import UserError
from graphopt.ir import Model, Node, subgraphs
from graphopt.pass_base import Evaluate

Array = np.ndarray[Any, Any]
Backward = Callable[["_Step", Array], Sequence[Array | None]]


class Untold(UserError):
    """A node has no rule."""


class _Step:
    """A node that was computed: its operands, its first result, and a way to compute other nodes."""

    def __init__(self, model: Model, node: Node, operands: Sequence[Any], result: Array, evaluate: Evaluate) -> None:
        self.model, self.node, self.x, self.y, self.evaluate = model, node, operands, result, evaluate

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def compute(self, op: str, attrs: Mapping[str, Any], *operands: Array) -> Array:
        """Another node on arrays."""
        inputs = [gs.Variable(f"i{k}") for k in range(len(operands))]
        node = Node(op, "gradient", dict(attrs), inputs, [gs.Variable("o")])
        return self.evaluate(self.model, node, list(operands))[0]


TABLE: Final[dict[str, Backward]] = {}


def _rule(*ops: str) -> Callable[[Backward], Backward]:
    def register(rule: Backward) -> Backward:
        TABLE.update(dict.fromkeys(ops, rule))
        return rule

    return register


def _fit(gradient: Array, like: Array) -> Array:
    """Sum over the axes along which an operand was broadcast."""
    extra = gradient.ndim - like.ndim
    axes = (*range(extra), *(i + extra for i, n in enumerate(like.shape) if n == 1 and gradient.shape[i + extra] != 1))
    return gradient.sum(axes, keepdims=True).reshape(like.shape) if axes else gradient


_UNARY: Final[dict[str, Callable[[_Step], Array]]] = {
    "Relu": lambda s: s.x[0] > 0,
    "Sigmoid": lambda s: s.y * (1 - s.y),
    "Tanh": lambda s: 1 - s.y**2,
    "Exp": lambda s: s.y,
    "Log": lambda s: 1 / s.x[0],
    "Sqrt": lambda s: 0.5 / np.maximum(s.y, 1e-12),
    "Reciprocal": lambda s: -(s.y**2),
    "Neg": lambda s: -np.ones_like(s.y),
    "Abs": lambda s: np.sign(s.x[0]),
    "Erf": lambda s: 2 / math.sqrt(math.pi) * np.exp(-(s.x[0] ** 2)),
    "Softplus": lambda s: 1 / (1 + np.exp(-s.x[0])),
    "Clip": lambda s: s.x[0] == s.y,
    "LeakyRelu": lambda s: np.where(s.x[0] > 0, 1, s.attr("alpha", 0.01)),
    "Elu": lambda s: np.where(s.x[0] > 0, 1, s.y + s.attr("alpha", 1.0)),
    "HardSigmoid": lambda s: s.attr("alpha", 0.2) * ((s.y > 0) & (s.y < 1)),
    "HardSwish": lambda s: np.where(s.x[0] >= 3, 1, np.where(s.x[0] <= -3, 0, s.x[0] / 3 + 0.5)),
}


@_rule(*_UNARY)
def _unary(step: _Step, g: Array) -> Sequence[Array | None]:
    return [g * _UNARY[step.node.op](step)]


@_rule("Identity", "Cast", "Dropout")
def _same(step: _Step, g: Array) -> Sequence[Array | None]:
    return [g]


@_rule("Gelu")
def _gelu(step: _Step, g: Array) -> Sequence[Array | None]:
    def at(x: Array) -> Array:
        return step.compute("Gelu", step.node.attrs, x)

    x, h = step.x[0], np.float32(1e-2)
    return [g * (at(x + h) - at(x - h)) / (2 * h)]


@_rule("Add", "Sum", "Sub", "Mul", "Div", "Pow")
def _arithmetic(step: _Step, g: Array) -> Sequence[Array | None]:
    op, x = step.node.op, step.x
    if op in ("Add", "Sum"):
        return [_fit(g, a) for a in x]
    if op == "Sub":
        return [_fit(g, x[0]), _fit(-g, x[1])]
    if op == "Mul":
        return [_fit(g * x[1], x[0]), _fit(g * x[0], x[1])]
    if op == "Div":
        return [_fit(g / x[1], x[0]), _fit(-g * step.y / x[1], x[1])]
    return [_fit(g * x[1] * np.power(x[0], x[1] - 1), x[0]), None]


@_rule("MatMul")
def _matmul(step: _Step, g: Array) -> Sequence[Array | None]:
    a, b = step.x
    return [_fit(g @ np.swapaxes(b, -1, -2), a), _fit(np.swapaxes(a, -1, -2) @ g, b)]


@_rule("Gemm")
def _gemm(step: _Step, g: Array) -> Sequence[Array | None]:
    b, alpha = step.x[1], step.attr("alpha", 1.0)
    if step.attr("transA", 0):
        raise Untold(f"node {step.node.name!r} (Gemm) with transA has no gradient")
    return [alpha * (g @ (b if step.attr("transB", 0) else b.T)), None, None]


@_rule("Conv")
def _conv(step: _Step, g: Array) -> Sequence[Array | None]:
    x, w = step.x[0], step.x[1]
    strides, dilations, pads = convolution(step.node, x.shape[2:], w.shape[2:])
    attrs = {"strides": strides, "dilations": dilations, "group": int(step.attr("group", 1))}
    full = step.compute("ConvTranspose", attrs, np.ascontiguousarray(g), w)
    wanted = tuple(n + a + b for n, (a, b) in zip(x.shape[2:], pads, strict=True))
    room = [(0, 0), (0, 0), *((0, max(0, n - m)) for n, m in zip(wanted, full.shape[2:], strict=True))]
    cut = tuple(slice(a, a + n) for n, (a, _) in zip(x.shape[2:], pads, strict=True))
    return [np.pad(full, room)[(slice(None), slice(None), *cut)], None, None]


@_rule("GlobalAveragePool", "ReduceMean", "ReduceSum")
def _mean(step: _Step, g: Array) -> Sequence[Array | None]:
    x = step.x[0]
    if step.node.op == "GlobalAveragePool":
        axes = list(range(2, x.ndim))
    else:
        given = step.attr("axes") if len(step.x) < 2 or step.x[1] is None else step.x[1].tolist()
        axes = sorted(int(a) % x.ndim for a in (given if given is not None else range(x.ndim)))
        if not step.attr("keepdims", 1):
            g = np.expand_dims(g, tuple(axes))
    share = 1 if step.node.op == "ReduceSum" else math.prod(x.shape[a] for a in axes)
    return [np.broadcast_to(g / np.float32(share), x.shape)]


@_rule("MaxPool", "AveragePool")
def _pool(step: _Step, g: Array) -> Sequence[Array | None]:
    x, kernel = step.x[0], tuple(int(k) for k in step.attr("kernel_shape"))
    strides, dilations, pads = convolution(step.node, x.shape[2:], kernel)
    largest = step.node.op == "MaxPool"
    room = [(0, 0), (0, 0), *((a, b + s * k) for (a, b), s, k in zip(pads, strides, kernel, strict=True))]
    padded = np.pad(x, room, constant_values=-np.inf if largest else 0)
    found, counts = np.zeros_like(padded, np.float32), np.zeros(g.shape, np.float32)
    places = []
    for offset in np.ndindex(*kernel):
        starts = [o * d for o, d in zip(offset, dilations, strict=True)]
        at = tuple(slice(b, b + n * s, s) for b, n, s in zip(starts, g.shape[2:], strides, strict=True))
        places.append((slice(None), slice(None), *at))
    hits = [(padded[p] == step.y) if largest else np.ones(g.shape, bool) for p in places]
    for hit in hits:
        counts += hit
    for place, hit in zip(places, hits, strict=True):
        found[place] += g * hit / np.maximum(counts, 1)
    inner = tuple(slice(a, a + n) for n, (a, _) in zip(x.shape[2:], pads, strict=True))
    return [found[(slice(None), slice(None), *inner)]]


@_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(step: _Step, g: Array) -> Sequence[Array | None]:
    return [g.reshape(step.x[0].shape)]


@_rule("Transpose")
def _transpose(step: _Step, g: Array) -> Sequence[Array | None]:
    perm = step.attr("perm") or range(g.ndim)[::-1]
    return [g.transpose(np.argsort([int(p) for p in perm]))]


@_rule("Concat")
def _concat(step: _Step, g: Array) -> Sequence[Array | None]:
    axis = int(step.attr("axis"))
    return np.split(g, np.cumsum([a.shape[axis] for a in step.x])[:-1], axis)


@_rule("Slice", "Gather")
def _picked(step: _Step, g: Array) -> Sequence[Array | None]:
    """The same node on numbers of places tells where each element came from."""
    numbers = np.arange(step.x[0].size, dtype=np.int64).reshape(step.x[0].shape)
    places = step.compute(step.node.op, step.node.attrs, numbers, *[a for a in step.x[1:] if a is not None])
    found = np.zeros(numbers.size, np.float32)
    np.add.at(found, places.reshape(-1), np.ascontiguousarray(g).reshape(-1))
    return [found.reshape(numbers.shape)]


@_rule("Softmax")
def _softmax(step: _Step, g: Array) -> Sequence[Array | None]:
    axis = int(step.attr("axis", -1))
    return [step.y * (g - (g * step.y).sum(axis, keepdims=True))]


@_rule("LayerNormalization")
def _layer_norm(step: _Step, g: Array) -> Sequence[Array | None]:
    x, scale = step.x[0], step.x[1]
    axes = tuple(range(int(step.attr("axis", -1)) % x.ndim, x.ndim))
    deviation = np.sqrt(x.var(axes, keepdims=True) + step.attr("epsilon", 1e-5))
    normal, h = (x - x.mean(axes, keepdims=True)) / deviation, g * scale
    return [(h - h.mean(axes, keepdims=True) - normal * (h * normal).mean(axes, keepdims=True)) / deviation]


@_rule("BatchNormalization")
def _batch_norm(step: _Step, g: Array) -> Sequence[Array | None]:
    shape = (1, -1, *(1,) * (g.ndim - 2))
    factor = step.x[1] / np.sqrt(step.x[4] + step.attr("epsilon", 1e-5))
    return [g * factor.reshape(shape)]


def squares(
    groups: ChannelGroups, feeds: Sequence[Mapping[str, Array]], evaluate: Evaluate, seed: int = 0
) -> dict[int, float]:
    """Class -> the mean over samples of the squared gradient by a factor on its channels.

    Raises:
        Untold: a node on the way has no rule.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(int(groups.roots.max()) + 1 if groups.size else 0)
    count = 0
    for feed in feeds:
        batch = max((len(a) for a in feed.values() if a.ndim), default=1)
        each = _one(groups, feed, batch, evaluate, rng)
        total += np.square(each).sum(0)
        count += len(each)
    return {root: float(total[root] / max(1, count)) for root in groups.classes}


def _one(
    groups: ChannelGroups, feed: Mapping[str, Array], batch: int, evaluate: Evaluate, rng: np.random.Generator
) -> Array:
    """[samples, classes]: the gradients of one feed."""
    model = groups.model
    values: dict[str, Array] = dict(feed)
    steps: list[_Step] = []
    for node in model.graph.nodes:
        if subgraphs(node):
            raise Untold(f"importance=fisher: node {node.name!r} ({node.op}) has a body; take importance=obs")
        operands = [
            None if not t.name else np.asarray(t.values) if isinstance(t, gs.Constant) else values[t.name]
            for t in node.inputs
        ]
        results = evaluate(model, node, operands)
        for tensor, value in zip([t for t in node.outputs if t.name], results, strict=True):
            values[tensor.name] = value
        steps.append(_Step(model, node, operands, results[0], evaluate))
    gradients: dict[str, Array] = {}
    for tensor in model.graph.outputs:
        value = values[tensor.name]
        if value.dtype.kind == "f":
            drawn = np.asarray(rng.standard_normal(value.shape), np.float32)
            gradients[tensor.name] = drawn / (float(value.std()) or 1.0)
    reads: dict[str, list[Any]] = {}
    for contraction in groups.contractions:
        reads.setdefault(contraction.node.name, []).append(contraction)
    found = np.zeros((batch, int(groups.roots.max()) + 1))
    for step in reversed(steps):
        names = [t.name for t in step.node.outputs if t.name]
        if not any(name in gradients for name in names):
            continue
        backs = _back(step, names, gradients, values)
        for place, (tensor, back) in enumerate(zip(step.node.inputs, backs, strict=False)):
            if back is None or not tensor.name:
                continue
            for contraction in reads.get(step.node.name, ()):
                if contraction.operand == place:
                    _collect(found, groups, contraction.axis, contraction.atoms, step.x[place] * back)
            if not isinstance(tensor, gs.Constant):
                gradients[tensor.name] = gradients[tensor.name] + back if tensor.name in gradients else back
        for name in names:
            gradients.pop(name, None)
    return found


def _back(
    step: _Step, names: Sequence[str], gradients: Mapping[str, Array], values: Mapping[str, Array]
) -> Sequence[Array | None]:
    node = step.node
    if step.y.dtype.kind != "f":
        return []
    if node.op == "Split" and node.is_onnx:
        parts = [gradients.get(n, np.zeros_like(values[n])) for n in names]
        return [np.concatenate(parts, int(step.attr("axis", 0)))]
    rule = TABLE.get(node.op) if node.is_onnx else None
    if rule is None:
        raise Untold(f"importance=fisher: node {node.name!r} ({node.op}) has no gradient here; take importance=obs")
    return rule(step, gradients[names[0]])


def _collect(found: Array, groups: ChannelGroups, axis: int, atoms: Array, product: Array) -> None:
    """Add ``a * dL/da``, summed over all but samples and channels, to the classes of an axis."""
    moved = np.moveaxis(product, axis, -1)
    split = axis != 0 and moved.ndim > 1 and moved.shape[0] == len(found)
    rows = (
        moved.reshape(len(found), -1, len(atoms)).sum(1)
        if split
        else moved.reshape(1, -1, len(atoms)).sum(1) / len(found)
    )
    np.add.at(found.T, groups.roots[atoms], np.broadcast_to(rows, (len(found), len(atoms))).T)
