"""What a user may change about a model's inputs and outputs, before passes run: keep, extract, set shapes, rename dimensions.

Each function changes the model in place and leaves it valid.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.discovery import nearest
from graphopt.edit import cleanup
from graphopt.errors import ShapeError, UsageError
from graphopt.ir import Dim, Model, Variable


def _tensors(model: Model) -> dict[str, gs.Tensor]:
    """Every tensor of the root graph, by name."""
    found = {t.name: t for t in [*model.graph.inputs, *model.graph.initializers]}
    for node in model.graph.nodes:
        found.update({t.name: t for t in [*node.inputs, *node.outputs] if t.name})
    return found


def _find(model: Model, name: str) -> gs.Tensor:
    tensors = _tensors(model)
    if name not in tensors:
        raise UsageError(f"the model has no tensor {name!r}{nearest(name, tensors)}")
    return tensors[name]


def keep(model: Model, names: Sequence[str]) -> None:
    """Make intermediate tensors graph outputs, so that no pass removes or renames them.

    Raises:
        UsageError: no such tensor, or one whose dtype nobody knows (infer-shapes tells it).
    """
    shapes = Shapes(model)
    present = {t.name for t in model.graph.outputs}
    for name in names:
        tensor = _find(model, name)
        if name in present:
            continue
        if not isinstance(tensor, Variable) or not tensor.inputs:
            raise UsageError(f"{name!r} is an input or initializer; only computed tensors can be kept as outputs")
        _describe(tensor, shapes)
        model.graph.outputs.append(tensor)
        present.add(name)


def extract(model: Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Reduce the model to what computes `outputs` from `inputs`; where `inputs` is empty the model's own inputs stay.

    Raises:
        UsageError: no such tensor, an unknown dtype, or `outputs` need inputs that are not among `inputs`.
    """
    shapes = Shapes(model)
    fresh = {}
    for name in inputs:
        tensor = _find(model, name)
        dtype = shapes.dtype(tensor)
        if dtype is None:
            raise UsageError(f"the dtype of {name!r} is not known, so it cannot become an input")
        known = shapes.shape(tensor)
        dims: tuple[Dim, ...] | None = (
            None if known is None else tuple(d if isinstance(d, int) else _symbol(d) for d in known)
        )
        fresh[name] = (tensor, Variable(name, dtype, dims))
    wanted = [_find(model, name) for name in outputs] or list(model.graph.outputs)
    for name, (tensor, replacement) in fresh.items():
        for reader in list(tensor.outputs):
            for index, operand in enumerate(reader.inputs):
                if operand is tensor:
                    reader.inputs[index] = replacement
        if any(tensor is t for t in wanted):
            raise UsageError(f"{name!r} is both an input and an output of the part to extract")
        tensor.name = f"{name}_before_extract"
    for tensor in wanted:
        if isinstance(tensor, Variable):
            _describe(tensor, shapes)
    model.graph.outputs = wanted
    given = [replacement for _, replacement in fresh.values()]
    old = list(model.graph.inputs)
    cleanup(model)
    if given:
        read = {id(t) for node in model.nodes() for t in node.inputs}
        missing = [t.name for t in old if id(t) in read and not isinstance(t, gs.Constant)]
        if missing:
            raise UsageError(f"the outputs also need {', '.join(map(repr, missing))}; name them as inputs too")
        model.graph.inputs = [*given, *(t for t in old if isinstance(t, gs.Constant) and id(t) in read)]


def _describe(tensor: Variable, shapes: Shapes) -> None:
    """Write down the dtype and shape that an output needs."""
    tensor.dtype = tensor.dtype if tensor.dtype is not None else shapes.dtype(tensor)
    known = shapes.shape(tensor)
    if tensor.shape is None and known is not None:
        tensor.shape = tuple(d if isinstance(d, int) else _symbol(d) for d in known)
    if tensor.dtype is None or tensor.shape is None:
        raise UsageError(f"dtype and rank of {tensor.name!r} are not known, so it cannot become an output")


def _symbol(dim: object) -> Dim:
    text = str(dim)
    return text if text.isidentifier() else None


def set_shape(model: Model, name: str, shape: Sequence[Dim]) -> None:
    """Declare the shape of an input anew: numbers where it was dynamic, or names where it was fixed.

    What was declared of intermediate values is dropped, since it followed from the old shape.

    Raises:
        UsageError: no such input.
        ShapeError: another rank.
    """
    inputs = {t.name: t for t in model.graph.inputs if not isinstance(t, gs.Constant)}
    if name not in inputs:
        raise UsageError(f"the model has no input {name!r}{nearest(name, inputs)}")
    tensor = inputs[name]
    if tensor.shape is not None and len(tensor.shape) != len(shape):
        raise ShapeError(f"input {name!r} has {len(tensor.shape)} dimensions, not {len(shape)}")
    tensor.shape = tuple(shape)
    _forget(model)


def rename_dim(model: Model, old: str, new: Dim) -> None:
    """Give a symbolic dimension another name, or a number, wherever inputs and outputs use it.

    Raises:
        UsageError: no input or output has such a dimension.
    """
    border = [t for t in [*model.graph.inputs, *model.graph.outputs] if isinstance(t, Variable) and t.shape is not None]
    known = {d for t in border for d in t.shape or () if isinstance(d, str)}
    if old not in known:
        raise UsageError(
            f"no input or output has a dimension {old!r}{nearest(old, known)}; there are {', '.join(sorted(known)) or 'none'}"
        )
    for tensor in {id(t): t for t in border}.values():
        tensor.shape = tuple(new if d == old else d for d in tensor.shape or ())
    _forget(model)


def _forget(model: Model) -> None:
    """Drop shapes of intermediate values; the dimensions of outputs become unknown where they were numbers that may no longer hold."""
    outputs = {id(t) for t in model.graph.outputs}
    for node in model.nodes():
        for tensor in node.outputs:
            if isinstance(tensor, Variable) and id(tensor) not in outputs:
                tensor.shape = None
    shapes = Shapes(model)
    for tensor in model.graph.outputs:
        known = shapes.shape(tensor)
        if isinstance(tensor, Variable) and known is not None:
            declared = tensor.shape or (None,) * len(known)
            tensor.shape = tuple(_redeclared(d, k) for d, k in zip(declared, known, strict=True))


def _redeclared(declared: Dim, known: object) -> Dim:
    """The new dimension of an output: what follows from the inputs now, else the old name, but no old number."""
    follows = known if isinstance(known, int) else _symbol(known)
    return follows if follows is not None else declared if isinstance(declared, str) else None
