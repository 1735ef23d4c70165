"""The kernels of an engine, traced to the ONNX nodes that they compute."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from graphopt.backend import Kernel
from graphopt.backends._tensorrt_log import Log

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: [^,]*, Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*?, StreamId: \d+.*?, Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"Datatype: ([^,}\]]+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\x1f]|$)")


def _traced(metadata: str, origins: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    names = _ONNX_LAYER.findall(metadata.strip())
    return tuple(dict.fromkeys(origin for name in names for origin in origins.get(name, (name,))))


def logged_kernels(layers: str, origins: Mapping[str, tuple[str, ...]]) -> tuple[Kernel, ...]:
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


def inspected_kernels(trt: Any, log: Log, plan: Any, origins: Mapping[str, tuple[str, ...]]) -> tuple[Kernel, ...]:
    """Kernels from the engine inspector, which needs a GPU; () where the engine does not say."""
    loader = trt.Runtime(log.logger)
    engine = loader.deserialize_cuda_engine(plan)
    if engine is None:
        return ()
    inspector = engine.create_engine_inspector()
    return from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), origins)


def from_inspector(text: str, origins: Mapping[str, tuple[str, ...]]) -> tuple[Kernel, ...]:
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
