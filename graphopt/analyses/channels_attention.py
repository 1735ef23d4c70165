"""Channel relations of attention in one operator: heads of queries, keys and values, and the size of a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphopt.analyses.channel_call import Call, relation

if TYPE_CHECKING:
    from graphopt.analyses.channel_groups import Axis, Labels


@relation("Attention")
def _attention(call: Call) -> Sequence[Labels | None] | None:
    """ONNX's own: heads on an axis (rank 4), or queries, keys and values as rows of all heads (rank 3), of which heads go whole."""
    if len(call.dims(0)) == 4:
        return _by_axis(call)
    heads = int(call.attr("q_num_heads", 0))
    return _by_row(call, heads, int(call.attr("kv_num_heads", heads)), ("q_num_heads", "kv_num_heads"))


def _by_axis(call: Call) -> Sequence[Labels | None] | None:
    q, k, v = (call.axes(i) for i in range(3))
    if len(k) != 4 or len(v) != 4 or any(call.has(i) for i in (4, 5)):
        return None
    for axis in (q[2], k[2], v[2]):
        call.pin(axis, "attends along it")
    keys = call.join(k[1], v[1])
    heads = _shared(call, q[1], keys)
    size = call.join(q[3], k[3])
    call.groups.contract(call.node, 0, 3, size)
    call.groups.seen(size, v[3])
    width = call.dims(0)[3]
    if size is not None and "scale" not in call.node.attrs and isinstance(width, int):
        call.fix(lambda kept, edit: call.node.attrs.update(scale=1 / math.sqrt(width)))
    heads = _mask(call, 3, heads)
    return [(q[0], heads, None, v[3])] + [None] * (len(call.node.outputs) - 1)


def _mask(call: Call, index: int, heads: Axis) -> Axis:
    """A mask or bias: the axis of heads, third from behind, goes with them, and all others stay."""
    if not call.has(index):
        return heads
    axes, dims = call.axes(index), call.dims(index)
    place = len(axes) - 3
    for at, axis in enumerate(axes):
        if at != place:
            call.pin(axis, "masks attention with it")
    return heads if place < 0 or dims[place] == 1 or len(axes) < 3 else call.join(heads, axes[place])


def _shared(call: Call, queries: Axis, keys: Axis) -> Axis:
    """Heads of queries, each run of which reads one head of keys and values."""
    if queries is None or keys is None or len(queries) % len(keys):
        call.pin(queries, "combines it with heads that cannot change")
        call.pin(keys, "combines it with heads that cannot change")
        return None
    call.groups.join(queries, np.repeat(keys, len(queries) // len(keys)))
    return queries


@relation("com.microsoft.MultiHeadAttention")
def _multi_head(call: Call) -> Sequence[Labels | None] | None:
    heads = int(call.attr("num_heads", 0))
    return _by_row(call, heads, heads, ("num_heads",))


@relation("com.microsoft.GroupQueryAttention")
def _group_query(call: Call) -> Sequence[Labels | None] | None:
    heads = int(call.attr("num_heads", 0))
    return _by_row(call, heads, int(call.attr("kv_num_heads", heads)), ("num_heads", "kv_num_heads"))


def _by_row(call: Call, heads: int, keys: int, counts: tuple[str, ...]) -> Sequence[Labels | None] | None:
    """Rows of all heads after one another; `counts` are the attributes that say how many there are."""
    if len(call.node.inputs) < 3 or not heads or not keys or heads % keys:
        return None
    q, k, v = (call.axes(i) for i in range(3))
    if not all(call.has(i) for i in range(3)) or any(len(axes) != 3 for axes in (q, k, v)):
        return None
    rows = [axes[2] for axes in (q, k, v)]
    biased = call.node.op == "MultiHeadAttention" and call.has(3)
    cached = any(t.name for t in call.node.outputs[1:])
    masks = {"Attention": (3,), "MultiHeadAttention": (4, 5), "GroupQueryAttention": (5, 6, 7, 8)}[call.node.op]
    others = [i for i in range(3, len(call.node.inputs)) if call.has(i) and i not in masks and not (biased and i == 3)]
    if any(axis is None for axis in rows) or cached or others:
        for axis in rows:
            call.pin(axis, "attends to heads that cannot change")
        if biased:
            call.pin(call.axes(3)[0], "attends to heads that cannot change")
        for index in masks:
            _mask(call, index, None)
        for index in others:
            for axis in call.axes(index):
                call.pin(axis, "keeps it as past keys and values")
        return [(q[0], q[1], None), *[None] * (len(call.node.outputs) - 1)]
    parts = [r.reshape(n, -1) for r, n in zip(rows, (heads, keys, keys), strict=True) if r is not None]
    firsts = [call.together(part) for part in parts]
    call.groups.join(firsts[1], firsts[2])
    call.groups.join(firsts[0], np.repeat(firsts[1], heads // keys))
    for index in masks:
        _mask(call, index, firsts[0])
    if biased:
        call.join(np.concatenate([r for r in rows if r is not None]), call.axes(3)[0])
    size = parts[2].shape[1]
    for name, first in zip(counts, (firsts[0], firsts[1]), strict=False):
        call.fix(lambda kept, edit, name=name, first=first: call.set(name, kept.count(first)))  # type: ignore[misc]
    return [(q[0], q[1], np.repeat(firsts[0], size)), *[None] * (len(call.node.outputs) - 1)]


@relation("com.microsoft.Attention")
def _packed(call: Call) -> Sequence[Labels | None] | None:
    """One weight makes queries, keys and values of all heads after one another; whole heads go."""
    heads, data, weight = int(call.attr("num_heads", 0)), call.axes(0), call.axes(1)
    width = call.dims(1)[1] if len(weight) == 2 else None
    if len(data) != 3 or not isinstance(width, int) or not heads:
        return None
    call.groups.seen(data[2], weight[1])
    call.groups.contract(call.node, 0, 2, call.join(data[2], weight[0]))
    columns = weight[1]
    if call.has(2):
        columns = call.join(columns, call.axes(2)[0])
    sizes = [int(n) for n in call.attr("qkv_hidden_sizes") or [width // 3] * 3]
    others = [t for t in call.node.outputs[1:] if t.name] or call.has(4) or call.attr("rotary_embedding_dim", 0)
    if columns is None or others or sum(sizes) != width or any(n % heads for n in sizes):
        call.pin(columns, "attends to heads that cannot change")
        for index in (3, 5):
            _mask(call, index, None)
        return [(data[0], data[1], None), *[None] * (len(call.node.outputs) - 1)]
    parts = np.split(columns, np.cumsum(sizes)[:-1])
    firsts = [call.together(part.reshape(heads, -1)) for part in parts]
    for other in firsts[1:]:
        call.groups.join(firsts[0], other)
    for index in (3, 5):  # where keys are padding, and what is added to scores
        _mask(call, index, firsts[0])
    call.fix(lambda kept, edit: call.set("num_heads", kept.count(firsts[0])))
    if call.attr("qkv_hidden_sizes"):
        call.fix(lambda kept, edit: call.node.attrs.update(qkv_hidden_sizes=[kept.count(part) for part in parts]))
    return [(data[0], data[1], parts[2]), *[None] * (len(call.node.outputs) - 1)]
