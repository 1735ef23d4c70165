"""What tests of passes share: structural equality up to renaming, text cases, and random valid graphs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st

from graphopt import ir
from graphopt.elements import Constant, Graph, Node, Variable

CASES = Path(__file__).parent / "cases"


# ------------------------------------------------------------------------------------------- equality up to renaming


def canonical(model: ir.Model, types: bool = False) -> list[str]:
    """Lines that two models share exactly when they differ in the names of nodes, intermediate values and fixed initializers
    and in the order of nodes only; with `types`, what is known of intermediate values counts too."""
    return _graph(model.graph, {}, types)


def _graph(graph: Graph, outer: dict[int, str], types: bool, depth: int = 0) -> list[str]:
    known = dict(outer)
    lines = []
    for index, tensor in enumerate(graph.inputs):
        name = tensor.name if depth == 0 else f"body {depth} input {index}"
        known[id(tensor)] = f"{name} = {_content(tensor)}" if isinstance(tensor, Constant) else name
        lines.append(f"input {known[id(tensor)]} {_type(tensor)}")

    def expression(tensor: Any) -> str:
        if not tensor.name:
            return "none"
        if id(tensor) not in known:
            if isinstance(tensor, Constant):
                known[id(tensor)] = _content(tensor)
            else:
                node = tensor.inputs[0]
                text = "; ".join(described(node))
                for index, output in enumerate(node.outputs):
                    known[id(output)] = f"{hashlib.sha256(text.encode()).hexdigest()[:12]}#{index}"
        return known[id(tensor)]

    def described(node: Node) -> list[str]:
        operands = ", ".join(map(expression, node.inputs))
        outputs = ", ".join((_type(t) if types else "value") if t.name else "none" for t in node.outputs)
        attributes = [f"{name} = {attribute(value)}" for name, value in sorted(node.attrs.items())]
        return [f"{outputs} = {node.domain or ''}.{node.op}({operands})", *attributes]

    def attribute(value: Any) -> str:
        if isinstance(value, Graph):
            for node in value.nodes:  # captured values first
                for tensor in _captured(node):
                    if id(tensor) not in known and any(tensor in n.outputs for n in graph.nodes):
                        expression(tensor)
            return " | ".join(_graph(value, known, types, depth + 1))
        if isinstance(value, Constant):
            return _content(value)
        return repr(value)

    for node in graph.nodes:
        for tensor in node.outputs:
            expression(tensor)
    nodes = sorted(
        f"node {expression(n.outputs[0]) if n.outputs else ''} {'; '.join(described(n))}" for n in graph.nodes
    )
    lines += nodes
    lines += sorted(
        f"initializer {_content(c)}" for c in graph.initializers if id(c) not in {id(t) for t in graph.inputs}
    )
    lines += [f"output {t.name if depth == 0 else ''} {_type(t)} {expression(t)}" for t in graph.outputs]
    return lines


def _captured(node: Node) -> list[Any]:
    found = list(node.inputs)
    for body in ir.subgraphs(node):
        for inner in body.nodes:
            found += _captured(inner)
    return found


def _type(tensor: Any) -> str:
    return f"{tensor.dtype}{None if tensor.shape is None else list(tensor.shape)}"


def _content(constant: Constant) -> str:
    values = constant.values
    raw = repr(values.tolist()).encode() if values.dtype == object else values.tobytes()
    shown = values.tolist() if values.size <= 8 else hashlib.sha256(raw).hexdigest()[:12]
    return f"{values.dtype}{list(values.shape)} {shown}"


def homeless_declared(model: ir.Model) -> ir.Model:
    """The model as it reads back: constants that passes made are then among the root's initializers."""
    return ir.loads(ir.saves(model))


# ------------------------------------------------------------------------------------------------------- text cases


@dataclass(frozen=True)
class Case:
    """One section of a file in tests/cases."""

    name: str
    pipeline: str
    before: str
    after: str | None = None  # None: unchanged
    remark: str | None = None

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def cases(path: Path) -> list[Case]:
    """Read ``=== name``, then pipeline, graph, graph or ``unchanged`` and, if it matters, part of a remark, parted by ``---``."""
    found = []
    for section in path.read_text().split("\n=== ")[1:]:
        name, _, rest = section.partition("\n")
        pipeline, before, after, *remark = (part.strip() for part in f"\n{rest}\n".split("\n---\n"))
        found.append(
            Case(name, pipeline, before, None if after == "unchanged" else after, remark[0] if remark else None)
        )
    return found


# ---------------------------------------------------------------------------------------------------- random graphs


@st.composite
def models(draw: st.DrawFn, opset: int = 17) -> ir.Model:
    """Valid models of 1 to 14 nodes over [2, 4, 3, 3] and [4] values: shared values, outputs in the middle, duplicates, constants,
    Identity chains, Conv with BatchNormalization, multi-output Split, and If bodies that capture."""
    return ir.from_proto(_Maker(draw, opset).make())


class _Maker:
    def __init__(self, draw: st.DrawFn, opset: int) -> None:
        self.draw = draw
        self.opset = opset
        self.number = 0
        self.initializers: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(draw(st.integers(0, 3)))

    def name(self) -> str:
        self.number += 1
        return f"t{self.number}"

    def stored(self, values: np.ndarray[Any, Any]) -> str:
        name = f"w{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(values, name))
        return name

    def weights(self, *shape: int) -> str:
        small = self.rng.integers(-2, 3, shape).astype(np.float32) / 2  # few values, so that equal ones occur
        return self.stored(small)

    def make(self) -> onnx.ModelProto:
        images = ["x"]
        constants = [self.weights(2, 4, 3, 3), self.weights(1, 4, 1, 1), self.weights(1)]
        nodes: list[onnx.NodeProto] = []
        for _ in range(self.draw(st.integers(1, 14))):
            nodes += self.step(images, constants, 0)
        candidates = images[1:] or [self.emit(nodes, "Relu", ["x"])]
        chosen = self.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=3, unique=True))
        if candidates[-1] not in chosen:
            chosen.append(candidates[-1])
        info = onnx.helper.make_tensor_value_info
        image, flag = [2, 4, 3, 3], info("flag", onnx.TensorProto.BOOL, [])
        used = {name for node in _all_nodes(nodes) for name in node.input}
        graph = onnx.helper.make_graph(
            nodes,
            "g",
            [info("x", onnx.TensorProto.FLOAT, image), flag],
            [info(name, onnx.TensorProto.FLOAT, image) for name in chosen],
            [t for t in self.initializers if t.name in used or self.draw(st.booleans())],
        )
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)], ir_version=8)

    def emit(self, nodes: list[onnx.NodeProto], op: str, inputs: list[str], outputs: int = 1, **attrs: Any) -> str:
        results = [self.name() for _ in range(outputs)]
        nodes.append(onnx.helper.make_node(op, inputs, results, **attrs))
        return results[0]

    def step(self, images: list[str], constants: list[str], depth: int) -> list[onnx.NodeProto]:
        """A few nodes that add one image or one constant."""
        nodes: list[onnx.NodeProto] = []
        image = self.draw(st.sampled_from(images))
        kinds = [
            "unary",
            "binary",
            "constant",
            "const-op",
            "const-chain",
            "conv-bn",
            "shape",
            "split",
            "reshape",
            "concat",
        ]
        kind = self.draw(st.sampled_from(kinds + ["identity"] * 2 + ["if"] * (depth < 2)))
        match kind:
            case "unary":
                op = self.draw(st.sampled_from(["Relu", "Sigmoid", "Neg", "Abs", "Floor"]))
                images.append(self.emit(nodes, op, [image]))
            case "identity":
                images.append(self.emit(nodes, "Identity", [image]))
            case "binary":
                op = self.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"]))
                other = self.draw(st.sampled_from(images + constants + constants[3:] * 3))
                images.append(self.emit(nodes, op, [image, other]))
            case "constant":
                value = self.rng.integers(-1, 2, (1, 4, 1, 1)).astype(np.float32)
                constants.append(self.emit(nodes, "Constant", [], value=onnx.numpy_helper.from_array(value)))
            case "const-op":
                op = self.draw(st.sampled_from(["Neg", "Identity", "Abs", "Exp"]))
                constants.append(self.emit(nodes, op, [self.draw(st.sampled_from(constants))]))
            case "const-chain":
                pair = [self.draw(st.sampled_from(constants)) for _ in range(2)]
                constants.append(self.emit(nodes, self.draw(st.sampled_from(["Add", "Mul"])), pair))
            case "conv-bn":
                group = self.draw(st.sampled_from([1, 2, 4]))
                transposed = self.draw(st.booleans())
                weight = self.weights(4, 4 // group, 3, 3)
                if self.draw(st.booleans()):
                    weight = self.emit(nodes, "Identity", [weight])
                bias = [self.weights(4)] if self.draw(st.booleans()) else []
                op = "ConvTranspose" if transposed else "Conv"
                out = self.emit(nodes, op, [image, weight, *bias], group=group, pads=[1, 1, 1, 1])
                if self.draw(st.integers(0, 3)) == 0:
                    images.append(out)
                var = self.stored(self.rng.integers(1, 4, 4).astype(np.float32))
                images.append(
                    self.emit(
                        nodes, "BatchNormalization", [out, self.weights(4), self.weights(4), self.weights(4), var]
                    )
                )
            case "shape":
                shape = self.emit(nodes, "Shape", [image])
                images.append(self.emit(nodes, "Reshape", [image, shape]))
            case "split":
                sizes = self.stored(np.array([1, 3], np.int64))
                first = self.name(), self.name()
                nodes.append(onnx.helper.make_node("Split", [image, sizes], first, axis=1))
                images.append(self.emit(nodes, "Concat", list(first[:: self.draw(st.sampled_from([1, -1]))]), axis=1))
            case "reshape":
                flat = self.emit(nodes, "Reshape", [image, self.stored(np.array([2, -1], np.int64))])
                images.append(self.emit(nodes, "Reshape", [flat, self.stored(np.array([2, 4, 3, 3], np.int64))]))
            case "concat":
                both = self.emit(nodes, "Concat", [image, self.draw(st.sampled_from(images))], axis=0)
                images.append(self.emit(nodes, "Slice", [both, self.stored(np.array([0])), self.stored(np.array([2]))]))
            case "if":
                number, bodies, numbers = self.number, {}, []
                for branch in ("then_branch", "else_branch"):  # both use the same names inside, as exporters do
                    self.number = number
                    bodies[branch] = self.body(images, constants, depth)
                    numbers.append(self.number)
                self.number = max(numbers)
                images.append(self.emit(nodes, "If", ["flag"], **bodies))
        return nodes

    def body(self, images: list[str], constants: list[str], depth: int) -> onnx.GraphProto:
        """A branch that returns one image."""
        nodes: list[onnx.NodeProto] = []
        inner, inner_constants = list(images), list(constants)
        for _ in range(self.draw(st.integers(1, 3))):
            nodes += self.step(inner, inner_constants, depth + 1)
        result = self.emit(nodes, self.draw(st.sampled_from(["Identity", "Abs"])), [inner[-1]])
        info = onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)
        return onnx.helper.make_graph(nodes, "body", [], [info])


def _all_nodes(nodes: Any) -> Any:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g.node)
                for info in attribute.g.output:
                    yield onnx.NodeProto(input=[info.name])


__all__ = ["CASES", "Case", "Constant", "Variable", "canonical", "cases", "models"]
