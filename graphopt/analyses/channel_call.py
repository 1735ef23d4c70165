"""One node as a channel relation sees it, and the table that relations register in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from graphopt.analyses.symbolic import Dim
from graphopt.edit import Editor
from graphopt.ir import Node

if TYPE_CHECKING:
    from graphopt.analyses.channel_groups import Axis, ChannelGroups, Kept, Labels

Array = np.ndarray[Any, Any]
Relation = Callable[["Call"], "Sequence[Labels | None] | None"]

TABLE: Final[dict[str, Relation]] = {}  # by operator, with the domain in front unless it is ONNX's


def relation(*ops: str) -> Callable[[Relation], Relation]:
    """Register a relation for operators: ``Op`` of ONNX, ``com.microsoft.Op`` of ONNX Runtime."""

    def register(relation: Relation) -> Relation:
        TABLE.update(dict.fromkeys(ops, relation))
        return relation

    return register


class Call:
    """One node, as a relation sees it."""

    def __init__(self, groups: ChannelGroups, node: Node) -> None:
        self.groups = groups
        self.node = node
        self.touched: set[int] = set()
        self.restated: set[int] = set()  # operands that state sizes, and are written anew when those change

    def has(self, index: int) -> bool:
        """Whether operand `index` is given."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def axes(self, index: int) -> list[Axis]:
        """The labels of an operand, which the relation thereby answers for."""
        self.touched.add(index)
        return list(self.groups.labels(self.node.inputs[index]) or ())

    def dims(self, index: int) -> tuple[Dim, ...]:
        """The shape of an operand."""
        return self.groups.shapes.shape(self.node.inputs[index]) or ()

    def out_dims(self, index: int = 0) -> tuple[Dim, ...] | None:
        """The shape of a result."""
        return self.groups.shapes.shape(self.node.outputs[index])

    def ints(self, index: int) -> list[int] | None:
        """The numbers in an integer operand that no caller can change."""
        if not self.has(index):
            return None
        known = self.groups.shapes.integers(self.node.inputs[index])
        return None if known is None else [int(v) for v in known.reshape(-1)]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.node.attrs.get(name, default)

    def why(self, what: str) -> str:
        """A reason that names the node."""
        return f"node {self.node.name!r} ({self.node.op}) {what}"

    def pin(self, axis: Axis, what: str) -> None:
        """The channels on an axis must stay."""
        self.groups.pin(axis, self.why(what))

    def join(self, a: Axis, b: Axis, what: str = "combines it with an axis that cannot change") -> Axis:
        """Index by index together; with an axis that nothing tracks, pinned."""
        if a is None or b is None:
            self.pin(a if b is None else b, what)
            return None
        if len(a) != len(b):
            self.pin(a, what)
            self.pin(b, what)
            return None
        self.groups.join(a, b)
        return a

    def atoms(self, axis: Axis, size: Dim, what: str) -> Array:
        """The atoms of an axis, fresh pinned ones where nothing tracks it."""
        return (
            axis if axis is not None else self.groups.fresh(int(size) if isinstance(size, int) else 0, self.why(what))
        )

    def together(self, lines: Array) -> Array:
        """Join the atoms in each row of a table; the first of each row."""
        for column in range(1, lines.shape[1]):
            self.groups.join(lines[:, 0], lines[:, column])
        return lines[:, 0].copy()

    def fix(self, change: Callable[[Kept, Editor], None]) -> None:
        """What to rewrite of the node when channels go."""
        self.groups.fixes.append(change)

    def set(self, attribute: str, value: int) -> None:
        """Give the node another attribute."""
        self.node.attrs[attribute] = value

    def restate(
        self, index: int, attribute: str, sizes: Sequence[int | Array | None], watch: Sequence[Axis] = ()
    ) -> None:
        """When channels go, state the sizes in an operand (or attribute) anew.

        An array stands for the number of its atoms that are left, a number for itself, None for what the operand says at run
        time. It is done when one of the arrays, of `watch` or of the axes whose sizes the operand was made from changes.
        """
        self.touched.add(index)
        self.restated.add(index)
        tensor = self.node.inputs[index] if self.has(index) else None
        held = [a for a in self.groups.sizes.get(id(tensor), ()) if a is not None]
        tracked = [*held, *(a for a in watch if a is not None), *(n for n in sizes if isinstance(n, np.ndarray))]
        if any(n is None for n in sizes) and self.groups.model.opset < 9:
            for axis in tracked:
                self.pin(axis, "states its size at run time")
            return

        def change(kept: Kept, edit: Editor) -> None:
            if all(kept.mask(axis).all() for axis in tracked):
                return
            known = [kept.count(size) if isinstance(size, np.ndarray) else size for size in sizes]
            if None not in known:
                self.store(index, attribute, edit, [int(n) for n in known if n is not None])
                return
            stated = edit.constant("sizes", np.array([0 if n is None else n for n in known], np.int64))
            open_ = edit.constant("open", np.array([n is None for n in known]))
            result = edit.variable("sizes", like=self.node.inputs[index])
            edit.insert_before(
                self.node, Node("Where", "restate", {}, [open_, self.node.inputs[index], stated], [result])
            )
            self.node.inputs[index] = result

        if tracked:
            self.fix(change)

    def store(self, index: int, attribute: str, edit: Editor, values: Sequence[int]) -> None:
        """Write integers where the node has them: in an operand, else in an attribute."""
        if index < len(self.node.inputs) and (self.has(index) or attribute not in self.node.attrs):
            old = self.node.inputs[index]
            self.node.inputs[index] = edit.constant(
                old.name or f"{self.node.name}_{attribute}", np.array(values, np.int64)
            )
        else:
            self.node.attrs[attribute] = list(values)


def broadcast(call: Call, operands: Sequence[tuple[list[Axis], Sequence[Dim]]]) -> Labels:
    """Join operands, given as labels and shape, as elementwise operators do; the labels of the result."""
    rank = max(len(labels) for labels, _ in operands)
    result: list[Axis] = []
    for axis in range(rank):
        wide: list[Axis] = []
        for labels, dims in operands:
            at = axis - rank + len(labels)
            if at >= 0 and dims[at] != 1:
                wide.append(labels[at])
        joined = wide[0] if wide else None
        for other in wide[1:]:
            joined = call.join(joined, other)
        result.append(joined)
    return tuple(result)
