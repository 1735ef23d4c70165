"""What changed between two states of one model: the nodes and constants that went, came or differ, and what stands around them.

Nodes are told apart by name, constants by name and values; weights that both states share are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.ir import Graph, Model, dtype_name, subgraphs

_SHOWN_VALUES: Final = 8  # of a constant; larger ones are told by shape and range
_SHOWN_OPERANDS: Final = 12
_AROUND: Final = 6  # unchanged neighbours on each side


@dataclass(frozen=True)
class Change:
    """The difference of two states of a model."""

    removed: tuple[str, ...]  # names of nodes
    added: tuple[str, ...]
    changed: tuple[str, ...]  # nodes that stand in both and read, compute or write otherwise
    lines: tuple[str, ...]  # "- " before, "+ " after, "  " unchanged neighbours

    def __bool__(self) -> bool:
        return bool(self.lines)


def node_text(node: gs.Node) -> str:
    """One line in the manner of ONNX text, with the types of the outputs behind it."""
    results = ", ".join(t.name for t in node.outputs)
    shown = [t.name or '""' for t in node.inputs[:_SHOWN_OPERANDS]]
    if len(node.inputs) > _SHOWN_OPERANDS:
        shown.append(f"... {len(node.inputs)} operands")
    attributes = ", ".join(f"{name} = {_attribute_text(value)}" for name, value in node.attrs.items())
    op = f"{node.domain}.{node.op}" if node.domain else node.op
    types = ", ".join(type_text(t) for t in node.outputs if not isinstance(t, gs.Constant) and t.dtype is not None)
    return f"[{node.name}] {results} = {op}{f' <{attributes}>' if attributes else ''} ({', '.join(shown)})" + (
        f"  # {types}" if types else ""
    )


def type_text(tensor: gs.Tensor) -> str:
    """Dtype and shape of a computed value whose dtype is known, as ``float32[1,?,N]``."""
    dims = "?" if tensor.shape is None else ",".join("?" if d is None else str(d) for d in tensor.shape)
    return f"{dtype_name(np.dtype(tensor.dtype))}[{dims}]"


def _attribute_text(value: Any) -> str:
    if isinstance(value, gs.Graph):
        return f"{{{len(value.nodes)} nodes}}"
    if isinstance(value, gs.Constant):
        return _constant_text(value)
    if isinstance(value, onnx.AttributeProto):
        return "..."
    text = repr(list(value) if isinstance(value, list | tuple | np.ndarray) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _constant_text(constant: gs.Constant) -> str:
    kind = f"{dtype_name(np.dtype(constant.dtype))}[{','.join(map(str, constant.shape))}]"
    size = int(np.prod(constant.shape, dtype=np.int64))
    values = constant.values
    if size <= _SHOWN_VALUES:
        return f"{kind} {{{', '.join(str(v) for v in values.reshape(-1).tolist())}}}"
    if values.dtype.kind not in "fiu":
        return kind
    return f"{kind} {{{float(values.min()):.6g} to {float(values.max()):.6g}}}"


def _nodes(graph: Graph, path: str = "") -> Iterator[tuple[str, gs.Node]]:
    """Every node, bodies included, by a key that tells nodes of two bodies apart."""
    for node in graph.nodes:
        key = path + (node.name or (node.outputs[0].name if node.outputs else node.op))
        yield key, node
        for number, body in enumerate(subgraphs(node)):
            yield from _nodes(body, f"{key}/{number}/")


def _border(model: Model) -> dict[str, str]:
    """What a pass may change beside nodes and constants."""
    imports = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opsets.items()))
    return {
        "opset import": imports,
        "inputs": ", ".join(map(str, model.inputs)),
        "outputs": ", ".join(map(str, model.outputs)),
        "functions": ", ".join(f"{f.carried.domain}.{f.carried.name}" for f in model.functions),
    }


def _equal(a: gs.Constant, b: gs.Constant) -> bool:
    if a._values is b._values:
        return True
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    x, y = a.values, b.values
    return bool(np.array_equal(x, y)) if x.dtype.kind == "O" else x.tobytes() == y.tobytes()


def diff(before: Model, after: Model) -> Change:
    """Compare two states of one model, of which the later came from the earlier (or both from one)."""
    old, new = dict(_nodes(before.graph)), dict(_nodes(after.graph))
    old_text, new_text = ({k: node_text(n) for k, n in side.items()} for side in (old, new))
    old_constants, new_constants = ({c.name: c for c in m.constants()} for m in (before, after))
    moved = {n for n, c in new_constants.items() if n in old_constants and not _equal(old_constants[n], c)}

    def reads(node: gs.Node) -> bool:
        return any(t.name in moved for t in node.inputs)

    removed = [k for k in old if k not in new]
    added = [k for k in new if k not in old]
    changed = [k for k in old if k in new and (old_text[k] != new_text[k] or reads(new[k]))]
    lines = [f"- {what}: {text}" for what, text in _border(before).items() if text != _border(after)[what]]
    lines += [f"+ {what}: {text}" for what, text in _border(after).items() if text != _border(before)[what]]
    touched = {*removed, *added, *changed}
    tensors = {t.name for k in [*removed, *changed] for t in [*old[k].inputs, *old[k].outputs] if t.name}
    tensors |= {t.name for k in [*added, *changed] for t in [*new[k].inputs, *new[k].outputs] if t.name}
    tensors -= set(new_constants) | set(old_constants)
    above = [k for k, n in new.items() if k not in touched and any(t.name in tensors for t in n.outputs)]
    below = [k for k, n in new.items() if k not in touched and any(t.name in tensors for t in n.inputs)]
    lines += [f"  {new_text[k]}" for k in above[-_AROUND:]]
    gone = [*(k for k in old_constants if k not in new_constants), *(k for k in old_constants if k in moved)]
    come = [*(k for k in new_constants if k not in old_constants), *(k for k in new_constants if k in moved)]
    lines += [f"- {k} = {_constant_text(old_constants[k])}" for k in gone]
    lines += [f"- {old_text[k]}" for k in old if k in touched and old_text[k] != new_text.get(k)]
    lines += [f"+ {k} = {_constant_text(new_constants[k])}" for k in come]
    lines += [f"+ {new_text[k]}" for k in new if k in touched and new_text[k] != old_text.get(k)]
    if lines:
        lines += [f"  {new_text[k]}" for k in changed if old_text[k] == new_text[k]]
        lines += [f"  {new_text[k]}" for k in [b for b in below if b not in above[-_AROUND:]][:_AROUND]]
    if all(line.startswith("  ") for line in lines):
        lines = []

    def names(keys: Iterable[str], side: dict[str, gs.Node]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(side[k].name for k in keys))

    return Change(names(removed, old), names(added, new), names(changed, old), tuple(lines))
