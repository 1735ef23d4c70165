"""The sanctioned mutations of a model: by identity, with names that stay unique and outputs that keep theirs.

An `Editor` lives as long as one pass. It indexes the model once, so that every question is O(1), and puts its changes in
place when `commit` is called (the pass driver does): erased nodes leave their lists in one sweep, and inserted ones are sorted
in near the node they were made for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.ir import Constant, Graph, Model, Node, Variable, fresh_names, subgraphs


class Editor:
    """All changes that one pass makes to one model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.fresh_name = fresh_names(model)
        self._graph_of: dict[int, Graph] = {}
        self._position: dict[int, tuple[int, int]] = {}
        self._output_of: dict[int, Graph] = {}
        self._inputs: set[int] = set()
        self._erased: set[int] = set()
        self._inserted: list[Node] = []
        for graph in model.graphs():
            self._inputs.update(id(t) for t in graph.inputs)
            self._output_of.update((id(t), graph) for t in graph.outputs)
            for index, node in enumerate(graph.nodes):
                self._graph_of[id(node)] = graph
                self._position[id(node)] = (index, 0)

    # ------------------------------------------------------------------------------------------------ questions

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether some graph, the root or a body, returns `tensor`."""
        return id(tensor) in self._output_of

    def is_input(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is an input of the root graph or of a body."""
        return id(tensor) in self._inputs

    def is_fixed(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is a constant that no caller can override."""
        return isinstance(tensor, gs.Constant) and id(tensor) not in self._inputs

    def graph_of(self, node: gs.Node) -> Graph:
        """The graph that holds `node`."""
        return self._graph_of[id(node)]

    def is_erased(self, node: gs.Node) -> bool:
        """Whether `node` was erased by this pass."""
        return id(node) in self._erased

    def producer(self, tensor: gs.Tensor) -> Node | None:
        """The node that computes `tensor`, or None for inputs, constants and absent operands."""
        return tensor.inputs[0] if tensor.inputs else None

    def sole_consumer(self, tensor: gs.Tensor) -> Node | None:
        """The one node that reads `tensor`, once, when no graph returns it; else None. A use inside a body counts."""
        if self.is_output(tensor) or len(tensor.outputs) != 1:
            return None
        return tensor.outputs[0]  # type: ignore[no-any-return]

    # -------------------------------------------------------------------------------------------------- changes

    def constant(self, wish: str, values: np.ndarray[Any, Any]) -> Constant:
        """A new initializer with a fresh name near `wish`."""
        return Constant(self.fresh_name(wish), values)

    def variable(self, wish: str, like: gs.Tensor | None = None) -> Variable:
        """A new intermediate value with a fresh name near `wish`, of the dtype and shape of `like`."""
        dtype, shape = (like.dtype, like.shape) if like is not None else (None, None)
        return Variable(self.fresh_name(wish), dtype, None if shape is None else tuple(shape))

    def insert_before(self, anchor: gs.Node, node: Node, origin: Iterable[gs.Node] = ()) -> Node:
        """Put `node` into the graph of `anchor`, ahead of it; `origin` are the nodes it stands for (default: the anchor)."""
        return self._insert(anchor, node, -1, origin)

    def insert_after(self, anchor: gs.Node, node: Node, origin: Iterable[gs.Node] = ()) -> Node:
        """Put `node` into the graph of `anchor`, behind it; `origin` as in `insert_before`."""
        return self._insert(anchor, node, 1, origin)

    def _insert(self, anchor: gs.Node, node: Node, side: int, origin: Iterable[gs.Node]) -> Node:
        self._graph_of[id(node)] = self._graph_of[id(anchor)]
        index, step = self._position[id(anchor)]
        self._position[id(node)] = (index, step + side)
        names: dict[str, None] = {}
        for source in [*origin] or [anchor]:
            names.update(dict.fromkeys(getattr(source, "origin", ()) or (source.name,)))
        node.origin = tuple(names)
        if node.name:
            node.name = self.fresh_name(node.name)
        self._inserted.append(node)
        return node

    def can_replace(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Whether `replace_uses` can be done without an Identity node.

        It cannot when a graph returns `old` and `new` has a name of its own to keep (an input, an initializer, an output), or
        is produced in another graph.
        """
        if not self.is_output(old):
            return True
        node = self.producer(new)
        return (
            node is not None
            and not self.is_output(new)
            and not self.is_input(new)
            and self._graph_of.get(id(node)) is self._output_of[id(old)]
        )

    def replace_uses(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let every reader of `old` read `new`. If a graph returns `old`, the producer of `new` writes `old` from now on.

        `can_replace` must hold. What was known about the type of the vanishing tensor passes to the one that stays.
        """
        if self.is_output(old):
            producer = self.producer(new)
            assert producer is not None
            old_producer = self.producer(old)
            if old_producer is not None:
                _swap(old_producer.outputs, old, Variable(self.fresh_name(f"{old.name}_unused")))
            _swap(producer.outputs, new, old)
            old, new = new, old
        for consumer in list(old.outputs):
            _swap(consumer.inputs, old, new)
        if not isinstance(new, gs.Constant) and getattr(old, "type", "tensor_type") == getattr(
            new, "type", "tensor_type"
        ):
            new.dtype = new.dtype if new.dtype is not None else old.dtype
            new.shape = new.shape if new.shape is not None else old.shape

    def erase(self, node: gs.Node) -> None:
        """Take `node` out of its graph; nothing may read its outputs any more."""
        self._erased.add(id(node))
        node.inputs.clear()
        node.outputs.clear()

    def commit(self) -> None:
        """Put the changes in place: one sweep over the node lists."""
        if not self._erased and not self._inserted:
            return
        touched: dict[int, tuple[Graph, list[Node]]] = {}
        for node in self._inserted:
            if id(node) not in self._erased:
                graph = self._graph_of[id(node)]
                touched.setdefault(id(graph), (graph, []))[1].append(node)
        for graph in self.model.graphs():
            kept = [n for n in graph.nodes if id(n) not in self._erased]
            added = touched.get(id(graph), (graph, []))[1]
            if added:
                kept = sorted(kept + added, key=lambda n: self._position.get(id(n), (1 << 60, 0)))
            graph.nodes = kept
        self._inserted = []
        self._erased = set()


def _swap(tensors: Any, old: gs.Tensor, new: gs.Tensor) -> None:
    """Replace `old` by `new`, by identity, in the inputs or outputs of a node."""
    for index, tensor in enumerate(tensors):
        if tensor is old:
            tensors[index] = new


# ---------------------------------------------------------------------------------------------- whole-model clean-up


def captures(graph: Graph) -> dict[int, gs.Tensor]:
    """Values that `graph` and the bodies in it read from outside, by id."""
    inside: set[int] = set()
    read: dict[int, gs.Tensor] = {}
    pending = [graph]
    while pending:
        current = pending.pop()
        inside.update(id(t) for t in [*current.inputs, *current.initializers])
        for node in current.nodes:
            inside.update(id(t) for t in node.outputs)
            read.update((id(t), t) for t in node.inputs)
            pending.extend(subgraphs(node))
        read.update((id(t), t) for t in current.outputs)
    return {key: tensor for key, tensor in read.items() if key not in inside and tensor.name}


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """The operands of `node` and the outer values that its bodies capture."""
    yield from node.inputs
    for body in subgraphs(node):
        yield from captures(body).values()


def sort(graph: Graph) -> list[gs.Node]:
    """Bring the nodes of `graph` into topological order, moving as few as possible; bodies are not entered.

    Returns:
        The nodes on a cycle: empty when all is well, and the order is then in place.
    """
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    waiting: dict[int, int] = {}
    readers: dict[int, list[gs.Node]] = {}
    sorted_already = True
    for index, node in enumerate(graph.nodes):
        sources = {position[id(p)] for t in reads(node) for p in t.inputs if id(p) in position}
        waiting[index] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(node)
            sorted_already = sorted_already and source < index
    if sorted_already:
        return []
    ready = [index for index, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order: list[gs.Node] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(graph.nodes[index])
        for reader in readers.get(index, ()):
            at = position[id(reader)]
            waiting[at] -= 1
            if waiting[at] == 0:
                heapq.heappush(ready, at)
    if len(order) < len(graph.nodes):
        done = {id(n) for n in order}
        return [n for n in graph.nodes if id(n) not in done]
    graph.nodes = order
    return []


def remove_dead(model: Model) -> int:
    """Remove nodes whose results nobody reads and initializers that nothing uses; returns how many of both.

    Graph inputs and outputs stay. The graphs must be sorted.
    """
    live: set[int] = set()
    removed = 0

    def sweep(graph: Graph) -> None:
        nonlocal removed
        live.update(id(t) for t in graph.outputs)
        kept: list[gs.Node] = []
        for node in reversed(graph.nodes):
            if not any(id(t) in live for t in node.outputs):
                node.inputs.clear()
                node.outputs.clear()
                for body in subgraphs(node):
                    _disconnect(body)
                removed += 1
                continue
            live.update(id(t) for t in node.inputs)
            for body in subgraphs(node):
                sweep(body)
            kept.append(node)
        if len(kept) < len(graph.nodes):
            graph.nodes = kept[::-1]

    sweep(model.graph)
    for graph in model.graphs():
        inputs = {id(t) for t in graph.inputs}
        kept = [c for c in graph.initializers if id(c) in live or id(c) in inputs]
        removed += len(graph.initializers) - len(kept)
        graph.initializers = kept
    return removed


def _disconnect(graph: Graph) -> None:
    for node in graph.nodes:
        for body in subgraphs(node):
            _disconnect(body)
        node.inputs.clear()
        node.outputs.clear()
    graph.nodes = []


def cleanup(model: Model) -> None:
    """What the driver does after a pass that changed something: sort every graph, drop what became dead."""
    for graph in model.graphs():
        sort(graph)
    remove_dead(model)


def name_nodes(nodes: Sequence[gs.Node], fresh_name: Any) -> None:
    """Give every unnamed node a name, so that errors and kernels can point at it."""
    for node in nodes:
        if not node.name:
            node.name = fresh_name(f"{node.op}_{node.outputs[0].name}" if node.outputs else node.op)
