"""``(x + bias) + residual`` ahead of a normalization is one Sum, which ONNX Runtime leaves as it is.

Its CPU provider turns an Add and the LayerNormalization behind it into SkipLayerNormalization, whose kernel (up to 1.32, measured by
benchmarks/latency.py --kernels) takes three to five times as long as the two. It does not do so with Sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import gate
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass


@dataclass(frozen=True)
class MergeSums(Pass):
    """Add bias and residual ahead of a normalization in one Sum.

    Before:
        g (float[N,S,4] x, float[N,S,4] r) => (float[N,S,4] y)
        <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4] c = {1,2,3,4}, float[4] k = {1,2,3,4}, float[4] b = {4,3,2,1}>
        { p = MatMul (x, w)
          q = Add (p, c)
          s = Add (q, r)
          y = LayerNormalization <axis = -1> (s, k, b) }
    After:
        g (float[N,S,4] x, float[N,S,4] r) => (float[N,S,4] y)
        <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4] c = {1,2,3,4}, float[4] k = {1,2,3,4}, float[4] b = {4,3,2,1}>
        { p = MatMul (x, w)
          s = Sum (p, c, r)
          y = LayerNormalization <axis = -1> (s, k, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"LayerNormalization"})
    serves: ClassVar[tuple[str, ...]] = ("ort:cpu",)

    apply: bool | None = None  # none: where the target gains by it
    measure: bool = False  # whether only what is faster on this machine is fused, see graphopt/gate.py
    skip: tuple[str, ...] = ()  # values at the end of what is left alone

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of sums written."""
        if not ctx.serves(self.serves, self.apply) or model.opset < 8:
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        for norm in list(model.nodes()):
            add = edit.producer(norm.inputs[0]) if norm.op == "LayerNormalization" and norm.is_onnx else None
            if add is None or add.op != "Add" or not add.is_onnx:
                continue
            if shapes.dtype(add.outputs[0]) != np.float32:
                ctx.remark(add, "no Sum: ONNX Runtime fuses it with the normalization in float32 only")
                continue
            terms, nodes = _terms(add, edit)
            end = norm.outputs[0]
            if end.name in self.skip or (self.measure and not gate.pays(self, model, shapes, edit, terms, end, ctx)):
                continue
            if not ctx.admit():
                break
            result = add.outputs[0]
            add.outputs.clear()
            edit.insert_before(add, Node("Sum", add.name, {}, terms, [result]), nodes)
            for node in nodes[::-1]:
                edit.erase(node)
            done += 1
        edit.commit()
        return done


def _terms(add: Node, edit: Editor) -> tuple[list[gs.Tensor], list[Node]]:
    """What `add` sums up, the row added to a product apart; and the nodes that a Sum stands for, the inner one first."""
    for index in (0, 1):
        inner = edit.producer(add.inputs[index])
        if inner is None or inner.op != "Add" or not inner.is_onnx or edit.sole_consumer(inner.outputs[0]) is not add:
            continue
        if edit.graph_of(inner) is edit.graph_of(add) and any(edit.is_fixed(t) for t in inner.inputs):
            return [*inner.inputs, add.inputs[1 - index]], [inner, add]
    return list(add.inputs), [add]
