"""Train the four digits networks and export each in both torch dialects.

    python models/train.py [--only NAME] [--out DIR]

Needs `pip install torch==2.13.0 scikit-learn onnx onnxscript onnxruntime numpy`. This is the only file of the project
that imports torch. Everything is seeded and runs on one thread: the same packages on the same kind of processor give
the same files, byte for byte; another processor may round differently and land one or two test images elsewhere.

The exports are deliberately left untidy, as users' own files are: `legacy` keeps the exporter's shape arithmetic,
Constant nodes and unfused BatchNormalization, `dynamo` is taken with `optimize=False`.
"""

# mypy: disable-error-code="import-not-found, import-untyped", allow-subclassing-any, allow-untyped-calls
# torch and scikit-learn are not in the project's own environment, where they are Any.

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

SEED = 0
TEST_IMAGES = 597
CALIBRATION_IMAGES = 128
BATCH = 32  # training images per step
CHECKED_BATCHES = (1, 2, 7, TEST_IMAGES)
LEGACY_OPSET = 17  # the last one torch's TorchScript exporter was written for
DYNAMO_OPSET = 20  # has Gelu as one operator

Tensor = Any  # torch.Tensor
Digits = dict[str, Any]  # array by its name in digits.npz


# --- data -----------------------------------------------------------------------------------------------------------


def load_split() -> Digits:
    """The digits, split by class: 1,200 to train on, 128 of those again for calibration, 597 to test on."""
    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    y = bunch.target.astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_IMAGES, stratify=y, random_state=SEED)
    _, x_calib, _, y_calib = train_test_split(
        x_train, y_train, test_size=CALIBRATION_IMAGES, stratify=y_train, random_state=SEED
    )
    return {
        "x_train": x_train, "y_train": y_train,
        "x_calib": x_calib, "y_calib": y_calib,
        "x_test": x_test, "y_test": y_test,
    }  # fmt: skip


# --- networks -------------------------------------------------------------------------------------------------------


class ConvBN(nn.Sequential):
    """Convolution without bias, BatchNorm, and an optional activation."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None
    ) -> None:
        conv = nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(cout), *([] if act is None else [act]))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(cin, cout, stride=stride, act=nn.ReLU())
        self.conv2 = ConvBN(cout, cout)
        same = stride == 1 and cin == cout
        self.shortcut = nn.Identity() if same else ConvBN(cin, cout, kernel=1, stride=stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum, then ReLU."""
        return self.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-14: three stages of two basic blocks at 8x8, 4x4 and 2x2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 16, act=nn.ReLU())
        self.stage1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.stage2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1))
        self.stage3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Ten logits per image."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1x1, depthwise 3x3, project 1x1 without activation."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        self.residual = stride == 1 and cin == cout
        self.expand = ConvBN(cin, hidden, kernel=1, act=nn.ReLU6())
        self.depthwise = ConvBN(hidden, hidden, stride=stride, groups=hidden, act=nn.ReLU6())
        self.project = ConvBN(hidden, cout, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """The block, added to its input where the shapes agree."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """MobileNetV2 in miniature: five inverted residuals with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 16, act=nn.ReLU6())
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 1, expand=2),
            InvertedResidual(16, 24, 2, expand=3),
            InvertedResidual(24, 24, 1, expand=3),
            InvertedResidual(24, 32, 2, expand=3),
            InvertedResidual(32, 32, 1, expand=2),
        )
        self.head = ConvBN(32, 64, kernel=1, act=nn.ReLU6())
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Ten logits per image; the pooling is a mean, which exports as ReduceMean."""
        return self.fc(self.head(self.blocks(self.stem(x))).mean([2, 3]))


class ShuffleUnit(nn.Module):
    """ShuffleNet's residual unit: grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.reduce = ConvBN(channels, channels, kernel=1, groups=groups, act=nn.ReLU())
        self.depthwise = ConvBN(channels, channels, groups=channels)
        self.expand = ConvBN(channels, channels, kernel=1, groups=groups)
        self.relu = nn.ReLU()

    def shuffle(self, x: Tensor) -> Tensor:
        """Interleave the groups' channels, so that the next grouped convolution sees all of them."""
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum, then ReLU."""
        return self.relu(x + self.expand(self.depthwise(self.shuffle(self.reduce(x)))))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The gated input."""
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(self.pool(x)))))


class Inception(nn.Module):
    """Four branches, joined by channel: 1x1, 3x3, grouped 3x3 and pooled 1x1; a quarter of the output each."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        part = cout // 4
        self.point = ConvBN(cin, part, kernel=1, act=nn.ReLU())
        self.full = ConvBN(cin, part, act=nn.ReLU())
        self.grouped = ConvBN(cin, part, groups=4, act=nn.ReLU())
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvBN(cin, part, kernel=1, act=nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        """The branches' concatenation."""
        return torch.cat([self.point(x), self.full(x), self.grouped(x), self.pooled(x)], 1)


class Concat(nn.Module):
    """Everything that couples channels in awkward ways: concat, groups, shuffle, gates, and flatten into Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 24, act=nn.ReLU())
        self.mix1 = Inception(24, 48)
        self.shuffle1 = ShuffleUnit(48, groups=3)
        self.gate1 = SqueezeExcite(48, 12)
        self.down = nn.AvgPool2d(2)
        self.mix2 = Inception(48, 64)
        self.shuffle2 = ShuffleUnit(64, groups=4)
        self.gate2 = SqueezeExcite(64, 16)
        self.last = ConvBN(64, 32, kernel=1, act=nn.ReLU())
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(32 * 4 * 4, 56)
        self.fc2 = nn.Linear(56, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Ten logits per image."""
        x = self.gate1(self.shuffle1(self.mix1(self.stem(x))))
        x = self.gate2(self.shuffle2(self.mix2(self.down(x))))
        return self.fc2(torch.relu(self.fc1(self.flatten(self.last(x)))))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """softmax(Q K' / sqrt(d)) V for each head, joined and projected."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block with a GELU perceptron."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Two residual sums."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer: 16 patches of 2x2 and a class token, width 64, three blocks of four heads."""

    def __init__(self, dim: int = 64, depth: int = 3, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, stride=2)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.Sequential(*[EncoderBlock(dim, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Ten logits per image, read off the class token."""
        patches = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(x.shape[0], -1, -1), patches], 1) + self.position
        return self.fc(self.norm(self.blocks(tokens))[:, 0])


@dataclass(frozen=True)
class Recipe:
    """One network and how long to train it; the numbers were set once and not tuned on the test images."""

    build: Callable[[], nn.Module]
    epochs: int
    rate: float  # peak learning rate of AdamW


RECIPES = {
    "resnet": Recipe(ResNet, epochs=40, rate=3e-3),
    "mobilenet": Recipe(MobileNet, epochs=60, rate=5e-3),
    "concat": Recipe(Concat, epochs=40, rate=3e-3),
    "vit": Recipe(ViT, epochs=100, rate=1.5e-3),
}


# --- training -------------------------------------------------------------------------------------------------------


def shifted(x: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels in both directions, zeros coming in."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    dy, dx = torch.randint(0, 3, (2, len(x), 1, 1))
    rows = torch.arange(8).view(1, 8, 1) + dy
    cols = torch.arange(8).view(1, 1, 8) + dx
    return padded[torch.arange(len(x)).view(-1, 1, 1), 0, rows, cols].unsqueeze(1)


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled, augmented epoch; the incomplete last batch is dropped."""
    order = torch.randperm(len(x))
    for i in range(0, len(x) - BATCH + 1, BATCH):
        chosen = order[i : i + BATCH]
        yield shifted(x[chosen]), y[chosen]


def train(recipe: Recipe, data: Digits) -> nn.Module:
    """The network after its last epoch, in eval mode: no early stopping, so the test images choose nothing."""
    torch.manual_seed(SEED)
    net = recipe.build()
    x, y = torch.from_numpy(data["x_train"]), torch.from_numpy(data["y_train"])
    steps = recipe.epochs * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    net.train()
    for _ in range(recipe.epochs):
        for images, labels in batches(x, y):
            optimizer.zero_grad()
            loss_of(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


# --- export ---------------------------------------------------------------------------------------------------------


def export_legacy(net: nn.Module, file: Path) -> None:
    """TorchScript's exporter; PRESERVE on a net in eval mode is what keeps Conv and BatchNormalization apart."""
    torch.onnx.export(
        net, (torch.zeros(2, 1, 8, 8),), str(file), dynamo=False, opset_version=LEGACY_OPSET,
        input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    write(onnx.load(file), file)


def export_dynamo(net: nn.Module, file: Path) -> None:
    """The torch.export based exporter, without its optimizer."""
    program = torch.onnx.export(
        net, (torch.zeros(2, 1, 8, 8),), dynamo=True, opset_version=DYNAMO_OPSET,
        input_names=["x"], output_names=["y"], dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        optimize=False, external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    write(program.model_proto, file)


def write(model: onnx.ModelProto, file: Path) -> None:
    """Save without the exporter's long notes: stack traces hold local file paths, the other two repeat `namespace`."""
    dropped = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.torch.onnx.class_hierarchy")
    for node in model.graph.node:
        node.ClearField("doc_string")
        kept = [p for p in node.metadata_props if p.key not in dropped]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    if b'File "' in data:
        raise RuntimeError(f"{file.name}: holds a stack trace; extend the dropped metadata")
    file.write_bytes(data)


EXPORTERS: dict[str, Callable[[nn.Module, Path], None]] = {"legacy": export_legacy, "dynamo": export_dynamo}


# --- checks ---------------------------------------------------------------------------------------------------------


def check(net: nn.Module, file: Path, data: Digits) -> float:
    """Test top-1 of the file under ONNX Runtime, after comparing its logits with torch at several batch sizes."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (x_arg,), (y_arg,) = session.get_inputs(), session.get_outputs()
    declared = (x_arg.name, x_arg.shape, y_arg.name, y_arg.shape)
    if declared != ("x", ["batch", 1, 8, 8], "y", ["batch", 10]):
        raise RuntimeError(f"{file.name}: declares {declared!r}")
    logits = np.empty((0, 10), np.float32)
    for n in CHECKED_BATCHES:
        images = data["x_test"][:n]
        (logits,) = session.run(None, {"x": images})
        with torch.no_grad():
            expected = net(torch.from_numpy(images)).numpy()
        # Logits are about 10 and both sides sum in float32 in their own order: 1e-4 is 1e-5 of the scale.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4, err_msg=f"{file.name}, batch {n}")
    return float((logits.argmax(1) == data["y_test"]).mean())


def main() -> None:
    """Write digits.npz and the models, then print the table of README.md."""
    parser = argparse.ArgumentParser(description="Train the digits networks and export them to ONNX.")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this network alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to (default: here)")
    args = parser.parse_args()

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)  # the legacy exporter announces its own at every call
    warnings.simplefilter("ignore", FutureWarning)  # torch.export about its own internals
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)

    data = load_split()
    np.savez_compressed(out / "digits.npz", **data)
    print("| file | parameters | nodes | KiB | test top-1 |\n|---|---:|---:|---:|---:|")
    for name in [args.only] if args.only else RECIPES:
        net = train(RECIPES[name], data)
        parameters = sum(p.numel() for p in net.parameters())
        for dialect, export in EXPORTERS.items():
            file = out / f"{name}.{dialect}.onnx"
            export(net, file)
            top1 = check(net, file, data)
            nodes = len(onnx.load(file).graph.node)
            kib = file.stat().st_size / 1024
            print(f"| {file.name} | {parameters:,} | {nodes} | {kib:.0f} | {top1:.2%} |", flush=True)


if __name__ == "__main__":
    main()
