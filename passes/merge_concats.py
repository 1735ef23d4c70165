"""Concatenation is associative, an empty operand adds nothing to it, and parts put together again in order are the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.cuts import cut
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place


@dataclass(frozen=True)
class MergeConcats(Pass):
    """Merge a Concat into the Concat that reads it, drop empty operands, and undo a Split or Slices that a Concat puts together.

    Before:
        g (float[2,N] x, float[2,N] z) => (float[8,N] y)
        <int64[2] sizes = {1, 1}>
        { r = Relu (x)
          a, b = Split <axis = 0> (r, sizes)
          whole = Concat <axis = 0> (a, b)
          c = Concat <axis = 0> (z, whole)
          y = Concat <axis = 0> (c, x, z) }
    After:
        g (float[2,N] x, float[2,N] z) => (float[8,N] y)
        { r = Relu (x)
          y = Concat <axis = 0> (z, r, x, z) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Concat"})
    places: ClassVar[tuple[Place, ...]] = (
        Place(("Concat",), ("Concat", "Split", "Slice"), otherwise="read something empty"),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of rewrites."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        total = 0
        for node in list(model.nodes()):
            if node.op != "Concat" or not node.is_onnx:
                continue
            axis = _axis(node, shapes)
            if axis is None:
                continue
            for rewrite in (_drop_empty, _flatten, _rejoin):
                done = rewrite(node, axis, shapes, edit, ctx, model.opset)
                if done < 0:
                    edit.commit()
                    return total
                total += done
        edit.commit()
        return total


def _axis(node: Node, shapes: Shapes) -> int | None:
    """The axis, counted from 0; None where neither it nor the rank says."""
    axis = int(node.attrs.get("axis", 1))
    if axis >= 0:
        return axis
    rank = next((r for r in map(shapes.rank, [*node.outputs, *node.inputs]) if r is not None), None)
    return None if rank is None else axis + rank


def _replace_inputs(node: Node, inputs: list[gs.Tensor]) -> None:
    node.inputs.clear()
    node.inputs.extend(inputs)


def _drop_empty(node: Node, axis: int, shapes: Shapes, edit: Editor, ctx: Context, opset: int) -> int:
    """Operands of size 0 along the axis go, unless all are such; -1: no more rewrites are admitted."""

    def empty(tensor: gs.Tensor) -> bool:
        shape = shapes.shape(tensor)
        return shape is not None and axis < len(shape) and shape[axis] == 0

    kept = [t for t in node.inputs if not empty(t)]
    if len(kept) == len(node.inputs) or not kept:
        return 0
    if not ctx.admit():
        return -1
    _replace_inputs(node, kept)
    return 1


def _flatten(node: Node, axis: int, shapes: Shapes, edit: Editor, ctx: Context, opset: int) -> int:
    """Operands that are Concats along the same axis, read here alone, are replaced by theirs, all levels at once."""
    reader = _only_reader(node.outputs[0], edit)
    if reader is not None and _joins(node, reader, axis, shapes, edit):
        return 0  # the reader takes it in, so that a chain is copied once
    operands: list[gs.Tensor] = []
    gone: list[Node] = []
    pending = list(node.inputs)[::-1]
    stopped = False
    while pending:
        tensor = pending.pop()
        inner = edit.producer(tensor)
        if stopped or inner is None or not _joins(inner, node, axis, shapes, edit):
            operands.append(tensor)
        elif _only_reader(tensor, edit) is None:
            ctx.remark(node, f"{tensor.name!r} is read by others too, or more than once")
            operands.append(tensor)
        elif not ctx.admit():
            stopped = True
            operands.append(tensor)
        else:
            pending.extend(list(inner.inputs)[::-1])
            gone.append(inner)
    if gone:
        _replace_inputs(node, operands)
        node.origin = tuple(dict.fromkeys(name for n in [*gone, node] for name in (n.origin or (n.name,))))
        for inner in gone:
            edit.erase(inner)
    return len(gone)


def _only_reader(tensor: gs.Tensor, edit: Editor) -> Node | None:
    """The node that reads `tensor`, where it does so once: a value joined with itself again and again would grow without bound."""
    reader = edit.sole_consumer(tensor)
    return reader if len(tensor.outputs) == 1 else None


def _joins(inner: Node, outer: Node, axis: int, shapes: Shapes, edit: Editor) -> bool:
    """Whether both are Concats along `axis`, in one graph."""
    kinds = all(n.op == "Concat" and n.is_onnx and _axis(n, shapes) == axis for n in (inner, outer))
    return kinds and edit.graph_of(inner) is edit.graph_of(outer)


def _rejoin(node: Node, axis: int, shapes: Shapes, edit: Editor, ctx: Context, opset: int) -> int:
    """The Concat of a Split's outputs, or of adjacent Slices, is what they were cut from, or one Slice of it."""
    source = _whole_split(node, axis, shapes, edit)
    bounds = None
    if source is None:
        found = _adjacent_slices(node, axis, shapes, edit)
        if found is None:
            return 0
        source, bounds = found
        if bounds is None and shapes.shape(source) != shapes.shape(node.outputs[0]):
            return 0
    result = node.outputs[0]
    if bounds is None and not edit.can_replace(result, source):
        ctx.remark(node, f"puts {source.name!r} together again, but gives output {result.name!r} its name")
        return 0
    if not ctx.admit():
        return -1
    parts = list({id(p): p for t in node.inputs if (p := edit.producer(t)) is not None}.values())
    if bounds is None:
        edit.replace_uses(result, source)
    else:
        node.outputs.clear()
        new = Node("Slice", node.name, {}, [source], [result])
        columns: list[Any] = [[bounds[0]], [bounds[1]], [axis]]
        if opset < 10:
            new.attrs.update(zip(("starts", "ends", "axes"), columns, strict=True))
        else:
            new.inputs.extend([edit.constant(f"{node.name}_bounds", np.array(c, np.int64)) for c in columns])
        edit.insert_before(node, new, origin=(*parts, node))
    edit.erase(node)
    for part in parts:
        if not any(t.outputs or edit.is_output(t) for t in part.outputs):
            edit.erase(part)
    return 1


def _whole_split(node: Node, axis: int, shapes: Shapes, edit: Editor) -> gs.Tensor | None:
    """The operand of the Split along `axis` whose outputs, all and in order, are those of `node`."""
    split = edit.producer(node.inputs[0])
    if split is None or split.op != "Split" or not split.is_onnx or len(split.outputs) != len(node.inputs):
        return None
    if any(a is not b for a, b in zip(split.outputs, node.inputs, strict=True)):
        return None
    own = int(split.attrs.get("axis", 0))
    rank = shapes.rank(split.inputs[0])
    own = own + rank if own < 0 and rank is not None else own
    return split.inputs[0] if own == axis else None


def _adjacent_slices(
    node: Node, axis: int, shapes: Shapes, edit: Editor
) -> tuple[gs.Tensor, tuple[int, int] | None] | None:
    """The tensor that all operands are slices of, one behind the other, and the bounds (None: it is all of it)."""
    source: gs.Tensor | None = None
    begin: int | None = None
    at = 0
    if len(node.inputs) < 2:
        return None
    for tensor in node.inputs:
        part = edit.producer(tensor)
        if part is None or part.op != "Slice" or not part.is_onnx or edit.graph_of(part) is not edit.graph_of(node):
            return None
        source = source if source is not None else part.inputs[0]
        found = cut(part, shapes)
        if part.inputs[0] is not source or found is None or found[0] != axis or (begin is not None and found[1] != at):
            return None
        begin = found[1] if begin is None else begin
        at = found[2]
    if source is None or begin is None:
        return None
    shape = shapes.shape(source)
    return source, None if shape is not None and begin == 0 and at == shape[axis] else (begin, at)
