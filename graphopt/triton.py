"""Model repositories of the NVIDIA Triton Inference Server, from bundles.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/1/model.onnx or model.plan

Triton adds the batch dimension by itself where ``max_batch_size`` is above 0, and then wants the other dimensions only. A model
is batched when the first dimension of every input and output is dynamic and, where the model names it, the same; how far it goes says the
shape profile of the bundle.

Format: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from graphopt.backend import ShapeRange
from graphopt.bundle import Bundle, Variant
from graphopt.errors import BackendUnavailable, InvalidModel, UnsupportedModel, UsageError
from graphopt.ir import TensorSpec
from graphopt.staging import staged_folder
from graphopt.target import Target

DTYPES: Final = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    "string": "TYPE_STRING",
}
_PLATFORMS: Final = {"ort": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan"), "tensorrt-rtx": ("tensorrt_plan", "model.plan")}  # fmt: skip
_NAME: Final = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_BATCH: Final = 32  # where no profile says how far a batch goes


@dataclass(frozen=True)
class Written:
    """One model of a repository."""

    folder: Path
    target: str
    platform: str
    max_batch: int  # 0: not batched by Triton
    remarks: tuple[str, ...] = ()


def export(
    bundle: Bundle,
    repository: Path,
    *,
    name: str | None = None,
    target: str | None = None,
    max_batch: int | None = None,
) -> list[Written]:
    """Write the variants of `bundle` into a model repository; a model of the same name there is replaced.

    Args:
        bundle: what to export; its files are checked against their digests.
        repository: the folder that tritonserver is given as ``--model-repository``; made where it is missing.
        name: of the model in Triton; default: that of the model's file. Several variants get their runtime behind it.
        target: this variant only; needed for engines of TensorRT for RTX, which Triton's own TensorRT backend does not load.
        max_batch: largest batch, 0 where the first dimension counts no samples; default: as the shape profile says, else 32.

    Raises:
        InvalidModel: files of the bundle are missing or damaged.
        UnsupportedModel: an input or output has a type or shape that Triton does not have.
        UsageError: the name or the batch does not fit.
        OutputError: the place cannot be written.
    """
    if damaged := bundle.damaged():
        raise InvalidModel(
            f"bundle {str(bundle.folder)!r}: {', '.join(map(repr, damaged))} is missing or damaged; build the bundle again"
        )
    name = name if name is not None else _default_name(bundle)
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"Triton takes no model named {name!r}; give a name of letters, digits, '_', '-' and '.': --name"
        )
    chosen = _chosen(bundle, target)
    written = []
    for variant in chosen:
        full = name if len(chosen) == 1 else f"{name}-{_slug(variant.target)}"
        written.append(_write(bundle, variant, repository, full, max_batch))
    return written


def _default_name(bundle: Bundle) -> str:
    files = bundle.manifest.get("build", {}).get("files", ())
    stem = next((Path(f["name"]).stem for f in files if f["role"] == "model"), bundle.folder.resolve().name)
    return re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII).strip("_.-") or "model"


def _chosen(bundle: Bundle, target: str | None) -> list[Variant]:
    if target is not None:
        wanted = Target.parse(target)
        chosen = [v for v in bundle.variants if wanted in (v.target, Target(v.target.runtime))]
    else:
        chosen = [v for v in bundle.variants if v.target.runtime != "tensorrt-rtx"]
    if not chosen:
        here = ", ".join(str(v.target) for v in bundle.variants)
        told = (
            ""
            if target is not None
            else "; its engines are of TensorRT for RTX: name one with --target if your Triton loads those"
        )
        raise BackendUnavailable(
            f"{str(bundle.folder)!r} holds no variant for {'Triton' if target is None else repr(target)}; it has {here}{told}"
        )
    return chosen


def _slug(target: Target) -> str:
    return re.sub(r"[^\w.]+", "-", str(target), flags=re.ASCII)


def _write(bundle: Bundle, variant: Variant, repository: Path, name: str, max_batch: int | None) -> Written:
    platform, file = _PLATFORMS[variant.target.runtime]
    shapes = _profile(bundle, variant)
    batch, remarks = _batch(bundle, variant, shapes, max_batch)
    text = config(name, variant.target, bundle.inputs, bundle.outputs, batch, _preferred(bundle, shapes, batch))
    if variant.target.runtime == "tensorrt-rtx":
        remarks = (*remarks, "Triton's own TensorRT backend loads engines of enterprise TensorRT only; this one needs a backend built with TensorRT for RTX")  # fmt: skip
    place = repository / name
    with staged_folder(place, marker="config.pbtxt", what="model") as folder:
        (folder / "1").mkdir()
        (folder / "config.pbtxt").write_text(text, encoding="utf-8")
        shutil.copyfile(bundle.folder / variant.files[0], folder / "1" / file)
        for other in variant.files[1:]:  # external data, which the model knows by this name
            shutil.copyfile(bundle.folder / other, folder / "1" / other)
    return Written(place, str(variant.target), platform, batch, remarks)


def _profile(bundle: Bundle, variant: Variant) -> Mapping[str, ShapeRange]:
    """The shape ranges of a variant, or those of another where it has none: ONNX Runtime needs no profile, engines do."""
    candidates = [variant, *bundle.variants]
    return next((v.shapes for v in candidates if v.shapes), {})


def is_batched(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether the first dimension of all inputs and outputs is one dynamic dimension, as far as the model tells."""
    shapes = [spec.shape for spec in (*inputs, *outputs)]
    if not inputs or any(not shape or isinstance(shape[0], int) for shape in shapes):
        return False
    return len({shape[0] for shape in shapes if shape and shape[0] is not None}) <= 1


def _batch(
    bundle: Bundle, variant: Variant, shapes: Mapping[str, ShapeRange], asked: int | None
) -> tuple[int, tuple[str, ...]]:
    """``max_batch_size``, and what to say of it."""
    if asked == 0:
        return 0, ()
    if not is_batched(bundle.inputs, bundle.outputs):
        if asked:
            raise UsageError(
                "--max-batch: the first dimension of the inputs and outputs is not one dynamic dimension; leave it out"
            )
        return 0, ()
    ranges = [shapes[s.name] for s in bundle.inputs if s.name in shapes and shapes[s.name].max]
    largest = min((r.max[0] for r in ranges), default=None)
    if asked is not None:
        engine = variant.target.runtime != "ort"
        if engine and largest is not None and asked > largest:
            raise UsageError(
                f"--max-batch {asked}: the engine for {variant.target} takes batches up to {largest}; build it with another --shape"
            )
        return asked, ()
    if any(r.min[0] > 1 for r in ranges):
        return 0, (
            "its profile takes no batch of 1, so that Triton cannot form batches; the client must send whole ones",
        )
    if largest is None:
        return _BATCH, (f"no shape profile says how large a batch may be; {_BATCH} taken, set it with --max-batch",)
    return largest, ()


def _preferred(bundle: Bundle, shapes: Mapping[str, ShapeRange], batch: int) -> int | None:
    """The batch that the engine is tuned for."""
    tuned = next((shapes[s.name].opt[0] for s in bundle.inputs if s.name in shapes and shapes[s.name].opt), None)
    return tuned if tuned is not None and 1 < tuned <= batch else None


def config(
    name: str,
    target: Target,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_batch: int,
    preferred: int | None = None,
) -> str:
    """The text of a ``config.pbtxt``.

    Args:
        name: of the model.
        target: decides platform and instance group.
        inputs: with all dimensions, the batch included.
        outputs: likewise.
        max_batch: 0 for no batching by Triton.
        preferred: a batch that the dynamic batcher tries to form.

    Raises:
        UnsupportedModel: a type or shape that Triton does not have.
    """
    lines = [f"name: {_quoted(name)}", f'platform: "{_PLATFORMS[target.runtime][0]}"', f"max_batch_size: {max_batch}"]
    for field, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            lines += [f"{field} {{", *(f"  {line}" for line in _tensor(spec, max_batch > 0)), "}"]
    if max_batch > 1:
        body = f" preferred_batch_size: [ {preferred} ] " if preferred else " "
        lines.append(f"dynamic_batching {{{body}}}")
    cpu = target.runtime == "ort" and (not target.device or target.device.lower().startswith("cpu"))
    lines.append(f"instance_group {{ count: 1 kind: {'KIND_CPU' if cpu else 'KIND_GPU'} }}")
    return "\n".join(lines) + "\n"


def _tensor(spec: TensorSpec, batched: bool) -> list[str]:
    if spec.dtype not in DTYPES:
        raise UnsupportedModel(
            f"Triton has no type for {spec.name!r} ({spec.dtype or 'no dense tensor'}); cast it inside the model"
        )
    if spec.shape is None:
        raise UnsupportedModel(
            f"Triton wants the rank of {spec.name!r}, which the model does not tell; export it with shapes"
        )
    dims = [d if isinstance(d, int) else -1 for d in (spec.shape[1:] if batched else spec.shape)]
    if 0 in dims:
        raise UnsupportedModel(f"Triton has no dimensions of size 0, and {spec.name!r} is {spec}")
    lines = [
        f"name: {_quoted(spec.name)}",
        f"data_type: {DTYPES[spec.dtype]}",
        f"dims: [ {', '.join(map(str, dims or [1]))} ]",
    ]
    return lines if dims else [*lines, "reshape { shape: [ ] }"]  # Triton has no scalars


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    if text.isprintable():
        return json.dumps(text, ensure_ascii=False)
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'
