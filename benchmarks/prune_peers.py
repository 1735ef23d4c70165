"""Peers of the pruning benchmark, each in a process of its own: onnxsim's structured pruning, and Torch-Pruning through onnx2torch.

A peer is asked for the same share as we are: its sparsity is searched so that what it leaves (multiply-accumulates or parameters, as
counted here) is as close below the goal as sparsities in steps of 1/64 get. What it does not reach is written as it is.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.harness import peer_process
from graphopt import ir
from graphopt.analyses.channel_groups import channel_groups
from graphopt.ir import Model

# argv: model, samples.npz, folder, sparsities as JSON; writes 0.onnx, 1.onnx, ... for those that work
_ONNXSIM: Final = """
import json, sys
import numpy as np, onnx, onnxsim
model, samples, folder, shares = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
for number, share in enumerate(shares):
    onnx.save(CALL, f"{folder}/{number}.onnx")
"""
_TORCH_PRUNING: Final = """
import json, sys
from unittest.mock import MagicMock
import numpy as np, onnx, torch
try:
    import torchvision.ops
except Exception:  # built for another torch; the two only need it for detection's operators
    sys.modules.update({n: MagicMock() for n in ("torchvision", "torchvision.ops", "torchvision.models")})
import torch_pruning
from onnx2torch import convert
samples, folder, shares = np.load(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
name = samples.files[0]
x = torch.from_numpy(samples[name][:1])
class Whole(torch.nn.Module):  # torch.onnx.export takes a GraphModule for TorchScript
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        return self.net(x)
for number, share in enumerate(shares):
    net = convert(onnx.load(sys.argv[1])).eval()
    heads = [m for m in net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1:]
    pruner = torch_pruning.pruner.BasePruner(
        net, x, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=share, ignored_layers=heads)
    pruner.step()
    torch.onnx.export(Whole(net), (x,), f"{folder}/{number}.onnx", dynamo=False, opset_version=17,
        input_names=[name], dynamic_axes={name: {0: "N"}})
"""
PEERS: Final = {
    "onnxsim l2": _ONNXSIM.replace("CALL", "onnxsim.apply_structured_pruning(model, sparsity=share)"),
    "onnxsim l2 global": _ONNXSIM.replace(
        "CALL", "onnxsim.apply_structured_pruning(model, sparsity=share, global_sparsity=True)"
    ),
    "onnxsim wanda": _ONNXSIM.replace(
        "CALL",
        "onnxsim.apply_structured_wanda_pruning(model, sparsity=share, "
        "calibration_data=[{n: samples[n][i:i + 1] for n in samples.files} for i in range(len(samples[samples.files[0]]))])",
    ),
    "Torch-Pruning": _TORCH_PRUNING,
}
_STEPS: Final = 2  # of the search, a process each
_PARTS: Final = 8  # into which a step parts what is left of the sparsities


def cost(model: Model, what: str) -> float:
    """Multiply-accumulates of a sample, or parameters."""
    return channel_groups(model).cost_model(what).total()


def prune(
    peer: str, model: Model, samples: dict[str, NDArray[Any]], what: str, left: float, python: str
) -> tuple[Model | None, str | None]:
    """What a peer makes of `model` when the share `left` of its cost is to be left, or why it makes nothing."""
    with tempfile.TemporaryDirectory(prefix="graphopt-prune-") as name:
        folder = Path(name)
        source, data = folder / "model.onnx", folder / "samples.npz"
        ir.save(model, source)
        np.savez(data, **{n: a[:128] for n, a in samples.items()})  # type: ignore[arg-type]
        full, low, high = cost(model, what), 0.0, 1.0
        best: tuple[float, Model] | None = None
        for _ in range(_STEPS):
            shares = [low + (high - low) * k / _PARTS for k in range(1, _PARTS)]
            run = peer_process(PEERS[peer], source, data, folder, json.dumps(shares), python=python, timeout=600)
            found = []
            for number, share in enumerate(shares):
                path = folder / f"{number}.onnx"
                if path.exists():
                    try:
                        pruned = ir.load(path)
                        onnx.checker.check_model(str(path), full_check=True)
                        found.append((share, cost(pruned, what) / full, ir.loads(path.read_bytes())))
                    except Exception as error:
                        return None, f"invalid model: {' '.join(str(error).split())[:120]}"
                    path.unlink()
            if not found:
                return None, run.failure or "no model"
            for share, kept, pruned in found:
                if kept <= left * 1.02:
                    high = min(high, share)
                    if best is None or kept > best[0]:
                        best = kept, pruned
                else:
                    low = max(low, share)
            if best is None and all(kept > 0.99 for _, kept, _ in found):
                return None, "removes nothing"
        if best is None:
            return None, f"does not get below {min(kept for _, kept, _ in found):.0%}"
        return best[1], None
