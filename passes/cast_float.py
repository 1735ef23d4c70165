"""``f(x)`` in float32 is ``float32(f(half(x)))``, up to roundings of half precision, wherever half has the range and the digits for `f`.

TensorRT from 11 on and TensorRT for RTX know no precision flag: a kernel computes in the types that the graph states. So values and weights get the half
type, and a Cast stands where it ends. Which operators may compute in half follows from their schemas, which should is a minimum cut
(`graphopt.analyses.precision`). Float32 stay:

1. what half has no range for: tensors that calibration data drives beyond it, constants beyond it (and the mask arithmetic behind
   them: a sum with -3.4e38 overflows, and a row of nothing but masked places would give NaN), constants that it would flush to 0, as an epsilon;
2. what half has no digits for: exponentials, norms and long sums (kept in float32 inside fused kernels, so that the casts cost nothing there), but for
   normalizations that are defined to compute in float32 inside (``stash_type``); numbers made from integers alone, values that a Loop or Scan carries around;
3. inputs and outputs of the model, unless ``io=convert``.

ONNX Runtime's CPU has no kernels for half types, and its rewriting of float16 chains has crashed: for it the weights alone become half, and
the arithmetic stays float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Final, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analyses import calibration
from graphopt.analyses.inlining import called_functions, inline_calls
from graphopt.analyses.precision import FLOAT, FULL, HALF, Demands, Units, index_arithmetic, retype
from graphopt.analyses.shapes import Shapes
from graphopt.conversion import convert_opset
from graphopt.edit import Editor
from graphopt.elements import CastValues
from graphopt.errors import UnsupportedModel, UsageError
from graphopt.ir import Constant, Graph, Model, Node, onnx_dtype
from graphopt.pass_base import Context, Exactness, Pass

_SENSITIVE: Final = frozenset((
    "LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization",
    "LpNormalization", "LRN", "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Softplus", "Sin", "Cos", "Tan", "CumSum",
    "CumProd", "Range", "ReduceSumSquare", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd",
    "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss", "AffineGrid", "STFT", "DFT", "Det", "TopK", "RoiAlign",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "RandomNormalLike", "RandomUniformLike", "Bernoulli",
    "Multinomial",
))  # fmt: skip
_STASHED: Final = {"LayerNormalization": 17, "RMSNormalization": 23, "GroupNormalization": 21}  # opset of stash_type
_SUMS: Final = frozenset({"ReduceSum", "ReduceL1", "Sum"})
_SCATTERS: Final = frozenset({"ScatterElements", "ScatterND"})
_MOST_SUMMED: Final = 1024  # values, of which half still holds the sum to 11 bits when they are of one size
_BOUNDED: Final = frozenset({"Clip", "Min", "Max"})  # a bound beyond half's range binds nothing in it
_CARRIES: Final = frozenset((  # what a value beyond the range passes through
    "Where", "Mul", "Add", "Sub", "Neg", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Gather", "Concat",
    "Identity", "Tile", "Trilu", "Pad", "Cast", "Flatten", "ScatterND", "ScatterElements", "Max", "Min", "Split",
))  # fmt: skip
_MASKED: Final = {
    "Attention": 3,
    "MultiHeadAttention": 4,
    "GroupQueryAttention": 3,
}  # from which operand on they take masks
_CODING: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})  # whose scales stay float32
_OPSET: Final = 13  # for a model that has no operator of the default domain yet, and for Cast
_WORTH: Final = 1024  # bytes of a weight from which storing it in half pays for a Cast
_FEW: Final = 16  # elements of a constant each of which matters: an epsilon, a temperature
_FAR: Final = 4  # a mask stands this much within the range, for the scores, and one more mask, to be added to it


@dataclass(frozen=True)
class CastFloat(Pass):
    """Compute in float16 or bfloat16 where the type has the range and the digits for it, with few casts.

    Before:
        g (float[1,2] x) => (float[1,2] y)
        <float[2,2] w = {1.0, 0.5, 0.0, -0.5}>
        { a = MatMul (x, w)
          r = Relu (a)
          y = Softmax (r) }
    After:
        g (float[1,2] x) => (float[1,2] y)
        <float16[2,2] w = {15360, 14336, 0, 47104}>
        { h = Cast <to = 10> (x)
          a = MatMul (h, w)
          r = Relu (a)
          f = Cast <to = 1> (r)
          y = Softmax (f) }
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    dtype: Literal["float16", "bfloat16"] = "float16"
    keep: tuple[str, ...] = ()  # names (with * and ?) or operators of further nodes to leave in float32
    convert: tuple[str, ...] = ()  # of nodes to convert although they would be left, schema permitting; '*': all
    io: Literal["keep", "convert"] = "keep"  # types of the model's inputs and outputs
    margin: float = 2.0  # how many times what calibration data shows must fit the range of the type
    samples: int | None = 64  # calibration samples to look at; none: all

    def __post_init__(self) -> None:
        """Check the options."""
        if not (math.isfinite(self.margin) and self.margin >= 1):
            raise ValueError(f"margin={self.margin} is less than 1")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples={self.samples} is less than 1")

    @property
    def rounds_to(self) -> str | None:
        """The type whose roundings are all that this pass does to the numbers."""
        return self.dtype

    @property
    def retypes(self) -> bool:
        """Whether inputs and outputs may change between floating-point types."""
        return self.io == "convert"

    def run(self, model: Model, ctx: Context) -> int:
        """Plan, cast; returns the number of nodes that compute in half, and of inputs and outputs that have it."""
        self._check(model, ctx)
        return _Run(self, model, ctx).run()

    def _check(self, model: Model, ctx: Context) -> None:
        for pattern in (*self.keep, *self.convert):
            if pattern != "*" and not any(_selects((pattern,), n) for n in model.nodes()):
                raise UsageError(f"cast-float: {pattern!r} matches no node; graphopt inspect lists their names")
        old = [c for c in ctx.target.compute_capabilities if int(c[2:]) < 80] if ctx.target is not None else []
        if old and self.dtype == "bfloat16":
            raise UnsupportedModel(f"cast-float: {', '.join(old)} cannot compute bfloat16; take dtype=float16")


def _selects(patterns: tuple[str, ...], node: Node) -> bool:
    return any(p == node.op or fnmatchcase(node.name, p) for p in patterns)


def _trips_layouts(node: Node) -> bool:
    """Whether ONNX Runtime, 1.24 to 1.32 at least, crashes on this Transpose in half: one that moves the first axis behind the other batch axes, for a product.

    It swaps the Transpose with the Cast that a half MatMul gets on the CPU, to fuse it, then finds that only one operand is transposed that
    way, and leaves a node without a schema to its layout pass.
    """
    perm = [int(axis) for axis in node.attrs.get("perm", ())]
    rank = len(perm)
    if rank < 3 or perm[: rank - 2] != [*range(1, rank - 1)]:
        return False

    def alike(tensor: gs.Tensor) -> bool:
        made = tensor.inputs[0] if tensor.inputs else None
        other = [*made.attrs.get("perm", ())] if made is not None and made.op == "Transpose" else []
        return len(other) == rank and other[: rank - 2] == perm[: rank - 2]

    return any(n.op == "MatMul" and n.is_onnx and not all(map(alike, n.inputs)) for n in node.outputs[0].outputs)


@dataclass(frozen=True)
class _Extent:
    """Of the magnitudes of a constant's finite values other than 0."""

    largest: float
    smallest: float
    flushed: int  # values that half makes 0
    subnormal: int  # values of which half keeps fewer digits


class _Run:
    def __init__(self, options: CastFloat, model: Model, ctx: Context) -> None:
        self.options, self.model, self.ctx = options, model, ctx
        self.half: np.dtype[Any] = np.dtype(getattr(ml_dtypes, options.dtype, options.dtype))
        self.limits = ml_dtypes.finfo(self.half)
        self.largest, self.normal = float(self.limits.max), float(self.limits.smallest_normal)
        self.least = 13 if options.dtype == "bfloat16" else 6  # opset whose Cast gives the type
        target = ctx.target
        self.cpu = target is not None and target.runtime == "ort" and target.device.partition("-")[0] in ("", "cpu")
        self.casts = 0
        self.rounded: dict[tuple[int, float | None], Constant] = {}
        self.extents: dict[int, _Extent] = {}
        self.lost: list[_Extent] = []  # of weights that lose digits

    # -------------------------------------------------------------------------------------------------- what to do

    def run(self) -> int:
        before = self.model.graph, onnx.ModelProto.FromString(self.model.carried.SerializeToString())
        inlined = self._inline()
        told = self._raise_opset()
        if 0 < self.model.opset < self.least:
            self.ctx.remark(None, f"nothing done: {told[0]}")
            return inlined
        converted = self._convert()
        if converted:
            told += [f"{inlined} calls of functions inlined: their values have types now"] if inlined else []
            for text in told:
                self.ctx.remark(None, text)
        elif self.model.graph is not before[0]:
            self.model.graph, self.model.carried = before
        return converted + inlined

    def _inline(self) -> int:
        """What a function computes in is said by its callers' types and its own Casts and Constants: put its body where it is called."""
        inlined = inline_calls(self.model, self.ctx) if self.model.functions else 0
        if inlined:
            called = called_functions(self.model)
            self.model.graph._functions = [f for f in self.model.functions if id(f) in called]
        return inlined

    def _convert(self) -> int:
        shapes = self.ctx.analysis(Shapes, self.model)
        self.edit = Editor(self.model)
        self.shapes = shapes
        self.beyond = self._beyond_range()
        self.overflowing = self._overflowing()
        self.integers = index_arithmetic(self.model, shapes.dtype)
        demands = Demands(self._keeps, self._is_wide, self._converts, self.options.io == "convert")
        units = self.units = Units(self.model, shapes, self.half, demands)
        units.solve()
        converted, left = 0, 0
        nodes = list(units.nodes())
        if not nodes:
            self.ctx.remark(None, "nothing done: no operator of the model computes in float32")
        for unit in nodes:
            assert unit.node is not None
            if unit.choice == HALF and not self.ctx.admit():
                unit.choice = FULL
            converted += unit.choice == HALF
            left += unit.choice != HALF
            if unit.reason:
                self.ctx.remark(unit.node, f"stays float32: {unit.reason}")
        border = [t for t in (*self.model.graph.inputs, *self.model.graph.outputs) if units.is_float(t)]
        converted += len(border) if demands.convert_borders else 0
        if converted:
            self._write()
        stored = self._store() if self.cpu else 0
        if converted and not self.cpu:
            self._tell(converted, left)
        if converted and self.ctx.target is None and self.options.dtype == "bfloat16":
            self.ctx.remark(
                None,
                "ONNX Runtime's CPU has few bfloat16 kernels and will not load this; --target ort:cpu gives one that it loads",
            )
        self._tell_lost()
        return converted + stored

    def _store(self) -> int:
        """Weights in half, each with a Cast that the runtime computes when it loads the model: half the bytes, the arithmetic as it is."""
        edit = Editor(self.model)
        stored = 0
        for tensor in self.model.constants():
            readers = {id(n): n for n in tensor.outputs if n.op not in _CODING}
            if tensor.dtype != FLOAT or tensor.nbytes < _WORTH or not readers or not edit.is_fixed(tensor):
                continue
            if self._extent(tensor).largest > self.largest:
                self.ctx.remark(tensor, f"stays float32: it holds {self._extent(tensor).largest:.3g}")
                continue
            if any(edit.graph_of(n) is not self.model.graph for n in readers.values()) or edit.is_output(tensor):
                continue
            if not self.ctx.admit():
                break
            wide = edit.variable(f"{tensor.name}_float32")
            wide.dtype, wide.shape = FLOAT, tuple(tensor.shape)
            cast = Node("Cast", f"{tensor.name}_to_float32", {"to": onnx_dtype(FLOAT)}, [self._round(tensor)], [wide])
            edit.insert_before(self.model.graph.nodes[0], cast)
            for reader in readers.values():
                for index, operand in enumerate(reader.inputs):
                    if operand is tensor:
                        reader.inputs[index] = wide
            stored += 1
        edit.commit()
        if stored:
            self.ctx.remark(
                None,
                f"ONNX Runtime's CPU has no {self.half} kernels: {stored} weights in {self.half}, arithmetic in float32",
            )
        return stored

    def _raise_opset(self) -> list[str]:
        """To what frees the scales of Q/DQ, or admits bfloat16 to convolutions and pools; returns what to say of it."""
        scaled = any(n.op in _CODING and n.is_onnx for n in self.model.nodes())
        wanted = (
            23 if scaled else 22 if self.options.dtype == "bfloat16" else _OPSET if self.model.opset < self.least else 0
        )
        before = self.model.opset
        if not 0 < before < wanted:
            return []
        reason = convert_opset(self.model, wanted)
        self.ctx.analyses.clear()
        if reason is None:
            return [f"opset raised from {before} to {wanted}, which admits {self.options.dtype} in more operators"]
        return [f"opset {before} admits {self.options.dtype} in few operators, and stays: {reason}"]

    def _converts(self, node: Node) -> bool:
        return _selects(self.options.convert, node) and not _selects(self.options.keep, node)

    def _keeps(self, node: Node) -> str | None:
        """Why `node` stays float32; "" where that needs no saying."""
        if self.cpu:
            return ""  # its kernels know no half
        if _selects(self.options.keep, node):
            return ""
        if node.op in _SENSITIVE and not self._stashes(node):
            return ""
        if node.op == "Attention" and len(node.outputs) > 3 and node.outputs[3].name:
            return ""  # the scores that Attention shows may hold the lowest number of its type
        if node.op in _SCATTERS and node.attrs.get("reduction", "none") != "none":
            return ""  # sums of any length, and ONNX Runtime's CPU has no such kernel
        if node.op in _SUMS and self._summed(node) > _MOST_SUMMED:
            return ""
        if id(node) in self.integers:
            return ""
        if self.ctx.target is None and node.op == "Transpose" and _trips_layouts(node):
            return "ONNX Runtime's CPU crashes on it in half while loading (microsoft/onnxruntime issue 28392)"
        if self.ctx.target is not None and self.ctx.target.runtime == "ort" and self._near_codes(node):
            return "int8 kernels of ONNX Runtime take float32 around them"
        for index, tensor in enumerate([*node.inputs, *node.outputs]):
            if id(tensor) in self.overflowing:
                return f"{tensor.name!r} reaches {self.overflowing[id(tensor)]:.4g} on the data"
            if id(tensor) in self.beyond and (node.op not in _MASKED or index < _MASKED[node.op]):
                return ""
            if isinstance(tensor, gs.Constant) and tensor.dtype == FLOAT and node.op not in _CODING:
                reason = self._misfit(tensor, node)
                if reason is not None:
                    return reason
        return None

    def _stashes(self, node: Node) -> bool:
        """Whether its definition says that it computes in float32 inside, whatever its operands are, so that no Cast has to."""
        since = _STASHED.get(node.op)
        return since is not None and node.is_onnx and self.model.opset >= since and node.attrs.get("stash_type", 1) == 1

    def _summed(self, node: Node) -> float:
        """How many values go into one of the results."""
        if node.op == "Sum":
            return len(node.inputs)
        before, after = self.shapes.shape(node.inputs[0]), self.shapes.shape(node.outputs[0])
        if before is None or after is None or not all(isinstance(d, int) for d in (*before, *after)):
            return math.inf
        return math.prod(map(int, before)) / max(1, math.prod(map(int, after)))  # type: ignore[arg-type]

    def _near_codes(self, node: Node) -> bool:
        around = [*(t.inputs[0] for t in node.inputs if t.inputs), *(n for t in node.outputs for n in t.outputs)]
        return any(n.op in _CODING for n in (node, *around))

    def _misfit(self, tensor: gs.Constant, node: Node) -> str | None:
        """Why a constant cannot be of half type."""
        extent = self._extent(tensor)
        if extent.largest > self.largest and node.op not in _BOUNDED:
            return f"constant {tensor.name!r} holds {extent.largest:.3g}, beyond the {self.largest:.5g} of {self.half}"
        if math.prod(tensor.shape) <= _FEW and extent.flushed + extent.subnormal:
            return f"constant {tensor.name!r} holds {extent.smallest:.3g}, of which {self.half} keeps too few digits"
        return None

    def _extent(self, tensor: gs.Constant) -> _Extent:
        """What one look at all values of a float32 constant tells; each is looked at once."""
        known = self.extents.get(id(tensor))
        if known is None:
            size = np.abs(np.asarray(tensor.values))
            size = size[np.isfinite(size) & (size > 0)]
            small = size[size < self.normal]
            flushed = int(
                np.count_nonzero(small <= float(self.limits.smallest_subnormal) / 2)
            )  # ties go to the even one, 0
            known = _Extent(
                float(size.max(initial=0.0)), float(size.min(initial=math.inf)), flushed, small.size - flushed
            )
            self.extents[id(tensor)] = known
        return known

    def _beyond_range(self) -> set[int]:
        """Values, by id, that constants beyond the range may have driven beyond it."""
        found: set[int] = set()
        for graph in self.model.graphs():
            for node in graph.nodes:
                if node.op not in _CARRIES or not node.is_onnx:
                    continue
                if any(id(t) in found or (isinstance(t, gs.Constant) and self._is_beyond(t)) for t in node.inputs):
                    found.update(id(t) for t in node.outputs)
        return found

    def _is_beyond(self, tensor: gs.Constant) -> bool:
        return tensor.dtype == FLOAT and self._extent(tensor).largest > self.largest

    def _overflowing(self) -> dict[int, float]:
        """Values of the root graph, by id, that calibration data drives too near the end of the range, and how far they go."""
        if self.ctx.data is None or self.largest > 1e38:
            return {}
        tensors = {name: t for name, t in calibration.root_tensors(self.model).items() if self.shapes.dtype(t) == FLOAT}
        seen = calibration.largest(self.model, list(tensors), self.ctx.data, limit=self.options.samples)
        bound = self.largest / self.options.margin
        return {id(tensors[name]): value for name, value in seen.items() if value > bound}

    def _is_wide(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self.overflowing or id(tensor) in self.beyond

    # ------------------------------------------------------------------------------------------------------ changes

    def _write(self) -> None:
        units = self.units
        for unit in units.nodes():
            if unit.choice == HALF and unit.node is not None and unit.makes:
                retype(unit.node, self.half, self._round)
        for graph in self.model.graphs():
            values = [*graph.inputs, *(t for node in graph.nodes for t in node.outputs)]
            for tensor in values:
                self._value(tensor, graph)
        for constant in [units.values[key] for key in units.sites if isinstance(units.values[key], gs.Constant)]:
            self._constant(constant)
        for unit in units.nodes():
            if unit.node is not None and unit.node.op == "Cast" and not self.edit.is_erased(unit.node):
                self._drop_idle(unit.node)
        self.edit.commit()

    def _value(self, tensor: gs.Tensor, graph: Graph) -> None:
        """Give `tensor` its type, and a Cast for the readers that want the other one."""
        if not self.units.is_float(tensor) or isinstance(tensor, gs.Constant):
            return
        home = self.units.home(tensor).choice
        sites = self.units.sites.get(id(tensor), [])
        other = [(unit, site) for unit, site in sites if unit.choice != home]
        if not other:
            tensor.dtype = self.half if home == HALF else tensor.dtype
            return
        types = (self.half, FLOAT) if home == HALF else (FLOAT, self.half)
        returned = any(site.values is self.model.graph.outputs for _, site in other)
        if returned and tensor.inputs:  # the output keeps its name
            same = [(unit, site) for unit, site in sites if unit.choice == home]
            computed = self.edit.variable(f"{tensor.name}_{types[0]}", tensor)
            computed.dtype, tensor.dtype = types
            producer = tensor.inputs[0]
            producer.outputs[[t is tensor for t in producer.outputs].index(True)] = computed
            self._cast(computed, tensor, types[1], graph)
            for _, site in same:
                site.values[site.index] = computed
            return
        tensor.dtype = types[0]
        source = self._same_before(tensor, types[1])
        result = source if source is not None else self.edit.variable(f"{tensor.name}_{types[1]}", tensor)
        if source is None:
            result.dtype = types[1]
            self._cast(tensor, result, types[1], graph)
        for _, site in other:
            site.values[site.index] = result

    def _same_before(self, tensor: gs.Tensor, wanted: np.dtype[Any]) -> gs.Tensor | None:
        """What a Cast of the original widened into `tensor`, where that is of the wanted type."""
        producer = self.edit.producer(tensor)
        if producer is None or producer.op != "Cast" or wanted != self.half:
            return None
        source = producer.inputs[0]
        return source if not self.units.is_float(source) and self.units.dtype(source) == wanted else None

    def _cast(self, tensor: gs.Tensor, result: gs.Tensor, dtype: np.dtype[Any], graph: Graph) -> None:
        if not self.model.opset:
            self.model.set_opset("", _OPSET)
        node = Node("Cast", f"{tensor.name}_to_{dtype}", {"to": onnx_dtype(dtype)}, [tensor], [result])
        self.casts += 1
        if tensor.inputs:
            self.edit.insert_after(tensor.inputs[0], node)
        else:
            self.edit.insert_before(graph.nodes[0], node)
        if dtype == self.half and id(tensor) in self.beyond:
            self._clip(node)

    def _clip(self, cast: Node) -> None:
        """Bound what is cast: a mask must not become infinite."""
        tensor, bound = cast.inputs[0], self.largest / _FAR
        clipped = self.edit.variable(f"{tensor.name}_clipped", tensor)
        clipped.dtype = FLOAT
        cast.inputs[0] = clipped
        clip = Node("Clip", f"{tensor.name}_clip", None, [tensor], [clipped])
        if self.model.opset < 11:
            clip.attrs.update(min=-bound, max=bound)
        else:
            for side in (-bound, bound):
                clip.inputs.append(self.edit.constant(f"{tensor.name}_bound", np.array(side, np.float32)))
        self.edit.insert_before(cast, clip)

    def _constant(self, tensor: gs.Constant) -> None:
        halves = [(unit, site) for unit, site in self.units.sites[id(tensor)] if unit.choice == HALF]
        if not halves:
            return
        if not self.edit.is_fixed(tensor):  # a default that callers may override
            result = self.edit.variable(f"{tensor.name}_{self.half}")
            result.dtype, result.shape = self.half, tuple(tensor.shape)
            self._cast(tensor, result, self.half, self.model.graph)
            for _, site in halves:
                site.values[site.index] = result
            return
        for unit, site in halves:
            bound = None
            if self._is_beyond(tensor):
                bound = self.largest / (1 if unit.node is not None and unit.node.op in _BOUNDED else _FAR)
            site.values[site.index] = self._round(tensor, bound)
            if unit.node is None:
                site.graph.initializers.append(site.values[site.index])

    def _round(self, tensor: gs.Constant, bound: float | None = None) -> Constant:
        """`tensor` in half type, one for all readers."""
        key = id(tensor), bound
        if key not in self.rounded:
            values = CastValues(tensor, self.half, bound)
            self.rounded[key] = Constant(self.edit.fresh_name(f"{tensor.name}_{self.half}"), values)
            extent = self._extent(tensor)
            self.lost += [extent] if extent.flushed or extent.subnormal else []
        return self.rounded[key]

    def _drop_idle(self, node: Node) -> None:
        """Take out a Cast of the original that has become one from half to half."""
        source, result = node.inputs[0], node.outputs[0]
        if source.dtype == result.dtype == self.half and self.edit.can_replace(result, source):
            self.edit.replace_uses(result, source)
            self.edit.erase(node)

    def _tell(self, converted: int, left: int) -> None:
        self.ctx.remark(None, f"{converted} nodes in {self.half}, {left} stay float32, {self.casts} casts between them")

    def _tell_lost(self) -> None:
        if self.lost:
            flushed, poor = sum(e.flushed for e in self.lost), sum(e.subnormal for e in self.lost)
            self.ctx.remark(
                None,
                f"weights too small for {self.half}, in {len(self.lost)} tensors: {flushed} became 0, {poor} keep fewer digits "
                "(subnormal)",
            )
