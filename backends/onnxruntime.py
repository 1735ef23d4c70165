"""ONNX Runtime sessions: the CPU by default, any execution provider by name.

The model written is portable ONNX: nothing of the machine that built it is in it, and ONNX Runtime's own optimizations happen when
the session is opened. Plug-in providers (packages named ``onnxruntime-ep-*``, which offer ``get_library_path``) are found
and registered when installed.

API: https://onnxruntime.ai/docs/api/python/api_summary.html
Plug-ins: https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/packaging.html
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from graphopt import isolation, ort_values, verify
from graphopt.backend import Arrays, Artifact, Availability, Backend, BuildOptions, Progress, Session, check_shapes
from graphopt.equivalence import check_feeds
from graphopt.errors import BackendUnavailable, InvalidModel, UnknownTarget, UnsupportedModel, UsageError
from graphopt.ir import Model, TensorSpec, save
from graphopt.target import Target

log = logging.getLogger(__name__)

_CPU: Final = "CPUExecutionProvider"
_LEVELS: Final = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_INSTALL: Final = "pip install onnxruntime (CPU) or, in its place, onnxruntime-gpu (CUDA)"


class OnnxRuntime(Backend):
    """Writes portable ONNX and opens it with the provider that the target names."""

    runtimes: ClassVar[tuple[str, ...]] = ("ort",)
    reads: ClassVar[frozenset[str]] = frozenset(["shapes", "threads", "spinning", "graph_level"])

    def availability(self, runtime: str) -> Availability:
        """Always buildable and runnable where onnxruntime imports; `devices` lists the providers."""
        try:
            ort = _ort()
        except BackendUnavailable as error:
            return Availability(None, str(error), str(error))
        providers = [*ort.get_available_providers(), *_plugins()]
        return Availability(ort.__version__, devices=tuple(dict.fromkeys(providers)))

    def emit(
        self, model: Model, target: Target, folder: Path, options: BuildOptions, progress: Progress | None = None
    ) -> Artifact:
        """Write the model, check it with onnx.checker and load it once."""
        ort = _ort()
        check_shapes(model, options.shapes)
        _level(options)
        name = f"ort-{target.device or 'cpu'}.onnx"
        files = [path.name for path in save(model, folder / name)]
        remarks: list[str] = []
        try:
            verify.full(model)
        except InvalidModel as error:
            if not any(n.domain not in (None, "", "ai.onnx") for n in model.nodes()):
                raise
            remarks.append(f"holds operators that onnx.checker does not know: {error}")
        try:
            self.open(folder, Artifact(tuple(files), {}), target, options).close()
        except BackendUnavailable as error:
            remarks.append(f"not loaded here: {error}")
        return Artifact(tuple(files), {"onnxruntime": ort.__version__}, options.shapes, remarks=tuple(remarks))

    def open(self, folder: Path, artifact: Artifact, target: Target, options: BuildOptions) -> Session:
        """Create the session on the provider that the target names."""
        return OrtSession(folder / artifact.files[0], target, options)


class OrtSession(Session):
    """One loaded model."""

    def __init__(self, path: Path, target: Target, options: BuildOptions) -> None:
        """Load `path`.

        Raises:
            BackendUnavailable: the provider is not here.
            UnsupportedModel: ONNX Runtime refuses the model.
        """
        ort = _ort()
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # errors come as exceptions; printed as well, they would be told twice
        settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[_level(options)])
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        if not options.spinning:
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted, providers = _select(target, settings)
        title = f"ONNX Runtime {ort.__version__}"
        try:
            with isolation.step(f"ONNX Runtime: loading {path.name!r}"):
                self._session = ort.InferenceSession(str(path), settings, enable_fallback=False, **providers)
        except Exception as error:
            raise UnsupportedModel(f"{title} refuses {path.name!r}: {_reason(error)}; {_advice(error)}") from None
        if wanted not in self._session.get_providers():  # ONNX Runtime goes on without a provider that does not start
            raise BackendUnavailable(
                f"{title}: {wanted} does not start here; check its driver and libraries, or build for ort:cpu"
            )
        self.inputs = [_spec(v) for v in self._session.get_inputs()]
        self.outputs = [_spec(v) for v in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
        """Compute all outputs, by name."""
        check_feeds(self.inputs, feeds)
        try:
            with isolation.step("ONNX Runtime: running the model"):
                values = ort_values.run(self._session, feeds)
        except Exception as error:
            raise UsageError(f"ONNX Runtime failed on these inputs: {_reason(error)}") from None
        return dict(zip((s.name for s in self.outputs), values, strict=True))


def _reason(error: Exception) -> str:
    """ONNX Runtime's words without its codes and source places."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"\S+\.(cc|h):\d+ (\S*\([^()]*\)|[^ (]+ [^ (]*\([^()]*\)|\S+) ", "", text)
    return " ".join(text.split())[:400].strip(" .:")


def _advice(error: Exception) -> str:
    if re.search(r"opset|IR version", str(error)):
        return "upgrade onnxruntime, or convert the model down with onnx.version_converter"
    if "INVALID_PROTOBUF" in str(error):
        return "export or copy the model again"
    return "run graphopt inspect on it, or export it anew"


def _ort() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except Exception as error:  # a broken native library raises more than ImportError
        raise BackendUnavailable(f"onnxruntime cannot be imported ({error}); {_INSTALL}") from None


def _level(options: BuildOptions) -> str:
    level = options.graph_level or "all"
    if level not in _LEVELS:
        raise UsageError(f"graph level {level!r} is none of {', '.join(_LEVELS)}")
    return level


def _spec(value: Any) -> TensorSpec:
    """ONNX Runtime's description, ``tensor(float)``, as a TensorSpec."""
    dtype = ort_values.dtype_of(value.type)
    if dtype is None:
        return TensorSpec(value.name, None, None)
    return TensorSpec(value.name, dtype, tuple(d if isinstance(d, int | str) else None for d in value.shape))


@functools.cache
def _plugins() -> dict[str, list[Any]]:
    """Provider name -> its devices, of installed plug-in packages; each library is registered once a process."""
    ort = _ort()
    register = getattr(ort, "register_execution_provider_library", None)
    if register is None:
        return {}
    for distribution in importlib.metadata.distributions():
        package = (distribution.name or "").lower()
        if not package.startswith("onnxruntime-ep-"):
            continue
        try:
            module = importlib.import_module(package.replace("-", "_"))
            register(package, module.get_library_path())
        except Exception as error:  # a plug-in for other hardware must not take the CPU away
            log.warning("plug-in provider %s cannot be registered: %s", package, error)
    found: dict[str, list[Any]] = {}
    for device in ort.get_ep_devices():
        if device.ep_name not in ort.get_available_providers():
            found.setdefault(device.ep_name, []).append(device)
    return found


def _select(target: Target, settings: Any) -> tuple[str, dict[str, Any]]:
    """The provider of `target`, and the arguments that make a session use it; a plug-in goes into `settings`.

    Raises:
        UnknownTarget: no provider of that name exists here, and it is none that ONNX Runtime has elsewhere.
        BackendUnavailable: the provider exists elsewhere.
    """
    ort = _ort()
    device = target.device or "cpu"
    wanted = device.lower().removesuffix("executionprovider")
    if wanted == "cpu" or wanted.startswith("cpu-"):
        return _CPU, {"providers": [_CPU]}
    for name in ort.get_available_providers():
        if name.lower().removesuffix("executionprovider") == wanted:
            return name, {"providers": [name, _CPU]}
    for name, devices in _plugins().items():
        if name.lower().removesuffix("executionprovider") == wanted:
            settings.add_provider_for_devices(devices, {})
            return name, {}
    known = [n.lower().removesuffix("executionprovider") for n in ort.get_all_providers()]
    here = ", ".join(n.removesuffix("ExecutionProvider").lower() for n in [*ort.get_available_providers(), *_plugins()])
    if wanted in known:
        raise BackendUnavailable(
            f"provider {device!r} is not in this onnxruntime ({ort.__version__}); here are: {here}. "
            "For cuda and tensorrt: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    raise UnknownTarget(f"target {str(target)!r}: no execution provider {device!r}; here are: {here}")
