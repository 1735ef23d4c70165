"""Did a pass change the graph? A cheap, exact answer: structure by value, weights by identity."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.ir import Graph, Model


class Signature:
    """A snapshot of a model that costs O(nodes) and reads no weights.

    Two snapshots of one model are equal when no node, operand, attribute, name, dtype, shape or constant changed in between.
    Constants are compared by the identity of their values, which never change in place.
    """

    def __init__(self, model: Model) -> None:
        self._alive: list[Any] = []  # so that no id is used again while this snapshot lives
        self._alive.extend(f.carried for f in model.functions)
        functions = tuple(id(f.carried) for f in model.functions)  # never changed in place
        self._key = (functions, self._graph(model.graph), model.carried.SerializeToString(deterministic=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def _graph(self, graph: Graph) -> tuple[Any, ...]:
        return (
            tuple(map(self._tensor, graph.inputs)),
            tuple(map(self._tensor, graph.initializers)),
            tuple(map(self._node, graph.nodes)),
            tuple(map(self._tensor, graph.outputs)),
        )

    def _node(self, node: gs.Node) -> tuple[Any, ...]:
        inputs = tuple(self._tensor(t) if isinstance(t, gs.Constant) else t.name for t in node.inputs)
        attributes = tuple((name, self._attribute(value)) for name, value in node.attrs.items())
        return node.op, node.domain, node.name, inputs, tuple(map(self._tensor, node.outputs)), attributes

    def _tensor(self, tensor: gs.Tensor) -> tuple[Any, ...]:
        if isinstance(tensor, gs.Constant):
            self._alive.append(tensor._values)
            return tensor.name, id(tensor._values)
        return tensor.name, tensor.dtype, None if tensor.shape is None else tuple(tensor.shape), tensor.type

    def _attribute(self, value: Any) -> Any:
        if isinstance(value, gs.Graph):
            return self._graph(value)
        if isinstance(value, gs.Constant):
            return self._tensor(value)
        if isinstance(value, onnx.AttributeProto):
            return value.SerializeToString(deterministic=True)
        if isinstance(value, list | tuple):
            return tuple(map(self._attribute, value))
        if isinstance(value, np.ndarray):
            return value.tobytes()
        return repr(value)
