"""Shapes, dtypes and small integer values of every tensor, with symbolic dimensions.

One pass over the nodes in order. onnx's own inference, asked node by node, knows the dtype and most shapes of every operator; on top
of it stand the rules of shape_rules.py, for what it gives up on: values of shape arithmetic (``Shape``, ``Gather``, ``Concat``, ...), and
shapes that depend on such values or on arithmetic with symbols.

What is promised: a fact holds in every run whose inputs fit the declared graph inputs. Symbols of the graph inputs are trusted (equal names
are equal dimensions); declared shapes of intermediate values are not, since exporters write the traced ones. Whatever cannot be told
is an opaque dimension, equal to itself alone; a contradiction or an unknown operator makes a tensor unknown, never an error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analyses import inference, symbolic
from graphopt.analyses.shape_rules import CONTRIB_RULES, SHAPE_RULES
from graphopt.analyses.symbolic import Dim, Expr
from graphopt.analyses.tensor_facts import MAX_VALUES, UNKNOWN, Call, Info, Shape, Values
from graphopt.analyses.value_rules import VALUE_RULES
from graphopt.ir import Graph, Model, Node, subgraphs
from graphopt.reading import shape_of

_RANK_OF: Final = {
    "Expand": 1,
    "Reshape": 1,
    "Unsqueeze": 1,
    "ConstantOfShape": 0,
}  # operand whose length decides the rank
_MOST_DIMENSIONS: Final = 1024
_LARGEST_FACTOR: Final = 1 << 31  # of a dimension, for which the product is taken to fit


class Shapes:
    """Facts about all tensors of a model, by tensor; computed once, valid until the model changes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.opset = model.opset
        self._infos: dict[int, Info] = {}
        self._alive: list[gs.Tensor] = []
        self._numbers = itertools.count()
        inputs = [t for graph in model.graphs() for t in graph.inputs] if model.ir_version >= 4 else []
        self._defaults = {id(t) for t in inputs if isinstance(t, gs.Constant)}  # callers may give other values
        self._imports = tuple(model.opsets.items())
        self._graph(model.graph, trusted=True)

    def info(self, tensor: gs.Tensor) -> Info:
        """All that is known of `tensor`."""
        found = self._infos.get(id(tensor))
        if found is None:
            found = self._constant(tensor) if isinstance(tensor, gs.Constant) else UNKNOWN
            self._set(tensor, found)
        return found

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """Its dimensions, or None where not even the rank is known."""
        return self.info(tensor).shape

    def gives_absurd_rank(self, node: gs.Node) -> bool:
        """Whether the result has more dimensions than any tensor has; onnx would make a list of them."""
        place = _RANK_OF.get(node.op) if node.domain in (None, "", "ai.onnx") else None
        if place is None or len(node.inputs) <= place or not node.inputs[place].name:
            return False
        length = (self.shape(node.inputs[place]) or (0,))[0]
        return isinstance(length, int) and length > _MOST_DIMENSIONS

    def rank(self, tensor: gs.Tensor) -> int | None:
        """The number of its dimensions."""
        shape = self.info(tensor).shape
        return None if shape is None else len(shape)

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """Its dtype."""
        return self.info(tensor).dtype

    def value(self, tensor: gs.Tensor) -> Values | None:
        """Its elements as int, bool or Expr, where it is small and integer; the array has its shape."""
        return self.info(tensor).value

    def integers(self, tensor: gs.Tensor) -> np.ndarray[Any, Any] | None:
        """Its values as an array of its dtype, where all of them are plain numbers."""
        return _numbers(self.info(tensor))

    # --------------------------------------------------------------------------------------------------- traversal

    def _set(self, tensor: gs.Tensor, info: Info) -> None:
        self._infos[id(tensor)] = info
        self._alive.append(tensor)

    def opaque(self) -> Expr:
        """A dimension of which nothing is known."""
        return symbolic.opaque(next(self._numbers))

    def _constant(self, tensor: gs.Constant) -> Info:
        shape: Shape = tuple(int(d) for d in tensor.shape)
        value = None
        if math.prod(tensor.shape) <= MAX_VALUES and np.dtype(tensor.dtype).kind in "iub":
            value = np.asarray(tensor.values).astype(object)
        return Info(np.dtype(tensor.dtype), shape, value)

    def _declared(self, tensor: gs.Tensor, trusted: bool) -> Info:
        """From the graph's own words; symbols only where `trusted`."""
        if getattr(tensor, "type", None) not in (None, "tensor_type"):
            return UNKNOWN
        shape = tensor.shape
        if id(tensor) in self._defaults:
            declared = tensor.carried.type.tensor_type if getattr(tensor, "carried", None) is not None else None
            shape = shape_of(declared.shape) if declared is not None and declared.HasField("shape") else None
        if shape is None:
            return Info(tensor.dtype)
        dims: list[Dim] = []
        for dim in shape:
            known = (
                int(dim)
                if isinstance(dim, int) and dim >= 0
                else symbolic.symbol(dim)
                if isinstance(dim, str) and trusted
                else None
            )
            dims.append(self.opaque() if known is None else known)
        return Info(tensor.dtype, tuple(dims))

    def _graph(self, graph: Graph, trusted: bool, fed: Sequence[gs.Tensor] = ()) -> None:
        """`fed` are the operands that a Loop or Scan hands to the last inputs of its body, whose types may be left open."""
        for tensor, source in zip(graph.inputs, [None] * (len(graph.inputs) - len(fed)) + [*fed], strict=False):
            info = self._declared(tensor, trusted)
            if info.dtype is None and source is not None and getattr(tensor, "type", None) in (None, "tensor_type"):
                info = Info(self.info(source).dtype, info.shape)
            self._set(tensor, info)
        for node in graph.nodes:
            fed = node.inputs[2:] if node.op == "Loop" else node.inputs if node.op == "Scan" and self.opset >= 9 else ()
            for body in subgraphs(node):
                self._graph(body, trusted=False, fed=fed)
            try:
                infos = self._node(node)
            except (ArithmeticError, ValueError, IndexError, TypeError, KeyError, OverflowError):
                infos = None  # a contradiction in the model: unknown from here on
            for index, tensor in enumerate(node.outputs):
                if not tensor.name:
                    continue
                info = infos[index] if infos is not None and index < len(infos) else UNKNOWN
                self._set(tensor, _checked(info if info is not UNKNOWN else self._last_resort(tensor)))

    def _last_resort(self, tensor: gs.Tensor) -> Info:
        """Dtype and rank as declared, where the operator is unknown."""
        if getattr(tensor, "type", None) not in (None, "tensor_type"):
            return UNKNOWN
        return Info(tensor.dtype, None if tensor.shape is None else tuple(self.opaque() for _ in tensor.shape))

    def _node(self, node: Node) -> list[Info] | None:
        if node.domain == "com.microsoft" and node.op in CONTRIB_RULES:
            return self._contrib(node)
        if not node.is_onnx or any(isinstance(a, onnx.AttributeProto) and a.ref_attr_name for a in node.attrs.values()):
            return None
        if node.op == "If":
            return self._if(node)
        if node.op == "Loop" or (node.op == "Scan" and self.opset >= 9):
            return self._loop(node)
        if subgraphs(node):
            return None
        infos = self._by_onnx(node)
        if node.op == "Squeeze" and self._squeezes_nothing(node):
            return [Info(info.dtype) for info in infos]
        call = Call(self, node, infos)
        shapes = SHAPE_RULES.get(node.op)
        if shapes is not None:
            for index, shape in enumerate(shapes(call)):
                if shape is not None and index < len(infos):
                    infos[index] = Info(infos[index].dtype, tuple(shape))
        values = VALUE_RULES.get(node.op)
        if values is not None and infos and all(i.dtype is None or i.dtype.kind in "iub" for i in infos):
            for index, value in enumerate(values(call) or ()):
                if value is not None and value.size <= MAX_VALUES and _fits(value, infos[index].dtype):
                    infos[index] = Info(infos[index].dtype, tuple(value.shape), value)
        return infos

    def _squeezes_nothing(self, node: Node) -> bool:
        """Whether a Squeeze is given no axes: nothing happens, says the standard, and ONNX Runtime takes all of size 1."""
        if len(node.inputs) > 1 and node.inputs[1].name:
            return self.shape(node.inputs[1]) == (0,)
        return bool(node.attrs.get("axes") == [])

    def _contrib(self, node: Node) -> list[Info]:
        call = Call(self, node, [])
        infos = [UNKNOWN for _ in node.outputs]
        infos[0] = Info(call.info(0).dtype, next(iter(CONTRIB_RULES[node.op](call))))
        return infos

    def _if(self, node: Node) -> list[Info]:
        branches = [[self.info(t) for t in body.outputs] for body in subgraphs(node)]
        return [self._join(options) for options in zip(*branches, strict=True)]

    def _loop(self, node: Node) -> list[Info]:
        """Dtypes of what the body returns (a Loop's first output is its condition); shapes as far as they are declared."""
        (body,) = subgraphs(node)
        returned = body.outputs[1:] if node.op == "Loop" else body.outputs
        known = [self._last_resort(t) for t in node.outputs]
        dtypes = (i.dtype if i.dtype is not None else self.info(t).dtype for i, t in zip(known, returned, strict=False))
        return [Info(dtype, info.shape) for info, dtype in zip(known, dtypes, strict=False)]

    def _join(self, options: Sequence[Info]) -> Info:
        first = options[0]
        if any(o.dtype != first.dtype for o in options):
            return UNKNOWN
        if any(o.shape is None or first.shape is None or len(o.shape) != len(first.shape) for o in options):
            return Info(first.dtype)
        assert first.shape is not None
        dims = zip(*(o.shape or () for o in options), strict=True)
        return Info(first.dtype, tuple(d[0] if all(x == d[0] for x in d) else self.opaque() for d in dims))

    # ------------------------------------------------------------------------------------------- onnx's own inference

    def refuses(self, node: Node, instead: Mapping[int, Info]) -> bool:
        """Whether onnx's shape inference finds fault with `node` when operands, by id, are as `instead` says, and not as it is.

        Some models feed an operator what it must not take, hidden behind an If; runtimes accept that until they can see it.
        """
        return self._infer(node, {}) is not None and self._infer(node, instead) is None

    def dtypes_if(self, node: Node, instead: Mapping[int, np.dtype[Any]]) -> list[np.dtype[Any] | None] | None:
        """The dtypes of its outputs when operands, by id, have the dtypes `instead`, as onnx infers them (None: does not say).

        None altogether where onnx finds fault: with a dtype that the operator does not admit, above all.
        """
        given = {
            key: Info(dtype, self.info(t).shape)
            for t in node.inputs
            if (dtype := instead.get(key := id(t))) is not None
        }
        found = self._infer(node, given)
        return None if found is None else [info.dtype for info in found]

    def _by_onnx(self, node: Node) -> list[Info]:
        """What onnx infers for this node alone."""
        found = self._infer(node, {})
        return [UNKNOWN for _ in node.outputs] if found is None else found

    def _infer(self, node: Node, instead: Mapping[int, Info]) -> list[Info] | None:
        """What onnx infers for this node alone; None where it finds fault."""
        nothing = [UNKNOWN for _ in node.outputs]
        if not any(t.name for t in node.outputs) or self.gives_absurd_rank(node):
            return nothing
        names: dict[Dim, str] = {}
        operands: list[inference.Operand | None] = []
        for tensor in node.inputs:
            info = (instead.get(id(tensor)) or self.info(tensor)) if tensor.name else None
            if info is not None and info.dtype is None:
                return nothing
            operands.append(None if info is None else self._operand(node.op, tensor, info, names))
        try:
            attributes = inference.attributes_of(node)
        except (TypeError, ValueError):  # of a kind that ONNX does not have
            return None
        question = inference.Question(
            node.op,
            self.opset,
            self._imports,
            max(self.model.ir_version, 4),
            attributes,
            tuple(operands),
            tuple(bool(t.name) for t in node.outputs),
        )
        found = inference.infer(question)
        if found is None:
            return None
        dims: dict[int | str | None, Dim] = {name: dim for dim, name in names.items()}
        return [UNKNOWN if result is None else self._answered(result, dims) for result in found]

    def _operand(self, op: str, tensor: gs.Tensor, info: Info, names: dict[Dim, str]) -> inference.Operand:
        """`names` numbers the symbols of one node."""
        assert info.dtype is not None
        dims: tuple[int | str, ...] | None = None
        if info.shape is not None:
            dims = tuple(d if isinstance(d, int) else names.setdefault(d, f"d{len(names)}") for d in info.shape)
        values = None
        if not isinstance(tensor, gs.Constant):
            values = _numbers(info)
        elif (
            id(tensor) not in self._defaults
            and inference.looks_at(op, info.dtype, tensor.nbytes)
            and info is self.info(tensor)
        ):
            values = tensor.values
        return inference.Operand(info.dtype, dims, None if values is None else values.tobytes())

    def _answered(self, result: inference.Result, dims: Mapping[int | str | None, Dim]) -> Info:
        if result.dims is None:
            return Info(result.dtype)
        return Info(
            result.dtype,
            tuple(d if isinstance(d, int) else dims[d] if d in dims else self.opaque() for d in result.dims),
        )


def _numbers(info: Info) -> np.ndarray[Any, Any] | None:
    """The values of `info` where all of them are plain numbers."""
    if info.value is None or info.dtype is None or any(isinstance(v, Expr) for v in info.value.flat):
        return None
    return info.value.astype(info.dtype)


def _fits(value: Values, dtype: np.dtype[Any] | None) -> bool:
    """Whether the type surely holds the values, which wrap around otherwise; a product of dimensions fits 32 bits, but no multiple at will."""
    if dtype is None or dtype.kind not in "iu":
        return True
    limits = np.iinfo(dtype)
    for item in value.flat:
        if not isinstance(item, Expr):
            if not limits.min <= item <= limits.max:
                return False
            continue
        if any(abs(coefficient) > _LARGEST_FACTOR for _, coefficient in item.terms):
            return False
        if dtype.kind == "u" and not symbolic.is_nonnegative(item):
            return False
    return True


def _checked(info: Info) -> Info:
    """Drop a shape with a negative dimension: the model contradicts itself."""
    if info.shape is not None and any(isinstance(d, int) and d < 0 for d in info.shape):
        return Info(info.dtype)
    return info
