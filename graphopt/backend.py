"""What a backend is: it says whether it can work here, emits an artifact from a model, and opens it again.

A backend is one file in ``backends/`` with one class derived from `Backend`; discovery finds it by its file name and by the
`runtimes` it serves. Its runtime is imported inside methods only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from graphopt.errors import ShapeError
from graphopt.ir import Model, TensorSpec
from graphopt.target import Target

Arrays = dict[str, "np.ndarray[Any, Any]"]  # tensor name -> value

# Ranges for dynamic dimensions that nobody gave: (min, opt, max)
BATCH: Final = (1, 8, 32)  # dimension 0
IMAGE: Final = (32, 224, 512)  # dimensions 2 and 3 of four: what stride-32 networks take
LENGTH: Final = (1, 128, 512)  # any other, sequence lengths above all


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input that an engine must accept, and the one it is tuned for; all of one rank."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> tuple[str, ShapeRange]:
        """Read ``NAME=MIN[:OPT:MAX]`` with shapes as ``1x3x224x224``; one shape alone stands for all three.

        Raises:
            ShapeError: the text has another form, the ranks differ, or not min <= opt <= max.
        """
        name, separator, shapes = text.rpartition("=")
        parts = shapes.split(":")
        if not separator or not name or len(parts) not in (1, 3):
            raise ShapeError(
                f"shape {text!r}: expected NAME=SHAPE or NAME=MIN:OPT:MAX, as in x=1x3x8x8:8x3x8x8:32x3x8x8"
            )
        try:
            dims = [tuple(int(d) for d in part.split("x")) if part else () for part in parts]
        except ValueError:
            raise ShapeError(f"shape {text!r}: dimensions are integers joined by 'x', as in 1x3x224x224") from None
        low, opt, high = dims * 3 if len(dims) == 1 else dims
        if not len(low) == len(opt) == len(high):
            raise ShapeError(f"shape {text!r}: min, opt and max differ in rank ({len(low)}, {len(opt)}, {len(high)})")
        if any(not 0 <= a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
            raise ShapeError(f"shape {text!r}: every dimension needs 0 <= min <= opt <= max")
        return name, cls(low, opt, high)

    def __str__(self) -> str:
        return ":".join("x".join(map(str, shape)) for shape in (self.min, self.opt, self.max))


def usual_bounds(axis: int, rank: int) -> tuple[int, int, int]:
    """The range of a dynamic dimension that nobody described."""
    return BATCH if axis == 0 else IMAGE if rank == 4 and axis > 1 else LENGTH


@dataclass(frozen=True)
class BuildOptions:
    """What a user may ask of a backend; a backend refuses what its runtime lacks, naming the version."""

    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)  # input name -> range
    threads: int | None = None  # ort: intra-op threads; None is the runtime's default
    spinning: bool = True  # ort: idle threads spin for lower latency; off where CPU seconds are compared
    graph_level: str | None = None  # ort: disabled, basic, extended or all
    workspace: int | None = None  # tensorrt: bytes of scratch memory
    optimization_level: int | None = None  # tensorrt: 0..5
    timing_cache: Path | None = None  # tensorrt: read when present, written after the build
    tf32: bool = True  # tensorrt
    sparse_weights: bool = False  # tensorrt: use 2:4 kernels where weights allow
    refit: bool = False  # tensorrt: weights can be replaced later
    version_compatible: bool = False  # tensorrt: engine loads in later versions of the same major
    hardware_compatible: str | None = None  # tensorrt: ampere-plus or same-compute-capability


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine, as its builder reports it."""

    name: str
    inputs: tuple[str, ...]  # datatypes, as in "Float", "Int8"
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    origin: tuple[str, ...] = ()  # names of the ONNX nodes it computes, where the builder says


@dataclass(frozen=True)
class Artifact:
    """What a backend wrote into the bundle folder."""

    files: tuple[str, ...]  # names inside the folder; the first is the one to open
    versions: Mapping[str, str]  # package -> version that made it
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)  # the ranges in force, defaults included
    kernels: tuple[Kernel, ...] = ()
    remarks: tuple[str, ...] = ()  # defaults taken and other things worth saying aloud
    details: Mapping[str, Any] = field(default_factory=dict)  # JSON values for the report


@dataclass(frozen=True)
class Availability:
    """Whether a backend can build and run here; each reason says what to do about it."""

    version: str | None  # the runtime's version, None when it cannot be imported
    build: str | None = None  # None: can build; else the reason why not
    run: str | None = None  # None: can run; else the reason why not
    devices: tuple[str, ...] = ()  # execution providers or GPUs seen here


Progress = Callable[[str, float], bool]  # (phase, share done 0..1) -> False to cancel


class Session(ABC):
    """A loaded artifact."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    @abstractmethod
    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """Compute all outputs from arrays by input name.

        Raises:
            UsageError: a feed is missing, unknown, or has another dtype or a shape that does not fit.
        """

    def close(self) -> None:
        """Free device memory; the session cannot run afterwards."""
        return None


class Backend(ABC):
    """One runtime family; stateless."""

    runtimes: ClassVar[tuple[str, ...]]  # the target runtimes it serves, as in ("tensorrt", "tensorrt-rtx")
    reads: ClassVar[frozenset[str]] = frozenset(
        f.name for f in fields(BuildOptions)
    )  # options that decide what it emits

    @abstractmethod
    def availability(self, runtime: str) -> Availability:
        """What can be done with `runtime` on this machine; never raises."""

    @abstractmethod
    def emit(
        self, model: Model, target: Target, folder: Path, options: BuildOptions, progress: Progress | None = None
    ) -> Artifact:
        """Write into `folder` what the runtime loads.

        Raises:
            BackendUnavailable: the runtime is not installed or cannot build here.
            UnsupportedModel: nodes that the runtime cannot take, all of them in one message.
            ShapeError: `options.shapes` contradicts the model.
            UsageError: an option that this version of the runtime does not have.
        """

    @abstractmethod
    def open(self, folder: Path, artifact: Artifact, target: Target, options: BuildOptions) -> Session:
        """Load what `emit` wrote.

        Raises:
            BackendUnavailable: it cannot run on this machine.
        """


def may_hold_shape(spec: TensorSpec) -> bool:
    """Whether TensorRT may read an input as a shape (``Reshape``'s second, say); its range is then one of values."""
    return spec.dtype in ("int32", "int64") and spec.shape is not None and len(spec.shape) < 2


def takes_values(spec: TensorSpec, wanted: ShapeRange) -> bool:
    """Whether a range gives one value for each element of an input that may hold a shape."""
    return may_hold_shape(spec) and len(wanted.opt) == (spec.shape[0] if spec.shape else 1)


def check_shapes(model: Model, shapes: Mapping[str, ShapeRange]) -> None:
    """Compare shape ranges with the model's inputs; ranges of values are left alone.

    Raises:
        ShapeError: an input that the model lacks, another rank, or another value for a fixed dimension.
    """
    specs = {spec.name: spec for spec in model.inputs}
    for name, wanted in shapes.items():
        if name not in specs:
            raise ShapeError(
                f"shape for {name!r}: the model has no such input; its inputs are {', '.join(specs) or 'none'}"
            )
        declared = specs[name].shape
        if declared is None or takes_values(specs[name], wanted):
            continue
        if len(declared) != len(wanted.opt):
            raise ShapeError(f"shape for {name!r} has {len(wanted.opt)} dimensions, the model declares {specs[name]}")
        for axis, dim in enumerate(declared):
            if isinstance(dim, int) and not wanted.min[axis] == wanted.max[axis] == dim:
                raise ShapeError(f"shape for {name!r}: dimension {axis} is fixed to {dim} in the model ({specs[name]})")
