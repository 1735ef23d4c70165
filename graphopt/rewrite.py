"""Local rewrites: a pattern that looks like the graph, a check that says why not, and the replacement.

    conv = op("Conv", "x", const("w"), maybe(const("b")), name="conv")
    pattern = op("BatchNormalization", conv, const("scale"), const("bias"), const("mean"), const("var"), name="bn")

The driver holds the laws that every fusion forgets, so no rule can break them:

1. nothing outside the match reads an interior value, a use inside a body counted;
2. an interior value is no output of any graph;
3. an operand that the pattern calls constant is an initializer that no caller can override;
4. all matched nodes lie in one graph;
5. where the pattern says `unshared`, nothing outside the match uses that constant.

A rule that does not fire has a reason; the driver turns it into a remark. It also keeps the names of graph outputs: where the
replacement has a name of its own to keep (an input, say), an Identity stands between.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass

if TYPE_CHECKING:
    from graphopt.analyses.shapes import Shapes

_VISITS_PER_NODE: Final = 16  # a rule that revisits a node more often than this does not terminate


@dataclass(frozen=True)
class Const:
    """An operand that must be constant."""

    name: str
    unshared: bool = False  # whether only the match may use it
    optional: bool = False


@dataclass(frozen=True)
class Value:
    """Any operand."""

    name: str
    optional: bool = False


@dataclass(frozen=True)
class Op:
    """A node of one of `ops` with these operands; commutative ones are tried in both orders."""

    ops: tuple[str, ...]
    operands: tuple[Operand, ...]
    name: str
    commutative: bool = False


Operand = Const | Value | Op


def const(name: str, *, unshared: bool = False) -> Const:
    """An operand that must be constant, bound to `name`."""
    return Const(name, unshared)


def maybe(operand: Const | Value | str) -> Operand:
    """An operand that may be absent."""
    if isinstance(operand, str):
        return Value(operand, True)
    if isinstance(operand, Const):
        return Const(operand.name, operand.unshared, True)
    return Value(operand.name, True)


def op(ops: str | tuple[str, ...], *operands: Operand | str, name: str = "", commutative: bool = False) -> Op:
    """A node of the default domain; a string operand is any value bound to that name.

    Raises:
        ValueError: two different nodes of the pattern have one name (by default the operator's, in lower case).
    """
    kinds = (ops,) if isinstance(ops, str) else ops
    values = tuple(Value(o) if isinstance(o, str) else o for o in operands)
    pattern = Op(kinds, values, name or kinds[0].lower(), commutative)
    named: dict[str, Op] = {}
    for inner in _ops(pattern):
        if named.setdefault(inner.name, inner) is not inner:
            raise ValueError(f"two nodes of the pattern are called {inner.name!r}; tell them apart by name=")
    return pattern


def _ops(pattern: Op) -> Iterator[Op]:
    yield pattern
    for operand in pattern.operands:
        if isinstance(operand, Op):
            yield from _ops(operand)


@dataclass
class Match:
    """What a pattern matched: nodes and tensors by the names in the pattern."""

    root: Node
    nodes: dict[str, Node] = field(default_factory=dict)
    tensors: dict[str, gs.Tensor | None] = field(default_factory=dict)  # None: an optional operand that is absent

    def __getitem__(self, name: str) -> gs.Tensor:
        """The tensor bound to `name`; raises KeyError when an optional operand is absent."""
        tensor = self.tensors[name]
        if tensor is None:
            raise KeyError(name)
        return tensor

    def has(self, name: str) -> bool:
        """Whether an optional operand is present."""
        return self.tensors.get(name) is not None

    def value(self, name: str) -> np.ndarray[Any, Any]:
        """The array of a constant operand."""
        return np.asarray(self[name].values)


class RewritePass(Pass):
    """A pass made of one pattern."""

    pattern: ClassVar[Op]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "pattern" in vars(cls):
            cls.ops = frozenset(cls.pattern.ops)

    def check(self, match: Match, model: Model) -> str | None:
        """None when the match may be rewritten, else the reason why not."""
        return None

    @classmethod
    def objection(cls, node: Node, edit: Editor, shapes: Shapes) -> str | None:
        """What differs from the pattern, or keeps it from matching, where `node` has an operator of it."""
        if not node.is_onnx:
            return None
        if node.op in cls.pattern.ops:
            match, reason = find(cls.pattern, node, edit)
            if match is not None:
                return None
            return (
                reason
                or difference(cls.pattern, node, edit)
                or "its operands are not the same tensor where the rule needs one"
            )
        if any(node.op in inner.ops for inner in _ops(cls.pattern)):
            readers = sorted({n.op for t in node.outputs for n in t.outputs}) or ["nothing"]
            if not set(readers) & {o for p in _ops(cls.pattern) for o in p.ops}:
                return f"would need {' or '.join(cls.pattern.ops)} behind it, but {', '.join(readers)} reads it"
        return None

    def rewrite(self, match: Match, edit: Editor) -> gs.Tensor:
        """Insert what replaces the match; returns the tensor that stands for the root's first output.

        Nodes of the match are erased by the driver when nothing reads them any more.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement rewrite")

    def run(self, model: Model, ctx: Context) -> int:
        """Apply the pattern until nothing changes: sweeps over all roots, each with a worklist of what its rewrites touched."""
        edit = Editor(model)
        total, visits = 0, -1
        while True:
            roots = [n for n in model.nodes() if n.op in self.pattern.ops]
            if visits < 0:
                visits = _VISITS_PER_NODE * (len(roots) + 1)
            rewrites, visits = self._sweep(roots, visits, model, edit, ctx)
            edit.commit()
            total += rewrites
            if not rewrites or visits <= 0:
                return total

    def _sweep(self, roots: list[Node], visits: int, model: Model, edit: Editor, ctx: Context) -> tuple[int, int]:
        """One sweep; returns the number of rewrites and the visits left, 0 to stop."""
        work = deque(roots)
        rewrites = 0
        while work:
            node = work.popleft()
            if edit.is_erased(node):
                continue
            visits -= 1
            if visits <= 0:
                ctx.remark(node, "stopped after too many visits; the rule undoes its own work")
                return rewrites, 0
            match, reason = find(self.pattern, node, edit, lambda m: self.check(m, model))
            if match is None:
                if reason:
                    ctx.remark(node, reason)
                continue
            if not ctx.admit():
                return rewrites, 0
            new = _put(node, self.rewrite(match, edit), edit)
            _erase_unread(match, edit)
            rewrites += 1
            work.extend(n for n in new.outputs if n.op in self.pattern.ops)
            producer = edit.producer(new)
            if producer is not None and producer.op in self.pattern.ops:
                work.append(producer)
        return rewrites, visits


def _put(root: Node, new: gs.Tensor, edit: Editor) -> gs.Tensor:
    """Let `new` take the place of the first output of `root`; returns the tensor that its readers read from now on."""
    old = root.outputs[0]
    if not edit.can_replace(old, new):
        copy = Node("Identity", f"{root.name}_identity", None, [new], [edit.variable(old.name, old)])
        new = edit.insert_after(root, copy).outputs[0]
    edit.replace_uses(old, new)
    return old if edit.is_output(old) else new


def _erase_unread(match: Match, edit: Editor) -> None:
    for node in match.nodes.values():  # root first
        if not any(t.outputs or edit.is_output(t) for t in node.outputs):
            edit.erase(node)


def find(
    pattern: Op, node: Node, edit: Editor, check: Callable[[Match], str | None] = lambda match: None
) -> tuple[Match | None, str | None]:
    """Match `pattern` with `node` as its root, commutative operators in every order, until `check` has no objection.

    Returns:
        The match; or None with the reason, where only a law, a constness or `check` stood between the node and a match, so that a
        user may want to know; or None and None where the graph looks different.
    """
    flippable = [o.name for o in _ops(pattern) if o.commutative]
    refusal: str | None = None
    for choice in itertools.product((False, True), repeat=len(flippable)):
        match = Match(node)
        reason = _bind(pattern, node, match, edit, frozenset(itertools.compress(flippable, choice)))
        if reason == "":
            continue
        reason = reason or _laws(pattern, match, edit) or check(match)
        if reason is None:
            return match, None
        refusal = refusal or reason
    return None, refusal


def difference(pattern: Op, node: Node, edit: Editor) -> str | None:
    """The first part of `pattern` that looks different where `node`, which has the operator of its root, stands; None: no part does.

    Of the orders of commutative operands it is the one that gets furthest.
    """
    told: list[tuple[int, str]] = []
    flippable = [o.name for o in _ops(pattern) if o.commutative]
    for choice in itertools.product((False, True), repeat=len(flippable)):
        seen: list[Node] = []
        text = _difference(pattern, node, edit, frozenset(itertools.compress(flippable, choice)), seen)
        if text is None:
            return None
        told.append((len(seen), text))
    return max(told, key=lambda item: item[0])[1]


def _difference(pattern: Op, node: Node, edit: Editor, swapped: frozenset[str], seen: list[Node]) -> str | None:
    seen.append(node)
    operands = _present(node)
    if pattern.name in swapped and len(operands) == 2:
        operands.reverse()
    if len(operands) > len(pattern.operands):
        return f"{_label(node)} has {len(operands)} operands, the rule knows {len(pattern.operands)}"
    for index, wanted in enumerate(pattern.operands):
        tensor: Any = operands[index] if index < len(operands) and operands[index].name else None
        if isinstance(wanted, Op):
            source = None if tensor is None else edit.producer(tensor)
            if source is None or source.op not in wanted.ops or not source.is_onnx:
                made = "nothing" if tensor is None else repr(tensor.name) if source is None else _label(source)
                return f"{_label(node)} would have to read {' or '.join(wanted.ops)}, but reads {made}"
            inner = _difference(wanted, source, edit, swapped, seen)
            if inner is not None:
                return inner
        elif tensor is None and not wanted.optional:
            return f"{_label(node)} has no operand {wanted.name}"
    return None


def _present(node: Node) -> list[gs.Tensor]:
    """The operands without absent ones at the end."""
    operands = list(node.inputs)
    while operands and not operands[-1].name:
        operands.pop()
    return operands


def _bind(pattern: Op, node: Node, match: Match, edit: Editor, swapped: frozenset[str]) -> str | None:
    """Bind `pattern` to `node`: None is success, "" a different graph, another text an objection worth telling."""
    if node.op not in pattern.ops or not node.is_onnx:
        return ""
    if match.nodes.setdefault(pattern.name, node) is not node:
        return ""
    operands = _present(node)
    if pattern.name in swapped and len(operands) == 2:
        operands.reverse()
    if len(operands) > len(pattern.operands):
        return ""
    objection: str | None = None
    for index, wanted in enumerate(pattern.operands):
        tensor: Any = operands[index] if index < len(operands) and operands[index].name else None
        if isinstance(wanted, Op):
            producer = None if tensor is None else edit.producer(tensor)
            if producer is None or producer.outputs[0] is not tensor:
                return ""
            inner = _bind(wanted, producer, match, edit, swapped)
            if inner == "":
                return ""
            objection = objection or inner
            continue
        if tensor is None and not wanted.optional:
            return ""
        if match.tensors.setdefault(wanted.name, tensor) is not tensor:
            return ""
        if tensor is None:
            continue
        if isinstance(wanted, Const) and not edit.is_fixed(tensor):
            what = "a graph input" if edit.is_input(tensor) else f"the result of {_label(edit.producer(tensor))}"
            if isinstance(tensor, gs.Constant):
                what = "an initializer that callers may override (it is a graph input)"
            objection = objection or (
                f"{_label(node)} needs a constant {wanted.name}, but {tensor.name!r} is {what}; run fold-constants first"
            )
    return objection


def _label(node: gs.Node | None) -> str:
    return "nothing" if node is None else f"{node.name!r} ({node.op})"


def _laws(pattern: Op, match: Match, edit: Editor) -> str | None:
    root = match.root
    if any(t.outputs or edit.is_output(t) for t in root.outputs[1:]):
        return f"more than the first output of {_label(root)} is used"
    inside = {id(n) for n in match.nodes.values()}
    for node in match.nodes.values():
        if node is root:
            continue
        for tensor in node.outputs:
            if edit.is_output(tensor):
                return f"{tensor.name!r} between {_label(node)} and {_label(root)} is a graph output"
            others = [n for n in tensor.outputs if id(n) not in inside]
            if others:
                return f"{tensor.name!r} is also read by {_label(others[0])}"
        if edit.graph_of(node) is not edit.graph_of(root):
            return f"{_label(node)} lies in another graph than {_label(root)}"
    for wanted in _constants(pattern):
        if wanted.unshared and match.has(wanted.name):
            shared = match[wanted.name]
            others = [n for n in shared.outputs if id(n) not in inside]
            if others:
                return f"{wanted.name} {shared.name!r} is shared with {_label(others[0])}"
            if edit.is_output(shared):
                return f"{wanted.name} {shared.name!r} is a graph output"
    return None


def _constants(pattern: Op) -> Iterator[Const]:
    for operand in pattern.operands:
        if isinstance(operand, Op):
            yield from _constants(operand)
        elif isinstance(operand, Const):
            yield operand
