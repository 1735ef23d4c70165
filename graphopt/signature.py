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
        self._key: list[Any] = [model.carried.SerializeToString(deterministic=True)]
        for function in model.functions:
            self._alive.append(function.carried)
            self._key.append(id(function.carried))  # never changed in place
        self._graph(model.graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self._key == other._key

    def _graph(self, graph: Graph) -> None:
        for tensors in (graph.inputs, graph.initializers, graph.outputs):
            self._key.append(len(tensors))
            for tensor in tensors:
                self._tensor(tensor)
        self._key.append(len(graph.nodes))
        for node in graph.nodes:
            self._node(node)

    def _node(self, node: gs.Node) -> None:
        key = self._key
        key += (node.op, node.domain, node.name, len(node.inputs), len(node.outputs), len(node.attrs))
        for tensor in node.inputs:
            key.append(tensor.name)
            if isinstance(tensor, gs.Constant):
                self._alive.append(tensor._values)
                key.append(id(tensor._values))
        for tensor in node.outputs:
            self._tensor(tensor)
        for name, value in node.attrs.items():
            key.append(name)
            self._attribute(value)

    def _tensor(self, tensor: gs.Tensor) -> None:
        if isinstance(tensor, gs.Constant):
            self._alive.append(tensor._values)
            self._key += (tensor.name, id(tensor._values))
        else:
            shape = tensor.shape
            self._key += (tensor.name, tensor.dtype, None if shape is None else tuple(shape), tensor.type)

    def _attribute(self, value: Any) -> None:
        kind = type(value)
        if kind is int or kind is str:
            self._key += (kind, value)
        elif isinstance(value, gs.Graph):
            self._graph(value)
        elif isinstance(value, gs.Constant):
            self._tensor(value)
        elif isinstance(value, onnx.AttributeProto):
            self._key.append(value.SerializeToString(deterministic=True))
        elif isinstance(value, list | tuple):
            self._key += (kind, len(value))
            for each in value:
                self._attribute(each)
        elif isinstance(value, np.ndarray):
            self._key.append(value.tobytes())
        else:
            self._key.append(repr(value))  # -0.0 is not 0.0, NaN is itself
