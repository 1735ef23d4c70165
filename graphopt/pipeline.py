"""Pipelines: passes in sequence, as a value with a text form.

    fold-constants,fuse-conv-bn,fixpoint(eliminate-identity,eliminate-common-subexpression)
    fold-constants{budget=none}                       options in braces; strings with commas or blanks in quotes
    default,quantize-qdq{exclude=['/head/*','a']}     a preset's name stands for its passes

``parse(str(p)) == p``. The driver knows no instrument: whoever wants to see, time or prove something is called around each pass.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Protocol, TypeVar

from graphopt import isolation, verify
from graphopt.discovery import find_pass, nearest, pass_modules
from graphopt.edit import cleanup, name_nodes
from graphopt.errors import GraphoptError, InvalidModel, PassError, PipelineSyntaxError, UnknownPass
from graphopt.garbage import patient_collector
from graphopt.ir import Model, fresh_names
from graphopt.pass_base import Context, Exactness, Pass, Remark
from graphopt.signature import Signature
from graphopt.writing import homeless

PRESETS: Final[dict[str, str]] = {
    "O0": "",
    "O1": "eliminate-identity,fold-constants,eliminate-dead",
    # Exact rewrites: exporter debris, shape arithmetic, no-ops, chains, transposes.
    "simplify": "inline-functions,eliminate-dead,fixpoint("
    "lower-cast-like,inline-if,unroll-loop{grow=false},eliminate-identity,eliminate-nop,eliminate-idempotent,fold-constants,fold-shapes,fold-fills,eliminate-common-subexpression,"
    "rebuild-shapes,drop-default-operands,merge-casts,merge-clips,simplify-masks,"
    "lower-sequences,fuse-slice-squeeze,merge-slices,split-slices,eliminate-expand,merge-reshapes,merge-concats,bypass-concats,merge-pads,merge-gathers,fuse-gather-unsqueeze,merge-expands,fuse-reduce-unsqueeze,merge-transposes,sink-transposes),"
    "eliminate-unused",
    # Constants into the weights beside them: each rounds once.
    "fuse-weights": "fuse-log-softmax,fuse-arg-max,fixpoint(simplify-arithmetic,fuse-reciprocal,fuse-min-max,fuse-bn-affine,fuse-conv-bn,fuse-conv-scale,fuse-conv-bias,fuse-conv-branches,fuse-linear-chain,fuse-input-shift,fuse-negation,fuse-pad,"
    "fuse-gemm-bn,merge-matmul-scales,fuse-matmul-scale,fuse-matmul-add,fuse-gemm-transpose,eliminate-nop)",
    "O2": "simplify,merge-product-transposes,merge-transposes,merge-equal-channels,lower-filled-products,fold-constants,merge-reductions,merge-reshapes,sink-transposes-through-sums,lower-gemm,"
    "fuse-reduce-mean,fuse-softmax,fuse-layer-norm{raise-opset=false},fuse-instance-norm,fuse-rms-norm{ones=false},fuse-gelu{contrib=false},fuse-hard-swish,fuse-global-average-pool{flatten=false},fuse-depth-to-space,"
    "fuse-weights,share-initializers,eliminate-dead,infer-shapes",
    # What the target runs fastest; each pass knows the targets it is made for, and does nothing on others.
    "fuse-for-target": "lower-attention,lower-einsum,fuse-reduce-mean,fuse-softmax,fuse-layer-norm,fuse-instance-norm,fuse-group-norm,fuse-rms-norm{ones=false},fuse-reduce-square,fuse-gelu,fuse-hard-swish,fuse-mish,fuse-rotary-embedding,fuse-global-average-pool,fuse-depth-to-space,"
    "fuse-weights,lower-gemm,fuse-attention,sink-nan-guards,lower-gemm,sink-transposes-through-products,simplify,sink-transposes-through-sums,merge-sums,fuse-rms-norm,fuse-skip-layer-norm,fuse-bias-gelu",
    "O3": "simplify,merge-equal-channels,fold-constants,merge-reductions,merge-reshapes,sink-transposes-through-sums,fuse-for-target,"
    "share-initializers,eliminate-dead,infer-shapes",
    "default": "O3",
    # O3, but fusions without a sure gain are timed on this machine and kept where they are faster.
    "measured": "simplify,merge-equal-channels,fold-constants,merge-reductions,merge-reshapes,sink-transposes-through-sums,lower-attention,lower-einsum,fuse-reduce-mean,fuse-softmax,fuse-layer-norm,fuse-instance-norm,fuse-group-norm,fuse-rms-norm{ones=false},fuse-reduce-square,fuse-gelu,fuse-hard-swish,fuse-mish,fuse-rotary-embedding,"
    "fuse-global-average-pool,fuse-depth-to-space,fuse-weights,lower-gemm,fuse-attention{measure=true},sink-nan-guards,lower-gemm,sink-transposes-through-products,"
    "simplify,sink-transposes-through-sums,merge-sums{measure=true},fuse-rms-norm,fuse-skip-layer-norm,fuse-bias-gelu{measure=true},"
    "share-initializers,eliminate-dead,infer-shapes",
}
_FIXPOINT_CAP: Final = 20  # rounds; a pipeline that still changes something then is reported, not trusted

T = TypeVar("T")


class Instrument(Protocol):
    """What is called around each pass; derive and override what is needed."""

    def before_pipeline(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Before the first pass."""

    def before_pass(self, step: Pass, model: Model, ctx: Context) -> None:
        """Right before a pass runs."""

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """After a pass and the driver's clean-up."""

    def pass_failed(self, step: Pass, model: Model, ctx: Context, error: Exception) -> None:
        """A pass, or an instrument after it, raised; `model` may be broken."""

    def after_pipeline(self, model: Model, ctx: Context) -> None:
        """After the last pass."""


class Recovery(Protocol):
    """Runs passes in the driver's place so that a failing rewrite does not end the pipeline."""

    def begin(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Before the first pass."""

    def apply(self, step: Pass, model: Model, ctx: Context) -> int:
        """Run `step` on `model` in place, less what fails; returns the number of rewrites that stay."""


@dataclass(frozen=True)
class Fixpoint:
    """Steps repeated until a round changes nothing."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return f"fixpoint({','.join(map(step_text, self.steps))})"


Step = Pass | Fixpoint


@dataclass(frozen=True)
class StepReport:
    """What one pass did, in the order of the run."""

    pass_name: str
    rewrites: int
    round: int  # 0 outside a fixpoint, else from 1


@dataclass(frozen=True)
class Result:
    """A pipeline's outcome."""

    model: Model
    steps: tuple[StepReport, ...]
    remarks: tuple[Remark, ...]
    stops: tuple[str, ...] = ()  # why each fixpoint stopped
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # by pass: what a report should hold

    @property
    def rewrites(self) -> int:
        """All rewrites of all passes."""
        return sum(step.rewrites for step in self.steps)


@dataclass(frozen=True)
class Pipeline:
    """An immutable sequence of passes."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the text form.

        Raises:
            PipelineSyntaxError: with a caret under the column.
            UnknownPass: with the nearest name.
        """
        return cls(_Parser(text).pipeline())

    def __str__(self) -> str:
        return ",".join(map(step_text, self.steps))

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.steps + other.steps)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes, fixpoints flattened, in text order."""
        return tuple(_flatten(self.steps))

    @property
    def exactness(self) -> Exactness:
        """The loosest class among the passes."""
        return max((p.exactness for p in self.passes), key=lambda e: e.value, default=Exactness.EXACT)

    @patient_collector()
    def run(
        self,
        model: Model,
        ctx: Context | None = None,
        instruments: Sequence[Instrument] | None = None,
        recovery: Recovery | None = None,
        *,
        done: int = 0,
        after_step: Callable[[int, Result], None] | None = None,
    ) -> Result:
        """Run on a copy of `model`, which stays as it is; constant values are shared, so this costs no weights.

        Args:
            model: the input.
            ctx: target, seed, evaluator; default: portable, ONNX Runtime as evaluator.
            instruments: called around each pass; default: the structural verifier.
            recovery: runs each pass in the driver's place and leaves out what fails; None: a failure ends the pipeline.
            done: steps that `model` has behind it; `ctx` then holds what they left there.
            after_step: is told, after each step, how many are done and what came of those that ran here.

        Raises:
            PassError: a pass raised, or its count contradicts what it did.
            VerifyError: the verifier found the graph broken.
            InvalidModel: `model` has a cycle, or is one that onnx.checker refuses and a pass tripped over.
        """
        if ctx is None:
            from graphopt.evaluate import evaluate_node, seconds

            ctx = Context(evaluate=evaluate_node, clock=seconds)
        if instruments is None:
            from graphopt.instruments import Verify

            instruments = (Verify(),)
        try:
            return _Run(model.clone(), ctx, instruments, recovery).pipeline(self, done, after_step)
        except PassError as error:
            if isinstance(error.__cause__, _TRIPPED):
                _blame(model, error)
            raise


# What a pass raises that trips over a model which contradicts itself: shapes that do not fit operands, axes that are not there.
_TRIPPED: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _blame(model: Model, error: PassError) -> None:
    """Say that the model is at fault where a pass failed on one that onnx.checker refuses.

    Raises:
        InvalidModel: it does; passes may rely on what the checker holds.
    """
    if any(node.domain not in (None, "", "ai.onnx") for node in model.nodes()):
        return  # the checker knows only the standard's operators
    try:
        verify.full(model)
    except InvalidModel as invalid:
        raise InvalidModel(f"the model contradicts itself, and a pass tripped over it: {invalid}") from error


def _flatten(steps: Iterable[Step]) -> Iterable[Pass]:
    for step in steps:
        if isinstance(step, Fixpoint):
            yield from _flatten(step.steps)
        else:
            yield step


def apply(step: Pass, model: Model, ctx: Context, before: Signature | None = None) -> int:
    """Run one pass on `model`, hold it to its count, and clean up behind it; `before` is the model's signature, if known.

    A pass that rewrote without asking `ctx.admit` counts as one admission, so that bisection can leave its whole run out.

    Raises:
        PassError: its count contradicts what it did; what the pass itself raises passes through.
        VerifyError: it left a cycle.
    """
    before = before or Signature(model)
    asked = ctx.admitted
    rewrites = step.run(model, ctx)
    changed = before != Signature(model)
    if rewrites and ctx.admitted == asked:
        ctx.admitted += 1
        ctx.uncounted += 1
    if changed != (rewrites > 0):
        did = "changed the graph" if changed else "left the graph as it was"
        raise PassError(
            f"{step.pass_name()} reports {rewrites} rewrites but {did}; pass author: return the number of rewrites done"
        )
    if rewrites:
        cleanup(model)
    return rewrites


def measures(steps: Iterable[Step]) -> bool:
    """Whether one of `steps` quantizes or prunes; rounding to a half type is neither."""
    return any(p.exactness is Exactness.APPROXIMATE and p.rounds_to is None for p in _flatten(steps))


class _Run:
    def __init__(
        self, model: Model, ctx: Context, instruments: Sequence[Instrument], recovery: Recovery | None = None
    ) -> None:
        self.model = model
        self.ctx = ctx
        self.instruments = instruments
        self.recovery = recovery
        self.reports: list[StepReport] = []
        self.stops: list[str] = []
        self.signature: Signature | None = None  # of the model as it is now
        self.operators: frozenset[str] | None = None  # of the model as it is now
        self.links: frozenset[tuple[str, str]] = (
            frozenset()
        )  # operators of which one reads the other, of the same model
        self.changes = 0
        self.declared = -1  # the number of changes after which all constants had a graph
        self.idle: dict[Pass, int] = {}  # the number of changes after which a pass found nothing to do

    def pipeline(self, pipeline: Pipeline, done: int, after_step: Callable[[int, Result], None] | None) -> Result:
        if not done:
            self.ctx.facts.clear()
        self.ctx.analyses.clear()  # a context may have seen another model
        if pipeline.steps and not done:
            self.model.modernize()
            verify.cycles(self.model)  # passes may count on topological order
            fresh = fresh_names(self.model)
            for graph in self.model.graphs():
                name_nodes(graph.nodes, fresh)
        for instrument in self.instruments:
            instrument.before_pipeline(self.model, pipeline, self.ctx)
        if self.recovery is not None:
            self.recovery.begin(self.model, pipeline, self.ctx)
        asked = self.ctx.products_stay
        for number, step in enumerate(pipeline.steps[done:], done + 1):
            self.ctx.products_stay = asked or measures(pipeline.steps[number - 1 :])
            self.step(step, 0)
            self.declare()
            if after_step is not None:
                after_step(number, self.result())
        for instrument in self.instruments:
            instrument.after_pipeline(self.model, self.ctx)
        return self.result()

    def declare(self) -> None:
        """Let the root graph hold the constants that passes made, in the order that a file written now would have: a pipeline that
        goes on from such a file then ends in the same bytes."""
        if self.declared == self.changes:
            return
        self.declared = self.changes
        made = homeless(self.model)
        if made:
            self.model.graph.initializers.extend(made)
            self.signature = None
            self.ctx.analyses.clear()

    def result(self) -> Result:
        """What came of the steps so far."""
        remarks = tuple(dict.fromkeys(self.ctx.remarks))
        return Result(self.model, tuple(self.reports), remarks, tuple(self.stops), dict(self.ctx.facts))

    def step(self, step: Step, round_number: int) -> int:
        if isinstance(step, Pass):
            return self.one_pass(step, round_number)
        total = 0
        for number in range(1, _FIXPOINT_CAP + 1):
            changed = sum(self.step(inner, number) for inner in step.steps)
            total += changed
            if not changed:
                self.stops.append(f"{step}: nothing left to do after {number} rounds")
                return total
        self.stops.append(f"{step}: stopped at the cap of {_FIXPOINT_CAP} rounds, still changing")
        return total

    def is_idle(self, step: Pass) -> bool:
        """Whether `step` did nothing on the model as it is, or can do nothing for want of its operators, or of those beside them."""
        if self.idle.get(step) == self.changes:
            return True
        if step.ops is None and not step.places:
            return False
        if self.operators is None:
            nodes = list(self.model.nodes())
            self.operators = frozenset(node.op for node in nodes)
            self.links = frozenset((p.op, node.op) for node in nodes for t in node.inputs for p in t.inputs)
        if step.ops is not None and step.ops.isdisjoint(self.operators):
            return True
        return bool(step.places) and not any(p.occurs(self.operators, self.links) for p in step.places)

    def rewrite(self, step: Pass) -> int:
        """Run `step` and hold it to its count."""
        before = self.signature or Signature(self.model)
        self.signature = None
        if self.recovery is None:
            rewrites = apply(step, self.model, self.ctx, before)
        else:
            rewrites = self.recovery.apply(step, self.model, self.ctx)
        if rewrites:
            self.changes += 1
            self.operators = None
            self.ctx.analyses.clear()
        else:
            self.signature = before
            self.idle[step] = self.changes
        return rewrites

    def one_pass(self, step: Pass, round_number: int) -> int:
        name = step.pass_name()
        self.ctx.running, self.ctx.round = name, round_number
        with isolation.step(f"pass {name}"):
            return self.watched_pass(step, name, round_number)

    def watched_pass(self, step: Pass, name: str, round_number: int) -> int:
        """Run a pass between its instruments."""
        try:
            for instrument in self.instruments:
                instrument.before_pass(step, self.model, self.ctx)
            rewrites = 0 if self.ctx.exhausted or self.is_idle(step) else self.rewrite(step)
            for instrument in self.instruments:
                instrument.after_pass(step, self.model, self.ctx, rewrites)
        except Exception as error:
            for instrument in self.instruments:
                instrument.pass_failed(step, self.model, self.ctx, error)
            if isinstance(error, GraphoptError | MemoryError):
                raise
            after = ",".join(r.pass_name for r in self.reports) or "none"
            told = PassError(f"{name} failed ({type(error).__name__}: {error}); passes before it: {after}")
            for note in getattr(error, "__notes__", ()):  # by instruments
                told.add_note(note)
            raise told from error
        self.reports.append(StepReport(name, rewrites, round_number))
        return rewrites


# ----------------------------------------------------------------------------------------------------------- text

_WORD = re.compile(r"[A-Za-z_][\w-]*")
_BARE = re.compile(r"[^\s,{}()\[\]'\"=]+")


def step_text(step: Step) -> str:
    if isinstance(step, Fixpoint):
        return str(step)
    options = ",".join(f"{name.replace('_', '-')}={value_text(value)}" for name, value in step.options().items())
    return f"{step.pass_name()}{{{options}}}" if options else step.pass_name()


def value_text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, enum.Enum):
        text = str(value.value)
        return text if _BARE.fullmatch(text) else repr(text)
    if isinstance(value, str):
        plain = _BARE.fullmatch(value) and value.lower() not in ("none", "true", "false") and _number(value) is None
        return value if plain else repr(value)
    return repr(value) if not isinstance(value, Path) else repr(str(value))


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


class _Parser:
    """Recursive descent over the text form; every error knows its column."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(
        self, message: str, at: int | None = None, error: type[PipelineSyntaxError | UnknownPass] | None = None
    ) -> NoReturn:
        column = self.at if at is None else at
        raise (error or PipelineSyntaxError)(f"{message}\n  {self.text}\n  {' ' * column}^")

    def blank(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self, char: str) -> bool:
        self.blank()
        return self.text.startswith(char, self.at)

    def take(self, char: str) -> bool:
        if self.peek(char):
            self.at += len(char)
            return True
        return False

    def pipeline(self) -> tuple[Step, ...]:
        self.blank()
        if self.at == len(self.text):
            return ()
        steps = self.steps()
        self.blank()
        if self.at < len(self.text):
            self.fail(f"expected ',' or the end, found {self.text[self.at]!r}")
        return steps

    def steps(self) -> tuple[Step, ...]:
        found = list(self.step())
        while self.take(","):
            found.extend(self.step())
        return tuple(found)

    def step(self) -> tuple[Step, ...]:
        self.blank()
        start = self.at
        match = _WORD.match(self.text, self.at)
        if match is None:
            self.fail("expected the name of a pass")
        name = match.group()
        self.at = match.end()
        if name == "fixpoint":
            if not self.take("("):
                self.fail("expected '(' after fixpoint")
            steps = () if self.peek(")") else self.steps()
            if not self.take(")"):
                self.fail("expected ')' or ','")
            return (Fixpoint(steps),)
        if name in PRESETS:
            return _Parser(PRESETS[name]).pipeline()
        if name not in pass_modules():
            known = [*pass_modules(), *PRESETS, "fixpoint"]
            self.fail(f"unknown pass {name!r}{nearest(name, known)}; `graphopt passes` lists them", start, UnknownPass)
        return (self.options(name, find_pass(name)),)

    def options(self, name: str, kind: type[Pass]) -> Pass:
        values: dict[str, Any] = {}
        known = {f.name for f in dataclasses.fields(kind)}
        begin = self.at
        if self.take("{"):
            while not self.take("}"):
                self.blank()
                start = self.at
                match = _WORD.match(self.text, self.at)
                if match is None:
                    self.fail("expected the name of an option or '}'")
                key = match.group().replace("-", "_")
                self.at = match.end()
                if key not in known:
                    listed = ", ".join(sorted(k.replace("_", "-") for k in known)) or "none"
                    self.fail(
                        f"{name} has no option {match.group()!r}{nearest(key, known)}; its options: {listed}", start
                    )
                if key in values:
                    self.fail(f"{name}: option {match.group()!r} is given twice", start)
                if not self.take("="):
                    self.fail(f"expected '=' after option {match.group()!r}")
                self.blank()
                start = self.at
                raw = self.value()
                try:
                    values[key] = convert(raw, typing.get_type_hints(kind)[key])
                except ValueError as error:
                    self.fail(f"{name}: option {match.group()!r}: {error}", start)
                if not self.take(",") and not self.peek("}"):
                    self.fail("expected ',' or '}'")
        try:
            return kind(**values)
        except (ValueError, TypeError) as error:
            self.fail(f"{name}: {error}", begin)

    def value(self) -> Any:
        if self.take("["):
            items: list[Any] = []
            while not self.take("]"):
                items.append(self.value())
                if not self.take(",") and not self.peek("]"):
                    self.fail("expected ',' or ']'")
            return tuple(items)
        self.blank()
        if self.at < len(self.text) and self.text[self.at] in "'\"":
            quote, start = self.text[self.at], self.at
            end = self.at + 1
            while end < len(self.text) and self.text[end] != quote:
                end += 2 if self.text[end] == "\\" else 1
            if end >= len(self.text):
                self.fail("string without an end", start)
            self.at = end + 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # '\\d' stays a backslash and a d
                    return str(ast.literal_eval(self.text[start : self.at]))
            except (SyntaxError, ValueError):
                self.fail("no valid string; write a backslash as \\\\", start)
        match = _BARE.match(self.text, self.at)
        if match is None:
            self.fail("expected a value")
        self.at = match.end()
        return _Bare(match.group())


class _Bare(str):
    """A value without quotes: may be a number, a word or a string."""

    __slots__ = ()


def convert(raw: Any, wanted: Any) -> Any:
    """Turn what was written into the type of a dataclass field: bool, int, float, str, Path, an Enum, a Literal, a tuple of
    these, or any of these or None.

    Raises:
        ValueError: it does not fit; the message names the type.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and isinstance(raw, _Bare) and raw.lower() == "none":
            return None
        rest = [a for a in arguments if a is not type(None)]
        if str in rest and isinstance(raw, str) and not isinstance(raw, _Bare):
            return str(raw)
        for kind in rest[:-1]:
            try:
                return convert(raw, kind)
            except ValueError:
                continue
        return convert(raw, rest[-1])
    if origin is tuple:
        items = raw if isinstance(raw, tuple) else (raw,)
        kinds = arguments[:1] * len(items) if Ellipsis in arguments else arguments
        if len(items) != len(kinds):
            raise ValueError(f"takes {len(kinds)} values, found {len(items)}")
        return tuple(map(convert, items, kinds))
    if origin is Literal:
        if str(raw) in map(str, arguments):
            return next(a for a in arguments if str(a) == str(raw))
        raise ValueError(f"{str(raw)!r} is none of {', '.join(map(str, arguments))}")
    if isinstance(raw, tuple):
        raise ValueError("takes one value, not a list")
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return _one_of(raw, wanted)
    if wanted is bool:
        return _one_of(raw, {"true": True, "false": False, "1": True, "0": False})
    if wanted in (int, float):
        number = _number(raw)
        if number is None or (wanted is int and not isinstance(number, int)):
            raise ValueError(f"{str(raw)!r} is no {'integer' if wanted is int else 'number'}")
        return wanted(number)
    if wanted is Path:
        return Path(raw)
    return str(raw)


def _one_of(raw: str, choices: Any) -> Any:
    table: dict[str, Any] = choices if isinstance(choices, dict) else {str(c.value): c for c in choices}
    if raw.lower() in table:
        return table[raw.lower()]
    if raw in table:
        return table[raw]
    raise ValueError(f"{str(raw)!r} is none of {', '.join(table)}")


__all__ = ["PRESETS", "Fixpoint", "Instrument", "Pipeline", "Result", "StepReport"]
