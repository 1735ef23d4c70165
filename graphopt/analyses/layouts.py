"""Which nodes compute the same on permuted operands, and what has to change in them.

A permutation p stands for ``Transpose<perm = p>``: ``T_p(x).shape[i] == x.shape[p[i]]``. A node is transparent when for every p, with
operands permuted by p (and its axes renumbered), it gives its old results permuted by p. Where operands or results lack axes
(Unsqueeze, Squeeze, ArgMax without keepdims), p is over the side that has all, and the other side drops them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Constant, Node

Perm = tuple[int, ...]
Rewrite = Callable[[Perm, Editor], None]

MAX_CONSTANT: Final = 1 << 20  # bytes of a constant operand that may be stored permuted
_MAX_SHARED: Final = 1 << 14  # the same, where others use the constant as it is


def identity(rank: int) -> Perm:
    """The permutation that changes nothing."""
    return tuple(range(rank))


def compose(first: Perm, second: Perm) -> Perm:
    """``T_second(T_first(x)) = T_compose(x)``."""
    return tuple(first[axis] for axis in second)


def inverse(perm: Perm) -> Perm:
    """What undoes `perm`."""
    return tuple(sorted(range(len(perm)), key=perm.__getitem__))


def drop(perm: Perm, axes: Sequence[int]) -> Perm:
    """`perm` on what is left when `axes` (numbered before permuting) vanish."""
    rest = [axis for axis in perm if axis not in axes]
    order = {axis: index for index, axis in enumerate(sorted(rest))}
    return tuple(order[axis] for axis in rest)


def lift(perm: Perm, axes: Sequence[int]) -> Perm:
    """A permutation that `drop` makes `perm`: each of `axes` stays in its place."""
    rank = len(perm) + len(axes)
    rest = [axis for axis in range(rank) if axis not in axes]
    moved = iter(perm)
    return tuple(axis if axis in axes else rest[next(moved)] for axis in range(rank))


def permutation(node: gs.Node, shapes: Shapes) -> Perm | None:
    """What a Transpose node does; None where it is no Transpose or its rank is unknown."""
    if node.op != "Transpose" or not node.is_onnx or len(node.inputs) != 1:
        return None
    given = node.attrs.get("perm")
    if given is None:
        rank = shapes.rank(node.inputs[0])
        return None if rank is None else identity(rank)[::-1]
    if not isinstance(given, list) or sorted(given) != list(range(len(given))):
        return None
    return tuple(int(axis) for axis in given)


@dataclass(frozen=True)
class Transparent:
    """How a node follows a permutation of its operands."""

    rank: int  # of the permutation
    data: tuple[int, ...]  # operands that are permuted with it
    constants: tuple[int, ...] = ()  # operands that are stored permuted
    absent_in: tuple[int, ...] = ()  # axes that the operands lack
    absent_out: tuple[int, ...] = ()  # axes that the results lack
    rewrite: Rewrite = lambda perm, edit: None  # axes and attributes

    def operand(self, perm: Perm) -> Perm:
        """How operands are permuted when the node follows `perm`."""
        return drop(perm, self.absent_in)

    def result(self, perm: Perm) -> Perm:
        """How results are permuted when the node follows `perm`."""
        return drop(perm, self.absent_out)

    def from_operand(self, perm: Perm) -> Perm:
        """A permutation to follow, so that operands are permuted by `perm`."""
        return lift(perm, self.absent_in)

    def from_result(self, perm: Perm) -> Perm:
        """A permutation to follow, so that results are permuted by `perm`."""
        return lift(perm, self.absent_out)


def permuted(constant: gs.Constant, perm: Perm) -> np.ndarray[Any, Any]:
    """A constant that broadcasts to `perm`'s rank, permuted."""
    values = np.asarray(constant.values)
    values = values.reshape((1,) * (len(perm) - values.ndim) + values.shape)
    return np.ascontiguousarray(values.transpose(perm))


@dataclass(frozen=True)
class Call:
    """One node and what is known of its operands."""

    node: Node
    shapes: Shapes
    edit: Editor
    opset: int
    sums: bool  # whether sums may be taken in another order

    def has(self, index: int) -> bool:
        """Whether operand `index` is present."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def rank(self, index: int = 0) -> int | None:
        """The rank of operand `index`."""
        return self.shapes.rank(self.node.inputs[index]) if self.has(index) else None

    def ints(self, index: int) -> list[int] | None:
        """The integers in operand `index`, where it is constant."""
        if not self.has(index) or not self.edit.is_fixed(self.node.inputs[index]):
            return None
        return [int(v) for v in np.asarray(self.node.inputs[index].values).reshape(-1)]

    def axes(self, rank: int, operand: int) -> tuple[int, ...] | None:
        """The axes given as attribute or operand; () where none are given, None where they are unknown or wrong."""
        given = self.node.attrs.get("axes")
        if given is None:
            given = self.ints(operand) if self.has(operand) else []
        return None if given is None or not isinstance(given, list) else _within(given, rank)

    def set_axes(self, axes: Sequence[int], operand: int) -> None:
        """Write other axes to where they came from."""
        if "axes" in self.node.attrs:
            self.node.attrs["axes"] = list(axes)
        else:
            self.node.inputs[operand] = self.new(operand, axes)

    def new(self, operand: int, values: Sequence[int]) -> Constant:
        """A new constant in place of operand `operand`."""
        old = self.node.inputs[operand]
        return self.edit.constant(old.name, np.array(values, old.dtype))


def _within(axes: Sequence[int], rank: int) -> tuple[int, ...] | None:
    wrapped = tuple(int(a) + rank if a < 0 else int(a) for a in axes)
    return wrapped if all(0 <= a < rank for a in wrapped) and len(set(wrapped)) == len(wrapped) else None


def transparent(node: Node, shapes: Shapes, edit: Editor, opset: int, sums: bool = False) -> Transparent | None:
    """How `node` follows permutations; None where it does not. With `sums`, floating-point sums may change their order."""
    rule = _RULES.get(node.op)
    if rule is None or not node.is_onnx or not node.inputs or not node.inputs[0].name:
        return None
    if any(not isinstance(v, int | float | str | list) for v in node.attrs.values()):
        return None
    return rule(Call(node, shapes, edit, opset, sums))


Rule = Callable[[Call], Transparent | None]


def _unary(call: Call) -> Transparent | None:
    rank = call.rank()
    return None if rank is None else Transparent(rank, (0,))


def _broadcast(call: Call) -> Transparent | None:
    if call.opset < 8 or "broadcast" in call.node.attrs:
        return None  # operators that do not broadcast, or along an axis of their own
    ranks = [call.rank(index) for index in range(len(call.node.inputs))]
    known = [rank for rank in ranks if rank is not None]
    if len(known) < len(ranks):
        return None
    rank = max(known)
    data, constants = [], []
    for index, tensor in enumerate(call.node.inputs):
        shape = call.shapes.shape(tensor)
        if shape is not None and all(dim == 1 for dim in shape) and (len(shape) < rank or call.edit.is_fixed(tensor)):
            continue  # the same in any layout
        if call.edit.is_fixed(tensor):
            if not _storable(call, tensor):
                return None
            constants.append(index)
        elif known[index] == rank:
            data.append(index)
        else:
            return None
    return Transparent(rank, tuple(data), tuple(constants)) if data else None


def _storable(call: Call, tensor: gs.Constant) -> bool:
    shared = any(reader is not call.node for reader in tensor.outputs) or call.edit.is_output(tensor)
    return bool(tensor.nbytes <= (_MAX_SHARED if shared else MAX_CONSTANT)) and np.dtype(tensor.dtype).kind != "O"


def _along(default: int | None, since: int = 1) -> Rule:
    """One axis as attribute; every operand is data."""

    def rule(call: Call) -> Transparent | None:
        rank = call.rank()
        axis = call.node.attrs.get("axis", default)
        if rank is None or axis is None or call.opset < since or any(call.rank(i) != rank for i in _operands(call)):
            return None
        return _axis_moves(call, rank, int(axis), _operands(call))

    def _operands(call: Call) -> tuple[int, ...]:
        return tuple(range(len(call.node.inputs))) if call.node.op == "Concat" else (0,)

    return rule


def _axis_moves(call: Call, rank: int, axis: int, data: tuple[int, ...]) -> Transparent | None:
    found = _within([axis], rank)
    if found is None:
        return None
    constants = tuple(i for i in data if call.edit.is_fixed(call.node.inputs[i]))
    if any(not _storable(call, call.node.inputs[i]) for i in constants):
        return None
    variables = tuple(i for i in data if i not in constants)

    def rewrite(perm: Perm, edit: Editor) -> None:
        call.node.attrs["axis"] = perm.index(found[0])

    return Transparent(rank, variables, constants, rewrite=rewrite) if variables else None


def _quantize(call: Call) -> Transparent | None:
    rank = call.rank()
    scale = call.shapes.shape(call.node.inputs[1]) if call.has(1) else None
    if rank is None or scale is None or call.node.attrs.get("block_size", 0):
        return None
    if not scale or (call.opset < 13 and len(scale) == 1):
        return Transparent(rank, (0,))
    return _axis_moves(call, rank, int(call.node.attrs.get("axis", 1)), (0,)) if len(scale) == 1 else None


def _arg(call: Call) -> Transparent | None:
    rank = call.rank()
    found = None if rank is None else _within([int(call.node.attrs.get("axis", 0))], rank)
    if rank is None or found is None:
        return None
    keeps = bool(call.node.attrs.get("keepdims", 1))

    def rewrite(perm: Perm, edit: Editor) -> None:
        call.node.attrs["axis"] = perm.index(found[0])

    return Transparent(rank, (0,), absent_out=() if keeps else found, rewrite=rewrite)


def _reduce(call: Call) -> Transparent | None:
    rank = call.rank()
    axes = None if rank is None else call.axes(rank, 1)
    if rank is None or axes is None or (not axes and call.node.attrs.get("noop_with_empty_axes", 0)):
        return None
    exact = call.node.op in ("ReduceMax", "ReduceMin")
    dtype = call.shapes.dtype(call.node.inputs[0])
    if dtype is not None and dtype.kind in "iu":
        exact = exact or call.node.op in ("ReduceSum", "ReduceProd")
    if not exact and not call.sums:
        return None
    reduced = axes or identity(rank)
    keeps = bool(call.node.attrs.get("keepdims", 1))

    def rewrite(perm: Perm, edit: Editor) -> None:
        if axes:
            call.set_axes(sorted(perm.index(axis) for axis in axes), 1)

    return Transparent(rank, (0,), absent_out=() if keeps else tuple(reduced), rewrite=rewrite)


def _split(call: Call) -> Transparent | None:
    rank = call.rank()
    return None if rank is None else _axis_moves(call, rank, int(call.node.attrs.get("axis", 0)), (0,))


def _slice(call: Call) -> Transparent | None:
    rank = call.rank()
    if rank is None or call.opset < 10:
        return None
    starts = call.shapes.shape(call.node.inputs[1]) if call.has(1) else None
    axes = _within(given, rank) if call.has(3) and (given := call.ints(3)) is not None else None
    if not call.has(3) and starts is not None and len(starts) == 1 and isinstance(starts[0], int):
        axes = identity(starts[0])
    if axes is None or len(axes) > rank:
        return None

    def rewrite(perm: Perm, edit: Editor) -> None:
        node = call.node
        like = node.inputs[3] if call.has(3) else node.inputs[1]  # all of one dtype
        dtype = call.shapes.dtype(like) or np.dtype(np.int64)
        moved = edit.constant(f"{node.name}_axes", np.array([perm.index(axis) for axis in axes], dtype))
        if len(node.inputs) > 3:
            node.inputs[3] = moved
        else:
            node.inputs.append(moved)

    return Transparent(rank, (0,), rewrite=rewrite)


def _pad(call: Call) -> Transparent | None:
    rank = call.rank()
    if rank is None:
        return None
    if call.has(3):
        axes = call.axes(rank, 3)
        if not axes:
            return None
        return Transparent(rank, (0,), rewrite=lambda perm, edit: call.set_axes([perm.index(axis) for axis in axes], 3))
    pads = call.node.attrs.get("pads") if call.opset < 11 else call.ints(1)
    if not isinstance(pads, list) or len(pads) != 2 * rank:
        return None

    def rewrite(perm: Perm, edit: Editor) -> None:
        moved = [pads[side * rank + axis] for side in (0, 1) for axis in perm]
        if call.opset < 11:
            call.node.attrs["pads"] = moved
        else:
            call.node.inputs[1] = call.new(1, moved)

    return Transparent(rank, (0,), rewrite=rewrite)


def _squeeze(call: Call) -> Transparent | None:
    rank = call.rank()
    axes = None if rank is None else call.axes(rank, 1)
    if rank is None or not axes:
        return None
    return Transparent(
        rank,
        (0,),
        absent_out=axes,
        rewrite=lambda perm, edit: call.set_axes(sorted(perm.index(a) for a in axes), 1),
    )


def _unsqueeze(call: Call) -> Transparent | None:
    small = call.rank()
    given = call.node.attrs.get("axes") if "axes" in call.node.attrs else call.ints(1)
    if small is None or not isinstance(given, list):
        return None
    rank = small + len(given)
    axes = _within(given, rank)
    if not axes:
        return None
    return Transparent(
        rank,
        (0,),
        absent_in=axes,
        rewrite=lambda perm, edit: call.set_axes(sorted(perm.index(a) for a in axes), 1),
    )


def _reshape(call: Call) -> Transparent | None:
    """Where it removes or adds axes of size 1 only, and becomes a Squeeze or an Unsqueeze."""
    before = call.shapes.shape(call.node.inputs[0])
    after = call.shapes.shape(call.node.outputs[0])
    if before is None or after is None or not call.has(1):
        return None
    removed, added = _ones(before, after), _ones(after, before)
    if removed is None and added is None:
        return None
    axes = removed or added or ()

    def rewrite(perm: Perm, edit: Editor) -> None:
        node, moved = call.node, sorted(perm.index(axis) for axis in axes)
        node.op = "Squeeze" if removed else "Unsqueeze"
        node.attrs.clear()
        if call.opset < 13:
            node.attrs["axes"] = moved
            del node.inputs[1]
        else:
            node.inputs[1] = edit.constant(f"{node.name}_axes", np.array(moved, np.int64))

    if removed:
        return Transparent(len(before), (0,), absent_out=axes, rewrite=rewrite)
    return Transparent(len(after), (0,), absent_in=axes, rewrite=rewrite)


def _ones(large: Sequence[Any], small: Sequence[Any]) -> tuple[int, ...] | None:
    """The axes of size 1 that make `large` of `small`; None where something else differs, or nothing does."""
    axes = []
    rest = list(small)
    for axis, dim in enumerate(large):
        if rest and rest[0] == dim:
            rest.pop(0)
        elif dim == 1:
            axes.append(axis)
        else:
            return None
    return tuple(axes) if axes and not rest else None


def _resize(call: Call) -> Transparent | None:
    """Nearest only: the others compute their weights in an order that depends on the layout."""
    rank, attrs = call.rank(), call.node.attrs
    if rank is None or attrs.get("mode", "nearest") != "nearest" or call.opset < 11 or "axes" in attrs:
        return None
    if attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    index = 2 if call.has(2) else 3
    if not call.has(index) or not call.edit.is_fixed(call.node.inputs[index]):
        return None
    old = call.node.inputs[index]
    if tuple(old.shape) != (rank,):
        return None

    def rewrite(perm: Perm, edit: Editor) -> None:
        call.node.inputs[index] = edit.constant(old.name, np.asarray(old.values)[list(perm)])

    return Transparent(rank, (0,), rewrite=rewrite)


def _scalar_operands(call: Call) -> Transparent | None:
    """Clip: what follows the first operand is scalar."""
    for index in range(1, len(call.node.inputs)):
        shape = call.shapes.shape(call.node.inputs[index]) if call.has(index) else ()
        if shape is None or math.prod(d if isinstance(d, int) else 2 for d in shape) != 1:
            return None
    return _unary(call)


_UNARY: Final = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity "
    "IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish "
    "Tan Tanh ThresholdedRelu"
)
_BINARY: Final = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "Pow PRelu Sub Sum Where Xor"
)
_REDUCE: Final = [
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
]
_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BINARY.split(), _broadcast),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along(-1, since=13)),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    "Clip": _scalar_operands,
    "Concat": _along(None),
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Resize": _resize,
}
