"""Common subexpression elimination by value numbering (Cocke and Schwartz 1970), one graph at a time, in order.

Two nodes are equal when operator, attributes and operands are: floats by their bits (0.0 is not -0.0), constants by dtype, shape
and content, so that equal small initializers count as one operand. Sums, products and the
like of two computed values are equal in both orders.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import Editor, sort
from graphopt.ir import Model, Node, subgraphs
from graphopt.pass_base import Context, Pass

RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)

_COMMUTATIVE = frozenset(
    {"Add", "Mul", "And", "Or", "Xor", "Equal"}
)  # not Max and Min, which may return either of two zeros


@dataclass(frozen=True)
class EliminateCommonSubexpression(Pass):
    """Compute equal nodes once.

    Before:
        g (float[2] x) => (float[2] y)
        { a = Exp (x)
          b = Exp (x)
          y = Add (a, b) }
    After:
        g (float[2] x) => (float[2] y)
        { a = Exp (x)
          y = Add (a, a) }
    """

    max_bytes: int = 1 << 16  # constants above this many bytes are equal only when they are the same initializer

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep over each graph; returns the number of nodes removed."""
        edit = Editor(model)
        numbers = _Numbers(edit, self.max_bytes)
        removed = 0
        for graph in model.graphs():
            sort(graph)
            seen: dict[Any, Node] = {}
            for node in list(graph.nodes):
                if node.op in RANDOM_OPS or not node.is_onnx or subgraphs(node) or not node.outputs:
                    continue
                first = seen.setdefault(numbers.of_node(node), node)
                if first is node:
                    continue
                pairs = [(old, new) for old, new in zip(node.outputs, first.outputs, strict=True) if old.name]
                possible = all(edit.can_replace(old, new) for old, new in pairs)
                if possible and not ctx.admit():
                    edit.commit()
                    return removed
                for old, new in pairs:
                    numbers.equate(old, new)
                    if possible:
                        edit.replace_uses(old, new)
                if possible:
                    edit.erase(node)
                    removed += 1
                else:
                    ctx.remark(node, f"equals {first.name!r}, but both are graph outputs")
        edit.commit()
        return removed


class _Numbers:
    """Value numbers: equal for values known to be equal."""

    def __init__(self, edit: Editor, max_bytes: int) -> None:
        self.edit = edit
        self.max_bytes = max_bytes
        self.known: dict[int, Any] = {}  # id(tensor) -> number
        self.alive: list[gs.Tensor] = []  # so that no id is used again

    def equate(self, tensor: gs.Tensor, other: gs.Tensor) -> None:
        """From now on `tensor` has the number of `other`."""
        self.known[id(tensor)] = self.of(other)
        self.alive.append(tensor)

    def of(self, tensor: gs.Tensor) -> Any:
        """The number of a tensor: content for small constants, else identity."""
        if not tensor.name:
            return None
        number = self.known.get(id(tensor))
        if number is None:
            small = self.edit.is_fixed(tensor) and tensor.nbytes <= self.max_bytes
            number = self.known[id(tensor)] = _content(tensor) if small else id(tensor)
            self.alive.append(tensor)
        return number

    def of_node(self, node: Node) -> tuple[Any, ...]:
        """What two nodes must share to be equal."""
        attributes = tuple(sorted((name, _attribute(value)) for name, value in node.attrs.items()))
        operands = tuple(map(self.of, node.inputs))
        if (
            node.op in _COMMUTATIVE
            and len(operands) == 2
            and isinstance(operands[0], int)
            and isinstance(operands[1], int)
        ):
            operands = (min(operands), max(operands))
        return node.op, operands, attributes, tuple(bool(t.name) for t in node.outputs)


def _content(tensor: gs.Constant) -> tuple[str, tuple[int, ...], bytes]:
    values = tensor.values
    raw = repr(values.tolist()).encode() if values.dtype == object else values.tobytes()
    return str(values.dtype), values.shape, hashlib.sha256(raw).digest()


def _attribute(value: Any) -> str:
    if isinstance(value, gs.Constant):
        return repr(_content(value))
    if isinstance(value, onnx.AttributeProto):
        return repr(value.SerializeToString(deterministic=True))
    return repr(value)  # repr of a float holds all its bits, and tells 0.0 from -0.0
