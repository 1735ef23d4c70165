"""Common subexpression elimination by value numbering (Cocke and Schwartz 1970), one graph at a time, in order.

Two nodes are equal when operator, attributes and operands are: floats by their bits (0.0 is not -0.0), constants by dtype, shape
and content, so that equal small initializers count as one operand.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import Editor, sort
from graphopt.ir import Model, Node, subgraphs
from graphopt.pass_base import Context, Pass

RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)


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
        removed = 0
        for graph in model.graphs():
            sort(graph)
            seen: dict[Any, Node] = {}
            for node in list(graph.nodes):
                if node.op in RANDOM_OPS or not node.is_onnx or subgraphs(node) or not node.outputs:
                    continue
                first = seen.setdefault(self._key(node, edit), node)
                if first is node:
                    continue
                pairs = [(old, new) for old, new in zip(node.outputs, first.outputs, strict=True) if old.name]
                if not all(edit.can_replace(old, new) for old, new in pairs):
                    ctx.remark(node, f"equals {first.name!r}, but both are graph outputs")
                    continue
                if not ctx.admit():
                    break
                for old, new in pairs:
                    edit.replace_uses(old, new)
                edit.erase(node)
                removed += 1
        edit.commit()
        return removed

    def _key(self, node: Node, edit: Editor) -> tuple[Any, ...]:
        operands = tuple(self._operand(t, edit) for t in node.inputs)
        attributes = tuple(sorted((name, self._attribute(value)) for name, value in node.attrs.items()))
        return node.op, operands, attributes, tuple(bool(t.name) for t in node.outputs)

    def _operand(self, tensor: gs.Tensor, edit: Editor) -> Any:
        if not tensor.name:
            return None
        if edit.is_fixed(tensor) and tensor.nbytes <= self.max_bytes:
            return self._content(tensor)
        return id(tensor)

    def _content(self, tensor: gs.Constant) -> tuple[str, tuple[int, ...], bytes]:
        values = np.ascontiguousarray(tensor.values)
        raw = repr(values.tolist()).encode() if values.dtype == object else values.tobytes()
        return str(values.dtype), values.shape, hashlib.sha256(raw).digest()

    def _attribute(self, value: Any) -> str:
        if isinstance(value, gs.Constant):
            return repr(self._content(value))
        if isinstance(value, onnx.AttributeProto):
            return repr(value.SerializeToString(deterministic=True))
        return repr(value)  # repr of a float holds all its bits, and tells 0.0 from -0.0
