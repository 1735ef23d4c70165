"""Which tensors get int8 codes, who reads them, and which of them share a scale: one plan for each runtime.

ONNX Runtime (``chains=True``) runs a convolution in int8 only if its input, weight and output all have codes, so values stay int8 from
one convolution to the next: through Add, Concat and pools, with a Relu or Clip dissolved into the range of the codes. A MatMul or Gemm
needs no codes on its output, and gets them only where the next reader wants codes anyway.

TensorRT (``chains=False``) pulls the next reader's codes back into the kernel before by itself, and a pair between a convolution and
what it could fuse with costs. So codes stand on the inputs of weighted operators alone, and on the skip of a residual sum,
which shares those of the block's first convolution. Where the skip is a projection, enterprise TensorRT adds it to the other branch in that branch's
kernel if it has codes; TensorRT for RTX adds in a float kernel of its own, where codes would be a round trip (``projections=False``).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import weights
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model, Node
from graphopt.pass_base import Context

WEIGHTED: Final = frozenset(["Conv", "Gemm", "MatMul"])
ARITHMETIC: Final = frozenset(
    ["Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Where"]
)  # ONNX Runtime has a kernel for them that reads and writes codes
MOVING: Final = frozenset(
    [
        "MaxPool",
        "Reshape",
        "Flatten",
        "Transpose",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Gather",
        "DepthToSpace",
        "Resize",
        "Pad",
        "Identity",
        "Split",
    ]
)  # of one value and some parameters; what comes out are codes that went in
_KNOWN: Final = {"Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "HardSigmoid": (0.0, 1.0)}


@dataclass
class Codes:
    """A tensor that gets codes."""

    tensor: gs.Tensor
    readers: list[Node] = field(default_factory=list)  # that read codes; the others read the float tensor
    low: float | None = None  # known bounds of the values
    high: float | None = None
    folds: Node | None = None  # Relu or Clip that codes with the right range do by themselves
    leader: Codes | None = None  # whose scale this one has to use

    @property
    def root(self) -> Codes:
        """Whose scale and zero point hold."""
        found = self
        while found.leader is not None:
            found = found.leader
        return found


@dataclass
class Plan:
    """What becomes int8."""

    nodes: list[Node]  # weighted, in order
    codes: list[Codes]  # in order of the tensors
    arithmetic: list[Node] = field(default_factory=list)  # others whose kernel reads and writes codes
    moving: list[Node] = field(default_factory=list)


def weight_of(node: Node) -> gs.Tensor | None:
    """The second input of a weighted operator, if it has one."""
    return node.inputs[1] if len(node.inputs) > 1 and node.inputs[1].name else None


def refusal(node: Node, edit: Editor, shapes: Shapes, opset: int) -> str | None:
    """Why a Conv, Gemm or MatMul cannot become int8 with a constant weight, or None."""
    weight, data = weight_of(node), node.inputs[0]
    behind = None if weight is None else edit.producer(weight)
    if behind is not None and behind.op == "DequantizeLinear":
        return "its weight is quantized already"
    if weight is None or not edit.is_fixed(weight):
        return "its weight is not constant"
    if weight.dtype != np.float32:
        advice = "; quantize before converting to half" if weight.dtype.itemsize == 2 else ""
        return f"its weight {weight.name!r} is {weight.dtype}, int8 is for float32 models{advice}"
    known = shapes.dtype(data)
    if known is not None and known != np.float32:
        return f"its input {data.name!r} is {known}"
    producer = edit.producer(data)
    if producer is not None and producer.op == "DequantizeLinear":
        return "its input is quantized already"
    if isinstance(data, gs.Constant):
        return "its input is constant; run fold-constants first"
    if weights.channel_axis(node, len(weight.shape)) is None:
        return f"its weight {weight.name!r} has {len(weight.shape)} dimensions"
    if not weight.values.size or not np.isfinite(weight.values).all():
        return f"its weight {weight.name!r} is empty, or holds NaN or infinity"
    if node.op == "Gemm" and (
        node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0
    ):
        return "transA, alpha or beta are set"
    if len(node.inputs) > 2 and node.inputs[2].name and not edit.is_fixed(node.inputs[2]):
        return "its bias is not constant; run fold-constants first"
    return None


def known_bounds(tensor: gs.Tensor, edit: Editor) -> tuple[float | None, float | None]:
    """Bounds of a tensor that follow from its producer."""
    producer = edit.producer(tensor)
    if producer is None or not producer.is_onnx:
        return None, None
    if producer.op in _KNOWN:
        return _KNOWN[producer.op]
    if producer.op == "Relu":
        return 0.0, None
    if producer.op == "Clip":
        return clip_bounds(producer, edit) or (None, None)
    return None, None


def clip_bounds(node: Node, edit: Editor) -> tuple[float | None, float | None] | None:
    """The bounds of a Clip, None for an absent one; None where they are not constant."""
    if "min" in node.attrs or "max" in node.attrs:  # up to opset 10
        return node.attrs.get("min"), node.attrs.get("max")
    found: list[float | None] = [None, None]
    for index in (1, 2):
        if len(node.inputs) > index and node.inputs[index].name:
            bound = node.inputs[index]
            if not edit.is_fixed(bound) or bound.values.size != 1:
                return None
            found[index - 1] = float(bound.values.reshape(()))
    return found[0], found[1]


class Placer:
    """Works out a `Plan` for chosen nodes."""

    def __init__(
        self, model: Model, edit: Editor, chosen: Sequence[Node], chains: bool, projections: bool = True
    ) -> None:
        self.model, self.edit, self.chains, self.projections = model, edit, chains, projections
        self.chosen = list(chosen)
        self._chosen = {id(n) for n in chosen}
        self._codes: dict[int, Codes] = {}
        self._integer: set[int] = {id(n) for n in chosen}  # nodes that read codes

    def plan(self) -> Plan:
        """The plan; nothing is changed."""
        for node in self.chosen:
            self._mark(node.inputs[0])
            if self.chains and node.op == "Conv":
                self._mark(self.result(node))
        arithmetic: list[Node] = []
        moving: list[Node] = []
        if self.chains:
            wanted = self._wanted()
            for node in self.model.graph.nodes:
                kind = self._carries(node, wanted)
                if kind:
                    (arithmetic if kind == "arithmetic" else moving).append(node)
                    self._integer.add(id(node))
        else:
            arithmetic = [n for n in self.model.graph.nodes if self._residual(n)]
            self._integer.update(id(n) for n in arithmetic)
        self._readers(arithmetic)
        order = [*self.model.graph.inputs, *(t for n in self.model.graph.nodes for t in n.outputs)]
        codes = [self._codes[id(t)] for t in order if id(t) in self._codes]
        return Plan(self.chosen, [c for c in codes if c.readers or c.folds or self._must(c)], arithmetic, moving)

    # ----------------------------------------------------------------------------------------------------- chains

    def result(self, node: Node) -> gs.Tensor:
        """The output of `node`, or that of the Relu or Clip from 0 behind it which codes do by themselves."""
        output = node.outputs[0]
        reader = self.edit.sole_consumer(output)
        if reader is None or not reader.is_onnx:
            return output
        if reader.op == "Relu":
            return reader.outputs[0]
        if reader.op == "Clip" and reader.inputs[0] is output:
            bounds = clip_bounds(reader, self.edit)
            if bounds is not None and bounds[0] == 0:
                return reader.outputs[0]
        return output

    def _mark(self, tensor: gs.Tensor) -> Codes:
        codes = self._codes.get(id(tensor))
        if codes is None:
            codes = self._codes[id(tensor)] = Codes(tensor)
            codes.low, codes.high = known_bounds(tensor, self.edit)
            producer = self.edit.producer(tensor)
            if self.chains and producer is not None and codes.low == 0 and producer.op in ("Relu", "Clip"):
                codes.folds = producer
        return codes

    def _operands(self, node: Node) -> list[gs.Tensor]:
        """The values that a carrier reads, without parameters such as axes."""
        if node.op == "Where":
            return list(node.inputs[1:])
        if node.op in MOVING:
            return list(node.inputs[:1])
        return [t for t in node.inputs if t.name]

    def _wanted(self) -> set[int]:
        """Tensors that some int8 operator reads as codes, at once or through carriers."""
        wanted = {id(n.inputs[0]) for n in self.chosen}
        for node in reversed(self.model.graph.nodes):
            kind = self._carrier(node) if node.is_onnx and node.outputs else None
            if kind and any(id(t) in wanted for t in self._results(node, kind)):
                wanted.update(id(t) for t in self._operands(node))
        return wanted

    def _results(self, node: Node, kind: str) -> list[gs.Tensor]:
        """What a carrier gives: one value, or all parts of a Split, which ONNX Runtime moves as codes if every part has them."""
        return [self.result(node)] if kind == "arithmetic" else [t for t in node.outputs if t.name]

    def _carrier(self, node: Node) -> str | None:
        if node.op in ARITHMETIC and len(node.outputs) == 1:
            operands = self._operands(node)
            if node.op in ("Add", "Mul", "Where") and (
                any(isinstance(t, gs.Constant) for t in operands) or len({id(t) for t in operands}) < 2
            ):
                return None
            return "arithmetic"
        if node.op == "MaxPool" and len([t for t in node.outputs if t.name]) == 1:
            return "moving"
        if node.op == "Resize" and node.attrs.get("mode", "nearest") != "nearest":
            return None
        if node.op == "Pad" and not self._pads_with_zeros(node):
            return None
        if node.op == "Gather" and isinstance(node.inputs[0], gs.Constant):
            return None
        if node.op == "Split":
            return "moving" if all(t.name for t in node.outputs) else None
        return "moving" if node.op in MOVING and len(node.outputs) == 1 else None

    def _pads_with_zeros(self, node: Node) -> bool:
        """0 is always a code; ONNX Runtime pads in float, but codes of one scale around it lose nothing and keep sums in int8."""
        if node.attrs.get("mode", "constant") != "constant":
            return True
        value = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        return value is None or (self.edit.is_fixed(value) and not np.any(value.values))

    def _carries(self, node: Node, wanted: set[int]) -> str | None:
        """Mark the output of a carrier whose operands all have codes; returns its kind."""
        kind = self._carrier(node) if node.is_onnx and node.outputs else None
        if kind is None:
            return None
        operands = self._operands(node)
        if any(id(t) not in self._codes for t in operands):
            return None
        results = self._results(node, kind)
        if not any(id(t) in wanted or id(t) in self._codes for t in results):
            return None
        if kind == "moving":
            for output in results:
                self._join(self._mark(output), self._codes[id(operands[0])])
            return kind
        codes = self._mark(results[0])
        if node.op == "Concat" and len({self._codes[id(t)].low == 0 for t in operands}) == 1:
            for tensor in operands:
                if self.edit.sole_consumer(tensor) is node and not self._part(tensor):
                    self._join(self._codes[id(tensor)], codes)
        return kind

    def _part(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a part of another, whose codes what reads the other parts reads too."""
        producer = self.edit.producer(tensor)
        return producer is not None and producer.op == "Split"

    @staticmethod
    def _join(codes: Codes, leader: Codes) -> None:
        if codes.root is not leader.root:
            codes.root.leader = leader.root

    def _must(self, codes: Codes) -> bool:
        """Whether the producer of a tensor is an int8 operator that only runs as one if its output gets codes."""
        return self.chains and self._made_by_int8(codes)

    def _made_by_int8(self, codes: Codes) -> bool:
        producer = self.edit.producer(codes.tensor)
        if producer is not None and codes.folds is producer:
            producer = self.edit.producer(producer.inputs[0])
        return producer is not None and id(producer) in self._integer

    # --------------------------------------------------------------------------------------------------- residuals

    def _residual(self, node: Node) -> bool:
        """A sum of a convolution's branch and a tensor that has codes already: the latter is read as codes."""
        if node.op != "Add" or not node.is_onnx or any(isinstance(t, gs.Constant) for t in node.inputs):
            return False
        return self._skip(node) is not None

    def _skip(self, node: Node) -> gs.Tensor | None:
        backed = [self._behind_conv(t) for t in node.inputs]
        for index in (0, 1):
            if backed[1 - index] and id(node.inputs[index]) in self._codes:
                return node.inputs[index]
        if (
            self.projections and all(backed) and len(node.inputs) == 2
        ):  # two branches: the shorter one, a projection of the skip, gets codes
            lengths = [self._depth(t) for t in node.inputs]
            index = 0 if lengths[0] < lengths[1] else 1
            self._mark(node.inputs[index])
            return node.inputs[index]
        return None

    def _behind_conv(self, tensor: gs.Tensor) -> bool:
        producer = self.edit.producer(tensor)
        return producer is not None and id(producer) in self._chosen and len(tensor.outputs) == 1

    def _depth(self, tensor: gs.Tensor) -> int:
        """How many nodes lie behind one another up to a tensor that several read."""
        depth, current = 0, tensor
        while (producer := self.edit.producer(current)) is not None and producer.inputs and depth < 32:
            depth += 1
            current = producer.inputs[0]
            if len(current.outputs) > 1:
                break
        return depth

    def alone(self, node: Node) -> bool:
        """After `plan`: whether a Conv stands among float operators, so that both its input and its result are coded for it alone."""
        before, behind = self._codes[id(node.inputs[0])], self._codes.get(id(self.result(node)))
        near = [n for n in behind.readers if id(n) in self._integer] if behind is not None else []
        shared = [n for n in before.readers if id(n) in self._integer and n is not node]
        return not near and not shared and not self._made_by_int8(before)

    # ----------------------------------------------------------------------------------------------------- readers

    def _readers(self, arithmetic: Sequence[Node]) -> None:
        for codes in self._codes.values():
            everyone = list({id(n): n for n in codes.tensor.outputs}.values())
            if self.chains and (self._made_by_int8(codes)):
                codes.readers = everyone
            elif self.chains:
                codes.readers = [n for n in everyone if id(n) in self._integer and self._reads(n, codes.tensor)]
            else:
                skips = [n for n in everyone if id(n) in {id(a) for a in arithmetic} and self._skip(n) is codes.tensor]
                codes.readers = [n for n in everyone if id(n) in self._chosen and n.inputs[0] is codes.tensor] + skips
            if codes.folds is not None and not self._may_fold(codes, everyone):
                codes.folds = None

    def _reads(self, node: Node, tensor: gs.Tensor) -> bool:
        operands = node.inputs[:1] if id(node) in self._chosen else self._operands(node)
        return any(t is tensor for t in operands)

    def _may_fold(self, codes: Codes, everyone: list[Node]) -> bool:
        """Relu and Clip go where all their readers read codes, and codes of the group begin at 0."""
        assert codes.folds is not None
        return (
            len(codes.readers) == len(everyone)
            and not self.edit.is_output(codes.tensor)
            and self.edit.sole_consumer(codes.folds.inputs[0]) is codes.folds
        )


def operators(model: Model) -> Iterator[Node]:
    """Weighted operators of the root graph, in order."""
    for node in model.graph.nodes:
        if node.op in WEIGHTED and node.is_onnx:
            yield node


def tell_unreached(model: Model, kinds: Container[str], ctx: Context) -> None:
    """Say which layers stay float because they are in no graph that passes quantize, in bodies and in functions, or recurrent."""
    root = {id(n) for n in model.graph.nodes}
    for node in model.nodes():
        if node.op in kinds and node.is_onnx and id(node) not in root:
            ctx.remark(node, "stays float: it runs inside the body of an If, Loop or Scan")
        elif node.op in ("LSTM", "GRU", "RNN") and node.is_onnx:
            ctx.remark(node, "stays float: weights of recurrent layers get no codes")
    for function in model.functions:
        layers = sum(n.op_type in kinds and n.domain in ("", "ai.onnx") for n in function.carried.node)
        if layers:
            ctx.remark(
                None, f"{layers} layers of function {function.carried.name!r} stay float; put inline-functions first"
            )


def selects(patterns: Sequence[str], node: Node) -> bool:
    """Whether one of `patterns`, a name with ``*`` and ``?`` or an operator, means `node` or one that went into it."""
    names = (node.name, *node.origin)
    return any(p in (node.op, *names) or any(fnmatchcase(name, p) for name in names) for p in patterns)


def check_patterns(pass_name: str, patterns: Sequence[str], model: Model) -> None:
    """
    Raises:
        UsageError: one of `patterns` selects no node.
    """
    for pattern in patterns:
        if not any(selects((pattern,), n) for n in model.nodes()):
            raise UsageError(f"{pass_name}: {pattern!r} matches no node; graphopt inspect lists their names")


def sizes(node: Node) -> tuple[int, int]:
    """Input and output channels of a weighted operator with constant weight."""
    weight: Any = weight_of(node)
    shape = tuple(weight.shape)
    if node.op == "Conv":
        return int(shape[1]) * int(node.attrs.get("group", 1)), int(shape[0])
    return (int(shape[1]), int(shape[0])) if node.attrs.get("transB", 0) else (int(shape[-2]), int(shape[-1]))


def depth(node: Node) -> int:
    """Products that make up one value of a weighted operator's result."""
    weight: Any = weight_of(node)
    return int(np.prod(weight.shape)) // max(1, sizes(node)[1])
