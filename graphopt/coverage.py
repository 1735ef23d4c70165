"""Which layers really run in int8, after the runtime's own optimisation.

ONNX Runtime writes down the graph that it will run; a layer is int8 when the operator that reads its int8 weight there is an integer one.
TensorRT for RTX lists its kernels with datatypes; a layer is int8 when a kernel made of it reads Int8.
"""

from __future__ import annotations

import json
import logging
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_graphsurgeon as gs

from graphopt import isolation
from graphopt.backend import Kernel
from graphopt.errors import UnsupportedModel
from graphopt.ir import Model, Node, save
from graphopt.pass_base import Remark

_log = logging.getLogger(__name__)
_CALLS: Final = 9  # that kernel times are the median of
_FUSED: Final = 3  # a convolution, a sum and a Relu behind it are one kernel

LAYERS: Final = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
INTEGER: Final = frozenset(
    [
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "ConvInteger",
        "MatMulNBits",
    ]
)


@dataclass(frozen=True)
class Layer:
    """One weighted operator of the model that was given to the runtime."""

    name: str
    op: str
    int8: bool
    kernel: str  # what runs, as far as the runtime says
    why: str = ""  # where it stays float
    sqnr_db: float | None = None  # of its own result, with its operands rounded
    microseconds: float | None = None  # of its kernel in one call, where that was looked at

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def layers(model: Model) -> list[Node]:
    """The weighted operators of the root graph."""
    return [n for n in model.graph.nodes if n.op in LAYERS and n.is_onnx]


def onnxruntime_coverage(
    model: Model, remarks: Sequence[Remark] = (), sample: Mapping[str, Any] | None = None
) -> list[Layer]:
    """What ONNX Runtime's CPU provider makes of each weighted operator, and how long its kernel takes on `sample`.

    Raises:
        UnsupportedModel: ONNX Runtime refuses the model.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        source, written = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
        save(model, source)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(written)
        if sample is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            with isolation.step("ONNX Runtime: loading the model"):
                session = ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UnsupportedModel(f"ONNX Runtime refuses the model: {' '.join(str(error).split())[:300]}") from None
        graph = onnx.load(str(written), load_external_data=False).graph
        spent = _kernel_times(session, sample) if sample is not None else {}
    integer = {name: node for node in graph.node if node.op_type in INTEGER for name in node.input}
    names = {node.name: node.op_type for node in graph.node}
    told = _reasons(remarks)
    found = []
    for node in layers(model):
        codes = _codes(node)
        runs = next((integer[c] for c in codes if c in integer), None)
        kernel = runs.op_type if runs is not None else None
        runs_as = next((n for n in _run_names(node) if n in names), node.name)
        if kernel is None and names.get(runs_as) in INTEGER:
            kernel = names[runs_as]
        why = ""
        if kernel is None:
            why = told.get(node.name, "its codes were not fused: decoded to float" if codes else "not quantized")
        took = spent.get(runs.name if runs is not None else runs_as)
        shown = kernel or names.get(runs_as, "float")
        found.append(Layer(node.name, node.op, kernel is not None, shown, why, microseconds=took))
    return found


def _run_names(node: Node) -> Iterator[str]:
    """What ONNX Runtime may call the kernel of `node`: its blocked convolutions are named after what is fused into them."""
    yield node.name
    tensor = node.outputs[0]
    for _ in range(_FUSED):
        yield f"{tensor.name}_nchwc"
        if len(tensor.outputs) != 1 or not tensor.outputs[0].outputs:
            return
        tensor = tensor.outputs[0].outputs[0]


def _kernel_times(session: Any, sample: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds of each kernel in one call, by the name of its node: the median of some calls."""
    try:
        for _ in range(_CALLS):
            session.run(None, dict(sample))
    except Exception:  # the model itself fails on this sample; who runs it next will say so
        _log.debug("no kernel times", exc_info=True)
        return {}
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            found.setdefault(name.removesuffix("_kernel_time"), []).append(float(event["dur"]))
    return {name: statistics.median(times) for name, times in found.items()}


def kernel_coverage(model: Model, kernels: Sequence[Kernel], remarks: Sequence[Remark] = ()) -> list[Layer]:
    """What TensorRT's builder says of each weighted operator.

    A kernel counts for a layer when it is named after it or stems from it and multiplies (``Conv``, ``Fc``, ``gemm``, ``mha``).
    """
    told = _reasons(remarks)
    found = []
    for node in layers(model):
        origins = set(node.origin or (node.name,)) | {node.name}
        own = [k for k in kernels if origins & set(k.origin) and _multiplies(k.name)]
        named = [k for k in own if any(k.name.startswith(o) for o in origins)] or own
        kernel = next((k for k in named if "Int8" in k.inputs), named[0] if named else None)
        # a weight that is decoded first shows as a Float constant or input
        int8 = kernel is not None and "Int8" in kernel.inputs and "Cast" not in kernel.name
        why = "" if int8 else told.get(node.name, "its codes are decoded to float" if _codes(node) else "not quantized")
        found.append(Layer(node.name, node.op, int8, kernel.name if kernel else "not listed", why))
    return found


def _multiplies(name: str) -> bool:
    return re.search(r"conv|fc|gemm|matmul|mha", name, re.IGNORECASE) is not None


def _codes(node: Node) -> list[str]:
    """Names of the int8 constants behind the operands of `node`."""
    found = []
    for tensor in node.inputs:
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is not None and producer.op == "DequantizeLinear" and isinstance(producer.inputs[0], gs.Constant):
            found.append(str(producer.inputs[0].name))
    return found


def _reasons(remarks: Sequence[Remark]) -> Mapping[str, str]:
    """Why nodes stay float, by name, from the remarks of the quantizing passes."""
    found = {}
    for remark in remarks:
        match = re.match(r"'(.*)' \(\w+\)$", remark.node)
        if match and remark.pass_name.startswith("quantize"):
            found[match.group(1)] = remark.text.removeprefix("stays float: ")
    return found
