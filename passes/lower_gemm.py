"""``reshape(gemm(reshape(x, [-1, E]), W, b), [.., F]) = x @ W + b`` where the two Reshapes only merge and part leading axes.

Exporters write the product of a matrix and a value of three dimensions so. The detour hides what stands on both sides: transposes that
would meet, a normalization that would take the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.views import follow, trace
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place


@dataclass(frozen=True)
class LowerGemm(Pass):
    """Multiply values of three and more dimensions directly, without making them matrices for Gemm.

    Before:
        g (float[B,S,2] x) => (float[B,S,3] y)
        <float[3,2] w = {1,2,3,4,5,6}, float[3] b = {1,2,3}, int64[2] rows = {-1,2}, int64[1] from = {0}, int64[1] to = {2},
         int64[1] width = {3}>
        { r = Reshape (x, rows)
          p = Gemm <transB = 1> (r, w, b)
          s = Shape (x)
          l = Slice (s, from, to)
          t = Concat <axis = 0> (l, width)
          y = Reshape (p, t) }
    After:
        g (float[B,S,2] x) => (float[B,S,3] y)
        <float[2,3] w = {1,3,5,2,4,6}, float[3] b = {1,2,3}>
        { p = MatMul (x, w)
          y = Add (p, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Gemm", "MatMul"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Gemm", "MatMul"), ("Reshape",), ("Reshape",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of products rewritten."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        turned: dict[int, gs.Tensor] = {}  # weights as MatMul reads them
        for node in list(model.nodes()):
            merge = edit.producer(node.inputs[0]) if node.op in ("Gemm", "MatMul") and node.is_onnx else None
            if merge is None or merge.op != "Reshape" or shapes.rank(node.inputs[0]) != 2:
                continue
            reshape = edit.sole_consumer(node.outputs[0])
            reason = _objection(node, reshape, shapes, edit)
            if reason is not None:
                ctx.remark(node, reason)
                continue
            assert reshape is not None
            if not ctx.admit():
                break
            _rewrite(node, reshape, edit, shapes, turned)
            done += 1
        edit.commit()
        return done


def _objection(node: Node, reshape: Node | None, shapes: Shapes, edit: Editor) -> str | None:
    if reshape is None or reshape.op != "Reshape" or not reshape.is_onnx:
        return "no Reshape alone reads it"
    if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return "it does more than multiply and add"
    turned, weight = bool(node.attrs.get("transB", 0)), shapes.shape(node.inputs[1])
    if turned and not edit.is_fixed(node.inputs[1]):
        return f"weight {node.inputs[1].name!r} is not constant"
    if turned and not all(_reads_turned(n, node.inputs[1]) for n in node.inputs[1].outputs):
        return f"weight {node.inputs[1].name!r} is shared with nodes that read it otherwise"
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if bias is not None and (not edit.is_fixed(bias) or bias.values.ndim > 1):
        return f"bias {bias.name!r} is no constant row"
    before, after = trace(node.inputs[0], shapes, edit), follow(node.outputs[0], shapes, edit)
    if before is None or after is None or not before.nodes or before.nodes[-1].op != "Reshape":
        return "the Reshape before it does not merge leading axes alone, or a shape is not known"
    source, target = shapes.shape(before.nodes[-1].inputs[0]), shapes.shape(reshape.outputs[0])
    if source is None or target is None or len(source) != len(target) or len(source) < 3:
        return "the Reshapes around it differ in rank"
    if weight is None or len(weight) != 2:
        return f"weight {node.inputs[1].name!r} is no matrix"
    depth, width = reversed(weight) if turned else weight
    if source[-1] != depth or target[-1] != width:
        return "the Reshapes around it change the last axis"
    different = [(a, b) for a, b in zip(source[:-1], target[:-1], strict=True) if a != b]
    if len(different) > 1 or any(isinstance(d, int) for pair in different for d in pair):
        return f"the Reshapes around it part {list(map(str, source))} and {list(map(str, target))} differently"
    return None


def _reads_turned(node: gs.Node, weight: gs.Tensor) -> bool:
    return bool(node.op == "Gemm" and node.attrs.get("transB", 0) and sum(t is weight for t in node.inputs) == 1)


def _rewrite(node: Node, reshape: Node, edit: Editor, shapes: Shapes, turned: dict[int, gs.Tensor]) -> None:
    merge = edit.producer(node.inputs[0])
    assert merge is not None
    weight = node.inputs[1]
    if node.attrs.get("transB", 0):
        if id(weight) not in turned:
            turned[id(weight)] = edit.constant(weight.name, np.ascontiguousarray(weight.values.T))
        weight = turned[id(weight)]
    result = edit.variable(f"{node.name}_product")
    result.dtype = shapes.dtype(node.outputs[0])
    last = edit.insert_before(
        reshape, Node("MatMul", node.name, {}, [merge.inputs[0], weight], [result]), (node, reshape)
    )
    if len(node.inputs) > 2 and node.inputs[2].name:
        total = edit.variable(f"{node.name}_sum")
        total.dtype = result.dtype
        last = edit.insert_before(
            reshape, Node("Add", f"{node.name}_bias", {}, [result, node.inputs[2]], [total]), (node, reshape)
        )
    edit.replace_node(reshape, [last.outputs[0]])
    edit.erase(node)
