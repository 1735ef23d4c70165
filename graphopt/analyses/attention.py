"""Scaled dot-product attention as exporters write it: ``softmax(scale * q k^T + mask) v``, heads split off and joined again.

What matters is where the heads come from and go to: which columns of a ``[B, S, F]`` value are the queries of which head (`Heads`), and which
``[B, S, H*D]`` value the heads are joined into (`Joined`). Both are read off views (views.py), so that the many ways of writing it
(4-D or ``[B*H, S, D]``, batch first or sequence first, q, k and v in one product or three) are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import symbolic
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Dim
from graphopt.analyses.views import Array, Atom, View, follow, positions, scalar, trace, whole
from graphopt.edit import Editor
from graphopt.ir import Node

_HIDES = -1e3  # a score that has this added weighs e^-1000 = 0 in every float type, whatever scores are worth computing


@dataclass
class Heads:
    """Queries, keys or values of all heads, inside a value of three dimensions or more."""

    source: gs.Tensor  # [B, S, ...] or [S, B, ...]; what follows the first two is one row of features
    batch_first: bool
    columns: Array  # positions in a row, head by head
    features: int  # length of a row
    heads: int
    size: int  # of a head
    batch: Dim
    length: Dim
    scale: float


@dataclass
class Joined:
    """What the heads' results are joined into."""

    tensor: gs.Tensor
    batch_first: bool
    rank: int  # 2: [B*S, H*D]; 3: [B, S, H*D]; 4: [B, S, H, D]


@dataclass
class Mask:
    """What is added to the scores; ``where`` replaces the scores instead, where the condition `tensor` does not hold."""

    tensor: gs.Tensor
    masked: gs.Tensor  # the scores with it
    fill: float | None = None  # of a Where
    keeps: bool = True  # whether the condition says which scores stay


@dataclass
class Attention:
    """One attention; `nodes` are those that vanish when something else computes it."""

    softmax: Node
    q: Heads
    k: Heads
    v: Heads
    scale: float
    masks: list[Mask]
    joined: Joined
    guarded: bool  # whether rows without any key give zeros, by IsNaN
    rank: int  # of the scores
    nodes: list[Node] = field(default_factory=list)


def find(softmax: Node, shapes: Shapes, edit: Editor) -> Attention | str | None:
    """The attention around a Softmax; why it is none, where it nearly is one; None where it looks like something else."""
    rank = shapes.rank(softmax.inputs[0])
    if rank not in (3, 4) or not _over_last(softmax, rank, shapes.opset):
        return None
    scores = _scores(softmax.inputs[0], softmax, shapes, edit)
    after = _weights_reader(softmax, edit)
    if scores is None and after is None:
        return None
    if scores is None:
        return f"what {softmax.inputs[0].name!r} comes from is no product of two computed values, scaled and masked"
    if after is None:
        return f"no product reads the weights {softmax.outputs[0].name!r} as its left operand"
    if isinstance(after, str):
        return after
    if isinstance(scores, str):
        return scores
    product, guarded, nodes = after
    views = [
        trace(scores.product.inputs[0], shapes, edit, scaled=True),
        trace(scores.product.inputs[1], shapes, edit, scaled=True),
        trace(product.inputs[1], shapes, edit),
    ]
    found: list[Heads] = []
    for name, view, order in zip(("queries", "keys", "values"), views, ("bhsd", "bhds", "bhsd"), strict=True):
        heads = _heads(view, order, rank, shapes) if view is not None else "their shape is not known"
        if isinstance(heads, str):
            return f"the {name} are not split into heads as expected: {heads}"
        found.append(heads)
    q, k, v = found
    if not (q.heads == k.heads == v.heads):
        return f"{q.heads} heads of queries, {k.heads} of keys and {v.heads} of values"
    if q.size != k.size:
        return f"queries of {q.size} numbers and keys of {k.size}"
    if not (q.batch == k.batch == v.batch) or k.length != v.length:
        return f"batch {q.batch}, {k.batch}, {v.batch} and length {k.length}, {v.length} of queries, keys and values may differ"
    joined = _joined(product.outputs[0], q, v, rank, shapes, edit)
    if joined is None:
        return "the heads are not joined into one row behind it"
    return Attention(
        softmax, q, k, v, scores.scale * q.scale * k.scale, scores.masks, joined, guarded, rank,
        [softmax, product, *nodes, *scores.nodes],
    )  # fmt: skip


def _over_last(softmax: Node, rank: int, opset: int) -> bool:
    axis = int(softmax.attrs.get("axis", -1 if opset >= 13 else 1))
    return axis in (-1, rank - 1)


@dataclass
class _Scores:
    product: Node
    scale: float
    masks: list[Mask]
    nodes: list[Node]


def _scores(tensor: gs.Tensor, reader: Node, shapes: Shapes, edit: Editor) -> _Scores | str | None:
    """Up from the Softmax to the product of queries and keys."""
    node = edit.producer(tensor)
    if node is None or not node.is_onnx or edit.graph_of(node) is not edit.graph_of(reader):
        return None
    if node.op not in ("MatMul", "Mul", "Div", "Add", "Where"):
        return None
    if edit.sole_consumer(tensor) is not reader:
        if node.op == "MatMul" and shapes.rank(tensor) in (3, 4):
            return f"the scores {tensor.name!r} are read by others too"
        return None
    if node.op == "MatMul":
        if any(isinstance(t, gs.Constant) for t in node.inputs):
            return None
        return _Scores(node, 1.0, [], [node])
    if node.op == "Where":
        condition, yes, no = node.inputs
        for inner, other, keeps in ((yes, no, True), (no, yes, False)):
            fill = scalar(other, edit)
            found = _scores(inner, node, shapes, edit) if fill is not None else None
            if isinstance(found, _Scores):
                if fill is None or fill > _HIDES:
                    return f"{node.name!r} replaces scores by {fill:g}, which does not hide them"
                found.masks.append(Mask(condition, tensor, fill, keeps))
                found.nodes.append(node)
                return found
            if isinstance(found, str):
                return found
        return None
    refusal: str | None = None
    for index in (0, 1) if node.op != "Div" else (0,):
        found = _scores(node.inputs[index], node, shapes, edit)
        if isinstance(found, str):
            refusal = found
        if not isinstance(found, _Scores):
            continue
        other = node.inputs[1 - index]
        if node.op == "Add":
            found.masks.append(Mask(other, tensor))
        else:
            number = scalar(other, edit)
            if number is None or number == 0:
                return f"{node.name!r} multiplies the scores by {other.name!r}, which is no constant number"
            if found.masks:
                return f"{node.name!r} scales the scores after the mask was added"
            found.scale = found.scale / number if node.op == "Div" else found.scale * number
        found.nodes.append(node)
        return found
    return refusal


def _weights_reader(softmax: Node, edit: Editor) -> tuple[Node, bool, list[Node]] | str | None:
    """The product with the values, whether IsNaN guards it, and the nodes of the guard."""
    weights = softmax.outputs[0]
    readers = {id(n): n for n in weights.outputs}
    guard = next((n for n in readers.values() if n.op == "IsNaN"), None)
    nodes: list[Node] = []
    if guard is not None and len(readers) == 2 and not edit.is_output(weights):
        where = edit.sole_consumer(guard.outputs[0])
        if where is None or where.op != "Where" or id(where) not in readers or where.inputs[2] is not weights:
            return None
        if scalar(where.inputs[1], edit) != 0:
            return f"{where.name!r} replaces NaN by something else than 0"
        nodes = [guard, where]
        weights = where.outputs[0]
    products = [n for n in weights.outputs if n.op == "MatMul" and n.inputs[0] is weights and n.is_onnx]
    if not products:
        return None
    if edit.is_output(weights):
        return f"the weights {weights.name!r} are a graph output"
    if len(weights.outputs) != 1:
        other = next((n for n in weights.outputs if n is not products[0]), products[0])
        return f"the weights {weights.name!r} are also read by {other.name!r} ({other.op})"
    return products[0], bool(nodes), nodes


def _ids(atoms: Sequence[Atom]) -> list[int]:
    return [id(a) for a in atoms]


def _heads(view: View, order: str, rank: int, shapes: Shapes) -> Heads | str:
    """`view` as heads; `order` says what the axes of the value are."""
    if len(view.axes) != rank:
        return f"rank {len(view.axes)} beside scores of rank {rank}"
    roles = dict(zip(order, range(4), strict=True))
    if rank == 3:
        roles = {"b": 0, "h": 0, "s": roles["s"] - 1, "d": roles["d"] - 1}
    size = view.atoms(roles["d"])
    last = 1 if len(view.base_axes) == 2 else 2  # a row of features begins here, whatever number of axes it has
    row = [a for axis in view.base_axes[last:] for a in axis]
    features = {id(a) for a in whole(row)}
    if any(id(a) not in features for a in size):
        return f"a head's numbers do not lie behind batch and length in {view.base.name!r}"
    outer = view.atoms(roles["h"])
    heads = [a for a in outer if id(a) in features]
    if rank == 4 and len(heads) != len(outer):
        return f"heads do not lie behind batch and length in {view.base.name!r}"
    batch = view.atoms(roles["b"]) if rank == 4 else [a for a in outer if id(a) not in features]
    if rank == 3 and _ids(outer) != _ids([*batch, *heads]):
        return "heads lie outside the batch"
    length = view.atoms(roles["s"])
    columns = positions(row, [*heads, *size])
    if columns is None:
        return f"a row of {view.base.name!r} has parts that are not shown, or no fixed length"
    sizes = [symbolic.product(a.size for a in atoms) for atoms in (heads, size, batch, length)]
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        return "the number of heads is not fixed"
    base = [whole(axis) for axis in view.base_axes[:last]]
    total = symbolic.product(a.size for a in _all(row))
    found = _row_source(view, base, batch, length, last)
    if found is None or not isinstance(total, int):
        return f"{view.base.name!r} is not [batch, length, features]"
    source, batch_first = found
    return Heads(source, batch_first, columns, total, sizes[0], sizes[1], sizes[2], sizes[3], view.scale)


def _all(axis: Sequence[Atom]) -> list[Atom]:
    """All leaves, picked ones and those of size 1 too."""
    found: list[Atom] = []
    for atom in axis:
        found += _all(atom.parts) if atom.parts else [atom]
    return found


def _row_source(
    view: View, base: list[list[Atom]], batch: list[Atom], length: list[Atom], last: int
) -> tuple[gs.Tensor, bool] | None:
    """The value whose first two axes are batch and length, in whichever order, and the rest one row of features."""
    if len(base) == 2:
        for first, second, batch_first in ((batch, length, True), (length, batch, False)):
            if _ids(base[0]) == _ids(first) and _ids(base[1]) == _ids(second):
                return view.base, batch_first
        return None
    flat = [a for axis in base for a in axis]
    for batch_first, wanted in ((True, [*batch, *length]), (False, [*length, *batch])):
        if _ids(flat) != _ids(wanted):
            continue
        first, second = (batch, length) if batch_first else (length, batch)
        row = [i for axis in view.base_axes[last:] for i in _ids(whole(axis))]
        for tensor, axes in view.steps:
            parts = [list(whole(axis)) for axis in axes]
            outer = [_ids(p) for p in parts[:2]]
            if (
                len(parts) >= 3
                and outer == [_ids(first), _ids(second)]
                and [i for p in parts[2:] for i in _ids(p)] == row
            ):
                return tensor, batch_first
    return None


def _joined(result: gs.Tensor, q: Heads, v: Heads, rank: int, shapes: Shapes, edit: Editor) -> Joined | None:
    view = follow(result, shapes, edit)
    if view is None or len(view.base_axes) != rank:
        return None
    axes = view.base_axes
    if rank == 3 and v.heads == 1:
        return Joined(result, True, 3)
    if rank == 3:
        outer = _all([axes[0][0]])
        at = next((i for i in range(len(outer)) if symbolic.product(a.size for a in outer[i:]) == v.heads), None)
        if at is None:
            return None
        b, h, s, d = outer[:at], outer[at:], _all(axes[1]), _all(axes[2])
    else:
        b, h, s, d = (_all(axis) for axis in axes)
    b, h, s, d = ([a for a in atoms if a.size != 1] for atoms in (b, h, s, d))
    for tensor, now in reversed(view.steps):
        parts = [whole(axis) for axis in now]
        flat = [i for p in parts for i in _ids(p)]
        for batch_first, order in ((True, [*b, *s, *h, *d]), (False, [*s, *b, *h, *d])):
            if flat != _ids(order):
                continue
            first, second = (b, s) if batch_first else (s, b)
            if len(parts) == 3 and _ids(parts[0]) == _ids(first) and _ids(parts[1]) == _ids(second):
                return Joined(tensor, batch_first, 3)
            if len(parts) == 2 and _ids(parts[0]) == _ids([*first, *second]):
                return Joined(tensor, batch_first, 2)
            if len(parts) == 4 and _ids(parts[2]) == _ids(h) and _ids(parts[0]) == _ids(first):
                return Joined(tensor, batch_first, 4)
    return None


def _row(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """What lies behind batch and length, or behind the one axis that both are."""
    return tuple(shape[1:] if len(shape) == 2 else shape[2:])


@dataclass
class Projection:
    """A value ``[.., F]`` that is ``source @ weight + bias``."""

    source: gs.Tensor  # [B, S, E] or [S, B, E]
    weight: Array  # [E, F]
    bias: Array | None  # [F]
    nodes: list[Node]
    bias_tensor: gs.Tensor | None = None  # that holds the bias


def projection(tensor: gs.Tensor, shapes: Shapes, edit: Editor) -> Projection | None:
    """`tensor`, of three dimensions or more, as a product with a constant matrix; None where it is none."""
    nodes: list[Node] = []
    rows = [tensor]  # values that must be one row of the same features for each batch and position
    node = edit.producer(tensor)
    bias, held = None, None
    while node is not None and node.is_onnx and node.op in ("Reshape", "Add"):
        nodes.append(node)
        if node.op == "Reshape":
            rows.append(node.inputs[0])
            node = edit.producer(node.inputs[0])
            continue
        at = next((i for i in (0, 1) if edit.is_fixed(node.inputs[i])), None)
        shape = shapes.shape(node.outputs[0])
        if at is None or bias is not None or shape is None or tuple(node.inputs[at].shape) != _row(shape):
            return None
        held = node.inputs[at]
        bias = held.values.reshape(-1)
        rows.append(node.inputs[1 - at])
        node = edit.producer(node.inputs[1 - at])
    if node is None or not node.is_onnx or node.op not in ("MatMul", "Gemm") or not edit.is_fixed(node.inputs[1]):
        return None
    weight, source = node.inputs[1].values, node.inputs[0]
    if weight.ndim != 2:
        return None
    nodes.append(node)
    if node.op == "Gemm":
        if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0 or node.attrs.get("transA", 0):
            return None
        weight = weight.T if node.attrs.get("transB", 0) else weight
        if len(node.inputs) > 2 and node.inputs[2].name:
            if bias is not None or not edit.is_fixed(node.inputs[2]) or node.inputs[2].values.ndim > 1:
                return None
            bias = np.broadcast_to(node.inputs[2].values, (weight.shape[1],))
    merge = edit.producer(source)
    if shapes.rank(source) == 2 and merge is not None and merge.op == "Reshape" and merge.is_onnx:
        source = merge.inputs[0]
        nodes.append(merge)
    if bias is not None and bias.shape != (weight.shape[1],):
        return None
    known = shapes.shape(source)
    if known is None or len(known) != 3 or known[2] != weight.shape[0]:
        return None
    for value in rows:
        shape = shapes.shape(value)
        if shape is None or symbolic.product(_row(shape)) != weight.shape[1]:
            return None
    if (shapes.shape(tensor) or ())[:2] != known[:2]:
        return None
    return Projection(source, weight, bias, nodes, held)
