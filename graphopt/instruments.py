"""What can be called around each pass: timing, statistics, proof, and ways to look.

Instruments stack in any order; the driver knows none of them.
"""

from __future__ import annotations

import base64
import copy
import difflib
import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from graphopt import equivalence, verify
from graphopt.backend import ShapeRange
from graphopt.errors import GraphoptError, NotEquivalent, PassError, UnsupportedModel, VerifyError
from graphopt.ir import Model, dtype_name, save
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline, step_text


class _Silent:
    """An instrument that does nothing; the base of the others."""

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Nothing."""

    def before_pass(self, step: Pass, model: Model, ctx: Context) -> None:
        """Nothing."""

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Nothing."""

    def pass_failed(self, step: Pass, model: Model, ctx: Context, error: Exception) -> None:
        """Nothing."""

    def after_pipeline(self, model: Model, ctx: Context) -> None:
        """Nothing."""


class Verify(_Silent):
    """Check structure and interface after each pass that changed something."""

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Remember the contract with callers."""
        self._inputs, self._outputs = model.inputs, model.outputs

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Raise VerifyError when the graph is broken or its interface changed."""
        if not rewrites:
            return
        faults = verify.structure(model)
        faults += verify.contract(self._inputs, self._outputs, model, step.retypes)
        self._inputs, self._outputs = model.inputs, model.outputs
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise VerifyError(f"{step.pass_name()} left an invalid model: {faults[0]}{more}")


class FullCheck(_Silent):
    """Run onnx.checker with full_check after each pass that changed something."""

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Raise VerifyError with the checker's words."""
        if rewrites:
            try:
                verify.full(model)
            except Exception as error:
                raise VerifyError(f"{step.pass_name()} left an invalid model: {error}") from None


class Compare(_Silent):
    """Compare the numbers with the original after each pass, on the same inputs, within the tolerance of what ran so far."""

    def __init__(
        self,
        feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None,
        seed: int = 0,
        shapes: Mapping[str, ShapeRange] | None = None,
    ) -> None:
        self.feeds = feeds
        self.seed = seed
        self.shapes = shapes
        self.reports: list[tuple[str, equivalence.Report]] = []
        self.unproven: str | None = None  # why nothing could be compared

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Keep the original; its constants are shared, so it costs no weights."""
        self._types = equivalence.float_types(model)
        self._reference = equivalence.Reference(model.clone(), feeds=self.feeds, seed=self.seed, shapes=self.shapes)
        self._rewrites: Counter[Pass] = Counter()

    def fork(self) -> Compare:
        """One that compares with the same original and goes on by itself: what it sees does not count here."""
        other = copy.copy(self)
        other.reports, other._rewrites = [], Counter(self._rewrites)
        return other

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Raise PassError when the numbers moved further than the class of the passes allows."""
        if not rewrites or self.unproven:
            return
        self._rewrites[step] += rewrites
        allowed = equivalence.Bound.of(self._rewrites, self._types)
        try:
            report = self._reference.compare(model, allowed)
            self.reports.append((step.pass_name(), report))
            report.require(f"{step.pass_name()} changed the numbers")
        except UnsupportedModel as error:
            self.unproven = str(error)
            ctx.remark(None, f"not compared: {error}")
        except NotEquivalent as error:
            raise PassError(str(error)) from None


@dataclass(frozen=True)
class PassTime:
    """What one run of a pass cost."""

    pass_name: str
    wall_seconds: float
    cpu_seconds: float


class Timing(_Silent):
    """Wall and CPU seconds of each pass."""

    def __init__(self) -> None:
        self.times: list[PassTime] = []

    def before_pass(self, step: Pass, model: Model, ctx: Context) -> None:
        """Start the clocks."""
        self._start = time.perf_counter(), time.process_time()

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Read the clocks."""
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        self.times.append(PassTime(step.pass_name(), wall, cpu))


@dataclass(frozen=True)
class Census:
    """What a model holds at one moment."""

    pass_name: str  # "" before the first pass
    nodes: int
    initializer_bytes: int
    operators: Mapping[str, int]


class Statistics(_Silent):
    """Nodes, bytes and operators before the first and after each pass."""

    def __init__(self) -> None:
        self.history: list[Census] = []

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Count what comes in."""
        self.history.append(census("", model))

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Count what is left."""
        if rewrites:
            self.history.append(census(step.pass_name(), model))
        else:
            self.history.append(replace(self.history[-1], pass_name=step.pass_name()))


def census(name: str, model: Model) -> Census:
    """Count the nodes and bytes of `model`; Constant nodes count as nodes and their data as bytes."""
    operators = Counter(n.op for n in model.nodes())
    inline = sum(
        v.nbytes for n in model.nodes() if n.op == "Constant" for v in n.attrs.values() if hasattr(v, "nbytes")
    )
    return Census(name, sum(operators.values()), model.nbytes + inline, dict(sorted(operators.items())))


class PrintAfterChange(_Silent):
    """Hand the ONNX text, as a diff against the text before, to `emit` after each pass that changed it."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self.emit = emit

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Remember the text."""
        self._text = model.text()

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Emit what changed."""
        if rewrites:
            text = model.text()
            old, self._text = self._text, text
            lines = difflib.unified_diff(
                old.splitlines(), text.splitlines(), "before", f"after {step.pass_name()}", lineterm="", n=1
            )
            self.emit("\n".join(lines))


class Dump(_Silent):
    """Write the model before the first and after each pass into `folder`, numbered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Write the input."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(model, self.folder / "000-input.onnx")

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """Write what the pass left."""
        self._number += 1
        save(model, self.folder / f"{self._number:03}-{step.pass_name()}.onnx")


class Reproducer(_Silent):
    """When a pass fails, write one file that holds the model right before it and the command that fails again."""

    KEY = "graphopt.reproduce"

    def __init__(
        self,
        path: Path,
        feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None,
        seed: int = 0,
        shapes: Mapping[str, ShapeRange] | None = None,
    ) -> None:
        """`path` is written; the rest are those of a `Compare` in the same stack, and go into the file while they are small."""
        self.path = path
        self.feeds, self.seed, self.shapes = feeds, seed, shapes

    def before_pass(self, step: Pass, model: Model, ctx: Context) -> None:
        """Keep the model as it is now; constants are shared."""
        self._before = model.clone()

    def pass_failed(self, step: Pass, model: Model, ctx: Context, error: Exception) -> None:
        """Write the file."""
        pipeline = step_text(step)
        command = f"graphopt opt {shlex.quote(str(self.path))} -o out.onnx -p {shlex.quote(pipeline)}"
        facts = {
            "pipeline": pipeline,
            "command": command,
            "error": f"{type(error).__name__}: {error}",
            "seed": self.seed,
            "shapes": {name: str(wanted) for name, wanted in (self.shapes or {}).items()},
            "target": None if ctx.target is None else str(ctx.target),
            "feeds": packed(self.feeds),
        }
        properties = self._before.carried.metadata_props
        kept = [p for p in properties if p.key != self.KEY]  # the input may be a reproducer itself
        del properties[:]
        properties.extend([*kept, onnx.StringStringEntryProto(key=self.KEY, value=json.dumps(facts))])
        try:
            save(self._before, self.path)
        except GraphoptError as refusal:
            error.add_note(f"no reproducer: {refusal}")
        else:
            error.add_note(f"reproduce with: {command}")
            error.add_note(f"or ask whether it still fails: graphopt reproduce {shlex.quote(str(self.path))}")


_MOST_PACKED = 1 << 20  # bytes of samples that a reproducer takes in


def packed(feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None) -> list[dict[str, dict[str, Any]]] | None:
    """Samples as JSON values; None where there are none, or more than fits."""
    if not feeds or sum(a.nbytes for f in feeds for a in f.values()) > _MOST_PACKED:
        return None
    if any(a.dtype.kind in "OU" for f in feeds for a in f.values()):
        return None
    return [
        {
            name: {
                "dtype": dtype_name(array.dtype),
                "shape": list(array.shape),
                "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
            }
            for name, array in sample.items()
        }
        for sample in feeds
    ]


def unpacked(samples: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """What `packed` was given; raises ValueError, KeyError or TypeError for anything else."""
    return [
        {
            name: np.frombuffer(
                base64.b64decode(entry["data"], validate=True), numpy_type(str(entry["dtype"]))
            ).reshape([int(d) for d in entry["shape"]])
            for name, entry in sample.items()
        }
        for sample in samples
    ]


def numpy_type(name: str) -> np.dtype[Any]:
    """The NumPy or ml_dtypes type of that name."""
    return np.dtype(getattr(ml_dtypes, name, name))
