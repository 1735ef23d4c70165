"""What a result of simplification is worth: what it declares, the checker, and its numbers beside the original's.

The judge runs in a process of its own: a broken model may crash ONNX Runtime, and a large one shall leave nothing behind.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.graphs import (
    SEED,
    Sample,
    required_inputs,
)
from graphopt import equivalence
from graphopt.pass_base import Exactness


def histogram(model: onnx.ModelProto) -> Counter[str]:
    """Nodes by operator, in the graph, in subgraphs and in functions, Constants too."""
    counts: Counter[str] = Counter()
    bodies: list[Iterable[onnx.NodeProto]] = [model.graph.node, *(function.node for function in model.functions)]
    while bodies:
        for node in bodies.pop():
            counts[f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] += 1
            for attribute in node.attribute:
                bodies += [graph.node for graph in ([attribute.g] if attribute.HasField("g") else attribute.graphs)]
    return counts


def count(operators: Mapping[str, int]) -> int:
    """Nodes that are no Constants."""
    return sum(number for op, number in operators.items() if op != "Constant")


def fills(model: onnx.ModelProto) -> int:
    """ConstantOfShape nodes of the main graph whose shape is constant."""
    known = {t.name for t in model.graph.initializer} | {
        n.output[0] for n in model.graph.node if n.op_type == "Constant"
    }
    return sum(n.op_type == "ConstantOfShape" and n.input[0] in known for n in model.graph.node)


def interface(original: onnx.ModelProto, result: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """What a result declares other than the original: first what breaks a caller, then what only misinforms one."""
    broken: list[str] = []
    shifted: list[str] = []
    for kind, before, after in (
        ("input", required_inputs(original), required_inputs(result)),
        ("output", original.graph.output, result.graph.output),
    ):
        old, new = ({value.name: value for value in side} for side in (before, after))
        broken += [f"{kind} {name!r} is gone" for name in old if name not in new]
        added = [name for name in new if name not in old]
        if added:
            broken.append(f"{len(added)} more required {kind}s, as {added[0]!r}")
        if not broken and list(old) != list(new):
            shifted.append(f"{kind}s come in another order")
        for name in old.keys() & new.keys():
            a, b = old[name].type, new[name].type
            if a.tensor_type.elem_type != b.tensor_type.elem_type:
                broken.append(f"{kind} {name!r} has another dtype")
            elif dims(a) != dims(b):
                shifted.append(f"{kind} {name!r} was {_shape(dims(a))}, is {_shape(dims(b))}")
    return broken, sorted(shifted)


def dims(kind: onnx.TypeProto) -> list[int | str | None] | None:
    """The declared shape: numbers, symbols, None for an unknown dimension; None where not even the rank is declared."""
    if not kind.tensor_type.HasField("shape"):
        return None
    return [d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in kind.tensor_type.shape.dim]


def _shape(declared: list[int | str | None] | None) -> str:
    return "of unknown rank" if declared is None else f"[{','.join('?' if d is None else str(d) for d in declared)}]"


@dataclass(frozen=True)
class Finding:
    """What the judge found out about one result."""

    operators: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0  # of the file and its external data
    broken: Sequence[str] = ()  # each makes the result wrong
    flaws: Sequence[str] = ()
    max_abs: float | None = None  # None: not run; over all samples and outputs
    relative: float | None = None
    samples: int = 0  # that the original accepts
    fills: int = 0  # nodes that are weights in small: a ConstantOfShape of a constant shape

    @property
    def state(self) -> str:
        """``valid``, ``flawed`` or ``wrong``."""
        return "wrong" if self.broken else "flawed" if self.flaws else "valid"

    @property
    def nodes(self) -> int:
        """Without Constants."""
        return count(self.operators)


def _session(path: str) -> Any:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def reference_main() -> None:
    """``argv``: model, samples as JSON, file to write. Runs the original; samples that it refuses are left out."""
    path, samples, target = sys.argv[1:4]
    model = onnx.load(path)
    session = _session(path)
    kept: dict[str, Any] = {}
    refusals = []
    for number, sample in enumerate(Sample(**given) for given in json.loads(samples)):
        feeds = sample.feeds(model, SEED + number)
        try:
            expected = _run(session, feeds)
        except Exception as error:
            refusals.append(_line(error))
            continue
        moved = equivalence.sensitivity(functools.partial(_run, session), feeds, expected, SEED, draws=1)
        kept |= {f"{number}.in.{name}": value for name, value in feeds.items()}
        kept |= {f"{number}.out.{name}": value for name, value in expected.items()}
        kept |= {f"{number}.moved.{name}": np.float64(value) for name, value in moved.items()}
    np.savez(target, **kept)
    operators = histogram(model)
    eps_types = ["float32"]
    if any(t.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) for t in model.graph.initializer):
        eps_types.append("float16")
    allowed = equivalence.tolerance(Exactness.REASSOCIATING, sum(operators.values()), eps_types)
    print(json.dumps({"operators": operators, "allowed": allowed, "refusals": refusals}))


def judge_main() -> None:
    """``argv``: original, result, the reference's file, tolerance. Prints a Finding as JSON."""
    print(json.dumps(asdict(judge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])))))


def judge(original: Path, result: Path, reference: Path, allowed: float) -> Finding:
    """Compare a result with the original and with the numbers that the original gave."""
    before = onnx.load(original, load_external_data=False)
    try:
        after = onnx.load(result, load_external_data=False)
    except Exception as error:
        return Finding(broken=[f"cannot be read: {_line(error)}"])
    broken, flaws = interface(before, after)
    operators = dict(histogram(after))  # asdict cannot copy a Counter
    small = fills(after)
    foreign = {op.rpartition(".")[0] for op in operators} - {op.rpartition(".")[0] for op in histogram(before)}
    flaws += [f"operators of {domain or 'ai.onnx'}" for domain in sorted(foreign)]
    size = sum(file.stat().st_size for file in result.parent.iterdir())
    del after, before
    try:
        onnx.checker.check_model(str(result), full_check=True)
    except Exception as error:
        flaws.append(f"checker: {_line(error)}")
    worst: equivalence.Difference | None = None
    samples: dict[str, Any] = {}
    if not broken:
        try:
            worst, samples = _worst(str(result), reference, allowed)
        except Exception as error:
            broken.append(f"does not run: {_line(error)}")
    if worst is not None and not worst.keeps(allowed):
        broken.append(f"output {worst.name!r} differs by {worst.relative:.2g} of its magnitude {worst.note}".strip())
    return Finding(
        operators,
        size,
        broken,
        flaws,
        max_abs=min(worst.max_abs, 1e300) if worst else None,  # JSON has no infinity
        relative=min(worst.relative, 1e300) if worst else None,
        samples=len(samples),
        fills=small,
    )


def _worst(result: str, reference: Path, allowed: float) -> tuple[equivalence.Difference | None, dict[str, Any]]:
    samples: dict[str, dict[str, dict[str, Any]]] = {}
    with np.load(reference) as held:
        for key in held.files:
            number, side, name = key.split(".", 2)
            samples.setdefault(number, {"in": {}, "out": {}, "moved": {}})[side][name] = held[key]
    session = _session(result)
    gaps = []
    for sample in samples.values():
        found = _run(session, sample["in"])
        for name, value in sample["out"].items():
            moved = float(sample["moved"].get(name, 0.0))
            gaps.append(replace(equivalence.difference(name, value, found[name]), sensitivity=moved))
    return max(gaps, key=lambda gap: (not gap.keeps(allowed), gap.relative), default=None), samples


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
