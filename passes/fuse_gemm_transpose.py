"""Gemm transposes its operands by itself: ``transA`` and ``transB`` flip where a transposed matrix comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place


@dataclass(frozen=True)
class FuseGemmTranspose(Pass):
    """Fold a Transpose of a matrix into the Gemm that reads it; a MatMul of matrices becomes a Gemm for it.

    Before:
        g (float[2,N] x, float[2,3] w, float[3] b) => (float[N,3] y)
        { a = Transpose <perm = [1, 0]> (x)
          y = Gemm (a, w, b) }
    After:
        g (float[2,N] x, float[2,3] w, float[3] b) => (float[N,3] y)
        { y = Gemm <transA = 1> (x, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Transpose",), read_by=("Gemm", "MatMul")),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of operands whose Transpose was folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op not in ("Gemm", "MatMul") or not node.is_onnx:
                continue
            current = node
            for index, flag in ((0, "transA"), (1, "transB")):
                transpose = edit.producer(current.inputs[index])
                if transpose is None or transpose.op != "Transpose" or not transpose.is_onnx:
                    continue
                reason = _objection(current, transpose, shapes, edit, model.opset)
                if reason is not None:
                    ctx.remark(node, reason)
                    continue
                if not ctx.admit():
                    edit.commit()
                    return fused
                attributes: dict[str, Any] = dict(current.attrs)
                attributes[flag] = 1 - int(attributes.get(flag, 0))
                operands, results = list(current.inputs), list(current.outputs)
                operands[index] = transpose.inputs[0]
                current.outputs.clear()
                new = Node("Gemm", current.name, attributes, operands, results)
                new.attr_types = dict(current.attr_types)
                new.carried = current.carried
                edit.insert_before(current, new, origin=(transpose, current))
                edit.erase(current)
                if not transpose.outputs[0].outputs and not edit.is_output(transpose.outputs[0]):
                    edit.erase(transpose)
                current = new
                fused += 1
        edit.commit()
        return fused


def _objection(node: Node, transpose: Node, shapes: Shapes, edit: Editor, opset: int) -> str | None:
    """Why the Transpose stays, or None."""
    between = transpose.outputs[0]
    if list(transpose.attrs.get("perm", [1, 0])) != [1, 0] or shapes.rank(transpose.inputs[0]) != 2:
        return f"{transpose.name!r} does not transpose a matrix"
    if edit.is_output(between) or edit.graph_of(transpose) is not edit.graph_of(node):
        return f"{between.name!r} is a graph output, or made in another graph"
    if node.op == "Gemm":
        return None
    dtype = shapes.dtype(between)
    if opset < 11 or dtype is None or dtype.kind != "f" or any(shapes.rank(t) != 2 for t in node.inputs):
        return "the MatMul is no Gemm: not of matrices, not of floats, or below opset 11"
    if edit.sole_consumer(between) is not node:
        return f"{between.name!r} is read by others too"
    return None
