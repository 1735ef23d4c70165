"""Shape inference by onnx itself, on the model without its large weights.

onnx reads the content of small integer constants only (shapes, axes), so everything above `max_constant` bytes goes in as
dimensions and dtype without data. Reference: https://github.com/onnx/onnx/blob/main/docs/ShapeInference.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx

from graphopt.analyses.shapes import Shapes
from graphopt.ir import Dim, Graph, Model, Shape, Variable, numpy_dtype
from graphopt.pass_base import Context, Pass

_LONG: Final = 1 << 16  # elements


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
    data_prop: bool = (
        True  # follow the values of shape arithmetic, unless a vector is so long that onnx would choke on it
    )

    def run(self, model: Model, ctx: Context) -> int:
        """Refine all graphs; returns the number of values that became better known."""
        shapes = ctx.analysis(Shapes, model)
        for node in model.nodes():
            if shapes.gives_absurd_rank(node):
                ctx.remark(node, "its result would have more dimensions than any tensor: nothing is inferred")
                return 0
        slim = model.to_proto(lambda c: c.nbytes <= self.max_constant)
        follow = self.data_prop and not _has_long_vector(model, shapes)
        inferred: onnx.ModelProto | None = None
        for strict in (True, False):  # strict stops at the first contradiction and names it, the other goes around it
            try:
                inferred = onnx.shape_inference.infer_shapes(slim, strict_mode=strict, data_prop=follow)
                break
            except (
                onnx.shape_inference.InferenceError,
                onnx.checker.ValidationError,
                RuntimeError,
                ValueError,
            ) as error:
                ctx.remark(None, f"onnx cannot infer all shapes: {' '.join(str(error).split())[:200]}")
        if inferred is None:
            return 0
        promised = frozenset(d for spec in model.inputs for d in spec.shape or () if isinstance(d, str))
        return self._graph(model.graph, inferred.graph, promised, ctx)

    def _graph(self, graph: Graph, proto: onnx.GraphProto, promised: frozenset[str], ctx: Context) -> int:
        infos = {info.name: info for info in [*proto.value_info, *proto.output]}
        border = {id(t) for t in [*graph.inputs, *graph.outputs]}
        refined = 0
        for node, node_proto in zip(graph.nodes, proto.node, strict=True):
            for tensor in node.outputs:
                info = infos.get(tensor.name)
                if info is None or id(tensor) in border or not info.type.HasField("tensor_type"):
                    continue
                better = _refined(tensor, info.type.tensor_type, promised)
                if better != (tensor.dtype, tensor.shape) and ctx.admit():
                    tensor.dtype, tensor.shape = better
                    refined += 1
            for attribute in node_proto.attribute:
                body = node.attrs[attribute.name]
                if isinstance(body, Graph):
                    refined += self._graph(body, attribute.g, promised, ctx)
        return refined


def _has_long_vector(model: Model, shapes: Shapes) -> bool:
    """onnx follows the elements of every vector it meets, 120 bytes for each (onnx 1.23), whether they are known or not."""
    graphs = list(model.graphs())
    tensors = [t for g in graphs for t in [*g.inputs, *(t for n in g.nodes for t in [*n.inputs, *n.outputs])]]
    for tensor in tensors:
        for shape in (tensor.shape, shapes.shape(tensor)):
            if shape is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] > _LONG:
                return True
    return False


def _refined(
    tensor: Variable, proto: onnx.TypeProto.Tensor, promised: frozenset[str]
) -> tuple[np.dtype[Any] | None, Shape | None]:
    """The dtype and shape of `tensor` with what `proto` knows more; a contradiction is left as declared."""
    dtype, shape = tensor.dtype, tensor.shape
    if tensor.type not in (None, "tensor_type"):
        return dtype, shape
    if dtype is None and proto.elem_type:
        dtype = numpy_dtype(proto.elem_type)
    if proto.HasField("shape"):
        found: Shape = tuple(_dim(d) for d in proto.shape.dim)
        if shape is None:
            shape = found
        elif len(found) == len(shape):
            shape = tuple(_better(old, new, promised) for old, new in zip(shape, found, strict=True))
    return dtype, shape


def _dim(proto: onnx.TensorShapeProto.Dimension) -> Dim:
    if proto.HasField("dim_value"):
        return int(proto.dim_value)
    # onnx invents names like unk__3 for dimensions it cannot tell: no information
    return None if not proto.dim_param or proto.dim_param.startswith("unk__") else str(proto.dim_param)


def _better(old: Dim, new: Dim, promised: frozenset[str]) -> Dim:
    """`new` where `old` says nothing, or names what only the exporter knows; numbers and the inputs' symbols stay."""
    return new if old is None or (isinstance(old, str) and old not in promised and isinstance(new, int)) else old
