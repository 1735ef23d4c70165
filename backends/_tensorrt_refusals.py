"""What TensorRT would refuse or misread, found before its builder runs; and what it did refuse, in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx

from graphopt import ir
from graphopt.backends._tensorrt_log import Log, cleaned
from graphopt.backends._tensorrt_profile import Ranges
from graphopt.backends._tensorrt_session import DTYPES
from graphopt.errors import BackendUnavailable, ShapeError, UnsupportedModel, UserError
from graphopt.ir import Model

LISTED: Final = 10  # nodes that an error names; the rest are counted


def quantization_traps(model: Model, title: str, capabilities: Sequence[str]) -> list[str]:
    """Refuse Q/DQ nodes that TensorRT rejects with a riddle or, worse, reads as something else; returns remarks.

    Reproduced on RTX 1.7: int32 DequantizeLinear does not parse (onnxruntime's default bias, onnxruntime#14229); uint8
    is read as int8 without an error, so that codes above 127 saturate; zero points other than 0 do not parse; an
    activation quantized per channel runs in float; SM75 has no int8 kernels, and GPUs that share its engine get none.
    """
    bad: dict[str, list[str]] = {}
    slow: list[str] = []
    quantized = False
    for node in model.nodes():
        if not node.is_onnx or node.op not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
            continue
        quantized = True
        data, scale = node.inputs[:2]
        zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        quantizes = node.op == "QuantizeLinear"
        dtype = zero.dtype if zero is not None else None if quantizes else data.dtype
        if quantizes and dtype is None:  # ONNX: uint8 unless output_dtype says otherwise
            dtype = ir.numpy_dtype(node.attrs.get("output_dtype") or onnx.TensorProto.UINT8)
        kind = "" if dtype is None else ir.dtype_name(dtype)
        reason = ""
        if kind == "int32":
            reason = "a bias quantized to int32: keep biases in float (onnxruntime: QuantizeBias=False)"
        elif kind == "uint8":
            reason = "uint8, which would be read as int8: quantize to int8"
        elif isinstance(zero, ir.Constant) and np.any(np.asarray(zero.values).astype(np.float32)):
            reason = "zero points other than 0: quantize symmetrically"
        elif quantizes and isinstance(scale, ir.Constant) and scale.values.size > 1 and not _is_constant(data):
            slow.append(shown(node))
        if reason:
            bad.setdefault(reason, []).append(f"{shown(node)} ({node.op})")
    if bad:
        raise UnsupportedModel(f"{title} takes symmetric int8 and float biases only: {grouped(bad)}")
    remarks = []
    if slow:
        remarks.append(f"activations quantized per channel run in float, quantize them per tensor: {some(slow)}")
    if quantized and "SM75" in capabilities:
        shared = (
            ", and so do all GPUs that share its engine: give sm75 a target of its own" if len(capabilities) > 1 else ""
        )
        remarks.append(f"sm75 has no int8 kernels and runs quantized nodes in float{shared}")
    return remarks


def _is_constant(value: Any, depth: int = 8) -> bool:
    """Whether `value` follows from constants through a few nodes; a longer chain counts as not constant."""
    if isinstance(value, ir.Constant):
        return True
    return depth > 0 and bool(value.inputs) and all(_is_constant(v, depth - 1) for v in value.inputs[0].inputs)


def check_interface(model: Model, title: str) -> None:
    """Refuse inputs and outputs that the engine would have in another type or rank than the model."""
    known = [ir.dtype_name(ir.numpy_dtype(dtype)) for dtype in DTYPES.values()]
    border = (*model.inputs, *model.outputs)
    if bad := [f"{spec.name!r} ({spec.dtype or 'no dense tensor'})" for spec in border if spec.dtype not in known]:
        raise UnsupportedModel(
            f"{title} cannot keep the type of {some(bad)}; an engine takes {', '.join(known)}: "
            "cast inside the model, or build for ort"
        )
    if unranked := [repr(spec.name) for spec in model.inputs if spec.shape is None]:
        raise ShapeError(
            f"input {', '.join(unranked)} declares no rank, and TensorRT would take it for a scalar; "
            "export the model with its input shapes"
        )


# ---------------------------------------------------------------------------------------------- errors in our words


def some(items: Sequence[str]) -> str:
    """Up to ten items, and how many more there are."""
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def grouped(reasons: Mapping[str, Sequence[str]]) -> str:
    """Up to ten places by reason, and how many more there are."""
    left, parts = LISTED, []
    for reason, places in reasons.items():
        if left > 0:
            parts.append(f"{', '.join(places[:left])}: {reason}")
        left -= len(places)
    return "; ".join(parts) + (f"; and {-left} more" if left < 0 else "")


def shown(node: ir.Node) -> str:
    """How to name a node that may have no name."""
    return (
        repr(node.name)
        if node.name
        else f"unnamed node of {node.outputs[0].name!r}"
        if node.outputs
        else "unnamed node"
    )


def _parser_name(node: ir.Node) -> str:
    """The name that TensorRT's parser gives a node."""
    return node.name or next((f"node_of_{value.name}" for value in node.outputs if value.name), "")


def origins_of(model: Model) -> dict[str, tuple[str, ...]]:
    """Name in TensorRT -> names of the ONNX nodes of the loaded model."""
    return {name: node.origin or (name,) for node in model.nodes() if (name := _parser_name(node))}


def refusal(parser: Any, log: Log, model: Model, title: str) -> str:
    """All that the parser refused, grouped by reason."""
    top = list(model.graph.nodes)
    by_name = {_parser_name(node): node for node in model.nodes()}
    reasons: dict[str, list[str]] = {}
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        op, stack = fault.node_operator(), fault.local_function_stack()
        node = by_name.get(fault.node_name())
        if node is None and not stack and 0 <= fault.node() < len(top) and top[fault.node()].op == op:
            node = top[fault.node()]
        name = shown(node) if node is not None else repr(fault.node_name()) if fault.node_name() else "unnamed node"
        where = f"{name} ({op})" if fault.node() >= 0 else "the model"
        if node is not None and node.origin not in ((), (node.name,), (node.outputs[0].name,)):
            where += f" from {', '.join(map(repr, node.origin))}"
        if stack:
            where += f" in {' > '.join(stack)}"
        reasons.setdefault(_reason(fault.desc()), []).append(where)
    if not reasons:
        return f"{title} cannot read the model: {log.first()}"
    noun = "1 node" if parser.num_errors == 1 else f"{parser.num_errors} nodes"
    return f"{title} cannot take {noun}: {grouped(reasons)}\nreplace or remove them, or build for ort"


def _reason(described: str) -> str:
    if described == "false":
        return "not supported"
    if "must resolve to a build-time constant" in described:
        return "an input that must be constant is computed: run fold-constants first"
    if "Plugin not found" in described or "was not found in plugin registry" in described:
        return "no importer or plugin for this operator"
    return cleaned(described) or "refused without a reason"


def failure(log: Log, title: str, ranges: Ranges) -> UserError:
    """Why the builder made no engine (or one that fails for shapes it was asked to take), and what to do."""
    text = cleaned(log.inconsistent[0]) if log.inconsistent else log.first()
    shown = " ".join(f'"{name}={wanted}"' for name, wanted in ranges.shapes.items())
    guessed = ", ".join(map(repr, ranges.assumed))
    assumed = f"; {guessed} got defaults: give --shape NAME=MIN:OPT:MAX" if guessed else ""
    if end := re.search(r"k(MIN|OPT|MAX) values .*?(?:self-consistent\. |shape constraints: )(.*)", text):
        why = re.sub(r" (Condition|Instruction:) .*", "", end[2]).strip(" .")
        return ShapeError(f"the model cannot be computed at the {end[1].lower()} of --shape {shown}: {why}{assumed}")
    if "FP32 GEMM is not supported" in text:
        node = re.search(r"operation '([^']*)'", text)
        where = f" (node {node[1].removeprefix('node_of_')!r})" if node else ""
        return UnsupportedModel(
            f"{title} has no float32 MatMul or Gemm for sm75{where}: convert the model to float16, or leave sm75 out"
        )
    if "workspace" in text:
        return UnsupportedModel(f"{title} built no engine: {text}; raise the workspace limit, or leave it out")
    if re.search(r"out of memory|OutOfMemory|bad_alloc", text, re.IGNORECASE):
        return UnsupportedModel(f"{title} ran out of memory: {text}; lower the largest shapes, or use a larger machine")
    if re.search(r"CUDA_SUCCESS|CUDA driver|cudaError", text):
        return BackendUnavailable(
            f"{title} needs an NVIDIA driver for this build: {text}; build on a machine with a GPU"
        )
    return UnsupportedModel(f"{title} built no engine: {text}{assumed}; or build for ort")
