"""Constant folding with a byte budget.

A node is foldable when its operands are constants, its operator is deterministic and has no body, and nothing it computes
is a graph output. Folding pays with bytes: every folded value that a remaining node reads is stored, every initializer that only
folded nodes read goes away. Within `budget` the balance may grow; beyond it the largest values are un-folded first, node by
node, until it fits. Values are computed only once it is known that they are not absurdly large.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import Editor, sort
from graphopt.errors import GraphoptError
from graphopt.ir import Constant, Graph, Model, Node, Variable, subgraphs
from graphopt.pass_base import Context, Pass

Array = np.ndarray[Any, Any]

_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
# Folding these away would turn a quantized weight back into a float one and take the marks that runtimes look for.
_QUANTIZED: Final = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_UNKNOWN_SIZE: Final = 1 << 24  # bytes assumed computable when shape inference cannot tell a size


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
    kept: int = 0  # remaining nodes that read it


@dataclass
class _Plan:
    options: FoldConstants
    model: Model
    edit: Editor
    ctx: Context
    values: dict[int, _Folded] = field(default_factory=dict)  # id(tensor) -> its value
    folds: dict[int, Node] = field(default_factory=dict)  # id(node) -> node, in order

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
            size = _output_bytes(self.model, node, operands)
            given = sum(a.nbytes for a in operands if a is not None)
            allowed = self.options.max_value
            if self.options.budget is not None:
                allowed = min(allowed, given + self.options.budget)
            if size > allowed:
                return f"constant, but {size:,} bytes large; allow it with fold-constants{{budget=none}}"
            try:
                arrays = self.ctx.evaluate(self.model, node, operands)
            except GraphoptError as error:
                return f"constant, but cannot be evaluated: {error}"
        if not self.ctx.admit():
            return ""
        for tensor, array in zip((t for t in node.outputs if t.name), arrays, strict=True):
            self.values[id(tensor)] = _Folded(tensor, node, array)
        self.folds[id(node)] = node
        return None

    # --------------------------------------------------------------------------------------------------- deciding

    def apply(self) -> int:
        self.settle()
        stored = [v for v in self.values.values() if id(v.node) in self.folds and v.kept]
        for value in stored:
            constant = Constant(value.tensor.name, value.array)
            for reader in list(value.tensor.outputs):
                for index, tensor in enumerate(reader.inputs):
                    if tensor is value.tensor and id(reader) not in self.folds:
                        reader.inputs[index] = constant
            value.tensor.name = self.edit.fresh_name(f"{constant.name}_folded")
        for node in self.folds.values():
            self.edit.erase(node)
        return len(self.folds)

    def settle(self) -> None:
        """Un-fold the largest values until the balance of bytes keeps the budget."""
        remaining: dict[int, int] = {}  # id(initializer) -> readers that stay
        sources: dict[int, gs.Constant] = {}
        for node in self.folds.values():
            for tensor in node.inputs:
                if self.edit.is_fixed(tensor) and id(tensor) not in sources:
                    sources[id(tensor)] = tensor
                    remaining[id(tensor)] = sum(id(r) not in self.folds for r in tensor.outputs)
        for value in self.values.values():
            value.kept = sum(id(r) not in self.folds for r in value.tensor.outputs)
        if self.options.budget is None:
            return
        allowed = self.options.budget - self.ctx.spent.get("fold-constants", 0)  # one budget for a whole pipeline
        freed = sum(
            _stored(c.nbytes, c) for key, c in sources.items() if not remaining[key] and not self.edit.is_output(c)
        )
        # The data of a Constant node counts as freed like an initializer's.
        freed += sum(sum(map(_bytes, self.outputs(n))) for n in self.folds.values() if n.op == "Constant")
        growth = sum(_bytes(v) for v in self.values.values() if v.kept) - freed
        order = {id(node): index for index, node in enumerate(self.folds.values())}
        heap = [(-v.array.nbytes, order[id(v.node)], id(v.tensor)) for v in self.values.values() if v.kept]
        heapq.heapify(heap)
        while growth > allowed and heap:
            _, _, key = heapq.heappop(heap)
            node = self.values[key].node
            if id(node) not in self.folds or node.op == "Constant":
                continue
            del self.folds[id(node)]
            size = self.values[key].array.nbytes
            self.ctx.remark(
                node, f"constant, but storing it adds {size:,} bytes; allow it with fold-constants{{budget=none}}"
            )
            growth -= sum(_bytes(v) for v in self.outputs(node) if v.kept)
            for tensor in {id(t): t for t in node.inputs if t.name}.values():
                source = self.values.get(id(tensor))
                if source is not None and id(source.node) in self.folds:
                    source.kept += 1
                    if source.kept == 1:
                        growth += _bytes(source)
                        heapq.heappush(heap, (-source.array.nbytes, order[id(source.node)], id(tensor)))
                elif id(tensor) in sources:
                    remaining[id(tensor)] += 1
                    if remaining[id(tensor)] == 1:
                        growth += _stored(tensor.nbytes, tensor)
        self.ctx.spent["fold-constants"] = self.ctx.spent.get("fold-constants", 0) + growth

    def outputs(self, node: Node) -> list[_Folded]:
        return [self.values[id(t)] for t in node.outputs if t.name]


def _stored(nbytes: int, tensor: gs.Tensor) -> int:
    """Bytes of an initializer in a file: its values, name, dimensions and tags."""
    return nbytes + len(tensor.name) + 64


def _bytes(value: _Folded) -> int:
    return _stored(value.array.nbytes, value.tensor)


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


def _output_bytes(model: Model, node: Node, operands: list[Array | None]) -> int:
    """Bytes that computing `node` would make, by onnx's shape inference on this node alone; small where it cannot tell."""
    shapes = [a for a in operands if a is not None and a.dtype == np.int64 and a.size <= 1024]
    largest = max((a.nbytes for a in operands if a is not None), default=0)
    if node.op not in _GROWING and not any(a.ndim for a in shapes):
        return largest  # elementwise and data movement: at most a broadcast of what is there
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
        proto = Model(graph, model.carried).to_proto()
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return _UNKNOWN_SIZE
    total = 0
    for info in inferred.graph.output:
        dims = info.type.tensor_type.shape.dim
        if not info.type.tensor_type.HasField("shape") or any(not d.HasField("dim_value") for d in dims):
            return _UNKNOWN_SIZE
        count = 1
        for dim in dims:
            count *= int(dim.dim_value)
        itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type or 1)).itemsize
        total += count * itemsize
    return total


# Operators whose output can be much larger than their operands together.
_GROWING: Final = frozenset(
    {
        "ConstantOfShape",
        "Expand",
        "Tile",
        "Range",
        "Pad",
        "Resize",
        "Upsample",
        "OneHot",
        "EyeLike",
        "MatMul",
        "Gemm",
        "Einsum",
    }
    | {
        "Gather",
        "GatherND",
        "GatherElements",
        "Where",
        "Conv",
        "ConvTranspose",
        "CenterCropPad",
        "Col2Im",
        "AffineGrid",
        "Add",
    }
    | {
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Equal",
        "Less",
        "Greater",
        "LessOrEqual",
        "GreaterOrEqual",
        "And",
        "Or",
        "Xor",
        "Mod",
        "Cast",
    }
    | {
        "HannWindow",
        "HammingWindow",
        "BlackmanWindow",
        "MelWeightMatrix",
        "SequenceConstruct",
        "Max",
        "Min",
        "Sum",
        "Mean",
    }
)
