"""``W' = scale * codes``: weights as int8 in the file, decoded when they are used; activations stay float.

The file and the memory traffic shrink to a quarter, the arithmetic stays float. Embeddings get one scale for each row and are decoded
after the lookup, so that only the rows looked up are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses import weights
from graphopt.analyses.placement import check_patterns, selects, tell_unreached
from graphopt.analyses.rounding import rounded_on
from graphopt.conversion import convert_opset
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass
from graphopt.qdq import Inserter

_OPSET = 13  # from which DequantizeLinear has an axis
_WEIGHT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}  # operand


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of convolutions, matrix products and embeddings as int8, and compute in float.

    Before:
        g (float[1,2] x) => (float[1,2] y)
        <float[2,2] w = {1.0, 0.5, 0.0, -0.5}>
        { y = MatMul (x, w) }
    After:
        g (float[1,2] x) => (float[1,2] y)
        <int8[2,2] w_codes = {127, 127, 0, -127}, float[2] w_scale = {0.007874016, 0.003937008}>
        { d = DequantizeLinear <axis = 1> (w_codes, w_scale)
          y = MatMul (x, d) }
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    exclude: tuple[str, ...] = ()  # names (with * and ?) or operators of nodes to leave in float
    min_bytes: int = 16  # smaller weights stay float
    rounding: Literal["gptq", "nearest"] = "gptq"  # gptq, with --data: errors of the codes cancel on the samples

    def run(self, model: Model, ctx: Context) -> int:
        """Rewrite each weight; returns the number of nodes that read one."""
        if model.opset >= _OPSET:
            return self._rewrite(model, ctx)
        raised = model.clone()
        reason = convert_opset(raised, _OPSET)
        if reason is not None:
            told = f"opset {model.opset}: DequantizeLinear has an axis from {_OPSET} on, and the model cannot be raised"
            ctx.remark(None, f"{told}: {reason}")
            return 0
        done = self._rewrite(raised, ctx)
        if done:
            ctx.remark(None, f"opset raised from {model.opset} to {_OPSET}, where DequantizeLinear has an axis")
            model.graph, model.carried = raised.graph, raised.carried
        return done

    def _rewrite(self, model: Model, ctx: Context) -> int:
        edit = Editor(model)
        inserter = Inserter(edit)
        tables: dict[int, tuple[gs.Tensor, gs.Tensor]] = {}
        check_patterns(self.pass_name(), self.exclude, model)
        chosen: list[Node] = []
        for node in list(model.graph.nodes):
            index = _WEIGHT.get(node.op)
            if index is None or not node.is_onnx or len(node.inputs) <= index:
                continue
            reason = "excluded" if selects(self.exclude, node) else self._refusal(node, node.inputs[index], edit)
            if reason is not None:
                ctx.remark(node, f"stays float: {reason}")
                continue
            if not ctx.admit():
                break
            chosen.append(node)
        tell_unreached(model, _WEIGHT.keys() - {"Gather"}, ctx)
        better: dict[str, weights.Quantized] = {}
        if ctx.data is not None and self.rounding == "gptq":
            better = rounded_on(model, chosen, ctx.data, pair_safe=False, seed=ctx.seed)
        for node in chosen:
            if node.op == "Gather":
                _embed(node, edit, tables)
            else:
                nearest = weights.quantize(node, np.asarray(node.inputs[1].values), pair_safe=False)
                inserter.weight(node, better.get(node.name, nearest), zero=False)
        edit.commit()
        return len(chosen)

    def _refusal(self, node: Node, weight: gs.Tensor, edit: Editor) -> str | None:
        if not edit.is_fixed(weight):
            return "its weight is not constant"
        if weight.dtype != np.float32:
            return f"its weight {weight.name!r} is {weight.dtype}"
        if node.op == "Gather" and (len(weight.shape) != 2 or node.attrs.get("axis", 0) != 0):
            return f"{weight.name!r} is no table of rows"
        axis = 0 if node.op == "Gather" else weights.channel_axis(node, len(weight.shape))
        if axis is None:
            return f"its weight {weight.name!r} has {len(weight.shape)} dimensions"
        if weight.nbytes < self.min_bytes or weight.nbytes <= weight.nbytes // 4 + 4 * weight.shape[axis]:
            return f"its weight {weight.name!r} would not get smaller"
        if not np.isfinite(weight.values).all():
            return f"its weight {weight.name!r} holds NaN or infinity"
        return None


def _embed(node: Node, edit: Editor, tables: dict[int, tuple[gs.Tensor, gs.Tensor]]) -> None:
    """Look up codes and scales of the rows, and multiply."""
    table, indices, output = node.inputs[0], node.inputs[1], node.outputs[0]
    if id(table) not in tables:
        values = np.asarray(table.values)
        scale = weights.floored(np.abs(values).max(axis=1) / weights.LARGEST).astype(np.float32)[:, None]
        codes = np.clip(np.rint(values / scale), -weights.LARGEST, weights.LARGEST).astype(np.int8)
        tables[id(table)] = (edit.constant(f"{table.name}_codes", codes), edit.constant(f"{table.name}_scale", scale))
    found: list[Any] = []
    for part, dtype in zip(tables[id(table)], (np.int8, np.float32), strict=True):
        rows = edit.variable(f"{output.name}_rows")
        rows.dtype = np.dtype(dtype)
        edit.insert_before(node, Node("Gather", node.name, {"axis": 0}, [part, indices], [rows]))
        found.append(rows)
    real = edit.variable(f"{output.name}_real", output)
    edit.insert_before(node, Node("Cast", f"{node.name}_cast", {"to": 1}, [found[0]], [real]))
    result = edit.variable(output.name, output)
    edit.insert_before(node, Node("Mul", f"{node.name}_scale", None, [real, found[1]], [result]))
    edit.replace_uses(output, result)
    edit.erase(node)
