"""Raising a model's opset by onnx's own converter, with large weights left where they are."""

from __future__ import annotations

from typing import Final

import onnx

from graphopt import verify
from graphopt.errors import InvalidModel, UnsupportedModel
from graphopt.ir import Constant, Model, from_proto

_SHOWN: Final = (
    1024  # bytes up to which the converter sees a constant: axes, sizes and scales, which it may have to move
)


def convert_opset(model: Model, version: int) -> str | None:
    """Bring `model` to `version` of the default domain; returns why it stays as it is, or None.

    Names, inputs, outputs and weights are kept. Models with functions or with operators of other domains stay: the converter
    does not look into the former and drops nothing of the latter only by luck.
    """
    if model.functions:
        return "it has model-local functions"
    foreign = next((n for n in model.nodes() if not n.is_onnx), None)
    if foreign is not None:
        return f"it uses {foreign.domain}.{foreign.op}"
    inner = {id(c) for graph in model.graphs() if graph is not model.graph for c in graph.initializers}
    heavy = {c.name: c for c in model.constants() if c.nbytes > _SHOWN and id(c) not in inner}
    proto = model.to_proto(embed=lambda constant: heavy.get(constant.name) is not constant)
    hidden = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    kept = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    if proto.graph.sparse_initializer:
        return "it holds weights in sparse form"
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    given = {info.name for info in proto.graph.input}
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in hidden if t.name not in given
    )
    try:
        newer = from_proto(onnx.version_converter.convert_version(proto, version), model.source)
    except (RuntimeError, ValueError, InvalidModel, UnsupportedModel) as error:
        return f"onnx cannot convert it: {' '.join(str(error).split())[:200]}"
    _put_back(newer, heavy, given)
    changed = verify.interface(model, newer)
    if changed:
        return f"onnx's converter changes its {changed[0]}"
    origins = {node.name: node.origin for node in model.nodes() if node.name}
    for node in newer.nodes():
        node.origin = origins.get(node.name, ())
    for domain, number in newer.opsets.items():
        model.set_opset(domain, number)
    model.carried.ir_version = max(model.ir_version, newer.ir_version)
    newer.graph.carried = model.graph.carried
    newer.graph.name = model.graph.name
    model.graph = newer.graph
    return None


def _put_back(model: Model, heavy: dict[str, Constant], given: set[str]) -> None:
    """Let every reader of a weight that was hidden as an input read the weight again."""
    for tensor in list(model.graph.inputs):
        if tensor.name not in heavy or isinstance(tensor, Constant):
            continue
        weight = Constant(tensor.name, heavy[tensor.name]._values)
        for reader in {id(n): n for n in tensor.outputs}.values():
            for index, operand in enumerate(reader.inputs):
                if operand is tensor:
                    reader.inputs[index] = weight
        if tensor.name in given:
            model.graph.inputs[[t is tensor for t in model.graph.inputs].index(True)] = weight
        else:
            model.graph.inputs = [t for t in model.graph.inputs if t is not tensor]
        model.graph.initializers.append(weight)
