"""``exp(x - max(x)) / sum(exp(x - max(x)))`` over one axis is Softmax, and so is ``exp(x) / sum(exp(x))``, which overflows where Softmax does not.

Before opset 13 Softmax is over all axes from `axis` on, so that only the last axis can be meant. Over another axis than the last ONNX Runtime's
kernel transposes before and after, which on images is slower than the parts; there they stay, but for TensorRT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.analyses.idioms import closed, reduced_axes
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import TENSORRT, Context, Exactness, Pass

_PER_AXIS = 13


@dataclass(frozen=True)
class FuseSoftmax(Pass):
    """Compute Softmax by one operator.

    Before:
        g (float[N,S,4] x) => (float[N,S,4] y)
        <int64[1] axes = {-1}>
        { m = ReduceMax (x, axes)
          d = Sub (x, m)
          e = Exp (d)
          s = ReduceSum (e, axes)
          y = Div (e, s) }
    After:
        g (float[N,S,4] x) => (float[N,S,4] y)
        { y = Softmax <axis = -1> (x) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ReduceSum"})

    every_axis: bool | None = None  # whether over other axes than the last, too; none: where the target is TensorRT

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of Softmaxes fused."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        every_axis = ctx.serves(TENSORRT, self.every_axis)
        fused = 0
        for node in list(model.nodes()):
            found = _match(node, shapes, edit)
            if found is None:
                continue
            reason = _objection(found, model.opset, every_axis, shapes, edit)
            if reason is not None:
                ctx.remark(node, f"no Softmax: {reason}")
                continue
            if not ctx.admit():
                break
            rank = shapes.rank(found.x) or 0
            axis = {"axis": -1 if found.axis == rank - 1 else found.axis}
            edit.take_over(found.result, Node("Softmax", "softmax", axis, [found.x]), found.nodes)
            fused += 1
        edit.commit()
        return fused


@dataclass(frozen=True)
class _Softmax:
    x: gs.Tensor
    result: gs.Tensor
    axis: int  # from the front
    nodes: tuple[Node, ...]


def _match(total: Node, shapes: Shapes, edit: Editor) -> _Softmax | None:
    """The Softmax whose sum `total` computes."""
    axis = _axis(total, "ReduceSum", shapes, edit)
    if axis is None:
        return None
    exp, divide = edit.producer(total.inputs[0]), edit.sole_consumer(total.outputs[0])
    if exp is None or exp.op != "Exp" or divide is None or not (exp.is_onnx and divide.is_onnx):
        return None
    nodes = [exp, total]
    divisor = total.outputs[0]
    if divide.op == "Reciprocal":
        nodes.append(divide)
        divisor = divide.outputs[0]
        apply = edit.sole_consumer(divisor)
        if apply is None or apply.op != "Mul" or not any(t is exp.outputs[0] for t in apply.inputs):
            return None
        divide = apply
    elif divide.op != "Div" or divide.inputs[0] is not exp.outputs[0] or divide.inputs[1] is not divisor:
        return None
    nodes.append(divide)
    x = exp.inputs[0]
    shift = edit.producer(x)
    if shift is not None and shift.op == "Sub" and shift.is_onnx:
        maximum = edit.producer(shift.inputs[1])
        if (
            maximum is not None
            and maximum.inputs[0] is shift.inputs[0]
            and _axis(maximum, "ReduceMax", shapes, edit) == axis
            and closed([maximum, shift, *nodes], divide.outputs[0], edit)
        ):
            nodes = [maximum, shift, *nodes]
            x = shift.inputs[0]
    return _Softmax(x, divide.outputs[0], axis, tuple(nodes))


def _axis(node: Node, op: str, shapes: Shapes, edit: Editor) -> int | None:
    """The one axis that a reduction keeps with size 1."""
    rank = shapes.rank(node.inputs[0]) if node.op == op and node.is_onnx else None
    axes = reduced_axes(node, edit) if rank and node.attrs.get("keepdims", 1) else None
    return axes[0] % rank if rank and axes and len(axes) == 1 else None


def _objection(found: _Softmax, opset: int, every_axis: bool, shapes: Shapes, edit: Editor) -> str | None:
    dtype, rank = shapes.dtype(found.x), shapes.rank(found.x)
    if dtype is None or dtype.kind != "f":
        return f"the type of {found.x.name!r} is not known to be float"
    if not closed(found.nodes, found.result, edit):
        return "a value inside it is read by others, too"
    last = found.axis == (rank or 0) - 1
    if opset < _PER_AXIS and not last:
        return f"opset {opset} has it over the last axes only"
    if not (last or every_axis):
        return "over another axis than the last its parts may be faster"
    return None
