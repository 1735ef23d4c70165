"""Which branch of an If cannot be taken in a run that succeeds, told by the ranks that readers of its results demand.

Exporters write ``if rank(x) == 2: x = unsqueeze(x)`` as an If, whose result has no rank of its own: the ranks of its branches differ. But an
LSTM reads three dimensions and nothing else, and a reader in the same graph runs whenever the If does. So a branch that
gives another rank fails in every run, and the other one is what is computed.
"""

from __future__ import annotations

from typing import Final

import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Graph, Node, subgraphs

Ranks = frozenset[int]

_DEMANDS: Final = {
    **{(op, place): 3 for op in ("LSTM", "GRU", "RNN") for place in (0, 5)},
    ("LSTM", 6): 3,
    ("Gemm", 0): 2,
    ("Gemm", 1): 2,
}
_KEEPS: Final = frozenset(
    ["Identity", "Cast", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Neg", "Abs", "Exp", "Sqrt", "Erf", "Softmax", "Clip"]
)
_DEPTH: Final = 16  # nodes that are looked through, in either direction


class RankDemands:
    """Possible and demanded ranks around the Ifs of a model."""

    def __init__(self, edit: Editor, shapes: Shapes) -> None:
        self.edit = edit
        self.shapes = shapes

    def impossible(self, node: Node, branch: Graph) -> bool:
        """Whether a run in which `node` takes `branch` cannot succeed."""
        for outer, inner in zip(node.outputs, branch.outputs, strict=True):
            demanded = self.demanded(outer, self.edit.graph_of(node))
            possible = self.possible(inner) if demanded is not None else None
            if possible is not None and demanded not in possible:
                return True
        return False

    def possible(self, tensor: gs.Tensor, depth: int = _DEPTH) -> Ranks | None:
        """The ranks that `tensor` may have; None: any."""
        rank = self.shapes.rank(tensor)
        if rank is not None:
            return frozenset({rank})
        node = self.edit.producer(tensor)
        if node is None or not node.is_onnx or not depth:
            return None
        if node.op == "If":
            place = next(i for i, t in enumerate(node.outputs) if t is tensor)
            found = [self.possible(body.outputs[place], depth - 1) for body in subgraphs(node)]
            return None if any(f is None for f in found) else frozenset().union(*(f for f in found if f is not None))
        change = self._change(node)
        before = self.possible(node.inputs[0], depth - 1) if change is not None else None
        return None if before is None or change is None else frozenset(r + change for r in before)

    def demanded(self, tensor: gs.Tensor, graph: Graph, depth: int = _DEPTH) -> int | None:
        """The rank that a node of `graph` demands of `tensor`; None where nobody says."""
        if not depth:
            return None
        for reader in tensor.outputs:
            if self.edit.graph_of(reader) is not graph or not reader.is_onnx:
                continue
            for place, operand in enumerate(reader.inputs):
                if operand is not tensor:
                    continue
                found = _DEMANDS.get((reader.op, place))
                if reader.op in ("Conv", "ConvTranspose") and place == 0:
                    found = self.shapes.rank(reader.inputs[1])
                if reader.op == "Transpose" and "perm" in reader.attrs:
                    found = len(reader.attrs["perm"])
                if found is None and place == 0 and (change := self._change(reader)) is not None:
                    after = self.demanded(reader.outputs[0], graph, depth - 1)
                    found = None if after is None else after - change
                if found is not None:
                    return found
        return None

    def _change(self, node: Node) -> int | None:
        """By how much the result's rank exceeds the first operand's, where the node says."""
        if node.op in _KEEPS:
            return 0
        if node.op not in ("Squeeze", "Unsqueeze"):
            return None
        axes = node.attrs.get("axes")
        if axes is None and len(node.inputs) > 1 and node.inputs[1].name:
            axes = self.shapes.integers(node.inputs[1])
        return None if axes is None else len(axes) if node.op == "Unsqueeze" else -len(axes)


__all__ = ["RankDemands", "Ranks"]
