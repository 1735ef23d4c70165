"""Targets: which runtime on which device, and what follows from that for the passes.

Text form ``RUNTIME[:DEVICE]``: ``ort:cpu``, ``ort:cuda``, ``tensorrt:sm89``, ``tensorrt-rtx:sm86+sm89``. Without a device
the runtime's own default holds (the CPU, the GPU of this machine, every GPU from SM80 on).
"""

from __future__ import annotations

import difflib
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from graphopt.errors import UnknownTarget


@dataclass(frozen=True)
class Traits:
    """What a runtime wants of a graph; the same for all its devices."""

    opset_ceiling: int  # newest default-domain opset that the runtime reads
    contrib_ops: bool  # whether com.microsoft operators are understood
    symmetric_int8: bool  # whether activations must have zero point 0
    channel_alignment: int  # channel counts that are multiples of this fill the tiles of its GPUs
    float_types: tuple[str, ...]  # compute types with fast kernels, widest first


RUNTIMES: Final[dict[str, Traits]] = {
    "ort": Traits(26, True, False, 8, ("float32",)),
    "tensorrt": Traits(24, False, True, 32, ("float32", "bfloat16", "float16")),
    "tensorrt-rtx": Traits(24, False, True, 32, ("float32", "bfloat16", "float16")),
}

_COMPUTE_CAPABILITY = re.compile(r"sm\d{2,3}")
CPU_FEATURES: Final = {  # name in a target -> flags in /proc/cpuinfo, any of which tells it
    "avx2": {"avx2"},
    "avx512f": {"avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "amx": {"amx_int8"},
}
_DEVICE_NAME = re.compile(r"[A-Za-z][\w.-]*")


@dataclass(frozen=True)
class Target:
    """A runtime and a device.

    `device` is ``""`` (the runtime's default), an execution provider for ``ort`` (``cpu``, ``cpu-avx2``, ``cuda``, or a
    provider's full name), or one or more compute capabilities for TensorRT (``sm86+sm89``).
    """

    runtime: str
    device: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``RUNTIME[:DEVICE]``.

        Raises:
            UnknownTarget: the runtime is not known, or the device does not fit it.
        """
        runtime, _, device = text.strip().partition(":")
        if runtime not in RUNTIMES:
            near = difflib.get_close_matches(runtime, RUNTIMES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known runtimes: {', '.join(RUNTIMES)}"
            raise UnknownTarget(f"unknown target {text!r}: {hint}")
        if runtime == "ort":
            if device and not _DEVICE_NAME.fullmatch(device):
                raise UnknownTarget(f"target {text!r}: {device!r} is no execution provider; try ort:cpu or ort:cuda")
            if device.startswith("cpu-") and device.removeprefix("cpu-") not in CPU_FEATURES:
                raise UnknownTarget(
                    f"target {text!r}: a CPU is one of {', '.join(f'cpu-{name}' for name in CPU_FEATURES)}, or cpu"
                )
        elif device and not all(_COMPUTE_CAPABILITY.fullmatch(part) for part in device.split("+")):
            raise UnknownTarget(
                f"target {text!r}: a TensorRT device is one or more of smNN joined by '+', as in sm86+sm89"
            )
        return cls(runtime, device)

    def __str__(self) -> str:
        return f"{self.runtime}:{self.device}" if self.device else self.runtime

    @property
    def traits(self) -> Traits:
        """What the runtime wants of a graph."""
        return RUNTIMES[self.runtime]

    @property
    def family(self) -> str:
        """Runtime and kind of device, as passes name what they are made for: ``ort:cpu``, ``ort:cuda``, ``tensorrt``, ``tensorrt-rtx``."""
        if self.runtime != "ort":
            return self.runtime
        device = self.device.lower().removesuffix("executionprovider")
        return "ort:cpu" if device in ("", "cpu") or device.startswith("cpu-") else f"ort:{device}"

    @property
    def channel_alignment(self) -> int:
        """Channel counts that are multiples of this fill the hardware's tiles.

        ONNX Runtime's convolutions work on blocks of 16 channels with AVX-512 and of 8 without; a CPU that is not named may have it.
        """
        if self.family == "ort:cpu":
            return 8 if self.device == "cpu-avx2" else 16
        return self.traits.channel_alignment

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The GPU architectures asked for, as in ``("sm86", "sm89")``; empty for the runtime's default."""
        return tuple(self.device.split("+")) if self.device and self.runtime != "ort" else ()


def cpu_features() -> frozenset[str]:
    """The x86 instruction sets that decide int8 kernels on this CPU: of ``avx2``, ``avx512f``, ``vnni``, ``amx``.

    Empty where the system does not say (anything but Linux on x86-64).
    """
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return frozenset()
    flags: set[str] = set()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    return frozenset(name for name, markers in CPU_FEATURES.items() if markers & flags)


def cpu_name() -> str:
    """The CPU's model as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
