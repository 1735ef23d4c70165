"""What a model holds, as JSON values."""

from __future__ import annotations

import math
from typing import Any, Final

from graphopt import verify
from graphopt.analyses.inlining import inline_calls
from graphopt.analyses.macs import macs
from graphopt.errors import GraphoptError
from graphopt.evaluate import evaluate_node
from graphopt.instruments import census
from graphopt.ir import Model, TensorSpec
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline

FOLDING: Final = (
    "fixpoint(eliminate-identity,fold-constants,fold-shapes),eliminate-dead"  # no fusion, nothing that re-orders
)


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
        "macs": str(macs(_inlined(model))[0]),
        "weight_bytes": counted.initializer_bytes,
        "functions": [f"{f.carried.domain}.{f.carried.name}" for f in model.functions],
        "dynamic_dims": list(dims),
        "inputs": [_spec(s) for s in model.inputs],
        "outputs": [_spec(s) for s in model.outputs],
    }


def _inlined(model: Model) -> Model:
    """The model without functions: what they compute in depends on who calls them."""
    if not model.functions:
        return model
    inlined = model.clone()
    inline_calls(inlined, Context())
    return inlined


def folding(model: Model) -> dict[str, Any]:
    """What does not depend on the inputs: the operators that constant folding leaves, and how many nodes of each it removes.

    Shape arithmetic over known dimensions counts, and so do nodes that nothing reads. A model that cannot be folded has "error" with the reason
    in place of the counts.
    """
    try:
        verify.cycles(model)
        result = Pipeline.parse(FOLDING).run(model, Context(evaluate=evaluate_node))
    except GraphoptError as error:
        return {"pipeline": FOLDING, "error": str(error).partition("\n")[0]}
    before, after = census("", model).operators, census("", result.model)
    removed = {op: count - after.operators.get(op, 0) for op, count in before.items()}
    return {
        "pipeline": FOLDING,
        "nodes": after.nodes,
        "removed": dict(sorted(((o, n) for o, n in removed.items() if n > 0), key=lambda item: (-item[1], item[0]))),
        "weight_bytes": after.initializer_bytes,
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    shape = None if spec.shape is None else list(spec.shape)
    return {"name": spec.name, "dtype": spec.dtype, "shape": shape, "text": str(spec)}
