"""Does a fusion pay on this machine? What it replaces and what it writes, cut out as small models and timed once for each pattern and shape.

Off unless a pass is asked (``fuse-attention{measure=true}``, or the preset ``measured``): a decision that a clock made is no function of the
model, and builds are. Decisions are printed, kept in the user's cache by pattern, shapes, versions and CPU, and found there by the next
build; ``skip=[...]``, which is printed with them, says the same without a clock or a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt import provenance
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.symbolic import Expr, Function
from graphopt.cache import Cache
from graphopt.edit import Editor
from graphopt.errors import UnsupportedModel
from graphopt.ir import Constant, Graph, Model, Node, Variable
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline, step_text
from graphopt.target import cpu_name

_LENGTH: Final = 32  # of a dimension that is not fixed; 1 on the first axis of the model's inputs


def pays(
    step: Pass,
    model: Model,
    shapes: Shapes,
    edit: Editor,
    sources: Sequence[gs.Tensor],
    result: gs.Tensor,
    ctx: Context,
) -> bool:
    """Whether `step` makes what computes `result` from `sources` faster; True where that cannot be told, with a remark.

    Args:
        step: a pass with the options `measure` and `skip`; run on the cut-out part without them.
        model: what it is about to rewrite.
        shapes: of the model.
        edit: of the model.
        sources: values that stand at the beginning of the part.
        result: the value at its end.
        ctx: its clock times both forms.
    """
    plain = dataclasses.replace(step, measure=False, skip=())  # type: ignore[call-arg]
    if ctx.clock is None:
        ctx.remark(None, f"{result.name!r}: fused unmeasured, nothing can be timed for {ctx.target}")
        return True
    part = _Part(model, shapes, edit, sources, result)
    key = {
        "pass": step_text(plain),
        "pattern": part.signature(),
        "cpu": cpu_name(),
        "versions": provenance.core_versions(),
    }
    cache = Cache.of_user()
    entry = None if cache is None else cache.find("fusion", key)
    if entry is not None:
        before, after = entry.meta
    else:
        try:
            fused = Pipeline((plain,)).run(part.model, Context(target=ctx.target, evaluate=ctx.evaluate)).model
            before, after = ctx.clock([part.model, fused], part.feeds(ctx.seed))
        except UnsupportedModel as error:
            ctx.remark(None, f"{result.name!r}: fused unmeasured: {error}")
            return True
        if cache is not None:
            cache.add("fusion", key, lambda folder: [before, after])
    keep = bool(after < before)
    verdict = "fused" if keep else f"left alone, as skip=['{result.name}'] says without a clock"
    ctx.remark(None, f"{result.name!r} takes {after / before:.2f} of the time: {verdict}")
    return keep


class _Part:
    """What computes one value from others, as a model of its own with fixed dimensions."""

    def __init__(
        self, model: Model, shapes: Shapes, edit: Editor, sources: Sequence[gs.Tensor], result: gs.Tensor
    ) -> None:
        self.shapes, self.edit = shapes, edit
        self.batch = {s for spec in model.inputs for s in (spec.shape or ())[:1]}
        self.sources = {id(t) for t in sources}
        self.copies: dict[int, Any] = {}
        self.nodes: list[Node] = []
        graph = Graph(name="part")
        self.inputs: list[Variable] = []
        last = self.copy(result)
        graph.nodes.extend(self.nodes)
        graph.inputs = list(self.inputs)
        graph.outputs = [last]
        carried = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.carried.opset_import)
        self.model = Model(graph, carried)

    def copy(self, tensor: gs.Tensor) -> Any:
        """The tensor in the part, with all that it is computed from."""
        if not tensor.name:
            return Variable("")
        if id(tensor) in self.copies:
            return self.copies[id(tensor)]
        made: Any
        node = self.edit.producer(tensor)
        value = self.shapes.value(tensor)
        if isinstance(tensor, gs.Constant):
            made = Constant(tensor.name, tensor.values)
        elif value is not None and id(tensor) not in self.sources:
            numbers = [self.number(v) for v in value.reshape(-1)]
            made = Constant(tensor.name, np.array(numbers, self.shapes.dtype(tensor)).reshape(value.shape))
        elif node is None or id(tensor) in self.sources or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
            made = self.variable(tensor)
            self.inputs.append(made)
        else:
            operands = [self.copy(t) for t in node.inputs]
            outputs = [self.variable(t) if t.name else Variable("") for t in node.outputs]
            self.copies.update((id(t), new) for t, new in zip(node.outputs, outputs, strict=True))
            twin = Node(node.op, node.name, dict(node.attrs), operands, outputs, node.domain or "")
            twin.attr_types = dict(node.attr_types)
            self.nodes.append(twin)
            return self.copies[id(tensor)]
        self.copies[id(tensor)] = made
        return made

    def variable(self, tensor: gs.Tensor) -> Variable:
        shape = self.shapes.shape(tensor)
        dims = None if shape is None else tuple(self.number(d) for d in shape)
        return Variable(tensor.name, self.shapes.dtype(tensor), dims)

    def number(self, dim: Any) -> int:
        """A dimension with every symbol in it replaced."""
        if not isinstance(dim, Expr):
            return int(dim)
        total = 0
        for monomial, coefficient in dim.terms:
            product = coefficient
            for atom in monomial:
                product *= self.atom(atom)
            total += product
        return total

    def atom(self, atom: str | Function) -> int:
        if isinstance(atom, str):
            return 1 if atom in self.batch else _LENGTH
        arguments = [self.number(a) for a in atom.arguments]
        match atom.name:
            case "//":
                return arguments[0] // arguments[1]
            case "%":
                return arguments[0] % arguments[1]
            case "min":
                return min(arguments)
            case "max":
                return max(arguments)
        return _LENGTH

    def feeds(self, seed: int) -> dict[str, Any]:
        """Random values of the inputs.

        Raises:
            UnsupportedModel: an input whose type or shape is not known.
        """
        rng = np.random.default_rng(seed)
        found = {}
        for tensor in self.inputs:
            if tensor.dtype is None or tensor.shape is None:
                raise UnsupportedModel(f"type or shape of {tensor.name!r} is not known")
            drawn = rng.standard_normal([self.number(d) for d in tensor.shape])
            found[tensor.name] = (
                drawn.astype(tensor.dtype) if tensor.dtype.kind == "f" else (drawn > 0).astype(tensor.dtype)
            )
        return found

    def signature(self) -> list[Any]:
        """The part without names and weights: operators, attributes, shapes and small constants."""
        numbers: dict[int, int] = {}

        def told(tensor: Any) -> Any:
            if not tensor.name:
                return None
            number = numbers.setdefault(id(tensor), len(numbers))
            shape = None if tensor.shape is None else [int(d) for d in tensor.shape]
            small = isinstance(tensor, gs.Constant) and tensor.values.size <= 8
            return [number, str(tensor.dtype), shape, np.asarray(tensor.values).tolist() if small else None]

        return [
            [n.op, n.domain or "", sorted((k, str(v)) for k, v in n.attrs.items()), [told(t) for t in n.inputs], [told(t) for t in n.outputs]]
            for n in self.nodes
        ]  # fmt: skip
