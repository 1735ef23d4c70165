"""Convolutions of one input, added up, are one convolution, since each output is a sum over taps at fixed places of the input:

    conv(x, W, b) + conv(x, V, c) + BN(x) + x = conv(x, W + V' + diag(k) + diag(1), b + c + (bias - mean * k))

with ``k = scale / sqrt(var + epsilon)``. Tap t of a kernel reads the input at ``output * stride - pad + t * dilation``; V' holds each
tap of V where W reads the same place, and zeros elsewhere. What is read beyond the border is zero on both sides. The kernel is that
of the largest branch, so the multiplications never become more. RepVGG, MobileOne and ACNet are trained in this form (Ding et al.,
"RepVGG: Making VGG-style ConvNets Great Again", 2021). Added in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.batch_norm import channel_affine
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FuseConvBranches(Pass):
    """Fuse parallel Convs of one input, its BatchNormalization and the input itself, where they are added up, into one Conv.

    Before:
        g (float[N,1,4,4] x) => (float[N,1,4,4] y)
        <float[1,1,3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float[1] b = {1}, float[1,1,1,1] v = {10}>
        { a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
          c = Conv (x, v)
          d = Add (a, c)
          y = Add (d, x) }
    After:
        g (float[N,1,4,4] x) => (float[N,1,4,4] y)
        <float[1,1,3,3] w = {1, 2, 3, 4, 16, 6, 7, 8, 9}, float[1] b = {1}>
        { y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"Conv"})

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of sums that became a Conv."""
        if model.opset < 9:  # up to then Add and BatchNormalization have other modes
            return 0
        edit = Editor(model)
        merged = 0
        for node in list(model.nodes()):
            if node.op not in ("Add", "Sum") or not node.is_onnx or edit.is_erased(node):
                continue
            terms, sums = _terms(node, edit)
            convs = [conv for t in terms if (conv := _conv(t, node, edit)) is not None]
            if not convs or len(terms) < 2:
                continue
            if ctx.products_stay and len(convs) == 1 and not _normalized(terms, node, edit):
                ctx.remark(node, "the steps of an int8 kernel would be as wide as the identity in it; it stays apart")
                continue
            found: _Merged | str = ""
            for source in {id(conv.inputs[0]): conv.inputs[0] for conv in convs}.values():
                branches = [_branch(t, source, node, edit) for t in terms]
                found = _merged(branches, edit)
                if not isinstance(found, str):
                    break
            if isinstance(found, str):
                if len(convs) > 1:
                    ctx.remark(node, found)
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            host = found.host
            operands = [host.inputs[0], edit.constant(host.inputs[1].name, found.weight)]
            if found.bias is not None:
                operands.append(edit.constant(found.bias_name, found.bias))
            new = Node("Conv", host.name, dict(host.attrs), operands, [result])
            new.attr_types = dict(host.attr_types)
            new.carried = host.carried
            edit.insert_before(node, new, origin=(*found.nodes, *sums))
            for gone in (*sums[::-1], *found.nodes):
                edit.erase(gone)
            merged += 1
        edit.commit()
        return merged


def _terms(root: Node, edit: Editor) -> tuple[list[gs.Tensor], list[Node]]:
    """What `root` adds up, through sums that it alone reads; and the nodes that add, `root` last."""
    terms: list[gs.Tensor] = []
    inner: list[Node] = []
    for tensor in root.inputs:
        node = edit.producer(tensor)
        private = node is not None and edit.sole_consumer(tensor) is root
        if node is not None and private and node.op in ("Add", "Sum") and node.is_onnx and _together(node, root, edit):
            below, nodes = _terms(node, edit)
            terms += below
            inner += nodes
        else:
            terms.append(tensor)
    return terms, [*inner, root]


def _together(node: Node, other: Node, edit: Editor) -> bool:
    return edit.graph_of(node) is edit.graph_of(other)


def _conv(tensor: gs.Tensor, root: Node, edit: Editor) -> Node | None:
    node = edit.producer(tensor)
    return node if node is not None and node.op == "Conv" and node.is_onnx and _together(node, root, edit) else None


def _normalized(terms: list[gs.Tensor], root: Node, edit: Editor) -> bool:
    """Whether one of `terms` is a BatchNormalization, an operator that merging saves."""
    producers = [edit.producer(t) for t in terms]
    return any(p is not None and p.op == "BatchNormalization" and _together(p, root, edit) for p in producers)


@dataclass(frozen=True)
class _Branch:
    """A term as a function of the source: a Conv, or a factor and a shift per channel (None: 1 and 0)."""

    node: Node | None  # None: the source itself
    scale: Array | None = None
    shift: Array | None = None


def _branch(tensor: gs.Tensor, source: gs.Tensor, root: Node, edit: Editor) -> _Branch | str:
    """`tensor` as a branch of `source`, or why it is none."""
    if tensor is source:
        return _Branch(None)
    node = edit.producer(tensor)
    if (
        node is None
        or not node.is_onnx
        or node.op not in ("Conv", "BatchNormalization")
        or node.inputs[0] is not source
    ):
        return f"{tensor.name!r} is no Conv or BatchNormalization of {source.name!r}"
    if len(tensor.outputs) != 1 or edit.is_output(tensor) or not _together(node, root, edit):
        return f"{tensor.name!r} is read by others too"
    if not all(edit.is_fixed(t) for t in node.inputs[1:] if t.name):
        return f"weights of {node.name!r} are not constant"
    if node.op == "Conv":
        if edit.sole_consumer(node.inputs[1]) is not node:
            return f"weight {node.inputs[1].name!r} is shared"
        return _Branch(node)
    affine = channel_affine(node, edit)
    return affine if isinstance(affine, str) else _Branch(node, affine.scale, affine.shift)


@dataclass(frozen=True)
class _Merged:
    host: Node  # the Conv whose kernel, strides and padding stay
    weight: Array
    bias: Array | None
    bias_name: str
    nodes: tuple[Node, ...]  # all branches


def _merged(branches: list[_Branch | str], edit: Editor) -> _Merged | str:
    """The weight and bias of all branches together, or why there are none."""
    known: list[_Branch] = []
    for branch in branches:
        if isinstance(branch, str):
            return branch
        known.append(branch)
    convs = [b.node for b in known if b.node is not None and b.node.op == "Conv"]
    host = max(convs, key=lambda conv: int(np.prod(conv.inputs[1].shape)))
    w = host.inputs[1]
    dtype, rank = np.dtype(w.dtype), len(w.shape)
    if dtype.kind != "f" or rank < 3:
        return f"weight {w.name!r} of {rank} dimensions is {dtype}; merging is for convolutions in float16, float32 and float64"
    window = _window(host)
    if window is None:
        return f"the padding of {host.name!r} depends on the size of its input"
    exact = w.values.astype(np.float64)
    bias = np.zeros(w.shape[0])
    biased: str | None = None
    for branch in known:
        node = branch.node
        if node is host:
            taps: Array = np.zeros(())
        elif node is not None and node.op == "Conv":
            placed = _placed(node, host, window)
            if isinstance(placed, str):
                return placed
            taps = placed
        else:
            centred = _diagonal(branch.scale, host, window)
            if isinstance(centred, str):
                return centred
            taps = centred
        with np.errstate(all="ignore"):
            exact = exact + taps
            if branch.shift is not None:
                bias, biased = bias + branch.shift, biased or f"{host.name}_bias"
            elif node is not None and len(node.inputs) > 2 and node.inputs[2].name:
                bias, biased = bias + node.inputs[2].values.astype(np.float64), node.inputs[2].name
    with np.errstate(all="ignore"):
        weight, shift = exact.astype(dtype), bias.astype(dtype)
    if not np.isfinite(weight).all() or not np.isfinite(shift).all():
        return f"merging would make weight {w.name!r} infinite or NaN in {dtype}"
    nodes = tuple(b.node for b in known if b.node is not None)
    return _Merged(host, weight, None if biased is None else shift, biased or "", nodes)


@dataclass(frozen=True)
class _Window:
    """Where a Conv reads, along each spatial axis."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    growth: tuple[int, ...]  # padding less what the kernel takes: the same for two Convs means the same output size


def _window(conv: Node) -> _Window | None:
    """None where the padding depends on the input."""
    kernel = [int(k) for k in conv.inputs[1].shape[2:]]
    ones = [1] * len(kernel)
    strides = [int(s) for s in conv.attrs.get("strides") or ones]
    dilations = [int(d) for d in conv.attrs.get("dilations") or ones]
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    mode = conv.attrs.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        if any(s != 1 for s in strides):
            return None
        begins = [r // 2 if mode == "SAME_UPPER" else (r + 1) // 2 for r in reach]
        ends = [r - b for r, b in zip(reach, begins, strict=True)]
    else:
        pads = [int(p) for p in conv.attrs.get("pads") or ()] if mode == "NOTSET" else []
        pads = pads or [0] * (2 * len(kernel))
        begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    growth = [b + e - r for b, e, r in zip(begins, ends, reach, strict=True)]
    return _Window(tuple(strides), tuple(dilations), tuple(begins), tuple(growth))


def _placed(conv: Node, host: Node, window: _Window) -> Array | str:
    """The taps of `conv` at the places of the kernel of `host` that read the same, or why they have none."""
    w, own = conv.inputs[1], _window(conv)
    if np.dtype(w.dtype) != np.dtype(host.inputs[1].dtype) or w.shape[:2] != host.inputs[1].shape[:2]:
        return f"{conv.name!r} and {host.name!r} differ in channels or type"
    if int(conv.attrs.get("group", 1)) != int(host.attrs.get("group", 1)):
        return f"{conv.name!r} and {host.name!r} have different groups"
    if own is None or len(w.shape) != len(host.inputs[1].shape):
        return f"the padding of {conv.name!r} depends on the size of its input"
    if own.strides != window.strides or own.growth != window.growth:
        return f"{conv.name!r} and {host.name!r} differ in stride or output size"
    places = []
    for axis, size in enumerate(w.shape[2:]):
        offsets = np.arange(size) * own.dilations[axis] + window.begins[axis] - own.begins[axis]
        index, rest = np.divmod(offsets, window.dilations[axis])
        if rest.any() or index.min() < 0 or index.max() >= host.inputs[1].shape[2 + axis]:
            return f"the kernel of {conv.name!r} does not lie within that of {host.name!r}"
        places.append(index)
    taps = np.zeros(host.inputs[1].shape)
    taps[np.ix_(*(np.arange(n) for n in w.shape[:2]), *places)] = w.values
    return taps


def _diagonal(scale: Array | None, host: Node, window: _Window) -> Array | str:
    """The input times `scale` by channel (None: 1) as a kernel of the shape of that of `host`, or why there is none."""
    shape = [int(n) for n in host.inputs[1].shape]
    channels, depth = shape[:2]
    if depth * int(host.attrs.get("group", 1)) != channels or (scale is not None and scale.size != channels):
        return f"{host.name!r} gives another number of channels than it takes"
    if any(s != 1 for s in window.strides) or any(window.growth):
        return f"{host.name!r} gives another size than it takes"
    places = [divmod(begin, d) for begin, d in zip(window.begins, window.dilations, strict=True)]
    if any(rest or not 0 <= index < size for (index, rest), size in zip(places, shape[2:], strict=True)):
        return f"the kernel of {host.name!r} has no tap on the position itself"
    rows = np.arange(channels)
    taps = np.zeros(shape)
    taps[(rows, rows % depth, *(np.full(channels, index) for index, _ in places))] = 1.0 if scale is None else scale
    return taps
