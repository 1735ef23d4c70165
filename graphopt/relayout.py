"""Which layout each node computes in, so that the fewest Transposes are left; and the rewriting that follows from it.

Every transparent node (analyses/layouts.py) may follow any permutation of its operands; everything else stands as it is. A value is stored
as its producer writes it; each other permutation that some reader needs costs one Transpose, shared by all who need it. Old Transposes count
for nothing: their result is a permutation of the value they read.

To choose among all permutations at once is hard (multiway cut), one move is not: take a permutation for one node, carry it over to
all that is connected, so that no Transpose is needed between them, and ask for each node whether it keeps the old one or
takes the new one. That is a minimum cut, solved exactly. A move is made only when the count of Transposes, taken again without the
cut's simplifications, falls; so each move ends nearer to zero, and no graph comes out with more than it had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from graphopt.analyses.layouts import (
    Perm,
    Transparent,
    compose,
    identity,
    inverse,
    permutation,
    permuted,
    transparent,
)
from graphopt.analyses.min_cut import FORBIDDEN, MinCut
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor, sort
from graphopt.ir import Constant, Graph, Model, Node, Variable
from graphopt.pass_base import Context

_MOST_MOVES = 32  # tried on one component between two that help


def relayout(model: Model, ctx: Context, sums: bool) -> int:
    """Reduce the number of Transposes until no move helps; returns the number of components rewritten.

    Args:
        model: changed in place.
        ctx: asked before each component.
        sums: whether floating-point sums may change their order.
    """
    total = 0
    while True:
        edit = Editor(model)
        shapes = ctx.analysis(Shapes, model) if not total else Shapes(model)
        done = 0
        for graph in list(model.graphs()):
            if any(n.op == "Transpose" for n in graph.nodes):
                done += _GraphLayouts(graph, model, edit, shapes, ctx, sums).rewrite()
        edit.commit()
        total += done
        if not done:
            return total
        for graph in model.graphs():
            sort(graph)


_Use = tuple[Node, int, Perm]  # reader, operand, permutation of the base that it reads


@dataclass
class _Value:
    """A value with all that Transposes make of it."""

    base: gs.Tensor
    aliases: dict[int, tuple[gs.Tensor, Perm]] = field(default_factory=dict)  # the base first
    transposes: list[Node] = field(default_factory=list)
    uses: list[_Use] = field(default_factory=list)
    outputs: list[tuple[gs.Tensor, Perm]] = field(default_factory=list)  # those that a graph returns

    @property
    def straight(self) -> Perm:
        return next(iter(self.aliases.values()))[1]


@dataclass
class _Var:
    """A transparent node and the permutation it follows."""

    node: Node
    rule: Transparent
    perm: Perm


class _GraphLayouts:
    """The layouts of one graph; bodies in it count as readers that stand as they are."""

    def __init__(self, graph: Graph, model: Model, edit: Editor, shapes: Shapes, ctx: Context, sums: bool) -> None:
        self.graph = graph
        self.model = model
        self.edit = edit
        self.shapes = shapes
        self.ctx = ctx
        self.sums = sums
        self.vars: dict[int, _Var | None] = {}
        self.values: dict[int, _Value | None] = {}

    # ------------------------------------------------------------------------------------------------- questions

    def transposes(self, node: gs.Node | None) -> Perm | None:
        """What `node` does, if it is a Transpose of this graph."""
        if node is None or node.op != "Transpose" or self.edit.graph_of(node) is not self.graph:
            return None
        return permutation(node, self.shapes)

    def var(self, node: gs.Node | None) -> _Var | None:
        """`node`, if it is transparent and of this graph."""
        if node is None or self.edit.graph_of(node) is not self.graph:
            return None
        if id(node) not in self.vars:
            rule = transparent(node, self.shapes, self.edit, self.model.opset, self.sums)
            if rule is not None:
                around = [node.inputs[i] for i in rule.data] + [t for t in node.outputs if t.name]
                if any(self.value(tensor) is None for tensor in around):
                    rule = None
            self.vars[id(node)] = None if rule is None else _Var(node, rule, identity(rule.rank))
        return self.vars[id(node)]

    def value(self, tensor: gs.Tensor) -> _Value | None:
        """The value that `tensor` is a permutation of."""
        base = tensor
        while (producer := self.edit.producer(base)) is not None and self.transposes(producer) is not None:
            base = producer.inputs[0]
        if id(base) not in self.values:
            self.values[id(base)] = self._gather(base)
        return self.values[id(base)]

    def _gather(self, base: gs.Tensor) -> _Value | None:
        rank = self.shapes.rank(base)
        for reader in base.outputs:
            perm = self.transposes(reader)
            if perm is not None:
                rank = rank if rank is not None else len(perm)
                if len(perm) != rank:
                    return None
        if rank is None:
            return None
        value = _Value(base)
        pending = deque([(base, identity(rank))])
        while pending:
            tensor, perm = pending.popleft()
            value.aliases[id(tensor)] = tensor, perm
            if self.edit.is_output(tensor):
                value.outputs.append((tensor, perm))
            for reader in {id(n): n for n in tensor.outputs}.values():
                more = self.transposes(reader)
                if more is None:
                    value.uses += [(reader, i, perm) for i, t in enumerate(reader.inputs) if t is tensor]
                elif len(more) != rank:
                    return None
                else:
                    value.transposes.append(reader)
                    pending.append((reader.outputs[0], compose(perm, more)))
        return value

    def reader(self, use: _Use) -> _Var | None:
        """Who may permute what it reads."""
        var = self.var(use[0])
        return var if var is not None and use[1] in var.rule.data else None

    def need(self, use: _Use, perms: Mapping[int, Perm]) -> Perm:
        """The permutation of the base that a reader wants."""
        var = self.reader(use)
        return use[2] if var is None else compose(use[2], var.rule.operand(perms.get(id(var.node), var.perm)))

    def delivered(self, value: _Value, perms: Mapping[int, Perm]) -> Perm:
        """The permutation of the base that its producer writes."""
        var = self.var(self.edit.producer(value.base))
        return value.straight if var is None else var.rule.result(perms.get(id(var.node), var.perm))

    def cost(self, value: _Value, perms: Mapping[int, Perm]) -> int:
        """Transposes, and Identities for names, that `value` takes."""
        straight = self.delivered(value, perms)
        needs = dict.fromkeys(self.need(use, perms) for use in value.uses)
        needs.update(dict.fromkeys(perm for _, perm in value.outputs))
        needs.pop(straight, None)
        named: dict[Perm, int] = {}
        for _, perm in value.outputs:
            named[perm] = named.get(perm, 0) + 1
        if straight in named and not self.nameable(value):
            named[straight] += not self.edit.is_output(value.base)
        return len(needs) + sum(count - 1 for count in named.values())

    def nameable(self, value: _Value) -> bool:
        """Whether the value as its producer writes it can take any name."""
        producer = self.edit.producer(value.base)
        return producer is not None and self.edit.graph_of(producer) is self.graph

    # ------------------------------------------------------------------------------------------------- components

    def rewrite(self) -> int:
        """Find the components that Transposes touch, choose layouts, rewrite; returns how many were rewritten."""
        done = 0
        seen: set[int] = set()
        for node in list(self.graph.nodes):
            if self.transposes(node) is None:
                continue
            start = self.value(node.inputs[0])
            if start is None or id(start.base) in seen:
                continue
            values = self._component(start)
            seen.update(id(v.base) for v in values)
            perms = self._choose(values)
            changed = {key: perm for key, perm in perms.items() if perm != identity(len(perm))}
            touched = [v for v in values if any(id(n) in changed for n in self._neighbours(v))]
            gain = sum(len(v.transposes) - self.cost(v, changed) for v in touched)
            if gain <= 0:
                continue
            if not self.ctx.admit():
                break
            self._apply(touched, changed)
            done += 1
        return done

    def _neighbours(self, value: _Value) -> Iterator[Node]:
        """The transparent nodes that write or read `value`."""
        var = self.var(self.edit.producer(value.base))
        if var is not None:
            yield var.node
        for use in value.uses:
            var = self.reader(use)
            if var is not None:
                yield var.node

    def _around(self, node: Node, rule: Transparent) -> Iterator[tuple[_Value, Perm | None]]:
        """The values of a node: those it writes (None), those it reads (with the permutation of the base)."""
        for tensor in node.outputs:
            value = self.value(tensor) if tensor.name else None
            if value is not None and value.base is tensor:
                yield value, None
        for index in rule.data:
            value = self.value(node.inputs[index])
            if value is not None:
                yield value, value.aliases[id(node.inputs[index])][1]

    def _component(self, start: _Value) -> list[_Value]:
        found = {id(start.base): start}
        pending = deque([start])
        visited: set[int] = set()
        while pending:
            for node in self._neighbours(pending.popleft()):
                var = self.var(node)
                if var is None or id(node) in visited:
                    continue
                visited.add(id(node))
                for value, _ in self._around(node, var.rule):
                    if id(value.base) not in found:
                        found[id(value.base)] = value
                        pending.append(value)
        return list(found.values())

    # --------------------------------------------------------------------------------------------------- choosing

    def _choose(self, values: list[_Value]) -> dict[int, Perm]:
        """Moves until none helps: the permutation of each node that is not as it was."""
        perms: dict[int, Perm] = {}
        total = sum(self.cost(v, perms) for v in values)
        while total:
            tried: dict[int, set[Perm]] = {}
            moves = 0
            for node, perm in self._seeds(values, perms):
                if perm in tried.get(id(node), ()):
                    continue
                moves += 1
                wish = self._spread(node, perm)
                for key, wanted in wish.items():
                    tried.setdefault(key, set()).add(wanted)
                better = {**perms, **self._cut(values, perms, wish)}
                cost = sum(self.cost(v, better) for v in values)
                if cost < total:
                    perms, total = better, cost
                    break
                if moves >= _MOST_MOVES:
                    self.ctx.remark(node, f"tried {moves} layouts here, none of which takes fewer Transposes")
                    return perms
            else:
                return perms
        return perms

    def _seeds(self, values: list[_Value], perms: Mapping[int, Perm]) -> Iterator[tuple[Node, Perm]]:
        """A node and a permutation that spares a Transpose beside it."""
        for value in values:
            straight = self.delivered(value, perms)
            producer = self.var(self.edit.producer(value.base))
            needs = [perm for _, perm in value.outputs]
            for use in value.uses:
                needs.append(self.need(use, perms))
                reader = self.reader(use)
                if reader is not None and needs[-1] != straight:
                    wanted = compose(inverse(use[2]), straight)
                    yield reader.node, reader.rule.from_operand(wanted)
            if producer is not None:
                for need in dict.fromkeys(needs):
                    if need != straight:
                        yield producer.node, producer.rule.from_result(need)

    def _spread(self, node: Node, perm: Perm) -> dict[int, Perm]:
        """Carry `perm` of `node` over to all nodes connected with it, so that no Transpose is needed between them."""
        wish = {id(node): perm}
        pending = deque([node])

        def offer(var: _Var | None, wanted: Perm) -> None:
            if var is not None and id(var.node) not in wish and len(wanted) == var.rule.rank:
                wish[id(var.node)] = wanted
                pending.append(var.node)

        settled: set[int] = set()
        while pending:
            current = pending.popleft()
            var = self.var(current)
            assert var is not None
            for value, read in self._around(current, var.rule):
                if id(value.base) in settled:
                    continue
                settled.add(id(value.base))
                mine = wish[id(current)]
                stored = var.rule.result(mine) if read is None else compose(read, var.rule.operand(mine))
                producer = self.var(self.edit.producer(value.base))
                if producer is not None:
                    offer(producer, producer.rule.from_result(stored))
                for use in value.uses:
                    reader = self.reader(use)
                    if reader is not None:
                        offer(reader, reader.rule.from_operand(compose(inverse(use[2]), stored)))
        return wish

    def _cut(self, values: list[_Value], perms: Mapping[int, Perm], wish: Mapping[int, Perm]) -> dict[int, Perm]:
        """The nodes that had better follow `wish`."""
        cut = MinCut()
        choices: dict[int, int] = {}

        def choice(var: _Var | None) -> int | None:
            if var is None:
                return None
            old = perms.get(id(var.node), var.perm)
            if wish.get(id(var.node), old) == old:
                return None
            if id(var.node) not in choices:
                choices[id(var.node)] = cut.choice()
            return choices[id(var.node)]

        after = {**perms, **wish}
        for value in values:
            writer = choice(self.var(self.edit.producer(value.base)))
            old, new = self.delivered(value, perms), self.delivered(value, after)
            always = dict.fromkeys(perm for _, perm in value.outputs)
            keeping: dict[Perm, dict[int, None]] = {}
            taking: dict[Perm, dict[int, None]] = {}
            for use in value.uses:
                reader = choice(self.reader(use))
                kept, taken = self.need(use, perms), self.need(use, after)
                if reader is None or kept == taken:
                    always[kept] = None
                else:
                    keeping.setdefault(kept, {})[reader] = None
                    taking.setdefault(taken, {})[reader] = None
            for need in always:
                if writer is not None and old != new and need in (old, new):
                    (cut.cost_if_no if need == new else cut.cost_if_yes)(writer)
            for need, readers in keeping.items():
                if need in always or need == old == new:
                    continue
                anyone = cut.choice()  # no: someone needs it
                for reader in readers:
                    cut.cost_if_differ(reader, anyone, FORBIDDEN)
                if need == old and writer is not None:
                    cut.cost_if_differ(anyone, writer)
                else:
                    cut.cost_if_no(anyone)
            for need, readers in taking.items():
                if need in always or need == old == new:
                    continue
                anyone = cut.choice()  # yes: someone needs it
                for reader in readers:
                    cut.cost_if_differ(anyone, reader, FORBIDDEN)
                if need == new and writer is not None:
                    cut.cost_if_differ(writer, anyone)
                else:
                    cut.cost_if_yes(anyone)
        answers = cut.solve()
        return {key: wish[key] for key, number in choices.items() if answers[number]}

    # -------------------------------------------------------------------------------------------------- rewriting

    def _apply(self, values: list[_Value], perms: Mapping[int, Perm]) -> None:
        copies: dict[tuple[int, Perm], Constant] = {}
        for value in values:
            self._store(value, perms)
        for key, perm in perms.items():
            var = self.vars[key]
            assert var is not None
            for index in var.rule.constants:
                constant = var.node.inputs[index]
                if (id(constant), perm) not in copies:
                    copies[id(constant), perm] = self.edit.constant(constant.name, permuted(constant, perm))
                var.node.inputs[index] = copies[id(constant), perm]
            var.rule.rewrite(perm, self.edit)

    def _store(self, value: _Value, perms: Mapping[int, Perm]) -> None:
        """Give each reader of `value` what it needs now."""
        straight = self.delivered(value, perms)
        producer = self.edit.producer(value.base) if self.nameable(value) else None
        named: dict[Perm, list[gs.Tensor]] = {}
        for tensor, perm in value.outputs:
            named.setdefault(perm, []).append(tensor)
        needs = [self.need(use, perms) for use in value.uses]
        origin = value.transposes or ([producer] if producer is not None else [])
        anchor = producer or (value.transposes or [n for n in self._neighbours(value) if id(n) in perms])[0]
        origins = [node for node in origin if node is not None]
        for transpose in value.transposes:
            self.edit.erase(transpose)

        stored = value.base
        if producer is not None and straight in named:
            if not any(t is stored for t in named[straight]):
                stored = named[straight][0]
        elif straight != value.straight:
            stored = self._new(value, straight)
        if stored is not value.base and producer is not None:
            for index, tensor in enumerate(producer.outputs):
                if tensor is value.base:
                    producer.outputs[index] = stored
        at = {straight: stored}

        def put(op: str, source: gs.Tensor, result: gs.Tensor, perm: Perm | None) -> None:
            attributes = {} if perm is None else {"perm": list(perm)}
            node = Node(op, f"{result.name}_{op.lower()}", attributes, [source], [result])
            if producer is not None:
                self.edit.insert_after(anchor, node, origins)
            else:
                self.edit.insert_before(anchor, node, origins)

        for need in [*needs, *named]:
            if need not in at:
                at[need] = named[need][0] if need in named else self._new(value, need)
                put("Transpose", stored, at[need], compose(inverse(straight), need))
        for need, tensors in named.items():
            for tensor in tensors:
                if tensor is not at[need]:
                    put("Identity", at[need], tensor, None)
        for (node, index, _), need in zip(value.uses, needs, strict=True):
            if node.inputs[index] is not at[need]:
                node.inputs[index] = at[need]

    def _new(self, value: _Value, perm: Perm) -> gs.Tensor:
        """A tensor for the base permuted by `perm`: the one that there was, or a new one."""
        for tensor, known in value.aliases.values():
            if known == perm and tensor is not value.base and not self.edit.is_output(tensor):
                return tensor
        result: Variable = self.edit.variable(value.base.name, value.base)
        if result.shape is not None:
            result.shape = tuple(result.shape[axis] for axis in perm) if len(result.shape) == len(perm) else None
        return result
