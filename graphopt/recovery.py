"""Going on without the rewrite that fails: it is found by bisection, left out, and told of; all others are made.

Each pass runs on a copy, and what comes out is checked: structure, interface and, where samples can be run, the numbers. When a check
fails, or the pass raises, its admissions are searched for the single one that brings the failure (see `bisection`). The nodes which that
rewrite touches are then *covered*: for the time of this pass they are operators of a foreign domain, which no pass may read anything into
(law 6), and the pass runs anew. So any pass can be kept from one rewrite, a plug-in's too, without having a say in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from graphopt.backend import ShapeRange
from graphopt.bisection import touched, turn
from graphopt.errors import GraphoptError, UserError
from graphopt.instruments import Compare, FullCheck, Verify
from graphopt.ir import Model
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline, apply
from graphopt.verdict import Verdict

COVER: Final = "graphopt.covered"  # the domain of nodes that a pass must not touch
_MOST_DROPS: Final = 32  # in one run of a pass; one that fails more often is left out from there on
_MOST_NODES: Final = 64  # that one rewrite may touch and still be covered


@dataclass(frozen=True)
class Dropped:
    """A rewrite that was left out."""

    pass_name: str
    nodes: tuple[str, ...]  # that it would have touched
    reason: str
    rest: bool  # whether the rest of that run of the pass was left out with it

    def __str__(self) -> str:
        at = f" of {', '.join(map(repr, self.nodes[:4]))}{' ...' * (len(self.nodes) > 4)}" if self.nodes else ""
        what = f"a rewrite{at} and what this pass would have done after it are" if self.rest else f"the rewrite{at} is"
        return f"{self.pass_name}: {what} left out, since it fails: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"pass": self.pass_name, "nodes": list(self.nodes), "reason": self.reason, "rest": self.rest}


class Recovery:
    """Runs passes and leaves out the rewrites that fail; `dropped` holds what was left out, in order."""

    def __init__(
        self,
        *,
        feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None,
        seed: int = 0,
        shapes: Mapping[str, ShapeRange] | None = None,
        check: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Args as of `instruments.Compare`; `check` runs onnx.checker too; `say` is told of each rewrite that is left out."""
        self.dropped: list[Dropped] = []
        self._feeds, self._seed, self._shapes, self._say = feeds, seed, shapes, say
        self._check = check
        self._proves = True
        self._covered: dict[str, dict[str, None]] = {}

    @classmethod
    def without(cls, covered: Mapping[str, Iterable[str]]) -> Recovery:
        """One that keeps each named pass from these nodes and checks nothing."""
        made = cls()
        made._proves = False
        made._covered = {name: dict.fromkeys(nodes) for name, nodes in covered.items()}
        return made

    def begin(self, model: Model, pipeline: Pipeline, ctx: Context) -> None:
        """Remember the original."""
        self._verify = Verify()
        self._verify.before_pipeline(model, pipeline, ctx)
        self._compare = Compare(self._feeds, self._seed, self._shapes)
        self._compare.before_pipeline(model, pipeline, ctx)

    def apply(self, step: Pass, model: Model, ctx: Context) -> int:
        """Run `step` on `model` in place, less the rewrites that fail."""
        drops = 0
        while True:
            tried = self._try(step, model, ctx, None)
            if tried.error is None:
                break
            if not self._proves:
                raise tried.error
            good, bad = self._search(step, model, ctx, tried)
            assert bad.error is not None
            nodes = touched(bad.error, good.model, bad.model)  # by the names they have before the rewrite
            known = self._covered.setdefault(step.pass_name(), {})
            fresh = [n for n in nodes if n not in known]
            drops += 1
            rest = not fresh or len(nodes) > _MOST_NODES or drops > _MOST_DROPS
            self._tell(Dropped(step.pass_name(), nodes, _reason(bad.error), rest), ctx)
            if rest:
                tried = good
                break
            known.update(dict.fromkeys(fresh))
        model.graph, model.carried = tried.model.graph, tried.model.carried
        self._verify, self._compare = tried.verify, tried.compare
        ctx.admitted, ctx.uncounted = tried.ctx.admitted, tried.ctx.uncounted
        ctx.spent, ctx.facts = tried.ctx.spent, tried.ctx.facts
        ctx.remarks[:] = [*ctx.remarks, *tried.ctx.remarks]
        return tried.rewrites

    def _tell(self, found: Dropped, ctx: Context) -> None:
        self.dropped.append(found)
        ctx.remark(None, str(found).partition(": ")[2])
        self._say(str(found))

    def _try(self, step: Pass, model: Model, ctx: Context, limit: int | None) -> _Trial:
        """Run `step` on a copy and check what comes out; `limit` counts the admissions of this run."""
        most = ctx.limit if limit is None else ctx.admitted + limit
        spent, facts = copy.deepcopy(ctx.spent), copy.deepcopy(ctx.facts)
        own = replace(ctx, limit=most, remarks=[], spent=spent, facts=facts, analyses={})
        work = model.clone()
        verify, compare = copy.copy(self._verify), self._compare.fork()
        trial = _Trial(work, own, verify, compare)
        if own.exhausted:
            return trial
        uncover = cover(work, self._covered.get(step.pass_name(), ()))
        try:
            trial.rewrites = apply(step, work, own)
            uncover()
            if self._proves:
                verify.after_pass(step, work, own, trial.rewrites)
                if self._check and trial.rewrites:
                    FullCheck().after_pass(step, work, own, trial.rewrites)
                compare.after_pass(step, work, own, trial.rewrites)
        except UserError:  # the call is at fault, not a rewrite
            raise
        except Exception as error:
            uncover()
            trial.error = error
        return trial

    def _search(self, step: Pass, model: Model, ctx: Context, failed: _Trial) -> tuple[_Trial, _Trial]:
        """The runs right before and with the admission that brings the failure."""
        last = max(failed.ctx.admitted - ctx.admitted, 1)
        if self._try(step, model, ctx, last).error is None:
            last += 1  # it raised on its way to the next question
        found = turn(0, last, lambda n: Verdict.GOOD if self._try(step, model, ctx, n).error is None else Verdict.BAD)
        good, bad = (self._try(step, model, ctx, n) for n in (found.good, found.bad))
        if good.error is not None:  # a pass that fails at random
            good = self._try(step, model, ctx, 0)
        return good, bad if bad.error is not None else failed


@dataclass
class _Trial:
    """One run of a pass on a copy."""

    model: Model
    ctx: Context
    verify: Verify
    compare: Compare
    rewrites: int = 0
    error: Exception | None = None


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, GraphoptError) else f"{type(error).__name__}: {text}"


def cover(model: Model, names: Collection[str]) -> Callable[[], None]:
    """Make the named nodes operators that no pass knows; returns what makes them what they were, where they still stand."""
    if not names:
        return lambda: None
    covered = [(n, n.op, n.domain) for n in model.nodes() if n.name in names]
    for node, op, _ in covered:
        node.op, node.domain = f"Covered{op}", COVER
    if covered:
        model.set_opset(COVER, 1)

    def uncover() -> None:
        for node, op, domain in covered:
            node.op, node.domain = op, domain
        kept = [o for o in model.carried.opset_import if o.domain != COVER]
        if len(kept) < len(model.carried.opset_import):
            imports = [type(o).FromString(o.SerializeToString()) for o in kept]
            del model.carried.opset_import[:]
            model.carried.opset_import.extend(imports)

    return uncover
