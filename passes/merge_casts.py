"""``Cast(Cast(x))`` is one Cast where the first loses nothing, or where both only discard high bits of an integer.

The first loses nothing when every value of its source type is one of its target type: bool to any number, an integer to one with a wider
range or to a float whose significand holds it, a float to a wider one. Then the second sees the value itself. Two cases stay out although
the value is the same: a float that ends as an integer, where what happens out of range depends on the float's type; and 8-bit floats,
which saturate by attribute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.errors import UnsupportedModel
from graphopt.ir import Model, Node, numpy_dtype
from graphopt.pass_base import Context, Pass, Place

# Significand bits and the wider types of each float.
_FLOATS: Final = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
_WIDER: Final = {
    "float16": ("float32", "float64"),
    "bfloat16": ("float32", "float64"),
    "float32": ("float64",),
    "float64": (),
}


@dataclass(frozen=True)
class MergeCasts(Pass):
    """Merge a Cast that loses nothing into the Cast that reads it; remove both where they lead back.

    Before:
        g (float[2] x) => (float16[2] y, float[2] z)
        { a = Cast <to = 11> (x)
          y = Cast <to = 10> (a)
          b = Cast <to = 1> (a)
          z = Add (b, b) }
    After:
        g (float[2] x) => (float16[2] y, float[2] z)
        { y = Cast <to = 10> (x)
          z = Add (x, x) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"Cast"})
    places: ClassVar[tuple[Place, ...]] = (Place(("Cast",), ("Cast",)),)

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of Casts that skip the one before."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        merged = 0
        for node in list(model.nodes()):
            inner = edit.producer(node.inputs[0]) if _is_cast(node) else None
            if inner is None or not _is_cast(inner):
                continue
            source, result = inner.inputs[0], node.outputs[0]
            first, middle, last = shapes.dtype(source), _target(inner), _target(node)
            if first is None or middle is None or last is None or not _composes(first, middle, last):
                ctx.remark(node, f"the Cast before it, from {first} to {middle}, loses something")
                continue
            back = first == last and edit.can_replace(result, source)
            if not ctx.admit():
                break
            if back:
                edit.replace_uses(result, source)
                edit.erase(node)
            else:
                node.inputs[0] = source
                node.origin = tuple(dict.fromkeys([*(inner.origin or (inner.name,)), *(node.origin or (node.name,))]))
            if not inner.outputs[0].outputs and not edit.is_output(inner.outputs[0]):
                edit.erase(inner)
            merged += 1
        edit.commit()
        return merged


def _is_cast(node: Node) -> bool:
    return node.op == "Cast" and node.is_onnx


def _target(node: Node) -> np.dtype[Any] | None:
    try:
        return numpy_dtype(int(node.attrs["to"]))
    except (KeyError, TypeError, ValueError, UnsupportedModel):
        return None


def _composes(first: np.dtype[Any], middle: np.dtype[Any], last: np.dtype[Any]) -> bool:
    """Whether casting `first` to `middle` and on to `last` is casting `first` to `last`, for every value."""
    if not all(_is_common(t) for t in (first, middle, last)):
        return False
    if first.kind in "iu" and middle.kind in "iu" and last.kind in "iu" and last.itemsize <= middle.itemsize:
        return True  # the low bits of the low bits
    if not _holds(middle, first):
        return False
    if last.kind not in "iu":
        return True
    # From a float the integer out of range is the machine's choice; from an integer it is the low bits, if no float stands between.
    return first.kind in "biu" and (middle.kind in "biu" or _holds(last, first))


def _is_common(dtype: np.dtype[Any]) -> bool:
    return (
        dtype.name in _FLOATS
        or dtype.kind == "b"
        or (dtype.kind in "iu" and dtype.name.strip("uint") in ("8", "16", "32", "64"))
    )


def _holds(wide: np.dtype[Any], narrow: np.dtype[Any]) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if wide == narrow or narrow.kind == "b":
        return True
    if wide.kind == "b":
        return False
    if narrow.name in _FLOATS:
        return wide.name in _WIDER[narrow.name]
    limits = np.iinfo(narrow)
    if wide.name in _FLOATS:
        return bool(limits.bits - (narrow.kind == "i") <= _FLOATS[wide.name])
    return bool(np.iinfo(wide).min <= limits.min and limits.max <= np.iinfo(wide).max)
