"""Running ONNX on the CPU: whole models and single nodes, by ONNX Runtime, by onnx's reference evaluator where it cannot."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.errors import UnsupportedModel
from graphopt.ir import EXTERNAL_ABOVE, Graph, Model, Node, Variable, numpy_dtype, save, saves

Arrays = dict[str, np.ndarray[Any, Any]]


@functools.cache
def _quiet_options() -> Any:
    """Session options that compute every node as written: no optimization, one thread, so that sums keep their order."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


class Evaluator:
    """Computes a model as it is written.

    Attributes:
        engine: ``onnxruntime``, or ``reference`` where ONNX Runtime cannot load the model.
    """

    def __init__(self, model: Model) -> None:
        """Load `model`.

        Raises:
            UnsupportedModel: neither evaluator can load it.
        """
        self.outputs = [spec.name for spec in model.outputs]
        self.engine = "onnxruntime"
        try:
            self._session = _ort_session(model)
            return
        except Exception as error:
            refusal = str(error).splitlines()[0][:300]
        self.engine = "reference"
        try:
            from onnx.reference import ReferenceEvaluator

            self._reference = ReferenceEvaluator(saves(model))
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # overflow and division in a model are its own affair
                if self.engine == "onnxruntime":
                    values = self._session.run(None, dict(feeds))
                else:
                    values = self._reference.run(None, dict(feeds))
        except Exception as error:
            raise UnsupportedModel(
                f"running the model in {self.engine} failed: {' '.join(str(error).split())[:300]}"
            ) from None
        return dict(zip(self.outputs, values, strict=True))


def _ort_session(model: Model) -> Any:
    import onnxruntime as ort

    if model.nbytes <= EXTERNAL_ABOVE:
        return ort.InferenceSession(saves(model), _quiet_options(), providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        return ort.InferenceSession(str(path), _quiet_options(), providers=["CPUExecutionProvider"])


def evaluate_node(model: Model, node: gs.Node, inputs: list[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
    """Compute one node on arrays, under the opsets of `model`; None stands for an absent operand.

    Raises:
        UnsupportedModel: no evaluator can compute it.
    """
    graph = Graph(name="node")
    operands: list[Variable] = []
    feeds: Arrays = {}
    for index, value in enumerate(inputs):
        if value is None:
            operands.append(Variable(""))
            continue
        tensor = Variable(f"i{index}", value.dtype, tuple(value.shape))
        operands.append(tensor)
        graph.inputs.append(tensor)
        feeds[tensor.name] = value
    results = [Variable(f"o{index}" if t.name else "") for index, t in enumerate(node.outputs)]
    copy = Node(node.op, "node", dict(node.attrs), operands, results, node.domain or "")
    copy.attr_types = dict(getattr(node, "attr_types", {}))
    graph.nodes.append(copy)
    graph.outputs = [t for t in results if t.name]
    carried = onnx.ModelProto()
    carried.CopyFrom(model.carried)
    single = Model(graph, carried)
    dtypes = _output_dtypes(single)
    for tensor in graph.outputs:
        tensor.dtype = dtypes.get(tensor.name)
    found = Evaluator(single).run(feeds)
    arrays = []
    for tensor in graph.outputs:
        value = found[tensor.name]
        if not isinstance(value, np.ndarray | np.generic):
            raise UnsupportedModel(f"node {node.name!r} ({node.op}) computes no tensor")
        array = np.asarray(value)
        if tensor.dtype is not None and array.dtype != tensor.dtype:
            raise UnsupportedModel(f"node {node.name!r} ({node.op}) computed {array.dtype} where {tensor.dtype} is due")
        arrays.append(array)
    return arrays


def _output_dtypes(model: Model) -> dict[str, np.dtype[Any]]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model.to_proto(), data_prop=False)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        return {}
    types = {info.name: info.type.tensor_type.elem_type for info in inferred.graph.output}
    return {name: numpy_dtype(kind) for name, kind in types.items() if kind}
