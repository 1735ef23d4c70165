"""``x W = s_x s_W ((q_x - z_x) q_W)``, the codes of x made anew for each call, from its own extremes.

It needs no calibration data and suits transformers on ONNX Runtime's CPU provider, which fuses the five operators written here into one
(DynamicQuantizeMatMul). Weights are symmetric int8 with one scale for each column, pair-safe unless told otherwise (see
`graphopt.analyses.weights`). TensorRT has no such operators: there the pass leaves everything alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import weights
from graphopt.analyses.placement import WEIGHTED, check_patterns, operators, refusal, selects, sizes, tell_unreached
from graphopt.analyses.rounding import rounded_on
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Variable
from graphopt.pass_base import Context, Exactness, Pass

_OPSET = 11  # of DynamicQuantizeLinear


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Compute matrix products with constant weights in int8, each call measuring its own activations.

    Before:
        g (float[1,2] x) => (float[1,2] y)
        <float[2,2] w = {1.0, 0.5, 0.0, -0.5}>
        { y = MatMul (x, w) }
    After:
        g (float[1,2] x) => (float[1,2] y)
        <int8[2,2] w_codes = {127, 127, 0, -127}, float[2] w_scale = {0.007874016, 0.003937008}, int8 w_zero = {0}>
        { q, s, z = DynamicQuantizeLinear (x)
          i = MatMulInteger (q, w_codes, z, w_zero)
          f = Cast <to = 1> (i)
          t = Mul (s, w_scale)
          y = Mul (f, t) }
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    exclude: tuple[str, ...] = ()  # names (with * and ?) or operators of nodes to leave in float
    pair_safe: bool = True  # weights that cannot saturate on x86 without VNNI
    rounding: Literal["gptq", "nearest"] = "gptq"  # gptq, with --data: errors of the codes cancel on the samples
    min_channels: int = 1  # products with fewer rows or columns of the weight stay float

    def run(self, model: Model, ctx: Context) -> int:
        """Rewrite each MatMul and Gemm; returns how many."""
        if ctx.target is not None and ctx.target.traits.symmetric_int8:
            ctx.remark(None, f"{ctx.target} has no dynamic int8; use quantize-qdq")
            return 0
        edit, shapes = Editor(model), ctx.analysis(Shapes, model)
        check_patterns(self.pass_name(), self.exclude, model)
        chosen: list[Node] = []
        for node in list(operators(model)):
            if node.op == "Conv":
                continue
            reason = "excluded" if selects(self.exclude, node) else refusal(node, edit, shapes, model.opset)
            if reason is None and model.opset < _OPSET:
                reason = f"opset {model.opset} has no DynamicQuantizeLinear; convert the model to {_OPSET} or newer"
            if reason is None and min(sizes(node)) < self.min_channels:
                reason = f"{min(sizes(node))} channels: fewer than min-channels={self.min_channels}"
            if reason is not None:
                ctx.remark(node, f"stays float: {reason}")
                continue
            if not ctx.admit():
                break
            chosen.append(node)
        tell_unreached(model, WEIGHTED, ctx)
        better: dict[str, weights.Quantized] = {}
        if ctx.data is not None and self.rounding == "gptq":
            better = rounded_on(model, chosen, ctx.data, pair_safe=self.pair_safe, seed=ctx.seed)
        writer = _Writer(edit, self.pair_safe, better)
        for node in chosen:
            writer.rewrite(node)
        edit.commit()
        return len(chosen)


class _Writer:
    """Writes products; tensors that several products read, and equal weights, are coded once."""

    def __init__(self, edit: Editor, pair_safe: bool, better: Mapping[str, weights.Quantized]) -> None:
        self.edit, self.pair_safe, self.better = edit, pair_safe, better
        self.activations: dict[tuple[int, int], list[gs.Tensor]] = {}
        self.weights: dict[tuple[int, int | None], tuple[gs.Tensor, ...]] = {}
        self.kept: list[gs.Tensor] = []  # so that no id is used again

    def rewrite(self, node: Node) -> None:
        data, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        codes, scale, zero = self.weight(node, weight)
        coded, step, shift = self.activation(node, data)
        total = self.add(node, "MatMulInteger", [coded, codes, shift, zero], np.int32)
        real = self.add(node, "Cast", [total], np.float32, to=1)
        factor = self.add(node, "Mul", [step, scale], np.float32)
        product = self.add(node, "Mul", [real, factor], np.float32, like=output)
        last = product if bias is None else self.add(node, "Add", [product, bias], np.float32, like=output)
        self.edit.replace_uses(output, last)
        self.edit.erase(node)

    def weight(self, node: Node, weight: gs.Tensor) -> tuple[gs.Tensor, ...]:
        found = self.better.get(node.name)
        if found is None:
            found = weights.quantize(node, np.asarray(weight.values), pair_safe=self.pair_safe)
        key = (id(weight), found.axis)
        if key not in self.weights:
            codes = found.codes if found.axis == 1 else np.ascontiguousarray(found.codes.T)
            self.weights[key] = (
                self.edit.constant(f"{weight.name}_codes", codes),
                self.edit.constant(f"{weight.name}_scale", found.scale),
                self.edit.constant(f"{weight.name}_zero", np.zeros((), np.int8)),
            )
            self.kept.append(weight)
        return self.weights[key]

    def activation(self, node: Node, data: gs.Tensor) -> list[gs.Tensor]:
        key = (id(data), id(self.edit.graph_of(node)))
        if key not in self.activations:
            kinds = ((np.uint8, "coded"), (np.float32, "scale"), (np.uint8, "zero"))
            outputs = [Variable(self.edit.fresh_name(f"{data.name}_{what}"), np.dtype(kind)) for kind, what in kinds]
            self.edit.insert_before(node, Node("DynamicQuantizeLinear", f"{data.name}_quantize", None, [data], outputs))
            self.activations[key] = [*outputs]
            self.kept.append(data)
        return self.activations[key]

    def add(
        self,
        node: Node,
        op: str,
        operands: list[gs.Tensor],
        dtype: Any,
        like: gs.Tensor | None = None,
        **attributes: Any,
    ) -> gs.Tensor:
        result = self.edit.variable(f"{node.name}_{op}", like)
        result.dtype = np.dtype(dtype)
        self.edit.insert_before(node, Node(op, f"{node.name}_{op}", attributes, operands, [result]))
        return result
