"""Transposes around a product, of which fewer are needed:

    A^T @ B^T = (B @ A)^T                     where both swap their last two axes: one Transpose for two
    (A^T @ B)^T = B^T @ A                     one for two, and none where B is constant
    T_p(A) @ T_p(B) = T_p(A @ B)              for one permutation of the other axes: one for two

Each number of the result is the sum of the same products as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.analyses.layouts import permutation
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place

Perm = tuple[int, ...]


@dataclass(frozen=True)
class MergeProductTransposes(Pass):
    """Transpose what a MatMul reads and makes once instead of twice; their number always falls.

    Before:
        g (float[B,4,3] a, float[B,5,4] b, float[B,4,3] c, float[B,4,6] d) => (float[B,3,5] y, float[B,6,3] z)
        { s = Transpose <perm = [0,2,1]> (a)
          t = Transpose <perm = [0,2,1]> (b)
          y = MatMul (s, t)
          u = Transpose <perm = [0,2,1]> (c)
          v = MatMul (u, d)
          z = Transpose <perm = [0,2,1]> (v) }
    After:
        g (float[B,4,3] a, float[B,5,4] b, float[B,4,3] c, float[B,4,6] d) => (float[B,3,5] y, float[B,6,3] z)
        { p = MatMul (b, a)
          y = Transpose <perm = [0,2,1]> (p)
          t = Transpose <perm = [0,2,1]> (d)
          z = MatMul (t, c) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"MatMul"})
    places: ClassVar[tuple[Place, ...]] = (Place(("MatMul",), ("Transpose",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of products rewritten."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        for node in list(model.nodes()):
            if node.op != "MatMul" or not node.is_onnx:
                continue
            turned = [_transposed(t, node, shapes, edit) for t in node.inputs]
            after = edit.sole_consumer(node.outputs[0])
            outer = None if after is None or edit.graph_of(after) is not edit.graph_of(node) else after
            perm = _perm(outer, shapes)
            if not any(turned) or not (all(turned) or perm is not None):
                continue
            ranks = [shapes.rank(t) for t in (*node.inputs, *node.outputs)]
            if None in ranks or any(r is not None and r < 2 for r in ranks):
                ctx.remark(node, "the ranks of what it reads are not known, or it multiplies vectors")
                continue
            if turned[0] is not None and turned[1] is not None:
                written = _both(node, turned[0], turned[1], shapes, edit, ctx)
            elif outer is not None and perm is not None and _swaps(perm):
                written = _around(node, outer, turned, shapes, edit, ctx)
            else:
                written = None
            if written is None:
                ctx.remark(node, "the Transposes around it permute different axes, or have other readers")
            elif not written:
                break
            else:
                done += 1
        edit.commit()
        return done


def _perm(node: Node | None, shapes: Shapes) -> Perm | None:
    return permutation(node, shapes) if node is not None and node.op == "Transpose" and node.is_onnx else None


def _transposed(tensor: gs.Tensor, node: Node, shapes: Shapes, edit: Editor) -> Node | None:
    """The Transpose that makes `tensor` for `node` alone, in its graph."""
    made = edit.producer(tensor)
    if made is None or _perm(made, shapes) is None or edit.sole_consumer(tensor) is not node:
        return None
    return made if edit.graph_of(made) is edit.graph_of(node) else None


def _swaps(perm: Perm) -> bool:
    """Whether a permutation swaps the last two axes alone."""
    return len(perm) >= 2 and perm == (*range(len(perm) - 2), len(perm) - 1, len(perm) - 2)


def _swap(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _both(node: Node, left: Node, right: Node, shapes: Shapes, edit: Editor, ctx: Context) -> bool | None:
    """Multiply first and transpose the result; None: the permutations do not allow it, False: not admitted."""
    perms = permutation(left, shapes), permutation(right, shapes)
    rank = shapes.rank(node.outputs[0])
    if perms[0] is None or perms[1] is None or rank is None:
        return None
    operands, result = [left.inputs[0], right.inputs[0]], node.outputs[0]
    if _swaps(perms[0]) and _swaps(perms[1]):
        if rank == 2:
            return None  # Gemm takes both transposed
        operands, perm = operands[::-1], _swap(rank)
    elif perms[0] == perms[1] and perms[0][-2:] == (rank - 2, rank - 1):
        perm = list(perms[0])
    else:
        return None
    if not ctx.admit():
        return False
    product = edit.variable(f"{result.name}_product")
    product.dtype = shapes.dtype(result)
    edit.insert_before(node, Node("MatMul", node.name, {}, operands, [product]), (left, right, node))
    edit.take_over(result, Node("Transpose", "transposed", {"perm": perm}, [product]), (left, right))
    edit.erase(left)
    edit.erase(right)
    return True


def _around(
    node: Node, outer: Node, turned: list[Node | None], shapes: Shapes, edit: Editor, ctx: Context
) -> bool | None:
    """Multiply the other way round, so that the Transpose of one operand and that of the result are one of the other operand."""
    place = 0 if turned[0] is not None else 1
    inner, other = turned[place], node.inputs[1 - place]
    perm, rank = None if inner is None else permutation(inner, shapes), shapes.rank(other)
    if inner is None or perm is None or rank is None or not _swaps(perm):
        return None
    if not ctx.admit():
        return False
    twisted = edit.variable(f"{other.name}_transposed")
    twisted.dtype = shapes.dtype(other)
    edit.insert_before(node, Node("Transpose", inner.name, {"perm": _swap(rank)}, [other], [twisted]), (inner, outer))
    operands = [twisted, inner.inputs[0]] if place == 0 else [inner.inputs[0], twisted]
    edit.take_over(outer.outputs[0], Node("MatMul", "product", {}, operands), (inner, node, outer))
    edit.erase(node)
    edit.erase(inner)
    return True
