"""Boolean algebra that holds for every input.

not not x = x                   where(not c, a, b) = where(c, b, a)         where(c, a, a) = a
where(c, where(c, a, b), d) = where(c, a, d)    where(c, a, where(c, b, d)) = where(c, a, d)    where the result keeps its shape
x and true = x or false = x xor false = x       x xor true = not x      x and false = false, x or true = true, where the shape is known
where(c, true, false) = c       where(c, false, true) = not c       for a boolean x: (x == true) = x, (x == false) = not x
not (a < b) = a >= b            for integers; a float may be NaN, of which every comparison is false
cast(x) == 1 is x               for a boolean x; cast(x) == 0 is not x
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass, Place

_MOST: Final = 1 << 10  # elements of a mask that is stored
_OPPOSITE: Final = {
    "Less": "GreaterOrEqual",
    "GreaterOrEqual": "Less",
    "Greater": "LessOrEqual",
    "LessOrEqual": "Greater",
}


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    """Simplify Not, Where, comparisons and casts of masks.

    Before:
        g (bool[2] c, float[2] a, float[2] b) => (float[2] y)
        { n = Not (c)
          w = Where (n, a, b)
          y = Exp (w) }
    After:
        g (bool[2] c, float[2] a, float[2] b) => (float[2] y)
        { w = Where (c, b, a)
          y = Exp (w) }
    """

    places: ClassVar[tuple[Place, ...]] = (
        Place(("Not",), ("Not", *_OPPOSITE)),
        Place(("Where",), ("Not", "Where"), otherwise="choose between equal values"),
        Place(("And", "Or"), otherwise="read one mask twice"),
        Place(("Where", "Equal", "And", "Or", "Xor"), constant=True),
    )

    def run(self, model: Model, ctx: Context) -> int:
        """Sweeps in topological order until nothing changes; returns the number of rewrites."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        total = 0
        for node in list(model.nodes()):
            rule = _RULES.get(node.op)
            if rule is None or not node.is_onnx:
                continue
            current = node
            while (found := rule(current, shapes, edit, model.opset)) is not None:
                result = current.outputs[0]
                if isinstance(found, gs.Tensor) and not edit.can_replace(result, found):
                    ctx.remark(node, f"is {found.name!r}, but gives output {result.name!r} its name")
                    break
                if not ctx.admit():
                    edit.commit()
                    return total
                total += 1
                inner = [p for t in current.inputs if (p := edit.producer(t)) is not None]
                if isinstance(found, gs.Tensor):
                    edit.replace_uses(result, found)
                    edit.erase(current)
                    _erase_unread(edit, inner)
                    break
                op, operands = found
                current.outputs.clear()
                new = Node(op, current.name, {}, operands, [result])
                edit.insert_before(current, new, origin=(*inner, current))
                edit.erase(current)
                _erase_unread(edit, inner)
                current = new
                rule = _RULES.get(op)
                if rule is None:
                    break
        edit.commit()
        return total


Found = Any  # a tensor, or an operator with operands, or None
Rule = Callable[[Node, Shapes, Editor, int], Found]


def _erase_unread(edit: Editor, nodes: list[Node]) -> None:
    for node in nodes:
        if not edit.is_erased(node) and not any(t.outputs or edit.is_output(t) for t in node.outputs):
            edit.erase(node)


def _made_by(tensor: gs.Tensor, op: str, edit: Editor) -> Node | None:
    node = edit.producer(tensor)
    return node if node is not None and node.op == op and node.is_onnx else None


def _not(node: Node, shapes: Shapes, edit: Editor, opset: int) -> Found:
    inner = _made_by(node.inputs[0], "Not", edit)
    if inner is not None:
        return inner.inputs[0]
    compared = edit.producer(node.inputs[0])
    if compared is None or compared.op not in _OPPOSITE or not compared.is_onnx or opset < 12:
        return None
    dtype = shapes.dtype(compared.inputs[0])
    if dtype is None or dtype.kind not in "iu" or edit.sole_consumer(node.inputs[0]) is not node:
        return None
    return (_OPPOSITE[compared.op], list(compared.inputs)) if edit.graph_of(compared) is edit.graph_of(node) else None


def _where(node: Node, shapes: Shapes, edit: Editor, opset: int) -> Found:
    condition, a, b = node.inputs
    negated = _made_by(condition, "Not", edit)
    if negated is not None:
        return "Where", [negated.inputs[0], b, a]
    result = shapes.shape(node.outputs[0])
    for index, branch in enumerate((a, b)):
        nested = _made_by(branch, "Where", edit)
        if nested is None or nested.inputs[0] is not condition or result is None:
            continue
        branches = [a, b]
        branches[index] = nested.inputs[1 + index]
        if any(shapes.shape(t) == result for t in (condition, *branches)):
            return "Where", [condition, *branches]
    if all(edit.is_fixed(t) and t.dtype == np.bool_ and t.values.size for t in (a, b)) and result is not None:
        first, second = a.values, b.values
        if first.all() and not second.any() and shapes.shape(condition) == result:
            return condition
        if second.all() and not first.any() and shapes.shape(condition) == result:
            return "Not", [condition]
    chosen: gs.Tensor | None = a if a is b else None
    if chosen is None and edit.is_fixed(condition) and condition.values.size:
        chosen = a if bool(condition.values.all()) else b if not condition.values.any() else None
    if chosen is None:
        return None
    return chosen if result is not None and result == shapes.shape(chosen) else None


def _equal(node: Node, shapes: Shapes, edit: Editor, opset: int) -> Found:
    for index in (0, 1):
        constant = node.inputs[1 - index]
        if not edit.is_fixed(constant) or np.dtype(constant.dtype).kind not in "iufb":
            continue
        cast = _made_by(node.inputs[index], "Cast", edit)
        mask, values = node.inputs[index] if cast is None else cast.inputs[0], constant.values
        dtype, shape = shapes.dtype(mask), shapes.shape(mask)
        if (
            dtype is None
            or dtype.kind != "b"
            or shape is None
            or shape != shapes.shape(node.outputs[0])
            or not values.size
        ):
            continue
        if bool((values == 1).all()):
            return mask
        if bool((values == 0).all()):
            return "Not", [mask]
    return None


def _and_or(node: Node, shapes: Shapes, edit: Editor, opset: int) -> Found:
    if node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    neutral, result = node.op == "And", shapes.shape(node.outputs[0])
    for index in (0, 1):
        constant, mask = node.inputs[1 - index], node.inputs[index]
        if edit.is_fixed(constant) and constant.values.size and bool((constant.values == neutral).all()):
            return mask if result is not None and result == shapes.shape(mask) else None
        if edit.is_fixed(constant) and constant.values.size and bool((constant.values != neutral).all()):
            numbers = [d for d in result or () if isinstance(d, int)]
            if result is None or len(numbers) < len(result) or math.prod(numbers) > _MOST:
                return None
            return edit.constant(node.outputs[0].name, np.full(numbers, not neutral))
    return None


def _xor(node: Node, shapes: Shapes, edit: Editor, opset: int) -> Found:
    result = shapes.shape(node.outputs[0])
    for index in (0, 1):
        constant, mask = node.inputs[1 - index], node.inputs[index]
        if edit.is_fixed(constant) and constant.values.size and result is not None and result == shapes.shape(mask):
            if constant.values.all():
                return "Not", [mask]
            if not constant.values.any():
                return mask
    return None


_RULES: Final[dict[str, Rule]] = {
    "Not": _not,
    "Where": _where,
    "Equal": _equal,
    "And": _and_or,
    "Or": _and_or,
    "Xor": _xor,
}
