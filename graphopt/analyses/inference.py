"""onnx's shape inference of single nodes, each question asked once.

What onnx answers for a node depends on its operator, its attributes and the types of its operands (and on values that are a few
integers). Layers repeat, and the analysis starts anew after each change, so that equal questions come again and again; symbols are
numbered in order of appearance, which makes questions equal that differ in names alone.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Final, NamedTuple

import numpy as np
import onnx

from graphopt.ir import Constant, Node, numpy_dtype, onnx_dtype

_LOG = logging.getLogger(__name__)

_KEPT: Final = 2048  # answers
_MOST_BYTES: Final = 8192  # of a constant whose content onnx may want to see
_SEE_FLOATS: Final = frozenset({"OneHot", "Range", "Resize", "Upsample"})  # operators to which that may be floats

Attribute = tuple[str, Any, int | None, Any]  # name, Python type or types, onnx type where known, value


class Operand(NamedTuple):
    """What the operator sees of an operand."""

    dtype: np.dtype[Any]
    dims: tuple[int | str, ...] | None  # a text is a symbol; None: unknown rank
    data: bytes | None  # its values, where onnx may want to see them


class Result(NamedTuple):
    """What onnx knows of a result."""

    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...] | None  # None: unknown rank, or an unknown dimension


class Question(NamedTuple):
    """A node of the default domain, without names."""

    op: str
    opset: int
    imports: tuple[tuple[str, int], ...]
    ir_version: int
    attributes: tuple[Attribute, ...]
    operands: tuple[Operand | None, ...]
    outputs: tuple[bool, ...]  # which are asked for


def looks_at(op: str, dtype: np.dtype[Any], nbytes: int) -> bool:
    """Whether the content of a constant operand may decide the shape of a result."""
    return nbytes <= _MOST_BYTES and (dtype.kind in "iub" or (dtype.kind == "f" and op in _SEE_FLOATS))


def attributes_of(node: Node) -> tuple[Attribute, ...]:
    """The attributes of `node` as a hashable value; what is no number, text or list of these is in its protobuf form."""
    kinds = getattr(node, "attr_types", {})
    return tuple((name, *_attribute(name, value, kinds.get(name))) for name, value in node.attrs.items())


def _attribute(name: str, value: Any, kind: int | None) -> tuple[Any, int | None, Any]:
    if isinstance(value, int | float | str | bytes):
        return type(value), kind, value
    if isinstance(value, list) and all(isinstance(v, int | float | str | bytes) for v in value):
        return tuple(map(type, value)), kind, tuple(value)
    if isinstance(value, Constant):
        tensor = onnx.TensorProto(data_type=onnx_dtype(np.dtype(value.dtype)), dims=value.shape)
        if value.nbytes <= _MOST_BYTES:
            tensor = onnx.numpy_helper.from_array(np.array(value.values))
        proto = onnx.AttributeProto(name=name, type=onnx.AttributeProto.TENSOR, t=tensor)
    elif isinstance(value, onnx.AttributeProto):
        proto = value
    else:
        proto = onnx.helper.make_attribute(name, value, attr_type=kind)
    return onnx.AttributeProto, kind, proto.SerializeToString(deterministic=True)


@functools.lru_cache(maxsize=_KEPT)
def infer(question: Question) -> tuple[Result | None, ...] | None:
    """What onnx infers, result by result (None: nothing); None altogether where it finds fault."""
    schema = _schema(question.op, question.opset)
    if schema is None:
        return (None,) * len(question.outputs)
    outputs = [f"o{index}" if asked else "" for index, asked in enumerate(question.outputs)]
    inputs = ["" if operand is None else f"i{index}" for index, operand in enumerate(question.operands)]
    given = [(name, operand) for name, operand in zip(inputs, question.operands, strict=True) if operand is not None]
    node = onnx.NodeProto(op_type=question.op, name="node", input=inputs, output=outputs)
    try:
        node.attribute.extend(map(_attribute_proto, question.attributes))
    except (TypeError, ValueError):  # an empty list of no declared type
        return None
    types = {name: _type(operand) for name, operand in given}
    values = {name: _tensor(operand) for name, operand in given if operand.data is not None}
    imports = [onnx.helper.make_opsetid(*each) for each in question.imports]
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, values, opset_imports=imports, ir_version=question.ir_version
        )
    except (
        Exception
    ) as error:  # onnx raises InferenceError, an Exception, and whatever its C++ does: all mean "cannot tell"
        _LOG.debug("onnx infers nothing for %s: %s", question.op, error)
        return None
    return tuple(_result(found.get(name)) if name else None for name in outputs)


@functools.cache
def _schema(op: str, opset: int) -> Any:
    return onnx.defs.get_schema(op, opset, "") if onnx.defs.has(op, opset, "") else None


def _attribute_proto(attribute: Attribute) -> onnx.AttributeProto:
    name, form, kind, value = attribute
    if form is onnx.AttributeProto:
        return onnx.AttributeProto.FromString(value)
    return onnx.helper.make_attribute(name, list(value) if isinstance(value, tuple) else value, attr_type=kind)


def _type(operand: Operand) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    proto.tensor_type.elem_type = onnx_dtype(operand.dtype)
    if operand.dims is not None:
        proto.tensor_type.shape.SetInParent()
        for dim in operand.dims:
            added = proto.tensor_type.shape.dim.add()
            if isinstance(dim, str):
                added.dim_param = dim
            else:
                added.dim_value = dim
    return proto


def _tensor(operand: Operand) -> onnx.TensorProto:
    return onnx.TensorProto(data_type=onnx_dtype(operand.dtype), dims=operand.dims, raw_data=operand.data)


def _result(proto: onnx.TypeProto | None) -> Result | None:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
        return None
    dtype = numpy_dtype(proto.tensor_type.elem_type)
    if not proto.tensor_type.HasField("shape"):
        return Result(dtype, None)
    return Result(dtype, tuple(map(_dim, proto.tensor_type.shape.dim)))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.HasField("dim_param") else None


__all__ = ["Operand", "Question", "Result", "attributes_of", "infer", "looks_at"]
