"""The standard's Attention is ``softmax(scale * q k^T + mask) v``, written with the operators that every TensorRT fuses by itself, and from which
`fuse-attention` makes what ONNX Runtime's CPU computes faster.

A row of which all is masked is NaN then, and zeros by definition: a guard says so, as PyTorch's exporters write it.
Measured on TensorRT for RTX 1.7: it builds no engine of a float32 Attention, and of a half one it makes the kernels that it makes of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Variable
from graphopt.pass_base import TENSORRT, Context, Exactness, Pass

_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Write Attention of the standard as its products and a Softmax.

    Before:
        g (float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v, float[B,1,S,T] m) => (float[B,2,S,4] y)
        { y = Attention <scale = 0.5> (q, k, v, m) }
    After:
        g (float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v, float[B,1,S,T] m) => (float[B,2,S,4] y)
        <float scale = {0.5}, float zero = {0}>
        { t = Transpose <perm = [0, 1, 3, 2]> (k)
          s = MatMul (q, t)
          z = Mul (s, scale)
          a = Add (z, m)
          p = Softmax <axis = -1> (a)
          n = IsNaN (p)
          w = Where (n, zero, p)
          y = MatMul (w, v) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    serves: ClassVar[tuple[str, ...]] = (*TENSORRT, "ort:cpu")
    ops: ClassVar[frozenset[str] | None] = frozenset({"Attention"})

    apply: bool | None = None  # whether to run; none: for the targets that it serves

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of attentions written as their parts."""
        if not ctx.serves(self.serves, self.apply):
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        cpu = ctx.target is not None and ctx.target.family == "ort:cpu"
        lowered = 0
        for node in list(model.nodes()):
            if node.op != "Attention" or not node.is_onnx:
                continue
            reason = _objection(node, shapes)
            if reason is None and cpu and shapes.dtype(node.inputs[0]) != np.float32:
                reason = "ONNX Runtime's CPU has a faster kernel for float32 alone"
            if reason is not None:
                ctx.remark(node, f"stays whole: {reason}")
                continue
            if not ctx.admit():
                break
            _Parts(node, shapes, edit).write()
            lowered += 1
        edit.commit()
        return lowered


def _objection(node: Node, shapes: Shapes) -> str | None:
    """Why it cannot be written as its parts here, or None."""
    if any(t.name for t in [*node.inputs[4:], *node.outputs[1:]]):
        return "it reads or returns keys and values of earlier calls, or its scores"
    if node.attrs.get("softcap", 0.0):
        return "its scores are capped"
    if any(node.attrs.get(f"{side}_window_size", -1) != -1 for side in ("left", "right")):
        return "it looks at a window of the keys alone"
    dtype = shapes.dtype(node.inputs[0])
    if str(dtype) not in _FLOATS:
        return f"{node.inputs[0].name!r} is not known to be of floats"
    if any(shapes.dtype(t) != dtype for t in node.inputs[1:3]):
        return "its operands are not known to have one type"
    ranks = {shapes.rank(t) for t in node.inputs[:3]}
    if ranks not in ({3}, {4}):
        return "its operands are not known to have 3 or 4 dimensions each"
    heads = _heads(node, 0, shapes)
    if not isinstance(heads, int) or heads < 1 or heads != _heads(node, 1, shapes):
        return "keys and values have other heads than queries, or their number is not fixed"
    if len(node.inputs) > 3 and node.inputs[3].name and (reason := _odd_mask(node, shapes)):
        return reason
    if not node.attrs.get("scale", 1.0) > 0:
        return "its scale is zero, or negative, of which Attention takes a root"
    size = _size(node, shapes)
    if not node.attrs.get("scale") and (not isinstance(size, int) or size < 1):
        return "the size of a head, by which scores are scaled, is not fixed"
    return None


def _odd_mask(node: Node, shapes: Shapes) -> str | None:
    """What else than an addend or a choice for each score the mask is, or None."""
    mask, keys = node.inputs[3], shapes.shape(node.inputs[1])
    if shapes.dtype(mask) not in (np.bool_, shapes.dtype(node.inputs[0])):
        return f"mask {mask.name!r} is neither of bools nor of the type of the queries"
    shape = shapes.shape(mask)
    if not shape or keys is None:
        return f"the shape of mask {mask.name!r} is not known"
    known, keys_known = isinstance(shape[-1], int), isinstance(keys[-2], int)
    if shape[-1] != keys[-2] and (shapes.opset >= 24 or (known and keys_known) or shape[-1] == 1):
        return f"mask {mask.name!r} is not surely as long as the keys, and hides those beyond its end"
    return None


def _heads(node: Node, operand: int, shapes: Shapes) -> Any:
    if shapes.rank(node.inputs[0]) == 3:
        return node.attrs.get("kv_num_heads" if operand else "q_num_heads")
    return (shapes.shape(node.inputs[operand]) or (None, None))[1]


def _size(node: Node, shapes: Shapes) -> Any:
    """Numbers in a head of the queries."""
    shape = shapes.shape(node.inputs[0])
    width = None if shape is None else shape[-1]
    if shapes.rank(node.inputs[0]) == 4 or not isinstance(width, int):
        return width
    return width // int(node.attrs["q_num_heads"])


class _Parts:
    """Writes one Attention as its parts, in front of it."""

    def __init__(self, node: Node, shapes: Shapes, edit: Editor) -> None:
        self.node, self.shapes, self.edit = node, shapes, edit
        self.dtype: np.dtype[Any] = np.dtype(shapes.dtype(node.inputs[0]))

    def write(self) -> None:
        node, edit = self.node, self.edit
        q, k, v = node.inputs[:3]
        wide = self.shapes.rank(q) == 3
        if wide:
            heads = int(node.attrs["q_num_heads"])
            q, k, v = (
                self.split(t, heads, perm) for t, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
            )
        else:
            k = self.add("Transpose", [k], perm=[0, 1, 3, 2])
        scale = self.number("scale", node.attrs.get("scale") or 1 / math.sqrt(_size(node, self.shapes)))
        if self.dtype == np.float16:  # in which the product may overflow; TensorRT scales keys as it moves them
            scores = self.add("MatMul", [q, self.add("Mul", [k, scale])])
        else:
            scores = self.add("Mul", [self.add("MatMul", [q, k]), scale])
        for mask in self.masks():
            scores = self.add("Add", [scores, mask])
        weights = self.add("Softmax", [scores], axis=-1)
        if len(node.inputs) > 3 and node.inputs[3].name:  # a row of which all is masked gives zeros
            weights = self.add("Where", [self.add("IsNaN", [weights], np.bool_), self.number("zero", 0.0), weights])
        op, operands = "MatMul", [weights, v]
        if wide:
            rows = self.add("Transpose", [self.add(op, operands)], perm=[0, 2, 1, 3])
            op, operands = "Reshape", [rows, self.integers("join", [0, 0, self.width(node.inputs[2])])]
        edit.take_over(node.outputs[0], Node(op, op, None, operands, []), [node])

    def masks(self) -> list[gs.Tensor]:
        """What is added to the scores."""
        found = []
        if len(self.node.inputs) > 3 and self.node.inputs[3].name:
            mask = self.node.inputs[3]
            found.append(self.hidden(mask) if self.shapes.dtype(mask) == np.bool_ else mask)
        if self.node.attrs.get("is_causal", 0):
            rows, columns = (self.count(self.node.inputs[i]) for i in (0, 1))
            below = self.add("Unsqueeze", [rows, self.integers("axis", [1])], np.int64)
            found.append(self.hidden(self.add("GreaterOrEqual", [below, columns], np.bool_)))
        return found

    def hidden(self, stays: gs.Tensor) -> gs.Tensor:
        return self.add("Where", [stays, self.number("zero", 0.0), self.number("hidden", -math.inf)])

    def count(self, tensor: gs.Tensor) -> gs.Tensor:
        """The positions 0, 1, ... of queries or keys."""
        axis = 1 if self.shapes.rank(tensor) == 3 else 2
        whole = self.add("Shape", [tensor], np.int64)
        length = self.add("Gather", [whole, self.edit.constant("length", np.array(axis))], np.int64)
        ends = [self.edit.constant(n, np.array(v)) for n, v in (("first", 0), ("step", 1))]
        return self.add("Range", [ends[0], length, ends[1]], np.int64)

    def split(self, tensor: gs.Tensor, heads: int, perm: Sequence[int]) -> gs.Tensor:
        width = self.width(tensor)
        size = -1 if width < 0 else width // heads
        rows = self.add("Reshape", [tensor, self.integers("split", [0, 0, heads, size])])
        return self.add("Transpose", [rows], perm=list(perm))

    def width(self, tensor: gs.Tensor) -> int:
        """The length of a row, -1 where it is not fixed: a Reshape then finds it, unless another dimension is 0."""
        width = (self.shapes.shape(tensor) or (None,))[-1]
        return width if isinstance(width, int) else -1

    def number(self, wish: str, value: float) -> gs.Tensor:
        return self.edit.constant(wish, np.array(value, self.dtype))

    def integers(self, wish: str, values: Sequence[int]) -> gs.Tensor:
        return self.edit.constant(wish, np.array(values, np.int64))

    def add(self, op: str, operands: Sequence[gs.Tensor], dtype: Any = None, **attributes: Any) -> gs.Tensor:
        result = Variable(self.edit.fresh_name(f"{self.node.name}_{op}"), np.dtype(dtype or self.dtype))
        self.edit.insert_before(self.node, Node(op, f"{self.node.name}_{op}", attributes, list(operands), [result]))
        return result
