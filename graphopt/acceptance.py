"""Is a bundle what it says? Its files, that it loads here, its numbers beside those of the original, its accuracy on labelled data.

Tolerance of the numbers: a runtime may sum in another order wherever the original has a node, so the bound is that of class B
(`equivalence.tolerance`) for as many rewrites as the original has nodes, or the one that the build used where that is wider. An engine with
TF32 multiplies with 10 bits of fraction: ``2^-10 * sqrt(1 + nodes)``. A model that was quantized or pruned has no bound; it is judged by its
accuracy, or by the tolerance that is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from graphopt import building, equivalence, int8, ir
from graphopt.bundle import Bundle, BundleSession, Variant, sha256
from graphopt.data import Data
from graphopt.errors import BackendUnavailable, UnsupportedModel, UsageError, UserError
from graphopt.evaluate import Evaluator
from graphopt.ir import Model
from graphopt.pass_base import Exactness

_BATCH: Final = 32
_TF32: Final = 2.0**-10


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    variant: str  # its target; "" for the whole bundle
    what: str  # files, loads, numbers or accuracy
    passed: bool | None  # None: not looked at, for the reason that the text gives
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"variant": self.variant, "check": self.what, "passed": self.passed, "text": self.text}


def check(
    bundle: Bundle,
    original: Model | None,
    *,
    target: str | None = None,
    data: Data | None = None,
    labels: np.ndarray[Any, Any] | None = None,
    tolerance: float | None = None,
    max_drop: float | None = None,
    seed: int = 0,
) -> list[Check]:
    """Look at everything.

    Args:
        bundle: to be judged.
        original: the model that it was built from; None: numbers cannot be compared.
        target: one variant only, which must run here; None: all, and one must.
        data: samples; None generates some within the shape profile.
        labels: class numbers of the samples; None: agreement with the original counts as accuracy.
        tolerance: relative; None: as the module docstring says.
        max_drop: points of accuracy that may be lost; None: those that the build allowed.
        seed: of generated samples.

    Raises:
        BackendUnavailable: `target` names no variant.
        UsageError: samples or labels that do not fit.
    """
    checks = []
    if original is not None:
        same = original.fingerprint() == bundle.manifest["model"]["sha256"]
        told = "is the one that the bundle was built from" if same else "is another than the bundle was built from"
        checks.append(Check("", "original", same, told))
    chosen = [v for v in bundle.variants if target is None or str(v.target) == target or v.target.runtime == target]
    if not chosen:
        raise BackendUnavailable(
            f"the bundle holds no variant for {target!r}; it has {', '.join(str(v.target) for v in bundle.variants)}"
        )
    ran = 0
    for variant in chosen:
        name = str(variant.target)
        damaged = [f for f in bundle.damaged() if f in variant.files]
        told = "as the manifest says" if not damaged else f"{', '.join(damaged)} missing or not as the manifest says"
        checks.append(Check(name, "files", not damaged, told))
        if damaged:
            continue
        try:
            session = bundle.open(name)
        except BackendUnavailable as error:
            checks.append(Check(name, "loads", None if target is None else False, str(error)))
            continue
        except UserError as error:
            checks.append(Check(name, "loads", False, str(error)))
            continue
        ran += 1
        try:
            checks += _ran(session, variant, original, data, labels, tolerance, _allowed_drop(bundle, max_drop), seed)
        finally:
            session.close()
    if not ran and not any(c.passed is False for c in checks):
        checks.append(
            Check("", "loads", False, "no variant runs on this machine, so nothing but the files was looked at")
        )
    return checks


def _allowed_drop(bundle: Bundle, asked: float | None) -> float | None:
    request = bundle.manifest["build"]["request"] if "build" in bundle.manifest else {}
    return asked if asked is not None else request.get("budget", {}).get("max-drop", request.get("max-drop"))


def _ran(
    session: BundleSession,
    variant: Variant,
    original: Model | None,
    data: Data | None,
    labels: np.ndarray[Any, Any] | None,
    tolerance: float | None,
    max_drop: float | None,
    seed: int,
) -> list[Check]:
    """What running one variant shows."""
    name = str(variant.target)
    interface = original if original is not None else _Interface(session)
    feeds: Iterable[Mapping[str, Any]]
    evaluator = None if original is None else Evaluator(original)
    if data is not None:
        feeds = data.feeds(_BATCH)
    elif original is not None and evaluator is not None and not variant.shapes:
        try:
            feeds = [sample for sample, _ in equivalence.generated_runs(original, evaluator, seed)]
        except UnsupportedModel:
            feeds = ()
    else:
        feeds = itertools.islice(building.samples(interface, seed, variant.shapes), 2)  # type: ignore[arg-type]  # inputs are enough
    worst: dict[str, equivalence.Difference] = {}
    allowed = _tolerance(variant, original, tolerance)
    classes: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    count = 0
    for sample in feeds:
        expected = None
        if evaluator is not None:
            try:
                expected = evaluator.run(sample)
            except UnsupportedModel as error:
                if data is not None:
                    raise UsageError(str(error)) from None
                continue  # a generated sample that the original itself refuses proves nothing
        try:
            found = session.run({s.name: _as(sample[s.name], s.dtype) for s in session.inputs})
        except UserError as error:
            return [Check(name, "loads", False, f"does not run: {error}")]
        count += 1
        if expected is None or evaluator is None:
            continue
        for output, value in expected.items():
            mine = found.get(output)
            if isinstance(mine, np.ndarray) and isinstance(value, np.ndarray):
                mine = _as(mine, ir.dtype_name(value.dtype))
            gap = equivalence.difference(output, value, mine)
            if allowed is not None and gap.relative > allowed and math.isfinite(gap.max_abs):
                gap = replace(gap, sensitivity=equivalence.sensitivity(evaluator.run, sample, expected, seed)[output])
            known = worst.get(output)
            if known is None or _badness(gap, allowed) > _badness(known, allowed):
                worst[output] = gap
        first = next(iter(expected))
        pair = np.asarray(expected[first]), np.asarray(found[first])
        if pair[0].dtype.kind == "f" and pair[0].ndim >= 2 and pair[0].shape == pair[1].shape:
            classes.append((_argmax(pair[0]), _argmax(pair[1])))
            if labels is not None:
                int8.check_classes(labels, pair[0].shape[-1])
    checks = [
        Check(name, "loads", True, f"and runs on {count} {'batches' if data is not None else 'generated samples'}")
    ]
    if not count:
        return [Check(name, "loads", True, "but no generated sample runs through the original; give --data")]
    if original is None:
        return [*checks, Check(name, "numbers", None, "not compared: the original is not here; name it with --model")]
    checks.append(_numbers(name, list(worst.values()), allowed))
    if data is not None:
        checks.append(_accuracy(name, classes, labels, max_drop))
    return checks


def _as(array: Any, dtype: str | None) -> Any:
    """A floating-point array in the type that the other side has: a build may have changed that of inputs and outputs."""
    have = ir.dtype_name(array.dtype)
    if dtype is None or have == dtype or not ("float" in dtype and "float" in have):
        return array
    return array.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


class _Interface:
    """What generating samples needs to know of a model."""

    def __init__(self, session: BundleSession) -> None:
        self.inputs = session.inputs


def _badness(gap: equivalence.Difference, allowed: float | None) -> tuple[bool, float]:
    return allowed is not None and not gap.keeps(allowed), gap.relative


def _tolerance(variant: Variant, original: Model | None, asked: float | None) -> float | None:
    """The relative bound; None: there is none."""
    proof = variant.record["proof"]
    if asked is not None or original is None:
        return asked
    if proof.get("tolerance", 0.0) is None:
        return None
    nodes = variant.record["nodes"]["before"]
    usual = equivalence.tolerance(Exactness.REASSOCIATING, nodes, equivalence.float_types(original))
    engine = 0.0 if variant.target.runtime == "ort" else _TF32 * math.sqrt(1 + nodes)
    return max(usual, engine, float(proof.get("tolerance", 0.0)))


def _numbers(name: str, gaps: Sequence[equivalence.Difference], allowed: float | None) -> Check:
    worst = max(gaps, key=lambda gap: _badness(gap, allowed), default=None)
    if worst is None:
        return Check(name, "numbers", True, "the model has no outputs")
    told = f"output {worst.name!r} differs by {worst.relative:.3g} of its magnitude"
    if worst.note:
        told += f" ({worst.note})"
    if allowed is None:
        if not math.isfinite(worst.max_abs):
            return Check(name, "numbers", False, told)
        return Check(name, "numbers", None, f"{told}; it was quantized or pruned, which has no bound but --tolerance")
    return Check(name, "numbers", worst.keeps(allowed), f"{told}, {allowed:.3g} allowed")


def _argmax(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(array.reshape(-1, array.shape[-1]).argmax(-1))


def _accuracy(
    name: str,
    classes: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
    labels: np.ndarray[Any, Any] | None,
    max_drop: float | None,
) -> Check:
    if not classes:
        if labels is not None:
            raise UsageError("--labels needs a first output of [samples, classes]; leave it out for this model")
        return Check(name, "accuracy", None, "the first output holds no classes")
    theirs, mine = (np.concatenate([pair[side] for pair in classes]) for side in (0, 1))
    if labels is None:
        before, after, what = 100.0, 100 * float(np.mean(theirs == mine)), "agreement with the original"
    else:
        known = labels[: len(mine)]
        if len(known) != len(mine):
            raise UsageError(f"--labels holds {len(labels)} numbers, the samples give {len(mine)} classifications")
        before, after = 100 * float(np.mean(theirs == known)), 100 * float(np.mean(mine == known))
        what = "top1"
    told = f"{what} {before:.2f} -> {after:.2f} % on {len(mine)} samples"
    if max_drop is None:
        return Check(name, "accuracy", None, f"{told}; no bound given (--max-drop)")
    return Check(name, "accuracy", before - after <= max_drop, f"{told}, {max_drop:g} points may be lost")


def find_original(bundle: Bundle, places: Sequence[Path]) -> Path | None:
    """The first of `places` that holds the model file which the manifest names; a folder stands for the file of that name in it."""
    entry = next((f for f in bundle.manifest.get("build", {}).get("files", ()) if f["role"] == "model"), None)
    if entry is None:
        return None
    for place in places:
        path = place / entry["name"] if place.is_dir() else place
        try:
            if path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]:
                return path
        except OSError:
            continue
    return None
