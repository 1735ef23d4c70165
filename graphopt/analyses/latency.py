"""What layers cost on this machine, by the widths that they are given: measured one by one, where and when it is asked.

A layer is timed alone, on the shapes that a sample gives it, at widths rounded up to multiples of a grid, since kernels pad. A convolution
stands between a cheap one in front and a pool behind, so that it finds its operand in the layout that it would find in the model; the
time of the two without it is taken off. Everything else is charged by elements, with what is left of the whole model's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analyses.channel_costs import Term, product
from graphopt.analyses.channel_groups import ChannelGroups
from graphopt.analyses.repair import Runner, pool
from graphopt.elements import Constant, Variable
from graphopt.ir import Graph, Model, Node
from graphopt.pass_base import Clock, Evaluate

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]

_LEAST: Final = 1e-7  # seconds: less is noise


@dataclass
class Stopwatch:
    """Times of layers by what decides them; each is measured once."""

    clock: Clock
    model: Model  # for its opsets
    grid: int  # widths are rounded up to multiples of this
    times: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def round_up(self, width: int, full: int) -> int:
        """The width at which a layer of `full` channels is measured for one of `width`."""
        return min(full, max(1, -(-width // self.grid)) * self.grid)

    def convolution(self, node: Node, sample: tuple[int, ...], ins: int, outs: int) -> float:
        """Seconds of a Conv of other widths; `sample` is the shape of its operand."""
        kernel = tuple(int(k) for k in node.inputs[1].shape[2:])
        depthwise = int(node.attrs.get("group", 1)) == sample[1] > 1
        group = ins if depthwise else int(node.attrs.get("group", 1))
        key = (
            "Conv",
            str(sorted((k, v) for k, v in node.attrs.items() if k != "group")),
            kernel,
            sample[:1],
            sample[2:],
            group,
            ins,
            outs,
        )
        if key not in self.times:
            shape = (sample[0], 1, *sample[2:])
            ones = (1,) * len(kernel)
            x = Variable("x", np.dtype(np.float32), shape)
            before = _conv(x, "before", (ins, 1, *ones), {})
            attrs = {**node.attrs, "group": group}
            layer = _conv(before.outputs[0], "layer", (outs, ins // group, *kernel), attrs)
            feeds = {"x": np.zeros(shape, np.float32)}
            models = [self._model([before, *more, _pool([before, *more][-1])], x) for more in ([], [layer])]
            without, whole = self.clock(models, feeds)
            self.times[key] = max(_LEAST, whole - without)
        return self.times[key]

    def product(self, rows: int, ins: int, outs: int) -> float:
        """Seconds of a product with a fixed matrix."""
        key = ("MatMul", rows, ins, outs)
        if key not in self.times:
            x = Variable("x", np.dtype(np.float32), (rows, ins))
            y = Variable("y", np.dtype(np.float32), (rows, outs))
            weight = Constant("w", _weights(ins, outs))
            model = self._model([Node("MatMul", "layer", {}, [x, weight], [y])], x)
            self.times[key] = max(_LEAST, self.clock([model], {"x": np.zeros((rows, ins), np.float32)})[0])
        return self.times[key]

    def node(self, node: Node, operands: Sequence[Array | None]) -> float:
        """Seconds of any other node, as it is."""
        inputs = [Variable("") if a is None else Variable(f"i{k}", a.dtype, a.shape) for k, a in enumerate(operands)]
        outputs = [Variable(f"o{k}" if t.name else "") for k, t in enumerate(node.outputs)]
        copy = Node(node.op, "layer", dict(node.attrs), inputs, outputs, node.domain or "")
        graph = Graph(name="layer")
        graph.nodes.append(copy)
        graph.inputs, graph.outputs = [t for t in inputs if t.name], [t for t in outputs if t.name]
        feeds = {f"i{k}": a for k, a in enumerate(operands) if a is not None}
        return max(_LEAST, self.clock([self._wrap(graph)], feeds)[0])

    def _model(self, nodes: Sequence[Node], source: Variable) -> Model:
        graph = Graph(name="layer")
        for node in nodes:
            graph.nodes.append(node)
        graph.inputs, graph.outputs = [source], [nodes[-1].outputs[0]]
        return self._wrap(graph).clone()

    def _wrap(self, graph: Graph) -> Model:
        carried = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.carried.opset_import)
        return Model(graph, carried)


def _weights(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _conv(x: gs.Tensor, name: str, shape: tuple[int, ...], attrs: Mapping[str, Any]) -> Node:
    return Node("Conv", name, dict(attrs), [x, Constant(f"{name}_w", _weights(*shape))], [Variable(f"{name}_y")])


def _pool(last: Node) -> Node:
    return Node("GlobalAveragePool", "pool", {}, [last.outputs[0]], [Variable("pooled")])


def terms(
    groups: ChannelGroups, clock: Clock, feed: Mapping[str, Array], evaluate: Evaluate, grid: int
) -> tuple[list[Term], float]:
    """The model's time by the widths of its axes, and the seconds of the whole model.

    Args:
        groups: of the model.
        clock: times models.
        feed: a sample, which gives dynamic dimensions their sizes.
        evaluate: computes one node.
        grid: widths are rounded up to multiples of this.
    """
    watch = Stopwatch(clock, groups.model, grid)
    whole = clock([groups.model], feed)[0]
    found: list[Term] = []
    others: list[tuple[list[Array | int], str, float]] = []
    runner = Runner(groups.model, [feed], evaluate)
    with pool() as threads:
        for node in groups.model.graph.nodes:
            operands = [None if not t.name else runner.get(t)[0] for t in node.inputs]
            results = runner.run(node, threads)
            term = _term(groups, watch, node, operands, results[0][0] if results else None)
            if term is not None:
                found.append(term)
            elif results:
                axes, elements = [a for a in groups.labels(node.outputs[0]) or () if a is not None], results[0][0].size
                rest = elements / math.prod(map(len, axes)) if axes else elements
                others.append(([*axes], node.name, rest))
            runner.keep(node, results)
    layers = sum(term.price([len(a) for a in term.axes]) for term in found)
    total = sum(rest * math.prod(len(a) for a in axes if not isinstance(a, int)) for axes, _, rest in others)
    rate = max(0.0, whole - layers) / max(1.0, total)
    found.extend(product(axes, [name], rate * rest) for axes, name, rest in others)
    return found, whole


def _term(
    groups: ChannelGroups, watch: Stopwatch, node: Node, operands: Sequence[Array | None], result: Array | None
) -> Term | None:
    if not node.is_onnx or node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"):
        return None
    if result is None or operands[0] is None or operands[1] is None:
        return None
    weight, data = node.inputs[1], operands[0]
    if node.op == "Conv" and isinstance(weight, gs.Constant):
        ins, outs = groups.axis(node.inputs[0], 1), groups.axis(node.outputs[0], 1)
        return _widths(
            watch,
            node,
            ins,
            outs,
            data.shape[1],
            result.shape[1],
            lambda i, o: watch.convolution(node, data.shape, i, o),
        )
    flat = isinstance(weight, gs.Constant) and len(weight.shape) == 2 and not node.attrs.get("transA", 0)
    if node.op in ("Gemm", "MatMul") and flat:
        ins, outs = groups.axis(node.inputs[0], -1), groups.axis(node.outputs[0], -1)
        rows = max(1, result.size // result.shape[-1])
        return _widths(watch, node, ins, outs, data.shape[-1], result.shape[-1], lambda i, o: watch.product(rows, i, o))
    seconds = watch.node(node, operands)
    axes = {a.tobytes(): a for t in (*node.inputs, *node.outputs) for a in groups.labels(t) or () if a is not None}
    return product([*axes.values()], [node.name], seconds / math.prod(len(a) for a in axes.values()))


def _widths(
    watch: Stopwatch,
    node: Node,
    ins: Array | int,
    outs: Array | int,
    i: int,
    o: int,
    price: Callable[[int, int], float],
) -> Term:
    """A term that depends on two widths, either of which may be fixed."""
    group = int(node.attrs.get("group", 1)) if node.op == "Conv" else 1

    def seconds(lengths: Sequence[int]) -> float:
        left = list(lengths)
        a = left.pop(0) if not isinstance(ins, int) else i
        b = left.pop(0) if not isinstance(outs, int) else o
        if not a or not b:
            return 0.0
        a, b = watch.round_up(a, i), watch.round_up(b, o)
        if group == i > 1:  # depthwise
            b = a * (o // i)
        elif a % group or b % group:
            a, b = -(-a // group) * group, -(-b // group) * group
        return price(a, b)

    axes = tuple(t for t in (ins, outs) if not isinstance(t, int))
    return Term(seconds, axes, (node.name,))
