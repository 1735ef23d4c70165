"""Einsum of two values that contracts some axes is MatMul, with its operands and its result transposed and reshaped where they must be:

    abc,cd->abd       x @ W
    abc,cde->abde     x @ W as a matrix, the last axis parted
    abcd,cde->abe     the last two axes of x merged, times W as a matrix
    aecd,abcd->acbe   heads of keys and queries: transposed to [a, c, e, d] and [a, c, d, b], and back

Runtimes do the same inside, where no fusion can see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass


@dataclass(frozen=True)
class LowerEinsum(Pass):
    """Write Einsum of two operands as MatMul.

    Before:
        g (float[B,S,2] x) => (float[B,S,2,3] y)
        <float[2,2,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}>
        { y = Einsum <equation = "abc,cde->abde"> (x, w) }
    After:
        g (float[B,S,2] x) => (float[B,S,2,3] y)
        <float[2,6] w = {1,2,3,4,5,6,7,8,9,10,11,12}, int64[4] part = {0,0,2,3}>
        { p = MatMul (x, w)
          y = Reshape (p, part) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Einsum"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of products written."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        for node in list(model.nodes()):
            if node.op != "Einsum" or not node.is_onnx:
                continue
            plan = _plan(node, shapes, edit)
            if isinstance(plan, str):
                ctx.remark(node, f"no MatMul: {plan}")
                continue
            if not ctx.admit():
                break
            _write(node, plan, edit, shapes)
            done += 1
        edit.commit()
        return done


@dataclass
class _Plan:
    left: str  # the order of axes that MatMul takes: kept by both, of the left alone, summed
    right: str  # kept by both, summed, of the right alone
    result: str  # what MatMul gives, axes parted again
    output: str
    operands: list[tuple[str, gs.Tensor]]  # terms with their values, the one whose axes come first in the result first
    sizes: dict[str, int]  # of axes that have to be merged
    matrix: bool  # whether the right operand is a constant matrix


def _plan(node: Node, shapes: Shapes, edit: Editor) -> _Plan | str:
    """The axes in groups, or why it is no MatMul."""
    equation = str(node.attrs.get("equation", "")).replace(" ", "")
    terms, arrow, output = equation.partition("->")
    operands = terms.split(",")
    if not arrow or len(operands) != 2 or "." in equation:
        return f"{equation!r} is not of two operands with a result"
    pairs = list(zip(operands, node.inputs, strict=True))
    own = [next((output.index(c) for c in output if c in t and c not in u), 0) for t, u in (operands, operands[::-1])]
    if own[1] < own[0] and not edit.is_fixed(node.inputs[1]):
        pairs.reverse()
    a, b = (term for term, _ in pairs)
    if any(len(set(t)) != len(t) for t in (a, b, output)):
        return f"{equation!r} repeats an axis"
    both = [c for c in output if c in a and c in b]
    left, right = [c for c in output if c in a and c not in b], [c for c in output if c in b and c not in a]
    summed = [c for c in a if c in b and c not in output]
    if set(a) - {*both, *left, *summed} or set(b) - {*both, *right, *summed}:
        return f"{equation!r} sums an axis of one operand alone"
    if not summed or not right or not left:
        return f"{equation!r} is no product of matrices"
    known = [shapes.shape(t) for _, t in pairs]
    if any(s is None or len(s) != len(t) for s, (t, _) in zip(known, pairs, strict=True)):
        return "a shape is not known"
    if any(shapes.dtype(t) is None or shapes.dtype(t).kind != "f" for t in node.inputs):  # type: ignore[union-attr]
        return "it is not of floats"
    dims = {c: d for (t, _), s in zip(pairs, known, strict=True) for c, d in zip(t, s or (), strict=True)}
    matrix = edit.is_fixed(pairs[1][1]) and not both
    if any(
        dims[c] != (known[1] or ())[b.index(c)] or dims[c] != (known[0] or ())[a.index(c)] for c in (*both, *summed)
    ):
        return "an axis of both may be of size 1 in one"
    if not matrix and (len(summed) > 1 or len(right) > 1 or len(left) > 1):
        return "axes of computed operands would have to be merged"
    merged = [*summed, *right] if matrix else []
    if not all(isinstance(dims[c], int) for c in merged):
        return "axes to merge are not fixed"
    if matrix and "".join([*left, *summed]) != a and len(summed) > 1:
        return "axes to merge do not lie together"
    sizes = {c: int(dims[c]) for c in merged}  # type: ignore[arg-type]
    result = "".join([*both, *left, *right])
    return _Plan(
        "".join([*both, *left, *summed]), "".join([*both, *summed, *right]), result, output, pairs, sizes, matrix
    )


def _write(node: Node, plan: _Plan, edit: Editor, shapes: Shapes) -> None:
    (a, first), (b, second) = plan.operands
    result = node.outputs[0]
    dtype = shapes.dtype(first)

    def add(op: str, operands: Sequence[gs.Tensor], **attributes: object) -> gs.Tensor:
        made = edit.variable(f"{node.name}_{op}")
        made.dtype = dtype
        edit.insert_before(node, Node(op, f"{node.name}_{op}", dict(attributes), [*operands], [made]), (node,))
        return made

    def ordered(tensor: gs.Tensor, now: str, wanted: str) -> gs.Tensor:
        return tensor if now == wanted else add("Transpose", [tensor], perm=[now.index(c) for c in wanted])

    left = ordered(first, a, plan.left)
    summed = [c for c in plan.left if c in plan.right and c not in plan.output]
    right_axes = [c for c in plan.right if c not in plan.left]
    if plan.matrix:
        values = second.values.transpose([b.index(c) for c in plan.right])
        rows = math.prod(plan.sizes[c] for c in summed)
        shape = (rows, math.prod(plan.sizes[c] for c in right_axes))
        same = tuple(second.shape) == shape and b == plan.right
        right = second if same else edit.constant(second.name, np.ascontiguousarray(values.reshape(shape)))
        if len(summed) > 1:
            kept = len(plan.left) - len(summed)
            left = add("Reshape", [left, edit.constant("merge", np.array([0] * kept + [rows], np.int64))])
    else:
        right = ordered(second, b, plan.right)
    product = add("MatMul", [left, right])
    if plan.matrix and len(right_axes) > 1:
        kept = len(plan.result) - len(right_axes)
        part = [0] * kept + [plan.sizes[c] for c in right_axes]
        product = add("Reshape", [product, edit.constant("part", np.array(part, np.int64))])
    product = ordered(product, plan.result, plan.output)
    last = edit.producer(product)
    assert last is not None
    node.outputs.clear()
    last.outputs[0] = result
    edit.erase(node)
