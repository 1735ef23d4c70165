"""Every quantized operator beside its float self, in one run of the float model.

A twin reads the same float operands as its original, rounds them as codes would, computes the same operator, and gives only a sum
over the difference. So one run judges all operators at once and each alone, whatever happens before it in the graph, and nothing large leaves
the runtime. Scales come in as inputs, so trying another range compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.calibration import Runner, effort
from graphopt.analyses.ranges import Affine
from graphopt.data import Data
from graphopt.edit import Editor, sort
from graphopt.ir import Model, Node, Variable, subgraphs

Array = np.ndarray[Any, Any]
Key = TypeVar("Key", bound=Hashable)

_FLOAT: Final = np.dtype(np.float32)
_FOLLOW: Final = 2  # nodes behind a reader


@dataclass(frozen=True)
class Twin:
    """How the first operand of a node and its weight are rounded."""

    codes: Affine
    weight: Array | None  # as float32; None: as it is


class _Builder:
    """A copy of a model with twins added."""

    def __init__(self, model: Model) -> None:
        self.model = model.clone()
        self.edit = Editor(self.model)
        self.nodes = {n.name: n for n in self.model.graph.nodes}
        self.tensors: dict[str, gs.Tensor] = {}
        for node in self.model.graph.nodes:
            self.tensors.update((t.name, t) for t in node.outputs if t.name)
        self.tensors.update((t.name, t) for t in self.model.graph.inputs)
        self.wanted: list[str] = []

    def add(self, op: str, operands: Sequence[gs.Tensor], **attributes: Any) -> Variable:
        """A node at the end of the graph."""
        output = Variable(self.edit.fresh_name("twin"), _FLOAT)
        self.model.graph.nodes.append(Node(op, self.edit.fresh_name("twin_node"), attributes, list(operands), [output]))
        return output

    def scalar(self, value: float) -> gs.Tensor:
        return self.edit.constant("twin_scalar", np.asarray(value, np.float32))

    def rounded(self, tensor: gs.Tensor, scale: gs.Tensor, low: gs.Tensor, high: gs.Tensor) -> Variable:
        """What coding and decoding leaves of `tensor`; in arithmetic, which no optimizer turns into int8 kernels."""
        codes = self.add("Round", [self.add("Div", [tensor, scale])])
        return self.add("Mul", [self.add("Clip", [codes, low, high]), scale])

    def copy(self, node: gs.Node, operands: Sequence[gs.Tensor]) -> Variable:
        """`node` again, on other operands; its first output."""
        output = Variable(self.edit.fresh_name("twin"), _FLOAT)
        outputs = [output, *(Variable("") for _ in node.outputs[1:])]
        copy = Node(
            node.op, self.edit.fresh_name("twin_node"), dict(node.attrs), list(operands), outputs, node.domain or ""
        )
        copy.attr_types = dict(node.attr_types)
        self.model.graph.nodes.append(copy)
        return output

    def give(self, tensor: gs.Tensor) -> str:
        self.wanted.append(tensor.name)
        return str(tensor.name)

    def feed(self, wish: str) -> Variable:
        value = Variable(self.edit.fresh_name(wish), _FLOAT, ())
        self.model.graph.inputs.append(value)
        return value


_FOLLOWED: Final = frozenset(["Relu", "LeakyRelu", "Clip", "Add", "Mul", "MaxPool", "HardSwish", "Sigmoid"])


class RangeJudge:
    """The error that codes of a tensor bring to those who read it, each group of tensors alone, all in one run.

    The error is taken behind the reader, and behind what its result alone goes through then (a sum, a Relu): what a Relu will cut off does
    no harm. Scales come in as inputs, so another range compiles nothing anew.
    """

    def __init__(
        self, model: Model, groups: Mapping[Key, Sequence[tuple[str, Sequence[str]]]], data: Data, samples: int
    ) -> None:
        """
        Args:
            model: in float, with named nodes.
            groups: of (tensor, names of its readers) in the root graph, that share codes.
            data: to judge on.
            samples: of `data`, how many.
        """
        build = _Builder(model)
        self._fed: dict[Any, tuple[str, str, str]] = {}
        self._errors: dict[Any, list[tuple[str, str]]] = {}
        for key, members in groups.items():
            scale, low, high = (build.feed(f"twin_{what}") for what in ("scale", "low", "high"))
            self._fed[key] = (scale.name, low.name, high.name)
            rounded = {name: build.rounded(build.tensors[name], scale, low, high) for name, _ in members}
            for reader in dict.fromkeys(r for _, readers in members for r in readers):
                pair = self._behind(build, build.nodes.get(reader), rounded)
                if pair is not None:
                    self._errors.setdefault(key, []).append(pair)
        self._wanted = list(build.wanted)
        self._samples = data.head(samples, effort(model, data).at_once)
        self._runner = Runner(build.model, build.wanted) if build.wanted else None

    @staticmethod
    def _behind(build: _Builder, node: gs.Node | None, rounded: Mapping[str, gs.Tensor]) -> tuple[str, str] | None:
        if node is None or subgraphs(node) or node.op in ("Shape", "Size"):
            return None
        found: gs.Tensor
        if node.op == "Split":  # its parts together are what it reads
            real = node.inputs[0]
            found = rounded.get(real.name, real)
        else:
            found = build.copy(node, [rounded.get(t.name, t) if t.name else t for t in node.inputs])
            real = node.outputs[0]
        for _ in range(_FOLLOW if node.op != "Split" else 0):
            after = build.edit.sole_consumer(real)
            if (
                after is None
                or after.op not in _FOLLOWED
                or len(after.outputs) != 1
                or len(set(map(id, after.inputs))) < len(after.inputs)
            ):
                break
            found = build.copy(
                after, [found if t is real else rounded.get(t.name, t) if t.name else t for t in after.inputs]
            )
            real = after.outputs[0]
        size = build.add("ReduceSumSquare", [real], keepdims=0)
        off = build.add("ReduceSumSquare", [build.add("Sub", [found, real])], keepdims=0)
        return build.give(off), build.give(size)

    def losses(self, codes: Mapping[Key, Affine]) -> dict[Key, float]:
        """Share of the readers' power that is error, summed over the readers, for each group that has any."""
        if self._runner is None:
            return {}
        bounds: dict[str, Array] = {}
        for key, names in self._fed.items():
            one = codes[key]
            values = (one.scale, one.scheme.low - one.zero_point, one.scheme.high - one.zero_point)
            bounds.update((n, np.asarray(v, np.float32)) for n, v in zip(names, values, strict=True))
        sums = dict.fromkeys(self._wanted, 0.0)
        for feeds in self._samples.feeds():
            for output, value in self._runner.run({**feeds, **bounds}).items():
                sums[output] += float(value)
        return {
            key: sum(sums[off] / max(sums[size], 1e-30) for off, size in pairs) for key, pairs in self._errors.items()
        }


def judge(model: Model, twins: Mapping[str, Twin], data: Data) -> tuple[dict[str, Array], dict[str, float]]:
    """By name of the node: the mean error of each output channel (axis 1; the last of a MatMul), and the share of the output's power that is error."""
    build = _Builder(model)
    names: dict[str, tuple[str, str, str, str]] = {}
    for name, twin in twins.items():
        node = build.nodes[name]
        one = twin.codes
        bounds = (one.scale, one.scheme.low - one.zero_point, one.scheme.high - one.zero_point)
        operands = list(node.inputs)
        operands[0] = build.rounded(operands[0], *map(build.scalar, bounds))
        if twin.weight is not None:
            operands[1] = build.edit.constant("twin_weight", twin.weight)
        off = build.add("Sub", [build.copy(node, operands), node.outputs[0]])
        shape = node.inputs[1].shape
        axes = [i for i in range(len(shape)) if i != 1] if node.op == "Conv" else [0]
        rows = off
        if node.op == "MatMul":
            rows = build.add("Reshape", [off, build.edit.constant("twin_shape", np.array([-1, shape[-1]], np.int64))])
        total = build.add("ReduceSum", [rows, build.edit.constant("twin_axes", np.array(axes, np.int64))], keepdims=0)
        error = build.add("ReduceSumSquare", [off], keepdims=0)
        size = build.add("ReduceSumSquare", [node.outputs[0]], keepdims=0)
        count = Variable(build.edit.fresh_name("twin"), np.dtype(np.int64))
        build.model.graph.nodes.append(Node("Size", build.edit.fresh_name("twin_node"), {}, [off], [count]))
        found = (build.give(total), build.give(error), build.give(size), build.give(count))
        names[name] = found
    runner = Runner(build.model, build.wanted)
    sums: dict[str, Any] = dict.fromkeys(build.wanted, 0.0)
    for feeds in data.feeds():
        for output, value in runner.run(feeds).items():
            sums[output] = sums[output] + np.asarray(value, np.float64)
    means: dict[str, Array] = {}
    shares: dict[str, float] = {}
    for name, (a, b, c, d) in names.items():
        channels = np.asarray(sums[a])
        means[name] = channels / max(float(sums[d]) / max(channels.shape[-1] if channels.ndim else 1, 1), 1)
        shares[name] = float(sums[b]) / max(float(sums[c]), 1e-30)
    return means, shares


class Switches:
    """The float model with a switch for each quantized operator: any set of them rounded, in one session."""

    def __init__(self, model: Model, twins: Mapping[str, Twin]) -> None:
        """`twins` by name of their nodes in the root graph.

        Raises:
            UnsupportedModel: ONNX Runtime refuses the model.
        """
        build = _Builder(model)
        self.outputs = [t.name for t in build.model.graph.outputs]
        self._flags: dict[str, str] = {}
        renamed: dict[str, str] = {}
        for name, twin in twins.items():
            node = build.nodes[name]
            one = twin.codes
            bounds = (one.scale, one.scheme.low - one.zero_point, one.scheme.high - one.zero_point)
            operands = list(node.inputs)
            operands[0] = build.rounded(operands[0], *map(build.scalar, bounds))
            if twin.weight is not None:
                operands[1] = build.edit.constant("twin_weight", twin.weight)
            rounded = build.copy(node, operands)
            flag = Variable(build.edit.fresh_name("twin_flag"), np.dtype(bool), ())
            build.model.graph.inputs.append(flag)
            self._flags[name] = flag.name
            old = node.outputs[0]
            chosen = Variable(build.edit.fresh_name("twin"), _FLOAT)
            readers = [n for n in old.outputs if n is not node]
            for reader in readers:
                for index, operand in enumerate(reader.inputs):
                    if operand is old:
                        reader.inputs[index] = chosen
            switch = Node("Where", build.edit.fresh_name("twin_node"), {}, [flag, rounded, old], [chosen])
            build.model.graph.nodes.append(switch)
            renamed[old.name] = chosen.name
        for graph in build.model.graphs():
            sort(graph)
        self._wanted = [renamed.get(name, name) for name in self.outputs]
        self._runner = Runner(build.model, self._wanted)

    def run(self, feeds: Mapping[str, Array], on: Collection[str]) -> dict[str, Array]:
        """The model's outputs with the operators named in `on` rounded."""
        flags = {flag: np.asarray(name in on) for name, flag in self._flags.items()}
        values = self._runner.run({**feeds, **flags})
        return {name: values[wanted] for name, wanted in zip(self.outputs, self._wanted, strict=True)}
