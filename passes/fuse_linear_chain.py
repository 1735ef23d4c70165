"""Two linear operators in a row are one, where that takes fewer multiplications:

    (x @ A) @ B = x @ (A @ B)                                   MatMul [m,k] and [k,n]: m * n instead of m * k + k * n
    (x @ A + b) @ B + c = x @ (A @ B) + (b @ B + c)             Gemm, with alpha and beta in the constants
    conv(conv(x, W, b), V, c) = conv(x, V @ W, V @ b + c)       one of the two kernels has one tap

A kernel of one tap that comes second must not pad, since the border of its input is not x's. The same holds for the larger kernel where
it comes second and the first has a bias, which zeros beyond the border do not. Multiplied in float64, rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Exactness, Pass, Place

Array = np.ndarray[Any, Any]
_PRODUCTS: Final = ("MatMul", "Gemm")
_LARGEST: Final = 1 << 24  # elements of both weights; larger ones take minutes and gigabytes to multiply in float64


@dataclass(frozen=True)
class FuseLinearChain(Pass):
    """Fuse two matrix products by constants, or a convolution and one of a single tap, into one where that multiplies less.

    Before:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] a = {1, 2, 3, 4}, float[2] b = {1, 2}, float[2,2] w = {1, 0, 1, 1}, float[2] c = {5, 6}>
        { h = Gemm (x, a, b)
          y = Gemm (h, w, c) }
    After:
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {3, 2, 7, 4}, float[2] c = {8, 8}>
        { y = Gemm (x, w, c) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING
    ops: ClassVar[frozenset[str] | None] = frozenset({"MatMul", "Gemm", "Conv"})
    places: ClassVar[tuple[Place, ...]] = (Place(_PRODUCTS, _PRODUCTS), Place(("Conv",), ("Conv",)))

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep in topological order; returns the number of pairs fused."""
        if model.opset < 7:  # up to then Gemm broadcasts by attribute
            return 0
        edit = Editor(model)
        fused = 0
        for node in list(model.nodes()):
            first = edit.producer(node.inputs[0]) if node.is_onnx and node.op in (*_PRODUCTS, "Conv") else None
            if first is None or not first.is_onnx or first.op not in (_PRODUCTS if node.op in _PRODUCTS else ("Conv",)):
                continue
            found: _Fused | str = _objection(first, node, edit) or ""
            if not found:
                found = _convs(first, node) if node.op == "Conv" else _products(first, node)
            if isinstance(found, str):
                ctx.remark(node, found)
                continue
            if not ctx.admit():
                break
            result = node.outputs[0]
            node.outputs.clear()
            operands = [first.inputs[0], edit.constant(node.inputs[1].name, found.weight)]
            if found.bias is not None:
                named = _bias(node) or _bias(first)
                operands.append(edit.constant(named.name if named is not None else f"{node.name}_bias", found.bias))
            op = "Gemm" if "Gemm" in (first.op, node.op) else node.op
            new = Node(op, node.name, found.attributes, operands, [result])
            edit.insert_before(node, new, origin=(first, node))
            edit.erase(node)
            edit.erase(first)
            fused += 1
        edit.commit()
        return fused


@dataclass(frozen=True)
class _Fused:
    weight: Array
    bias: Array | None
    attributes: dict[str, Any]


def _bias(node: Node) -> Any:
    """The operand, or None."""
    return node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None


def _objection(first: Node, second: Node, edit: Editor) -> str | None:
    """Why the constants of the two cannot be combined, whatever they are, or None."""
    between = first.outputs[0]
    if edit.sole_consumer(between) is not second or edit.graph_of(first) is not edit.graph_of(second):
        return f"{between.name!r} is read by others too"
    for node in (first, second):
        w = node.inputs[1]
        if not all(edit.is_fixed(t) for t in node.inputs[1:] if t.name):
            return f"weight or bias of {node.name!r} is not constant"
        if edit.sole_consumer(w) is not node:
            return f"weight {w.name!r} is shared"
    count = sum(math.prod(node.inputs[1].shape) for node in (first, second))
    if count > _LARGEST:
        return f"weights {first.inputs[1].name!r} and {second.inputs[1].name!r} have {count:,} elements; {_LARGEST:,} at most are multiplied"
    dtype = np.dtype(second.inputs[1].dtype)
    if dtype.kind != "f" or np.dtype(first.inputs[1].dtype) != dtype:
        return f"weight {second.inputs[1].name!r} is {dtype}; fusing is for float16, float32 and float64"
    return None


def _rounded(second: Node, weight: Array, bias: Array | None, attributes: dict[str, Any]) -> _Fused | str:
    """The result in the type of the weights, or why it does not hold it."""
    name, dtype = second.inputs[1].name, np.dtype(second.inputs[1].dtype)
    with np.errstate(all="ignore"):
        w, b = weight.astype(dtype), None if bias is None else bias.astype(dtype)
    if not np.isfinite(w).all() or (b is not None and not np.isfinite(b).all()):
        return f"fusing would make weight {name!r} infinite or NaN in {dtype}"
    if np.abs(w - weight).max(initial=0) > np.finfo(dtype).eps * np.abs(weight).max(initial=0):
        return f"fusing would make weight {name!r} too small for {dtype}"
    return _Fused(w, b, attributes)


def _products(first: Node, second: Node) -> _Fused | str:
    """MatMul or Gemm."""
    a, b = first.inputs[1].values, second.inputs[1].values
    if a.ndim != 2 or b.ndim != 2:
        return f"{first.name!r} and {second.name!r} are not both products with one matrix"
    if second.attrs.get("transA", 0):
        return "what the first gives is transposed"
    a, b = (w.T if n.attrs.get("transB", 0) else w for n, w in ((first, a), (second, b)))
    if a.shape[0] * b.shape[1] >= a.size + b.size:
        return f"one matrix of {a.shape[0]} x {b.shape[1]} would take no fewer multiplications"
    alphas = [float(n.attrs.get("alpha", 1.0)) for n in (first, second)]
    with np.errstate(all="ignore"):
        wide = b.astype(np.float64) * alphas[1]
        weight = (a.astype(np.float64) * alphas[0]) @ wide
        bias = None
        for node in (first, second):
            own = _bias(node)
            if own is None:
                continue
            term = own.values.astype(np.float64) * float(node.attrs.get("beta", 1.0))
            term = (
                np.broadcast_to(term, np.broadcast_shapes(term.shape, (1, a.shape[1]))) @ wide
                if node is first
                else term
            )
            bias = term if bias is None else bias + term
    if bias is not None and bias.ndim == 2 and bias.shape[0] == 1:
        bias = bias[0]
    attributes = {"transA": first.attrs["transA"]} if first.attrs.get("transA", 0) else {}
    return _rounded(second, weight, bias, attributes)


def _convs(first: Node, second: Node) -> _Fused | str:
    """Conv, of which one kernel has one tap."""
    w, v = first.inputs[1].values, second.inputs[1].values
    if any(int(n.attrs.get("group", 1)) != 1 for n in (first, second)):
        return "one of the two works by groups"
    if w.ndim != v.ndim or w.ndim < 3:
        return "the two convolve other numbers of axes"
    taps = [math.prod(w.shape[2:]), math.prod(v.shape[2:])]
    if 1 not in taps:
        return "both kernels have several taps"
    strides = [[int(s) for s in n.attrs.get("strides") or [1] * (w.ndim - 2)] for n in (first, second)]
    last = taps[1] == 1  # whether the kernel of one tap is the second
    point, kernel = (second, first) if last else (first, second)
    if _pads(point):
        return f"{point.name!r} pads"
    if not last and any(s != 1 for s in strides[0]):
        return f"{first.name!r} skips what {second.name!r} reads between"
    if not last and _bias(first) is not None and _pads(second):
        return f"{second.name!r} pads behind the bias of {first.name!r}"
    if last and any(s != 1 for s in strides[1]) and kernel.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"the padding of {kernel.name!r} depends on its strides"
    if w.shape[1] * v.shape[0] * max(taps) >= w.size + v.size:
        return "one kernel would take no fewer multiplications"
    with np.errstate(all="ignore"):
        x, y = w.astype(np.float64), v.astype(np.float64)
        inner = y.reshape(y.shape[:2]) if last else x.reshape(x.shape[:2])
        weight = np.tensordot(inner, x, (1, 0)) if last else np.moveaxis(np.tensordot(y, inner, (1, 0)), -1, 1)
        bias = None
        if _bias(first) is not None:
            bias = np.tensordot(y, _bias(first).values.astype(np.float64), (1, 0)).reshape(v.shape[0], -1).sum(1)
        if _bias(second) is not None:
            own = _bias(second).values.astype(np.float64)
            bias = own if bias is None else bias + own
    attributes = dict(kernel.attrs) | {"kernel_shape": [int(n) for n in weight.shape[2:]]}
    if any(s != 1 for pair in strides for s in pair):
        attributes["strides"] = [s * t for s, t in zip(*strides, strict=True)]
    return _rounded(second, weight, bias, attributes)


def _pads(conv: Node) -> bool:
    """Whether it may pad."""
    return conv.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(conv.attrs.get("pads") or ())
