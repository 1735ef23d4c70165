"""TensorRT engines: enterprise TensorRT 10 and 11 on a GPU, and TensorRT for RTX, which compiles without one.

One code path serves the three; what differs stands in `FLAVORS` and `ONLY_IN` below. Networks are strongly typed
everywhere: precision is in the graph (Cast, QuantizeLinear), never in builder flags, which TensorRT 11 dropped.

What has run: builds with TensorRT for RTX 1.7.1 on machines without a GPU. NOTHING has run on a GPU yet: neither the
session nor builds with enterprise TensorRT, whose names a test checks against the API of 10.16 and 11.4.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/
"""

from __future__ import annotations

import importlib
import json
import logging
import mmap
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from graphopt import ir, isolation
from graphopt.backend import (
    Artifact,
    Availability,
    Backend,
    BuildOptions,
    Kernel,
    Progress,
    Session,
    ShapeRange,
    check_shapes,
    may_hold_shape,
    usual_bounds,
)
from graphopt.backends._cuda_buffers import CudaDriver, open_cuda
from graphopt.backends._tensorrt_session import DTYPES, EngineSession
from graphopt.errors import (
    BackendUnavailable,
    InvalidModel,
    ShapeError,
    UnknownTarget,
    UnsupportedModel,
    UsageError,
    UserError,
)
from graphopt.ir import Model, TensorSpec
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

LISTED: Final = 10  # nodes that an error names; the rest are counted
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
        _check_interface(model, title)
        if model.opset > target.traits.opset_ceiling:
            remarks.append(
                f"opset {model.opset} is newer than {target.traits.opset_ceiling}, the newest that TensorRT documents; "
                "its parser is lenient, so compare the results"
            )
        remarks += _quantization_traps(model, title, capabilities)

        monitor = _Monitor(progress, target)
        log = _log(trt)
        with _BUILDING, _gpu(flavor, title, target, options) as cuda:
            log.clear()
            built = _compile(trt, flavor, title, log, model, capabilities, options, monitor)
            origins = _origins(model)
            kernels = _kernels(log.layers, origins) if cuda is None else _inspected(trt, log, built.plan, origins)
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
            log = _log(trt)
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


def _started(kind: Any, log: _Log, title: str) -> Any:
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


def _quantization_traps(model: Model, title: str, capabilities: Sequence[str]) -> list[str]:
    """Refuse Q/DQ nodes that TensorRT rejects with a riddle or, worse, reads as something else; returns remarks.

    Reproduced on RTX 1.7: int32 DequantizeLinear does not parse (onnxruntime's default bias, onnxruntime#14229); uint8
    is read as int8 without an error, so that codes above 127 saturate; zero points other than 0 do not parse; an
    activation quantized per channel runs in float; SM75 has no int8 kernels, and GPUs that share its engine get none.
    """
    bad: dict[str, list[str]] = {}
    slow: list[str] = []
    quantized = False
    for node in model.nodes():
        if not node.is_onnx or node.op not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
            continue
        quantized = True
        data, scale = node.inputs[:2]
        zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        quantizes = node.op == "QuantizeLinear"
        dtype = zero.dtype if zero is not None else None if quantizes else data.dtype
        if quantizes and dtype is None:  # ONNX: uint8 unless output_dtype says otherwise
            dtype = ir.numpy_dtype(node.attrs.get("output_dtype") or onnx.TensorProto.UINT8)
        kind = "" if dtype is None else ir.dtype_name(dtype)
        reason = ""
        if kind == "int32":
            reason = "a bias quantized to int32: keep biases in float (onnxruntime: QuantizeBias=False)"
        elif kind == "uint8":
            reason = "uint8, which would be read as int8: quantize to int8"
        elif isinstance(zero, ir.Constant) and np.any(np.asarray(zero.values).astype(np.float32)):
            reason = "zero points other than 0: quantize symmetrically"
        elif quantizes and isinstance(scale, ir.Constant) and scale.values.size > 1 and not _is_constant(data):
            slow.append(_shown(node))
        if reason:
            bad.setdefault(reason, []).append(f"{_shown(node)} ({node.op})")
    if bad:
        raise UnsupportedModel(f"{title} takes symmetric int8 and float biases only: {_grouped(bad)}")
    remarks = []
    if slow:
        remarks.append(f"activations quantized per channel run in float, quantize them per tensor: {_some(slow)}")
    if quantized and "SM75" in capabilities:
        shared = (
            ", and so do all GPUs that share its engine: give sm75 a target of its own" if len(capabilities) > 1 else ""
        )
        remarks.append(f"sm75 has no int8 kernels and runs quantized nodes in float{shared}")
    return remarks


def _is_constant(value: Any, depth: int = 8) -> bool:
    """Whether `value` follows from constants through a few nodes; a longer chain counts as not constant."""
    if isinstance(value, ir.Constant):
        return True
    return depth > 0 and bool(value.inputs) and all(_is_constant(v, depth - 1) for v in value.inputs[0].inputs)


def _check_interface(model: Model, title: str) -> None:
    """Refuse inputs and outputs that the engine would have in another type or rank than the model."""
    known = [ir.dtype_name(ir.numpy_dtype(dtype)) for dtype in DTYPES.values()]
    border = (*model.inputs, *model.outputs)
    if bad := [f"{spec.name!r} ({spec.dtype or 'no dense tensor'})" for spec in border if spec.dtype not in known]:
        raise UnsupportedModel(
            f"{title} cannot keep the type of {_some(bad)}; an engine takes {', '.join(known)}: "
            "cast inside the model, or build for ort"
        )
    if unranked := [repr(spec.name) for spec in model.inputs if spec.shape is None]:
        raise ShapeError(
            f"input {', '.join(unranked)} declares no rank, and TensorRT would take it for a scalar; "
            "export the model with its input shapes"
        )


# ------------------------------------------------------------------------------------------------------ shape ranges


@dataclass
class _Ranges:
    shapes: dict[str, ShapeRange] = field(default_factory=dict)  # by input: dynamic ones, and those that hold shapes
    values: set[str] = field(default_factory=set)  # inputs whose range is one of values
    assumed: list[str] = field(default_factory=list)  # inputs with a default in their range
    remarks: list[str] = field(default_factory=list)


def _ranges(network: Any, model: Model, given: Mapping[str, ShapeRange]) -> _Ranges:
    """The range of every input that needs one: as given, as another input's with the same symbol, or by default.

    Raises:
        ShapeError: a range contradicts the model or another range, or one is missing that has no default.
    """
    specs = {spec.name: spec for spec in model.inputs}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    result = _Ranges(values={tensor.name for tensor in tensors if tensor.is_shape_tensor})
    check_shapes(model, {name: wanted for name, wanted in given.items() if name not in result.values})
    symbols = _symbols(specs, {name: wanted for name, wanted in given.items() if name not in result.values})
    for tensor in tensors:
        name, dims = tensor.name, tuple(tensor.shape)
        wanted = given.get(name)
        if name in result.values:
            result.shapes[name] = _value_range(name, dims, wanted)
        elif wanted is not None:
            result.shapes[name] = wanted
        elif -1 in dims:
            declared = specs[name].shape or (None,) * len(dims)
            bounds, assumed = [], []
            for axis, dim in enumerate(dims):
                symbol = declared[axis]
                if dim != -1:
                    bounds.append((dim, dim, dim))
                elif isinstance(symbol, str) and symbol in symbols:
                    bounds.append(symbols[symbol][1])
                else:
                    bounds.append(usual_bounds(axis, len(dims)))
                    assumed.append(f"{axis} ({symbol})" if isinstance(symbol, str) else str(axis))
                    if isinstance(symbol, str):
                        symbols[symbol] = (name, bounds[-1])
            low, opt, high = zip(*bounds, strict=True)
            result.shapes[name] = ShapeRange(low, opt, high)
            if assumed:
                result.assumed.append(name)
                noun = "dimension" if len(assumed) == 1 else "dimensions"
                result.remarks.append(
                    f"input {name!r}: range {result.shapes[name]} taken, by default in {noun} {', '.join(assumed)}; "
                    f'set it with --shape "{name}=MIN:OPT:MAX"'
                )
    return result


def _symbols(
    specs: Mapping[str, TensorSpec], given: Mapping[str, ShapeRange]
) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Symbol -> (the input that fixes it, its range); the ranges given must agree on every symbol."""
    symbols: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for name, wanted in given.items():
        for axis, dim in enumerate(specs[name].shape or ()):
            if not isinstance(dim, str):
                continue
            bounds = (wanted.min[axis], wanted.opt[axis], wanted.max[axis])
            other, known = symbols.setdefault(dim, (name, bounds))
            if known != bounds:
                raise ShapeError(
                    f"shapes of {other!r} and {name!r} disagree on dimension {dim!r}, which the model says is one: "
                    f"{':'.join(map(str, known))} and {':'.join(map(str, bounds))}; give both the same"
                )
    return symbols


def _value_range(name: str, dims: tuple[int, ...], wanted: ShapeRange | None) -> ShapeRange:
    count = int(np.prod(dims, dtype=np.int64))
    example = "x".join(["2"] * count)
    if wanted is None:
        raise ShapeError(
            f"input {name!r} holds a shape, and TensorRT needs the range of its {count} values: "
            f'give --shape "{name}=MIN:OPT:MAX" with values in place of dimensions, as in {name}={example}'
        )
    if len(wanted.opt) != count:
        raise ShapeError(
            f"shape for {name!r}: it holds {count} values that are a shape, so the range has {count} numbers as in "
            f"{example}, not {len(wanted.opt)}"
        )
    return wanted


def _add_profile(builder: Any, network: Any, config: Any, ranges: _Ranges, log: _Log) -> None:
    if not ranges.shapes:
        return
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        wanted = ranges.shapes.get(tensor.name)
        if wanted is None:
            continue
        if tensor.name in ranges.values:
            profile.set_shape_input(tensor.name, wanted.min, wanted.opt, wanted.max)
        else:
            profile.set_shape(tensor.name, wanted.min, wanted.opt, wanted.max)
    if config.add_optimization_profile(profile) < 0:
        shown = ", ".join(f"{name}={wanted}" for name, wanted in ranges.shapes.items())
        raise ShapeError(f"TensorRT refuses the shapes {shown}: {log.first()}")


# --------------------------------------------------------------------------------------------------------- the build


@dataclass
class _Built:
    plan: Any  # trt.IHostMemory
    ranges: _Ranges
    layers: int
    seconds: float
    remarks: list[str]
    timings: Any  # serialized timing cache; None where there is none


def _compile(
    trt: Any,
    flavor: Flavor,
    title: str,
    log: _Log,
    model: Model,
    capabilities: Sequence[str],
    options: BuildOptions,
    monitor: _Monitor,
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
            raise UnsupportedModel(_refusal(parser, log, model, title))
        ranges = _ranges(network, model, options.shapes)
        remarks: list[str] = []
        _configure(trt, config, options)
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
        _add_profile(builder, network, config, ranges, log)
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
        raise _failure(log, title, ranges)
    monitor.report("Built", 1.0)
    return _Built(plan, ranges, network.num_layers, seconds, remarks, cache and cache.serialize())


def _settle(trt: Any) -> None:
    """Build and drop a network of one layer.

    After a failed build RTX 1.7.1 compiles the next engine of the process, in whatever thread, for the GPUs of the
    failed one: after one that failed for sm75, the next, for sm89, had float convolutions in place of int8. A test
    reproduces it.
    """
    builder = trt.Builder(_log(trt).logger)
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


class _Log:
    """What TensorRT says: errors for our messages, the list of kernels, warnings on to `logging`, each once.

    There is one for all builders and sessions of a process, since TensorRT ignores a second logger while an object with
    the first one lives.
    """

    def __init__(self, trt: Any) -> None:
        self.logger = self._attach(trt)
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.errors: list[str] = []
        self.inconsistent: list[str] = []  # shapes that the network cannot be computed with; TensorRT only warns
        self.layers = ""
        self._said: set[str] = set()

    def _attach(self, trt: Any) -> Any:
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity == trt.ILogger.VERBOSE:
                    if message.startswith("Layers:"):
                        log.layers = message
                elif severity == trt.ILogger.WARNING:
                    log.warn(message)
                elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    log.errors.append(message)

        return Logger()

    def warn(self, message: str) -> None:
        if re.search(r"Profile k(MIN|OPT|MAX) values are not self-consistent", message):
            self.inconsistent.append(message)
        elif message not in self._said and "has Int64 binding" not in message:  # that one comes for every int64 input
            self._said.add(message)
            _LOG.warning("%s", _clean(message))

    def first(self) -> str:
        """The first error that says something, cleaned."""
        for message in self.errors:
            if "ModelImporter.cpp" not in message and (text := _clean(message)):
                return text
        return "no reason given"


_LOGS: Final[dict[Any, _Log]] = {}  # by ILogger class, which stands for the runtime


def _log(trt: Any) -> _Log:
    if trt.ILogger not in _LOGS:
        _LOGS[trt.ILogger] = _Log(trt)
    return _LOGS[trt.ILogger]


class _Monitor:
    """Nested phases of a build -> one share that only grows. Kept from raising inside native code."""

    def __init__(self, progress: Progress | None, target: Target) -> None:
        self.progress = progress
        self.target = target
        self.cancelled = False
        self.failure: Exception | None = None
        self._spans: dict[str, tuple[float, float, int]] = {}  # phase -> share at its start, share it covers, steps
        self._done: dict[str, int] = {}
        self._share = 0.0
        self._lock = threading.Lock()  # phases run in several threads

    def report(self, phase: str, share: float) -> bool:
        """Tell the caller; False once it has cancelled."""
        self._share = max(self._share, min(share, 1.0))
        isolation.progress()
        if self.progress is not None and not self.cancelled:
            try:
                self.cancelled = not self.progress(phase, self._share)
            except Exception as error:
                self.failure, self.cancelled = error, True
        return not self.cancelled

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            low, width = 0.0, 1.0
            if parent in self._spans:
                low, width, count = self._spans[parent]
                width /= count
                low += width * min(self._done[parent], count - 1)
            self._spans[phase] = (low, width, max(steps, 1))
            self._done[phase] = 0

    def step(self, phase: str, step: int) -> bool:
        with self._lock:
            low, width, count = self._spans.get(phase, (self._share, 0.0, 1))
            self._done[phase] = step + 1
            return self.report(phase, low + width * min(step + 1, count) / count)

    def attach(self, trt: Any) -> Any:
        """A trt.IProgressMonitor that reports here."""
        monitor = self

        class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                monitor.start(phase_name, parent_phase, num_steps)

            def phase_finish(self, phase_name: str) -> None:
                return None

            def step_complete(self, phase_name: str, step: int) -> bool:
                return monitor.step(phase_name, step)

        return ProgressMonitor()

    def check(self) -> None:
        """Raise what the caller's function raised, or that it cancelled."""
        if self.failure is not None:
            raise self.failure
        if self.cancelled:
            raise UserError(f"the build for {self.target} was cancelled; nothing was written")


# ---------------------------------------------------------------------------------------------- errors in our words


def _clean(text: str) -> str:
    """TensorRT's message without source places, error codes and the ``cudaError 35`` of every machine without a GPU."""
    noise = re.compile("catchCudaError|^Invalid Node - ")
    lines = [line for line in text.splitlines() if not noise.search(line)]
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"^\w+\.cpp:\d+: ", "", text)
    text = re.sub(r"^\w+::\w+: ", "", text)
    text = re.sub(r"^Error Code \d+: [\w ]+ \((.*)\)$", r"\1", text)
    text = re.sub(r"^Myelin \((.*)\)$", r"\1", text)
    text = re.sub(r"\[\w+\.(cpp|h):\d+: [^]]*\] *", "", text)
    text = re.sub(r"MyelinCheckException: \w+\.cpp:\d+: ", "", text)
    text = re.sub(r"\s*In \w+ at \S+?:\d+", "", text)
    text = re.sub(r"\s*\(cudaError \d+: ([^)]*)\)", r"\1", text)
    text = re.sub(r"^Assertion failed: .*? && \"(.*)\"\.?$", r"\1", text)
    text = re.sub(r"^Assertion failed: .*?[^:]: (.*)$", r"\1", text)
    return text.strip(" .")


def _some(items: Sequence[str]) -> str:
    """Up to ten items, and how many more there are."""
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def _grouped(reasons: Mapping[str, Sequence[str]]) -> str:
    """Up to ten places by reason, and how many more there are."""
    left, parts = LISTED, []
    for reason, places in reasons.items():
        if left > 0:
            parts.append(f"{', '.join(places[:left])}: {reason}")
        left -= len(places)
    return "; ".join(parts) + (f"; and {-left} more" if left < 0 else "")


def _shown(node: ir.Node) -> str:
    """How to name a node that may have no name."""
    return (
        repr(node.name)
        if node.name
        else f"unnamed node of {node.outputs[0].name!r}"
        if node.outputs
        else "unnamed node"
    )


def _parser_name(node: ir.Node) -> str:
    """The name that TensorRT's parser gives a node."""
    return node.name or next((f"node_of_{value.name}" for value in node.outputs if value.name), "")


def _origins(model: Model) -> dict[str, tuple[str, ...]]:
    """Name in TensorRT -> names of the ONNX nodes of the loaded model."""
    return {name: node.origin or (name,) for node in model.nodes() if (name := _parser_name(node))}


def _refusal(parser: Any, log: _Log, model: Model, title: str) -> str:
    """All that the parser refused, grouped by reason."""
    top = list(model.graph.nodes)
    by_name = {_parser_name(node): node for node in model.nodes()}
    reasons: dict[str, list[str]] = {}
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        op, stack = fault.node_operator(), fault.local_function_stack()
        node = by_name.get(fault.node_name())
        if node is None and not stack and 0 <= fault.node() < len(top) and top[fault.node()].op == op:
            node = top[fault.node()]
        name = _shown(node) if node is not None else repr(fault.node_name()) if fault.node_name() else "unnamed node"
        where = f"{name} ({op})" if fault.node() >= 0 else "the model"
        if node is not None and node.origin not in ((), (node.name,), (node.outputs[0].name,)):
            where += f" from {', '.join(map(repr, node.origin))}"
        if stack:
            where += f" in {' > '.join(stack)}"
        reasons.setdefault(_reason(fault.desc()), []).append(where)
    if not reasons:
        return f"{title} cannot read the model: {log.first()}"
    noun = "1 node" if parser.num_errors == 1 else f"{parser.num_errors} nodes"
    return f"{title} cannot take {noun}: {_grouped(reasons)}\nreplace or remove them, or build for ort"


def _reason(described: str) -> str:
    if described == "false":
        return "not supported"
    if "must resolve to a build-time constant" in described:
        return "an input that must be constant is computed: run fold-constants first"
    if "Plugin not found" in described or "was not found in plugin registry" in described:
        return "no importer or plugin for this operator"
    return _clean(described) or "refused without a reason"


def _failure(log: _Log, title: str, ranges: _Ranges) -> UserError:
    """Why the builder made no engine (or one that fails for shapes it was asked to take), and what to do."""
    text = _clean(log.inconsistent[0]) if log.inconsistent else log.first()
    shown = " ".join(f'"{name}={wanted}"' for name, wanted in ranges.shapes.items())
    guessed = ", ".join(map(repr, ranges.assumed))
    assumed = f"; {guessed} got defaults: give --shape NAME=MIN:OPT:MAX" if guessed else ""
    if end := re.search(r"k(MIN|OPT|MAX) values .*?(?:self-consistent\. |shape constraints: )(.*)", text):
        why = re.sub(r" (Condition|Instruction:) .*", "", end[2]).strip(" .")
        return ShapeError(f"the model cannot be computed at the {end[1].lower()} of --shape {shown}: {why}{assumed}")
    if "FP32 GEMM is not supported" in text:
        node = re.search(r"operation '([^']*)'", text)
        where = f" (node {node[1].removeprefix('node_of_')!r})" if node else ""
        return UnsupportedModel(
            f"{title} has no float32 MatMul or Gemm for sm75{where}: convert the model to float16, or leave sm75 out"
        )
    if "workspace" in text:
        return UnsupportedModel(f"{title} built no engine: {text}; raise the workspace limit, or leave it out")
    if re.search(r"out of memory|OutOfMemory|bad_alloc", text, re.IGNORECASE):
        return UnsupportedModel(f"{title} ran out of memory: {text}; lower the largest shapes, or use a larger machine")
    if re.search(r"CUDA_SUCCESS|CUDA driver|cudaError", text):
        return BackendUnavailable(
            f"{title} needs an NVIDIA driver for this build: {text}; build on a machine with a GPU"
        )
    return UnsupportedModel(f"{title} built no engine: {text}{assumed}; or build for ort")


# ----------------------------------------------------------------------------------------------------------- kernels

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: [^,]*, Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*?, StreamId: \d+.*?, Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"Datatype: ([^,}\]]+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\x1f]|$)")


def _traced(metadata: str, origins: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    names = _ONNX_LAYER.findall(metadata.strip())
    return tuple(dict.fromkeys(origin for name in names for origin in origins.get(name, (name,))))


def _kernels(layers: str, origins: Mapping[str, tuple[str, ...]]) -> tuple[Kernel, ...]:
    """Kernels from ``Layers:`` in the RTX builder's log; shape calls and jumps, which have no outputs, are none."""
    found = []
    for line in layers.splitlines():
        match = _LAYER.match(line.removeprefix("Layers:").strip())
        if match and match["outputs"]:
            inputs, constants, outputs = (
                tuple(_DATATYPE.findall(match[part])) for part in ("inputs", "constants", "outputs")
            )
            found.append(Kernel(match["name"], inputs, constants, outputs, _traced(match["metadata"], origins)))
    return tuple(found)


def _inspected(trt: Any, log: _Log, plan: Any, origins: Mapping[str, tuple[str, ...]]) -> tuple[Kernel, ...]:
    """Kernels from the engine inspector, which needs a GPU; () where the engine does not say."""
    loader = trt.Runtime(log.logger)
    engine = loader.deserialize_cuda_engine(plan)
    if engine is None:
        return ()
    inspector = engine.create_engine_inspector()
    return _from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), origins)


def _from_inspector(text: str, origins: Mapping[str, tuple[str, ...]]) -> tuple[Kernel, ...]:
    """Read the inspector's JSON.

    Datatypes are "Format/Datatype" in TensorRT 10 and "Datatype" later; that 10 says "Bindings" where 11 says
    "I/O Tensors" does not matter here, since kernels stand under "Layers" in both.
    """
    found = []
    for entry in json.loads(text).get("Layers", []):
        if isinstance(entry, str):  # an engine built with less verbosity
            found.append(Kernel(entry, (), (), ()))
            continue
        inputs, constants, outputs = (
            tuple(str(value.get("Datatype", value.get("Format/Datatype", "?"))) for value in entry.get(part) or ())
            for part in ("Inputs", "Constants", "Outputs")
        )
        traced = _traced(str(entry.get("Metadata", "")), origins)
        found.append(Kernel(str(entry.get("Name", "?")), inputs, constants, outputs, traced))
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------- running


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidModel(f"cannot read engine {str(path)!r}: {reason}; build the bundle again") from None
