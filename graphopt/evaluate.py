"""Running ONNX on the CPU: whole models and single nodes, by ONNX Runtime, by onnx's reference evaluator where it cannot."""

from __future__ import annotations

import functools
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt import isolation, kernels
from graphopt.edit import captures
from graphopt.errors import UnsupportedModel
from graphopt.ir import EXTERNAL_ABOVE, Graph, Model, Node, Variable, numpy_dtype, save, saves, subgraphs
from graphopt.pass_base import Clock
from graphopt.target import Target

_SAMPLE: Final = 1e-3  # seconds that one sample of a timing lasts at least
Arrays = dict[str, np.ndarray[Any, Any]]


@functools.cache
def _quiet_options() -> Any:
    """Session options that compute every node as written: no optimization, one thread, so that sums keep their order."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # what it would print comes as exceptions
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    # Packed weights take other kernels: a weight that became constant would then sum in another order.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # sessions of single nodes are kept: their arenas would hold gigabytes
    options.log_severity_level = 4
    return options


def _fast_options() -> Any:
    """Session options of a model as it is deployed, on one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


class Evaluator:
    """Computes a model as it is written.

    Attributes:
        engine: ``onnxruntime``, or ``reference`` (onnx's own) where ONNX Runtime cannot load the model or it was asked for.
    """

    def __init__(self, model: Model | bytes, engine: str = "onnxruntime", *, fast: bool = False) -> None:
        """Load `model`, given as such or as the bytes of an ``.onnx`` file; `fast` lets ONNX Runtime optimize it, on one thread.

        Raises:
            UnsupportedModel: neither evaluator can load it.
        """
        self.engine = engine
        refusal = "not asked"
        if engine == "onnxruntime":
            try:
                self._session = _ort_session(model, _fast_options() if fast else _quiet_options())
                self.outputs = [o.name for o in self._session.get_outputs()]
                return
            except Exception as error:
                refusal = str(error).splitlines()[0][:300]
        self.engine = "reference"
        try:
            from onnx.reference import ReferenceEvaluator

            self._session = ReferenceEvaluator(model if isinstance(model, bytes) else saves(model))
            self.outputs = list(self._session.output_names)
        except Exception as error:
            raise UnsupportedModel(
                f"neither ONNX Runtime ({refusal}) nor onnx.reference ({str(error)[:200]}) can run the model"
            ) from None

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """Compute all outputs, by name.

        Raises:
            UnsupportedModel: the model cannot be run on these inputs.
        """
        try:
            with warnings.catch_warnings(), isolation.step(f"{self.engine}: running the model"):
                warnings.simplefilter("ignore")  # overflow and division in a model are its own affair
                values = self._session.run(None, dict(feeds))
        except Exception as error:
            raise UnsupportedModel(
                f"running the model in {self.engine} failed: {' '.join(str(error).split())[:300]}"
            ) from None
        return dict(zip(self.outputs, values, strict=True))


def _ort_session(model: Model | bytes, options: Any) -> Any:
    import onnxruntime as ort

    if isinstance(model, bytes) or model.nbytes <= EXTERNAL_ABOVE:
        data = model if isinstance(model, bytes) else saves(model)
        with isolation.step("ONNX Runtime: loading the model"):
            return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        with isolation.step("ONNX Runtime: loading the model"):
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def seconds(models: Sequence[Model], feeds: Mapping[str, np.ndarray[Any, Any]], rounds: int = 7) -> list[float]:
    """Wall seconds of a run of each model in ONNX Runtime on the CPU as it is deployed, on one thread: the least of interleaved rounds.

    Raises:
        UnsupportedModel: a model cannot be run on `feeds`.
    """
    try:
        with isolation.step("ONNX Runtime: timing"):
            sessions = [_ort_session(model, _fast_options()) for model in models]
            found = [_timed(s, feeds, 1) for s in sessions]  # this call warms up
            calls = [max(1, min(200, int(_SAMPLE / t))) for t in found]
            found = [math.inf] * len(found)
            for _ in range(rounds):
                found = [min(t, _timed(s, feeds, n)) for t, s, n in zip(found, sessions, calls, strict=True)]
            return found
    except Exception as error:
        raise UnsupportedModel(f"timing in ONNX Runtime failed: {' '.join(str(error).split())[:300]}") from None


def clock_of(target: Target) -> Clock | None:
    """What times models for a target, where that is ONNX Runtime on the CPU."""
    return seconds if target.runtime == "ort" and (target.device or "cpu").startswith("cpu") else None


def _timed(session: Any, feeds: Mapping[str, np.ndarray[Any, Any]], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        session.run(None, dict(feeds))
    return (time.perf_counter() - began) / calls


def evaluate_node(model: Model, node: gs.Node, inputs: list[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
    """Compute one node on arrays, under the opsets of `model`; None stands for an absent operand.

    Behind the operands come the values of what the node's bodies capture, body after body, in the order of `captures`.

    Raises:
        UnsupportedModel: no evaluator can compute it.
    """
    if (known := kernels.compute(node, model.opset, inputs)) is not None:
        return known
    if node.op == "Div":
        _refuse_overflow(node, inputs)
    feeds = {f"i{index}": value for index, value in enumerate(inputs[: len(node.inputs)]) if value is not None}
    feeds.update(_captured(node, inputs))
    evaluator, dtypes = _prepared(_single(model, node, inputs))
    found = evaluator.run(feeds)
    arrays = []
    for name, value in found.items():
        if not isinstance(value, np.ndarray | np.generic):
            raise UnsupportedModel(f"node {node.name!r} ({node.op}) computes no tensor")
        array = np.asarray(value)
        if array.dtype != dtypes.get(name, array.dtype):
            raise UnsupportedModel(f"node {node.name!r} ({node.op}) computed {array.dtype} where {dtypes[name]} is due")
        arrays.append(array)
    return arrays


def _refuse_overflow(node: gs.Node, inputs: list[np.ndarray[Any, Any] | None]) -> None:
    """Integer minimum by -1 is a trap of the CPU that takes the process down (ONNX Runtime 1.32)."""
    a, b = inputs
    if a is None or b is None or a.dtype.kind != "i" or not a.size:
        return
    if a.min() == np.iinfo(a.dtype).min and (b == -1).any():
        raise UnsupportedModel(f"node {node.name!r} (Div) divides the smallest {a.dtype} by -1, which overflows")


def _captured(node: gs.Node, inputs: list[np.ndarray[Any, Any] | None]) -> dict[str, np.ndarray[Any, Any]]:
    """What the bodies of a node read from outside, by name."""
    tensors = [t for body in subgraphs(node) for t in captures(body).values()]
    values = inputs[len(node.inputs) :]
    return {t.name: np.asarray(v) for t, v in zip(tensors, values, strict=True) if v is not None}


def _single(model: Model, node: gs.Node, inputs: list[np.ndarray[Any, Any] | None]) -> bytes:
    """A model of `node` alone: equal for nodes that compute the same on operands of the same dtypes and shapes."""
    graph = Graph(name="node")
    operands = [
        Variable("") if value is None else Variable(f"i{index}", value.dtype, tuple(value.shape))
        for index, value in enumerate(inputs[: len(node.inputs)])
    ]
    results = [Variable(f"o{index}" if t.name else "") for index, t in enumerate(node.outputs)]
    copy = Node(node.op, "node", dict(node.attrs), operands, results, node.domain or "")
    copy.attr_types = dict(getattr(node, "attr_types", {}))
    graph.nodes.append(copy)
    graph.inputs = [t for t in operands if t.name]
    graph.inputs += [Variable(name, v.dtype, tuple(v.shape)) for name, v in _captured(node, inputs).items()]
    graph.outputs = [t for t in results if t.name]
    carried = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.carried.opset_import)
    return saves(Model(graph, carried))


@functools.lru_cache(maxsize=128)
def _prepared(data: bytes) -> tuple[Evaluator, dict[str, np.dtype[Any]]]:
    """An evaluator of a one-node model, and the dtypes that its outputs must have, as far as onnx can tell."""
    try:
        inferred = onnx.shape_inference.infer_shapes(data)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        return Evaluator(data), {}
    kinds = {info.name: info.type.tensor_type.elem_type for info in inferred.graph.output}
    dtypes = {name: numpy_dtype(kind) for name, kind in kinds.items() if kind}
    fed = [numpy_dtype(info.type.tensor_type.elem_type) for info in inferred.graph.input]
    # ONNX Runtime's Python interface takes and gives no bfloat16, float8 or 4-bit arrays.
    foreign = any(dtype.kind == "V" for dtype in [*fed, *dtypes.values()])
    return Evaluator(inferred.SerializeToString(), "reference" if foreign else "onnxruntime"), dtypes
