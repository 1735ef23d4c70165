"""Reading a model at a newer opset: which nodes mean the same there, and the few that have to be written differently.

A node means the same where its operator did not change, or changed by optional operands and attributes at the end and by types alone, which the
schemas tell. What they cannot tell (`_MEANING`) is listed, and what moved between attribute and operand is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass

_OLDEST: Final = 11  # below it too many operators differ to be worth a rule
_MEANING: Final = {  # opset from which an operator of the same form means something else
    "AveragePool": 19,  # padding of ceil mode
    "BatchNormalization": 14,  # outputs of training
    "Cast": 19,
    "GridSample": 20,
    "Hardmax": 13,
    "LogSoftmax": 13,
    "LpPool": 18,
    "MaxPool": 22,
    "Resize": 13,
    "Softmax": 13,
    "Upsample": 10,
}
_CHECKED: Final = frozenset(
    {"AveragePool", "BatchNormalization", "Cast", "LogSoftmax", "MaxPool", "Softmax"}
)  # `_same`
_AXES: Final = {  # operators whose attribute `axes` became an operand, and when
    **dict.fromkeys(("ReduceSum", "Squeeze", "Unsqueeze"), 13),
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
        18,
    ),
}  # fmt: skip


def obstacle(model: Model, version: int, shapes: Shapes, allowed: bool = True) -> str | None:
    """Why `model` cannot be read at opset `version`, or None; an older model may be raised only where that is `allowed`."""
    now = model.opset
    if now >= version:
        return None
    if not allowed:
        return f"opset {now} is older than {version}, which it needs; raise-opset=true raises it"
    if now < _OLDEST:
        return f"opset {now} is older than {_OLDEST}; convert the model with onnx.version_converter"
    if model.functions:
        return "the model has functions of its own; run inline-functions first"
    if version > onnx.defs.onnx_opset_version():
        return f"onnx {onnx.__version__} does not know opset {version}"
    for node in model.nodes():
        if node.is_onnx and not _carries(node, now, version, shapes):
            return f"node {node.name!r} ({node.op}) means something else at opset {version}"
    return None


def raise_opset(model: Model, version: int, edit: Editor) -> None:
    """Let `model` be read at opset `version`, to which `obstacle` has nothing to say; a model that is there already stays."""
    now = model.opset
    if now >= version:
        return
    for node in model.nodes():
        if node.is_onnx:
            _rewrite(node, now, version, edit)
    model.set_opset("", version)
    wanted = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    model.carried.ir_version = max(model.ir_version, wanted)


def _carries(node: Node, now: int, version: int, shapes: Shapes) -> bool:
    try:
        old, new = onnx.defs.get_schema(node.op, now, ""), onnx.defs.get_schema(node.op, version, "")
    except onnx.defs.SchemaError:
        return False
    if old.since_version == new.since_version:
        return True
    if new.deprecated:
        return False
    changed = _MEANING.get(node.op, version + 1)
    if now < changed <= version and not (node.op in _CHECKED and _same(node, shapes)):
        return False
    moved = now < _AXES.get(node.op, 0) <= version
    gone = {name for name in old.attributes if name not in new.attributes} & node.attrs.keys()
    if gone - ({"axes"} if moved else set()):
        return False
    if node.op == "Split" and now < 13 <= version and "split" in node.attrs:
        return False
    for name, attribute in old.attributes.items():
        if (
            name in new.attributes
            and name not in node.attrs
            and attribute.default_value != new.attributes[name].default_value
        ):
            return node.op in _CHECKED
    shared = min(len(old.inputs), len(new.inputs))
    return len(new.inputs) >= len(old.inputs) and all(
        old.inputs[i].option == new.inputs[i].option or i >= len(node.inputs) for i in range(shared)
    )


def _same(node: Node, shapes: Shapes) -> bool:
    """Whether a node of an operator that changed uses nothing of what changed."""
    attrs = node.attrs
    match node.op:
        case "Softmax" | "LogSoftmax":
            rank = shapes.rank(node.inputs[0])
            return bool(attrs.get("axis", 1) in (-1, None if rank is None else rank - 1))
        case "BatchNormalization":
            return len([t for t in node.outputs if t.name]) == 1 and "training_mode" not in attrs
        case "AveragePool" | "MaxPool":
            return bool(attrs.get("ceil_mode", 0) == 0)
        case "Cast":
            return bool(int(attrs.get("to", 0)) <= onnx.TensorProto.BFLOAT16)
    return False


def _rewrite(node: Node, now: int, version: int, edit: Editor) -> None:
    writers: list[tuple[bool, Callable[[], None]]] = [
        (now < _AXES.get(node.op, 0) <= version, lambda: _move_axes(node, edit)),
        (node.op in ("Softmax", "LogSoftmax") and now < 13 <= version, lambda: node.attrs.update(axis=-1)),
        (
            node.op == "Split" and now < 18 <= version and (len(node.inputs) < 2 or not node.inputs[1].name),
            lambda: node.attrs.update(num_outputs=len(node.outputs)),
        ),
    ]
    for needed, write in writers:
        if needed:
            write()


def _move_axes(node: Node, edit: Editor) -> None:
    axes = node.attrs.pop("axes", None)
    if axes is not None:
        node.inputs.append(edit.constant(f"{node.name}_axes", np.asarray(axes, np.int64)))


@dataclass(frozen=True)
class NewerOperator(Pass):
    """A pass that writes an operator of a certain opset, to which it raises an older model where that is allowed."""

    operator: ClassVar[str]
    since: ClassVar[int]

    raise_opset: bool | None = None  # whether an older model is raised; none: where a target is known

    def match(self, node: Node, shapes: Shapes, edit: Editor) -> Callable[[], None] | str | None:
        """What writes the operator around `node`, or why it cannot be written; None where nothing suggests it."""
        raise NotImplementedError

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of operators written."""
        shapes, edit = ctx.analysis(Shapes, model), Editor(model)
        hindered = obstacle(model, self.since, shapes, ctx.may_raise(self.since, self.raise_opset))
        written = 0
        for node in list(model.nodes()):
            found = self.match(node, shapes, edit)
            if found is None:
                continue
            reason = found if isinstance(found, str) else hindered
            if reason is not None:
                ctx.remark(node, f"no {self.operator}: {reason}")
                continue
            if not ctx.admit():
                break
            assert not isinstance(found, str)
            found()
            written += 1
        edit.commit()
        if written:
            raise_opset(model, self.since, edit)
        return written
