"""Arrays in and out of an ONNX Runtime session, element types included that NumPy lacks (bfloat16, 8-bit floats).

ONNX Runtime's ``Session.run`` refuses those; as OrtValues they pass, in by a copy that names the type, out by their memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from graphopt.elements import numpy_dtype, onnx_dtype

# ONNX Runtime's names of element types, where they are not NumPy's
DTYPES: Final = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
}
_FOREIGN: Final = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")


def dtype_of(kind: str) -> str | None:
    """NumPy's or ml_dtypes' name of ``tensor(float)``; None for what is no dense tensor."""
    if not kind.startswith("tensor("):
        return None
    name = kind.removeprefix("tensor(").removesuffix(")")
    return DTYPES.get(name, name)


def run(session: Any, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
    """All outputs of an ``onnxruntime.InferenceSession``, in order; raises what ONNX Runtime raises."""
    kinds = [dtype_of(value.type) for value in (*session.get_inputs(), *session.get_outputs())]
    if not any(kind in _FOREIGN for kind in kinds):
        return list(session.run(None, dict(feeds)))
    values = session.run_with_ort_values(None, {name: _wrapped(array) for name, array in feeds.items()})
    return [_unwrapped(value) for value in values]


def _wrapped(array: np.ndarray[Any, Any]) -> Any:
    import onnxruntime as ort

    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name not in _FOREIGN:
        return ort.OrtValue.ortvalue_from_numpy(array)
    raw = array.view(f"u{array.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, onnx_dtype(array.dtype))


def _unwrapped(value: Any) -> Any:
    kind = dtype_of(value.data_type())
    if kind not in _FOREIGN:
        return value.numpy()
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, numpy_dtype(value.element_type())).reshape(value.shape())
