"""``softmax(scale * q k^T + mask) v`` over heads is one operator of ONNX Runtime.

Where queries, keys and values are products of one value with constant matrices, these products belong to it too (``com.microsoft.Attention``):
its kernel writes each head where it is needed, so that no Transpose is left. Elsewhere it is ``com.microsoft.MultiHeadAttention``. TensorRT
fuses the primitives itself and must see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import gate
from graphopt.analyses import attention
from graphopt.analyses.attention import Attention, Heads, Mask, Projection
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Dim, Expr
from graphopt.analyses.views import Array
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Variable
from graphopt.pass_base import CONTRIB, Context, Exactness, Pass


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Compute attention, its heads and its projections in one operator.

    Before:
        g (float[B,S,2] x) => (float[B,S,4] y)
        <float[2,12] w = {1,0,2,1,0,1,3,1,2,0,1,1, 0,1,1,0,2,1,1,0,2,1,0,2}, float[12] b = {1,2,3,4,5,6,6,5,4,3,2,1},
         int64[5] split = {0,0,3,2,2}, float scale = {0.5}, int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[3] join = {0,0,4}>
        { p = MatMul (x, w)
          r = Add (p, b)
          h = Reshape (r, split)
          t = Transpose <perm = [2,0,3,1,4]> (h)
          q = Gather <axis = 0> (t, i0)
          k = Gather <axis = 0> (t, i1)
          v = Gather <axis = 0> (t, i2)
          kt = Transpose <perm = [0,1,3,2]> (k)
          s = MatMul (q, kt)
          z = Mul (s, scale)
          e = Softmax <axis = -1> (z)
          a = MatMul (e, v)
          c = Transpose <perm = [0,2,1,3]> (a)
          y = Reshape (c, join) }
    After:
        g (float[B,S,2] x) => (float[B,S,4] y)
        <float[2,12] w = {1,0,2,1,0,1,3,1,2,0,1,1, 0,1,1,0,2,1,1,0,2,1,0,2}, float[12] b = {1,2,3,4,5,6,6,5,4,3,2,1}>
        { y = com.microsoft.Attention <num_heads = 2, scale = 0.5> (x, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Softmax"})
    serves: ClassVar[tuple[str, ...]] = CONTRIB

    contrib: bool | None = None  # whether com.microsoft operators may be written; none: as the target says
    measure: bool = False  # whether only what is faster on this machine is fused, see graphopt/gate.py
    skip: tuple[str, ...] = ()  # values at the end of what is left alone

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of attentions fused."""
        if not ctx.serves(self.serves, self.contrib):
            return 0
        if ctx.products_stay:
            ctx.remark(None, "attention stays apart: passes that quantize or prune its products are yet to come")
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        writer = _Writer(model, shapes, edit)
        fused = 0
        for softmax in list(model.nodes()):
            if softmax.op != "Softmax" or not softmax.is_onnx:
                continue
            found = attention.find(softmax, shapes, edit)
            if found is None:
                continue
            reason = found if isinstance(found, str) else _objection(found, shapes)
            if reason is not None:
                ctx.remark(softmax, f"no attention: {reason}")
                continue
            assert isinstance(found, Attention)
            plan = writer.plan(found)
            if not self.wanted(found, plan, model, shapes, edit, ctx):
                continue
            if not ctx.admit():
                break
            writer.write(found, plan)
            fused += 1
        edit.commit()
        if fused:
            model.set_opset("com.microsoft", 1)
        return fused

    def wanted(
        self, found: Attention, plan: _Packed | None, model: Model, shapes: Shapes, edit: Editor, ctx: Context
    ) -> bool:
        """Whether this one is to be fused, as options and clock say."""
        result = found.joined.tensor
        if result.name in self.skip:
            return False
        begin = [h.source for h in (found.q, found.k, found.v)] if plan is None else [plan.source]
        sources = [*begin, *(mask.tensor for mask in found.masks)]
        return not self.measure or gate.pays(self, model, shapes, edit, sources, result, ctx)


def _objection(found: Attention, shapes: Shapes) -> str | None:
    """Why ONNX Runtime's kernels cannot compute it, or None."""
    if shapes.dtype(found.softmax.inputs[0]) != np.float32:
        return "ONNX Runtime's CPU computes attention in float32 only"
    if found.v.scale != 1:
        return "the values are scaled"
    for mask in found.masks:
        if shapes.shape(mask.tensor) is None:
            return f"the shape of mask {mask.tensor.name!r} is not known"
        if mask.fill is None and shapes.dtype(mask.tensor) != np.float32:
            return f"mask {mask.tensor.name!r} is not float32"
        reason = _widens(mask, found, shapes)
        if reason is not None:
            return reason
    return None


def _widens(mask: Mask, found: Attention, shapes: Shapes) -> str | None:
    """Why the mask cannot be brought to [B or 1, H or 1, S, T], or None."""
    shape = shapes.shape(mask.tensor) or ()
    scores: list[Dim] = [found.q.batch, found.q.heads, found.q.length, found.k.length]
    if found.rank == 3 and len(shape) == 3 and shape[0] != 1:
        return f"mask {mask.tensor.name!r} of shape {list(map(str, shape))} has batch and heads in one axis"
    if shapes.shape(mask.masked) == tuple(scores):
        return None
    for dim, wanted in zip(reversed(shape), reversed(scores), strict=False):
        if dim not in (1, wanted) and not any(isinstance(d, Expr) and d.is_opaque for d in (dim, wanted)):
            return f"mask {mask.tensor.name!r} of shape {list(map(str, shape))} is not as long as the scores"
    return f"mask {mask.tensor.name!r} has more than 4 dimensions" if len(shape) > 4 else None


@dataclass
class _Packed:
    """All three projections with the attention."""

    source: gs.Tensor
    batch_first: bool
    parts: list[tuple[Projection, Heads]]


class _Writer:
    """Writes attentions; a mask that several of them add is brought into form once."""

    anchor: Node  # of the attention that is being written
    found: Attention

    def __init__(self, model: Model, shapes: Shapes, edit: Editor) -> None:
        self.model, self.shapes, self.edit = model, shapes, edit
        self.masks: dict[tuple[object, ...], gs.Tensor] = {}
        self.swapped: dict[int, gs.Tensor] = {}
        self.weights: dict[tuple[object, ...], list[gs.Tensor]] = {}
        self.integers: dict[tuple[int, ...], gs.Tensor] = {}

    def plan(self, found: Attention) -> _Packed | None:
        """How to compute it: None for MultiHeadAttention."""
        parts: list[tuple[Projection, Heads]] = []
        for heads in (found.q, found.k, found.v):
            made = attention.projection(heads.source, self.shapes, self.edit)
            if made is None or made.weight.shape[1] != heads.features or not self.private(made, found):
                return None
            parts.append((made, heads))
        sources = {id(p.source) for p, _ in parts}
        first = {h.batch_first for _, h in parts}
        if len(sources) != 1 or len(first) != 1:
            return None
        return _Packed(parts[0][0].source, first.pop(), parts)

    def private(self, made: Projection, found: Attention) -> bool:
        """Whether nothing but attention reads the projection: else it would be computed twice."""
        inside = {id(n) for n in [*found.nodes, *made.nodes]}
        product = next(n for n in made.nodes if n.op in ("MatMul", "Gemm"))
        pending, seen = [product.outputs[0]], set[int]()
        while pending:
            current = pending.pop()
            if self.edit.is_output(current):
                return False
            for reader in current.outputs:
                if id(reader) in seen or reader.op == "Shape":
                    continue
                seen.add(id(reader))
                if reader.op in _REARRANGE or (reader.op == "Add" and id(reader) in inside):
                    pending.extend(reader.outputs)
                elif id(reader) not in inside:
                    return False
        return True

    def write(self, found: Attention, plan: _Packed | None) -> None:
        """Put the operator in the place of `found`."""
        edit = self.edit
        self.anchor, self.found = found.softmax, found
        attributes: dict[str, object] = {"num_heads": found.q.heads, "scale": float(np.float32(found.scale))}
        origin = list(found.nodes)
        if plan is None:
            operands = [self.rows(heads) for heads in (found.q, found.k, found.v)] + [_absent(), _absent()]
        else:
            if found.v.size != found.q.size:
                attributes["qkv_hidden_sizes"] = [len(h.columns) for _, h in plan.parts]
            source = plan.source if plan.batch_first else self.swap(plan.source)
            operands = [source, *self.packed(plan), _absent(), _absent()]
            origin = [*{id(n): n for p, _ in plan.parts for n in reversed(p.nodes)}.values(), *origin]
        bias = self.bias(found)
        if bias is not None:
            operands.append(bias)
        while not operands[-1].name:
            operands.pop()
        result = Variable(edit.fresh_name(f"{found.joined.tensor.name}_attention"), np.dtype(np.float32))
        op = "MultiHeadAttention" if plan is None else "Attention"
        node = Node(op, f"{self.anchor.name}_attention", attributes, operands, [result], "com.microsoft")
        edit.insert_before(self.anchor, node, origin)
        self.join(found, self.guard(result) if found.guarded and found.masks else result)

    def packed(self, plan: _Packed) -> list[gs.Tensor]:
        """Weight [E, 3*H*D] and bias of queries, keys and values, in the order of the heads; made once for each set of weights."""
        key = tuple(
            (id(p.weight.base if p.weight.base is not None else p.weight), h.columns.tobytes()) for p, h in plan.parts
        )
        if key not in self.weights:
            weight = np.concatenate([p.weight[:, h.columns] for p, h in plan.parts], axis=1)
            rows = [
                np.zeros(len(h.columns), weight.dtype) if p.bias is None else p.bias[h.columns] for p, h in plan.parts
            ]
            old = next(t for n in plan.parts[0][0].nodes if n.op in ("MatMul", "Gemm") for t in n.inputs[1:2])
            made = [self.same(old, weight)]
            if any(p.bias is not None for p, _ in plan.parts):
                made.append(self.same(plan.parts[0][0].bias_tensor, np.concatenate(rows)))
            else:
                made.append(_absent())
            self.weights[key] = made
        return self.weights[key]

    def same(self, old: gs.Tensor | None, values: Array) -> gs.Tensor:
        """A constant of these values: the old one where it holds them."""
        if old is not None and old.values.shape == values.shape and np.array_equal(old.values, values):
            return old
        return self.edit.constant("qkv_bias" if old is None else f"{old.name}_qkv", np.ascontiguousarray(values))

    def add(self, op: str, name: str, operands: list[gs.Tensor], dtype: Any, **attributes: Any) -> gs.Tensor:
        """A node ahead of the attention that is being written."""
        result = Variable(self.edit.fresh_name(f"{name}_{op}"), np.dtype(dtype))
        self.edit.insert_before(self.anchor, Node(op, f"{name}_{op}", attributes, operands, [result]), self.found.nodes)
        return result

    def reshape(self, tensor: gs.Tensor, shape: list[int]) -> gs.Tensor:
        """A Reshape, 0 copying a dimension."""
        return self.add("Reshape", tensor.name, [tensor, self.numbers("shape", shape)], np.float32)

    def numbers(self, wish: str, values: Sequence[int]) -> gs.Tensor:
        """A constant of integers, made once."""
        key = tuple(map(int, values))
        if key not in self.integers:
            self.integers[key] = self.edit.constant(wish, np.asarray(values, np.int64))
        return self.integers[key]

    def swap(self, tensor: gs.Tensor) -> gs.Tensor:
        """Batch and length exchanged."""
        node = self.edit.producer(tensor)
        if node is not None and node.op == "Transpose" and node.is_onnx and node.attrs.get("perm") == [1, 0, 2]:
            return node.inputs[0]
        if id(tensor) not in self.swapped:
            self.swapped[id(tensor)] = self.add("Transpose", tensor.name, [tensor], np.float32, perm=[1, 0, 2])
        return self.swapped[id(tensor)]

    def rows(self, heads: Heads) -> gs.Tensor:
        """Queries, keys or values as [B, S, H*D]."""
        tensor = heads.source
        if self.shapes.rank(tensor) != 3:
            tensor = self.reshape(tensor, [0, 0, heads.features])
        if not heads.batch_first:
            tensor = self.swap(tensor)
        columns = heads.columns
        if np.array_equal(columns, np.arange(heads.features)):
            return tensor
        if np.array_equal(columns, np.arange(columns[0], columns[0] + len(columns))):
            bounds = [self.numbers(w, [v]) for w, v in (("start", columns[0]), ("end", columns[-1] + 1), ("axis", 2))]
            return self.add("Slice", tensor.name, [tensor, *bounds], np.float32)
        return self.add("Gather", tensor.name, [tensor, self.numbers("columns", columns.tolist())], np.float32, axis=2)

    def bias(self, found: Attention) -> gs.Tensor | None:
        """What is added to the scores, as [B or 1, H or 1, S, T]."""
        total: gs.Tensor | None = None
        for mask in found.masks:
            part = self.mask(mask, found)
            total = part if total is None else self.add("Add", part.name, [total, part], np.float32)
        return total

    def mask(self, mask: Mask, found: Attention) -> gs.Tensor:
        """One mask in form, made once for all attentions that add it."""
        lengths = (found.q.length, found.k.length)
        key = (id(mask.tensor), mask.fill, mask.keeps, found.q.heads, lengths, id(self.edit.graph_of(found.softmax)))
        if key not in self.masks:
            self.masks[key] = self.full(mask, found)
        return self.masks[key]

    def full(self, mask: Mask, found: Attention) -> gs.Tensor:
        """A mask as a sum, with four dimensions, the last two as long as the scores are."""
        tensor = mask.tensor
        shape: list[Dim] = list(self.shapes.shape(tensor) or ())
        if mask.fill is not None:
            choices = [np.zeros((), np.float32), np.asarray(mask.fill, np.float32)]
            operands = [self.edit.constant(w, v) for w, v in zip(("zero", "hidden"), choices, strict=True)]
            tensor = self.add("Where", tensor.name, [tensor, *(operands if mask.keeps else operands[::-1])], np.float32)
        missing = 4 - len(shape)
        if missing:
            axes = list(range(missing))
            if self.model.opset >= 13:
                tensor = self.add("Unsqueeze", tensor.name, [tensor, self.numbers("axes", axes)], np.float32)
            else:
                tensor = self.add("Unsqueeze", tensor.name, [tensor], np.float32, axes=axes)
            shape = [*[1] * missing, *shape]
        if shape[2] == found.q.length and shape[3] == found.k.length:
            return tensor
        ones = self.numbers("ones", [1, 1])
        target = [ones, self.length(found.q), self.length(found.k)]
        if all(isinstance(t, gs.Constant) for t in target):
            wanted: gs.Tensor = self.numbers("shape", [1, 1, int(target[1].values[0]), int(target[2].values[0])])
        else:
            wanted = self.add("Concat", f"{tensor.name}_shape", target, np.int64, axis=0)
        return self.add("Expand", tensor.name, [tensor, wanted], np.float32)

    def length(self, heads: Heads) -> gs.Tensor:
        """The length as a tensor of one number."""
        if isinstance(heads.length, int):
            return self.numbers("length", [heads.length])
        whole = self.add("Shape", heads.source.name, [heads.source], np.int64)
        return self.add("Gather", heads.source.name, [whole, self.numbers("axis", [int(heads.batch_first)])], np.int64)

    def guard(self, tensor: gs.Tensor) -> gs.Tensor:
        """Zeros where a row had no key to attend to: its sum over nothing is NaN."""
        wrong = self.add("IsNaN", tensor.name, [tensor], np.bool_)
        zero = self.edit.constant("zero", np.zeros((), np.float32))
        return self.add("Where", tensor.name, [wrong, zero, tensor], np.float32)

    def join(self, found: Attention, result: gs.Tensor) -> None:
        """Let `result` stand for the joined heads."""
        width = found.v.heads * found.v.size
        if not found.joined.batch_first:
            result = self.add("Transpose", result.name, [result], np.float32, perm=[1, 0, 2])
        if found.joined.rank != 3:
            shape = [-1, width] if found.joined.rank == 2 else [0, 0, found.v.heads, found.v.size]
            result = self.reshape(result, shape)
        old, new = self.edit.producer(found.joined.tensor), self.edit.producer(result)
        assert old is not None
        assert new is not None
        old.outputs.clear()
        new.outputs[0] = found.joined.tensor
        self.edit.erase(old)


_REARRANGE: Final = frozenset(
    {"Reshape", "Transpose", "Split", "Gather", "Squeeze", "Unsqueeze", "Mul", "Div", "Slice", "Identity", "Flatten"}
)


def _absent() -> gs.Tensor:
    return Variable("")
