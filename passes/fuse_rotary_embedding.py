"""``x * cos + concat(-x2, x1) * sin``, x1 and x2 the halves of x, rotates queries and keys by their positions: one operator of ONNX Runtime.

It keeps one half of the tables, whose halves are equal. They are constants, or computed as ``cos(concat(angles, angles))``, whose first half
is ``cos(angles)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Dim
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Variable
from graphopt.pass_base import CONTRIB, Context, Exactness, Pass


@dataclass(frozen=True)
class FuseRotaryEmbedding(Pass):
    """Rotate queries and keys by their positions by one operator.

    Before:
        g (float[B,2,3,4] x) => (float[B,2,3,4] y)
        <float[1,1,3,4] c = {1,1,1,1, 0.5,0.25,0.5,0.25, 0,-1,0,-1}, float[1,1,3,4] s = {0,0,0,0, 0.75,1,0.75,1, 1,0,1,0}>
        { a = Mul (x, c)
          x1, x2 = Split <axis = -1, num_outputs = 2> (x)
          n = Neg (x2)
          r = Concat <axis = -1> (n, x1)
          b = Mul (r, s)
          y = Add (a, b) }
    After:
        g (float[B,2,3,4] x) => (float[B,2,3,4] y)
        <int64[1] first = {0}, float[3,2] ch = {1,1, 0.5,0.25, 0,-1}, float[3,2] sh = {0,0, 0.75,1, 1,0}>
        { y = com.microsoft.RotaryEmbedding (x, first, ch, sh) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Concat"})
    serves: ClassVar[tuple[str, ...]] = CONTRIB

    contrib: bool | None = None  # whether com.microsoft operators may be written; none: as the target says

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of rotations fused."""
        if not ctx.serves(self.serves, self.contrib):
            return 0
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        tables = _Tables(shapes, edit)
        first: gs.Tensor | None = None
        fused = 0
        for node in list(model.nodes()):
            found = _rotation(node, shapes, edit)
            if found is None:
                continue
            reason = _objection(found, shapes, edit)
            if reason is not None:
                ctx.remark(node, f"no RotaryEmbedding: {reason}")
                continue
            if not ctx.admit():
                break
            if first is None:
                first = edit.constant("first_position", np.zeros(1, np.int64))
            halves = [tables.half(found.cos), tables.half(found.sin)]
            last = found.nodes[-1]
            result = last.outputs[0]
            last.outputs.clear()
            new = Node(
                "RotaryEmbedding", f"{last.name}_rotary", {}, [found.x, first, *halves], [result], "com.microsoft"
            )
            edit.insert_before(last, new, found.nodes)
            edit.erase(last)
            fused += 1
        edit.commit()
        if fused:
            model.set_opset("com.microsoft", 1)
        return fused


@dataclass
class _Rotation:
    """``x * cos + concat(-x2, x1) * sin``; `nodes` compute it, the last of them its result."""

    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor
    nodes: list[Node]


def _rotation(concat: Node, shapes: Shapes, edit: Editor) -> _Rotation | None:
    """The rotation in which `concat` turns the halves."""
    if concat.op != "Concat" or not concat.is_onnx or len(concat.inputs) != 2:
        return None
    negative, split = edit.producer(concat.inputs[0]), edit.producer(concat.inputs[1])
    if negative is None or negative.op != "Neg" or not negative.is_onnx or split is None or split.op != "Split":
        return None
    x, rank = split.inputs[0], shapes.rank(concat.outputs[0])
    if rank is None or any(int(n.attrs.get("axis", 0)) not in (-1, rank - 1) for n in (concat, split)):
        return None
    if (
        len(split.outputs) != 2
        or split.outputs[0] is not concat.inputs[1]
        or split.outputs[1] is not negative.inputs[0]
    ):
        return None
    turned = edit.sole_consumer(concat.outputs[0])
    total = edit.sole_consumer(turned.outputs[0]) if turned is not None and turned.op == "Mul" else None
    if turned is None or total is None or total.op != "Add":
        return None
    straight = edit.producer(_other(total, turned.outputs[0]))
    if straight is None or straight.op != "Mul" or not any(t is x for t in straight.inputs):
        return None
    nodes = [straight, split, negative, concat, turned, total]
    if len({id(edit.graph_of(n)) for n in nodes}) != 1:
        return None
    return _Rotation(x, _other(straight, x), _other(turned, concat.outputs[0]), nodes)


def _other(node: Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _objection(found: _Rotation, shapes: Shapes, edit: Editor) -> str | None:
    """Why ONNX Runtime's operator cannot compute it, or None."""
    shape = shapes.shape(found.x)
    if shapes.dtype(found.x) != np.float32:
        return "only float32 is known to be faster"
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return f"{found.x.name!r} is not known to be [batch, heads, length, size]"
    halves = [shapes.shape(t) for t in found.nodes[1].outputs]
    if any(half is None or half[3] != shape[3] // 2 or shape[3] % 2 for half in halves):
        return f"{found.x.name!r} is not split into halves"
    if edit.sole_consumer(found.nodes[0].outputs[0]) is not found.nodes[-1]:
        return f"{found.nodes[0].outputs[0].name!r} is read by others too"
    wanted: list[Dim] = [1, 1, shape[2], shape[3]]
    for table in (found.cos, found.sin):
        dims = shapes.shape(table)
        if dims is None or list(dims) != wanted:
            seen = "unknown shape" if dims is None else f"shape {list(map(str, dims))}"
            return f"{table.name!r} of {seen} is not one row of {shape[3]} numbers for each of {shape[2]} positions"
        if not edit.is_fixed(table):
            if _angles(table, shapes, edit) is None:
                return f"the halves of {table.name!r} may differ"
        elif not np.array_equal(table.values[..., : shape[3] // 2], table.values[..., shape[3] // 2 :]):
            return f"the halves of {table.name!r} differ"
    return None


def _angles(table: gs.Tensor, shapes: Shapes, edit: Editor) -> tuple[Node, gs.Tensor] | None:
    """The Cos or Sin that computes `table`, and half of the angles it reads, where they are their other half too."""
    node = edit.producer(table)
    while node is not None and node.is_onnx and node.op in ("Unsqueeze", "Reshape", "Identity"):
        last, before = shapes.shape(node.outputs[0]), shapes.shape(node.inputs[0])
        if not last or not before or last[-1] != before[-1]:
            return None
        node = edit.producer(node.inputs[0])
    if node is None or not node.is_onnx or node.op not in ("Cos", "Sin"):
        return None
    twice = edit.producer(node.inputs[0])
    if twice is None or not twice.is_onnx or twice.op != "Concat" or len(twice.inputs) != 2:
        return None
    rank = shapes.rank(twice.outputs[0])
    if twice.inputs[0] is not twice.inputs[1] or rank is None or int(twice.attrs.get("axis", 1)) not in (-1, rank - 1):
        return None
    return node, twice.inputs[0]


class _Tables:
    """First halves of tables, each made once."""

    def __init__(self, shapes: Shapes, edit: Editor) -> None:
        self.shapes, self.edit = shapes, edit
        self.halves: dict[int, gs.Tensor] = {}
        self.rows: dict[int, gs.Tensor] = {}  # by their length, the shape [-1, length]

    def half(self, table: gs.Tensor) -> gs.Tensor:
        """The first half of `table`, [1, 1, length, size], as [length, size / 2]."""
        if id(table) not in self.halves:
            size = (self.shapes.shape(table) or ())[-1]
            assert isinstance(size, int)
            fixed = self.edit.is_fixed(table)
            self.halves[id(table)] = self._cut(table, size // 2) if fixed else self._compute(table, size // 2)
        return self.halves[id(table)]

    def _cut(self, table: gs.Tensor, length: int) -> gs.Tensor:
        return self.edit.constant(f"{table.name}_half", np.ascontiguousarray(table.values[0, 0, :, :length]))

    def _compute(self, table: gs.Tensor, length: int) -> gs.Tensor:
        computed = _angles(table, self.shapes, self.edit)
        assert computed is not None
        function, angles = computed
        if length not in self.rows:
            self.rows[length] = self.edit.constant("rows", np.array([-1, length], np.int64))
        half = Variable(self.edit.fresh_name(f"{table.name}_half"), np.dtype(np.float32))
        result = Variable(self.edit.fresh_name(f"{table.name}_rows"), np.dtype(np.float32))
        wave = Node(function.op, f"{function.name}_half", {}, [angles], [half])
        flat = Node("Reshape", f"{function.name}_rows", {}, [half, self.rows[length]], [result])
        self.edit.insert_after(function, wave, (function,))
        self.edit.insert_after(function, flat, (function,))
        return result
