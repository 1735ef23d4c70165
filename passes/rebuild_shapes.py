"""A computed shape that some tensor has anyway is read off that tensor.

Exporters glue shapes together from Shape, Gather, Unsqueeze, arithmetic and Concat. Where the shape analysis says that the result equals
consecutive dimensions of a tensor that is there already, one Shape node gives it. Graph inputs are asked first: they live anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        ranges: dict[
            tuple[object, ...], tuple[Variable, int, int, int]
        ] = {}  # dimensions -> tensor, start, end, its rank

        def offer(tensor: Variable) -> None:
            shape = shapes.shape(tensor)
            if not tensor.name or shape is None or not 0 < len(shape) <= self.max_rank:
                return
            whole = [(0, len(shape))]
            parts = [(i, j) for i in range(len(shape)) for j in range(i + 1, len(shape) + 1)] if opset >= 15 else []
            for start, end in whole + parts:
                if any(isinstance(d, Expr) for d in shape[start:end]):
                    ranges.setdefault(shape[start:end], (tensor, start, end, len(shape)))

        for tensor in graph.inputs:
            offer(tensor)
        rebuilt = 0
        for node in list(graph.nodes):
            if node.is_onnx and node.op != "Shape" and len(node.outputs) == 1:
                rebuilt += self._node(node, ranges, shapes, edit, ctx)
            for tensor in node.outputs:
                offer(tensor)
        return rebuilt

    def _node(
        self,
        node: Node,
        ranges: dict[tuple[object, ...], tuple[Variable, int, int, int]],
        shapes: Shapes,
        edit: Editor,
        ctx: Context,
    ) -> int:
        result = node.outputs[0]
        info = shapes.info(result)
        if info.value is None or info.value.ndim != 1 or info.dtype is None or info.dtype.name != "int64":
            return 0
        found = ranges.get(tuple(info.value))
        if found is None or edit.is_output(result) or not result.outputs or not ctx.admit():
            return 0
        tensor, start, end, rank = found
        attributes = {} if (start, end) == (0, rank) else {"start": start, "end": end}
        value = edit.variable(result.name, result)
        edit.insert_before(node, Node("Shape", f"{node.name}_shape", attributes, [tensor], [value]))
        edit.replace_uses(result, value)
        return 1
