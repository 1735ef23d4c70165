"""A convolution or pool pads by itself: zeros in Conv and, counted, in AveragePool; minus infinity in MaxPool. What is never negative may be
padded with zeros for MaxPool as well: they are no maximum that the window has not, as long as it is not in the padding alone.

A maximum over nothing but minus infinity is where kernels differ: ONNX Runtime's gives the lowest finite number or minus infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

_NEVER_NEGATIVE: Final = ("Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt")


@dataclass(frozen=True)
class FusePad(Pass):
    """Fold a Pad of the spatial axes with a constant that changes nothing into Conv, AveragePool or MaxPool.

    Before:
        g (float[1,1,3,3] x, float[1,1,3,3] w) => (float[1,1,4,3] y)
        <int64[8] pads = {0, 0, 2, 1, 0, 0, 1, 1}>
        { a = Pad (x, pads)
          y = Conv (a, w) }
    After:
        g (float[1,1,3,3] x, float[1,1,3,3] w) => (float[1,1,4,3] y)
        { y = Conv <pads = [2, 1, 1, 1]> (x, w) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Pad"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of Pads folded."""
        shapes = ctx.analysis(Shapes, model)
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            if node.op not in ("Conv", "AveragePool", "MaxPool") or not node.is_onnx:
                continue
            pad = edit.producer(node.inputs[0])
            if pad is None or pad.op != "Pad" or not pad.is_onnx:
                continue
            attributes = _padded(node, pad, shapes, edit)
            if isinstance(attributes, str):
                ctx.remark(node, attributes)
                continue
            if not ctx.admit():
                break
            results = list(node.outputs)
            node.outputs.clear()
            new = Node(node.op, node.name, attributes, [pad.inputs[0], *node.inputs[1:]], results)
            new.attr_types = dict(node.attr_types)
            new.carried = node.carried
            edit.insert_before(node, new, origin=(pad, node))
            edit.erase(node)
            edit.erase(pad)
            fused += 1
        edit.commit()
        return fused


def _padded(node: Node, pad: Node, shapes: Shapes, edit: Editor) -> dict[str, Any] | str:
    """The attributes of `node` when it does what `pad` did, or why it cannot."""
    if edit.sole_consumer(pad.outputs[0]) is not node or edit.graph_of(pad) is not edit.graph_of(node):
        return f"{pad.outputs[0].name!r} is read by others too"
    if pad.attrs.get("mode", "constant") != "constant":
        return f"{pad.name!r} pads by {pad.attrs['mode']}"
    neutral = -np.inf if node.op == "MaxPool" else 0.0
    if _fill(pad, edit) != neutral and not (node.op == "MaxPool" and _fill(pad, edit) == 0 and _is_positive(pad, edit)):
        return f"{pad.name!r} does not pad with a constant {neutral}"
    sides = _sides(pad, shapes)
    if sides is None:
        return f"the widths of {pad.name!r} are not known"
    begins, ends = sides
    if len(begins) < 3 or any(begins[:2]) or any(ends[:2]):
        return f"{pad.name!r} pads batch or channels"
    if min(begins + ends) < 0:
        return f"{pad.name!r} crops"
    spatial = len(begins) - 2
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"it pads by {node.attrs['auto_pad']}, which depends on the size"
    own = (
        list(node.attrs.get("pads") or [0] * (2 * spatial))
        if node.attrs.get("auto_pad") != "VALID"
        else [0] * (2 * spatial)
    )
    pads = [int(p) + int(q) for p, q in zip(own, [*begins[2:], *ends[2:]], strict=True)]
    attributes = {k: v for k, v in node.attrs.items() if k != "auto_pad"} | {"pads": pads}
    if node.op == "Conv":
        return attributes
    kernel = [int(k) for k in node.attrs["kernel_shape"]] * 2
    if any(d != 1 for d in node.attrs.get("dilations") or ()) and _fill(pad, edit) == 0 and node.op == "MaxPool":
        return "its taps might step over all but padding"
    if node.attrs.get("ceil_mode", 0) or any(p >= k for p, k in zip(pads, kernel, strict=True)):
        return "a window might lie in the padding alone"
    if len(node.outputs) > 1:
        return "its indices would change"
    if node.op == "AveragePool":
        if any(own) and not node.attrs.get("count_include_pad", 0):
            return "it does not count its own padding"
        attributes["count_include_pad"] = 1
    return attributes


def _is_positive(pad: Node, edit: Editor) -> bool:
    """Whether what `pad` reads is never negative."""
    node = edit.producer(pad.inputs[0])
    return node is not None and node.is_onnx and node.op in _NEVER_NEGATIVE


def _fill(pad: Node, edit: Editor) -> float | None:
    """What it pads with; None where that is not constant."""
    if len(pad.inputs) < 3 or not pad.inputs[2].name:
        return float(pad.attrs.get("value", 0.0))
    value = pad.inputs[2]
    return float(value.values.reshape(-1)[0]) if edit.is_fixed(value) and value.values.size == 1 else None


def _sides(pad: Node, shapes: Shapes) -> tuple[list[int], list[int]] | None:
    """Widths before and behind each axis."""
    known = shapes.integers(pad.inputs[1]) if len(pad.inputs) > 1 else np.array(pad.attrs.get("pads", ()), np.int64)
    if known is None:
        return None
    widths = [int(v) for v in known.reshape(-1)]
    half = len(widths) // 2
    if len(pad.inputs) < 4 or not pad.inputs[3].name:
        return widths[:half], widths[half:]
    axes, rank = shapes.integers(pad.inputs[3]), shapes.rank(pad.inputs[0])
    if axes is None or rank is None:
        return None
    begins, ends = [0] * rank, [0] * rank
    for place, axis in enumerate(axes.reshape(-1)):
        begins[axis], ends[axis] = widths[place], widths[half + place]
    return begins, ends
