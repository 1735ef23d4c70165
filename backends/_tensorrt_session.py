"""A loaded TensorRT engine: feeds in, outputs back, shapes as they come.

Not yet run on a GPU: a test drives it with a fake engine and driver.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
import onnx

from graphopt import ir
from graphopt.backend import Arrays, Session, ShapeRange
from graphopt.backends._cuda_buffers import Buffer, CudaDriver
from graphopt.errors import BackendUnavailable, UsageError
from graphopt.ir import TensorSpec

# Types of inputs and outputs, by their names in trt.DataType; TensorRT turns float64 into float32 without a word
DTYPES: Final = {
    "FLOAT": onnx.TensorProto.FLOAT,
    "HALF": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
    "FP8": onnx.TensorProto.FLOAT8E4M3FN,
    "INT8": onnx.TensorProto.INT8,
    "UINT8": onnx.TensorProto.UINT8,
    "INT32": onnx.TensorProto.INT32,
    "INT64": onnx.TensorProto.INT64,
    "BOOL": onnx.TensorProto.BOOL,
}


class Said(Protocol):
    """What TensorRT said since the last run."""

    errors: list[str]

    def first(self) -> str:
        """The first error that says something."""


class EngineSession(Session):
    """An engine on one GPU and one stream; runs from several threads take turns.

    Device outputs go through an output allocator, since their shapes may depend on data; what TensorRT keeps on the
    host (shapes) is bound to pinned memory.
    """

    def __init__(
        self,
        trt: Any,
        cuda: CudaDriver,
        loader: Any,
        engine: Any,
        context: Any,
        log: Said,
        ranges: Mapping[str, ShapeRange],
    ) -> None:
        """Called with `cuda` current; `loader` and `log` must live as long as the engine."""
        self._cuda, self._log, self._ranges = cuda, log, ranges
        self.loader, self.engine, self.context = loader, engine, context
        self._lock = threading.Lock()
        self._closed = False
        self._buffers: dict[str, Buffer] = {}
        self._on_host: set[str] = set()
        self._values: set[str] = set()  # inputs that hold shapes: their ranges are ranges of values
        self._dtypes: dict[str, np.dtype[Any]] = {}
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            self._dtypes[name] = ir.numpy_dtype(DTYPES[engine.get_tensor_dtype(name).name])
            shape = tuple(None if d < 0 else int(d) for d in engine.get_tensor_shape(name))
            spec = TensorSpec(name, ir.dtype_name(self._dtypes[name]), shape)
            (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(spec)
            self._buffers[name] = Buffer(cuda)
            if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                self._on_host.add(name)
            if engine.is_shape_inference_io(name):
                self._values.add(name)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the outputs of the present run
        self._allocator = self._make_allocator(trt)
        for spec in self.outputs:
            if spec.name not in self._on_host:
                context.set_output_allocator(spec.name, self._allocator)

    def _make_allocator(self, trt: Any) -> Any:
        buffers, shapes = self._buffers, self._shapes

        class OutputAllocator(trt.IOutputAllocator):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IOutputAllocator.__init__(self)

            def reallocate_output(self, tensor_name: str, memory: Any, size: int, alignment: int) -> int:
                return buffers[tensor_name].reserve(size)  # cuMemAlloc aligns to 256 bytes, all that TensorRT asks

            def reallocate_output_async(
                self, tensor_name: str, memory: Any, size: int, alignment: int, stream: int
            ) -> int:
                return buffers[tensor_name].reserve(size)

            def notify_shape(self, tensor_name: str, shape: Any) -> None:
                shapes[tensor_name] = tuple(shape)

        return OutputAllocator()

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """Compute all outputs from arrays by input name.

        Raises:
            UsageError: a feed is missing, unknown, or has another dtype or a shape that does not fit.
            BackendUnavailable: the GPU failed.
        """
        if self._closed:
            raise UsageError("the session is closed; open the bundle again")
        arrays = {spec.name: self._checked(spec, feeds) for spec in self.inputs}
        if unknown := [name for name in feeds if name not in arrays]:
            raise UsageError(
                f"no input {', '.join(map(repr, unknown))}; the inputs are {', '.join(map(str, self.inputs))}"
            )
        with self._lock, self._cuda.current():
            for name, array in arrays.items():
                self._bind_input(name, array)
            if missing := self.context.infer_shapes():
                raise UsageError(
                    f"TensorRT cannot derive shapes from the inputs given: {', '.join(missing)}; {self._log.first()}"
                )
            for spec in self.outputs:
                if spec.name in self._on_host:
                    host = self._buffers[spec.name].host(self.context.get_max_output_size(spec.name))
                    self.context.set_tensor_address(spec.name, host.ctypes.data)
            self._shapes.clear()
            self._log.errors.clear()
            if not self.context.execute_async_v3(self._cuda.stream):
                raise BackendUnavailable(f"the engine failed on {self._cuda.device}: {self._log.first()}")
            pinned = {spec.name: self._fetch(spec) for spec in self.outputs}
            self._cuda.synchronize()
            return {name: array.copy() for name, array in pinned.items()}

    def _checked(self, spec: TensorSpec, feeds: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        if spec.name not in feeds:
            raise UsageError(f"input {spec.name!r} is missing; the inputs are {', '.join(map(str, self.inputs))}")
        array = np.asarray(feeds[spec.name])
        if ir.dtype_name(array.dtype) != spec.dtype:
            raise UsageError(f"input {spec.name!r} is {ir.dtype_name(array.dtype)}, the engine takes {spec.dtype}")
        declared = spec.shape or ()
        fits = len(array.shape) == len(declared) and all(
            d in (None, n) for d, n in zip(declared, array.shape, strict=False)
        )
        wanted = self._ranges.get(spec.name)
        if fits and wanted is not None:
            actual = array.reshape(-1).tolist() if spec.name in self._values else array.shape
            fits = all(a <= n <= b for a, n, b in zip(wanted.min, actual, wanted.max, strict=False))
        if not fits:
            takes = f"{wanted} (min:opt:max)" if wanted is not None else str(spec)
            found = f"holds {array.tolist()}" if spec.name in self._values else f"has shape {_dims(array)}"
            raise UsageError(f"input {spec.name!r} {found}, the engine takes {takes}")
        return np.ascontiguousarray(array).reshape(array.shape)

    def _bind_input(self, name: str, array: np.ndarray[Any, Any]) -> None:
        host = self._buffers[name].host(array.nbytes)
        host[:] = array.reshape(-1).view(np.uint8)
        if not self.context.set_input_shape(name, array.shape):
            raise UsageError(f"input {name!r}: the engine refuses shape {_dims(array)}: {self._log.first()}")
        if name in self._on_host:
            self.context.set_tensor_address(name, host.ctypes.data)
        else:
            address = self._buffers[name].reserve(array.nbytes)
            self._cuda.upload(address, host)
            self.context.set_tensor_address(name, address)

    def _fetch(self, spec: TensorSpec) -> np.ndarray[Any, Any]:
        """A view of the pinned memory that the output is on its way to."""
        dtype = self._dtypes[spec.name]
        shape = self._shapes.get(spec.name) or tuple(self.context.get_tensor_shape(spec.name))
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        buffer = self._buffers[spec.name]
        host = buffer.host(nbytes)
        if spec.name not in self._on_host and nbytes:
            self._cuda.download(host, buffer.address)
        return host.view(dtype).reshape(shape)

    def close(self) -> None:
        """Free device memory; the session cannot run afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self._cuda.current():
                self.context = self.engine = self.loader = self._allocator = None
                for buffer in self._buffers.values():
                    buffer.release()
            self._cuda.close()


def _dims(array: np.ndarray[Any, Any]) -> str:
    return "x".join(map(str, array.shape)) or "() (a scalar)"
