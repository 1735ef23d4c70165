"""``decode(encode(x)) = x`` but for rounding: a model that was quantized becomes a float one again.

Operators on codes become their float selves between codes that are decoded and encoded; decoders move back over operators that only move
codes; then constants are decoded, and pairs go. A pair whose codes begin at 0 did the work of a Relu or Clip that was folded into it: a Clip to
the range of the codes stays there, unless the values cannot be negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analyses.placement import MOVING, clip_bounds
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Variable
from graphopt.pass_base import Context, Exactness, Pass

Array = np.ndarray[Any, Any]

_FLOAT: Final = np.dtype(np.float32)
_MICROSOFT: Final = "com.microsoft"
# Operators on codes: the float one, and where its operands' (codes, scale, zero point), its result's (scale, zero point) and its bias are.
_ON_CODES: Final[dict[str, tuple[str, tuple[int, ...], int, int | None]]] = {
    "QLinearConv": ("Conv", (0, 3), 6, 8),
    "QLinearMatMul": ("MatMul", (0, 3), 6, None),
    "QGemm": ("Gemm", (0, 3), 7, 6),
    "QLinearAdd": ("Add", (0, 3), 6, None),
    "QLinearMul": ("Mul", (0, 3), 6, None),
    "QLinearSigmoid": ("Sigmoid", (0,), 3, None),
    "QLinearLeakyRelu": ("LeakyRelu", (0,), 3, None),
    "QLinearAveragePool": ("AveragePool", (0,), 3, None),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), 3, None),
    "QLinearSoftmax": ("Softmax", (0,), 3, None),
}
_NOT_NEGATIVE: Final = frozenset(["Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Sqrt", "Exp", "ReduceSumSquare"])


@dataclass(frozen=True)
class Dequantize(Pass):
    """Turn a quantized model (Q/DQ pairs, operators on codes, dynamic codes, weights as codes) into a float one.

    What rounding has lost stays lost, so the float model that it was made from is the better start, where there is one.

    Before:
        g (float[1,2] x) => (float[1,2] y)
        <float s = {0.001}, int8 z = {0}, int8[2,2] w = {100, 50, 0, -50}, float v = {0.01}>
        { q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          e = DequantizeLinear (w, v)
          y = MatMul (d, e) }
    After:
        g (float[1,2] x) => (float[1,2] y)
        <float[2,2] e = {1.0, 0.5, 0.0, -0.5}>
        { y = MatMul (x, e) }
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def run(self, model: Model, ctx: Context) -> int:
        """Rewrite all that is quantized in the root graph; returns the number of nodes that went or changed."""
        return _Run(model, ctx).run()


class _Run:
    def __init__(self, model: Model, ctx: Context) -> None:
        self.model, self.ctx, self.edit = model, ctx, Editor(model)
        self.decoded: dict[tuple[int, ...], gs.Tensor] = {}
        self.kept: list[gs.Tensor] = []  # so that no id is used again
        self.done = 0

    def run(self) -> int:
        # one kind after the other: each leaves what the next looks for
        for step in (self.on_codes, self.dynamic, self.blocks, self.lift, self.constants, self.pairs):
            changed = True
            while changed:
                changed = False
                for node in list(self.model.graph.nodes):
                    if not self.edit.is_erased(node) and self._admits(step, node):
                        changed = True
                        self.done += 1
                self.edit.commit()
                self.edit = Editor(self.model)
                changed = changed and step == self.lift
        return self.done

    def _admits(self, step: Callable[[Node], bool], node: Node) -> bool:
        if self.ctx.limit is not None and self.ctx.admitted >= self.ctx.limit:
            return False
        if not step(node):
            return False
        self.ctx.admit()
        return True

    # -------------------------------------------------------------------------------------------- operators on codes

    def on_codes(self, node: Node) -> bool:
        known = _ON_CODES.get(node.op)
        if known is None or not (node.is_onnx or node.domain == _MICROSOFT):
            return False
        op, operands, result, bias = known
        if node.op == "QLinearSoftmax" and node.attrs.get("opset", 13) < 13:
            self.ctx.remark(node, "stays quantized: a Softmax of before opset 13")
            return False
        if node.attrs.get("channels_last", 0):
            self.ctx.remark(node, "stays quantized: its layout is channels last")
            return False
        biased = bias is not None and len(node.inputs) > bias and bool(node.inputs[bias].name)
        scales = [node.inputs[i + 1] for i in operands]
        if biased and not all(self.edit.is_fixed(t) for t in (*scales, node.inputs[bias])):
            self.ctx.remark(node, "stays quantized: its bias is not constant")
            return False
        inputs = [self.decode(node, *self._three(node, i), axis=0 if i else None) for i in operands]
        if biased:
            codes = node.inputs[bias]
            step = np.asarray(scales[0].values, np.float64) * np.asarray(scales[1].values, np.float64)
            values = np.asarray(codes.values, np.float64) * step
            inputs.append(self.edit.constant(codes.name, np.asarray(values, np.float32)))
        attributes = {k: v for k, v in node.attrs.items() if k not in ("channels_last", "opset")}
        output = node.outputs[0]
        real = Variable(self.edit.fresh_name(f"{output.name}_real"), inputs[0].dtype, output.shape)
        self.edit.insert_before(node, Node(op, node.name, attributes, inputs, [real]))
        if len(node.inputs) > result and node.inputs[result].name:
            encode = Node(
                "QuantizeLinear", f"{node.name}_quantize", None, [real, *node.inputs[result : result + 2]], []
            )
            coded = Variable(self.edit.fresh_name(output.name), output.dtype, output.shape)
            encode.outputs.append(coded)
            self.edit.insert_before(node, encode)
            self.edit.replace_uses(output, coded)
        else:
            self.edit.replace_uses(output, real)
        self.edit.erase(node)
        return True

    def _three(self, node: Node, at: int) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor | None]:
        zero = node.inputs[at + 2] if len(node.inputs) > at + 2 and node.inputs[at + 2].name else None
        return node.inputs[at], node.inputs[at + 1], zero

    def decode(
        self, anchor: Node, codes: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None, axis: int | None
    ) -> gs.Tensor:
        """What codes stand for: a DequantizeLinear before `anchor`; the axis counts for scales of several channels."""
        rank = len(scale.shape or ())
        many = rank == 1 and scale.shape[0] != 1
        where = axis if anchor.op not in ("QLinearMatMul", "QGemm") or axis is None else _columns(anchor, codes)
        attributes = {"axis": where} if many and where is not None else {}
        result = Variable(self.edit.fresh_name(f"{codes.name}_decoded"), scale.dtype or _FLOAT, codes.shape)
        operands = [codes, scale] if zero is None else [codes, scale, zero]
        self.edit.insert_before(
            anchor, Node("DequantizeLinear", f"{codes.name}_dequantize", attributes, operands, [result])
        )
        return result

    # ------------------------------------------------------------------------------------------------------- dynamic

    def dynamic(self, node: Node) -> bool:
        """``Cast(MatMulInteger(q, w)) * (s_x * s_w) = x W`` with q, s_x made from x."""
        if node.op not in ("MatMulInteger", "ConvInteger") or not node.is_onnx:
            return False
        source, weight = self.edit.producer(node.inputs[0]), node.inputs[1]
        cast = self.edit.sole_consumer(node.outputs[0])
        product = self.edit.sole_consumer(cast.outputs[0]) if cast is not None and cast.op == "Cast" else None
        if source is None or source.op != "DynamicQuantizeLinear" or product is None or product.op != "Mul":
            self.ctx.remark(
                node, "stays quantized: it is not between DynamicQuantizeLinear and the product of the scales"
            )
            return False
        assert cast is not None
        factor = next(t for t in product.inputs if t is not cast.outputs[0])
        scale = self._weight_scale(factor, source.outputs[1])
        zero = node.inputs[3] if len(node.inputs) > 3 and node.inputs[3].name else None
        if scale is None or not self.edit.is_fixed(weight) or (zero is not None and not self.edit.is_fixed(zero)):
            self.ctx.remark(node, "stays quantized: its weight or scale is not constant")
            return False
        codes = np.asarray(weight.values, np.float64)
        shift = 0.0 if zero is None else np.asarray(zero.values, np.float64)
        column = node.op == "ConvInteger"
        if column and (np.ndim(shift) and np.size(shift) > 1):
            shift = np.asarray(shift).reshape(-1, *[1] * (codes.ndim - 1))
        if column and scale.size > 1:
            scale = scale.reshape(-1, *[1] * (codes.ndim - 1))
        values = ((codes - shift) * scale).astype(np.float32)
        output = product.outputs[0]
        new = self.edit.variable(output.name, output)
        operands = [source.inputs[0], self.edit.constant(weight.name, values)]
        op = "Conv" if column else "MatMul"
        self.edit.insert_before(product, Node(op, node.name, dict(node.attrs), operands, [new]))
        self.edit.replace_uses(output, new)
        for gone in (product, cast, node):
            self.edit.erase(gone)
        return True

    def _weight_scale(self, factor: gs.Tensor, step: gs.Tensor) -> Array | None:
        behind = self.edit.producer(factor)
        if behind is None or behind.op != "Mul" or not any(t is step for t in behind.inputs):
            return None
        other = next((t for t in behind.inputs if t is not step), None)
        if other is None or not self.edit.is_fixed(other):
            return None
        return np.asarray(other.values, np.float64)

    # -------------------------------------------------------------------------------------------- weights in blocks

    def blocks(self, node: Node) -> bool:
        """``MatMulNBits(x, codes, scales) = x W^T``, each row of W in blocks with a scale, and perhaps a zero point, of their own."""
        if node.op != "MatMulNBits" or node.domain != _MICROSOFT:
            return False
        x, *fixed = node.inputs
        operands = [t if t.name else None for t in fixed] + [None] * 5
        codes, scales, zeros, order, bias = operands[:5]
        if order is not None or any(t is not None and not self.edit.is_fixed(t) for t in (codes, scales, zeros)):
            self.ctx.remark(node, "stays quantized: its columns are reordered, or its weight is not constant")
            return False
        assert codes is not None
        assert scales is not None
        bits, size = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
        columns, rows = int(node.attrs["K"]), int(node.attrs["N"])
        count = -(-columns // size)
        values = _unpacked(np.asarray(codes.values).reshape(rows, count, -1), bits)[..., :size]
        zero: Array = np.full((rows, count), 2.0 ** (bits - 1))
        if zeros is not None:
            stored = np.asarray(zeros.values)
            packed = stored.dtype == np.uint8
            zero = _unpacked(stored.reshape(rows, -1), bits)[:, :count] if packed else stored.reshape(rows, count)
        scale = np.asarray(scales.values)
        spread = scale.reshape(rows, count, 1).astype(np.float64)
        matrix = ((values - zero[..., None].astype(np.float64)) * spread).reshape(rows, -1)[:, :columns]
        weight = self.edit.constant(codes.name, np.ascontiguousarray(matrix.T).astype(scale.dtype))
        output = node.outputs[0]
        new = self.edit.variable(output.name, output)
        self.edit.insert_before(node, Node("MatMul", node.name, None, [x, weight], [new]))
        if bias is not None:
            total = self.edit.variable(output.name, output)
            self.edit.insert_before(node, Node("Add", f"{node.name}_bias", None, [new, bias], [total]))
            new = total
        self.edit.replace_uses(output, new)
        self.edit.erase(node)
        return True

    # -------------------------------------------------------------------------------------------------- Q/DQ pairs

    def lift(self, node: Node) -> bool:
        """``decode(move(q)) = move(decode(q))``."""
        if node.op != "DequantizeLinear" or not node.is_onnx or node.attrs:
            return False
        mover = self.edit.producer(node.inputs[0])
        if mover is None or mover.op not in MOVING or not mover.is_onnx or mover.op in ("Pad", "Resize", "Split"):
            return False
        if len(node.inputs[1].shape or ()) > 0 or self.edit.sole_consumer(node.inputs[0]) is not node:
            return False
        codes = mover.inputs[0]
        real = Variable(self.edit.fresh_name(f"{codes.name}_decoded"), node.inputs[1].dtype or _FLOAT, codes.shape)
        decode = Node("DequantizeLinear", node.name, None, [codes, *node.inputs[1:]], [real])
        self.edit.insert_before(mover, decode)
        new = self.edit.variable(node.outputs[0].name, node.outputs[0])
        moved = Node(mover.op, mover.name, dict(mover.attrs), [real, *mover.inputs[1:]], [new])
        moved.attr_types = dict(mover.attr_types)
        self.edit.insert_before(mover, moved)
        self.edit.replace_uses(node.outputs[0], new)
        self.edit.erase(node)
        self.edit.erase(mover)
        return True

    def constants(self, node: Node) -> bool:
        if (
            node.op != "DequantizeLinear"
            or not node.is_onnx
            or not all(self.edit.is_fixed(t) for t in node.inputs if t.name)
        ):
            return False
        codes, scale = (np.asarray(t.values) for t in node.inputs[:2])
        if node.attrs.get("output_dtype", 0) not in (0, onnx.helper.np_dtype_to_tensor_dtype(scale.dtype)):
            self.ctx.remark(node, "stays quantized: another type than its scales'")
            return False
        zero = (
            np.asarray(node.inputs[2].values) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros((), np.int8)
        )
        size = int(node.attrs.get("block_size", 0))
        if size:  # a scale, and zero point, for so many values in a row
            axis = int(node.attrs.get("axis", 1))
            scale = scale.repeat(size, axis).take(range(codes.shape[axis]), axis)
            zero = zero.repeat(size, axis).take(range(codes.shape[axis]), axis) if zero.ndim else zero
        shape = [1] * codes.ndim
        if not size and scale.ndim == 1 and scale.size > 1:
            shape[int(node.attrs.get("axis", 1))] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape if zero.size > 1 else ())
        elif scale.size == 1:
            scale, zero = scale.reshape(()), zero.reshape(()) if zero.size == 1 else zero
        values = (codes.astype(np.float64) - zero.astype(np.float64)) * scale.astype(np.float64)
        output = node.outputs[0]
        constant = self.edit.constant(output.name, np.asarray(values, scale.dtype))
        if not self.edit.can_replace(output, constant):
            return False
        self.edit.replace_uses(output, constant)
        self.edit.erase(node)
        return True

    def pairs(self, node: Node) -> bool:
        if node.op != "DequantizeLinear" or not node.is_onnx:
            return False
        encode = self.edit.producer(node.inputs[0])
        if encode is None or encode.op != "QuantizeLinear" or not encode.is_onnx or not self._alike(encode, node):
            return False
        source, output = encode.inputs[0], node.outputs[0]
        if source.dtype is not None and output.dtype is not None and source.dtype != output.dtype:
            self.ctx.remark(node, f"stays quantized: it makes {output.dtype} of {source.dtype}")
            return False
        bounds = self._range(encode)
        negative = bounds is not None and bounds[0] == 0 and not self._not_negative(source)
        if negative and bounds is not None:
            limits = [
                self.edit.constant(f"{output.name}_{w}", np.array(b, source.dtype or output.dtype or _FLOAT))
                for w, b in zip(("min", "max"), bounds, strict=True)
            ]
            clipped = self.edit.variable(output.name, output)
            self.edit.insert_before(node, Node("Clip", f"{node.name}_range", None, [source, *limits], [clipped]))
            source = clipped
        if not self.edit.can_replace(output, source):
            same = self.edit.variable(output.name, output)
            self.edit.insert_before(node, Node("Identity", node.name, None, [source], [same]))
            source = same
        self.edit.replace_uses(output, source)
        self.edit.erase(node)
        return True

    def _alike(self, encode: Node, decode: Node) -> bool:
        """Whether both read the same scale and zero point, or equal ones."""
        for a, b in zip(encode.inputs[1:], decode.inputs[1:], strict=False):
            equal = self.edit.is_fixed(a) and self.edit.is_fixed(b) and np.array_equal(a.values, b.values)
            if a is not b and not equal:
                return False
        return True

    def _range(self, encode: Node) -> tuple[float, float] | None:
        """The values that have codes, of a scalar scale."""
        fixed = all(self.edit.is_fixed(t) for t in encode.inputs[1:] if t.name)
        if not fixed or int(np.prod(encode.inputs[1].shape)) != 1:
            return None
        scale = float(np.asarray(encode.inputs[1].values).reshape(()))
        zero = (
            np.asarray(encode.inputs[2].values)
            if len(encode.inputs) > 2 and encode.inputs[2].name
            else np.zeros((), np.uint8)
        )
        if zero.dtype.kind not in "iu":
            return None
        info, offset = np.iinfo(zero.dtype), int(zero.reshape(()))
        return (info.min - offset) * scale, (info.max - offset) * scale

    def _not_negative(self, tensor: gs.Tensor) -> bool:
        producer = self.edit.producer(tensor)
        while producer is not None and producer.op in MOVING | {"AveragePool", "GlobalAveragePool"} and producer.inputs:
            producer = self.edit.producer(producer.inputs[0])
        if producer is None or producer.op in _NOT_NEGATIVE:
            return True  # of an input nobody knows; a range from 0 says that the samples had none
        if producer.op == "Clip":
            bounds = clip_bounds(producer, self.edit)
            return bounds is not None and bounds[0] is not None and bounds[0] >= 0
        return False


def _unpacked(stored: Array, bits: int) -> Array:
    """Codes of so many bits each, the lowest first, along the last axis."""
    parts = [(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*stored.shape[:-1], -1).astype(np.float64)


def _columns(node: Node, codes: gs.Tensor) -> int:
    """The axis of output channels of the second operand of a product."""
    if node.op == "QGemm" and node.attrs.get("transB", 0):
        return 0
    return max(0, len(codes.shape or (0, 0)) - 1)
