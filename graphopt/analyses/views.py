"""Which elements of an earlier value a value shows, and in which order: Reshape, Transpose, Split, Gather of one index and their like, read
as one rearrangement of the axes.

Every axis is a product of atoms, as in ``[B, 3*H*D]`` being ``[b][three h d]``. Reshape regroups atoms, Transpose moves axes, picking one
index fixes an atom. So whether a chain of such nodes is "split into heads", whatever its exporter wrote, is one look at the atoms of its
end. Sizes may be symbolic; a step that cannot be read starts anew with its result as the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import symbolic
from graphopt.analyses.layouts import permutation
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Dim, Expr
from graphopt.edit import Editor
from graphopt.ir import Node

Array = np.ndarray[Any, Any]


@dataclass(eq=False)
class Atom:
    """A factor of an axis; told apart by identity."""

    size: Dim
    parts: tuple[Atom, Atom] | None = None  # what it was divided into, outer before inner
    index: int | None = None  # the one position that is left of it


def _leaves(atoms: Sequence[Atom]) -> list[Atom]:
    found: list[Atom] = []
    for atom in atoms:
        found += _leaves(atom.parts) if atom.parts else [atom]
    return found


@dataclass
class View:
    """A value as a rearrangement of `base`."""

    base: gs.Tensor
    axes: list[list[Atom]]  # of the value
    base_axes: list[list[Atom]]
    scale: float = 1.0  # the value is this times what it shows
    nodes: list[Node] = field(default_factory=list)  # from the base to the value
    steps: list[tuple[gs.Tensor, list[list[Atom]]]] = field(default_factory=list)  # what each of `nodes` gave

    def atoms(self, axis: int) -> list[Atom]:
        """The atoms of one axis of the value, those of size 1 left out."""
        return [a for a in _leaves(self.axes[axis]) if a.size != 1]


def whole(atoms: Sequence[Atom]) -> list[Atom]:
    """The atoms of an axis as they are now, those of size 1 left out."""
    return [a for a in _leaves(atoms) if a.size != 1]


def positions(axis: Sequence[Atom], order: Sequence[Atom]) -> Array | None:
    """Where on a base axis the elements lie that are shown in the order of `order`; None where a size is symbolic or an atom of `order` is not
    of that axis."""
    leaves = _leaves(axis)
    sizes = [a.size for a in leaves if isinstance(a.size, int)]
    if len(sizes) != len(leaves):
        return None
    numbers: Array = np.arange(math.prod(sizes)).reshape(sizes)
    numbers = numbers[tuple(slice(None) if a.index is None else a.index for a in leaves)]
    shown = [a for a in leaves if a.index is None]
    kept = [a for a in shown if a.size != 1]
    wanted = [a for a in order if a.size != 1]
    if {id(a) for a in wanted} != {id(a) for a in kept}:
        return None
    numbers = numbers.reshape([size for size in numbers.shape if size != 1])
    place = {id(a): index for index, a in enumerate(kept)}
    return numbers.transpose([place[id(a)] for a in wanted]).reshape(-1)


def trace(tensor: gs.Tensor, shapes: Shapes, edit: Editor, *, scaled: bool = False) -> View | None:
    """`tensor` as a view of the earliest value that it can be read as; None where not even its own shape is known.

    Args:
        tensor: the value.
        shapes: of the model.
        edit: of the model.
        scaled: whether multiplication by a constant number may lie between.
    """
    chain: list[Node] = []
    current = tensor
    while True:
        node = edit.producer(current)
        source = None if node is None or not node.is_onnx else _source(node, current, edit, scaled)
        if node is None or source is None:
            break
        chain.append(node)
        current = source
    view = _start(current, shapes)
    previous = current
    for node in reversed(chain):
        output = tensor if node is chain[0] else _output_towards(node, chain, edit)
        if view is not None:
            view = view if _step(view, node, previous, output, shapes, edit) else None
        if view is None:
            scale = 1.0
            view = _start(output, shapes)
            if view is not None:
                view.scale = scale
        previous = output
    return view


def _output_towards(node: Node, chain: list[Node], edit: Editor) -> gs.Tensor:
    following = chain[next(i for i, n in enumerate(chain) if n is node) - 1]
    return next(t for t in following.inputs if any(t is o for o in node.outputs))


def follow(tensor: gs.Tensor, shapes: Shapes, edit: Editor) -> View | None:
    """The way of `tensor` through its only readers, as long as they rearrange it: a view whose base is `tensor`."""
    view = _start(tensor, shapes)
    current = tensor
    while view is not None:
        node = edit.sole_consumer(current)
        if node is None or not node.is_onnx or _source(node, node.outputs[0], edit, False) is not current:
            break
        saved = [list(a) for a in view.axes]
        if node.op in ("Split", "Gather", "Slice") or not _step(view, node, current, node.outputs[0], shapes, edit):
            view.axes = saved
            break
        current = node.outputs[0]
    return view


def _start(tensor: gs.Tensor, shapes: Shapes) -> View | None:
    shape = shapes.shape(tensor)
    if shape is None:
        return None
    base = [[Atom(d)] for d in shape]
    return View(tensor, [list(a) for a in base], base)


def _source(node: Node, result: gs.Tensor, edit: Editor, scaled: bool) -> gs.Tensor | None:
    """The operand that `node` rearranges into `result`."""
    if node.op in ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Split"):
        return node.inputs[0]
    if node.op == "Gather" and edit.is_fixed(node.inputs[1]) and node.inputs[1].values.size == 1:
        return node.inputs[0]
    if node.op == "Slice" and all(edit.is_fixed(t) for t in node.inputs[1:] if t.name):
        return node.inputs[0]
    if scaled and node.op in ("Mul", "Div"):
        for index in (0, 1) if node.op == "Mul" else (0,):
            if scalar(node.inputs[1 - index], edit) is not None:
                return node.inputs[index]
    return None


def scalar(tensor: gs.Tensor, edit: Editor) -> float | None:
    """The number in a constant of one element."""
    if not edit.is_fixed(tensor) or tensor.values.size != 1 or tensor.values.dtype.kind not in "fiu":
        return None
    return float(tensor.values.reshape(()))


def _step(view: View, node: Node, source: gs.Tensor, result: gs.Tensor, shapes: Shapes, edit: Editor) -> bool:
    """Carry the view over one node; False where it cannot be read."""
    shape = shapes.shape(result)
    if shape is None:
        return False
    axes: list[list[Atom]] | None = None
    match node.op:
        case "Identity":
            axes = view.axes
        case "Mul" | "Div":
            other = node.inputs[1] if node.inputs[0] is source else node.inputs[0]
            factor = scalar(other, edit)
            rank = shapes.rank(source)
            if factor is None or rank is None or len(other.shape) > rank or (node.op == "Div" and factor == 0):
                return False
            view.scale = view.scale / factor if node.op == "Div" else view.scale * factor
            axes = view.axes
        case "Transpose":
            perm = permutation(node, shapes)
            axes = None if perm is None else [view.axes[a] for a in perm]
        case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten":
            axes = _regroup(view.axes, shape)
        case "Gather":
            axes = _pick(view, node, shapes)
        case "Split":
            at = next(i for i, t in enumerate(node.outputs) if t is result)
            axes = _part(view, int(node.attrs.get("axis", 0)), at, len(node.outputs), shapes.shape(source), shape)
        case "Slice":
            axes = _cut(view, node, shapes.shape(source), shape)
    if axes is None or len(axes) != len(shape):
        return False
    view.axes = axes
    view.nodes.append(node)
    view.steps.append((result, [list(a) for a in axes]))
    return True


def _regroup(axes: list[list[Atom]], shape: Sequence[Dim]) -> list[list[Atom]] | None:
    """The same elements in rows of another shape.

    Where all but one factor agree, that one has to: a Reshape keeps the number of elements. So one pair of different symbols may stand
    for each other.
    """
    assumed = False
    waiting = [a for axis in axes for a in _leaves(axis) if a.size != 1 and a.index is None][::-1]
    grouped: list[list[Atom]] = []
    for dim in shape:
        group: list[Atom] = []
        need = dim
        while need != 1:
            if not waiting:
                return None
            atom = waiting.pop()
            rest = symbolic.divide_exactly(need, atom.size) if atom.size != 0 else None
            if rest is not None:
                group.append(atom)
                need = rest
                continue
            inner = symbolic.divide_exactly(atom.size, need) if need != 0 else None
            if inner is None and not assumed and isinstance(atom.size, Expr) and isinstance(need, Expr):
                assumed = True
                factor = _coefficient(atom.size) // math.gcd(_coefficient(atom.size), _coefficient(need))
                if factor == 1:
                    atom.size = need
                    group.append(atom)
                    break
                atom.parts = (Atom(need), Atom(factor))
                group.append(atom.parts[0])
                waiting.append(atom.parts[1])
                break
            if inner is None:
                return None
            atom.parts = (Atom(need), Atom(inner))
            group.append(atom.parts[0])
            waiting.append(atom.parts[1])
            need = 1
        grouped.append(group)
    return None if waiting else grouped


def _coefficient(size: Expr) -> int:
    """The number that a dimension of one term is multiplied by."""
    return size.terms[0][1] if len(size.terms) == 1 else 1


def _pick(view: View, node: Node, shapes: Shapes) -> list[list[Atom]] | None:
    axis = int(node.attrs.get("axis", 0)) % len(view.axes)
    indices = node.inputs[1].values
    atoms = whole([a for a in _leaves(view.axes[axis]) if a.index is None])
    if len(atoms) > 1 or (atoms and not isinstance(atoms[0].size, int)):
        return None
    index = int(indices.reshape(()))
    if atoms:
        index += int(atoms[0].size) if index < 0 else 0  # type: ignore[arg-type]
        if not 0 <= index < int(atoms[0].size):  # type: ignore[arg-type]
            return None
        atoms[0].index = index
    kept: list[list[Atom]] = [[]] * indices.ndim
    return [*view.axes[:axis], *kept, *view.axes[axis + 1 :]]


def _part(
    view: View, axis: int, at: int, count: int, source: Sequence[Dim] | None, shape: Sequence[Dim]
) -> list[list[Atom]] | None:
    """Part `at` of `count` equal ones."""
    if source is None:
        return None
    axis %= len(view.axes)
    size, part = source[axis], shape[axis]
    if not isinstance(size, int) or not isinstance(part, int) or part * count != size:
        return None
    return _section(view, axis, at, count)


def _cut(view: View, node: Node, source: Sequence[Dim] | None, shape: Sequence[Dim]) -> list[list[Atom]] | None:
    """A Slice that takes one of several equal parts of one axis."""
    operands = [[int(v) for v in t.values.reshape(-1)] if t.name else None for t in node.inputs[1:]]
    starts, ends, axes, steps = [*operands, None, None, None, None][:4]
    if source is None or starts is None or ends is None or len(starts) != 1 or (steps is not None and steps != [1]):
        return None
    axis = (axes[0] if axes else 0) % len(view.axes)
    size, part = source[axis], shape[axis]
    if not isinstance(size, int) or not isinstance(part, int) or part <= 0 or size % part:
        return None
    start = starts[0] + size if starts[0] < 0 else starts[0]
    if start % part or not 0 <= start < size:
        return None
    return _section(view, axis, start // part, size // part)


def _section(view: View, axis: int, at: int, count: int) -> list[list[Atom]] | None:
    if count == 1:
        return view.axes
    atoms = [a for a in _leaves(view.axes[axis]) if a.index is None and a.size != 1]
    if not atoms:
        return None
    first = atoms[0]
    if not isinstance(first.size, int) or first.size % count:
        return None
    if first.size != count:
        first.parts = (Atom(count), Atom(first.size // count))
        chosen, rest = first.parts[0], [first.parts[1], *atoms[1:]]
    else:
        chosen, rest = first, atoms[1:]
    chosen.index = at
    return [*view.axes[:axis], rest, *view.axes[axis + 1 :]]
