"""A Loop with a small known trip count is its body, that many times; what it scans is stacked by Unsqueeze and Concat.

The trip count is known when the first operand is a constant and the body never stops by itself: its condition is passed through or
constantly true. If it is constantly false, there is one trip at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor, copy_body
from graphopt.ir import Constant, Graph, Model, Node, Variable, walk
from graphopt.pass_base import Context, Pass

_RANDOM: Final = frozenset(
    ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"]
)


@dataclass(frozen=True)
class UnrollLoop(Pass):
    """Write out the trips of a Loop that makes few.

    Before:
        g (float[2] x) => (float[2] y, float[2,2] s)
        <int64 n = {2}, bool go = {1}>
        { y, s = Loop (n, go, x) <body = b (int64 i, bool c, float[2] a) => (bool c, float[2] e, float[2] r) {
            e = Exp (a)
            r = Neg (e) }> }
    After:
        g (float[2] x) => (float[2] y, float[2,2] s)
        <int64[1] axes = {0}>
        { e = Exp (x)
          r = Neg (e)
          y = Exp (e)
          q = Neg (y)
          ru = Unsqueeze (r, axes)
          qu = Unsqueeze (q, axes)
          s = Concat <axis = 0> (ru, qu) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Loop"})

    max_trips: int = 8
    max_nodes: int = 256  # that one Loop may become
    grow: bool = True  # whether there may be more nodes than before, those of the body counted

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep, outer before inner; returns the number of Loops unrolled."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        unrolled = 0
        for node in list(model.nodes()):
            if node.op != "Loop" or not node.is_onnx or edit.is_erased(node):
                continue
            found = self._trips(node, shapes, model)
            if isinstance(found, str):
                ctx.remark(node, found)
                continue
            empty = _empty_scans(node, shapes) if not found else []
            if empty is None:
                ctx.remark(node, "makes no trip, but the shape of what it scans is not known")
                continue
            if not ctx.admit():
                break
            self._unroll(node, found, empty, model, edit)
            unrolled += 1
        edit.commit()
        return unrolled

    def _trips(self, node: Node, shapes: Shapes, model: Model) -> int | str:
        """How many trips it makes, or why that is not to be told."""
        body = node.attrs.get("body")
        if not isinstance(body, Graph) or len(body.inputs) != len(_initial(node)) + 2:
            return "its body does not fit its operands"
        start = _flag(node.inputs[1], shapes) if len(node.inputs) > 1 and node.inputs[1].name else True
        again = _flag(body.outputs[0], shapes)
        if again is None and _passes_through(body):
            again = True if start else None
        limit = shapes.integers(node.inputs[0]) if node.inputs and node.inputs[0].name else None
        if start is False or (limit is not None and limit.size == 1 and int(limit.reshape(-1)[0]) <= 0):
            return 0
        if start is None:
            return "whether it starts is not known"
        if again is None:
            return "its body decides when to stop"
        if limit is None and again is False and not (node.inputs and node.inputs[0].name):
            trips = 1
        elif limit is None or limit.size != 1:
            return "the number of trips is not known"
        else:
            trips = int(limit.reshape(-1)[0]) if again else 1
        if trips > self.max_trips:
            return f"makes {trips} trips, more than {self.max_trips}; allow it with unroll-loop{{max-trips={trips}}}"
        inside = list(walk(body))
        once = sum(len(g.nodes) for g in inside)
        nodes = trips * once
        if not self.grow and self._written_out(node, body, trips) > once + 1:
            return f"{trips} trips would be more nodes than the Loop with its body is; allow it with unroll-loop"
        if nodes > self.max_nodes:
            return f"would become {nodes} nodes; allow it with unroll-loop{{max-nodes={nodes}}}"
        if any(n.op in _RANDOM for g in inside for n in g.nodes):
            return "its body draws random numbers"
        if any(c is t for g in inside for c in g.initializers for t in g.inputs):
            return "its body has inputs with defaults"
        return trips

    def _written_out(self, node: Node, body: Graph, trips: int) -> int:
        """How many nodes stay, with those that stack what is scanned and without the copies that other passes take away."""
        stay = sum(n.op not in ("Identity", "Constant") or not n.is_onnx for g in walk(body) for n in g.nodes)
        scanned = sum(bool(t.name) for t in node.outputs[len(body.inputs) - 2 :]) if trips else 0
        return trips * stay + scanned * (trips + (trips > 1))

    def _unroll(self, node: Node, trips: int, empty: list[Constant], model: Model, edit: Editor) -> None:
        body = node.attrs["body"]
        carried = _initial(node)
        scans: list[list[gs.Tensor]] = [[] for _ in body.outputs[1 + len(carried) :]]
        # Constants in the body are kept once: they move to the root, and all trips read them there.
        kept: list[Constant] = []
        for graph in walk(body) if trips else ():
            for constant in graph.initializers:
                constant.name = edit.fresh_name(constant.name)
                kept.append(constant)
            graph.initializers = []
        for trip in range(trips):
            arguments: list[gs.Tensor] = [edit.constant(f"{node.name}_trip", np.array(trip, np.int64))]
            arguments.append(edit.constant(f"{node.name}_go", np.array(True)))
            results = edit.unpack(node, copy_body(body, kept), [*arguments, *carried])[1:]
            for values, value in zip(scans, results[len(carried) :], strict=True):
                values.append(value)
            carried = results[: len(carried)]
        stacked = [
            _stack(node, values, model, edit) if values and output.name else None
            for values, output in zip(scans, node.outputs[len(carried) :], strict=False)
        ]
        ends = [tensor if tensor is not None else Variable("") for tensor in (empty or stacked)]
        edit.replace_node(node, [*carried, *ends])


def _initial(node: Node) -> list[gs.Tensor]:
    return list(node.inputs[2:])


def _flag(tensor: gs.Tensor, shapes: Shapes) -> bool | None:
    known = shapes.integers(tensor)
    return None if known is None or known.size != 1 else bool(known.reshape(-1)[0])


def _passes_through(body: Graph) -> bool:
    """Whether the condition that comes out is the one that went in."""
    tensor = body.outputs[0]
    while tensor.inputs and tensor.inputs[0].op == "Identity" and tensor.inputs[0].is_onnx:
        tensor = tensor.inputs[0].inputs[0]
    return tensor is body.inputs[1]


def _empty_scans(node: Node, shapes: Shapes) -> list[Constant] | None:
    """What a Loop without a trip scans; None where the shapes are not known."""
    body = node.attrs["body"]
    found = []
    for tensor, output in zip(body.outputs[len(body.inputs) - 1 :], node.outputs[len(body.inputs) - 2 :], strict=False):
        info = shapes.info(tensor)
        if not output.name:
            found.append(Constant("", np.zeros(0, np.float32)))
            continue
        if info.shape is None or info.dtype is None or not all(isinstance(d, int) for d in info.shape):
            return None
        found.append(Constant(f"{output.name}_empty", np.zeros((0, *info.shape), info.dtype)))
    return found


def _stack(node: Node, values: list[gs.Tensor], model: Model, edit: Editor) -> gs.Tensor:
    rows = []
    axes = edit.constant(f"{node.name}_axes", np.array([0], np.int64))
    for value in values:
        row = edit.variable(f"{value.name}_row")
        if model.opset >= 13:
            edit.insert_before(node, Node("Unsqueeze", f"{node.name}_row", None, [value, axes], [row]))
        else:
            edit.insert_before(node, Node("Unsqueeze", f"{node.name}_row", {"axes": [0]}, [value], [row]))
        rows.append(row)
    if len(rows) == 1:
        return rows[0]
    whole = edit.variable(f"{node.name}_rows")
    edit.insert_before(node, Node("Concat", f"{node.name}_rows", {"axis": 0}, rows, [whole]))
    return whole
