"""A computed shape that some tensor has anyway is read off that tensor.

Exporters glue shapes together from Shape, Gather, Unsqueeze, arithmetic and Concat. Where the shape analysis says that the result equals
consecutive dimensions of a tensor that is there already, one Shape node gives it. Graph inputs are asked first: they live anyway.
Before opset 15 Shape has no range: a part of a shape is then sliced off a Shape that the graph computes already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Expr
from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Variable
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class RebuildShapes(Pass):
    """Read a computed shape off a tensor that has it.

    Never adds a node: the one that made the value goes, and one Shape comes.

    Before:
        g (float[N,S,8] x, float[N,S,4] z) => (float[N,S,4] y)
        <int64[1] start = {0}, int64[1] end = {2}, int64[1] four = {4}>
        { s = Shape (x)
          d = Slice (s, start, end)
          t = Concat <axis = 0> (d, four)
          y = Reshape (z, t) }
    After:
        g (float[N,S,8] x, float[N,S,4] z) => (float[N,S,4] y)
        { t = Shape (z)
          y = Reshape (z, t) }
    """

    max_rank: int = 8  # of the tensors asked

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep over each graph; returns the number of values read off."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        rebuilt = sum(self._graph(graph, model.opset, shapes, edit, ctx) for graph in model.graphs())
        edit.commit()
        return rebuilt

    def _graph(self, graph: Graph, opset: int, shapes: Shapes, edit: Editor, ctx: Context) -> int:
        found = _Known(opset, shapes)
        for tensor in graph.inputs:
            found.offer(tensor, self.max_rank)
        rebuilt = 0
        for node in list(graph.nodes):
            if node.op == "Shape" and node.is_onnx:
                rebuilt += self._source(node, found, edit, ctx)
                found.offer_shape(node)
            elif node.is_onnx and len(node.outputs) == 1 and not (node.op == "Slice" and opset < 15):
                rebuilt += self._node(node, found, shapes, edit, ctx)
            for tensor in node.outputs:
                found.offer(tensor, self.max_rank)
        return rebuilt

    def _source(self, node: Node, found: _Known, edit: Editor, ctx: Context) -> int:
        """Read the shape of a value that nothing but shapes is read off, from a tensor that has it anyway."""
        source = node.inputs[0]
        made = edit.producer(source)
        if made is None or edit.is_output(source) or any(n.op != "Shape" for n in source.outputs):
            return 0
        shape = found.analysis.shape(source)
        if shape is None or not any(isinstance(d, Expr) for d in shape):
            return 0
        other = found.tensors.get(shape)
        if other is None or other[0] is source:
            return 0
        tensor, start, end, rank = other
        if ((start, end) != (0, rank) and node.attrs) or not ctx.admit():
            return 0
        node.inputs[0] = tensor
        if (start, end) != (0, rank):
            node.attrs.update(start=start, end=end)
        return 1

    def _frees(self, node: Node, edit: Editor) -> bool:
        """Whether a Shape in the place of `node`, whose result a graph returns, leaves fewer nodes."""
        if edit.graph_of(node) is not edit.output_of(node.outputs[0]):
            return False
        return any(edit.producer(t) is not None and edit.sole_consumer(t) is node for t in node.inputs)

    def _node(self, node: Node, found: _Known, shapes: Shapes, edit: Editor, ctx: Context) -> int:
        result = node.outputs[0]
        info = shapes.info(result)
        returned = edit.is_output(result)
        if info.value is None or info.value.ndim != 1 or info.dtype != np.int64 or not (result.outputs or returned):
            return 0
        key = tuple(info.value)
        if returned and not (key in found.tensors and self._frees(node, edit)):
            return 0
        if (key not in found.tensors and key not in found.shapes) or not ctx.admit():
            return 0
        value = edit.variable(result.name, result)
        if key in found.tensors:
            tensor, start, end, rank = found.tensors[key]
            attributes = {} if (start, end) == (0, rank) else {"start": start, "end": end}
            made = Node("Shape", f"{node.name}_shape", attributes, [tensor], [value])
        else:
            source, start, end = found.shapes[key]
            bounds = [
                edit.constant(f"{result.name}_{what}", np.array([at])) for what, at in (("start", start), ("end", end))
            ]
            made = Node("Slice", f"{node.name}_slice", {}, [source, *bounds], [value])
        edit.insert_before(node, made)
        edit.replace_uses(result, value)
        if returned:
            edit.erase(node)
        return 1


class _Known:
    """Where dimensions can be read off, by the dimensions; what came first is asked first."""

    def __init__(self, opset: int, shapes: Shapes) -> None:
        self.opset = opset
        self.analysis = shapes
        self.tensors: dict[tuple[object, ...], tuple[Variable, int, int, int]] = {}  # tensor, start, end, its rank
        self.shapes: dict[tuple[object, ...], tuple[Variable, int, int]] = {}  # result of a Shape, start, end

    def offer(self, tensor: Variable, max_rank: int) -> None:
        """Remember the shape of `tensor`, and parts of it where Shape can give them."""
        shape = self.analysis.shape(tensor)
        if not tensor.name or shape is None or not 0 < len(shape) <= max_rank:
            return
        whole = [(0, len(shape))]
        for start, end in whole + (_ranges(len(shape)) if self.opset >= 15 else []):
            if any(isinstance(d, Expr) for d in shape[start:end]):
                self.tensors.setdefault(shape[start:end], (tensor, start, end, len(shape)))

    def offer_shape(self, node: Node) -> None:
        """Remember the result of a Shape, for opsets whose Slice can cut a part from it and whose Shape cannot."""
        shape = self.analysis.shape(node.inputs[0])
        if shape is not None and 10 <= self.opset < 15:
            for start, end in _ranges(len(shape)):
                if any(isinstance(d, Expr) for d in shape[start:end]):
                    self.shapes.setdefault(shape[start:end], (node.outputs[0], start, end))


def _ranges(rank: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(rank) for j in range(i + 1, rank + 1)]
