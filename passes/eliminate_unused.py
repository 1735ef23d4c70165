"""What a model declares and nobody uses: functions, opset imports, optional results and absent operands at the end of a list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx

from graphopt.analyses.inlining import called_functions
from graphopt.edit import Editor
from graphopt.ir import Model, Node, subgraphs
from graphopt.pass_base import Context, Pass
from graphopt.reading import domain_of, nodes_of

# Operators of which all results but the first say more about the same computation, and nothing about how it is done.
_OPTIONAL: Final = frozenset(
    ["Dropout", "LayerNormalization", "MaxPool", "SoftmaxCrossEntropyLoss", "LSTM", "GRU", "RNN", "Unique"]
)


@dataclass(frozen=True)
class EliminateUnused(Pass):
    """Remove functions nobody calls, opset imports nobody needs, optional results nobody reads and empty operands at the end.

    Before:
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[1,1,4] x) => (float[1,1,2] y)
        { c = Clip (x, , )
          y, indices = MaxPool <kernel_shape = [2], strides = [2]> (c) }
        <domain: "local", opset_import: ["" : 21]> Twice (v) => (w) { w = Add (v, v) }
    After:
        g (float[1,1,4] x) => (float[1,1,2] y)
        { c = Clip (x)
          y = MaxPool <kernel_shape = [2], strides = [2]> (c) }
    """

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of functions, imports, results and operands removed."""
        edit = Editor(model)
        removed = 0
        for node in list(model.nodes()):
            while _spare_result(node, model, edit) and ctx.admit():
                node.outputs.pop()
                removed += 1
            while _spare_operand(node, model) and ctx.admit():
                node.inputs.pop()
                removed += 1
        called = called_functions(model)
        kept = []
        for function in model.functions:
            if id(function) in called or not ctx.admit():
                kept.append(function)
            else:
                removed += 1
        model.graph._functions = kept
        return removed + _imports(model, ctx)


def _spare_result(node: Node, model: Model, edit: Editor) -> bool:
    if not node.is_onnx or len(node.outputs) < 2:
        return False
    tensor = node.outputs[-1]
    if tensor.name and (tensor.outputs or edit.is_output(tensor)):
        return False
    if node.op == "BatchNormalization":  # before opset 14, having them is what switches to training
        return model.opset >= 14 and not node.attrs.get("training_mode", 0)
    return node.op in _OPTIONAL


def _spare_operand(node: Node, model: Model) -> bool:
    if not node.is_onnx or not node.inputs or node.inputs[-1].name or subgraphs(node):
        return False
    if not onnx.defs.has(node.op, model.opset, ""):
        return False
    return len(node.inputs) > int(onnx.defs.get_schema(node.op, model.opset, "").min_input)


def _imports(model: Model, ctx: Context) -> int:
    """Drop the imports of domains that no node and no function is of; the default domain stays."""
    used = {"", *(domain_of(n.domain) for n in model.nodes()), *(domain_of(f.carried.domain) for f in model.functions)}
    for function in model.functions:
        used.update(domain_of(n.domain) for n in nodes_of(function.carried.node))
    kept = []
    removed = 0
    for entry in model.carried.opset_import:
        if domain_of(entry.domain) not in used and ctx.admit():
            removed += 1
        else:
            kept.append(onnx.OperatorSetIdProto.FromString(entry.SerializeToString()))
    if removed:
        del model.carried.opset_import[:]
        model.carried.opset_import.extend(kept)
    return removed
