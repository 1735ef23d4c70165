"""What a model holds, as JSON values."""

from __future__ import annotations

import math
from typing import Any

from graphopt.analyses.macs import macs
from graphopt.instruments import census
from graphopt.ir import Model, TensorSpec


def summary(model: Model) -> dict[str, Any]:
    """Producer, versions, interface, operators, parameters (elements of initializers and Constant nodes) and bytes."""
    counted = census("", model)
    constants: list[Any] = [*model.constants()]
    constants += [v for n in model.nodes() if n.op == "Constant" for v in n.attrs.values() if hasattr(v, "nbytes")]
    dims = dict.fromkeys(f"{s.name}: {d}" for s in model.inputs for d in s.shape or () if not isinstance(d, int))
    carried = model.carried
    return {
        "producer": f"{carried.producer_name} {carried.producer_version}".strip(),
        "ir_version": model.ir_version,
        "opsets": dict(sorted(model.opsets.items())),
        "nodes": counted.nodes,
        "operators": dict(sorted(counted.operators.items(), key=lambda item: (-item[1], item[0]))),
        "parameters": sum(math.prod(c.shape) for c in constants),
        "macs": str(macs(model)[0]),
        "weight_bytes": counted.initializer_bytes,
        "functions": [f"{f.carried.domain}.{f.carried.name}" for f in model.functions],
        "dynamic_dims": list(dims),
        "inputs": [_spec(s) for s in model.inputs],
        "outputs": [_spec(s) for s in model.outputs],
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    shape = None if spec.shape is None else list(spec.shape)
    return {"name": spec.name, "dtype": spec.dtype, "shape": shape, "text": str(spec)}
