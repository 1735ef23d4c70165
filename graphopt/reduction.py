"""The smallest model that still fails: parts are left out, and what is left is judged, until nothing more can go.

*Nodes* go in ever smaller runs of neighbours (delta debugging, Zeller and Hildebrandt 2002). What a kept node reads from one that went
becomes an input of the model, or, where it is a small integer (a shape, an index) whose value a run of the original shows, a constant.
Then *outputs*, *dimensions* (every occurrence of a size at once, in inputs and weights), *values* of weights (all zero) and what is only
*told* of the model go. Whatever is judged has passed the verifier, and onnx.checker where the original does. No choice is left to chance,
so the same model and command give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import equivalence, interface, verify
from graphopt.analyses.shapes import Shapes
from graphopt.errors import GraphoptError, UnsupportedModel, UserError
from graphopt.evaluate import Arrays
from graphopt.ir import Constant, Graph, Model, Node, Variable, subgraphs, walk
from graphopt.layers import Tapped
from graphopt.verdict import Command, Judge, Verdict

Array = np.ndarray[Any, Any]
_SMALL: Final = 1024  # elements of an integer tensor that may become a constant
_PLAIN: Final = 16  # elements of a weight whose values are left as they are


@dataclass(frozen=True)
class _Fact:
    """What is known of a tensor that a part of the model may get as an input."""

    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    value: Array | None  # of small integer tensors


class OutOfRuns(Exception):
    """The cap on runs is reached."""


class Reduction:
    """Shrinks one model as long as a judge calls it bad.

    Attributes:
        best: the smallest bad model so far.
        runs: of the judge.
        stopped: whether a cap ended the search.
    """

    def __init__(
        self,
        model: Model,
        judge: Judge,
        *,
        feeds: Arrays | None = None,
        seed: int = 0,
        most: int = 1000,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`feeds` are inputs of the model, by default generated from `seed`; `most` caps the runs; `say` hears of each success."""
        self.best, self.judge, self.most, self._say = model, judge, most, say
        self.runs, self.stopped = 0, False
        self._feeds, self._seed = feeds, seed
        self._strict = _is_valid(model, True)

    def run(self) -> Model:
        """Reduce until nothing more can go, or the cap is reached.

        Raises:
            UserError: the model does not fail to begin with.
        """
        verdict, reason = self.judge.judge(self.best)
        self.runs += 1
        if verdict is Verdict.UNKNOWN and isinstance(self.judge, Command) and reason.startswith("killed"):
            self.judge.hangs_are_bad = True  # a hang is what is looked for
        elif verdict is not Verdict.BAD:
            raise UserError(
                f"the command does not fail on the model ({reason}), so there is nothing to reduce; it must exit with another code than "
                "0 and 125 where the failure shows"
            )
        try:
            while True:
                size = self.size()
                for stage in (self._nodes, self._outputs, self._told, self._dims, self._values):
                    stage()
                if self.size() == size:
                    return self.best
        except OutOfRuns:
            self.stopped = True
            return self.best

    def size(self) -> tuple[int, int, int, int]:
        """What is made smaller: nodes, elements of inputs and weights, outputs, values that are not zero (as far as they are looked at)."""
        constants = self.best.constants()
        elements = sum(math.prod(c.shape) for c in constants)
        elements += sum(math.prod(d if isinstance(d, int) else 2 for d in s.shape or ()) for s in self.best.inputs)
        plain = sum(1 for c in constants if _is_plain(c))
        return sum(1 for _ in self.best.nodes()), elements, len(self.best.outputs), len(constants) - plain

    def _try(self, candidate: Model | None, what: str) -> bool:
        """Whether `candidate` is valid and still bad; it is the best then."""
        if candidate is None or not _is_valid(candidate, self._strict):
            return False
        if self.runs >= self.most:
            raise OutOfRuns
        self.runs += 1
        if self.judge.judge(candidate)[0] is not Verdict.BAD:
            return False
        self.best = candidate
        nodes, elements, *_ = self.size()
        self._say(f"{nodes} nodes, {elements:,} elements of inputs and weights: {what}")
        return True

    def _nodes(self) -> None:
        facts = _facts(self.best, self._feeds, self._seed)
        size = max(1, len(self.best.graph.nodes) // 2)
        while True:
            at = len(self.best.graph.nodes)
            went = False
            while at > 0:  # from the end, where what goes leaves nothing to replace
                low = max(0, at - size)
                chosen = range(low, at)
                if len(chosen) < len(self.best.graph.nodes):
                    went |= self._try(cut(self.best, chosen, facts), f"{len(chosen)} nodes went")
                at = min(low, len(self.best.graph.nodes))
            if size == 1 and not went:
                return
            size = max(1, min(size // 2 if not went or size > 1 else 1, len(self.best.graph.nodes) // 2))

    def _outputs(self) -> None:
        at = len(self.best.graph.outputs) - 1
        while at >= 0 and len(self.best.graph.outputs) > 1:
            candidate = self.best.clone()
            name = candidate.graph.outputs.pop(at).name
            self._try(_tidy(candidate), f"output {name!r} went")
            at -= 1

    def _told(self) -> None:
        """Metadata, doc strings, functions that nobody calls."""
        candidate = self.best.clone()
        del candidate.carried.metadata_props[:]
        for field in ("doc_string", "producer_name", "producer_version", "domain", "model_version"):
            candidate.carried.ClearField(field)
        called = {(n.domain or "", n.op) for n in candidate.nodes()}
        called |= {(n.domain, n.op_type) for f in candidate.functions for n in f.carried.node}
        candidate.graph._functions = [f for f in candidate.functions if (f.carried.domain, f.carried.name) in called]
        if candidate.fingerprint() != self.best.fingerprint():
            self._try(candidate, "metadata went")

    def _dims(self) -> None:
        for name in sorted({d for s in self.best.inputs for d in s.shape or () if isinstance(d, str)}):
            candidate = self.best.clone()
            try:
                interface.rename_dim(candidate, name, 1)
            except GraphoptError:
                continue
            self._try(candidate, f"dimension {name!r} is 1")
        for size in self._sizes():
            for smaller in dict.fromkeys((1, 2, size // 4, size // 2)):
                if 0 < smaller < size and self._try(_resized(self.best, size, smaller), f"{size} became {smaller}"):
                    break

    def _sizes(self) -> list[int]:
        """Dimensions of inputs and weights, the largest first."""
        shapes = [tuple(c.shape) for c in self.best.constants()]
        shapes += [s.shape or () for s in self.best.inputs]
        return sorted({d for shape in shapes for d in shape if isinstance(d, int) and d > 1}, reverse=True)

    def _values(self) -> None:
        names = [c.name for c in self.best.constants() if not _is_plain(c)]
        if len(names) > 1 and self._try(_zeroed(self.best, names), "all weights are 0"):
            return
        for name in names:
            self._try(_zeroed(self.best, [name]), f"weight {name!r} is 0")


def _is_valid(model: Model, strict: bool) -> bool:
    try:
        if verify.structure(model):
            return False
        if strict:
            verify.full(model)
    except (GraphoptError, ValueError, RuntimeError):
        return False
    return True


def _facts(model: Model, feeds: Arrays | None, seed: int) -> dict[str, _Fact]:
    """Type, shape and perhaps value of the tensors of the root graph, told by shape analysis and, where it can be run, by a run."""
    shapes = Shapes(model)
    facts: dict[str, _Fact] = {}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            dtype, dims = shapes.dtype(tensor), shapes.shape(tensor)
            if tensor.name and dtype is not None and dims is not None:
                told = tuple(d if isinstance(d, int) else str(d) if str(d).isidentifier() else None for d in dims)
                facts[tensor.name] = _Fact(np.dtype(dtype), told, None)
    tapped = Tapped(equivalence.seeded(model))
    try:
        sample = feeds if feeds is not None else next(iter(equivalence.input_samples(model, seed=seed)))
        known = {s.name for s in model.inputs}
        sample = {n: a for n, a in sample.items() if n in known}
        for names in tapped.chunks(list(tapped.tensors)):
            for name, value in tapped.run(names, sample).items():
                if isinstance(value, np.ndarray):
                    small = value.dtype.kind in "iub" and value.size <= _SMALL
                    shape = facts[name].shape if name in facts else value.shape
                    facts[name] = _Fact(value.dtype, shape, value.copy() if small else None)
    except (UnsupportedModel, StopIteration):
        pass  # a model that cannot be run: what was declared and inferred has to do
    return facts


def cut(model: Model, gone: Collection[int], facts: dict[str, _Fact]) -> Model | None:
    """A copy of `model` without the root nodes of these indices; None where something that is left needs what nobody can describe.

    What is read of them becomes an input or a constant; nodes that nobody reads any more give outputs.
    """
    copy = model.clone()
    nodes = list(copy.graph.nodes)
    kept = [n for index, n in enumerate(nodes) if index not in gone]
    inside = {id(n): n for node in kept for n in _with_bodies(node)}
    bodies = [body for node in inside.values() for body in subgraphs(node)]
    outputs = list(copy.graph.outputs)
    lost = {id(t) for index in gone for t in nodes[index].outputs}
    for index in gone:
        for tensor in list(nodes[index].outputs):
            returning = [b for b in bodies if any(t is tensor for t in b.outputs)]
            readers = [n for n in tensor.outputs if id(n) in inside]
            if not tensor.name or (not readers and not returning):
                continue
            fact = facts.get(tensor.name)
            if fact is None:
                return None
            new: gs.Tensor
            if fact.value is not None:
                new = Constant(tensor.name, fact.value)
            else:
                new = Variable(tensor.name, fact.dtype, fact.shape)
                copy.graph.inputs.append(new)
            for reader in {id(n): n for n in readers}.values():
                for place, operand in enumerate(reader.inputs):
                    if operand is tensor:
                        reader.inputs[place] = new
            for body in returning:
                body.outputs = [new if t is tensor else t for t in body.outputs]
    for index in gone:
        for node in _with_bodies(nodes[index]):
            node.inputs.clear()
            node.outputs.clear()
    copy.graph.nodes = kept
    copy.graph.outputs = [t for t in outputs if id(t) not in lost]
    for node in kept:
        results = [t for t in node.outputs if t.name]
        if results and not any(t.outputs or any(t is o for o in copy.graph.outputs) for t in results):
            fact = facts.get(results[0].name)
            if fact is not None:
                results[0].dtype, results[0].shape = fact.dtype, fact.shape
                copy.graph.outputs.append(results[0])
    return _tidy(copy) if copy.graph.outputs else None


def _with_bodies(node: Node) -> Iterator[Node]:
    yield node
    for body in subgraphs(node):
        for graph in walk(body):
            yield from graph.nodes


def _tidy(model: Model) -> Model:
    """Drop root inputs and initializers that nobody reads; nodes stay, even if nobody reads them."""
    returned = {id(t) for g in model.graphs() for t in g.outputs}

    def used(tensor: gs.Tensor) -> bool:
        return bool(tensor.outputs) or id(tensor) in returned

    graph: Graph = model.graph
    graph.inputs = [t for t in graph.inputs if used(t)]
    graph.initializers = [t for t in graph.initializers if used(t)]
    return model


def _resized(model: Model, size: int, smaller: int) -> Model | None:
    """A copy in which every dimension `size` of inputs, weights and outputs is `smaller`, and so is that number in shapes."""

    def dims(shape: Sequence[int | str | None]) -> tuple[int | str | None, ...]:
        return tuple(smaller if d == size else d for d in shape)

    copy = model.clone()
    outputs = {id(t) for t in copy.graph.outputs}
    for tensor in [*copy.graph.inputs, *copy.graph.outputs]:
        if isinstance(tensor, Variable) and tensor.shape is not None:
            tensor.shape = dims(tensor.shape)
    for node in copy.nodes():
        for tensor in node.outputs:
            if isinstance(tensor, Variable) and id(tensor) not in outputs:
                tensor.shape = None
        if node.attrs.get("hidden_size") == size:
            node.attrs["hidden_size"] = smaller
    for constant in copy.constants():
        try:
            values = constant.values
        except (GraphoptError, MemoryError):
            return None
        if size in values.shape:
            values = values[tuple(slice(0, smaller) if d == size else slice(None) for d in values.shape)]
        if values.dtype.kind == "i" and values.ndim <= 1 and (values == size).any():
            values = np.where(values == size, smaller, values).astype(values.dtype)
        if values is not constant.values:
            _replace(copy, constant, values)
    return copy


def _zeroed(model: Model, names: Collection[str]) -> Model:
    copy = model.clone()
    for constant in copy.constants():
        if constant.name in names:
            _replace(copy, constant, np.zeros(constant.shape, constant.dtype))
    return copy


def _replace(model: Model, constant: gs.Constant, values: Array) -> None:
    """Give a constant of `model`, which is a copy, other values; they are never written in place."""
    new = Constant(constant.name, np.ascontiguousarray(values).reshape(values.shape))
    new.carried = None
    for reader in {id(n): n for n in constant.outputs}.values():
        for place, operand in enumerate(reader.inputs):
            if operand is constant:
                reader.inputs[place] = new
    for graph in model.graphs():
        for field in ("inputs", "initializers", "outputs"):
            setattr(graph, field, [new if t is constant else t for t in getattr(graph, field)])


def _is_plain(constant: gs.Constant) -> bool:
    """Whether its values are not worth a try: few, no numbers, or all zero."""
    if math.prod(constant.shape) <= _PLAIN or np.dtype(constant.dtype).kind not in "fiuV":
        return True
    values = constant.values
    return values.dtype.kind in "fiu" and not values.any()
