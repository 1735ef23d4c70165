"""The optimization profile of an engine: which ranges its dynamic inputs get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.backend import ShapeRange, check_shapes, usual_bounds
from graphopt.backends._tensorrt_log import Log
from graphopt.errors import ShapeError
from graphopt.ir import Model, TensorSpec


@dataclass
class Ranges:
    shapes: dict[str, ShapeRange] = field(default_factory=dict)  # by input: dynamic ones, and those that hold shapes
    values: set[str] = field(default_factory=set)  # inputs whose range is one of values
    assumed: list[str] = field(default_factory=list)  # inputs with a default in their range
    remarks: list[str] = field(default_factory=list)


def shape_ranges(network: Any, model: Model, given: Mapping[str, ShapeRange]) -> Ranges:
    """The range of every input that needs one: as given, as another input's with the same symbol, or by default.

    Raises:
        ShapeError: a range contradicts the model or another range, or one is missing that has no default.
    """
    specs = {spec.name: spec for spec in model.inputs}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    result = Ranges(values={tensor.name for tensor in tensors if tensor.is_shape_tensor})
    check_shapes(model, {name: wanted for name, wanted in given.items() if name not in result.values})
    symbols = _symbols(specs, {name: wanted for name, wanted in given.items() if name not in result.values})
    for tensor in tensors:
        name, dims = tensor.name, tuple(tensor.shape)
        wanted = given.get(name)
        if name in result.values:
            result.shapes[name] = _value_range(name, dims, wanted)
        elif wanted is not None:
            result.shapes[name] = wanted
        elif -1 in dims:
            declared = specs[name].shape or (None,) * len(dims)
            bounds, assumed = [], []
            for axis, dim in enumerate(dims):
                symbol = declared[axis]
                if dim != -1:
                    bounds.append((dim, dim, dim))
                elif isinstance(symbol, str) and symbol in symbols:
                    bounds.append(symbols[symbol][1])
                else:
                    bounds.append(usual_bounds(axis, len(dims)))
                    assumed.append(f"{axis} ({symbol})" if isinstance(symbol, str) else str(axis))
                    if isinstance(symbol, str):
                        symbols[symbol] = (name, bounds[-1])
            low, opt, high = zip(*bounds, strict=True)
            result.shapes[name] = ShapeRange(low, opt, high)
            if assumed:
                result.assumed.append(name)
                noun = "dimension" if len(assumed) == 1 else "dimensions"
                result.remarks.append(
                    f"input {name!r}: range {result.shapes[name]} taken, by default in {noun} {', '.join(assumed)}; "
                    f'set it with --shape "{name}=MIN:OPT:MAX"'
                )
    return result


def _symbols(
    specs: Mapping[str, TensorSpec], given: Mapping[str, ShapeRange]
) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Symbol -> (the input that fixes it, its range); the ranges given must agree on every symbol."""
    symbols: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for name, wanted in given.items():
        for axis, dim in enumerate(specs[name].shape or ()):
            if not isinstance(dim, str):
                continue
            bounds = (wanted.min[axis], wanted.opt[axis], wanted.max[axis])
            other, known = symbols.setdefault(dim, (name, bounds))
            if known != bounds:
                raise ShapeError(
                    f"shapes of {other!r} and {name!r} disagree on dimension {dim!r}, which the model says is one: "
                    f"{':'.join(map(str, known))} and {':'.join(map(str, bounds))}; give both the same"
                )
    return symbols


def _value_range(name: str, dims: tuple[int, ...], wanted: ShapeRange | None) -> ShapeRange:
    count = int(np.prod(dims, dtype=np.int64))
    example = "x".join(["2"] * count)
    if wanted is None:
        raise ShapeError(
            f"input {name!r} holds a shape, and TensorRT needs the range of its {count} values: "
            f'give --shape "{name}=MIN:OPT:MAX" with values in place of dimensions, as in {name}={example}'
        )
    if len(wanted.opt) != count:
        raise ShapeError(
            f"shape for {name!r}: it holds {count} values that are a shape, so the range has {count} numbers as in "
            f"{example}, not {len(wanted.opt)}"
        )
    return wanted


def add_profile(builder: Any, network: Any, config: Any, ranges: Ranges, log: Log) -> None:
    if not ranges.shapes:
        return
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        wanted = ranges.shapes.get(tensor.name)
        if wanted is None:
            continue
        if tensor.name in ranges.values:
            profile.set_shape_input(tensor.name, wanted.min, wanted.opt, wanted.max)
        else:
            profile.set_shape(tensor.name, wanted.min, wanted.opt, wanted.max)
    if config.add_optimization_profile(profile) < 0:
        shown = ", ".join(f"{name}={wanted}" for name, wanted in ranges.shapes.items())
        raise ShapeError(f"TensorRT refuses the shapes {shown}: {log.first()}")
