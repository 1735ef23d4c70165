"""``W2 relu(W1 x + b1) = (W2 S) relu(S^-1 W1 x + S^-1 b1)``: loud and quiet channels get the same codes.

Which tensors have to be scaled together, and how far to go, is worked out by `graphopt.analyses.equalization`: between convolutions this is
cross-layer equalization, behind a LayerNormalization it is SmoothQuant.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.equalization import apply, balanced, classes, observe, scales
from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.pass_base import Context, Exactness, Pass

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Scale channels of activations alike, so that one int8 scale fits all of them; the graph computes the same.

    With calibration data (``--data``) a class of tensors is scaled as far as the expected int8 error falls; without, so that
    what writes a channel and what reads it are equally large. Run it before ``quantize-qdq``.

    Before:
        g (float[1,2] x) => (float[1,1] y)
        <float[2,2] a = {1.0, 0.0, 0.0, 100.0}, float[2,1] b = {1.0, 0.01}>
        { h = MatMul (x, a)
          r = Relu (h)
          y = MatMul (r, b) }
    After:
        g (float[1,2] x) => (float[1,1] y)
        <float[2,2] a = {1.0, 0.0, 0.0, 1.0}, float[2,1] b = {1.0, 1.0}>
        { h = MatMul (x, a)
          r = Relu (h)
          y = MatMul (r, b) }
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATING

    exclude: tuple[str, ...] = ()  # names (with * and ?) of tensors whose channels stay as they are
    gain: float = 0.1  # share of the expected error that must go for a class of tensors to be scaled
    spread: float = 2.0  # without data: of the scales, below which a class is left alone

    def run(self, model: Model, ctx: Context) -> int:
        """Scale each class of tensors that gains by it; returns how many."""
        found = [c for c in classes(model, ctx.analysis(Shapes, model)) if not self._excluded(c.tensors)]
        if not found:
            return 0
        edit = Editor(model)
        seen = observe(model, found, ctx.data) if ctx.data is not None else None
        done = 0
        for one in found:
            scale: Array | None
            if seen is None:
                scale = balanced(one)
                if scale.max() < self.spread * scale.min():
                    continue
            else:
                share, scale = scales(one, seen, _coded)
                if scale is None or share > 1 - self.gain:
                    continue
            if not ctx.admit():
                break
            apply(one, scale, edit)
            done += 1
        edit.commit()
        return done

    def _excluded(self, tensors: list[gs.Tensor]) -> bool:
        return any(fnmatchcase(t.name, p) for t in tensors for p in self.exclude)


def _coded(tensor: gs.Tensor) -> bool:
    """Whether ``quantize-qdq`` may round a tensor: not what a Relu alone reads."""
    return not (tensor.outputs and all(n.op == "Relu" for n in tensor.outputs))
