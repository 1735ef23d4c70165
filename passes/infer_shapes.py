"""Shape inference by onnx itself, on the model without its large weights.

onnx reads the content of small integer constants only (shapes, axes), so everything above `max_constant` bytes goes in as
dimensions and dtype without data. Reference: https://github.com/onnx/onnx/blob/main/docs/ShapeInference.md
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from graphopt.ir import Dim, Graph, Model, Shape, Variable, numpy_dtype, subgraphs
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class InferShapes(Pass):
    """Write down the dtypes and shapes that follow from the inputs, and never contradict what is declared.

    Before:
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] w = {1, 2, 3, 4, 5, 6}>
        { a = MatMul (x, w)
          y = Relu (a) }
    After:
        g (float[N,3] x) => (float[N,2] y)
        <float[3,2] w = {1, 2, 3, 4, 5, 6}, float[N,2] a>
        { a = MatMul (x, w)
          y = Relu (a) }
    """

    max_constant: int = 8192  # bytes of a constant whose content may matter to a shape
    data_prop: bool = True  # follow the values of shape arithmetic

    def run(self, model: Model, ctx: Context) -> int:
        """Refine all graphs; returns the number of values that became better known."""
        slim = model.to_proto(lambda c: c.nbytes <= self.max_constant)
        try:
            inferred = onnx.shape_inference.infer_shapes(
                slim, check_type=False, strict_mode=False, data_prop=self.data_prop
            )
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
            ctx.remark(None, f"onnx cannot infer shapes here: {' '.join(str(error).split())[:200]}")
            return 0
        return self._graph(model.graph, inferred.graph, ctx)

    def _graph(self, graph: Graph, proto: onnx.GraphProto, ctx: Context) -> int:
        infos = {info.name: info for info in [*proto.value_info, *proto.output]}
        border = {id(t) for t in [*graph.inputs, *graph.outputs]}
        refined = 0
        for node, node_proto in zip(graph.nodes, proto.node, strict=True):
            for tensor in node.outputs:
                info = infos.get(tensor.name)
                if info is None or id(tensor) in border or not info.type.HasField("tensor_type"):
                    continue
                if _refine(tensor, info.type.tensor_type) and ctx.admit():
                    refined += 1
            bodies = {a.name: a.g for a in node_proto.attribute if a.type == onnx.AttributeProto.GRAPH}
            names = [name for name, value in node.attrs.items() if any(value is b for b in subgraphs(node))]
            for name, body in zip(names, subgraphs(node), strict=True):
                if name in bodies:
                    refined += self._graph(body, bodies[name], ctx)
        return refined


def _refine(tensor: Variable, proto: onnx.TypeProto.Tensor) -> bool:
    """Add to `tensor` what `proto` knows more; a contradiction is left as declared."""
    if tensor.type not in (None, "tensor_type"):
        return False
    changed = False
    if tensor.dtype is None and proto.elem_type:
        tensor.dtype, changed = numpy_dtype(proto.elem_type), True
    if not proto.HasField("shape"):
        return changed
    found: Shape = tuple(_dim(d) for d in proto.shape.dim)
    if tensor.shape is None:
        tensor.shape, changed = found, True
    elif len(found) == len(tensor.shape):
        merged = tuple(_better(old, new) for old, new in zip(tensor.shape, found, strict=True))
        if merged != tuple(tensor.shape):
            tensor.shape, changed = merged, True
    return changed


def _dim(proto: onnx.TensorShapeProto.Dimension) -> Dim:
    if proto.HasField("dim_value"):
        return int(proto.dim_value)
    # onnx invents names like unk__3 for dimensions it cannot tell: no information
    return None if not proto.dim_param or proto.dim_param.startswith("unk__") else str(proto.dim_param)


def _better(old: Dim, new: Dim) -> Dim:
    if isinstance(old, int | np.integer):
        return int(old)
    return new if isinstance(new, int) or old is None else old
