"""TensorRT engines: enterprise TensorRT 10 and 11 on a GPU, and TensorRT for RTX, which compiles without one.

One code path serves the three; what differs stands in `FLAVORS` and `ONLY_IN` below. Networks are strongly typed
everywhere: precision is in the graph (Cast, QuantizeLinear), never in builder flags, which TensorRT 11 dropped.

What has run: builds with TensorRT for RTX 1.7.1 on machines without a GPU. NOTHING has run on a GPU yet: neither the
session nor builds with enterprise TensorRT, whose names a test checks against the API of 10.16 and 11.4.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/
"""

from __future__ import annotations

import importlib
import logging
import mmap
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from graphopt import ir, isolation
from graphopt.backend import (
    Artifact,
    Availability,
    Backend,
    BuildOptions,
    Progress,
    Session,
    check_shapes,
    may_hold_shape,
)
from graphopt.backends._cuda_buffers import CudaDriver, open_cuda
from graphopt.backends._tensorrt_kernels import inspected_kernels, logged_kernels
from graphopt.backends._tensorrt_log import Log, Monitor, log_of
from graphopt.backends._tensorrt_profile import Ranges, add_profile, shape_ranges
from graphopt.backends._tensorrt_refusals import check_interface, failure, origins_of, quantization_traps, refusal
from graphopt.backends._tensorrt_session import EngineSession
from graphopt.errors import (
    BackendUnavailable,
    InvalidModel,
    UnknownTarget,
    UnsupportedModel,
    UsageError,
)
from graphopt.ir import Model
from graphopt.target import Target

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flavor:
    """How one runtime differs from the others."""

    module: str  # what to import
    extra: str  # what to install
    oldest: int  # oldest major version that this file serves
    ahead_of_time: bool  # compiles for named compute capabilities without a GPU; else for the GPU at hand only
    refused: Mapping[str, str] = field(default_factory=dict)  # field of BuildOptions -> why not, and what instead
    without_effect: Mapping[str, str] = field(default_factory=dict)  # field of BuildOptions -> remark
    needs_driver: Mapping[str, str] = field(default_factory=dict)  # field of BuildOptions -> why a driver is needed


FLAVORS: Final = {
    "tensorrt": Flavor("tensorrt", "tensorrt", oldest=10, ahead_of_time=False),
    "tensorrt-rtx": Flavor(
        "tensorrt_rtx",
        "rtx",
        oldest=1,
        ahead_of_time=True,
        refused={
            "version_compatible": "it needs libnvinfer_lean, which this package lacks; build again for each version",
            "hardware_compatible": "name the GPUs in the target instead, as in tensorrt-rtx:sm86+sm89",
        },
        without_effect={"timing_cache": "timing caches are no-ops here; the file is neither read nor written"},
        needs_driver={"refit": "its builder loads refittable kernels through the NVIDIA driver"},
    ),
}

# Names that not every version has, and the versions that do; a test holds all others to 10.16, 11.4 and RTX 1.7 alike.
ONLY_IN: Final = {
    "ComputeCapability": ("tensorrt_rtx-1.7",),
    "IBuilderConfig.num_compute_capabilities": ("tensorrt_rtx-1.7",),
    "IBuilderConfig.set_compute_capability": ("tensorrt_rtx-1.7",),
}

EXTERNAL_ABOVE: Final = 64 << 20  # bytes of weights from which the parser maps a file instead of reading a protobuf

_BUILDING = threading.Lock()  # a builder keeps state in the process: see `_settle`


class TensorRT(Backend):
    """Builds and runs TensorRT engines."""

    runtimes = ("tensorrt", "tensorrt-rtx")
    reads = Backend.reads - {"threads", "spinning", "graph_level"}

    def availability(self, runtime: str) -> Availability:
        """What can be done with `runtime` on this machine; never raises."""
        flavor = FLAVORS[runtime]
        try:
            version = str(_load(flavor).__version__)
        except BackendUnavailable as error:
            return Availability(None, str(error), str(error))
        try:
            cuda = open_cuda()
            devices = (f"{cuda.device} ({cuda.capability})",)
            cuda.close()
        except Exception as error:
            reason = str(error)
            return Availability(version, None if flavor.ahead_of_time else reason, reason)
        return Availability(version, None, None, devices)

    def emit(
        self, model: Model, target: Target, folder: Path, options: BuildOptions, progress: Progress | None = None
    ) -> Artifact:
        """Write ``RUNTIME-DEVICE.engine`` into `folder`.

        Dynamic dimensions without a range in `options.shapes` get the defaults above, said in the remarks. The range of
        an input that TensorRT reads as a shape (``Reshape``'s second, say) is a range of its values.

        Raises:
            BackendUnavailable: the runtime is not installed, or there is no GPU where it needs one.
            UnsupportedModel: nodes that TensorRT cannot take, all of them in one message; or the build failed.
            ShapeError: the shapes contradict the model, or the model cannot be computed with them.
            UsageError: an option that this version lacks, or a value out of range.
            UserError: `progress` cancelled the build.
        """
        flavor = FLAVORS[target.runtime]
        trt = _load(flavor)
        title = f"{flavor.module} {trt.__version__}"
        remarks = _check_options(flavor, title, options)
        capabilities = _capabilities(trt, title, target) if flavor.ahead_of_time else ()
        values = {spec.name for spec in model.inputs if may_hold_shape(spec)}  # whether they do, the parser will say
        check_shapes(model, {name: r for name, r in options.shapes.items() if name not in values})
        check_interface(model, title)
        if model.opset > target.traits.opset_ceiling:
            remarks.append(
                f"opset {model.opset} is newer than {target.traits.opset_ceiling}, the newest that TensorRT documents; "
                "its parser is lenient, so compare the results"
            )
        remarks += quantization_traps(model, title, capabilities)

        monitor = Monitor(progress, target)
        log = log_of(trt)
        with _BUILDING, _gpu(flavor, title, target, options) as cuda:
            log.clear()
            built = _compile(trt, flavor, title, log, model, capabilities, options, monitor)
            origins = origins_of(model)
            kernels = (
                logged_kernels(log.layers, origins)
                if cuda is None
                else inspected_kernels(trt, log, built.plan, origins)
            )
            name = f"{target.runtime}-{target.device or 'default'}.engine"
            with ir.replacing(folder / name) as file:
                file.write(memoryview(built.plan))
            if options.timing_cache is not None and built.timings is not None:
                with ir.replacing(options.timing_cache) as file:
                    file.write(memoryview(built.timings))
        return Artifact(
            files=(name,),
            versions={flavor.module: str(trt.__version__)},
            shapes=built.ranges.shapes,
            kernels=kernels,
            remarks=(*remarks, *built.ranges.remarks, *built.remarks),
            details={
                "engine_bytes": built.plan.nbytes,
                "build_seconds": round(built.seconds, 3),
                "network_layers": built.layers,
                "kernels": len(kernels),
                "gpus": [c.lower() for c in capabilities] or [cuda.capability if cuda else "sm80 and newer"],
            },
        )

    def open(self, folder: Path, artifact: Artifact, target: Target, options: BuildOptions) -> Session:
        """Load an engine onto the first GPU; not yet run on one (see the module's docstring).

        Raises:
            BackendUnavailable: no runtime or GPU here, or the engine was built for others.
            InvalidModel: the engine file cannot be read.
        """
        flavor = FLAVORS[target.runtime]
        trt = _load(flavor)
        title = f"{flavor.module} {trt.__version__}"
        path = folder / artifact.files[0]
        cuda = open_cuda()
        try:
            log = log_of(trt)
            with cuda.current():
                log.clear()
                loader = _started(trt.Runtime, log, title)
                with _mapped(path) as data:
                    engine = loader.deserialize_cuda_engine(data)
                context = engine.create_execution_context() if engine is not None else None
                if context is None:
                    made = " ".join(f"{package} {version}" for package, version in artifact.versions.items())
                    raise BackendUnavailable(
                        f"{path.name} does not load on {cuda.device} ({cuda.capability}) with {title}: {log.first()}; "
                        f"{made or 'another version'} made it for {target}: build again for this machine"
                    )
                return EngineSession(trt, cuda, loader, engine, context, log, artifact.shapes)
        except BaseException:
            cuda.close()
            raise


def _load(flavor: Flavor) -> Any:
    """The runtime's module.

    Raises:
        BackendUnavailable: it is not installed, broken or too old.
    """
    install = f'pip install "graphopt[{flavor.extra}]"'
    try:
        trt = importlib.import_module(flavor.module)
    except Exception as error:  # not ImportError alone: the package loads native libraries on import
        missing = isinstance(error, ModuleNotFoundError) and error.name == flavor.module
        reason = "is not installed" if missing else f"cannot be imported ({' '.join(str(error).split())})"
        raise BackendUnavailable(f"{flavor.module} {reason}: {install}") from None
    if int(str(trt.__version__).split(".")[0]) < flavor.oldest:
        raise BackendUnavailable(f"{flavor.module} {trt.__version__} is older than {flavor.oldest}: {install}")
    return trt


def _started(kind: Any, log: Log, title: str) -> Any:
    """A trt.Builder or trt.Runtime."""
    try:
        return kind(log.logger)
    except (TypeError, RuntimeError):  # how the bindings say that the native constructor gave null
        raise BackendUnavailable(
            f"{title} does not start: {log.first()}; its NVIDIA driver may be missing or too old"
        ) from None


# -------------------------------------------------------------------------------------------- before the builder runs


def _check_options(flavor: Flavor, title: str, options: BuildOptions) -> list[str]:
    """Refuse what the runtime lacks; returns remarks on what has no effect."""
    asked = {name for name in (*flavor.refused, *flavor.without_effect) if getattr(options, name)}
    for name in sorted(asked & set(flavor.refused)):
        raise UsageError(f"{title} has no {name.replace('_', ' ')} engines: {flavor.refused[name]}")
    level = options.optimization_level
    if level is not None and not 0 <= level <= 5:
        raise UsageError(f"optimization level {level}: {title} has 0 (fast build) to 5 (fast engine)")
    if options.workspace is not None and options.workspace <= 0:
        raise UsageError(f"workspace {options.workspace}: expected a number of bytes above 0, as in {1 << 30}")
    if options.hardware_compatible not in (None, "ampere-plus", "same-compute-capability"):
        raise UsageError(
            f"hardware compatibility {options.hardware_compatible!r}: "
            f"{title} has 'ampere-plus' and 'same-compute-capability'"
        )
    return [f"{title}: {flavor.without_effect[name]}" for name in sorted(asked & set(flavor.without_effect))]


def _capabilities(trt: Any, title: str, target: Target) -> tuple[str, ...]:
    """Members of trt.ComputeCapability for the target's devices, each once; none means SM80 and newer."""
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    wanted = tuple(dict.fromkeys(device.upper() for device in target.compute_capabilities))
    if unknown := [name.lower() for name in wanted if name not in known]:
        raise UnknownTarget(
            f"target {str(target)!r}: {title} cannot compile for {', '.join(unknown)}; "
            f"it knows {', '.join(known).lower()}"
        )
    return wanted


@contextmanager
def _gpu(flavor: Flavor, title: str, target: Target, options: BuildOptions) -> Iterator[CudaDriver | None]:
    """The GPU to build on, current in this thread; None where none is needed.

    Raises:
        BackendUnavailable: there is none, or not the one that the target names.
    """
    needing = [name for name in flavor.needs_driver if getattr(options, name)]
    if flavor.ahead_of_time and not needing:
        yield None
        return
    try:
        cuda = open_cuda()
    except BackendUnavailable as error:
        why = f"{needing[0]}: {flavor.needs_driver[needing[0]]}" if needing else "it builds for the GPU at hand only"
        other = f"build without {needing[0]}" if needing else "build there, or for tensorrt-rtx, which needs none"
        raise BackendUnavailable(f"{title} needs a GPU here ({why}), and there is {error}; {other}") from None
    try:
        wanted = target.compute_capabilities
        if not flavor.ahead_of_time and wanted not in ((), (cuda.capability,)):
            raise BackendUnavailable(
                f"target {str(target)!r}: {title} builds for the GPU at hand only, {cuda.device} ({cuda.capability}); "
                f"build on a machine with {' and '.join(wanted)}, or for tensorrt-rtx:{target.device}"
            )
        with cuda.current():
            yield None if flavor.ahead_of_time else cuda
    finally:
        cuda.close()


# --------------------------------------------------------------------------------------------------------- the build


@dataclass
class _Built:
    plan: Any  # trt.IHostMemory
    ranges: Ranges
    layers: int
    seconds: float
    remarks: list[str]
    timings: Any  # serialized timing cache; None where there is none


def _compile(
    trt: Any,
    flavor: Flavor,
    title: str,
    log: Log,
    model: Model,
    capabilities: Sequence[str],
    options: BuildOptions,
    monitor: Monitor,
) -> _Built:
    """Model -> parser -> profile -> engine bytes; weights pass through a temporary file, so that they are held once."""
    builder = _started(trt.Builder, log, title)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)  # segfaults when nothing else holds the network
    config = builder.create_builder_config()
    with tempfile.TemporaryDirectory(prefix="graphopt-") as temporary:
        monitor.report("Parsing", 0.0)
        monitor.check()
        path = Path(temporary) / "model.onnx"
        ir.save(model, path, external=True if model.nbytes > EXTERNAL_ABOVE else None)
        with isolation.step(f"{title}: parsing the model"):
            parsed = parser.parse_from_file(str(path))
        if not parsed:
            raise UnsupportedModel(refusal(parser, log, model, title))
        ranges = shape_ranges(network, model, options.shapes)
        remarks: list[str] = []
        _configure(trt, config, options)
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
        add_profile(builder, network, config, ranges, log)
        cache = None
        if options.timing_cache is not None and "timing_cache" not in flavor.without_effect:
            cache = _timing_cache(config, options.timing_cache, remarks)
        config.progress_monitor = monitor.attach(trt)
        log.errors.clear()
        begin = time.perf_counter()
        with isolation.step(f"{title}: building the engine"):
            plan = builder.build_serialized_network(network, config)
        seconds = time.perf_counter() - begin
    if plan is None and flavor.ahead_of_time:
        _settle(trt)
    monitor.check()
    if plan is None or log.inconsistent:
        raise failure(log, title, ranges)
    monitor.report("Built", 1.0)
    return _Built(plan, ranges, network.num_layers, seconds, remarks, cache and cache.serialize())


def _settle(trt: Any) -> None:
    """Build and drop a network of one layer.

    After a failed build RTX 1.7.1 compiles the next engine of the process, in whatever thread, for the GPUs of the
    failed one: after one that failed for sm75, the next, for sm89, had float convolutions in place of int8. A test
    reproduces it.
    """
    builder = trt.Builder(log_of(trt).logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    layer = network.add_identity(network.add_input("x", trt.DataType.FLOAT, (1,)))
    network.mark_output(layer.get_output(0))
    builder.build_serialized_network(network, builder.create_builder_config())


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the builder names no kernels
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible == "ampere-plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatible == "same-compute-capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def _timing_cache(config: Any, path: Path, remarks: list[str]) -> Any:
    """A cache from `path` attached to `config`; an empty one where the file is missing or of another version or GPU."""
    try:
        stored = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UsageError(f"cannot read timing cache {str(path)!r}: {error.strerror}; name another file") from None
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        remarks.append(f"timing cache {str(path)!r} is of another TensorRT or GPU and is replaced")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


# ----------------------------------------------------------------------------------------------------------- running


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidModel(f"cannot read engine {str(path)!r}: {reason}; build the bundle again") from None
