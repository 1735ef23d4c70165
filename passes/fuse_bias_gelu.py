"""``gelu(x + b)`` with b a row is one operator of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import gate
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import CONTRIB, Context, Exactness, Pass


@dataclass(frozen=True)
class FuseBiasGelu(Pass):
    """Add a bias and apply Gelu by one operator.

    Before:
        g (float[N,2] x) => (float[N,2] y)
        <float[2] b = {1,2}>
        { a = Add (x, b)
          y = Gelu (a) }
    After:
        g (float[N,2] x) => (float[N,2] y)
        <float[2] b = {1,2}>
        { y = com.microsoft.BiasGelu (x, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Gelu", "FastGelu"})
    serves: ClassVar[tuple[str, ...]] = CONTRIB

    contrib: bool | None = None  # whether com.microsoft operators may be written; none: as the target says
    measure: bool = False  # whether only what is faster on this machine is fused, see graphopt/gate.py
    skip: tuple[str, ...] = ()  # values at the end of what is left alone

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of biases taken in."""
        if not ctx.serves(self.serves, self.contrib):
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        fused = 0
        for node in list(model.nodes()):
            op = _biased_operator(node)
            add = edit.producer(node.inputs[0]) if op is not None else None
            if op is None or add is None or add.op != "Add" or not add.is_onnx:
                continue
            row = next((i for i in (0, 1) if edit.is_fixed(add.inputs[i]) and add.inputs[i].values.ndim == 1), None)
            if row is None:
                continue
            reason = _objection(node, add, row, shapes, edit)
            if reason is not None:
                ctx.remark(node, f"the sum before it stays: {reason}")
                continue
            end = node.outputs[0]
            if end.name in self.skip or (
                self.measure and not gate.pays(self, model, shapes, edit, [*add.inputs], end, ctx)
            ):
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            new = Node(op, node.name, {}, [add.inputs[1 - row], add.inputs[row]], [result], "com.microsoft")
            edit.insert_before(node, new, (add, node))
            edit.erase(node)
            edit.erase(add)
            fused += 1
        edit.commit()
        if fused:
            model.set_opset("com.microsoft", 1)
        return fused


def _biased_operator(node: Node) -> str | None:
    """What computes this Gelu of a sum."""
    if node.op == "Gelu" and (node.is_onnx or node.domain == "com.microsoft"):
        return "FastGelu" if node.attrs.get("approximate") == "tanh" else "BiasGelu"
    return "FastGelu" if node.op == "FastGelu" and node.domain == "com.microsoft" and len(node.inputs) == 1 else None


def _objection(node: Node, add: Node, row: int, shapes: Shapes, edit: Editor) -> str | None:
    between = add.outputs[0]
    if edit.sole_consumer(between) is not node or edit.graph_of(add) is not edit.graph_of(node):
        return f"{between.name!r} is read by others too"
    if shapes.dtype(between) != np.float32:
        return "ONNX Runtime's operator is for float32"
    shape = shapes.shape(add.inputs[1 - row])
    if shape is None or not shape or shape[-1] != add.inputs[row].shape[0]:
        return f"{add.inputs[1 - row].name!r} may be widened by the bias"
    return None
