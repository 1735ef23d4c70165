"""``(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias`` over all spatial axes, scale and bias by channel, is InstanceNormalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.idioms import Norm, by_channel, normalization
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass


@dataclass(frozen=True)
class FuseInstanceNorm(Pass):
    """Normalize each channel of each sample by one operator.

    Before:
        g (float[N,2,H,W] x) => (float[N,2,H,W] y)
        <float two = {2}, float e = {0.00001}, float[2,1,1] k = {1,2}, float[2,1,1] b = {4,3}, int64[2] axes = {2,3}>
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
        g (float[N,2,H,W] x) => (float[N,2,H,W] y)
        <float[2] k = {1,2}, float[2] b = {4,3}>
        { y = InstanceNormalization <epsilon = 0.00001> (x, k, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ReduceMean"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of normalizations fused."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            found = normalization(node, edit)
            if found is None or not found.centred:
                continue
            written = _operands(found, shapes, edit)
            if isinstance(written, str):
                ctx.remark(node, f"no InstanceNormalization: {written}")
                continue
            if not ctx.admit():
                break
            attributes = {"epsilon": float(np.float32(found.epsilon))}
            tensors = [
                found.x,
                *(edit.constant(f"{found.result.name}_{name}", values) for name, values in written.items()),
            ]
            edit.take_over(found.result, Node("InstanceNormalization", "norm", attributes, tensors), found.nodes)
            fused += 1
        edit.commit()
        return fused


def _operands(
    found: Norm, shapes: Shapes, edit: Editor
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]] | str:
    """Scale and bias by channel, or why there are none."""
    shape = shapes.shape(found.x)
    if shape is None or len(shape) < 3 or shapes.dtype(found.x) != np.float32:
        return f"{found.x.name!r} is not known to be float32 with batch, channels and space"
    if sorted(a % len(shape) for a in found.axes) != list(range(2, len(shape))):
        return f"the axes {list(found.axes)} are not all spatial ones"
    channels = shape[1]
    if not isinstance(channels, int):
        return "the number of channels is not fixed"
    constants: dict[str, tuple[gs.Tensor | None, float]] = {"scale": (found.scale, 1.0), "bias": (found.bias, 0.0)}
    if len(shape) == 3 and not any(c is not None and c.values.size > 1 for c, _ in constants.values()):
        return "one axis with nothing by channel may be a LayerNormalization"
    written = {}
    for name, (constant, default) in constants.items():
        values = np.full(channels, default) if constant is None else by_channel(constant, len(shape), channels)
        if values is None:
            return f"the {name} is not by channel"
        written[name] = values.astype(np.float32)
    return written
