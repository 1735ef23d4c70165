"""Channel relations of what moves, joins, parts or repeats indices, and of the shapes that speak of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.channel_call import Call, relation
from graphopt.analyses.symbolic import Dim, Expr
from graphopt.edit import Editor
from graphopt.ir import Node

if TYPE_CHECKING:
    from graphopt.analyses.channel_groups import Axis, Kept, Labels

Array = np.ndarray[Any, Any]

_END: Final = np.iinfo(np.int64).max
_MOST_ATOMS: Final = 1 << 24  # of one axis; a longer one carries no channels that anyone prunes


@relation("Transpose")
def _transpose(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    perm = call.attr("perm") or range(len(labels))[::-1]
    return [tuple(labels[int(p)] for p in perm)]


@relation("Squeeze", "Unsqueeze", "Reshape", "Flatten")
def _reshape(call: Call) -> Sequence[Labels | None] | None:
    labels = call.axes(0)
    before, after = call.dims(0), call.out_dims()
    if after is None:
        return None
    result: list[Axis] = [None] * len(after)
    for old, new in _segments(call, before, after):
        sizes = [before[i] for i in old]
        if not all(isinstance(d, int) for d in [*sizes, *(after[j] for j in new)]):
            if _by_groups(call, labels, before, after, old, new, result) or _folds(call, labels, old, new, result):
                continue
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


def _by_groups(
    call: Call,
    labels: Sequence[Axis],
    before: Sequence[Dim],
    after: Sequence[Dim],
    old: Sequence[int],
    new: Sequence[int],
    result: list[Axis],
) -> bool:
    """Channels beside dimensions known at run time only: folded into groups in front of them, or into heads behind them.

    ``[C, H, W] -> [G, ...]`` as for a group normalization, and ``[N, H * d] -> [N * H, d]`` as for attention, both there and back.
    """
    for end in (0, -1):
        if not old or not new:
            return False
        place, atoms = new[end], labels[old[end]]
        few, many = before[old[end]], after[place]
        others = [labels[i] for i in old if i != old[end]]
        if atoms is None or not isinstance(few, int) or not isinstance(many, int) or any(o is not None for o in others):
            continue
        if few % many == 0:
            table = atoms.reshape(many, -1) if end == 0 else atoms.reshape(-1, many).T
            result[place] = call.together(table)
        elif many % few == 0:
            result[place] = np.repeat(atoms, many // few) if end == 0 else np.tile(atoms, many // few)
        else:
            continue
        return True
    return False


def _folds(call: Call, labels: Sequence[Axis], old: Sequence[int], new: Sequence[int], result: list[Axis]) -> bool:
    """Heads that are one axis with a batch known at run time only, for the time of a Transpose: they are carried past it.

    ``[N, H, a, b] -> [N * H, a, b] -> [N * H, b, a] -> [N, H, b, a]``, as exporters write the keys of attention.
    """
    folded, node = call.groups.folded, call.node
    if id(node) in folded:
        atoms = folded[id(node)]
        if list(old) == [0] and list(new) == [0, 1] and labels[0] is None:
            result[1] = atoms
            return True
        call.pin(atoms, "mixes it with a dimension that is known at run time only")
        return False
    if list(old) != [0, 1] or list(new) != [0] or labels[0] is not None or labels[1] is None or call.ints(1) is None:
        return False
    chain: list[Node] = []
    for op in ("Transpose", "Reshape"):
        (tensor,) = (chain[-1] if chain else node).outputs
        if len(tensor.outputs) != 1 or tensor.outputs[0].op != op or any(tensor is o for o in call.groups.outputs):
            return False
        chain.append(tensor.outputs[0])
    move, last = chain
    before, after = call.groups.shapes.shape(node.inputs[0]), call.groups.shapes.shape(last.outputs[0])
    perm = [int(p) for p in move.attrs.get("perm", ())]
    if before is None or after is None or len(before) != 4 or len(after) != 4 or len(perm) != 3 or perm[0]:
        return False
    moved = [before[1 + p] for p in perm[1:]]
    if list(after) != [*before[:2], *moved] or not isinstance(last.inputs[1], gs.Constant):
        return False
    atoms = labels[1]
    folded[id(last)] = atoms

    def fix(kept: Kept, edit: Editor) -> None:
        if not kept.mask(atoms).all():
            for tensor in (*node.outputs, *move.outputs):
                tensor.shape = None

    call.fix(fix)
    return True


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
    tracked = {i: axis for i, axis in enumerate(labels) if axis is not None}
    if not tracked:
        return None
    if math.prod(sizes) > _MOST_ATOMS:
        for atoms in tracked.values():
            call.pin(atoms, "merges it into an axis that is too long to follow")
        return None
    free = [i for i, atoms in tracked.items() if not call.groups.is_pinned(atoms)]
    own = [i for i in free if tracked[i][0] not in call.groups.copies]  # of keys that heads share, not their repeats
    carrier = (own or free or list(tracked))[-1]
    for i, atoms in tracked.items():
        if i != carrier:
            call.pin(atoms, "merges it with another axis of channels")
    atoms = tracked[carrier]
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
    return chosen, call.together(np.moveaxis(flat.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1))


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
    """State what stays, counts of channels, and as it was what is known at run time only."""
    known = call.ints(1)
    plan: list[int | Array | None] = []
    for j, dim in enumerate(after):
        axis = labels[j]
        if axis is not None:
            plan.append(axis)
        elif isinstance(dim, int) and dim:
            plan.append(dim)
        else:
            plan.append(None if known is None else known[j])
    sources = [axis for axis in call.groups.labels(call.node.inputs[0]) or () if axis is not None]
    if any(dim == 0 for dim in (*before, *after)):
        for axis in [*(axis for axis in labels if axis is not None), *sources]:
            call.pin(axis, "has a dimension of size 0")
        return
    if known is None and sum(p is None for p in plan) == 1:
        plan = [-1 if p is None else p for p in plan]
    call.restate(1, "shape", plan)


@relation("Concat")
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


@relation("Split")
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


@relation("Slice")
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


@relation("Gather")
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


@relation("Pad")
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


@relation("Expand")
def _expand(call: Call) -> Sequence[Labels | None] | None:
    """A repeated index is one as good as another: such axes get channels of their own, tied by whoever combines them with others."""
    labels, before, after = call.axes(0), call.dims(0), call.out_dims()
    if after is None or len(after) < len(labels):
        return None
    offset = len(after) - len(labels)
    result: list[Axis] = []
    plan: list[int | Array | None] = []
    for place, dim in enumerate(after):
        i = place - offset
        if i >= 0 and before[i] != 1:
            same = before[i] == dim
            if not same:
                call.pin(labels[i], "states its size at run time")
            result.append(labels[i] if same else None)
            plan.append(1 if same and isinstance(dim, int) else None)
        else:
            result.append(_copies(call, dim))
            plan.append(result[-1] if result[-1] is not None else dim if isinstance(dim, int) else None)
    known = call.ints(1)
    stated = len(after) if known is None and call.dims(1) == (len(after),) else len(known or ())
    if stated < len(after):  # leading dimensions are the operand's own
        plan = [1 if p is None and j < len(after) - stated else p for j, p in enumerate(plan)]
    if known is not None:
        plan = [known[j - len(after)] if p is None else p for j, p in enumerate(plan)]
    elif stated < len(after):
        return None
    call.restate(1, "shape", plan, watch=labels)
    return [tuple(result)]


@relation("ConstantOfShape")
def _constant_of_shape(call: Call) -> Sequence[Labels | None] | None:
    dims = call.out_dims()
    if dims is None:
        return None
    result = [_copies(call, dim) for dim in dims]
    call.restate(
        0,
        "",
        [axis if axis is not None else d if isinstance(d, int) else None for axis, d in zip(result, dims, strict=True)],
    )
    return [tuple(result)]


def _copies(call: Call, dim: Dim) -> Axis:
    if not isinstance(dim, int) or not 1 < dim <= _MOST_ATOMS:
        return None
    axis = call.groups.fresh(dim)
    call.groups.copies.update(axis.tolist())
    return axis


@relation("Tile")
def _tile(call: Call) -> Sequence[Labels | None] | None:
    labels, repeats = call.axes(0), call.ints(1)
    if repeats is None or len(repeats) != len(labels):
        return None
    call.touched.add(1)
    return [
        tuple(axis if axis is None or n == 1 else np.tile(axis, n) for axis, n in zip(labels, repeats, strict=True))
    ]


@relation("DepthToSpace", "SpaceToDepth")
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


@relation("Resize", "Upsample")
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
    if call.node.op == "Resize" and call.has(3):
        known = call.ints(3)
        dims = [d if isinstance(d, int) else None if known is None else known[i] for i, d in enumerate(after)]
        call.restate(3, "sizes", [axis if axis is not None else dims[i] for i, axis in enumerate(result)])
    return [tuple(result)]


@relation("Shape")
def _shape(call: Call) -> Sequence[Labels | None]:
    labels = call.axes(0)
    start, end = int(call.attr("start", 0)), int(call.attr("end", _END))
    call.groups.sizes[id(call.node.outputs[0])] = labels[start:end]
    return [(None,)]


def held_sizes(call: Call) -> list[Axis] | None:
    """The axes whose sizes the integers of the result hold, where the node only moves integers; None where it does more."""
    node, sizes = call.node, call.groups.sizes
    if node.op == "Shape":
        return sizes.get(id(node.outputs[0]))
    held = [sizes.get(id(t)) for t in node.inputs]
    first = held[0] if held else None
    if node.op in ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape") and not any(held[1:]):
        return first
    if node.op == "Gather" and first is not None and not any(held[1:]):
        wanted = call.ints(1)
        return None if wanted is None or not first else [first[i % len(first)] for i in wanted]
    if node.op == "Slice" and first is not None and not any(held[1:]):
        bounds = [call.ints(i) for i in range(1, 5)]
        if call.groups.model.opset < 10:
            bounds = [call.attr("starts"), call.attr("ends"), [0], [1]]
        starts, ends, _, steps = bounds
        if not starts or not ends or (steps is None and call.has(4)):
            return None
        return first[slice(starts[0], ends[0], (steps or [1])[0])]
    if node.op == "Concat":
        found: list[Axis] = []
        for tensor, mine in zip(node.inputs, held, strict=True):
            dims = call.groups.shapes.shape(tensor)
            if mine is None and (dims is None or len(dims) != 1 or not isinstance(dims[0], int)):
                return None
            found.extend(mine if mine is not None else [None] * int(dims[0]))  # type: ignore[index,arg-type]
        return found
    return None
