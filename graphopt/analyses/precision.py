"""Which nodes of a float32 model may compute in a half type, and which of them should, so that casts between the two types are few.

A *unit* is what has one type: an operator with those of its operands and results that follow it, or a value that crosses the border of a
body or of the model. Which operands follow is read off the operator's schema, and onnx's own type inference is asked what comes out. A unit
is bound to float32 or to half, or free: free ones get the cheapest answers of a minimum cut, in which each cast of a value costs
`_CAST`, however many read it, and each free unit in float32 costs 1. Whatever the answers, the model is valid with a Cast where they differ,
so a wish to keep one node can never break another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analyses.min_cut import FORBIDDEN, MinCut
from graphopt.analyses.shapes import Shapes
from graphopt.ir import Constant, Graph, Model, Node, onnx_dtype, subgraphs

FLOAT: Final = np.dtype(np.float32)
HALF: Final = 0  # MinCut's terminal "no": not in float32
FULL: Final = 1  # its terminal "yes"
_CAST: Final = 4  # of one value, in units of a free operator computed in float32

CONTRACTIONS: Final = frozenset((
    "Conv", "ConvTranspose", "DeformConv", "MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN", "Attention", "LinearAttention",
    "FusedConv", "FusedMatMul", "FusedGemm", "MultiHeadAttention", "GroupQueryAttention",
))  # fmt: skip
# Operands that hold no numbers of the computation, and need more digits than half has: rounded sizes, places and class numbers.
_PINNED: Final = {("GridSample", 1), ("OneHot", 1), ("Resize", 1), ("Resize", 2), ("Upsample", 1), ("RoiAlign", 1)}
# com.microsoft operators all of whose float operands and results have one type (onnx has no schema of them).
_CONTRIB: Final = frozenset((
    "FusedConv", "FusedMatMul", "FusedGemm", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding",
    "BiasSplitGelu", "BiasAdd",
))  # fmt: skip
# Operators without float operands to follow: their results may have either type, see `retype`.
_SOURCES: Final = frozenset({"Cast", "Constant", "ConstantOfShape", "DequantizeLinear"})
_LARGE: Final = 1 << 16  # bytes of a constant that is better stored in half than an operator beside it left in float32
_SCALES_APART: Final = 23  # opset from which a Q/DQ scale may have another type than what is quantized


@dataclass(eq=False)
class Site:
    """A place that reads a value: `values[index]`, the operands of a node or the outputs of `graph`."""

    values: Any
    index: int
    graph: Graph


@dataclass(eq=False)
class Unit:
    """What has one type."""

    node: Node | None = None  # the operator, or None for a border
    choice: int = HALF  # in the cut: HALF, FULL, or the number of a free choice
    reads: list[Site] = field(default_factory=list)
    makes: list[gs.Tensor] = field(default_factory=list)
    reason: str = ""  # why it is bound to float32


@dataclass
class Demands:
    """What else decides: why a node is to be kept in float32 ("" where that needs no saying), or None."""

    keep: Callable[[Node], str | None]
    wide: Callable[[gs.Tensor], bool]  # values that half has no range for
    convert: Callable[[Node], bool]  # asked for by the user, against all but the operator's schema
    convert_borders: bool  # inputs and outputs of the model, too


class Units:
    """The units of a model, and the type of each after `solve`."""

    def __init__(self, model: Model, shapes: Shapes, half: np.dtype[Any], demands: Demands) -> None:
        self.model, self.shapes, self.half, self.demands = model, shapes, half, demands
        self.all: list[Unit] = []
        self.made_by: dict[int, Unit] = {}  # by id of the value
        self.sites: dict[int, list[tuple[Unit, Site]]] = {}  # by id of the value
        self.values: dict[int, gs.Tensor] = {}
        self._full = Unit(choice=FULL)
        self._cut = MinCut()
        self._graph(model.graph, opaque=False)
        border = Unit(choice=HALF if demands.convert_borders else FULL)
        self._add(border, [], model.graph.inputs)
        for index, tensor in enumerate(model.graph.outputs):
            known = not isinstance(tensor, gs.Constant)
            self._read(border if known else self._full, Site(model.graph.outputs, index, model.graph))

    # ----------------------------------------------------------------------------------------------------- questions

    def is_float(self, tensor: gs.Tensor) -> bool:
        """Whether it is a float32 tensor."""
        return bool(tensor.name) and self.dtype(tensor) == FLOAT

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """As inferred; where that fails, as declared."""
        found = self.shapes.dtype(tensor)
        return found if found is not None else tensor.dtype

    def home(self, tensor: gs.Tensor) -> Unit:
        """The unit that says which type `tensor` is computed in."""
        return self.made_by.get(id(tensor), self._full)

    # ------------------------------------------------------------------------------------------------------ building

    def _add(self, unit: Unit, reads: Sequence[Site], makes: Sequence[gs.Tensor]) -> None:
        self.all.append(unit)
        for tensor in makes:
            if self.is_float(tensor) and not isinstance(tensor, gs.Constant):
                unit.makes.append(tensor)
                self.made_by[id(tensor)] = unit
        for site in reads:
            self._read(unit, site)

    def _read(self, unit: Unit, site: Site) -> None:
        tensor = site.values[site.index]
        if self.is_float(tensor):
            unit.reads.append(site)
            self.values[id(tensor)] = tensor
            self.sites.setdefault(id(tensor), []).append((unit, site))

    def _graph(self, graph: Graph, opaque: bool) -> None:
        for node in graph.nodes:
            bodies = subgraphs(node)
            plain = node.is_onnx and not opaque and all(body.nodes for body in bodies)
            known = plain and (node.op in ("If", "Loop") or (node.op == "Scan" and self.model.opset >= 9))
            for body in bodies:
                self._graph(body, opaque or not known)
            if not bodies:
                self._node(node, graph, opaque)
            elif not known:
                operands = [Site(node.inputs, i, graph) for i in range(len(node.inputs))]
                returned = [Site(body.outputs, i, body) for body in bodies for i in range(len(body.outputs))]
                self._add(Unit(node, FULL), [*operands, *returned], [])
            elif node.op == "If":
                for index, result in enumerate(node.outputs):
                    self._border([Site(body.outputs, index, body) for body in bodies], result)
            else:
                self._loop(node, bodies[0], graph)

    def _loop(self, node: Node, body: Graph, graph: Graph) -> None:
        """What is carried around stays float32, lest each turn rounds it again; what goes in or comes out each turn is free."""
        loop = node.op == "Loop"
        scanned = 0 if loop else int(node.attrs["num_scan_inputs"])
        carried = len(body.inputs) - 2 if loop else len(body.inputs) - scanned
        first_in, first_inner, first_out = (2, 2, 1) if loop else (0, 0, 0)
        for index in range(carried):
            reads = [Site(node.inputs, first_in + index, graph), Site(body.outputs, first_out + index, body)]
            self._add(Unit(choice=FULL), reads, [body.inputs[first_inner + index], node.outputs[index]])
        for index in range(carried, carried + scanned):
            self._border([Site(node.inputs, index, graph)], body.inputs[index])
        for index in range(carried, len(node.outputs)):
            self._border([Site(body.outputs, first_out + index, body)], node.outputs[index])

    def _border(self, reads: Sequence[Site], result: gs.Tensor) -> None:
        """One value that goes into a body or out of it."""
        members = [result, *(site.values[site.index] for site in reads)]
        bound = any(self.demands.wide(t) or (t.name and not self.is_float(t)) for t in members)
        self._add(Unit(choice=FULL if bound else self._cut.choice()), reads, [result])

    def _node(self, node: Node, graph: Graph, opaque: bool) -> None:
        sites = [Site(node.inputs, i, graph) for i, t in enumerate(node.inputs) if self.is_float(t)]
        results = [t for t in node.outputs if self.is_float(t)]
        if not sites and not results:
            return
        following, made, reason = (set[int](), [], "in a body that is left alone") if opaque else self.follows(node)
        unit = Unit(node, FULL, reason=reason or "")
        if reason is None:
            unit.choice, unit.reason = self._choice(node)
        self._add(unit, [s for s in sites if s.index in following or unit.choice == FULL], made or [])
        for site in sites:
            if site.index not in following and unit.choice != FULL:
                self._read(self._full, site)

    def _choice(self, node: Node) -> tuple[int, str]:
        if self.demands.convert(node):
            return HALF, ""
        reason = self.demands.keep(node)
        if reason is not None:
            return FULL, reason
        stored = any(isinstance(t, gs.Constant) and t.nbytes >= _LARGE for t in node.inputs if self.is_float(t))
        return HALF if stored or node.op in CONTRACTIONS else self._cut.choice(), ""

    def follows(self, node: Node) -> tuple[set[int], list[gs.Tensor], str | None]:
        """Operands, by place, and results that become half when `node` does; or why it cannot."""
        nothing: tuple[set[int], list[gs.Tensor]] = (set(), [])
        places = {i for i, t in enumerate(node.inputs) if self.is_float(t)}
        results = [t for t in node.outputs if self.is_float(t)]
        contrib = node.domain == "com.microsoft" and node.op in _CONTRIB
        if any(
            f.carried.name == node.op and (f.carried.domain or "") == (node.domain or "") for f in self.model.functions
        ):
            return *nothing, "calls a function of the model: run inline-functions first"
        if not node.is_onnx and not contrib:
            return *nothing, f"the types that {node.domain}.{node.op} admits are not known"
        if any(t.name and self.dtype(t) is None for t in (*node.inputs, *node.outputs)):
            return *nothing, "an operand or a result is no tensor, or of unknown type"
        if contrib:
            return places, results, None
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            if self.model.opset < _SCALES_APART:
                return *nothing, f"its scale would have to be {self.half} too (opset {_SCALES_APART} sets it free)"
            codes = self.dtype(node.inputs[0] if node.op == "DequantizeLinear" else node.outputs[0])
            if codes is not None and codes.itemsize > 1:
                return *nothing, f"{codes} codes hold more digits than {self.half}"
            return ({0} & places if node.op == "QuantizeLinear" else set()), results, None
        if node.op in _SOURCES:
            return self._source(node, places, results)
        return self._by_schema(node, places, results)

    def _source(
        self, node: Node, places: set[int], results: list[gs.Tensor]
    ) -> tuple[set[int], list[gs.Tensor], str | None]:
        """Operators whose attributes say what they give."""
        target = self.dtype(node.outputs[0])
        if node.op == "Cast" and target not in (FLOAT, self.half):
            return set(), [], f"what becomes {target} is not rounded before"
        if node.op == "Constant" and not {"value", "value_float", "value_floats"} & set(node.attrs):
            return set(), [], "a constant in sparse form"
        return places, results, None

    def _by_schema(
        self, node: Node, places: set[int], results: list[gs.Tensor]
    ) -> tuple[set[int], list[gs.Tensor], str | None]:
        version = self.model.opset
        refusal = f"{node.op} of opset {version} does not admit {self.half}"
        if not onnx.defs.has(node.op, version, "") or not places:
            return set(), [], refusal
        schema = onnx.defs.get_schema(node.op, version, "")
        admitted = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}

        def variable(index: int) -> str:
            return str(schema.inputs[min(index, len(schema.inputs) - 1)].type_str)

        wanted = f"tensor({self.half})"
        free = {i for i in places if wanted in admitted.get(variable(i), ()) and (node.op, i) not in _PINNED}
        bound = {variable(i) for i in places - free}
        if not free or any(variable(i) in bound for i in free):
            return set(), [], refusal
        dtypes = self.shapes.dtypes_if(node, {id(node.inputs[i]): self.half for i in free})
        if dtypes is None:
            return set(), [], refusal
        following = {variable(i) for i in free}
        made = []
        for index, (tensor, dtype) in enumerate(zip(node.outputs, dtypes, strict=True)):
            if dtype is None:
                formal = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
                dtype = self.half if formal in following else None
            if dtype == self.half and any(tensor is t for t in results):
                made.append(tensor)
        return free, made, None

    # ------------------------------------------------------------------------------------------------------- solving

    def solve(self) -> None:
        """Give every free unit the answer of the minimum cut: `choice` is HALF or FULL afterwards."""
        cut = self._cut
        for unit in self.all:
            if unit.choice not in (HALF, FULL):
                cut.cost_if_yes(unit.choice)
        for key, readers in self.sites.items():
            if isinstance(self.values[key], gs.Constant):
                continue  # is stored in each type that is asked for
            home = self.home(self.values[key]).choice
            asking = sorted({unit.choice for unit, _ in readers} - {home})
            if len(asking) == 1:
                cut.cost_if_differ(home, asking[0], _CAST)
                cut.cost_if_differ(asking[0], home, _CAST)
            elif asking:
                up, down = cut.choice(), cut.choice()
                cut.cost_if_differ(home, up, _CAST)
                cut.cost_if_differ(down, home, _CAST)
                for choice in asking:
                    cut.cost_if_differ(up, choice, FORBIDDEN)
                    cut.cost_if_differ(choice, down, FORBIDDEN)
        answers = cut.solve()
        for unit in self.all:
            unit.choice = FULL if answers[unit.choice] else HALF

    def nodes(self) -> Iterator[Unit]:
        """Those of operators, in order."""
        return (unit for unit in self.all if unit.node is not None)


def index_arithmetic(model: Model, dtype: Callable[[gs.Tensor], np.dtype[Any] | None]) -> set[int]:
    """Nodes, by id, that compute with floats made from integers alone: positions and counts, of which half holds few exactly."""
    derived: set[int] = set()
    found: set[int] = set()
    for graph in model.graphs():
        for node in graph.nodes:
            operands = [t for t in node.inputs if t.name and dtype(t) == FLOAT]
            source = dtype(node.inputs[0]) if node.inputs and node.inputs[0].name else None
            if node.op == "Cast" and source is not None and source.kind in "iub":
                derived.update(id(t) for t in node.outputs)
            elif node.op in CONTRACTIONS or subgraphs(node):
                continue
            elif any(id(t) in derived for t in operands) and all(
                id(t) in derived or isinstance(t, gs.Constant) for t in operands
            ):
                found.add(id(node))
                derived.update(id(t) for t in node.outputs)
    return found


def retype(node: Node, half: np.dtype[Any], rounded: Callable[[gs.Constant], gs.Constant]) -> None:
    """Let an operator whose attributes say what it gives (`Cast`, `Constant`, ...) give `half`."""
    code = onnx_dtype(half)
    if node.op == "Cast":
        node.attrs["to"] = code
    elif node.op == "DequantizeLinear":
        node.attrs["output_dtype"] = code
    elif node.op in ("Constant", "ConstantOfShape"):
        node.attrs["value"] = rounded(_stated(node.attrs))
        for name in ("value_float", "value_floats"):
            node.attrs.pop(name, None)
            node.attr_types.pop(name, None)


def _stated(attrs: Mapping[str, Any]) -> gs.Constant:
    """The tensor that the attributes of a Constant or ConstantOfShape state."""
    if "value" in attrs:
        return attrs["value"]
    if "value_float" in attrs or "value_floats" in attrs:
        return Constant("", np.asarray(attrs.get("value_float", attrs.get("value_floats")), np.float32))
    return Constant("", np.zeros(1, np.float32))
