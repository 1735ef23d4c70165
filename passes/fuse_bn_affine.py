"""``BN(x) * k + c`` is a BatchNormalization: inference-mode BN is ``x' * scale + bias`` with x' = (x - mean) / sqrt(var + epsilon), so

    BN(x) * k = x' * (scale * k) + bias * k            BN(x) + c = x' * scale + (bias + c)

Caffe writes each normalization as BatchNorm and Scale, which exporters turn into BatchNormalization, Mul and Add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FuseBnAffine(Pass):
    """Fold per-channel constants that multiply, divide, are added or subtracted behind BatchNormalization into its scale and bias.

    Before:
        g (float[1,2,3,3] x) => (float[1,2,3,3] y)
        <float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {0, 0}, float[2] v = {1, 1},
         float[2,1,1] k = {2, 3}, float[1,2,1,1] c = {4, 5}>
        { n = BatchNormalization (x, s, b, m, v)
          a = Mul (n, k)
          y = Add (a, c) }
    After:
        g (float[1,2,3,3] x) => (float[1,2,3,3] y)
        <float[2] s = {2, 6}, float[2] b = {4, 8}, float[2] m = {0, 0}, float[2] v = {1, 1}>
        { y = BatchNormalization (x, s, b, m, v) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"BatchNormalization"})
    places: ClassVar[tuple[Place, ...]] = (Place(("BatchNormalization",), read_by=("Mul", "Add", "Sub", "Div")),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of operators folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op not in ("Add", "Sub", "Mul", "Div") or not node.is_onnx or model.opset < 9:
                continue
            for index in (0, 1) if node.op in ("Add", "Mul") else (0,):
                bn = edit.producer(node.inputs[index])
                if (
                    bn is not None
                    and bn.is_onnx
                    and bn.op == "BatchNormalization"
                    and bn.outputs[0] is node.inputs[index]
                ):
                    break
            else:
                continue
            folded = _folded(node, bn, index, shapes, edit)
            if isinstance(folded, str):
                ctx.remark(node, folded)
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            constants = [edit.constant(t.name, v) for t, v in zip(bn.inputs[1:3], folded, strict=True)]
            new = Node(bn.op, bn.name, dict(bn.attrs), [bn.inputs[0], *constants, *bn.inputs[3:5]], [result])
            new.attr_types = dict(bn.attr_types)
            new.carried = bn.carried
            edit.insert_before(node, new, origin=(bn, node))
            edit.erase(node)
            edit.erase(bn)
            fused += 1
        edit.commit()
        return fused


def _folded(node: Node, bn: Node, index: int, shapes: Shapes, edit: Editor) -> tuple[Array, Array] | str:
    """The new scale and bias, or why there are none."""
    other = node.inputs[1 - index]
    if not edit.is_fixed(other):
        return f"{other.name!r} is not constant"
    if edit.sole_consumer(bn.outputs[0]) is not node or edit.graph_of(bn) is not edit.graph_of(node):
        return f"{bn.outputs[0].name!r} is read by others too"
    if bn.attrs.get("training_mode", 0) or any(t.name for t in bn.outputs[1:]):
        return f"{bn.name!r} runs in training mode"
    if not all(edit.is_fixed(t) for t in bn.inputs[1:3]):
        return f"scale or bias of {bn.name!r} is not constant"
    rank = shapes.rank(bn.inputs[0])
    if rank is None or rank < 2:
        return f"the rank of {bn.inputs[0].name!r} is not known"
    scale, bias = (t.values for t in bn.inputs[1:3])
    if any(v.dtype.kind != "f" for v in (scale, bias)) or np.dtype(other.dtype).kind != "f":
        return "folding is for float16, float32 and float64"
    values, channels = other.values, int(scale.size)
    uniform = values.ndim <= rank and values.size == 1
    by_channel = rank - 1 <= values.ndim <= rank and values.shape[1 - rank] == channels == values.size
    if not uniform and not by_channel:
        return f"{other.name!r} of shape {list(values.shape)} is not constant per channel"
    k = values.reshape(-1).astype(np.float64)
    with np.errstate(all="ignore"):
        s, b = scale.astype(np.float64), bias.astype(np.float64)
        exact = {"Mul": (s * k, b * k), "Div": (s / k, b / k), "Add": (s, b + k), "Sub": (s, b - k)}[node.op]
        new_scale, new_bias = exact[0].astype(scale.dtype), exact[1].astype(bias.dtype)
    if not np.isfinite(new_scale).all() or not np.isfinite(new_bias).all():
        return f"folding would make scale or bias infinite or NaN in {scale.dtype}"
    if np.abs(new_scale - exact[0]).max(initial=0) > np.finfo(scale.dtype).eps * np.abs(exact[0]).max(initial=0):
        return f"folding would make the scale too small for {scale.dtype}"
    return new_scale, new_bias
