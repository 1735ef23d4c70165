"""The sanctioned mutations of a model: by identity, with names that stay unique and outputs that keep theirs.

An `Editor` lives as long as one pass. It indexes the model once, so that every question is O(1), and puts its changes in
place when `commit` is called (a pass does, at its end): erased nodes leave their lists in one sweep, and inserted ones come to
stand beside the node they were made for.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.errors import VerifyError
from graphopt.ir import Constant, Graph, Model, Node, Variable, clone_graph, fresh_names, subgraphs, walk

_MAX_ORIGIN = 256  # names; a chain of thousands folded one by one would carry all of them through every step
_MANY = 64  # readers or operands from which one search for each change would be quadratic


class Editor:
    """All changes that one pass makes to one model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._graph_of: dict[int, Graph] = {}
        self._output_of: dict[int, Graph] = {}
        self._inputs: set[int] = set()
        self._erased: dict[int, gs.Node] = {}  # the nodes are kept, so that no id is used again
        self._next: dict[int, gs.Node] = {}  # inserted nodes and their anchors, chained in their new order
        self._previous: dict[int, gs.Node] = {}
        self._last_behind: dict[int, gs.Node] = {}  # by anchor, what `insert_after` put there last
        self._crowded: dict[int, gs.Tensor] = {}  # tensors that erased nodes still count as readers of, until `commit`
        self._operands: dict[int, dict[int, list[int]]] = {}  # nodes with many operands: where each is read
        for graph in model.graphs():
            self._inputs.update(id(t) for t in graph.inputs)
            self._output_of.update((id(t), graph) for t in graph.outputs)
            self._graph_of.update((id(node), graph) for node in graph.nodes)

    @functools.cached_property
    def fresh_name(self) -> Callable[[str], str]:
        """Turns a wish into a name that the model does not use; all names are collected when the first is asked for."""
        return fresh_names(self.model)

    # ------------------------------------------------------------------------------------------------ questions

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether some graph, the root or a body, returns `tensor`."""
        return id(tensor) in self._output_of

    def output_of(self, tensor: gs.Tensor) -> Graph | None:
        """The graph, the root or a body, that returns `tensor`; None: no graph does."""
        return self._output_of.get(id(tensor))

    def is_input(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is an input of the root graph or of a body."""
        return id(tensor) in self._inputs

    def is_fixed(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is a constant that no caller can override, as `Model.is_fixed`."""
        return isinstance(tensor, gs.Constant) and (id(tensor) not in self._inputs or self.model.ir_version < 4)

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
        """Put `node` right ahead of `anchor`, in its graph; `origin` are the nodes it stands for (default: the anchor)."""
        self._adopt(anchor, node, origin)
        previous = self._previous.get(id(anchor))
        if previous is not None:
            self._chain(previous, node)
        self._chain(node, anchor)
        return node

    def insert_after(self, anchor: gs.Node, node: Node, origin: Iterable[gs.Node] = ()) -> Node:
        """Put `node` behind `anchor` and what was put there before, in its graph; `origin` as in `insert_before`."""
        self._adopt(anchor, node, origin)
        last = self._last_behind.get(id(anchor), anchor)
        following = self._next.get(id(last))
        if following is not None:
            self._chain(node, following)
        self._chain(last, node)
        self._last_behind[id(anchor)] = node
        return node

    def take_over(self, result: gs.Tensor, new: Node, origin: Iterable[gs.Node]) -> None:
        """Let `new`, without outputs yet, compute `result`; what computed it until now is erased, and its name goes before that of `new`."""
        last = self.producer(result)
        if last is None:
            raise ValueError(f"no node computes {result.name!r}")
        last.outputs.clear()
        new.outputs.append(result)
        new.name = f"{last.name}_{new.name}"
        self.insert_before(last, new, origin)
        self.erase(last)

    def _adopt(self, anchor: gs.Node, node: Node, origin: Iterable[gs.Node]) -> None:
        self._graph_of[id(node)] = self._graph_of[id(anchor)]
        names: dict[str, None] = {}
        for source in [*origin] or [anchor]:
            names.update(dict.fromkeys(getattr(source, "origin", ()) or (source.name,)))
        node.origin = tuple(itertools.islice(names, _MAX_ORIGIN))
        if node.name:
            node.name = self.fresh_name(node.name)

    def _chain(self, first: gs.Node, second: gs.Node) -> None:
        self._next[id(first)] = second
        self._previous[id(second)] = first

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
        """Let every reader of `old`, bodies included, read `new`. If a graph returns `old`, the producer of `new` writes `old`
        from now on.

        `can_replace` must hold. What was known about the type of the vanishing tensor passes to the one that stays.
        """
        if old is new:
            return
        if self.is_output(old):
            producer = self.producer(new)
            assert producer is not None
            old_producer = self.producer(old)
            if old_producer is not None:
                _swap(old_producer.outputs, old, Variable(self.fresh_name(f"{old.name}_unused")))
            _swap(producer.outputs, new, old)
            old, new = new, old
        for consumer in {id(n): n for n in old.outputs}.values():
            for index in self._places(
                consumer, old
            ):  # past graphsurgeon, which searches both lists of readers for each use
                list.__setitem__(consumer.inputs, index, new)
                list.append(new.outputs, consumer)
        list.clear(old.outputs)
        if not isinstance(new, gs.Constant) and getattr(old, "type", "tensor_type") == getattr(
            new, "type", "tensor_type"
        ):
            new.dtype = new.dtype if new.dtype is not None else old.dtype
            new.shape = new.shape if new.shape is not None else old.shape

    def _places(self, node: gs.Node, tensor: gs.Tensor) -> list[int]:
        """Where `node` reads `tensor`; indexed for nodes with many operands, of which many may be replaced one by one."""
        if len(node.inputs) <= _MANY:
            return [index for index, operand in enumerate(node.inputs) if operand is tensor]
        index_of = self._operands.get(id(node), {})
        places = index_of.pop(id(tensor), [])
        if not places or any(i >= len(node.inputs) or node.inputs[i] is not tensor for i in places):
            index_of = {}
            for index, operand in enumerate(node.inputs):
                index_of.setdefault(id(operand), []).append(index)
            self._operands[id(node)] = index_of
            places = index_of.pop(id(tensor), [])
        return places

    def unpack(self, anchor: gs.Node, body: Graph, arguments: Sequence[gs.Tensor] = ()) -> list[gs.Tensor]:
        """Move the nodes of `body` right ahead of `anchor`, into its graph; `arguments` take the place of the inputs of `body`.

        `body` is one of the anchor's bodies, or a graph that the model does not hold; it is empty afterwards, and its constants
        belong to the root. Names that the model uses elsewhere give way to fresh ones.

        Returns:
            What stands for the outputs of `body`: values computed here, or arguments, constants and captured values.
        """
        foreign = not any(g is body for g in subgraphs(anchor))
        results = list(body.outputs)
        inner = [g for node in body.nodes for nested in subgraphs(node) for g in walk(nested)]
        for formal, actual in zip(body.inputs, arguments, strict=True):
            for consumer in {id(n): n for n in formal.outputs}.values():
                for index, tensor in enumerate(consumer.inputs):
                    if tensor is formal:
                        consumer.inputs[index] = actual
            for returned in (results, *(g.outputs for g in inner)):
                returned[:] = [actual if t is formal else t for t in returned]
        made = [t for node in body.nodes for t in node.outputs if t.name]
        for tensor in [*made, *body.initializers]:
            if foreign or self._definitions[tensor.name] > 1:
                self._definitions[tensor.name] -= not foreign
                tensor.name = self.fresh_name(tensor.name)
                self._definitions[tensor.name] += 1
        for graph in inner if foreign else ():
            self._inputs.update(id(t) for t in graph.inputs)
            self._output_of.update((id(t), graph) for t in graph.outputs)
            self._graph_of.update((id(node), graph) for node in graph.nodes)
            defined = [*graph.inputs, *graph.initializers, *(t for node in graph.nodes for t in node.outputs)]
            for tensor in {id(t): t for t in defined if t.name}.values():
                tensor.name = self.fresh_name(tensor.name)
                self._definitions[tensor.name] += 1
        returned_inside = {id(t) for graph in inner for t in graph.outputs}
        for tensor in made:
            if id(tensor) not in returned_inside:
                self._output_of.pop(id(tensor), None)
        for node in body.nodes:
            self._graph_of[id(node)] = self._graph_of[id(anchor)]
            if foreign and node.name:
                node.name = self.fresh_name(node.name)
            elif not node.name:
                name_nodes([node], self.fresh_name)
            previous = self._previous.get(id(anchor))
            if previous is not None:
                self._chain(previous, node)
            self._chain(node, anchor)
        body.nodes, body.initializers, body.outputs = [], [], []
        return results

    @functools.cached_property
    def _definitions(self) -> Counter[str]:
        """How many tensors are defined under each name; two bodies may use one name."""
        found: Counter[str] = Counter()
        for graph in self.model.graphs():
            found.update({id(t): t.name for t in [*graph.inputs, *graph.initializers]}.values())
            found.update(t.name for node in graph.nodes for t in node.outputs)
        return found

    def replace_node(self, node: gs.Node, results: Sequence[gs.Tensor]) -> None:
        """Let `results` stand for the outputs of `node`, by Identity where a name has to be kept, and erase it."""
        renamed: dict[int, gs.Tensor] = {}
        for old, result in list(zip(node.outputs, results, strict=False)):
            if not old.name:
                continue
            new = renamed.get(id(result), result)
            if not self.can_replace(old, new):
                copy = Node("Identity", f"{node.name}_identity", None, [new], [self.variable(old.name, old)])
                self.replace_uses(old, self.insert_after(node, copy).outputs[0])
                continue
            self.replace_uses(old, new)
            if self.is_output(old):
                renamed[id(result)] = old
        self.erase(node)

    def erase(self, node: gs.Node) -> None:
        """Take `node` and its bodies out of the model; nothing may read its outputs any more.

        A tensor with many readers goes on counting it as one until `commit`, so that erasing costs no search.
        """
        pending = [node]
        while pending:
            current = pending.pop()
            self._erased[id(current)] = current
            for body in subgraphs(current):
                pending.extend(body.nodes)
            for tensor in {id(t): t for t in current.inputs}.values():
                if len(tensor.outputs) > _MANY:  # searching its readers for each erased one would be quadratic
                    self._crowded[id(tensor)] = tensor
                else:
                    _drop_readers(tensor, {id(current)})
            list.clear(current.inputs)
            current.outputs.clear()

    def commit(self) -> None:
        """Put the changes in place: one sweep over the node lists."""
        if not self._erased and not self._next:
            return
        for tensor in self._crowded.values():
            _drop_readers(tensor, self._erased)
        for graph in self.model.graphs():
            order: list[gs.Node] = []
            for anchor in graph.nodes:
                node = anchor
                while (previous := self._previous.get(id(node))) is not None:
                    node = previous
                following: gs.Node | None = node
                while following is not None:
                    if id(following) not in self._erased:
                        order.append(following)
                    following = self._next.get(id(following))
            graph.nodes = order
        for key in self._erased:
            self._graph_of.pop(key, None)
        for table in (self._erased, self._next, self._previous, self._last_behind, self._crowded, self._operands):
            table.clear()


def _drop_readers(tensor: gs.Tensor, gone: Container[int]) -> None:
    """Take nodes, by id, off the tensor's own list of readers alone."""
    kept = [node for node in tensor.outputs if id(node) not in gone]
    list.clear(tensor.outputs)
    list.extend(tensor.outputs, kept)


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


def copy_body(body: Graph, shared: Iterable[gs.Tensor] = ()) -> Graph:
    """A copy of `body` for `Editor.unpack`; it reads the same captured values, and the `shared` ones of its own."""
    return clone_graph(body, {id(t): t for t in [*captures(body).values(), *shared]})


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """The operands of `node` and the outer values that its bodies capture."""
    yield from node.inputs
    for body in subgraphs(node):
        yield from captures(body).values()


def sort(graph: Graph) -> list[gs.Node]:
    """Bring the nodes of `graph` into topological order, as near to the one they have as may be; bodies are not entered.

    Returns:
        The nodes of a cycle, each read by the next: empty when all is well, and the order is then in place.
    """
    nodes = graph.nodes
    position = {id(node): index for index, node in enumerate(nodes)}
    sources = [{position[id(p)] for t in reads(node) for p in t.inputs if id(p) in position} for node in nodes]
    if all(source < index for index, found in enumerate(sources) for source in found):
        return []
    readers: list[list[int]] = [[] for _ in nodes]
    for index, found in enumerate(sources):
        for source in found:
            readers[source].append(index)
    waiting = [len(found) for found in sources]
    ready = [index for index, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        return [nodes[index] for index in _cycle(sources, waiting)]
    graph.nodes = [nodes[index] for index in order]
    return []


def _cycle(sources: list[set[int]], waiting: list[int]) -> list[int]:
    """A cycle among those that wait for ever: each of them has a source that waits, too, so walking back must end in one."""
    index = next(i for i, count in enumerate(waiting) if count)
    seen: dict[int, int] = {}
    path: list[int] = []
    while index not in seen:
        seen[index] = len(path)
        path.append(index)
        index = min(s for s in sources[index] if waiting[s])
    return path[seen[index] :][::-1]


def remove_dead(model: Model) -> int:
    """Remove nodes whose results nobody reads and initializers that nothing uses; returns how many of both.

    Graph inputs and outputs stay. The graphs must be sorted.
    """
    live: set[int] = set()
    dead: list[gs.Node] = []

    def sweep(graph: Graph) -> None:
        live.update(id(t) for t in graph.outputs)
        kept: list[gs.Node] = []
        for node in reversed(graph.nodes):
            if any(id(t) in live for t in node.outputs):
                live.update(id(t) for t in node.inputs)
                for body in subgraphs(node):
                    sweep(body)
                kept.append(node)
            else:
                dead.append(node)
        if len(kept) < len(graph.nodes):
            graph.nodes = kept[::-1]

    sweep(model.graph)
    removed = len(dead)
    _unlink(dead)
    for graph in model.graphs():
        inputs = {id(t) for t in graph.inputs}
        kept = [c for c in graph.initializers if id(c) in live or id(c) in inputs]
        removed += len(graph.initializers) - len(kept)
        graph.initializers = kept
    return removed


def _unlink(nodes: list[gs.Node]) -> None:
    """Take `nodes` and those in their bodies off their tensors, each tensor's readers being searched once."""
    gone: dict[int, gs.Node] = {}
    pending = [*nodes]
    while pending:
        node = pending.pop()
        gone[id(node)] = node
        for body in subgraphs(node):
            pending.extend(body.nodes)
            body.nodes = []
    read = {id(t): t for node in gone.values() for t in node.inputs}
    made = {id(t): t for node in gone.values() for t in node.outputs}
    for tensor in read.values():
        list.__setitem__(tensor.outputs, slice(None), [n for n in tensor.outputs if id(n) not in gone])
    for tensor in made.values():
        list.__setitem__(tensor.inputs, slice(None), [n for n in tensor.inputs if id(n) not in gone])
    for node in gone.values():
        list.clear(node.inputs)
        list.clear(node.outputs)


def cleanup(model: Model) -> None:
    """What the driver does after a pass that changed something: sort every graph, drop what became dead.

    Raises:
        VerifyError: a graph has a cycle.
    """
    for graph in model.graphs():
        cycle = sort(graph)
        if cycle:
            raise VerifyError(f"graph {graph.name!r} has a cycle through {cycle_text(cycle)}")
    remove_dead(model)


def cycle_text(cycle: Sequence[gs.Node]) -> str:
    """The first nodes of a cycle, for messages."""
    names = [f"{n.name!r} ({n.op})" for n in cycle[:4]]
    return ", ".join(names + ["..."] * (len(cycle) > 4))


def name_nodes(nodes: Sequence[gs.Node], fresh_name: Callable[[str], str]) -> None:
    """Give every unnamed node a name, so that errors and kernels can point at it."""
    for node in nodes:
        if not node.name:
            node.name = fresh_name(f"{node.op}_{node.outputs[0].name}" if node.outputs else node.op)
