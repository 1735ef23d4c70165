"""Do two models compute the same? Inputs that fit both, a run of each as written, and a bound that is argued, not tuned.

Tolerances by class of rewrite (`Exactness`), relative to the largest finite magnitude in an output tensor:

* A, exact: 0. Both sides run unoptimized on one thread, so the same kernels see the same operands. But for float16 and bfloat16:
  ONNX Runtime's CPU computes them in float32 and drops a cast from float32 and back, so which values get rounded depends on where
  casts stand; they have the bound of B for no rewrite.
* B, re-association: each rewrite rounds its folded weights once (relative error u = 2^-24 in float32); the errors of n
  independent rewrites add like sqrt(n), and a layer amplifies them by its condition, for which 64 is allowed:
  ``64 * eps * sqrt(1 + n)``.
* C, approximate: no bound here; the metric judges. But a pass that does nothing but round to a half type says so (`Pass.rounds_to`): each of
  its n operators rounds operands and results by up to u = eps / 2 of that type, which adds like sqrt(n), and 8 is allowed for the condition of a
  layer: ``4 * eps * sqrt(1 + n)``. More than that is told, not refused; refused is a NaN or an infinity that was none before. Every rounding is
  emulated (`graphopt.emulation`), since ONNX Runtime's CPU would skip most of them, and an overflow with them.

A model may have less than that to give: where a bound is exceeded, the reference is run again with its inputs moved by one unit in the last
place (of the half type, where one is rounded to), and a difference of up to 4 times what that does is its own noise, not the rewrite's.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import ml_dtypes
import numpy as np

from graphopt.backend import ShapeRange
from graphopt.emulation import in_float32
from graphopt.errors import NotEquivalent, ShapeError, UnsupportedModel, UsageError
from graphopt.evaluate import Arrays, Evaluator
from graphopt.ir import Model, Node, TensorSpec, dtype_name
from graphopt.pass_base import Exactness, Pass

Run = tuple[Mapping[str, "np.ndarray[Any, Any]"], Arrays]  # a sample, and the outputs on it
_LARGER_DIMS: Final = (16, 32, 64, 112, 224, 512, 8000)  # for models that no small input fits: strides, windows, audio
_LARGER_ELEMENTS: Final = 1 << 21  # of one sample of an input of such a size
_DEFAULT_DIM: Final = 2  # a dynamic dimension nobody described; 1 would hide broadcasting mistakes
_RANDOM: Final = frozenset(
    ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"]
)
_MOST_ELEMENTS: Final = 1 << 29  # of a generated input
_CONDITION: Final = 64
_ROUNDING: Final = 4  # of eps; 8 for a layer's condition, and a rounding errs by half of eps
_AMPLIFICATION: Final = 4  # a rewrite rounds in every layer, a nudge of the inputs only before the first


@dataclass(frozen=True)
class Difference:
    """How far one output of two models lies apart."""

    name: str
    max_abs: float  # largest absolute difference; inf where dtype, shape, NaN or infinity disagree
    relative: float  # max_abs over the largest finite magnitude of the reference
    note: str = ""
    sensitivity: float = 0.0  # how far the reference itself moves when its inputs do by their last place; 0: not asked

    def keeps(self, tolerance: float) -> bool:
        """Whether it stays within `tolerance`, or within what the reference does to a rounding of its own inputs."""
        return self.relative <= tolerance or self.max_abs <= _AMPLIFICATION * self.sensitivity


@dataclass(frozen=True)
class Report:
    """The comparison of two models on all samples."""

    differences: tuple[Difference, ...]  # one an output: the worst sample
    tolerance: float  # relative
    samples: int
    engine: str
    rounding: str | None = None  # the half type that the candidate rounds to: the tolerance is then no law

    @property
    def equal(self) -> bool:
        """Whether every output keeps the tolerance."""
        return all(d.keeps(self.tolerance) for d in self.differences)

    @property
    def worst(self) -> Difference | None:
        """The output that differs most, one that keeps no bound before one that does."""
        return max(self.differences, key=lambda d: (not d.keeps(self.tolerance), d.relative), default=None)

    def require(self, what: str) -> None:
        """Raise NotEquivalent, naming the worst output, unless `equal`; for a model rounded to half only where numbers were lost."""
        worst = self.worst
        if worst is not None and not self.equal and (self.rounding is None or math.isinf(worst.max_abs)):
            raise NotEquivalent(
                f"{what}: output {worst.name!r} differs by {worst.max_abs:.3g} ({worst.relative:.3g} relative, "
                f"{self.tolerance:.3g} allowed){f': {worst.note}' if worst.note else ''}"
                f"{_OVERFLOW.format(self.rounding) if self.rounding else ''}"
            )

    @property
    def doubt(self) -> str | None:
        """What to say of a model rounded to half that differs by more than its roundings explain."""
        worst = self.worst
        if worst is None or self.rounding is None or self.equal:
            return None
        return (
            f"output {worst.name!r} differs by {worst.max_abs:.3g} ({worst.relative:.3g} relative), more than roundings to "
            f"{self.rounding} explain ({self.tolerance:.3g}): judge it by your metric, or keep nodes in float32"
        )


_OVERFLOW: Final = "; something overflows {}: give --data, and what it drives out of range stays float32, or cast-float{{{{keep=[...]}}}}, or bfloat16"


@dataclass(frozen=True)
class Bound:
    """What a comparison allows, from the passes that did something."""

    tolerance: float  # relative
    rounding: str | None = None
    retyped: bool = False  # inputs and outputs may be of another floating-point type than before

    @classmethod
    def of(cls, rewrites: Mapping[Pass, int], dtypes: Sequence[str]) -> Bound:
        """The bound for passes that did so many rewrites to a model that computes in `dtypes`."""
        fired = {step: count for step, count in rewrites.items() if count}
        loose = {p: n for p, n in fired.items() if p.exactness is not Exactness.EXACT}
        rounding = {p: n for p, n in loose.items() if p.rounds_to is not None}
        exact = max((p.exactness for p in loose if p not in rounding), key=lambda e: e.value, default=Exactness.EXACT)
        allowed = tolerance(exact, sum(n for p, n in loose.items() if p not in rounding), dtypes)
        for step, count in rounding.items():
            allowed += _ROUNDING * float(_finfo(_dtype(str(step.rounds_to))).eps) * math.sqrt(1 + count)
        names = {str(step.rounds_to) for step in rounding} if exact is not Exactness.APPROXIMATE else set()
        coarsest = max(names, key=lambda name: float(_finfo(_dtype(name)).eps), default=None)
        return cls(allowed, coarsest, any(step.retypes for step in fired))


def tolerance(exactness: Exactness, rewrites: int, dtypes: Sequence[str]) -> float:
    """The relative bound that the module docstring argues; `dtypes` are those that the model computes in."""
    if exactness is Exactness.EXACT:
        if not {"float16", "bfloat16"} & set(dtypes):
            return 0.0
        rewrites = 0
    if exactness is Exactness.APPROXIMATE:
        return math.inf
    eps = max((float(_finfo(np.dtype(d)).eps) for d in dtypes if _is_float(d)), default=0.0)
    return max(_CONDITION * eps, _CONDITION * float(np.finfo(np.float32).eps)) * math.sqrt(1 + rewrites)


def float_types(model: Model) -> list[str]:
    """The floating-point types that `model` computes in; narrower ones only store."""
    tensors = [*model.constants(), *model.graph.inputs, *(t for n in model.nodes() for t in n.outputs)]
    found = {dtype_name(t.dtype) for t in tensors if t.dtype is not None}
    return sorted(found & {"float16", "bfloat16", "float32", "float64"})


def _is_float(name: str) -> bool:
    return name.startswith(("float", "bfloat"))


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def _finfo(dtype: np.dtype[Any]) -> Any:
    return np.finfo(dtype) if dtype.kind == "f" else ml_dtypes.finfo(dtype)


def generate_inputs(
    inputs: Sequence[TensorSpec], *, seed: int = 0, dims: Mapping[str, int] | None = None, high: int = 4
) -> Arrays:
    """Random arrays that fit `inputs`.

    Args:
        inputs: what to feed; equal symbols get equal dimensions.
        seed: of NumPy's PCG64; equal seeds give equal arrays.
        dims: values of symbolic dimensions; others, and unknown ones, are 2.
        high: integers are drawn from 0 to high - 1, small enough to be indices and token numbers.

    Raises:
        UnsupportedModel: an input that is no dense tensor.
    """
    rng = np.random.default_rng(seed)
    feeds: Arrays = {}
    for spec in inputs:
        if spec.dtype is None:
            raise UnsupportedModel(f"input {spec.name!r} is no dense tensor; give its value yourself")
        shape = tuple(_dim(d, dims) for d in (spec.shape if spec.shape is not None else (None,)))
        if math.prod(shape) > _MOST_ELEMENTS:
            raise UnsupportedModel(
                f"input {spec} is too large to generate; give a sample with --data, or a smaller shape"
            )
        feeds[spec.name] = _draw(rng, spec.dtype, shape, high)
    return feeds


def _dim(dim: int | str | None, dims: Mapping[str, int] | None) -> int:
    if isinstance(dim, int):
        return dim
    return (dims or {}).get(dim, _DEFAULT_DIM) if dim is not None else _DEFAULT_DIM


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], high: int) -> np.ndarray[Any, Any]:
    if name == "string":
        return np.asarray(rng.choice(np.array(["a", "bc", ""], object), shape), object)
    if name == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    dtype = _dtype(name)
    if _is_float(name):
        return rng.standard_normal(shape).astype(dtype)
    if name.startswith("complex"):
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape), dtype)
    return rng.integers(0, high, shape).astype(dtype)


def input_samples(
    model: Model,
    *,
    seed: int = 0,
    shapes: Mapping[str, ShapeRange] | None = None,
    count: int = 2,
    size: int | None = None,
) -> Iterator[Arrays]:
    """`count` feeds for `model`; dynamic dimensions differ between them (2, 3, ..., or the min, opt, max of `shapes`).

    With `size`, dynamic dimensions behind the first of an input are `size` and its multiples instead, for models that cannot take small ones.
    """
    symbols = sorted({d for s in model.inputs for d in s.shape or () if isinstance(d, str)})
    inner = {d for s in model.inputs for d in (s.shape or ())[1:]} if size is not None else set()
    for number in range(count):
        specs = list(model.inputs)
        dims = {d: (size or 0) * (number + 1) if d in inner else _DEFAULT_DIM + number for d in symbols}
        if size is not None and None in inner:
            for index, spec in enumerate(specs):
                sized = (size * (number + 1) if d is None and i else d for i, d in enumerate(spec.shape or ()))
                specs[index] = spec if spec.shape is None else replace(spec, shape=tuple(sized))
        for index, spec in enumerate(specs):
            ranged = (shapes or {}).get(spec.name)
            if ranged is not None:
                shape = (ranged.opt, ranged.min, ranged.max)[number % 3]
                specs[index] = TensorSpec(spec.name, spec.dtype, shape)
        yield generate_inputs(specs, seed=seed + number, dims=dims)


def generated_runs(
    model: Model, evaluator: Evaluator, seed: int = 0, shapes: Mapping[str, ShapeRange] | None = None
) -> list[tuple[Arrays, Arrays]]:
    """Generated samples that `evaluator` of `model` runs, with its outputs: small dynamic dimensions first, larger ones if none of those run.

    Raises:
        UnsupportedModel: it runs none.
    """
    refusal: UnsupportedModel | None = None
    for size in (None, *_larger_dims(model.inputs, shapes)):
        found: list[tuple[Arrays, Arrays]] = []
        for sample in input_samples(model, seed=seed, shapes=shapes, size=size):
            try:
                found.append((sample, evaluator.run(sample)))
            except UnsupportedModel as error:  # an input that the original itself refuses proves nothing
                refusal = refusal or error
        if found:
            return found
    raise UnsupportedModel(
        f"no generated input runs through the original, so nothing is proven ({refusal}); give --data or --shape"
    )


def _larger_dims(inputs: Sequence[TensorSpec], shapes: Mapping[str, ShapeRange] | None) -> list[int]:
    """Sizes for dynamic dimensions behind the first, where there are such and nobody said their ranges; as long as samples stay small."""
    inner = [(s.shape or ())[1:] for s in inputs]
    if shapes or all(isinstance(d, int) for dims in inner for d in dims):
        return []
    largest = {
        size: max(math.prod(d if isinstance(d, int) else 2 * size for d in dims) for dims in inner)
        for size in _LARGER_DIMS
    }
    return [size for size, elements in largest.items() if elements <= _LARGER_ELEMENTS]


def seeded(model: Model) -> Model:
    """`model`, or a copy in which every operator that draws random numbers has a seed, told from the name of its output.

    ONNX Runtime's own seed depends on a node's place, so that two models that compute the same would draw different numbers.
    """
    if not any(_draws(node) for node in model.nodes()):
        return model
    copy = model.clone()
    for node in copy.nodes():
        if _draws(node):
            node.attrs["seed"] = float(zlib.crc32(node.outputs[0].name.encode()) % (1 << 20))
    return copy


def _draws(node: Node) -> bool:
    return node.op in _RANDOM and node.is_onnx and "seed" not in node.attrs and bool(node.outputs)


def check_feeds(inputs: Sequence[TensorSpec], feeds: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Compare arrays with what a model wants.

    Raises:
        UsageError: missing or unknown names, or another dtype.
        ShapeError: another rank or another value for a fixed dimension.
    """
    names = [spec.name for spec in inputs]
    missing = [n for n in names if n not in feeds]
    unknown = [n for n in feeds if n not in names]
    if missing or unknown:
        told = [f"missing {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown)
        raise UsageError(f"inputs do not match the model: {', '.join(told)}; it takes {', '.join(map(str, inputs))}")
    symbols: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        array = feeds[spec.name]
        if (
            spec.dtype is not None
            and spec.dtype != dtype_name(array.dtype)
            and not (spec.dtype == "string" and array.dtype.kind in "UO")
        ):
            raise UsageError(
                f"input {spec.name!r} is {dtype_name(array.dtype)}, the model takes {spec}; convert it with .astype"
            )
        if spec.shape is None:
            continue
        if array.ndim != len(spec.shape):
            raise ShapeError(f"input {spec.name!r} has shape {list(array.shape)}, the model takes {spec}")
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int) and array.shape[axis] != dim:
                raise ShapeError(f"input {spec.name!r} has shape {list(array.shape)}, but the model takes {spec}")
            if isinstance(dim, str) and symbols.setdefault(dim, (array.shape[axis], spec.name))[0] != array.shape[axis]:
                size, other = symbols[dim]
                raise ShapeError(
                    f"{dim!r} is {size} in input {other!r} and {array.shape[axis]} in {spec.name!r}; they must agree"
                )


def difference(name: str, reference: Any, value: Any) -> Difference:
    """Compare one output; NaN equals NaN, and infinities must agree in sign."""
    if not isinstance(reference, np.ndarray | np.generic) or not isinstance(value, np.ndarray | np.generic):
        return _sequence_difference(name, reference, value)
    a, b = (v.astype(object) if v.dtype.kind == "U" else v for v in (np.asarray(reference), np.asarray(value)))
    if a.dtype != b.dtype:
        return Difference(name, math.inf, math.inf, f"dtype {a.dtype} became {b.dtype}")
    if a.shape != b.shape:
        return Difference(name, math.inf, math.inf, f"shape {list(a.shape)} became {list(b.shape)}")
    if a.size == 0:
        return Difference(name, 0.0, 0.0)
    if a.dtype.kind == "O" or a.dtype.kind in "USb":
        wrong = int(np.sum(a != b))
        return Difference(
            name, *(0.0, 0.0) if not wrong else (math.inf, math.inf), note=f"{wrong} elements differ" if wrong else ""
        )
    wide: Any = np.complex128 if a.dtype.kind == "c" else np.float64
    if a.dtype.kind in "iu" and a.dtype.itemsize == 8:
        wide = np.longdouble  # keeps all 64 bits
    x, y = a.astype(wide), b.astype(wide)
    finite = np.isfinite(x)
    same = (finite == np.isfinite(y)) & (finite | (x == y) | (np.isnan(x) & np.isnan(y)))
    if not same.all():
        return Difference(name, math.inf, math.inf, f"{int(np.sum(~same))} elements differ in NaN or infinity")
    if not finite.any():
        return Difference(name, 0.0, 0.0)
    with np.errstate(over="ignore"):  # a gap beyond the range of the type is infinite
        gap = float(np.max(np.abs(x[finite] - y[finite])))
    scale = float(np.max(np.abs(x[finite])))
    return Difference(name, gap, gap / scale if scale else (math.inf if gap else 0.0))


def _sequence_difference(name: str, reference: Any, value: Any) -> Difference:
    if reference is None or value is None or not isinstance(reference, list) or not isinstance(value, list):
        same = reference is None and value is None
        return Difference(name, *(0.0, 0.0) if same else (math.inf, math.inf), note="" if same else "kinds differ")
    if len(reference) != len(value):
        return Difference(name, math.inf, math.inf, f"{len(reference)} elements became {len(value)}")
    return max(
        (difference(name, a, b) for a, b in zip(reference, value, strict=True)),
        key=lambda d: d.relative,
        default=Difference(name, 0.0, 0.0),
    )


def compare(
    reference: Model,
    candidate: Model,
    *,
    feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None,
    allowed: float | Bound = 0.0,
    seed: int = 0,
    shapes: Mapping[str, ShapeRange] | None = None,
) -> Report:
    """Run both models on the same inputs.

    Args:
        reference: the original; its outputs set the scale.
        candidate: the rewritten model; needs the same input and output names.
        feeds: samples; None generates two, with different dynamic dimensions.
        allowed: relative tolerance; a Bound says more, as that the candidate rounds to a half type (which is then emulated, see
            `graphopt.emulation`), or takes and gives other floating-point types.
        seed: of the generated inputs.
        shapes: shapes of the generated inputs.

    Raises:
        NotEquivalent: inputs or outputs have other names, or the candidate cannot be run where the reference can.
        UnsupportedModel: the reference cannot be run on any sample.
    """
    return Reference(reference, feeds=feeds, seed=seed, shapes=shapes).compare(candidate, allowed)


class Reference:
    """A model that others are compared with, run once on its samples; feeds and outputs are kept, so a comparison runs the other only."""

    def __init__(
        self,
        model: Model,
        *,
        feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None,
        seed: int = 0,
        shapes: Mapping[str, ShapeRange] | None = None,
    ) -> None:
        """Arguments as of `compare`; `model` must not be changed any more. Nothing runs before the first comparison."""
        self.model = seeded(model)
        self._feeds, self._seed, self._shapes = feeds, seed, shapes
        self._runs: dict[str, tuple[Evaluator, list[Run]]] = {}

    def _expected(self, engine: str) -> tuple[Evaluator, list[Run]]:
        """The evaluator that was asked for, or the one that can load the model, and its samples with their outputs."""
        if engine not in self._runs:
            evaluator = Evaluator(self.model, engine)
            if self._feeds is not None:
                found: list[Run] = [(sample, evaluator.run(sample)) for sample in self._feeds]
            else:
                found = list(generated_runs(self.model, evaluator, self._seed, self._shapes))
            self._runs[engine] = evaluator, found
        return self._runs[engine]

    def compare(self, candidate: Model, allowed: float | Bound = 0.0) -> Report:
        """Run `candidate` on the same samples; `allowed` is the relative tolerance, or a Bound. Raises as `equivalence.compare` does."""
        bound = allowed if isinstance(allowed, Bound) else Bound(allowed)
        allowed = bound.tolerance
        for kind, a, b in (
            ("inputs", self.model.inputs, candidate.inputs),
            ("outputs", self.model.outputs, candidate.outputs),
        ):
            if {s.name for s in a} != {s.name for s in b}:
                raise NotEquivalent(f"{kind} differ: {[s.name for s in a]} and {[s.name for s in b]}")
        candidate = seeded(candidate)
        first, expected = self._expected("onnxruntime")
        types = {s.name: _dtype(s.dtype) for s in candidate.inputs if bound.retyped and s.dtype and _is_float(s.dtype)}
        if bound.rounding is not None:
            candidate = in_float32(candidate, _dtype(bound.rounding))
        fed = {s.name: _dtype(s.dtype) for s in candidate.inputs if bound.rounding and s.dtype and _is_float(s.dtype)}
        try:
            second = Evaluator(candidate)
        except UnsupportedModel as error:
            raise NotEquivalent(f"the original can be run, the candidate cannot: {error}") from None
        if first.engine != second.engine:  # two engines round differently, whatever the models
            first, expected = self._expected("reference")
            second = Evaluator(candidate, "reference")
        worst: dict[str, Difference] = {}
        for sample, outputs in expected:
            try:
                found = second.run(
                    {n: a.astype(types.get(n, a.dtype)).astype(fed.get(n, a.dtype)) for n, a in sample.items()}
                )
            except UnsupportedModel as error:
                raise NotEquivalent(f"the original runs on this sample, the candidate does not: {error}") from None
            for name, value in outputs.items():
                result = found[name]
                if bound.rounding and isinstance(value, np.ndarray) and _is_float(dtype_name(value.dtype)):
                    result = np.asarray(result).astype(value.dtype)
                gap = difference(name, value, result)
                if gap.relative > allowed > 0 and math.isfinite(gap.max_abs):
                    moved = sensitivity(first.run, sample, outputs, self._seed, rounding=bound.rounding)
                    gap = replace(gap, sensitivity=moved[name])
                known = worst.get(name)
                if known is None or (not gap.keeps(allowed), gap.relative) > (not known.keeps(allowed), known.relative):
                    worst[name] = gap
        return Report(tuple(worst.values()), allowed, len(expected), first.engine, bound.rounding)


def sensitivity(
    run: Callable[[Arrays], Arrays],
    sample: Mapping[str, np.ndarray[Any, Any]],
    expected: Arrays,
    seed: int,
    draws: int = 3,
    rounding: str | None = None,
) -> dict[str, float]:
    """The largest change of each output when every floating-point input moves by up to one unit in its last place, or in that of
    the type `rounding`.

    A model that turns a rounding of its inputs into such a change has no more digits to compare: a sigmoid far in its tail, say,
    whose kernel rounds against 1. Integer inputs cannot be moved, and give 0.
    """
    rng = np.random.default_rng(seed)
    moved = dict.fromkeys(expected, 0.0)
    floats = [name for name, array in sample.items() if array.dtype.kind == "f"]
    for _ in range(draws if floats else 0):
        nudged = dict(sample)
        for name in floats:
            array = sample[name]
            if rounding is not None:
                step = np.where(rng.random(array.shape) < 0.5, 1, -1) * float(_finfo(_dtype(rounding)).eps)
                nudged[name] = (array * (1 + step)).astype(array.dtype)
                continue
            towards = np.where(rng.random(array.shape) < 0.5, np.inf, -np.inf).astype(array.dtype)
            nudged[name] = np.where(np.isfinite(array), np.nextafter(array, towards), array)
        for name, value in run(nudged).items():
            gap = difference(name, expected[name], value).max_abs
            moved[name] = max(moved[name], gap if math.isfinite(gap) else 0.0)
    return moved
