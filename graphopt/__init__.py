"""graphopt: ONNX graphs in, optimized graphs, TensorRT engines and ONNX Runtime sessions out.

The public API is what this module lists; everything else may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.building import build as build
    from graphopt.bundle import Bundle as Bundle
    from graphopt.bundle import open as open
    from graphopt.equivalence import compare as compare
    from graphopt.errors import GraphoptError as GraphoptError
    from graphopt.errors import UserError as UserError
    from graphopt.ir import Model as Model
    from graphopt.ir import load as load
    from graphopt.ir import parse as parse
    from graphopt.ir import save as save
    from graphopt.pass_base import Context as Context
    from graphopt.pass_base import Pass as Pass
    from graphopt.pipeline import Pipeline as Pipeline
    from graphopt.target import Target as Target

_HOME = {
    "build": "building",  # not build.py: importing a submodule would put it in the place of the function
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
