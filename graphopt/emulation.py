"""A model in a half type, as one in float32 that rounds every result to that type.

Kernels of GPUs for half types add up in float32 and round the result. On a CPU the same is had by a Cast to the type and back behind each
operator; run as it is, the model would tell less: ONNX Runtime's CPU has no bfloat16 kernels, and computes chains of float16 in float32
without rounding in between, so that an overflow does not show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import Editor, cleanup
from graphopt.elements import CastValues
from graphopt.ir import Constant, Model, Node, onnx_dtype, subgraphs

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
_FLOAT = np.dtype(np.float32)


def in_float32(model: Model, dtype: np.dtype[Any]) -> Model:
    """A copy of `model` that computes in float32 what it computes in `dtype`, and rounds to it; its inputs and outputs are float32, too.

    The types of intermediate values must be known, as a pass leaves them that changed them.
    """
    copy = model.clone()
    edit = Editor(copy)
    code = onnx_dtype(dtype)
    constants: dict[int, Constant] = {}

    def widened(tensor: gs.Constant) -> Constant:
        if id(tensor) not in constants:
            constants[id(tensor)] = Constant(edit.fresh_name(tensor.name), CastValues(tensor, _FLOAT))
        return constants[id(tensor)]

    for graph in copy.graphs():
        for tensor in [*graph.inputs, *graph.outputs]:
            if tensor.dtype == dtype and not isinstance(tensor, gs.Constant):
                tensor.dtype = _FLOAT
                if tensor.inputs and not subgraphs(tensor.inputs[0]):
                    _round(edit, tensor.inputs[0], tensor, dtype)
        for node in graph.nodes:
            for index, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant) and tensor.dtype == dtype:
                    node.inputs[index] = widened(tensor)
            for name, value in node.attrs.items():
                if isinstance(value, gs.Constant) and value.dtype == dtype:
                    node.attrs[name] = widened(value)
                elif name in _TYPE_ATTRIBUTES and value == code:
                    node.attrs[name] = onnx_dtype(_FLOAT)
            for tensor in list(node.outputs):
                if tensor.dtype == dtype:
                    tensor.dtype = _FLOAT
                    if not subgraphs(node):
                        _round(edit, node, tensor, dtype)
    edit.commit()
    cleanup(copy)
    return copy


def _round(edit: Editor, node: Node, tensor: gs.Tensor, dtype: np.dtype[Any]) -> None:
    """Let `node` compute a new value, and `tensor` be its rounding."""
    wide, narrow = edit.variable(f"{tensor.name}_wide", tensor), edit.variable(f"{tensor.name}_narrow", tensor)
    narrow.dtype = dtype
    node.outputs[[t is tensor for t in node.outputs].index(True)] = wide
    edit.insert_after(node, Node("Cast", f"{tensor.name}_round", {"to": onnx_dtype(dtype)}, [wide], [narrow]))
    edit.insert_after(node, Node("Cast", f"{tensor.name}_widen", {"to": onnx_dtype(_FLOAT)}, [narrow], [tensor]))
