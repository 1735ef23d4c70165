"""Channel relations of convolutions and matrix products: where channels are summed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.channel_call import Call, broadcast, relation
from graphopt.analyses.symbolic import Dim

if TYPE_CHECKING:
    from graphopt.analyses.channel_groups import Axis, Kept, Labels

Array = np.ndarray[Any, Any]


class BlockSlice:
    """How the weight of a grouped convolution is sliced: each group's rows keep their own columns."""

    def __init__(self, rows: Sequence[Array], columns: Sequence[Axis]) -> None:
        self.rows = rows
        self.columns = columns

    def __call__(self, kept: Kept, values: Array) -> Array:
        """The weight with what stays."""
        blocks = []
        start = 0
        for rows, columns in zip(self.rows, self.columns, strict=True):
            block = values[start : start + len(rows)][kept.indices(rows)]
            start += len(rows)
            blocks.append(block if columns is None else block[:, kept.indices(columns)])
        return np.concatenate(blocks)


@relation("Conv")
def _conv(call: Call) -> Sequence[Labels | None] | None:
    data, weight = call.axes(0), call.axes(1)
    size = call.dims(1)
    if len(data) < 3 or len(size) != len(data) or not all(isinstance(d, int) for d in size):
        return None
    groups = _windows(call, data, weight)
    rows = weight[0]
    if groups == 1:
        joined = call.join(data[1], weight[1])
        call.groups.contract(call.node, 0, 1, joined)
    elif size[1] == 1:
        rows = _depthwise(call, data[1], weight[0], groups)
    else:
        rows = _grouped(call, data[1], weight, groups)
    if call.has(2):
        rows = call.join(rows, call.axes(2)[0])
    return [(data[0], rows, *[None] * (len(data) - 2))]


def _windows(call: Call, data: Sequence[Axis], weight: Sequence[Axis]) -> int:
    """Pin what a kernel slides over, and its taps; the number of groups."""
    for axis in data[2:]:
        call.pin(axis, "slides over it")
    for axis in weight[2:]:
        call.pin(axis, "has it as kernel")
    call.groups.seen(*weight[:2])
    return int(call.attr("group", 1))


def _depthwise(call: Call, channels: Axis, rows: Axis, groups: int) -> Axis:
    if rows is None or channels is None:
        call.pin(rows, "combines it with an axis that cannot change")
        call.pin(channels, "combines it with an axis that cannot change")
        return None
    multiplier = len(rows) // groups
    for offset in range(multiplier):
        call.groups.join(channels, rows[offset::multiplier])

    call.fix(lambda kept, edit: call.set("group", kept.count(channels)))
    return rows


def _grouped(call: Call, channels: Axis, weight: list[Axis], groups: int) -> Axis:
    tensor, rows = call.node.inputs[1], weight[0]
    call.pin(weight[1], "is grouped over it")
    if rows is None or not isinstance(tensor, gs.Constant):
        call.pin(channels, "is grouped and its weight is computed")
        return None
    record = call.groups.weight(tensor)
    record.users += 1
    if record.users > 1 or len(tensor.outputs) > 1:
        call.pin(channels, "is grouped and shares its weight")
        call.pin(rows, "is grouped and shares its weight")
        return rows
    rows_of = np.split(rows, groups)
    columns_of: list[Axis] = [None] * groups
    call.groups.balances.append(tuple(rows_of))
    if channels is not None:
        columns_of = list(np.split(channels, groups))
        call.groups.balances.append(tuple(c for c in columns_of if c is not None))
        call.groups.contract(call.node, 0, 1, channels)
    record.custom = BlockSlice(rows_of, columns_of)
    return rows


@relation("ConvTranspose")
def _conv_transpose(call: Call) -> Sequence[Labels | None] | None:
    data, weight = call.axes(0), call.axes(1)
    if len(data) < 3 or len(weight) != len(data):
        return None
    groups = _windows(call, data, weight)
    rows, channels = weight[1], call.join(data[1], weight[0])
    if groups == 1:
        call.groups.contract(call.node, 0, 1, channels)
    elif call.dims(1)[0] == groups:  # depthwise: a channel takes its run of results with it
        call.pin(rows, "is depthwise and shares it among channels")
        size = call.dims(1)[1]
        rows = None if channels is None or not isinstance(size, int) else np.repeat(channels, size)
        if channels is not None:
            call.fix(lambda kept, edit: call.set("group", kept.count(channels)))
    else:  # every group keeps equally many channels, and the same results
        if channels is not None:
            call.groups.balances.append(tuple(np.split(channels, groups)))
            call.groups.contract(call.node, 0, 1, channels)
        rows = None if rows is None else np.tile(rows, groups)
    if call.has(2):
        rows = call.join(rows, call.axes(2)[0])
    return [(data[0], rows, *[None] * (len(data) - 2))]


@relation("Gemm")
def _gemm(call: Call) -> Sequence[Labels | None]:
    a, b = call.axes(0), call.axes(1)
    call.groups.seen(*a, *b)
    inner = 0 if call.attr("transA", 0) else 1
    joined = call.join(a[inner], b[1 if call.attr("transB", 0) else 0])
    call.groups.contract(call.node, 0, inner, joined)
    m, n = a[1 - inner], b[0 if call.attr("transB", 0) else 1]
    if call.has(2):
        extent = call.out_dims()
        if extent is not None:
            m, n = broadcast(call, [([m, n], extent), (call.axes(2), call.dims(2))])
    return [(m, n)]


@relation("MatMul")
def _matmul(call: Call) -> Sequence[Labels | None] | None:
    a, b = call.axes(0), call.axes(1)
    if len(a) < 2 or len(b) < 2:
        call.groups.seen(*a, *b)
        return None
    call.groups.seen(a[-1], b[-1], b[-2])
    joined = call.join(a[-1], b[-2])
    call.groups.contract(call.node, 0, len(a) - 1, joined)
    batch: Labels = ()
    if len(a) > 2 or len(b) > 2:
        batch = broadcast(call, [(a[:-2], call.dims(0)[:-2]), (b[:-2], call.dims(1)[:-2])])
    return [(*batch, a[-2], b[-1])]


@relation("Einsum")
def _einsum(call: Call) -> Sequence[Labels | None] | None:
    """A letter is one axis wherever it stands; those that the result lacks are summed over."""
    terms, _, result = str(call.attr("equation", "")).replace(" ", "").partition("->")
    operands = [call.axes(i) for i in range(len(call.node.inputs))]
    parts = terms.split(",")
    if not result or "." in terms or len(parts) != len(operands):
        return None
    if any(len(set(part)) != len(part) or len(part) != len(axes) for part, axes in zip(parts, operands, strict=True)):
        return None
    sizes: dict[str, list[tuple[Axis, Dim]]] = {}
    for index, (part, axes) in enumerate(zip(parts, operands, strict=True)):
        for letter, axis, dim in zip(part, axes, call.dims(index), strict=True):
            sizes.setdefault(letter, []).append((axis, dim))
    joined: dict[str, Axis] = {}
    for letter, found in sizes.items():
        wide = [axis for axis, dim in found if dim != 1] or [None]
        joined[letter] = wide[0]
        for other in wide[1:]:
            joined[letter] = call.join(joined[letter], other)
    for index, part in enumerate(parts):
        for place, letter in enumerate(part):
            if letter not in result and next(i for i, p in enumerate(parts) if letter in p) == index:
                call.groups.contract(call.node, index, place, joined[letter])
    for atoms in joined.values():
        call.groups.seen(atoms)
    return [tuple(joined.get(letter) for letter in result)]


@relation("LSTM", "GRU", "RNN")
def _recurrent(call: Call) -> Sequence[Labels | None] | None:
    """A hidden unit is a row of each gate, a column of the recurrence, an index of all results and states; directions share it."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[call.node.op]
    data, weight, recurrence = call.axes(0), call.axes(1), call.axes(2)
    if len(data) != 3 or len(weight) != 3 or not isinstance(call.dims(2)[2], int):
        return None
    call.pin(data[0], "goes through it in time")
    call.pin(data[1], "goes through it in time")
    for axis in (weight[0], recurrence[0]):
        call.pin(axis, "has it as directions")
    call.groups.seen(data[2], recurrence[2])
    call.groups.contract(call.node, 0, 2, call.join(data[2], weight[2]))
    hidden = recurrence[2]
    if hidden is not None:
        call.groups.contract(call.node, 2, 2, hidden)
        call.fix(lambda kept, edit: call.set("hidden_size", kept.count(hidden)))
    tied = [(1, 1, gates), (2, 1, gates), (3, 1, 2 * gates), (5, 2, 1), (6, 2, 1), (7, 1, 3)]
    for index, place, copies in tied:
        if call.has(index):
            other = call.axes(index)[place]
            call.join(None if hidden is None else np.tile(hidden, copies), other)
    if call.has(4):
        call.axes(4)
    last: Labels = (None, None, hidden)
    shapes = [(None, *last), last, last]
    return shapes[: len(call.node.outputs)]
