"""What each operator does with the channels of its operands: one function an operator, in one table.

A relation takes a `Call`, joins or pins the atoms of operands, and returns the labels of the results (None: it cannot tell, so everything
it reads is pinned). Where an attribute or a shape constant speaks of a size that may change, it leaves a fix for the slicing. An
operand that a relation does not ask for (`Call.axes`) is pinned.

| operator | relation |
|---|---|
| Conv | rows of the weight are the result's channels and the bias; columns are the operand's, summed over |
| depthwise Conv | channel c of the operand is rows c*m .. of the weight |
| grouped Conv | as Conv within each group; all groups must keep equally many |
| ConvTranspose, Gemm, MatMul | the same with their layouts; MatMul of two activations sums over both |
| BatchNormalization, PRelu, elementwise | index by index, with broadcasting |
| Concat, Split, Slice, Gather, Pad | an index map; sizes and bounds are rewritten |
| Reshape, Flatten | row-major index arithmetic: in a merge a channel becomes a run, in a split one axis carries the channels |
| DepthToSpace, SpaceToDepth | a channel is tied to its r*r |
| LayerNormalization, Softmax, ArgMax, TopK, ... | the axis they work along stays |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.symbolic import Dim, Expr
from graphopt.edit import Editor
from graphopt.ir import Node

if TYPE_CHECKING:
    from graphopt.analyses.channel_groups import Axis, ChannelGroups, Kept, Labels

Array = np.ndarray[Any, Any]
Relation = Callable[["Call"], "Sequence[Labels | None] | None"]

TABLE: Final[dict[str, Relation]] = {}
_END: Final = np.iinfo(np.int64).max


def known_domain(node: Node) -> bool:
    """Whether the table speaks of the operator's domain: ONNX's own, and ONNX Runtime's activations."""
    return node.is_onnx or (node.domain == "com.microsoft" and node.op in ("Gelu", "QuickGelu", "FastGelu", "BiasGelu"))


def _relation(*ops: str) -> Callable[[Relation], Relation]:
    def register(relation: Relation) -> Relation:
        TABLE.update(dict.fromkeys(ops, relation))
        return relation

    return register


class Call:
    """One node, as a relation sees it."""

    def __init__(self, groups: ChannelGroups, node: Node) -> None:
        self.groups = groups
        self.node = node
        self.touched: set[int] = set()

    def has(self, index: int) -> bool:
        """Whether operand `index` is given."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def axes(self, index: int) -> list[Axis]:
        """The labels of an operand, which the relation thereby answers for."""
        self.touched.add(index)
        return list(self.groups.labels(self.node.inputs[index]) or ())

    def dims(self, index: int) -> tuple[Dim, ...]:
        """The shape of an operand."""
        return self.groups.shapes.shape(self.node.inputs[index]) or ()

    def out_dims(self, index: int = 0) -> tuple[Dim, ...] | None:
        """The shape of a result."""
        return self.groups.shapes.shape(self.node.outputs[index])

    def ints(self, index: int) -> list[int] | None:
        """The numbers in an integer operand that no caller can change."""
        if not self.has(index):
            return None
        known = self.groups.shapes.integers(self.node.inputs[index])
        return None if known is None else [int(v) for v in known.reshape(-1)]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.node.attrs.get(name, default)

    def why(self, what: str) -> str:
        """A reason that names the node."""
        return f"node {self.node.name!r} ({self.node.op}) {what}"

    def pin(self, axis: Axis, what: str) -> None:
        """The channels on an axis must stay."""
        self.groups.pin(axis, self.why(what))

    def join(self, a: Axis, b: Axis, what: str = "combines it with an axis that cannot change") -> Axis:
        """Index by index together; with an axis that nothing tracks, pinned."""
        if a is None or b is None:
            self.pin(a if b is None else b, what)
            return None
        if len(a) != len(b):
            self.pin(a, what)
            self.pin(b, what)
            return None
        self.groups.join(a, b)
        return a

    def atoms(self, axis: Axis, size: Dim, what: str) -> Array:
        """The atoms of an axis, fresh pinned ones where nothing tracks it."""
        return (
            axis if axis is not None else self.groups.fresh(int(size) if isinstance(size, int) else 0, self.why(what))
        )

    def fix(self, change: Callable[[Kept, Editor], None]) -> None:
        """What to rewrite of the node when channels go."""
        self.groups.fixes.append(change)

    def store(self, index: int, attribute: str, edit: Editor, values: Sequence[int]) -> None:
        """Write integers where the node has them: in an operand, else in an attribute."""
        if index < len(self.node.inputs) and (self.has(index) or attribute not in self.node.attrs):
            old = self.node.inputs[index]
            self.node.inputs[index] = edit.constant(
                old.name or f"{self.node.name}_{attribute}", np.array(values, np.int64)
            )
        else:
            self.node.attrs[attribute] = list(values)


# ------------------------------------------------------------------------------------------------------ elementwise


@_relation(
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Gelu", "HardSwish", "HardSigmoid", "Elu", "Selu", "Celu", "Mish"),
    *(
        "Softplus",
        "Softsign",
        "ThresholdedRelu",
        "Shrink",
        "Exp",
        "Log",
        "Sqrt",
        "Abs",
        "Neg",
        "Floor",
        "Ceil",
        "Round",
    ),
    *("Reciprocal", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh"),
    *("Identity", "Cast", "CastLike", "Dropout", "Not", "IsNaN", "IsInf", "QuickGelu", "Swish", "Clip"),
)
def _unary(call: Call) -> Sequence[Labels | None]:
    labels = tuple(call.axes(0))
    for index in range(1, len(call.node.inputs)):  # bounds, ratios: of rank 0, or read for their dtype only
        if call.node.op == "CastLike" or (call.has(index) and not call.dims(index)):
            call.touched.add(index)
    return [labels] * len(call.node.outputs)


@_relation(
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "Mod", "And", "Or", "Xor", "PRelu"),
    *("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "BiasGelu", "FastGelu", "BitwiseAnd", "BitwiseOr"),
)
def _broadcasting(call: Call) -> Sequence[Labels | None]:
    operands = [(call.axes(i), call.dims(i)) for i in range(len(call.node.inputs)) if call.has(i)]
    return [_broadcast(call, operands)]


def _broadcast(call: Call, operands: Sequence[tuple[list[Axis], Sequence[Dim]]]) -> Labels:
    rank = max(len(labels) for labels, _ in operands)
    result: list[Axis] = []
    for axis in range(rank):
        wide: list[Axis] = []
        for labels, dims in operands:
            at = axis - rank + len(labels)
            if at >= 0 and dims[at] != 1:
                wide.append(labels[at])
        joined = wide[0] if wide else None
        for other in wide[1:]:
            joined = call.join(joined, other)
        result.append(joined)
    return tuple(result)


@_relation("BatchNormalization", "InstanceNormalization")
def _per_channel(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    if len(labels) < 2 or call.attr("training_mode", 0):
        return None
    for index in range(1, len(call.node.inputs)):
        if call.has(index):
            labels[1] = call.join(labels[1], call.axes(index)[0])
    return [tuple(labels)] + [None] * (len(call.node.outputs) - 1)


@_relation("LayerNormalization", "RMSNormalization")
def _layer_norm(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    axis = int(call.attr("axis", -1)) % len(labels)
    for index in range(axis, len(labels)):
        call.pin(labels[index], "normalizes over it")
        labels[index] = None
    return [tuple(labels)] + [None] * (len(call.node.outputs) - 1)


@_relation("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum")
def _along_axis(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    op = call.node.op
    axis = call.attr("axis", 1 if op.endswith("max") and call.groups.model.opset < 13 else -1)
    if op == "CumSum":
        known = call.ints(1)
        if known is None:
            return None
        axis = known[0]
    axis %= len(labels)
    last = len(labels) if op.endswith("max") and call.groups.model.opset < 13 else axis + 1
    for index in range(axis, last):
        call.pin(labels[index], "works along it")
        labels[index] = None
    return [tuple(labels)]


# -------------------------------------------------------------------------------------------------- matrix products


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


@_relation("Conv")
def _conv(call: Call) -> Sequence[Labels | None] | None:
    data, weight = call.axes(0), call.axes(1)
    size = call.dims(1)
    if len(data) < 3 or len(size) != len(data) or not all(isinstance(d, int) for d in size):
        return None
    for axis in data[2:]:
        call.pin(axis, "slides over it")
    for axis in weight[2:]:
        call.pin(axis, "has it as kernel")
    call.groups.seen(*weight[:2])
    groups = int(call.attr("group", 1))
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


def _depthwise(call: Call, channels: Axis, rows: Axis, groups: int) -> Axis:
    if rows is None or channels is None:
        call.pin(rows, "combines it with an axis that cannot change")
        call.pin(channels, "combines it with an axis that cannot change")
        return None
    multiplier = len(rows) // groups
    for offset in range(multiplier):
        call.groups.join(channels, rows[offset::multiplier])

    def fix(kept: Kept, edit: Editor) -> None:
        call.node.attrs["group"] = kept.count(channels)

    call.fix(fix)
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


@_relation("ConvTranspose")
def _conv_transpose(call: Call) -> Sequence[Labels | None] | None:
    data, weight = call.axes(0), call.axes(1)
    if len(data) < 3 or len(weight) != len(data):
        return None
    for axis in data[2:]:
        call.pin(axis, "slides over it")
    for axis in weight[2:]:
        call.pin(axis, "has it as kernel")
    call.groups.seen(*weight[:2])
    groups = int(call.attr("group", 1))
    rows = weight[1]
    if groups == 1:
        joined = call.join(data[1], weight[0])
        call.groups.contract(call.node, 0, 1, joined)
    elif call.dims(1)[1] == 1 and data[1] is not None and weight[0] is not None:
        rows = channels = call.join(data[1], weight[0])
        if channels is not None:
            call.fix(lambda kept, edit: call.node.attrs.__setitem__("group", kept.count(channels)))
    else:
        call.pin(data[1], "is a grouped transposed convolution")
        call.pin(weight[0], "is a grouped transposed convolution")
        call.pin(weight[1], "is a grouped transposed convolution")
        rows = None
    if call.has(2):
        rows = call.join(rows, call.axes(2)[0]) if rows is not None or groups == 1 else _pinned(call, call.axes(2)[0])
    return [(data[0], rows, *[None] * (len(data) - 2))]


def _pinned(call: Call, axis: Axis) -> Axis:
    call.pin(axis, "combines it with an axis that cannot change")
    return None


@_relation("Gemm")
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
            m, n = _broadcast(call, [([m, n], extent), (call.axes(2), call.dims(2))])
    return [(m, n)]


@_relation("MatMul")
def _matmul(call: Call) -> Sequence[Labels | None] | None:
    a, b = call.axes(0), call.axes(1)
    if len(a) < 2 or len(b) < 2:
        return None
    call.groups.seen(a[-1], b[-1], b[-2])
    joined = call.join(a[-1], b[-2])
    call.groups.contract(call.node, 0, len(a) - 1, joined)
    batch: Labels = ()
    if len(a) > 2 or len(b) > 2:
        batch = _broadcast(call, [(a[:-2], call.dims(0)[:-2]), (b[:-2], call.dims(1)[:-2])])
    return [(*batch, a[-2], b[-1])]


# ------------------------------------------------------------------------------------------------- pools and reduces


@_relation("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _pool(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    for axis in labels[2:]:
        call.pin(axis, "slides over it")
    result = (*labels[:2], *[None] * (len(labels) - 2))
    return [result] + [None] * (len(call.node.outputs) - 1)


@_relation(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum"),
    *("ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin"),
)
def _reduce(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    axes = [call.attr("axis", 0)] if call.node.op.startswith("Arg") else call.attr("axes")
    if axes is None and call.has(1):
        axes = call.ints(1)
        if axes is None:
            return None
    if not axes:
        axes = [] if call.attr("noop_with_empty_axes", 0) else range(len(labels))
    gone = {int(a) % len(labels) for a in axes}
    for axis in sorted(gone):
        call.pin(labels[axis], "reduces over it")
    if call.attr("keepdims", 1):
        return [tuple(None if i in gone else axis for i, axis in enumerate(labels))]
    return [tuple(axis for i, axis in enumerate(labels) if i not in gone)]


# ------------------------------------------------------------------------------------------------------- index maps


@_relation("Transpose")
def _transpose(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    perm = call.attr("perm") or range(len(labels))[::-1]
    return [tuple(labels[int(p)] for p in perm)]


@_relation("Squeeze", "Unsqueeze", "Reshape", "Flatten")
def _reshape(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    before, after = call.dims(0), call.out_dims()
    if after is None:
        return None
    result: list[Axis] = [None] * len(after)
    for old, new in _segments(call, before, after):
        sizes = [before[i] for i in old]
        if not all(isinstance(d, int) for d in [*sizes, *(after[j] for j in new)]):
            for i in old:
                call.pin(labels[i], "mixes it with a dimension that is known at run time only")
            continue
        flat = _merged(call, [labels[i] for i in old], [int(d) for d in sizes if isinstance(d, int)])
        if flat is None:
            continue
        if len(new) == 1:
            result[new[0]] = flat
        elif new:
            carrier, atoms = _split_axis(call, flat, [d for j in new if isinstance(d := after[j], int)])
            result[new[carrier]] = atoms
        else:
            call.pin(flat, "drops it")
    if call.node.op == "Reshape":
        _fix_target(call, result, before, after)
    return [tuple(result)]


def _segments(call: Call, before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """The runs of axes, without those of size 1, that a reshape maps onto each other; what it cannot part is one run in the middle."""
    old = [i for i, d in enumerate(before) if d != 1]
    new = [j for j, d in enumerate(after) if d != 1]
    found: list[tuple[list[int], list[int]]] = []
    for end in (-1, 0):  # from behind first: leading dimensions are the unknown ones
        while old and new:
            a, b = [old[end]], [new[end]]
            took = _match(before, after, old, new, a, b, end)
            if not took:
                break
            found.append((sorted(a), sorted(b)))
            old = [i for i in old if i not in a]
            new = [j for j in new if j not in b]
    if old or new:
        found.append((old, new))
    return found


def _match(
    before: Sequence[Dim], after: Sequence[Dim], old: list[int], new: list[int], a: list[int], b: list[int], end: int
) -> bool:
    """Grow two runs from one end until their sizes agree."""
    x, y = before[a[0]], after[b[0]]
    if isinstance(x, Expr) or isinstance(y, Expr):
        return x == y
    while x != y:
        mine, theirs, taken = (before, old, a) if x < y else (after, new, b)
        if len(taken) == len(theirs):
            return False
        step = theirs[-1 - len(taken)] if end else theirs[len(taken)]
        dim = mine[step]
        if isinstance(dim, Expr):
            return False
        taken.append(step)
        if mine is before:
            x *= dim
        else:
            y *= dim
    return True


def _merged(call: Call, labels: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """The atoms along axes that become one: those of the axis that carries channels, each a run or a comb."""
    tracked = [i for i, axis in enumerate(labels) if axis is not None]
    if not tracked:
        return None
    free = [i for i in tracked if not call.groups.is_pinned(labels[i])]  # type: ignore[arg-type]
    carrier = (free or tracked)[-1]
    for i in tracked:
        if i != carrier:
            call.pin(labels[i], "merges it with another axis of channels")
    atoms = labels[carrier]
    assert atoms is not None
    shape = [1] * len(sizes)
    shape[carrier] = sizes[carrier]
    return np.broadcast_to(atoms.reshape(shape), sizes).reshape(-1)


def _split_axis(call: Call, flat: Array, sizes: Sequence[int]) -> tuple[int, Array]:
    """Choose the axis that carries the channels of a split one, and tie all that share an index on it."""
    roots = np.array([call.groups.find(a) for a in flat.tolist()]).reshape(sizes)
    counts = [_components(np.moveaxis(roots, axis, 0).reshape(n, -1)) for axis, n in enumerate(sizes)]
    useful = [axis for axis, count in enumerate(counts) if count > 1]
    best = max(range(len(sizes)), key=lambda axis: (counts[axis], axis))
    name = call.node.name
    chosen = call.groups.carriers.get(name, best)
    if len(useful) > 1:
        call.groups.ambiguous[name] = tuple(axis for axis in useful if axis != chosen)
    lines = np.moveaxis(flat.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1)
    for column in range(1, lines.shape[1]):
        call.groups.join(lines[:, 0], lines[:, column])
    return chosen, lines[:, 0].copy()


def _components(rows: Array) -> int:
    """How many classes are left when the members of each row become one."""
    parent = {int(root): int(root) for root in np.unique(rows)}

    def find(root: int) -> int:
        while parent[root] != root:
            root = parent[root]
        return root

    for row in rows.tolist():
        for other in row[1:]:
            parent[find(other)] = find(row[0])
    return sum(1 for root in parent if parent[root] == root)


def _fix_target(call: Call, labels: Sequence[Axis], before: Sequence[Dim], after: Sequence[Dim]) -> None:
    """Write the target anew: sizes that stay, counts of channels, -1 for one unknown dimension, 0 for copied ones."""
    tracked = [axis for axis in labels if axis is not None]
    sources = [axis for axis in call.groups.labels(call.node.inputs[0]) or () if axis is not None]
    if not tracked and not sources:
        return
    plan: list[int | Array] = []
    unknown = 0
    for j, dim in enumerate(after):
        axis = labels[j]
        if axis is not None:
            plan.append(axis)
        elif isinstance(dim, int):
            plan.append(dim)
        elif j < len(before) and before[j] == dim:
            plan.append(0)
        else:
            plan.append(-1)
            unknown += 1
    if unknown > 1 or any(isinstance(p, int) and p == 0 and isinstance(after[j], int) for j, p in enumerate(plan)):
        for axis in [*tracked, *sources]:
            call.pin(axis, "has more than one dimension that is known at run time only")
        return

    def fix(kept: Kept, edit: Editor) -> None:
        if all(kept.mask(axis).all() for axis in [*tracked, *sources]):
            return
        call.node.attrs.pop("allowzero", None)
        call.store(1, "shape", edit, [p if isinstance(p, int) else kept.count(p) for p in plan])

    call.fix(fix)
    call.touched.add(1)


@_relation("Concat")
def _concat(call: Call) -> Sequence[Labels | None] | None:
    operands = [call.axes(i) for i in range(len(call.node.inputs))]
    rank = len(operands[0])
    axis = int(call.attr("axis", 1)) % rank if rank else 0
    if any(len(labels) != rank for labels in operands):
        return None
    result: list[Axis] = []
    for at in range(rank):
        if at != axis:
            joined = operands[0][at]
            for labels in operands[1:]:
                joined = call.join(joined, labels[at])
            result.append(joined)
            continue
        parts = [labels[axis] for labels in operands]
        if all(part is None for part in parts):
            result.append(None)
            continue
        sizes = [call.dims(i)[axis] for i in range(len(parts))]
        if not all(isinstance(n, int) for n in sizes):
            for part in parts:
                call.pin(part, "appends it to a dimension that is known at run time only")
            result.append(None)
            continue
        result.append(np.concatenate([call.atoms(p, n, "appends it") for p, n in zip(parts, sizes, strict=True)]))
    return [tuple(result)]


@_relation("Split")
def _split(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    axis = int(call.attr("axis", 0)) % len(labels)
    channels = labels[axis]
    call.touched.add(1)
    if channels is None:
        return [tuple(labels)] * len(call.node.outputs)
    sizes = []
    for index in range(len(call.node.outputs)):
        size = (call.out_dims(index) or (None,) * len(labels))[axis]
        if not isinstance(size, int):
            return None
        sizes.append(size)
    parts = np.split(channels, np.cumsum(sizes)[:-1])

    def fix(kept: Kept, edit: Editor) -> None:
        if kept.mask(channels).all():
            return
        call.node.attrs.pop("num_outputs", None)
        counts = [kept.count(part) for part in parts]
        if call.groups.model.opset < 13:
            call.node.attrs["split"] = counts
        elif len(call.node.inputs) > 1:
            call.store(1, "split", edit, counts)
        else:
            call.node.inputs.append(edit.constant(f"{call.node.name}_split", np.array(counts, np.int64)))

    call.fix(fix)
    return [tuple(part if i == axis else other for i, other in enumerate(labels)) for part in parts]


@_relation("Slice")
def _slice(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    old = call.groups.model.opset < 10
    starts, ends = (call.attr("starts"), call.attr("ends")) if old else (call.ints(1), call.ints(2))
    axes = call.attr("axes") if old else call.ints(3)
    steps = None if old else call.ints(4)
    call.touched.update((1, 2, 3, 4))
    if starts is None or ends is None or (axes is None and call.has(3)) or (steps is None and call.has(4)):
        return _slice_unknown(call, labels, axes)
    axes = [int(a) % len(labels) for a in (axes if axes is not None else range(len(starts)))]
    steps = steps or [1] * len(starts)
    result = list(labels)
    changed: dict[int, tuple[Array, slice]] = {}
    for place, axis in enumerate(axes):
        channels = labels[axis]
        if channels is None:
            continue
        taken = slice(*_bounds(starts[place], ends[place], len(channels), steps[place]))
        if steps[place] != 1:
            call.pin(channels, "takes every other index of it")
            result[axis] = None
            continue
        result[axis] = channels[taken]
        changed[place] = channels, taken

    def fix(kept: Kept, edit: Editor) -> None:
        if all(kept.mask(channels).all() for channels, _ in changed.values()):
            return
        first, last = list(starts), list(ends)
        for place, (channels, taken) in changed.items():
            first[place] = kept.count(channels[: taken.start])
            last[place] = first[place] + kept.count(channels[taken])
        call.store(1, "starts", edit, first)
        call.store(2, "ends", edit, last)

    if changed:
        call.fix(fix)
    return [tuple(result)]


def _slice_unknown(call: Call, labels: list[Axis], axes: Sequence[int] | None) -> Sequence[Labels | None]:
    """Bounds that are computed: only the axes they speak of are lost."""
    lost = {int(a) % len(labels) for a in axes} if axes is not None else set(range(len(labels)))
    for axis in sorted(lost):
        call.pin(labels[axis], "slices it by computed bounds")
    return [tuple(None if i in lost else axis for i, axis in enumerate(labels))]


def _bounds(start: int, end: int, size: int, step: int) -> tuple[int, int, int]:
    return slice(start, end, step).indices(size) if step > 0 else (0, size, 1)


@_relation("Gather")
def _gather(call: Call) -> Sequence[Labels | None] | None:
    labels, indices = call.axes(0), call.axes(1)
    axis = int(call.attr("axis", 0)) % len(labels)
    channels, wanted = labels[axis], call.ints(1)
    for other in indices:
        call.pin(other, "reads it as indices")
    picked: list[Axis] = [None] * len(indices)
    if channels is not None:
        if wanted is None or len(indices) != 1:
            call.pin(channels, "picks from it by index")
        else:
            chosen = [i % len(channels) for i in wanted]
            picked = [channels[chosen]]

            def fix(kept: Kept, edit: Editor) -> None:
                mask = kept.mask(channels)
                if not mask.all():
                    places = np.cumsum(mask) - 1
                    call.store(1, "indices", edit, [int(places[i]) for i in chosen if mask[i]])

            call.fix(fix)
    return [(*labels[:axis], *picked, *labels[axis + 1 :])]


@_relation("Pad")
def _pad(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    pads = call.attr("pads") if call.groups.model.opset < 11 else call.ints(1)
    if pads is None or call.has(3):
        return None
    call.touched.update((1, 2))
    rank = len(labels)
    result = list(labels)
    changed: list[tuple[int, Array, Array, Array]] = []
    for axis in range(rank):
        channels = labels[axis]
        before, after = int(pads[axis]), int(pads[rank + axis])
        if channels is None or (before == 0 and after == 0):
            continue
        if before < 0 or after < 0 or call.attr("mode", "constant") != "constant":
            call.pin(channels, "pads it with more than a constant")
            result[axis] = None
            continue
        left, right = call.groups.fresh(before), call.groups.fresh(after)
        result[axis] = np.concatenate([left, channels, right])
        changed.append((axis, left, channels, right))

    def fix(kept: Kept, edit: Editor) -> None:
        if all(kept.mask(a).all() for entry in changed for a in entry[1:]):
            return
        sizes = [int(p) for p in pads]
        for axis, left, _, right in changed:
            sizes[axis], sizes[rank + axis] = kept.count(left), kept.count(right)
        call.store(1, "pads", edit, sizes)

    if changed:
        call.fix(fix)
    return [tuple(result)]


@_relation("Expand", "Tile")
def _expand(call: Call) -> Sequence[Labels | None] | None:
    labels, before, after = call.axes(0), call.dims(0), call.out_dims()
    value = call.groups.shapes.value(call.node.inputs[1])
    if after is None or value is None:
        return None
    call.touched.add(1)
    offset = len(after) - len(labels)
    neutral = [True] * len(labels) + [v == 1 for v in value.reshape(-1).tolist()]
    rewrite = [i for i, axis in enumerate(labels) if axis is not None and not neutral[i - len(labels)]]
    if call.node.op == "Tile" or any(isinstance(v, Expr) for v in value.flat):
        for i in rewrite:
            call.pin(labels[i], "repeats it" if call.node.op == "Tile" else "states its size at run time")
        rewrite = []
    result: list[Axis] = [None] * offset
    result.extend(axis if before[i] == after[i + offset] else None for i, axis in enumerate(labels))

    def fix(kept: Kept, edit: Editor) -> None:
        sizes = [int(v) for v in value.flat]
        for i in rewrite:
            sizes[i - len(labels)] = 1
        call.store(1, "shape", edit, sizes)

    if rewrite:
        call.fix(lambda kept, edit: None if all(kept.mask(labels[i]).all() for i in rewrite) else fix(kept, edit))  # type: ignore[arg-type]
    return [tuple(result)]


@_relation("DepthToSpace", "SpaceToDepth")
def _depth_space(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    if len(labels) != 4 or labels[1] is None:
        return [(labels[0] if labels else None, None, None, None)]
    square = int(call.attr("blocksize")) ** 2
    channels = labels[1]
    if call.node.op == "SpaceToDepth":
        return [(labels[0], np.tile(channels, square), None, None)]
    crd = call.attr("mode", "DCR") == "CRD"
    lines = channels.reshape(-1, square) if crd else channels.reshape(square, -1).T
    for column in range(1, square):
        call.groups.join(lines[:, 0], lines[:, column])
    return [(labels[0], lines[:, 0].copy(), None, None)]


@_relation("Resize", "Upsample")
def _resize(call: Call) -> Sequence[Labels | None] | None:
    labels, before, after = call.axes(0), call.dims(0), call.out_dims()
    if after is None or len(after) != len(before) or call.attr("axes") is not None:
        return None
    call.touched.update(range(1, len(call.node.inputs)))
    result: list[Axis] = []
    for axis, channels in enumerate(labels):
        same = before[axis] == after[axis]
        if not same:
            call.pin(channels, "resizes it")
        result.append(channels if same else None)
    tracked = [i for i, axis in enumerate(result) if axis is not None]
    if call.node.op == "Resize" and call.has(3) and tracked:
        sizes = call.ints(3)
        if sizes is None:
            for i in tracked:
                call.pin(result[i], "states its size at run time")
            return [tuple(result)]

        def fix(kept: Kept, edit: Editor) -> None:
            wanted = list(sizes)
            for i in tracked:
                atoms = result[i]
                assert atoms is not None
                wanted[i] = kept.count(atoms)
            if wanted != sizes:
                call.store(3, "sizes", edit, wanted)

        call.fix(fix)
    return [tuple(result)]


@_relation("Shape")
def _shape(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    start, end = int(call.attr("start", 0)), int(call.attr("end", _END))
    read = set(range(len(labels))[start:end])
    for axis, channels in enumerate(labels):
        if axis in read and channels is not None and _reads(call, axis - min(read)):
            call.pin(channels, "reads its size")
    return [(None,)]


def _reads(call: Call, place: int) -> bool:
    """Whether anyone who reads a Shape looks at the element `place`; those who pick others are let through."""
    result = call.node.outputs[0]
    if any(result is t for t in call.groups.model.graph.outputs):
        return True
    for reader in result.outputs:
        if reader.op == "Gather" and reader.inputs[0] is result:
            wanted = call.groups.shapes.integers(reader.inputs[1])
            size = len(call.dims(0))
            if wanted is not None and place not in {int(i) % size for i in wanted.flat}:
                continue
        if reader.op == "Slice" and reader.inputs[0] is result and len(reader.inputs) > 2:
            first, last = (call.groups.shapes.integers(t) for t in reader.inputs[1:3])
            if first is not None and last is not None and len(reader.inputs) < 5:
                seen = range(len(call.dims(0)))[int(first.flat[0]) : int(last.flat[0])]
                if place not in seen:
                    continue
        return True
    return False
