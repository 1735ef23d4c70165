"""Equal initializers, by dtype, shape and bytes, are stored once.

Only tensors of equal dtype, shape and size are read and hashed, piece by piece as they lie in their file. NaN payloads and signs of
zero count, since bytes do. A weight that two layers tie stays one weight, whatever this pass does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from graphopt.edit import Editor
from graphopt.ir import Constant, Graph, Model
from graphopt.pass_base import Context, Pass
from graphopt.wire import pieces
from graphopt.writing import is_sparse, raw_bytes


@dataclass(frozen=True)
class ShareInitializers(Pass):
    """Store equal initializers once.

    Passes that fold into weights leave a shared weight alone, so this one belongs behind them.

    Before:
        g (float[2] x) => (float[2] y)
        <float[2] a = {1, 2}, float[2] b = {1, 2}>
        { s = Add (x, a)
          y = Mul (s, b) }
    After:
        g (float[2] x) => (float[2] y)
        <float[2] a = {1, 2}>
        { s = Add (x, a)
          y = Mul (s, a) }
    """

    min_bytes: int = 1  # smaller ones are left as they are

    def run(self, model: Model, ctx: Context) -> int:
        """One sweep; returns the number of initializers that gave way to an equal one."""
        edit = Editor(model)
        home = {id(c): graph for graph in model.graphs() for c in graph.initializers}
        alike: dict[tuple[Any, ...], list[Constant]] = {}
        for constant in model.constants():
            sized = constant.nbytes >= self.min_bytes
            if sized and edit.is_fixed(constant) and not is_sparse(constant) and constant.dtype != object:
                key = (str(constant.dtype), tuple(constant.shape), constant.nbytes)
                alike.setdefault(key, []).append(constant)
        shared = 0
        for group in alike.values():
            if len(group) < 2:
                continue
            first: dict[tuple[int, bytes], Constant] = {}
            for constant in sorted(group, key=lambda c: not _in_root(c, home, model)):
                digest = _digest(constant)
                scope = home.get(id(constant), model.graph)
                kept = first.get((id(model.graph), digest)) or first.get((id(scope), digest))
                if kept is None:
                    first[id(scope), digest] = constant
                    continue
                if edit.is_output(constant):
                    ctx.remark(constant, f"equals {kept.name!r}, but is a graph output")
                    continue
                if not constant.outputs:
                    continue
                if not ctx.admit():
                    return shared
                edit.replace_uses(constant, kept)
                shared += 1
        edit.commit()
        return shared


def _in_root(constant: Constant, home: dict[int, Graph], model: Model) -> bool:
    """Whether it is in scope everywhere; a constant that a pass made belongs to the root."""
    return home.get(id(constant), model.graph) is model.graph


def _digest(constant: Constant) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces(raw_bytes(constant)):
        digest.update(piece)
    return digest.digest()
