"""What a Split, Slice or Gather takes out of a Concat, it takes from the operands that it comes from:

split(concat(a, b)) = a, b        where the parts have the sizes of the operands
slice(concat(a, b)) = a           and a slice of a where it takes less
gather(concat(a, b), i) = gather(b, i - size(a))        where all of i lies in b
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.cuts import cut
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

_ALL: Final = 1 << 30  # an end beyond every axis


@dataclass(frozen=True)
class BypassConcats(Pass):
    """Read the operands of a Concat instead of cutting them out of it again.

    Never adds a node: a part of an operand is cut out of the operand only where nothing else reads the Concat, which then goes.

    Before:
        g (float[N,2] a, float[N,3] b) => (float[N,2] y, float[N,1] z)
        <int64[2] sizes = {2, 3}, int64[1] from = {3}, int64[1] to = {4}, int64[1] axis = {1}>
        { c = Concat <axis = 1> (a, b)
          p, q = Split <axis = 1> (c, sizes)
          y = Exp (p)
          d = Concat <axis = 1> (q, a)
          z = Slice (d, from, to, axis) }
    After:
        g (float[N,2] a, float[N,3] b) => (float[N,2] y, float[N,1] z)
        <int64[1] from = {0}, int64[1] to = {1}, int64[1] axis = {1}>
        { y = Exp (a)
          z = Slice (a, from, to, axis) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Concat"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Split", "Slice", "Gather"), ("Concat",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of nodes that no longer read a Concat."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        bypass = {"Split": _split, "Slice": _slice, "Gather": _gather}
        done = 0
        for node in list(model.nodes()):
            rule = bypass.get(node.op)
            concat = edit.producer(node.inputs[0]) if rule is not None and node.is_onnx else None
            if rule is None or concat is None or concat.op != "Concat" or not concat.is_onnx:
                continue
            if edit.graph_of(concat) is not edit.graph_of(node):
                continue
            joint = _joint(concat, shapes)
            if joint is None:
                continue
            results = rule(node, concat, joint, shapes, edit)
            if isinstance(results, str):
                ctx.remark(node, results)
                continue
            if not ctx.admit():
                break
            made = [_put(r, node, model.opset, joint.axis, edit) for r in results]
            edit.replace_node(node, made)
            if not concat.outputs[0].outputs and not edit.is_output(concat.outputs[0]):
                edit.erase(concat)
            done += 1
        edit.commit()
        return done


@dataclass(frozen=True)
class _Joint:
    """A Concat along `axis`; operand i begins at ``begins[i]``, as far as the sizes before it are numbers."""

    axis: int
    operands: list[gs.Tensor]
    begins: list[int]
    total: int | None  # where all sizes are numbers


def _joint(concat: Node, shapes: Shapes) -> _Joint | None:
    rank = next((r for r in map(shapes.rank, [*concat.outputs, *concat.inputs]) if r is not None), None)
    if rank is None:
        return None
    axis = int(concat.attrs.get("axis", 1)) % rank
    begins = [0]
    for operand in concat.inputs:
        shape = shapes.shape(operand)
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            return _Joint(axis, list(concat.inputs), begins, None)
        begins.append(begins[-1] + size)
    return _Joint(axis, list(concat.inputs), begins[:-1], begins[-1])


Result: TypeAlias = gs.Tensor | list[gs.Tensor] | Node  # a tensor, the operands of a Concat, or a node without outputs


def _goes(node: Node, concat: Node, edit: Editor) -> bool:
    """Whether nothing reads the Concat once `node` does not."""
    return edit.sole_consumer(concat.outputs[0]) is node


def _split(node: Node, concat: Node, joint: _Joint, shapes: Shapes, edit: Editor) -> list[Result] | str:
    rank = shapes.rank(node.inputs[0])
    if rank is None or int(node.attrs.get("axis", 0)) % rank != joint.axis:
        return "it splits another axis than the Concat joins, or an unknown one"
    results: list[Result] = []
    at = 0
    for tensor in node.outputs:
        shape = shapes.shape(tensor)
        size = None if shape is None else shape[joint.axis]
        alone = shapes.shape(joint.operands[at]) if at < len(joint.operands) else None
        if size is not None and alone is not None and size == alone[joint.axis]:
            results.append(joint.operands[at])
            at += 1
            continue
        covered = (
            _covered(joint, joint.begins[at], joint.begins[at] + size)
            if isinstance(size, int) and at < len(joint.begins)
            else None
        )
        if covered is None or not size:
            return f"{tensor.name!r} is not made of whole operands of {concat.name!r}"
        results.append(covered)
        at += len(covered)
    whole = [r for r in results if isinstance(r, gs.Tensor)]
    copies = sum(
        not edit.can_replace(old, r) for old, r in zip(node.outputs, results, strict=True) if isinstance(r, gs.Tensor)
    )
    if len({id(t) for t in whole}) < len(whole) and any(edit.is_output(t) for t in node.outputs):
        return "an operand that is joined twice would need two names"
    if len(results) - len(whole) + copies > _goes(node, concat, edit):
        return "as many nodes would be needed as go"
    return results


def _covered(joint: _Joint, start: int, end: int) -> list[gs.Tensor] | None:
    """The operands that lie exactly between `start` and `end`."""
    edges = joint.begins + ([joint.total] if joint.total is not None else [])
    if start not in edges or end not in edges:
        return None
    return joint.operands[edges.index(start) : edges.index(end)] or None


def _within(joint: _Joint, start: int, end: int) -> int | None:
    """The operand in which all from `start` to `end` lies."""
    edges = joint.begins + ([joint.total] if joint.total is not None else [])
    return next((i for i, (a, b) in enumerate(itertools.pairwise(edges)) if a <= start and end <= b), None)


def _slice(node: Node, concat: Node, joint: _Joint, shapes: Shapes, edit: Editor) -> list[Result] | str:
    found = cut(node, shapes)
    if found is None or found[0] != joint.axis:
        return "it cuts another axis than the Concat joins, more than one, or by bounds that are not known"
    _, start, end = found
    if joint.total is None and end >= _ALL and start == joint.begins[-1] and len(joint.begins) == len(joint.operands):
        covered: list[gs.Tensor] | None = joint.operands[-1:]
    else:
        covered = _covered(joint, start, end)
    goes, result = _goes(node, concat, edit), node.outputs[0]
    if covered is not None and len(covered) == 1:
        return [covered[0]] if goes or edit.can_replace(result, covered[0]) else "it gives an output its name"
    if not goes:
        return f"{concat.name!r} has other readers, and it takes no whole operand of it"
    if covered is not None:
        return [covered]
    place = _within(joint, start, end)
    if place is None:
        return f"what it takes lies in more than one operand of {concat.name!r}"
    begin = joint.begins[place]
    bounds = {"starts": [start - begin], "ends": [end - begin], "axes": [joint.axis]}
    return [Node("Slice", node.name, bounds, [joint.operands[place]])]


def _gather(node: Node, concat: Node, joint: _Joint, shapes: Shapes, edit: Editor) -> list[Result] | str:
    rank, indices = shapes.rank(node.inputs[0]), node.inputs[1]
    if rank is None or int(node.attrs.get("axis", 0)) % rank != joint.axis:
        return "it gathers along another axis than the Concat joins, or an unknown one"
    if not edit.is_fixed(indices) or not indices.values.size:
        return "its indices are not constant"
    places = np.asarray(indices.values).astype(np.int64)
    if joint.total is not None:
        places = np.where(places < 0, places + joint.total, places)
    operand = _within(joint, int(places.min()), int(places.max()) + 1) if places.min() >= 0 else None
    if operand is None:
        return f"what it takes does not lie in one operand of {concat.name!r}"
    if not _goes(node, concat, edit):
        return f"{concat.name!r} has other readers"
    index = edit.constant(indices.name, np.asarray(places - joint.begins[operand], indices.dtype))
    return [Node("Gather", node.name, {"axis": joint.axis}, [joint.operands[operand], index])]


def _put(result: Result, node: Node, opset: int, axis: int, edit: Editor) -> gs.Tensor:
    """The tensor of a result, whose node, if it has one, then stands before `node`."""
    if isinstance(result, gs.Tensor):
        return result
    made = Node("Concat", f"{node.name}_concat", {"axis": axis}, result) if isinstance(result, list) else result
    if made.op == "Slice" and opset >= 10:
        for name in ("starts", "ends", "axes"):
            made.inputs.append(edit.constant(f"{node.name}_{name}", np.array(made.attrs.pop(name), np.int64)))
    made.outputs.append(edit.variable(node.outputs[0].name))
    made.outputs[0].dtype = node.outputs[0].dtype
    return edit.insert_before(node, made, origin=(node,)).outputs[0]
