"""Constant folding with a byte budget.

A node is foldable when its operands are constants, its operator is deterministic and has no body, and nothing it computes
is a graph output. Folding pays with bytes: every folded value that a remaining node reads is stored, every initializer that only
folded nodes read goes away. Within `budget` the balance may grow; beyond it the largest values are un-folded first, node by
node, until it fits. Values are computed only once it is known that they are not absurdly large.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import Editor, sort
from graphopt.elements import stored_bytes
from graphopt.errors import GraphoptError
from graphopt.ir import Constant, Graph, Model, Node, Variable, numpy_dtype, subgraphs
from graphopt.pass_base import Context, Pass

if TYPE_CHECKING:
    from graphopt.analyses.shapes import Shapes

Array = np.ndarray[Any, Any]

_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
# Folding these away would turn a quantized weight back into a float one and take the marks that runtimes look for.
_QUANTIZED: Final = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_SMALL: Final = 1 << 20  # bytes that are computed without asking for the size
_HELD: Final = 1 << 30  # bytes of values computed in one run, or twice the model's weights where these are more


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute at build time what does not depend on the inputs, and store the results as initializers.

    Before:
        g (float[2] x) => (float[2] y)
        { one = Constant <value = float[2] {1, 2}> ()
          two = Add (one, one)
          y = Mul (x, two) }
    After:
        g (float[2] x) => (float[2] y)
        <float[2] two = {2, 4}>
        { y = Mul (x, two) }
    """

    budget: int | None = (
        1 << 20
    )  # bytes by which a pipeline may let the file grow over what it removes; none: any growth
    max_value: int = 1 << 31  # bytes of one value, not even with budget=none more than protobuf carries

    @classmethod
    def objection(cls, node: gs.Node, edit: Editor, shapes: Shapes) -> str | None:
        """The first operand that is not constant."""
        for tensor in node.inputs:
            if tensor.name and not edit.is_fixed(tensor):
                source = edit.producer(tensor)
                what = "a graph input" if source is None else f"the result of {source.name!r} ({source.op})"
                if isinstance(tensor, Constant):
                    what = "an initializer that callers may override (it is a graph input)"
                elif source is None and not edit.is_input(tensor):
                    what = "given by the graph around this body"
                return f"{tensor.name!r} is not constant: it is {what}"
        return None

    def run(self, model: Model, ctx: Context) -> int:
        """Fold graph by graph, outer before inner; returns the number of nodes folded."""
        edit = Editor(model)
        plan = _Plan(self, model, edit, ctx)
        for graph in model.graphs():
            sort(graph)
            plan.graph(graph)
        folded = plan.apply()
        edit.commit()
        return folded


@dataclass
class _Folded:
    """A value that can be stored in place of its producer."""

    tensor: gs.Tensor
    node: Node
    array: Array


@dataclass
class _Plan:
    options: FoldConstants
    model: Model
    edit: Editor
    ctx: Context
    values: dict[int, _Folded] = field(default_factory=dict)  # id(tensor) -> its value
    folds: dict[int, Node] = field(default_factory=dict)  # id(node) -> node, in order
    kept: dict[int, int] = field(default_factory=dict)  # id(value or initializer) -> readers that stay
    size: dict[int, int] = field(default_factory=dict)  # id(value or initializer) -> bytes in the file
    held: int = 0  # bytes computed so far

    def __post_init__(self) -> None:
        self.room = max(_HELD, 2 * self.model.nbytes)  # bytes

    # ------------------------------------------------------------------------------------------------- computing

    def graph(self, graph: Graph) -> None:
        for node in graph.nodes:
            reason = self.why_not(node)
            if reason is None:
                reason = self.compute(node)
            if reason:
                self.ctx.remark(node, reason)

    def why_not(self, node: Node) -> str | None:
        """None: foldable; "": not constant, nothing to say; else the reason."""
        if not all(not t.name or self.edit.is_fixed(t) or id(t) in self.values for t in node.inputs):
            return ""
        if not any(t.name for t in node.outputs):
            return ""
        if node.op in _QUANTIZED:
            return ""
        if subgraphs(node):
            return "constant, but control flow is left to later passes"
        if not node.is_onnx:
            return f"constant, but domain {node.domain!r} is not evaluated"
        if node.op in _RANDOM:
            return "random: computed anew in every run"
        if any(isinstance(value, onnx.AttributeProto) for value in node.attrs.values()):
            return "constant, but holds a sparse tensor or type attribute"
        for tensor in node.outputs:
            if self.edit.is_output(tensor):
                return f"constant, but computes the graph output {tensor.name!r}"
            if tensor.name and tensor.type not in (None, "tensor_type"):
                return "constant, but no tensor"
        return None

    def operand(self, tensor: gs.Tensor) -> Array | None:
        if not tensor.name:
            return None
        known = self.values.get(id(tensor))
        return known.array if known is not None else np.asarray(tensor.values)

    def compute(self, node: Node) -> str | None:
        if node.op == "Constant":
            arrays = _constant(node)
            if arrays is None:
                return "constant of a kind that is no tensor"
        else:
            operands = [self.operand(t) for t in node.inputs]
            given = sum(a.nbytes for a in operands if a is not None)
            room = self.room - self.held
            allowed = self.options.max_value
            if self.options.budget is not None:
                allowed = min(allowed, given + self.options.budget)
            fill = _fill(node, operands)
            size = fill.nbytes if fill is not None else _output_bytes(self.model, node, operands, allowed)
            if size is None and self.options.budget is not None:
                return "constant, but of unknown size; allow it with fold-constants{budget=none}"
            if size is not None and size > room and fill is None:
                return f"constant, but {size:,} bytes large, and {self.held:,} are computed already; left to run time"
            if size is not None and size > allowed:
                advice = (
                    "allow it with fold-constants{budget=none}"
                    if size <= self.options.max_value
                    else "left to run time"
                )
                return f"constant, but {size:,} bytes large; {advice}"
            try:
                arrays = [fill] if fill is not None else self.ctx.evaluate(self.model, node, operands)
            except GraphoptError as error:
                return f"constant, but cannot be evaluated: {error}"
        if not self.ctx.admit():
            return ""
        for tensor, array in zip((t for t in node.outputs if t.name), arrays, strict=True):
            self.values[id(tensor)] = _Folded(tensor, node, array)
            self.held += 0 if node.op in ("Constant", "ConstantOfShape") else array.nbytes  # those are a view
        self.folds[id(node)] = node
        return None

    # --------------------------------------------------------------------------------------------------- deciding

    def apply(self) -> int:
        self.settle()
        stored = [v for key, v in self.values.items() if id(v.node) in self.folds and self.kept[key]]
        # Initializers live in the root graph: a name that two bodies use, or a body and the root, cannot stay.
        graphs = list(self.model.graphs())
        names = Counter(t.name for g in graphs for t in [*g.inputs, *g.initializers])
        names.update(t.name for g in graphs for n in g.nodes for t in n.outputs)
        for value in stored:
            name = value.tensor.name
            constant = Constant(
                name if names[name] == 1 else self.edit.fresh_name(name), np.asarray(value.array, order="C")
            )
            for reader in list(value.tensor.outputs):
                for index, tensor in enumerate(reader.inputs):
                    if tensor is value.tensor and id(reader) not in self.folds:
                        reader.inputs[index] = constant
        for node in self.folds.values():
            self.edit.erase(node)
        return len(self.folds)

    def settle(self) -> None:
        """Un-fold the largest values until the balance of bytes keeps the budget, then fold again what fits after all."""
        tensors = {id(t): t for n in self.folds.values() for t in n.inputs if self.edit.is_fixed(t)}
        self.size = {key: _stored(t.nbytes, t) for key, t in tensors.items()}
        self.size.update((key, _stored(v.array.nbytes, v.tensor)) for key, v in self.values.items())
        tensors.update((key, v.tensor) for key, v in self.values.items())
        for key, tensor in tensors.items():
            staying = {id(reader) for reader in tensor.outputs} - self.folds.keys()
            self.kept[key] = len(staying) + self.edit.is_output(tensor)
        if self.options.budget is None:
            return
        allowed = self.options.budget - self.ctx.spent.get("bytes", 0)  # one budget for a whole pipeline
        growth = 0
        for key, size in self.size.items():
            value = self.values.get(key)
            # A value is stored where somebody reads it; an initializer, or the data of a Constant node, goes where nobody does.
            growth += size * bool(self.kept[key]) if value is not None else -size * (not self.kept[key])
            growth -= size if value is not None and value.node.op == "Constant" else 0
        order = {key: index for index, key in enumerate(self.folds)}
        heap = [(-self.size[key], order[id(v.node)], key) for key, v in self.values.items() if self.kept[key]]
        heapq.heapify(heap)
        unfolded: dict[int, Node] = {}  # by position
        while growth > allowed and heap:
            node = self.values[heapq.heappop(heap)[2]].node
            if id(node) not in self.folds or node.op == "Constant":
                continue
            unfolded[order[id(node)]] = self.folds.pop(id(node))
            growth += self.move(node, 1)
            for key in {id(t) for t in node.inputs} & self.values.keys():
                heapq.heappush(heap, (-self.size[key], order[id(self.values[key].node)], key))
        for _, node in sorted(unfolded.items()):
            more = self.move(node, -1)
            if growth + more <= allowed:
                growth += more
                self.folds[id(node)] = node
                continue
            self.move(node, 1)
            told = f"constant, but storing it adds {more:,} bytes; allow it with fold-constants{{budget=none}}"
            self.ctx.remark(node, told)
        self.ctx.spent["bytes"] = self.ctx.spent.get("bytes", 0) + growth

    def move(self, node: Node, step: int) -> int:
        """Let `node` stay after all (1), or fold it again (-1); returns by how much the file grows."""
        growth = -step * sum(self.size[id(t)] for t in node.outputs if t.name and self.kept[id(t)])
        for key in {id(t): None for t in node.inputs if id(t) in self.kept}:
            self.kept[key] += step
            source = self.values.get(key)
            if self.kept[key] == (step == 1) and (source is None or id(source.node) in self.folds):
                growth += step * self.size[key]
        return growth


def _stored(nbytes: int, tensor: gs.Tensor) -> int:
    """Bytes of an initializer in a file: its values, name, dimensions and tags."""
    return nbytes + len(tensor.name) + 64


def _fill(node: Node, operands: list[Array | None]) -> Array | None:
    """What a ConstantOfShape makes, as a view of one number: it is written out where it is stored, if it is."""
    if node.op != "ConstantOfShape" or operands[0] is None or operands[0].ndim != 1 or operands[0].dtype != np.int64:
        return None
    if (operands[0] < 0).any() or operands[0].size > 32:
        return None
    value = np.asarray(node.attrs["value"].values) if "value" in node.attrs else np.zeros(1, np.float32)
    if value.size != 1 or math.prod(operands[0].tolist()) > 1 << 40:
        return None
    return np.broadcast_to(value.reshape(()), tuple(operands[0].tolist()))


def _constant(node: Node) -> list[Array] | None:
    """The array of a Constant node, from whichever attribute holds it."""
    for name, value in node.attrs.items():
        match name:
            case "value":
                return [np.asarray(value.values)]
            case "value_int" | "value_ints":
                return [np.asarray(value, np.int64)]
            case "value_float" | "value_floats":
                return [np.asarray(value, np.float32)]
            case "value_string":
                return [np.asarray(value, object)]
            case "value_strings":
                return [np.asarray(value, object).reshape(len(value))]
    return None


def _output_bytes(model: Model, node: Node, operands: list[Array | None], allowed: int) -> int | None:
    """Bytes that computing `node` would make, by onnx's shape inference on this node alone; None where it cannot tell."""
    if node.op in _BOUNDED:
        bound = math.prod(max(1, a.size) for a in operands if a is not None) * 64  # eight int64 an element: NonZero
        if bound <= min(_SMALL, allowed):
            return bound
    graph = Graph(name="size")
    inputs: list[gs.Tensor] = []
    for index, value in enumerate(operands):
        if value is None:
            inputs.append(Variable(""))
        elif value.nbytes <= 8192:
            inputs.append(Constant(f"i{index}", value))
        else:
            inputs.append(Variable(f"i{index}", value.dtype, value.shape))
            graph.inputs.append(inputs[-1])
    copy = Node(node.op, "node", dict(node.attrs), inputs, [Variable(f"o{i}") for i, _ in enumerate(node.outputs)])
    copy.attr_types = dict(node.attr_types)
    graph.nodes.append(copy)
    graph.outputs = list(copy.outputs)
    try:
        proto = Model(
            graph, onnx.ModelProto(ir_version=model.ir_version, opset_import=model.carried.opset_import)
        ).to_proto()
        inferred = onnx.shape_inference.infer_shapes(proto)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None
    total = 0
    for info in inferred.graph.output:
        kind = info.type.tensor_type
        if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
            return None
        total += stored_bytes(numpy_dtype(kind.elem_type or 1), [d.dim_value for d in kind.shape.dim])
    return total


# Frequent operators whose output has no more elements than the product of their operands' element counts; for small operands this
# spares shape inference. Everything else is asked of onnx.
_BOUNDED: Final = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Concat",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Flatten",
        "Floor",
        "Gather",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "Or",
        "Pow",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Relu",
        "Reciprocal",
        "Reshape",
        "Round",
        "Shape",
        "Sigmoid",
        "Sign",
        "Size",
        "Slice",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Transpose",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
