"""``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axes is RMSNormalization, from opset 23 on.

Below it, what ONNX Runtime fuses by itself is the division; exporters that multiply by the reciprocal of the root hide it:
``x * (1 / sqrt(v)) = x / sqrt(v)``, which is also one node less for everybody else. Nor does it see one without a scale, as weights of
ones leave it: there a scale of ones makes it one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.analyses.idioms import Norm, normalization, trailing
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Variable
from graphopt.pass_base import CONTRIB, Context, Exactness, Pass

_SINCE = 23


@dataclass(frozen=True)
class FuseRmsNorm(Pass):
    """Normalize by the root of the mean square in one operator, or in the form that runtimes recognize.

    Before:
        g (float[N,S,4] x) => (float[N,S,4] y)
        <float two = {2}, float e = {0.00001}, float[4] k = {1,2,3,4}, int64[1] axes = {-1}>
        { q = Pow (x, two)
          v = ReduceMean (q, axes)
          w = Add (v, e)
          s = Sqrt (w)
          r = Reciprocal (s)
          n = Mul (x, r)
          y = Mul (k, n) }
    After:
        g (float[N,S,4] x) => (float[N,S,4] y)
        <float[4] k = {1,2,3,4}>
        { y = RMSNormalization <axis = -1, epsilon = 0.00001> (x, k) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ReduceMean"})

    ones: bool | None = None  # whether a missing scale is written as ones; none: where the target is ONNX Runtime

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of normalizations rewritten."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        ones = ctx.serves(CONTRIB, self.ones)
        fused = 0
        for node in list(model.nodes()):
            found = normalization(node, edit)
            if found is None or found.centred:
                continue
            reason = _objection(found, model.opset, shapes)
            inverse = next((n for n in found.nodes if n.op == "Reciprocal"), None)
            bare = ones and reason is not None and inverse is None and _is_bare(found, shapes)
            if reason is not None and inverse is None and not bare:
                ctx.remark(node, f"no RMSNormalization: {reason}")
                continue
            if not ctx.admit():
                break
            if reason is None:
                _write(found, shapes, edit)
            elif inverse is not None:
                _divide(found, inverse, edit)
            else:
                _multiply(found, shapes, edit)
            fused += 1
        edit.commit()
        return fused


def _objection(found: Norm, opset: int, shapes: Shapes) -> str | None:
    shape, dtype = shapes.shape(found.x), shapes.dtype(found.x)
    if opset < _SINCE:
        return f"opset {opset} has none"
    if shape is None or dtype is None:
        return f"shape or type of {found.x.name!r} is not known"
    axes = sorted(a % len(shape) for a in found.axes)
    if axes != list(range(len(shape) - len(axes), len(shape))):
        return f"the axes {list(found.axes)} are not the last ones"
    normal = tuple(d for d in shape[len(shape) - len(axes) :] if isinstance(d, int))
    if len(normal) != len(axes):
        return "the normalized dimensions are not fixed"
    if found.bias is not None:
        return "a bias follows"
    if found.scale is not None and (trailing(found.scale, normal) is None or found.scale.values.dtype != dtype):
        return f"{found.scale.name!r} does not follow the normalized axes"
    return None


def _is_bare(found: Norm, shapes: Shapes) -> bool:
    """Whether nothing but a scale is missing for ONNX Runtime's own fusion."""
    shape = shapes.shape(found.x)
    return (
        found.scale is None
        and found.bias is None
        and shape is not None
        and isinstance(shape[-1], int)
        and [a % len(shape) for a in found.axes] == [len(shape) - 1]
        and shapes.dtype(found.x) == np.float32
        and any(n.op == "Pow" and n.inputs[0] is found.x for n in found.nodes)
    )


def _write(found: Norm, shapes: Shapes, edit: Editor) -> None:
    shape = shapes.shape(found.x) or ()
    normal = tuple(int(d) for d in shape[len(shape) - len(found.axes) :])  # type: ignore[arg-type]
    scale = found.scale
    if scale is None:
        scale = edit.constant("ones", np.ones(normal, shapes.dtype(found.x)))
    elif scale.values.shape != normal:
        scale = edit.constant(scale.name, np.array(trailing(scale, normal)))
    attributes = {"axis": -len(found.axes), "epsilon": float(np.float32(found.epsilon))}
    edit.take_over(found.result, Node("RMSNormalization", "norm", attributes, [found.x, scale]), found.nodes)


def _divide(found: Norm, inverse: Node, edit: Editor) -> None:
    """Divide by the root instead of multiplying by its reciprocal."""
    apply = edit.sole_consumer(inverse.outputs[0])
    assert apply is not None
    result = apply.outputs[0]
    apply.outputs.clear()
    new = Node("Div", apply.name, {}, [found.x, inverse.inputs[0]], [result])
    edit.insert_before(apply, new, (inverse, apply))
    edit.erase(apply)
    edit.erase(inverse)


def _multiply(found: Norm, shapes: Shapes, edit: Editor) -> None:
    """Multiply by ones behind the normalization."""
    last = edit.producer(found.result)
    assert last is not None
    normal = Variable(edit.fresh_name(f"{found.result.name}_normal"), np.dtype(np.float32))
    ones = edit.constant("ones", np.ones((shapes.shape(found.x) or ())[-1:], np.float32))
    new = Node(last.op, last.name, dict(last.attrs), list(last.inputs), [normal])
    last.outputs.clear()
    edit.insert_before(last, new, (last,))
    edit.insert_before(last, Node("Mul", f"{last.name}_scale", {}, [normal, ones], [found.result]), found.nodes)
    edit.erase(last)
