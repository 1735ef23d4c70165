"""The mean over all spatial axes is GlobalAveragePool, which ONNX Runtime computes on the blocks that its convolutions write.

Where the mean drops the axes, Flatten does so behind the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.idioms import reduced_axes
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

_READS_BLOCKS = frozenset(
    {"Conv", "Relu", "Add", "Mul", "Concat", "MaxPool", "AveragePool", "Sigmoid", "HardSigmoid", "HardSwish", "Clip"}
)


@dataclass(frozen=True)
class FuseGlobalAveragePool(Pass):
    """Pool behind convolutions instead of taking the mean.

    Before:
        g (float[N,1,4,4] x) => (float[N,1,1,1] y)
        <float[1,1,1,1] w = {2}, int64[2] axes = {2,3}>
        { c = Conv (x, w)
          y = ReduceMean (c, axes) }
    After:
        g (float[N,1,4,4] x) => (float[N,1,1,1] y)
        <float[1,1,1,1] w = {2}>
        { c = Conv (x, w)
          y = GlobalAveragePool (c) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"ReduceMean"})

    flatten: bool = True  # whether a mean that drops the axes becomes two nodes

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of means replaced."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        for node in list(model.nodes()):
            if node.op != "ReduceMean" or not node.is_onnx:
                continue
            reason = _objection(node, shapes, edit)
            if reason is None and not self.flatten and not node.attrs.get("keepdims", 1):
                reason = "it drops the axes, so it would be two nodes"
            if reason is not None:
                ctx.remark(node, f"no GlobalAveragePool: {reason}")
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            if node.attrs.get("keepdims", 1):
                edit.insert_before(node, Node("GlobalAveragePool", node.name, {}, [node.inputs[0]], [result]), (node,))
            else:
                pooled = edit.variable(f"{result.name}_pooled")
                edit.insert_before(node, Node("GlobalAveragePool", node.name, {}, [node.inputs[0]], [pooled]), (node,))
                flatten = Node("Flatten", f"{node.name}_flatten", {"axis": 1}, [pooled], [result])
                edit.insert_before(node, flatten, (node,))
            edit.erase(node)
            done += 1
        edit.commit()
        return done


def _objection(node: Node, shapes: Shapes, edit: Editor) -> str | None:
    shape, dtype = shapes.shape(node.inputs[0]), shapes.dtype(node.inputs[0])
    if shape is None or len(shape) < 3 or dtype is None or dtype.kind != "f":
        return "it is not of floats with batch, channels and space"
    axes = reduced_axes(node, edit)
    if not axes or sorted(a % len(shape) for a in axes) != list(range(2, len(shape))):
        return "it is over other axes than all spatial ones"
    producer = edit.producer(node.inputs[0])
    if producer is None or producer.op not in _READS_BLOCKS:
        return "no convolution or its like comes before it"
    return None
