"""Random models as wide as exporters make them: ranks, dtypes, broadcasting, symbolic dimensions, shape arithmetic, bodies that capture.

Values know their shape while they are made: a number, or one of the symbols of the inputs. Each step asks for operands that fit, so
that every model is valid and runs at any size of its symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import ir

Dim = int | str
FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
SYMBOLS = {"N": (2, 1, 3), "S": (3, 1, 4)}  # the sizes that laws compare at
INPUTS: dict[str, tuple[int, tuple[Dim, ...]]] = {
    "x": (FLOAT, ("N", 3, "S")),
    "u": (FLOAT, ("N", 4, 3, 3)),
    "v": (FLOAT, (3, 4)),
    "i": (INT, ("N", 3)),
    "c": (BOOL, ()),
}


@dataclass(frozen=True)
class Value:
    """A name with what is known of it."""

    name: str
    dtype: int
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def fixed(self) -> list[int]:
        """Axes whose size is a number."""
        return [axis for axis, dim in enumerate(self.shape) if isinstance(dim, int)]


@st.composite
def wide_models(draw: st.DrawFn) -> ir.Model:
    """Valid models of 2 to 16 steps at one of three opsets."""
    return ir.from_proto(_Wide(draw, draw(st.sampled_from([13, 17, 21]))).make())


class _Wide:
    def __init__(self, draw: st.DrawFn, opset: int) -> None:
        self.draw = draw
        self.opset = opset
        self.rng = np.random.default_rng(draw(st.integers(0, 99)))
        self.number = 0
        self.initializers: list[TensorProto] = []
        self.scopes: list[tuple[list[onnx.NodeProto], list[Value]]] = []

    # ------------------------------------------------------------------------------------------------- building

    @property
    def values(self) -> list[Value]:
        """All that can be read where the next node goes."""
        return self.scopes[-1][1]

    def make(self) -> onnx.ModelProto:
        """The whole model; some values in the middle are graph outputs."""
        self.scopes.append(([], [Value(name, *spec) for name, spec in INPUTS.items()]))
        for _ in range(self.draw(st.integers(2, 16))):
            self.step()
        nodes, values = self.scopes.pop()
        made = [v for v in values if v.name not in INPUTS]
        if not made:
            nodes.append(helper.make_node("Relu", ["x"], ["y"]))
            made = [Value("y", *INPUTS["x"])]
        chosen = self.draw(st.lists(st.sampled_from(made), max_size=2, unique=True))
        chosen += [made[-1]] * (made[-1] not in chosen)
        inputs = [helper.make_tensor_value_info(name, *spec) for name, spec in INPUTS.items()]
        outputs = [helper.make_tensor_value_info(v.name, v.dtype, v.shape) for v in chosen]
        graph = helper.make_graph(nodes, "g", inputs, outputs, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def emit(self, op: str, inputs: list[Value | str], dtype: int, shape: tuple[Dim, ...], **attrs: Any) -> Value:
        """A node with one result."""
        return self.emit_all(op, inputs, [(dtype, shape)], **attrs)[0]

    def emit_all(
        self, op: str, inputs: list[Value | str], results: list[tuple[int, tuple[Dim, ...]]], **attrs: Any
    ) -> list[Value]:
        """A node with several results."""
        found = []
        for dtype, shape in results:
            self.number += 1
            found.append(Value(f"t{self.number}", dtype, shape))
        names = [v if isinstance(v, str) else v.name for v in inputs]
        self.scopes[-1][0].append(helper.make_node(op, names, [v.name for v in found], **attrs))
        self.values.extend(found)
        return found

    def constant(self, array: np.ndarray[Any, Any]) -> Value:
        """An initializer, or a Constant node."""
        self.number += 1
        name = f"k{self.number}"
        tensor = numpy_helper.from_array(array, name)
        if self.draw(st.integers(0, 3)):
            self.initializers.append(tensor)
        else:
            self.scopes[-1][0].append(helper.make_node("Constant", [], [name], value=tensor))
        return Value(name, tensor.data_type, array.shape)

    def ints(self, *numbers: int) -> Value:
        """A vector of integers."""
        return self.constant(np.array(numbers, np.int64))

    def floats(self, *shape: int) -> Value:
        """Few different numbers, so that 0, 1 and equal ones occur."""
        return self.constant((self.rng.integers(-2, 3, shape) / 2).astype(np.float32))

    def pick(self, fits: Callable[[Value], bool]) -> Value | None:
        """A value that fits, later ones rather."""
        found = [v for v in self.values if fits(v)]
        return self.draw(st.sampled_from(found[-6:])) if found else None

    def axis(self, value: Value) -> int:
        """An axis, often written from behind."""
        return self.draw(st.integers(-value.rank, value.rank - 1))

    # --------------------------------------------------------------------------------------------------- steps

    def step(self) -> None:
        """One kind of thing that graphs have; nothing, where no value fits."""
        kinds = [name for name in dir(self) if name.startswith("do_")]
        if len(self.scopes) > 2:
            kinds.remove("do_if")
        getattr(self, self.draw(st.sampled_from(kinds)))()

    def do_unary(self) -> None:
        """Elementwise, of one operand."""
        v = self.pick(lambda v: v.dtype == FLOAT)
        if v is not None:
            op = self.draw(
                st.sampled_from(["Relu", "Neg", "Abs", "Sigmoid", "Identity", "Exp", "Tanh", "Dropout", "Erf"])
            )
            self.emit(op, [v], FLOAT, v.shape)

    def do_binary(self) -> None:
        """Elementwise, of two; shapes that are equal, or a constant that is broadcast."""
        v = self.pick(lambda v: v.dtype in (FLOAT, INT))
        if v is None:
            return
        other = self.pick(lambda w: w.dtype == v.dtype and _broadcast(v.shape, w.shape) is not None)
        if other is None or self.draw(st.booleans()):
            sizes = [d if isinstance(d, int) and self.draw(st.booleans()) else 1 for d in v.shape]
            sizes = sizes[self.draw(st.integers(0, len(sizes))) :] + [1] * (self.draw(st.integers(0, 9)) == 0)
            other = self.floats(*sizes) if v.dtype == FLOAT else self.constant(self.rng.integers(-1, 3, sizes))
        shape = _broadcast(v.shape, other.shape)
        if shape is None or len(shape) > 5:
            return
        ops = (
            ["Add", "Sub", "Mul", "Max", "Min"]
            + (["Sum"] if v.dtype == FLOAT else [])
            + (["Div", "Pow"] if v.dtype == FLOAT and other.name[0] == "k" else [])
        )
        operands = [v, other] if self.draw(st.booleans()) else [other, v]
        op = self.draw(st.sampled_from(ops))
        self.emit(
            op,
            operands if op != "Pow" else [v, self.constant(np.float32(2))],
            v.dtype,
            shape if op != "Pow" else v.shape,
        )

    def do_compare(self) -> None:
        """A mask, and what it chooses."""
        v = self.pick(lambda v: v.dtype in (FLOAT, INT))
        if v is None:
            return
        one = self.constant(np.array(self.draw(st.integers(-1, 1)), np.float32 if v.dtype == FLOAT else np.int64))
        mask = self.emit(self.draw(st.sampled_from(["Equal", "Greater", "Less"])), [v, one], BOOL, v.shape)
        if self.draw(st.booleans()):
            mask = self.emit("Not", [mask], BOOL, v.shape)
        self.emit("Where", [mask, v, one] if self.draw(st.booleans()) else [mask, one, v], v.dtype, v.shape)

    def do_cast(self) -> None:
        """A cast, a chain of them, or CastLike."""
        v = self.pick(lambda v: True)
        if v is None:
            return
        to = self.draw(st.sampled_from([FLOAT, INT, TensorProto.INT32, TensorProto.DOUBLE, BOOL]))
        if v.dtype == FLOAT and to != TensorProto.DOUBLE:
            v = self.emit("Floor", [v], FLOAT, v.shape)
            v = self.emit("Clip", [v, self.constant(np.float32(-9)), self.constant(np.float32(9))], FLOAT, v.shape)
        middle = self.emit("Cast", [v], to, v.shape, to=to)
        if self.opset >= 15 and self.draw(st.booleans()):
            like = self.pick(lambda w: w.dtype in (FLOAT, INT)) or v
            self.emit("CastLike", [middle, like], like.dtype, v.shape)
        else:
            back = self.draw(st.sampled_from([FLOAT, INT]))
            self.emit("Cast", [middle], back, v.shape, to=back)

    def do_clip(self) -> None:
        """Bounds, one of them absent at times."""
        v = self.pick(lambda v: v.dtype == FLOAT)
        if v is not None:
            low: Value | str = (
                self.constant(np.float32(self.draw(st.integers(-1, 1)))) if self.draw(st.booleans()) else ""
            )
            self.emit("Clip", [v, low, self.constant(np.float32(2))], FLOAT, v.shape)

    def do_transpose(self) -> None:
        """Any permutation."""
        v = self.pick(lambda v: v.rank > 0)
        if v is not None:
            perm = self.draw(st.permutations(range(v.rank)))
            self.emit("Transpose", [v], v.dtype, tuple(v.shape[p] for p in perm), perm=list(perm))

    def do_unsqueeze(self) -> None:
        """New dimensions, and perhaps their end."""
        v = self.pick(lambda v: v.rank < 4)
        if v is not None:
            at = self.draw(st.integers(0, v.rank))
            wide = self.emit("Unsqueeze", [v, self.ints(at)], v.dtype, (*v.shape[:at], 1, *v.shape[at:]))
            if self.draw(st.booleans()):
                self.emit("Squeeze", [wide, self.ints(at)], v.dtype, v.shape)

    def do_squeeze(self) -> None:
        """Dimensions of size one go."""
        v = self.pick(lambda v: 1 in v.shape)
        if v is not None:
            at = v.shape.index(1)
            self.emit("Squeeze", [v, self.ints(at - v.rank)], v.dtype, (*v.shape[:at], *v.shape[at + 1 :]))

    def do_reshape(self) -> None:
        """Neighbouring axes merged, sizes from Shape or as constants; at times split again."""
        v = self.pick(lambda v: v.rank >= 2 and len(v.fixed()) >= v.rank - 1)
        if v is None:
            return
        sizes = [d for d in v.shape if isinstance(d, int)]
        product = int(np.prod(sizes))
        symbols = [d for d in v.shape if isinstance(d, str)]
        if not symbols:
            self.emit("Reshape", [v, self.ints(-1)], v.dtype, (product,))
            return
        at = v.shape.index(symbols[0])
        if at == 0 and self.draw(st.booleans()):
            shape = self.emit("Shape", [v], INT, (v.rank,))
            first = self.emit("Gather", [shape, self.ints(0)], INT, (1,))
            target = self.emit("Concat", [first, self.ints(product)], INT, (2,), axis=0)
            flat = self.emit("Reshape", [v, target], v.dtype, (symbols[0], product))
        else:
            moved = self.emit(
                "Transpose",
                [v],
                v.dtype,
                (symbols[0], *(d for i, d in enumerate(v.shape) if i != at)),
                perm=[at, *(i for i in range(v.rank) if i != at)],
            )
            flat = self.emit("Reshape", [moved, self.ints(-1, product)], v.dtype, (symbols[0], product))
        if self.draw(st.booleans()):
            self.emit("Reshape", [flat, self.ints(0, *sizes)], v.dtype, (symbols[0], *sizes))

    def do_flatten(self) -> None:
        """All fixed dimensions in one."""
        v = self.pick(lambda v: v.rank >= 2 and len(v.fixed()) >= v.rank - 1 and v.shape[0] == "N")
        if v is not None:
            self.emit(
                "Flatten", [v], v.dtype, ("N", int(np.prod([d for d in v.shape[1:] if isinstance(d, int)]))), axis=1
            )

    def do_concat(self) -> None:
        """Two values of one shape, or one with a constant, along a fixed axis."""
        v = self.pick(lambda v: bool(v.fixed()) and v.rank < 5)
        if v is None:
            return
        axis = self.draw(st.sampled_from(v.fixed()))
        other = (
            self.pick(
                lambda w: (
                    w.dtype == v.dtype
                    and w.rank == v.rank
                    and isinstance(w.shape[axis], int)
                    and all(a == b for i, (a, b) in enumerate(zip(v.shape, w.shape, strict=True)) if i != axis)
                )
            )
            or v
        )
        size = int(v.shape[axis]) + int(other.shape[axis])
        if size <= 40:
            shape = tuple(size if i == axis else d for i, d in enumerate(v.shape))
            self.emit("Concat", [v, other], v.dtype, shape, axis=axis if self.draw(st.booleans()) else axis - v.rank)

    def do_split(self) -> None:
        """Parts of a fixed axis, put together in some order."""
        v = self.pick(lambda v: any(v.shape[a] > 1 for a in v.fixed()))
        if v is None:
            return
        axis = self.draw(st.sampled_from([a for a in v.fixed() if v.shape[a] > 1]))
        size = int(v.shape[axis])
        first = self.draw(st.integers(1, size - 1))
        parts = [first, size - first]
        shapes = [tuple(p if i == axis else d for i, d in enumerate(v.shape)) for p in parts]
        found = self.emit_all("Split", [v, self.ints(*parts)], [(v.dtype, s) for s in shapes], axis=axis)
        if self.draw(st.booleans()):
            order = found if self.draw(st.booleans()) else found[::-1]
            self.emit("Concat", list(order), v.dtype, v.shape, axis=axis)

    def do_slice(self) -> None:
        """Bounds on a fixed axis, from behind at times, with steps of both signs; or all of a symbolic one."""
        v = self.pick(lambda v: v.rank > 0)
        if v is None:
            return
        axis = self.draw(st.integers(0, v.rank - 1))
        dim = v.shape[axis]
        if isinstance(dim, str):
            self.emit("Slice", [v, self.ints(0), self.ints(2**31 - 1), self.ints(axis)], v.dtype, v.shape)
            return
        start = self.draw(st.integers(0, dim - 1)) if dim else 0
        end = self.draw(st.integers(start + 1, dim)) if dim else 0
        step = self.draw(st.sampled_from([1, 1, 1, 2, -1]))
        length = len(range(start, end, step)) if step > 0 else len(range(end - 1, start - 1, step))
        bounds = (start, end) if step > 0 else (end - 1, start - dim - 1)
        shape = tuple(length if i == axis else d for i, d in enumerate(v.shape))
        self.emit("Slice", [v, *(self.ints(n) for n in (*bounds, axis, step))], v.dtype, shape)

    def do_gather(self) -> None:
        """Some indices of a fixed axis, or one of them."""
        v = self.pick(lambda v: bool(v.fixed()) and 0 not in v.shape)
        if v is None:
            return
        axis = self.draw(st.sampled_from(v.fixed()))
        size = int(v.shape[axis])
        chosen = self.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=3))
        if self.draw(st.booleans()):
            index, middle = self.constant(np.array(chosen[0], np.int64)), ()
        else:
            index, middle = self.ints(*chosen), (len(chosen),)
        self.emit("Gather", [v, index], v.dtype, (*v.shape[:axis], *middle, *v.shape[axis + 1 :]), axis=axis)

    def do_reduce(self) -> None:
        """Over one axis."""
        v = self.pick(lambda v: v.rank > 0 and v.dtype == FLOAT and 0 not in v.shape)
        if v is None:
            return
        axis = self.axis(v)
        op = self.draw(st.sampled_from(["ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin"]))
        keep = self.draw(st.integers(0, 1))
        at = axis % v.rank
        shape = tuple(1 if i == at else d for i, d in enumerate(v.shape) if keep or i != at)
        if op == "ReduceSum" or self.opset >= 18:
            self.emit(op, [v, self.ints(axis)], FLOAT, shape, keepdims=keep)
        else:
            self.emit(op, [v], FLOAT, shape, keepdims=keep, axes=[axis])

    def do_expand(self) -> None:
        """To its own shape, or to a wider one."""
        v = self.pick(lambda v: v.rank < 4)
        if v is None:
            return
        if self.draw(st.booleans()):
            self.emit("Expand", [v, self.emit("Shape", [v], INT, (v.rank,))], v.dtype, v.shape)
        else:
            self.emit("Expand", [v, self.ints(2, *[1] * v.rank)], v.dtype, (2, *v.shape))

    def do_tile(self) -> None:
        """Once, or twice along a fixed axis."""
        v = self.pick(lambda v: 0 < v.rank < 5)
        if v is None:
            return
        repeats = [self.draw(st.sampled_from([1, 1, 2])) if isinstance(d, int) and d < 9 else 1 for d in v.shape]
        shape = tuple(d * r if isinstance(d, int) else d for d, r in zip(v.shape, repeats, strict=True))
        self.emit("Tile", [v, self.ints(*repeats)], v.dtype, shape)

    def do_pad(self) -> None:
        """With zeros or another number, on some axes."""
        v = self.pick(lambda v: v.rank > 0 and v.dtype == FLOAT)
        if v is None:
            return
        pads = [self.draw(st.sampled_from([0, 0, 1])) if isinstance(d, int) else 0 for d in v.shape * 2]
        shape = tuple(d + pads[i] + pads[v.rank + i] if isinstance(d, int) else d for i, d in enumerate(v.shape))
        operands: list[Value | str] = [v, self.ints(*pads)]
        if self.draw(st.booleans()):
            operands.append(self.constant(np.float32(self.draw(st.integers(0, 1)))))
        self.emit("Pad", operands, FLOAT, shape)

    def do_matmul(self) -> None:
        """With a constant matrix, a bias and a scale."""
        v = self.pick(lambda v: v.rank >= 2 and v.dtype == FLOAT and isinstance(v.shape[-1], int) and v.shape[-1] > 0)
        if v is None:
            return
        width = self.draw(st.integers(1, 4))
        w = self.floats(int(v.shape[-1]), width)
        y = self.emit("MatMul", [v, w], FLOAT, (*v.shape[:-1], width))
        if self.draw(st.booleans()):
            y = self.emit("Add", [y, self.floats(width)], FLOAT, y.shape)
        if self.draw(st.booleans()):
            self.emit("Mul", [y, self.floats(*self.draw(st.sampled_from([(), (1,), (width,)])))], FLOAT, y.shape)

    def do_gemm(self) -> None:
        """All its attributes."""
        v = self.pick(lambda v: v.rank == 2 and v.dtype == FLOAT and isinstance(v.shape[1], int) and v.shape[1] > 0)
        if v is None:
            return
        width, transposed = self.draw(st.integers(1, 4)), self.draw(st.integers(0, 1))
        inner = int(v.shape[1])
        w = self.floats(*((width, inner) if transposed else (inner, width)))
        bias = (
            [self.floats(*self.draw(st.sampled_from([(), (width,), (1, width)])))] if self.draw(st.booleans()) else []
        )
        scale = {"alpha": self.draw(st.sampled_from([1.0, 0.5])), "beta": self.draw(st.sampled_from([1.0, 2.0]))}
        self.emit("Gemm", [v, w, *bias], FLOAT, (v.shape[0], width), transB=transposed, **scale)

    def do_conv(self) -> None:
        """With what stands around convolutions: pads before, scales, shifts and normalization behind."""
        v = self.pick(
            lambda v: v.rank == 4 and v.dtype == FLOAT and all(isinstance(d, int) and d > 0 for d in v.shape[1:])
        )
        if v is None:
            return
        channels = int(v.shape[1])
        out = self.draw(st.sampled_from([channels, 2 * channels, 3]))
        groups = channels if out % channels == 0 and self.draw(st.integers(0, 3)) == 0 else 1
        bias = [self.floats(out)] if self.draw(st.booleans()) else []
        y = self.emit(
            "Conv",
            [v, self.floats(out, channels // groups, 1, 1), *bias],
            FLOAT,
            (v.shape[0], out, *v.shape[2:]),
            group=groups,
        )
        match self.draw(st.sampled_from(["none", "bn", "scale", "relu"])):
            case "bn":
                variance = self.constant(self.rng.integers(1, 4, out).astype(np.float32))
                self.emit("BatchNormalization", [y, *(self.floats(out) for _ in range(3)), variance], FLOAT, y.shape)
            case "scale":
                self.emit(self.draw(st.sampled_from(["Add", "Mul"])), [y, self.floats(out, 1, 1)], FLOAT, y.shape)
            case "relu":
                self.emit("Relu", [y], FLOAT, y.shape)

    def do_softmax(self) -> None:
        """Along any axis."""
        v = self.pick(lambda v: v.rank > 0 and v.dtype == FLOAT and 0 not in v.shape)
        if v is not None:
            self.emit("Softmax", [v], FLOAT, v.shape, axis=self.axis(v))

    def do_fill(self) -> None:
        """A number in the shape of another value."""
        v = self.pick(lambda v: v.rank > 0)
        if v is not None:
            shape = self.emit("Shape", [v], INT, (v.rank,))
            number = numpy_helper.from_array(self.rng.integers(0, 3, 1).astype(np.float32))
            fill = self.emit("ConstantOfShape", [shape], FLOAT, v.shape, value=number)
            if v.dtype == FLOAT:
                self.emit(self.draw(st.sampled_from(["Add", "Mul"])), [v, fill], FLOAT, v.shape)

    def do_cut_concat(self) -> None:
        """What was joined is cut apart again: at the same places by Split, or somewhere by Slice or Gather."""
        v = self.pick(lambda v: any(d in (1, 2, 3) for d in v.shape) and v.rank < 5)
        if v is None:
            return
        axis = self.draw(st.sampled_from([a for a in v.fixed() if v.shape[a] in (1, 2, 3)]))
        size, count = int(v.shape[axis]), self.draw(st.integers(2, 3))
        parts = [v] + [
            self.emit("Relu", [v], FLOAT, v.shape) if v.dtype == FLOAT and self.draw(st.booleans()) else v
            for _ in range(count - 1)
        ]

        def wide(n: int) -> tuple[Dim, ...]:
            return tuple(n if i == axis else d for i, d in enumerate(v.shape))

        whole = self.emit("Concat", list(parts), v.dtype, wide(size * count), axis=axis)
        match self.draw(st.sampled_from(["split", "slice", "gather"])):
            case "split":
                sizes = [size] * count if self.draw(st.booleans()) else [size, size * (count - 1)]
                found = self.emit_all(
                    "Split", [whole, self.ints(*sizes)], [(v.dtype, wide(n)) for n in sizes], axis=axis
                )
                if v.dtype == FLOAT:
                    self.emit("Neg", [found[-1]], FLOAT, found[-1].shape)
            case "slice":
                start = self.draw(st.integers(0, size * count - 1))
                end = self.draw(st.integers(start + 1, size * count))
                last = end if end < size * count else 2**31 - 1
                self.emit(
                    "Slice", [whole, self.ints(start), self.ints(last), self.ints(axis)], v.dtype, wide(end - start)
                )
            case "gather":
                at = self.draw(st.integers(-size * count, size * count - 1))
                self.emit("Gather", [whole, self.ints(at, at)], v.dtype, wide(2), axis=axis)

    def do_twice(self) -> None:
        """Pad, Tile, Expand or Gather, and once more."""
        v = self.pick(lambda v: 0 < v.rank < 4 and v.dtype == FLOAT and any(d in (2, 3, 4) for d in v.shape))
        if v is None:
            return
        axis = self.draw(st.sampled_from([a for a in v.fixed() if v.shape[a] in (2, 3, 4)]))
        size = int(v.shape[axis])

        def sized(n: int) -> tuple[Dim, ...]:
            return tuple(n if i == axis else d for i, d in enumerate(v.shape))

        kind = self.draw(st.sampled_from(["Pad", "Tile", "Expand", "Gather"]))
        mode = self.draw(st.sampled_from(["constant", "constant", "edge", "reflect"]))
        for _ in range(2):
            if kind == "Pad":
                begin = self.draw(st.sampled_from([0, 1, 1, -1] if mode == "constant" else [0, 1]))
                pads = [0] * (2 * v.rank)
                pads[axis + v.rank * self.draw(st.integers(0, 1))] = begin
                size += begin
                operands: list[Value | str] = [v, self.ints(*pads)]
                if mode == "constant" and self.draw(st.booleans()):
                    operands.append(self.constant(np.float32(self.draw(st.sampled_from([0.0, 0.0, -0.0, 1.0])))))
                v = self.emit("Pad", operands, FLOAT, sized(size), mode=mode)
            elif kind == "Tile":
                times = self.draw(st.integers(1, 2))
                size *= times
                v = self.emit(
                    "Tile", [v, self.ints(*(times if i == axis else 1 for i in range(v.rank)))], FLOAT, sized(size)
                )
            elif kind == "Expand":
                v = self.emit("Expand", [v, self.ints(2, *[1] * v.rank)], FLOAT, (2, *v.shape))
                v = self.emit("Expand", [v, self.ints(2, *[1] * v.rank)], FLOAT, (2, *v.shape))
                break
            else:
                chosen = self.draw(st.lists(st.integers(-size, size - 1), min_size=2, max_size=3))
                chosen = list(range(size)) if self.draw(st.integers(0, 3)) == 0 else chosen
                size = len(chosen)
                v = self.emit("Gather", [v, self.ints(*chosen)], FLOAT, sized(size), axis=axis)

    def do_take_one(self) -> None:
        """One element of an axis, with the axis added or dropped behind."""
        v = self.pick(lambda v: bool(v.fixed()) and 0 not in v.shape and v.rank > 1)
        if v is None:
            return
        axis = self.draw(st.sampled_from(v.fixed()))
        at = self.draw(st.integers(-int(v.shape[axis]), int(v.shape[axis]) - 1))
        without, kept = (
            (*v.shape[:axis], *v.shape[axis + 1 :]),
            tuple(1 if i == axis else d for i, d in enumerate(v.shape)),
        )
        if self.draw(st.booleans()):
            one = self.emit("Gather", [v, self.constant(np.array(at, np.int64))], v.dtype, without, axis=axis)
            self.emit("Unsqueeze", [one, self.ints(axis)], v.dtype, kept)
        else:
            one = self.emit("Gather", [v, self.ints(at)], v.dtype, kept, axis=axis)
            self.emit("Squeeze", [one, self.ints(axis)], v.dtype, without)

    def do_reduce_again(self) -> None:
        """Two axes, one by one; or one that has just come."""
        v = self.pick(lambda v: 1 < v.rank < 5 and v.dtype == FLOAT and 0 not in v.shape)
        if v is None:
            return
        op = self.draw(st.sampled_from(["ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin", "ReduceL1", "ReduceL2"]))
        keep = self.draw(st.integers(0, 1))
        if self.draw(st.booleans()):
            v = self.emit("Unsqueeze", [v, self.ints(1)], FLOAT, (v.shape[0], 1, *v.shape[1:]))
        for _ in range(2):
            if v.rank < 2:
                return
            shape = (v.shape[0], *(1,) * keep, *v.shape[2:])
            if op == "ReduceSum" or self.opset >= 18:
                v = self.emit(op, [v, self.ints(1)], FLOAT, shape, keepdims=keep)
            else:
                v = self.emit(op, [v], FLOAT, shape, keepdims=keep, axes=[1])
            op = op if self.draw(st.integers(0, 3)) else "ReduceMax"

    def do_masks(self) -> None:
        """Masks and constant ones."""
        v = self.pick(lambda v: v.dtype in (FLOAT, INT))
        if v is None:
            return
        zero = self.constant(np.array(0, np.float32 if v.dtype == FLOAT else np.int64))
        mask = self.emit("Greater", [v, zero], BOOL, v.shape)
        for _ in range(2):
            size = self.draw(
                st.sampled_from([(), (1,) * v.rank, tuple(d if isinstance(d, int) else 1 for d in v.shape)])
            )
            fill = self.draw(
                st.sampled_from([np.zeros, np.ones, np.zeros, np.ones, lambda n, t: self.rng.integers(0, 2, n) > 0])
            )
            k = self.constant(np.asarray(fill(size, bool)))
            op = self.draw(st.sampled_from(["And", "Or", "Xor", "Equal"]))
            mask = self.emit(op, [mask, k] if self.draw(st.booleans()) else [k, mask], BOOL, v.shape)
        self.emit("Where", [mask, v, zero], v.dtype, v.shape)

    def do_scores(self) -> None:
        """The logarithm of a Softmax, the place of its largest, or a product with a reciprocal."""
        v = self.pick(lambda v: v.rank > 0 and v.dtype == FLOAT and 0 not in v.shape)
        if v is None:
            return
        bounded = self.emit("Sigmoid", [v], FLOAT, v.shape)
        axis = self.axis(v)
        match self.draw(st.sampled_from(["log", "largest", "reciprocal"])):
            case "log":
                self.emit("Log", [self.emit("Softmax", [bounded], FLOAT, v.shape, axis=axis)], FLOAT, v.shape)
            case "largest":
                whole = self.emit("Floor", [v], FLOAT, v.shape)
                whole = self.emit(
                    "Clip", [whole, self.constant(np.float32(-9)), self.constant(np.float32(9))], FLOAT, v.shape
                )
                scores = self.emit("Softmax", [whole], FLOAT, v.shape, axis=axis)
                shape = tuple(1 if i == axis % v.rank else d for i, d in enumerate(v.shape))
                self.emit("ArgMax", [scores], INT, shape, axis=axis)
            case "reciprocal":
                more = self.emit("Add", [bounded, self.constant(np.float32(0.5))], FLOAT, v.shape)
                one = self.emit("Reciprocal", [more], FLOAT, v.shape)
                self.emit("Mul", [one, v] if self.draw(st.booleans()) else [v, one], FLOAT, v.shape)

    def do_rows(self) -> None:
        """A product of rows between Reshapes, as exporters write that of more dimensions."""
        v = self.pick(
            lambda v: (
                v.rank in (3, 4)
                and v.dtype == FLOAT
                and isinstance(v.shape[-1], int)
                and 0 not in v.shape
                and len(v.fixed()) >= v.rank - 1
            )
        )
        if v is None:
            return
        depth, width = int(v.shape[-1]), self.draw(st.integers(1, 3))
        lead = [d if isinstance(d, int) else -1 for d in v.shape[:-1]]
        count: Dim = int(np.prod(lead)) if -1 not in lead else "?"
        rows = self.emit("Reshape", [v, self.ints(-1, depth)], FLOAT, (count, depth))
        product = self.emit("MatMul", [rows, self.floats(depth, width)], FLOAT, (count, width))
        result = self.emit("Reshape", [product, self.ints(*lead, width)], FLOAT, (*v.shape[:-1], width))
        self.values[:] = [w for w in self.values if "?" not in w.shape]
        self.emit("Add", [result, self.floats(width)], FLOAT, result.shape)

    def do_turned_product(self) -> None:
        """A product of a value with itself, with Transposes around it."""
        v = self.pick(lambda v: v.rank in (2, 3) and v.dtype == FLOAT and 0 not in v.shape)
        if v is None:
            return
        swap = [*range(v.rank - 2), v.rank - 1, v.rank - 2]
        turned = self.emit("Transpose", [v], FLOAT, tuple(v.shape[i] for i in swap), perm=swap)
        if self.draw(st.booleans()):
            other = self.emit("Transpose", [turned], FLOAT, v.shape, perm=swap)
            operands = [turned, other] if self.draw(st.booleans()) else [other, turned]
        else:
            operands = [turned, v] if self.draw(st.booleans()) else [v, turned]
        shape = (*operands[0].shape[:-1], operands[1].shape[-1])
        product = self.emit("MatMul", list(operands), FLOAT, shape)
        if self.draw(st.booleans()):
            self.emit("Transpose", [product], FLOAT, tuple(shape[i] for i in swap), perm=swap)

    def do_write_rows(self) -> None:
        """ScatterND of all rows, in order or not."""
        v = self.pick(lambda v: v.rank > 1 and v.dtype == FLOAT and v.shape[0] in (1, 2, 3) and 0 not in v.shape)
        if v is None:
            return
        rows = list(range(int(v.shape[0])))
        if self.draw(st.booleans()):
            rows = rows[::-1]
        new = self.emit("Neg", [v], FLOAT, v.shape)
        self.emit("ScatterND", [v, self.constant(np.array(rows, np.int64).reshape(-1, 1)), new], FLOAT, v.shape)

    def do_sequence(self) -> None:
        """A sequence of two, one of them taken out, and its length."""
        v = self.pick(lambda v: v.dtype == FLOAT)
        if v is None or len(self.scopes) > 1:
            return
        other = self.emit("Neg", [v], FLOAT, v.shape)
        name = f"s{self.number}"
        self.scopes[-1][0].append(helper.make_node("SequenceConstruct", [v.name, other.name], [name]))
        self.emit(
            "SequenceAt", [name, self.constant(np.array(self.draw(st.integers(-2, 1)), np.int64))], FLOAT, v.shape
        )
        self.emit("SequenceLength", [name], INT, ())

    def do_repeat(self) -> None:
        """A node that is there already, once more."""
        nodes, values = self.scopes[-1]
        if nodes:
            node = self.draw(st.sampled_from(nodes))
            known = {v.name: v for v in values}
            results = [known[o] for o in node.output if o in known]
            if len(results) == len(node.output) and node.op_type != "If":
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                del copy.output[:]
                for result in results:
                    self.number += 1
                    copy.output.append(f"t{self.number}")
                    values.append(Value(copy.output[-1], result.dtype, result.shape))
                nodes.append(copy)

    def do_if(self) -> None:
        """Two bodies that read what is around them; the condition an input, or a constant."""
        v = self.pick(lambda v: v.dtype == FLOAT)
        if v is None:
            return
        bodies = {}
        for branch in ("then_branch", "else_branch"):
            self.scopes.append(([], list(self.values)))
            for _ in range(self.draw(st.integers(0, 2))):
                self.step()
            result = self.pick(lambda w: w.dtype == FLOAT and w.shape == v.shape) or v
            out = self.emit(self.draw(st.sampled_from(["Identity", "Neg"])), [result], FLOAT, v.shape)
            nodes, _ = self.scopes.pop()
            info = helper.make_tensor_value_info(out.name, FLOAT, v.shape)
            bodies[branch] = helper.make_graph(nodes, branch, [], [info])
        condition: Value | str = self.constant(np.array(self.draw(st.booleans()))) if self.draw(st.booleans()) else "c"
        self.emit("If", [condition], FLOAT, v.shape, **bodies)


def _broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """The shape of both, where symbols allow to tell it."""
    rank = max(len(a), len(b))
    found: list[Dim] = []
    for x, y in zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True):
        if x != y and x != 1 and y != 1:
            return None
        found.append(y if x == 1 else x)
    return tuple(found)


def feeds(seed: int, special: bool, which: int) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs at the `which`-th size of each symbol; `special`: NaN, infinities, -0.0 and huge numbers among them."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, (dtype, shape) in INPUTS.items():
        dims = [SYMBOLS[d][which] if isinstance(d, str) else d for d in shape]
        if dtype == FLOAT:
            values = rng.standard_normal(dims).astype(np.float32)
            if special:
                odd = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 3e38, 1e-42], np.float32)
                values = np.where(rng.random(dims) < 0.4, rng.choice(odd, dims), values).astype(np.float32)
            found[name] = values
        else:
            found[name] = rng.integers(-2, 3, dims).astype(np.int64 if dtype == INT else bool)
    return found


__all__ = ["INPUTS", "SYMBOLS", "feeds", "wide_models"]
