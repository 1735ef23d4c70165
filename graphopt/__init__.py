"""graphopt: ONNX graphs in, optimized graphs, TensorRT engines and ONNX Runtime sessions out.

The public API is what this module lists; everything else may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.build import build
    from graphopt.bundle import Bundle, open  # noqa: A004  # graphopt.open is the contract
    from graphopt.equivalence import compare
    from graphopt.errors import GraphoptError, UserError
    from graphopt.ir import Model, load, parse, save
    from graphopt.pass_base import Context, Pass
    from graphopt.pipeline import Pipeline
    from graphopt.target import Target

_HOME = {
    "build": "build",
    "Bundle": "bundle",
    "open": "bundle",
    "compare": "equivalence",
    "GraphoptError": "errors",
    "UserError": "errors",
    "Model": "ir",
    "load": "ir",
    "parse": "ir",
    "save": "ir",
    "Context": "pass_base",
    "Pass": "pass_base",
    "Pipeline": "pipeline",
    "Target": "target",
}

__version__ = "0.1.0"
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562), so that `graphopt --help` loads neither onnx nor a runtime."""
    if name not in _HOME:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"graphopt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
