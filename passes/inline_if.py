"""``if true: a else: b`` is a, whatever b is; and ``if c: a else: a`` is a, whatever c is.

Where the condition is not known, the readers may know: a branch whose result they cannot take (analyses/rank_demands) is taken in no
run that succeeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analyses.rank_demands import RankDemands
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Constant, Graph, Model, Node, subgraphs
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class InlineIf(Pass):
    """Put the branch that is taken in place of an If whose condition is known, or whose branches are the same.

    Before:
        g (float[2] x) => (float[2] y)
        <bool yes = {1}>
        { a = Relu (x)
          b = If (yes) <then_branch = t () => (float[2] c) { n = Neg (a)  c = Exp (n) },
                        else_branch = e () => (float[2] d) { d = Abs (a) }>
          y = Sqrt (b) }
    After:
        g (float[2] x) => (float[2] y)
        { a = Relu (x)
          n = Neg (a)
          c = Exp (n)
          y = Sqrt (c) }
    """

    ops: ClassVar[frozenset[str] | None] = frozenset({"If"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep, outer before inner; returns the number of Ifs replaced."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        demands = RankDemands(edit, shapes)
        inlined = 0
        for node in list(model.nodes()):
            if node.op != "If" or not node.is_onnx or edit.is_erased(node):
                continue
            branches = [node.attrs.get("then_branch"), node.attrs.get("else_branch")]
            if not all(isinstance(b, Graph) and not b.inputs for b in branches):
                continue
            known = shapes.integers(node.inputs[0])
            if known is not None and known.size == 1:
                taken = branches[0 if bool(known.reshape(-1)[0]) else 1]
            elif _same(branches[0], branches[1], {}):
                taken = branches[0]
            elif (only := _only_possible(node, branches, demands)) is not None:
                taken = only
            else:
                ctx.remark(node, f"condition {node.inputs[0].name!r} is not known, and the branches differ")
                continue
            refusing = _refusing_reader(node, taken, shapes)
            if refusing is not None:
                ctx.remark(
                    node, f"{refusing.name!r} ({refusing.op}) could not read what the branch returns, were it seen"
                )
                continue
            if not ctx.admit():
                break
            edit.replace_node(node, edit.unpack(node, taken))
            inlined += 1
        edit.commit()
        return inlined


def _only_possible(node: Node, branches: Sequence[Graph], demands: RankDemands) -> Graph | None:
    """The branch that is taken in every run that succeeds, if the other gives a rank that its readers cannot take."""
    left = [branch for branch in branches if not demands.impossible(node, branch)]
    return left[0] if len(left) == 1 else None


def _refusing_reader(node: Node, taken: Graph, shapes: Shapes) -> Node | None:
    """A reader that must not take what the branch returns; the If hides that from runtimes, which refuse to load it otherwise."""
    known = {id(old): shapes.info(new) for old, new in zip(node.outputs, taken.outputs, strict=True)}
    for tensor in node.outputs:
        readers: list[Node] = list(tensor.outputs)
        for reader in readers:
            if reader.is_onnx and not subgraphs(reader) and shapes.refuses(reader, known):
                return reader
    return None


def _same(left: Graph, right: Graph, paired: dict[int, gs.Tensor]) -> bool:
    """Whether two bodies compute the same by the same steps; `paired` says which values of the right stand for those of the left."""
    if len(left.nodes) != len(right.nodes) or len(left.outputs) != len(right.outputs):
        return False
    if len(left.inputs) != len(right.inputs):
        return False
    paired.update((id(a), b) for a, b in zip(left.inputs, right.inputs, strict=True))
    for a, b in zip(left.nodes, right.nodes, strict=True):
        if (a.op, a.domain or "", len(a.inputs), len(a.outputs)) != (
            b.op,
            b.domain or "",
            len(b.inputs),
            len(b.outputs),
        ):
            return False
        if getattr(a.carried, "overload", "") != getattr(b.carried, "overload", ""):
            return False
        if not all(_stands_for(s, t, paired) for s, t in zip(a.inputs, b.inputs, strict=True)):
            return False
        if sorted(a.attrs) != sorted(b.attrs):
            return False
        if not all(_equal(value, b.attrs[name], paired) for name, value in a.attrs.items()):
            return False
        if any(bool(s.name) != bool(t.name) for s, t in zip(a.outputs, b.outputs, strict=True)):
            return False
        paired.update((id(s), t) for s, t in zip(a.outputs, b.outputs, strict=True))
    return all(_stands_for(s, t, paired) for s, t in zip(left.outputs, right.outputs, strict=True))


def _stands_for(left: gs.Tensor, right: gs.Tensor, paired: dict[int, gs.Tensor]) -> bool:
    if isinstance(left, Constant) and isinstance(right, Constant) and id(left) not in paired:
        return _equal_constants(left, right)
    if not left.name or not right.name:
        return not left.name and not right.name
    return bool(paired.get(id(left), left) is right)


def _equal_constants(left: gs.Constant, right: gs.Constant) -> bool:
    if left.dtype != right.dtype or tuple(left.shape) != tuple(right.shape):
        return False
    if left._values is right._values:
        return True
    a, b = np.asarray(left.values), np.asarray(right.values)
    return bool((a == b).all()) if a.dtype.kind == "O" else a.tobytes() == b.tobytes()


def _equal(left: Any, right: Any, paired: dict[int, gs.Tensor]) -> bool:
    """Whether two attributes have one value."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Graph):
        return _same(left, right, paired)
    if isinstance(left, gs.Constant):
        return _equal_constants(left, right)
    if isinstance(left, onnx.AttributeProto):
        return bool(left.SerializeToString(deterministic=True) == right.SerializeToString(deterministic=True))
    if isinstance(left, list):
        return len(left) == len(right) and all(_equal(a, b, paired) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)  # floats: 0.0 is not -0.0, NaN is NaN
