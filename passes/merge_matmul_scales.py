"""``(a * c) @ (b * d) = (a * (c * d)) @ b`` for scalars: exporters of attention scale query and key by the root of the factor each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass


@dataclass(frozen=True)
class MergeMatmulScales(Pass):
    """Merge constant scalar factors of both operands of a MatMul into one.

    Before:
        g (float[N,2] x, float[2,N] z) => (float[N,N] y)
        <float c = {0.5}, float d = {0.25}>
        { a = Mul (x, c)
          b = Mul (z, d)
          y = MatMul (a, b) }
    After:
        g (float[N,2] x, float[2,N] z) => (float[N,N] y)
        <float c = {0.125}>
        { a = Mul (x, c)
          y = MatMul (a, z) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"MatMul"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of factors merged."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        merged = 0
        # TensorRT takes a factor of the keys into the kernel that moves them; one of the queries costs it three kernels a layer.
        engine = ctx.target is not None and ctx.target.runtime != "ort"
        for node in list(model.nodes()):
            if node.op != "MatMul" or not node.is_onnx:
                continue
            left, right = (_scale(t, node, shapes, edit) for t in node.inputs)
            if left is None or right is None:
                continue
            (scale, first, c, dtype), (other, second, d, _) = left, right
            limit = 2.0 ** (np.finfo(dtype).maxexp // 4)
            if dtype != right[3] or not all(1 / limit <= abs(v) <= limit for v in (c, d)):
                ctx.remark(
                    node, "the factors of both operands are of different types, or too large or small to change places"
                )
                continue
            if not ctx.admit():
                break
            if engine:
                scale, first, other, second = other, second, scale, first
            result = scale.outputs[0]
            scale.outputs.clear()
            constant = edit.constant(f"{result.name}_scale", np.array(c * d, dtype))
            new = Node("Mul", scale.name, {}, [first, constant], [result])
            edit.insert_before(scale, new, origin=(scale, other))
            edit.erase(scale)
            node.inputs[0 if engine else 1] = second
            edit.erase(other)
            merged += 1
        edit.commit()
        return merged


def _scale(
    tensor: gs.Tensor, node: Node, shapes: Shapes, edit: Editor
) -> tuple[Node, gs.Tensor, float, np.dtype[Any]] | None:
    """The Mul or Div by a scalar that makes `tensor` for `node` alone, what it scales, the factor, and its dtype."""
    scale = edit.producer(tensor)
    if scale is None or scale.op not in ("Mul", "Div") or not scale.is_onnx or edit.sole_consumer(tensor) is not node:
        return None
    if edit.graph_of(scale) is not edit.graph_of(node):
        return None
    for index in (1, 0) if scale.op == "Mul" else (1,):
        constant, source = scale.inputs[index], scale.inputs[1 - index]
        if not edit.is_fixed(constant) or constant.values.size != 1 or constant.values.dtype.kind != "f":
            continue
        rank = shapes.rank(source)
        value = float(constant.values.reshape(-1)[0])
        if constant.values.ndim and (rank is None or constant.values.ndim > rank):
            continue
        if value:
            return scale, source, value if scale.op == "Mul" else 1 / value, constant.values.dtype
    return None
