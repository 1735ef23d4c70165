"""``(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias`` over the last axes is LayerNormalization.

The variance is divided by the number of elements, as ReduceMean does. The operator came with opset 17; for a runtime that knows it, an
older model is raised to 17 where all its nodes mean the same there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.idioms import Norm, normalization, trailing
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Node
from graphopt.opset import NewerOperator
from graphopt.pass_base import Exactness


@dataclass(frozen=True)
class FuseLayerNorm(NewerOperator):
    """Normalize over the last axes by one operator.

    Before:
        g (float[N,S,4] x) => (float[N,S,4] y)
        <float two = {2}, float e = {0.00001}, float[4] k = {1,2,3,4}, float[4] b = {4,3,2,1}, int64[1] axes = {-1}>
        { m = ReduceMean (x, axes)
          d = Sub (x, m)
          q = Pow (d, two)
          v = ReduceMean (q, axes)
          w = Add (v, e)
          s = Sqrt (w)
          n = Div (d, s)
          t = Mul (n, k)
          y = Add (t, b) }
    After:
        g (float[N,S,4] x) => (float[N,S,4] y)
        <float[4] k = {1,2,3,4}, float[4] b = {4,3,2,1}>
        { y = LayerNormalization <axis = -1, epsilon = 0.00001> (x, k, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ReduceMean"})
    operator: ClassVar[str] = "LayerNormalization"
    since: ClassVar[int] = 17

    def match(self, node: Node, shapes: Shapes, edit: Editor) -> Callable[[], None] | str | None:
        """The normalization around the mean that it begins with."""
        found = normalization(node, edit)
        if found is None or not found.centred:
            return None
        operands = _operands(found, shapes, edit)
        return operands if isinstance(operands, str) else lambda: _write(found, operands, edit)


def _operands(found: Norm, shapes: Shapes, edit: Editor) -> tuple[gs.Tensor, gs.Tensor | None] | str:
    """Scale and bias in the form that the operator takes, or why there are none."""
    shape, dtype = shapes.shape(found.x), shapes.dtype(found.x)
    if shape is None or dtype is None or dtype.kind != "f":
        return f"shape or type of {found.x.name!r} is not known"
    axes = sorted(a % len(shape) for a in found.axes)
    if axes != list(range(len(shape) - len(axes), len(shape))):
        return f"the axes {list(found.axes)} are not the last ones"
    normal = shape[len(shape) - len(axes) :]
    if not all(isinstance(d, int) for d in normal):
        return "the normalized dimensions are not fixed"
    sizes = tuple(d for d in normal if isinstance(d, int))
    written: list[gs.Tensor | None] = []
    for constant in (found.scale, found.bias):
        values = trailing(constant, sizes)
        if constant is None:
            written.append(None)
        elif values is None or values.dtype != dtype:
            return f"{constant.name!r} of shape {list(constant.shape)} does not follow the normalized axes"
        else:
            same = constant.values.shape == sizes
            written.append(constant if same else edit.constant(constant.name, np.array(values)))
    scale, bias = written
    return edit.constant("ones", np.ones(sizes, dtype)) if scale is None else scale, bias


def _write(found: Norm, operands: tuple[gs.Tensor, gs.Tensor | None], edit: Editor) -> None:
    attributes = {"axis": -len(found.axes), "epsilon": float(np.float32(found.epsilon))}
    tensors = [found.x, *(t for t in operands if t is not None)]
    edit.take_over(found.result, Node("LayerNormalization", "norm", attributes, tensors), found.nodes)
