"""Sequences that are built and taken apart at once are tensors: torch writes ``x.split(n)`` as SplitToSequence and a SequenceAt for each part.

SequenceAt(SequenceConstruct(t0, t1, ...), i)     = ti
SequenceAt(SplitToSequence(x, sizes), i)          = output i of Split(x, sizes)
SequenceAt(SplitToSequence(x), i)                 = Gather(x, i), with i as a scalar where keepdims is 0
ConcatFromSequence(SequenceConstruct(t0, t1, ...)) = Concat(t0, t1, ...), of unsqueezed tensors where new_axis is 1
SequenceLength(SequenceConstruct(t0, t1, ...))     = how many there are
OptionalGetElement(Optional(x)) = x,  OptionalHasElement(Optional(x)) = true,  OptionalHasElement(Optional()) = false
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class LowerSequences(Pass):
    """Replace sequences whose elements are known one by one, and optionals, with the tensors they hold.

    Before:
        g (float[N,6] x) => (float[N,2] y, float[N,4] z)
        <int64[2] sizes = {2, 4}, int64 zero = {0}, int64 one = {1}>
        { s = SplitToSequence <axis = 1> (x, sizes)
          y = SequenceAt (s, zero)
          z = SequenceAt (s, one) }
    After:
        g (float[N,6] x) => (float[N,2] y, float[N,4] z)
        <int64[2] sizes = {2, 4}>
        { y, z = Split <axis = 1> (x, sizes) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset(
        {"SequenceAt", "ConcatFromSequence", "SequenceLength", "OptionalGetElement", "OptionalHasElement"}
    )

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of nodes that no longer read a sequence."""
        lowering = _Lowering(model, ctx)
        rules = {
            "SequenceAt": lowering.element,
            "ConcatFromSequence": lowering.concat,
            "SequenceLength": lowering.length,
            "OptionalGetElement": lowering.content,
            "OptionalHasElement": lowering.presence,
        }
        for node in list(model.nodes()):
            rule = rules.get(node.op)
            source = (
                lowering.edit.producer(node.inputs[0]) if rule is not None and node.inputs and node.is_onnx else None
            )
            if rule is None or source is None or not source.is_onnx or not lowering.beside(source, node):
                continue
            reason = rule(node, source)
            if reason is not None:
                ctx.remark(node, reason)
        lowering.edit.commit()
        return lowering.done


class _Lowering:
    def __init__(self, model: Model, ctx: Context) -> None:
        self.edit, self.ctx, self.opset = Editor(model), ctx, model.opset
        self.shapes = ctx.analysis(Shapes, model)
        self.parts: dict[int, list[gs.Tensor]] = {}  # outputs of the Split that stands for a SplitToSequence
        self.done = 0

    def beside(self, one: gs.Node, other: gs.Node) -> bool:
        return self.edit.graph_of(one) is self.edit.graph_of(other)

    def replace(self, node: Node, result: gs.Tensor) -> None:
        self.edit.replace_node(node, [result])
        self.done += 1

    def element(self, node: Node, source: Node) -> str | None:
        """Let a tensor stand for one element of a sequence; returns the reason where it cannot."""
        index = self.integers(node.inputs[1])
        if index is None:
            return "which element it takes is not known"
        place = index[0]
        if source.op == "SequenceConstruct":
            if not -len(source.inputs) <= place < len(source.inputs):
                return f"element {place} of {len(source.inputs)} does not exist"
            if self.ctx.admit():
                self.replace(node, source.inputs[place])
            return None
        if source.op != "SplitToSequence":
            return f"what {source.op} makes is known at run time alone"
        axis = int(source.attrs.get("axis", 0))
        if len(source.inputs) < 2 or not source.inputs[1].name:  # pieces of one
            shape = () if source.attrs.get("keepdims", 1) == 0 else (1,)
            if self.ctx.admit():
                where = self.edit.constant(f"{node.outputs[0].name}_index", np.full(shape, place, np.int64))
                result = self.edit.variable(node.outputs[0].name, node.outputs[0])
                self.edit.insert_before(
                    node, Node("Gather", node.name, {"axis": axis}, [source.inputs[0], where], [result])
                )
                self.replace(node, result)
            return None
        sizes = self.sizes(source, axis)
        if isinstance(sizes, str):
            return sizes
        if not -len(sizes) <= place < len(sizes):
            return f"element {place} of {len(sizes)} does not exist"
        if self.ctx.admit():
            if id(source) not in self.parts:
                self.parts[id(source)] = self.split(source, axis, sizes, node.outputs[0])
            parts, result = self.parts[id(source)], node.outputs[0]
            renamed = self.edit.is_output(result) and self.edit.can_replace(result, parts[place])
            self.replace(node, parts[place])
            if renamed:
                parts[place] = result
        return None

    def length(self, node: Node, source: Node) -> str | None:
        """Let a constant stand for the length of a sequence; returns the reason where it cannot."""
        if source.op != "SequenceConstruct":
            return f"what {source.op} makes is known at run time alone"
        if self.ctx.admit():
            self.replace(node, self.edit.constant(node.outputs[0].name, np.array(len(source.inputs), np.int64)))
        return None

    def content(self, node: Node, source: Node) -> str | None:
        """Let what an Optional holds stand for itself; returns the reason where it cannot."""
        if source.op != "Optional" or not any(t.name for t in source.inputs):
            return f"whether {source.name!r} holds something is known at run time alone"
        if self.ctx.admit():
            self.replace(node, source.inputs[0])
        return None

    def presence(self, node: Node, source: Node) -> str | None:
        """Let a constant say whether an Optional holds something; returns the reason where it cannot."""
        if source.op != "Optional":
            return f"whether {source.name!r} holds something is known at run time alone"
        if self.ctx.admit():
            holds = np.array(any(t.name for t in source.inputs))
            self.replace(node, self.edit.constant(node.outputs[0].name, holds))
        return None

    def integers(self, tensor: gs.Tensor) -> list[int] | None:
        known = self.shapes.integers(tensor)
        return None if known is None or not known.size else [int(v) for v in known.reshape(-1)]

    def sizes(self, source: Node, axis: int) -> list[int] | str:
        """The extents of the parts, or why a Split would not do."""
        sequence = source.outputs[0]
        if self.edit.is_output(sequence) or not all(
            r.op == "SequenceAt" and self.beside(r, source) for r in sequence.outputs
        ):
            return f"the sequence {sequence.name!r} is read as a whole, too"
        given = self.shapes.integers(source.inputs[1])
        if given is None:
            return "the sizes of the parts are not known"
        if given.ndim == 1:
            return [int(v) for v in given]
        if source.attrs.get("keepdims", 1) == 0:
            return "the standard ignores keepdims where a size is given, ONNX Runtime does not"
        shape = self.shapes.shape(source.inputs[0])
        extent = None if shape is None else shape[axis % len(shape)]
        if not isinstance(extent, int) or int(given) < 1:
            return "how many parts there are is not known"
        return [min(int(given), extent - start) for start in range(0, extent, int(given))]

    def split(self, source: Node, axis: int, sizes: list[int], like: gs.Tensor) -> list[gs.Tensor]:
        results: list[gs.Tensor] = [self.edit.variable(like.name) for _ in sizes]
        for result in results:
            result.dtype = like.dtype
        operands, attributes = [source.inputs[0]], dict[str, Any](axis=axis)
        if self.opset >= 13:
            operands.append(self.edit.constant(f"{source.inputs[0].name}_sizes", np.array(sizes, np.int64)))
        else:
            attributes["split"] = sizes
        self.edit.insert_before(source, Node("Split", source.name, attributes, operands, results))
        return results

    def concat(self, node: Node, source: Node) -> str | None:
        """Join the elements of a sequence that was put together right before; returns the reason where it cannot."""
        if source.op != "SequenceConstruct":
            return f"what {source.op} makes is known at run time alone"
        if not self.ctx.admit():
            return None
        axis, parts = int(node.attrs["axis"]), list(source.inputs)
        if node.attrs.get("new_axis", 0):
            operands, attributes = list[gs.Tensor](), dict[str, Any]()
            if self.opset >= 13:
                operands.append(self.edit.constant("axes", np.array([axis], np.int64)))
            else:
                attributes["axes"] = [axis]
            parts = [self.unsqueezed(node, [part, *operands], attributes) for part in parts]
        result = self.edit.variable(node.outputs[0].name, node.outputs[0])
        self.edit.insert_before(node, Node("Concat", node.name, {"axis": axis}, parts, [result]))
        self.replace(node, result)
        return None

    def unsqueezed(self, anchor: Node, operands: list[gs.Tensor], attributes: dict[str, Any]) -> gs.Tensor:
        result = self.edit.variable(f"{operands[0].name}_unsqueezed")
        result.dtype = operands[0].dtype
        self.edit.insert_before(
            anchor, Node("Unsqueeze", f"{anchor.name}_unsqueeze", dict(attributes), operands, [result])
        )
        return result
