"""A Reshape that parts channels into blocks, a Transpose that brings them between the pixels and a Reshape that merges them is
DepthToSpace:

    [N, C, r, r, H, W] -> [N, C, H, r, W, r]       mode CRD
    [N, r, r, C, H, W] -> [N, C, H, r, W, r]       mode DCR
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.analyses.layouts import permutation
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

_SINCE = {
    (0, 1, 4, 2, 5, 3): ("CRD", 11, 2),
    (0, 3, 4, 1, 5, 2): ("DCR", 11, 1),
}  # mode, opset, axis of the first block


@dataclass(frozen=True)
class FuseDepthToSpace(Pass):
    """Move channels into space by one operator.

    Before:
        g (float[1,4,2,2] x) => (float[1,1,4,4] y)
        <int64[6] part = {1,1,2,2,2,2}, int64[4] merge = {1,1,4,4}>
        { a = Reshape (x, part)
          b = Transpose <perm = [0,1,4,2,5,3]> (a)
          y = Reshape (b, merge) }
    After:
        g (float[1,4,2,2] x) => (float[1,1,4,4] y)
        { y = DepthToSpace <blocksize = 2, mode = "CRD"> (x) }
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    ops: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of triples fused."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        done = 0
        for turn in list(model.nodes()):
            perm = permutation(turn, shapes) if turn.op == "Transpose" else None
            if perm not in _SINCE:
                continue
            part, merge = edit.producer(turn.inputs[0]), edit.sole_consumer(turn.outputs[0])
            reason = _objection(turn, part, merge, _SINCE[perm], model.opset, shapes, edit)
            if reason is not None or part is None or merge is None:
                ctx.remark(turn, f"no DepthToSpace: {reason}")
                continue
            if not ctx.admit():
                break
            mode, _, first = _SINCE[perm]
            size = (shapes.shape(turn.inputs[0]) or ())[first]
            result = merge.outputs[0]
            merge.outputs.clear()
            new = Node("DepthToSpace", merge.name, {"blocksize": size, "mode": mode}, [part.inputs[0]], [result])
            edit.insert_before(merge, new, (part, turn, merge))
            for node in (merge, turn, part):
                edit.erase(node)
            done += 1
        edit.commit()
        return done


def _objection(
    turn: Node,
    part: Node | None,
    merge: Node | None,
    kind: tuple[str, int, int],
    opset: int,
    shapes: Shapes,
    edit: Editor,
) -> str | None:
    """Why the three are no DepthToSpace, or None."""
    _, since, first = kind
    if opset < since:
        return f"opset {opset} has no mode"
    if part is None or merge is None or part.op != "Reshape" or merge.op != "Reshape":
        return "no Reshape on both sides"
    if edit.sole_consumer(turn.inputs[0]) is not turn:
        return f"{turn.inputs[0].name!r} is read by others too"
    if len({id(edit.graph_of(n)) for n in (part, turn, merge)}) > 1:
        return "its parts lie in different graphs"
    source, six, target = (shapes.shape(t) for t in (part.inputs[0], turn.inputs[0], merge.outputs[0]))
    if source is None or six is None or target is None or len(source) != 4 or len(six) != 6 or len(target) != 4:
        return "its shapes are not known"
    size = six[first]
    if not isinstance(size, int) or size < 2 or six[first + 1] != size:
        return "the blocks are not square"
    channels = six[1] if first == 2 else six[3]
    if source != (six[0], channels * size * size, six[4], six[5]) or target != (
        six[0],
        channels,
        six[4] * size,
        six[5] * size,
    ):
        return "the Reshapes part or merge other axes"
    return None
