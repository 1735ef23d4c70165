"""Four small networks trained on scikit-learn's digits, each exported by both of torch's exporters, and their data.

README.md says what each is; train.py made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["digits", "path"]

_HERE = Path(__file__).parent


def path(name: str) -> Path:
    """The file of a model, by its name without suffix: `path("resnet.legacy")`."""
    available = {file.stem: file for file in sorted(_HERE.glob("*.onnx"))}
    if name not in available:
        raise ValueError(f"no model named {name!r}; available: {', '.join(available)}")
    return available[name]


def digits() -> dict[str, NDArray[Any]]:
    """`x_train`, `x_calib`, `x_test`: float32 [n, 1, 8, 8] in [0, 1]; `y_train`, `y_calib`, `y_test`: int64 [n]."""
    with np.load(_HERE / "digits.npz", allow_pickle=False) as arrays:
        return dict(arrays)
