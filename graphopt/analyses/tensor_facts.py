"""What the shape analysis knows of a tensor, and a node as its rules see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.symbolic import Dim, Expr
from graphopt.ir import Node

Shape = tuple[Dim, ...]
Values = np.ndarray[Any, Any]  # of dtype object: int, bool or Expr

MAX_VALUES: Final = 256  # elements of a tensor whose values are followed


@dataclass(frozen=True)
class Info:
    """What is known of one tensor."""

    dtype: np.dtype[Any] | None = None
    shape: Shape | None = None  # None: not even the rank
    value: Values | None = None  # integers and booleans only


UNKNOWN: Final = Info()


class Facts(Protocol):
    """What a rule may ask of the analysis."""

    opset: int

    def info(self, tensor: gs.Tensor) -> Info:
        """All that is known of `tensor`."""

    def opaque(self) -> Expr:
        """A dimension of which nothing is known."""


class Call:
    """One node as a handler sees it."""

    def __init__(self, shapes: Facts, node: Node, inferred: list[Info]) -> None:
        self.shapes = shapes
        self.node = node
        self.inferred = inferred
        self.opset = shapes.opset

    def has(self, index: int) -> bool:
        """Whether operand `index` is present."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def info(self, index: int) -> Info:
        """Facts of operand `index`."""
        return self.shapes.info(self.node.inputs[index]) if self.has(index) else UNKNOWN

    def shape(self, index: int) -> Shape | None:
        """Shape of operand `index`."""
        return self.info(index).shape

    def value(self, index: int) -> Values | None:
        """Values of operand `index`."""
        return self.info(index).value

    def ints(self, index: int) -> list[int] | None:
        """Values of operand `index` where all are plain integers, flattened."""
        value = self.value(index)
        if value is None or any(isinstance(v, Expr) for v in value.flat):
            return None
        return [int(v) for v in value.flat]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute or its default."""
        return self.node.attrs.get(name, default)

    def axes(self, index: int = 1) -> list[int] | None:
        """The axes of the operator, attribute or operand; [] where none are given; None where they are unknown."""
        given = self.attr("axes")
        if given is not None:
            return [int(a) for a in given]
        return self.ints(index) if self.has(index) else []


Handler = Callable[[Call], Sequence[Any]]
