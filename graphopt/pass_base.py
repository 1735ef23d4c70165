"""What a pass is: one file, one frozen dataclass, options as fields, `run` returning the number of rewrites."""

from __future__ import annotations

import enum
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.data import Data
from graphopt.ir import Model
from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.analyses.shapes import Shapes
    from graphopt.edit import Editor

Analysis = TypeVar("Analysis")
CONTRIB: Final = ("ort:cpu", "ort:cuda")  # targets that run com.microsoft operators themselves
TENSORRT: Final = ("tensorrt", "tensorrt-rtx")


class Exactness(enum.Enum):
    """How far a pass may move the numbers; the comparison's tolerance follows from it."""

    EXACT = "A"  # bitwise
    REASSOCIATING = "B"  # floating-point re-association: a few roundings each rewrite
    APPROXIMATE = "C"  # quantization, pruning: judged by the metric; never in a -O level


@dataclass(frozen=True)
class Remark:
    """Why a pass left something alone, or what else a user should know."""

    pass_name: str
    node: str  # node or tensor it speaks of
    text: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.node}: {self.text}" if self.node else f"{self.pass_name}: {self.text}"


Evaluate = Callable[[Model, gs.Node, list[np.ndarray[Any, Any] | None]], list[np.ndarray[Any, Any]]]

Clock = Callable[[Sequence[Model], Mapping[str, np.ndarray[Any, Any]]], list[float]]


def _no_evaluator(model: Model, node: gs.Node, inputs: list[Any]) -> list[Any]:
    raise NotImplementedError("this context has no evaluator")


@dataclass
class Context:
    """What a pass may know beyond model and options; the driver makes one for each run of a pipeline."""

    target: Target | None = None  # None: portable, no target in mind
    seed: int = 0
    evaluate: Evaluate = _no_evaluator  # one node on arrays; raises where it cannot
    limit: int | None = None  # single rewrites still admitted (bisection); None: all
    remarks: list[Remark] = field(default_factory=list)
    admitted: int = 0
    uncounted: int = 0  # runs of passes that rewrote without asking `admit`; each counts as one admission
    spent: dict[str, int] = field(
        default_factory=dict
    )  # what passes used of a budget that holds for the whole pipeline
    running: str = ""  # name of the pass that runs
    round: int = 0  # of the fixpoint it runs in; 0 outside
    analyses: dict[type, Any] = field(default_factory=dict)  # of the model as it is; the driver drops them on a change
    data: Data | None = None  # calibration samples, for passes that ask how values look
    clock: Clock | None = None  # seconds of a run of each model where it will run; None: that cannot be measured here
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None  # of passes that take minutes
    facts: dict[str, Any] = field(default_factory=dict)  # by pass: what a report should hold, as JSON knows it
    products_stay: bool = False  # whether products must stay apart, since what quantizes or prunes them is yet to come

    def analysis(self, kind: Callable[[Model], Analysis], model: Model) -> Analysis:
        """The analysis `kind` of `model`, computed at most once until a pass changes the model.

        A pass that asks for one after its own first change gets the facts of before that change.
        """
        key: Any = kind
        if key not in self.analyses:
            self.analyses[key] = kind(model)
        found: Analysis = self.analyses[key]
        return found

    def serves(self, targets: tuple[str, ...], wanted: bool | None) -> bool:
        """Whether a pass made for `targets` is to run: as its option says, else on one of them, and never without a target."""
        return self.target is not None and self.target.family in targets if wanted is None else wanted

    def may_raise(self, version: int, wanted: bool | None) -> bool:
        """Whether a pass may raise the model to opset `version`: as its option says, else where a target is known and reads it."""
        return self.target is not None and self.target.traits.opset_ceiling >= version if wanted is None else wanted

    def remark(self, node: gs.Node | gs.Tensor | None, text: str) -> None:
        """Tell the user why `node` was left alone."""
        where = "" if node is None else f"{node.name!r} ({node.op})" if isinstance(node, gs.Node) else repr(node.name)
        self.remarks.append(Remark(self.running, where, text))

    @property
    def exhausted(self) -> bool:
        """Whether no further rewrite is admitted."""
        return self.limit is not None and self.admitted >= self.limit

    def admit(self) -> bool:
        """Ask before each single rewrite; False when bisection has used up its number."""
        if self.exhausted:
            return False
        self.admitted += 1
        return True


@dataclass(frozen=True)
class Place:
    """Where a rule can fire: at a node of one of `ops` that stands beside others."""

    ops: tuple[str, ...]
    reads: tuple[str, ...] = ()  # one of its operands is computed by one of these
    read_by: tuple[str, ...] = ()  # its first result is read by one of these
    constant: bool = False  # one of its operands is constant
    otherwise: str = ""  # what else lets the rule fire, whatever stands beside the node, as in "or have two operands"

    def occurs(self, operators: frozenset[str], links: frozenset[tuple[str, str]]) -> bool:
        """Whether a model of these operators, and these pairs of one and a reader of it, may have such a place."""
        if operators.isdisjoint(self.ops):
            return False
        if self.otherwise:
            return True
        reads = not self.reads or any((made, op) in links for made in self.reads for op in self.ops)
        return reads and (not self.read_by or any((op, reader) in links for op in self.ops for reader in self.read_by))

    def missing(self, node: gs.Node, edit: Editor) -> str | None:
        """What `node`, of one of the operators, lacks beside it; None: nothing."""
        sources = [(t, edit.producer(t)) for t in node.inputs if t.name]
        if self.reads and not any(made is not None and made.op in self.reads for _, made in sources):
            computed = [repr(t.name) if made is None else made.op for t, made in sources if not edit.is_fixed(t)]
            found = ", ".join(dict.fromkeys(computed)) or "constants alone"
            return f"it would have to read {' or '.join(self.reads)}, but reads {found}{self._other()}"
        readers = [reader.op for reader in node.outputs[0].outputs] if node.outputs else []
        if self.read_by and not any(op in self.read_by for op in readers):
            found = ", ".join(dict.fromkeys(readers)) or "nothing"
            return f"{' or '.join(self.read_by)} would have to read it, but {found} does{self._other()}"
        if self.constant and not any(edit.is_fixed(t) for t, _ in sources):
            return f"one of its operands would have to be constant{self._other()}"
        beside = self.reads or self.read_by or self.constant
        return None if beside or not self.otherwise else f"it would have to {self.otherwise}"

    def _other(self) -> str:
        return f" (or it would have to {self.otherwise})" if self.otherwise else ""


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    A pass is pure in (model, options, context), leaves the model valid, keeps its inputs and outputs, fails safe (unknown op,
    dynamic dimension, subgraph: leave alone and remark), and returns the number of rewrites; the driver sorts, removes what
    died, and verifies. The class docstring says the theorem in its first line and shows it as ``Before:`` and ``After:``
    blocks of ONNX text, which are documentation and test at once.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    serves: ClassVar[tuple[str, ...]] = ()  # targets that it is made for, by `Target.family`; (): every one
    ops: ClassVar[frozenset[str] | None] = None  # the pass can only do something where one of these is; None: anywhere

    places: ClassVar[
        tuple[Place, ...]
    ] = ()  # where alone its rules can fire, for the driver and for `explain`; (): anywhere

    @property
    def rounds_to(self) -> str | None:
        """The type to which an approximate pass rounds, where that is all that it does to the numbers; the proof then has a bound."""
        return None

    @property
    def retypes(self) -> bool:
        """Whether inputs and outputs of the model may change from one floating-point type to another."""
        return False

    def run(self, model: Model, ctx: Context) -> int:
        """Rewrite `model` in place; returns the number of rewrites."""
        raise NotImplementedError(f"{type(self).__name__} does not implement run")

    @classmethod
    def objection(cls, node: gs.Node, edit: Editor, shapes: Shapes) -> str | None:
        """Why the pass does nothing to `node` in a model on which it has run, for `graphopt explain`; None: nothing to say.

        A pass that knows more than its operators and `places` says more.
        """
        missing = [place.missing(node, edit) for place in cls.places if node.op in place.ops]
        if missing and node.domain in (None, "", "ai.onnx") and None not in missing:
            return "; or ".join(dict.fromkeys(text for text in missing if text))
        if cls.ops is None or node.op not in cls.ops:
            return None
        return f"looks at {node.op}, and found nothing to do. It is there to: {cls.summary()}"

    @classmethod
    def pass_name(cls) -> str:
        """The file name with dashes."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def example(cls) -> tuple[str, str] | None:
        """The texts of the Before and After blocks, or None where one is missing."""
        doc = inspect.cleandoc(cls.__doc__ or "")
        blocks: dict[str, list[str]] = {}
        current: list[str] | None = None
        for line in doc.splitlines():
            if line.rstrip() in ("Before:", "After:"):
                current = blocks.setdefault(line.rstrip()[:-1], [])
            elif current is not None and line.strip() and not line.startswith(" "):
                current = None
            elif current is not None:
                current.append(line)
        if set(blocks) != {"Before", "After"}:
            return None
        before, after = (textwrap.dedent("\n".join(blocks[key])).strip() for key in ("Before", "After"))
        return before, after

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        found = {}
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if value != default:
                found[item.name] = value
        return found
