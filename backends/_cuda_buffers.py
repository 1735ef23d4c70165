"""Device buffers, pinned host buffers and one stream, from pycuda where it is installed, else from cuda-python.

Both use the primary context of the device, which the CUDA runtime (and so TensorRT) uses too, and make it current
around each piece of work, so that sessions run in any thread (https://github.com/NVIDIA/TensorRT/issues/1107). Nothing
here has run on a GPU yet: tests drive both classes with fake driver modules, and check the names against cuda-python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol

import numpy as np

from graphopt.errors import BackendUnavailable

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

INSTALL: Final = 'pip install "graphopt[tensorrt]" (pycuda) or "graphopt[rtx]" (cuda-python)'


class CudaDriver(Protocol):
    """One GPU with one stream; every method but `current` is called inside ``with driver.current():``."""

    package: str  # which binding it stands on
    device: str  # the GPU's name
    capability: str  # its architecture, as in "sm89"
    stream: int  # handle of the stream that copies run on

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU current in this thread; a CUDA error inside becomes `BackendUnavailable`."""

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory."""

    def free(self, address: int) -> None:
        """Give device memory back."""

    def pinned(self, nbytes: int) -> Bytes:
        """New page-locked host memory."""

    def free_pinned(self, array: Bytes) -> None:
        """Give page-locked memory back; `array` must not be used afterwards."""

    def upload(self, address: int, array: Bytes) -> None:
        """Enqueue a copy of `array` to the device."""

    def download(self, array: Bytes, address: int) -> None:
        """Enqueue a copy from the device into `array`."""

    def synchronize(self) -> None:
        """Wait for everything on the stream."""

    def close(self) -> None:
        """Destroy the stream and release the GPU."""


class CudaPython:
    """`CudaDriver` on ``cuda.bindings.driver``."""

    package = "cuda-python"

    def __init__(self, driver: Any) -> None:
        """`driver` is the module ``cuda.bindings.driver``."""
        self._driver = driver
        self._pinned: dict[int, Any] = {}  # address -> what the driver wants back
        self._do(driver.cuInit, 0)
        if not self._do(driver.cuDeviceGetCount):
            raise BackendUnavailable("the driver sees no GPU")
        self._device = self._do(driver.cuDeviceGet, 0)
        self.device = bytes(self._do(driver.cuDeviceGetName, 256, self._device)).split(b"\0")[0].decode()
        which = driver.CUdevice_attribute
        major = which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        self.capability = "sm" + "".join(
            str(self._do(driver.cuDeviceGetAttribute, a, self._device)) for a in (major, minor)
        )
        self._context = self._do(driver.cuDevicePrimaryCtxRetain, self._device)
        with self.current():
            self._stream = self._do(driver.cuStreamCreate, 0)
        self.stream = int(self._stream)

    def _do(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(f"{getattr(function, '__name__', 'CUDA')}: {getattr(status, 'name', status)}")
        return values[0] if values else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Push the primary context on this thread's stack."""
        self._do(self._driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            self._do(self._driver.cuCtxPopCurrent)

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory."""
        return int(self._do(self._driver.cuMemAlloc, nbytes))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._do(self._driver.cuMemFree, address)

    def pinned(self, nbytes: int) -> Bytes:
        """New page-locked host memory."""
        import ctypes

        pointer = self._do(self._driver.cuMemHostAlloc, nbytes, 0)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(pointer)))
        self._pinned[array.ctypes.data] = pointer
        return array

    def free_pinned(self, array: Bytes) -> None:
        """Give page-locked memory back."""
        self._do(self._driver.cuMemFreeHost, self._pinned.pop(array.ctypes.data))

    def upload(self, address: int, array: Bytes) -> None:
        """Enqueue a copy of `array` to the device."""
        self._do(self._driver.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: Bytes, address: int) -> None:
        """Enqueue a copy from the device into `array`."""
        self._do(self._driver.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._do(self._driver.cuStreamSynchronize, self._stream)

    def close(self) -> None:
        """Destroy the stream and release the primary context."""
        with self.current():
            self._do(self._driver.cuStreamDestroy, self._stream)
        self._do(self._driver.cuDevicePrimaryCtxRelease, self._device)


class PyCuda:
    """`CudaDriver` on ``pycuda.driver``."""

    package = "pycuda"

    def __init__(self, driver: Any) -> None:
        """`driver` is ``pycuda.driver``; ``pycuda.autoinit`` would make a context of its own, so it is not used."""
        self._driver = driver
        self._memory: dict[int, Any] = {}  # address -> pycuda's handle, which frees when dropped
        driver.init()
        if not driver.Device.count():
            raise BackendUnavailable("the driver sees no GPU")
        gpu = driver.Device(0)
        self.device = str(gpu.name())
        self.capability = "sm" + "".join(str(part) for part in gpu.compute_capability())
        self._context = gpu.retain_primary_context()
        with self.current():
            self._stream = driver.Stream()
        self.stream = int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Push the primary context on this thread's stack."""
        self._context.push()
        try:
            yield
        except self._driver.Error as error:
            raise BackendUnavailable(f"CUDA failed: {error}") from None
        finally:
            self._driver.Context.pop()

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory."""
        handle = self._driver.mem_alloc(nbytes)
        self._memory[int(handle)] = handle
        return int(handle)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._memory.pop(address).free()

    def pinned(self, nbytes: int) -> Bytes:
        """New page-locked host memory; pycuda frees it with the array."""
        array: Bytes = self._driver.pagelocked_empty(nbytes, np.uint8)
        return array

    def free_pinned(self, array: Bytes) -> None:
        """Nothing to do: the caller drops the array."""

    def upload(self, address: int, array: Bytes) -> None:
        """Enqueue a copy of `array` to the device."""
        self._driver.memcpy_htod_async(address, array, self._stream)

    def download(self, array: Bytes, address: int) -> None:
        """Enqueue a copy from the device into `array`."""
        self._driver.memcpy_dtoh_async(array, address, self._stream)

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._stream.synchronize()

    def close(self) -> None:
        """Drop the stream and the primary context."""
        with self.current():
            self._memory.clear()
            self._stream = None
        self._context = None


def open_cuda() -> CudaDriver:
    """The first GPU that CUDA shows here (CUDA_VISIBLE_DEVICES chooses), through whichever binding is installed.

    Raises:
        BackendUnavailable: no binding, no driver or no GPU; the message begins ``no CUDA device``.
    """
    reasons = []
    for load in (_pycuda, _cuda_python):
        try:
            return load()
        except ImportError:
            continue
        except (
            Exception
        ) as error:  # a binding speaks through whatever it likes: RuntimeError, its own Error, a bad status
            absent = type(error).__name__ == "DynamicLibNotFoundError"  # cuda-python without libcuda
            text = "the NVIDIA driver is not installed" if absent else " ".join(str(error).split())
            reasons.append(text or type(error).__name__)
    if not reasons:
        raise BackendUnavailable(f"no CUDA device: neither pycuda nor cuda-python can be imported; {INSTALL}")
    raise BackendUnavailable(f"no CUDA device: {reasons[0]}")


def _pycuda() -> CudaDriver:
    import pycuda.driver

    return PyCuda(pycuda.driver)


def _cuda_python() -> CudaDriver:
    from cuda.bindings import driver

    return CudaPython(driver)


class Buffer:
    """Device memory and its pinned host twin, grown on demand and reused from run to run."""

    def __init__(self, cuda: CudaDriver) -> None:
        self._cuda = cuda
        self._host: Bytes | None = None
        self._capacity = 0
        self.address = 0  # of the device memory; 0 before the first `reserve`

    def reserve(self, nbytes: int) -> int:
        """Address of `nbytes` of device memory, one at least, since TensorRT refuses null; contents are not kept."""
        nbytes = max(nbytes, 1)
        if nbytes > self._capacity:
            if self.address:
                self._cuda.free(self.address)
                self.address = self._capacity = 0
            self.address = self._cuda.allocate(nbytes)
            self._capacity = nbytes
        return self.address

    def host(self, nbytes: int) -> Bytes:
        """The first `nbytes` of the pinned host memory."""
        if self._host is None or self._host.nbytes < max(nbytes, 1):
            if self._host is not None:
                self._cuda.free_pinned(self._host)
                self._host = None
            self._host = self._cuda.pinned(max(nbytes, 1))
        return self._host[:nbytes]

    def release(self) -> None:
        """Give both back."""
        if self.address:
            self._cuda.free(self.address)
        if self._host is not None:
            self._cuda.free_pinned(self._host)
        self._host, self.address, self._capacity = None, 0, 0
