"""Which single rewrite broke the model? A binary search over the number of rewrites that a pipeline may make.

`Context.limit` admits the first n rewrites and no more; equal models, options and seeds number them alike in every run, so the model
after n rewrites is well defined. A pass that does not ask `Context.admit` counts as one rewrite, its whole run.

The search keeps a good number below a bad one and halves the gap, so it ends at a rewrite before which the model is good and after
which it is bad, whether or not good and bad alternate in between. A verdict "cannot tell" moves the question to a neighbour.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from graphopt import equivalence
from graphopt.errors import GraphoptError, InternalError, UsageError, UserError
from graphopt.graph_diff import Change, diff
from graphopt.instruments import Verify, _Silent
from graphopt.ir import Model
from graphopt.pass_base import Context, Pass
from graphopt.pipeline import Pipeline, Result
from graphopt.verdict import Command, Judge, Verdict

Say = Callable[[str], None]
_MOST_NODES: Final = 64  # that a rewrite may touch for the question what happens without it


@dataclass(frozen=True)
class Turn:
    """Where good turns into bad."""

    good: int
    bad: int  # good + 1, unless nothing can be told of what lies between
    unknown: tuple[int, ...] = ()


def turn(good: int, bad: int, judge: Callable[[int], Verdict]) -> Turn:
    """Find neighbours, or nearly, of which the first is good and the second bad, in O(log n) questions.

    Args:
        good: a number known to be good.
        bad: a larger one known to be bad.
        judge: asked of numbers in between, each at most once.
    """
    known = {good: Verdict.GOOD, bad: Verdict.BAD}
    while bad - good > 1:
        for number in _from_the_middle(good, bad):
            if number not in known:
                known[number] = judge(number)
            if known[number] is not Verdict.UNKNOWN:
                break
        else:
            return Turn(good, bad, tuple(range(good + 1, bad)))
        if known[number] is Verdict.GOOD:
            good = number
        else:
            bad = number
    return Turn(good, bad)


def _from_the_middle(low: int, high: int) -> Iterator[int]:
    """Every number between, those nearest to the middle first."""
    middle = (low + high) // 2
    for distance in range(high - low):
        for number in dict.fromkeys((middle + distance, middle - distance)):
            if low < number < high:
                yield number


@dataclass(frozen=True)
class Culprit:
    """The rewrite after which a model is bad."""

    number: int  # of the rewrite, from 1
    total: int  # rewrites of the whole pipeline, up to where it failed
    pass_name: str
    round: int  # of its fixpoint; 0 outside
    change: Change  # what the rewrite did; empty where it raised before it was done
    nodes: tuple[str, ...]  # that it touched, or was about to
    reason: str  # why the model is bad after it
    runs: int  # of the pipeline
    counted: bool  # whether the pass asks before each rewrite; else `change` is that of its whole run
    unknown: tuple[int, ...] = ()  # numbers before it of which nothing could be told: it may be one of these
    alone: bool | None = None  # whether all is good without it; None: not asked


class _Where(_Silent):
    """Notes which pass made the rewrite of a number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.found: tuple[str, int] | None = None
        self.broken: Model | None = None  # what a failing pass left
        self._before = 0

    def before_pass(self, step: Pass, model: Model, ctx: Context) -> None:
        """Remember the count."""
        self._before = ctx.admitted

    def after_pass(self, step: Pass, model: Model, ctx: Context, rewrites: int) -> None:
        """See whether the number was reached."""
        if self._before < self.number <= ctx.admitted:
            self.found = self.found or (step.pass_name(), ctx.round)

    def pass_failed(self, step: Pass, model: Model, ctx: Context, error: Exception) -> None:
        """A pass that raises may not have counted its last rewrite yet."""
        self.found = self.found or (step.pass_name(), ctx.round)
        self.broken = model


@dataclass
class _Outcome:
    verdict: Verdict
    reason: str
    model: Model | None  # what a failing pass left, where one failed
    error: Exception | None
    ctx: Context
    where: tuple[str, int] | None


class Bisection:
    """One search: a model, a pipeline, and a judge."""

    def __init__(
        self,
        model: Model,
        pipeline: Pipeline,
        judge: Judge,
        context: Callable[[], Context] | None = None,
        progress: Say = lambda text: None,
    ) -> None:
        """`context` makes the context of a run, anew each time; `progress` hears of each run."""
        self.model, self.pipeline, self.judge, self.progress = model, pipeline, judge, progress
        self._context = context or _plain_context
        self.runs = 0

    def run(self, limit: int | None) -> _Outcome:
        """Run the pipeline up to `limit` rewrites and judge what comes out; a pass that fails makes it bad."""
        self.runs += 1
        ctx = self._context()
        ctx.limit = limit
        where = _Where(limit or 0)
        try:
            result = self.pipeline.run(self.model, ctx, [Verify(), where])
        except InternalError as error:
            outcome = _Outcome(Verdict.BAD, str(error), where.broken, error, ctx, where.found)
        else:
            outcome = _Outcome(*self.judge.judge(result.model), result.model, None, ctx, where.found)
        shown = "all" if limit is None else str(limit)
        self.progress(f"{shown} rewrites: {outcome.verdict.value} ({outcome.reason})")
        return outcome

    def find(self) -> Culprit | None:
        """The rewrite that turns good into bad, or None where the result of the whole pipeline is good.

        Raises:
            UserError: the model is bad before any rewrite, or nothing can be told of it or of the result.
        """
        full = self.run(None)
        if full.verdict is Verdict.UNKNOWN and isinstance(self.judge, Command) and full.reason.startswith("killed"):
            self.judge.hangs_are_bad = True  # a hang is what is looked for
            full.verdict = Verdict.BAD
        if full.verdict is Verdict.GOOD:
            return None
        if full.verdict is Verdict.UNKNOWN:
            raise UserError(f"nothing can be told of the result ({full.reason}); there is nothing to search for")
        start = self.run(0)
        if start.verdict is not Verdict.GOOD:
            raise UserError(
                f"the model is {'bad' if start.verdict is Verdict.BAD else 'of no use'} before any rewrite ({start.reason}), "
                "so no pass is at fault; the command, or the data and the tolerance, must accept the original"
            )
        total = full.ctx.admitted
        last = total + 1 if full.error is not None else total
        if last == 0:
            raise UserError("the pipeline makes no rewrite, and yet its result is bad: the judge changes its mind")
        found = turn(0, last, lambda number: self.run(number).verdict)
        return self._describe(found, total)

    def _describe(self, found: Turn, total: int) -> Culprit:
        before, after = self.run(found.good), self.run(found.bad)
        if before.verdict is not Verdict.GOOD or after.verdict is not Verdict.BAD:
            raise UserError(
                f"the verdict on the model after {found.bad} rewrites changes from run to run: nothing can be found; make the "
                "command (or the model) deterministic, or give a larger --tolerance"
            )
        name, round_number = after.where or (after.ctx.running, after.ctx.round)
        change, nodes = Change((), (), (), ()), tuple[str, ...]()
        if before.model is not None and after.error is not None:
            nodes = touched(after.error, before.model, after.model)
        if before.model is not None and after.model is not None and _is_whole(after.error):
            change = diff(before.model, after.model)
            nodes = nodes or replaced(before.model, after.model)
        return Culprit(
            found.bad,
            total,
            name,
            round_number,
            change,
            nodes,
            after.reason,
            self.runs,
            after.ctx.uncounted == before.ctx.uncounted,
            found.unknown,
            self._without(name, nodes),
        )

    def _without(self, pass_name: str, nodes: tuple[str, ...]) -> bool | None:
        """Whether the result is good when the pass cannot get at these nodes."""
        from graphopt.recovery import Recovery

        if not nodes or len(nodes) > _MOST_NODES:
            return None
        ctx = self._context()
        self.runs += 1
        try:
            result = self.pipeline.run(self.model, ctx, [Verify()], Recovery.without({pass_name: nodes}))
        except GraphoptError:
            return False
        verdict, _ = self.judge.judge(result.model)
        return None if verdict is Verdict.UNKNOWN else verdict is Verdict.GOOD


def _plain_context() -> Context:
    from graphopt.evaluate import evaluate_node

    return Context(evaluate=evaluate_node)


def _is_whole(error: Exception | None) -> bool:
    """Whether the pass got to its end, so that its model shows what it did; an exception of its own stops it halfway."""
    return error is None or error.__cause__ is None


def replaced(before: Model, after: Model) -> tuple[str, ...]:
    """Names of the nodes of `before` in whose place something else stands; or of all that went; or of those that changed.

    What came says by its origin what it stands for; without that, all that died with it would count.
    """
    change = diff(before, after)
    added = set(change.added)
    stand = {o for n in after.nodes() if n.name in added for o in n.origin}
    here = {n.name: set(n.origin or (n.name,)) for n in before.nodes()}
    gone = [n for n in change.removed if n in here]
    return tuple(n for n in gone if here[n] & stand) or tuple(gone) or tuple(n for n in change.changed if n in here)


def touched(error: Exception, before: Model, after: Model | None) -> tuple[str, ...]:
    """Names of the nodes of `before` that a failing rewrite touched; `after` is what it left.

    Where the pass itself raised, what it had at hand says more than its half-done work; else the difference does.
    """
    raised = not isinstance(error, GraphoptError) or not _is_whole(error)
    found = nodes_in_traceback(error, before) if raised else ()
    if not found and after is not None:
        found = replaced(before, after)
    return found or nodes_in_traceback(error, before)


def nodes_in_traceback(error: BaseException, model: Model) -> tuple[str, ...]:
    """Names of the nodes of `model` that the code which raised had at hand, innermost frame first.

    A pass raises from somewhere in its rewrite; the node it was about is a local variable there, or in a caller.
    """
    import onnx_graphsurgeon as gs

    known = {n.name for n in model.nodes() if n.name}
    cause: BaseException | None = error
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    frames = []
    trace = cause.__traceback__ if cause is not None else None
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        held: dict[str, list[gs.Node]] = {}
        for name, value in list(frame.f_locals.items()):
            if isinstance(value, gs.Node):
                held[name] = [value]
            elif isinstance(getattr(value, "nodes", None), dict):  # a Match
                held[name] = [n for n in value.nodes.values() if isinstance(n, gs.Node)]
        spoken = [
            held[name] for name in ("match", "node", "root") if name in held
        ]  # the others may be of an earlier turn
        for some in [*spoken, [n for nodes in held.values() for n in nodes]]:
            names = tuple(dict.fromkeys(n.name for n in some if n.name in known))
            if names:
                return names
    return ()


def default_bound(model: Model, pipeline: Pipeline, result: Result | None) -> equivalence.Bound:
    """What `build` allows the pipeline, see `equivalence`; `result` tells how many rewrites were made, None that a pass failed.

    Raises:
        UsageError: the pipeline approximates, so no bound is argued.
    """
    counts = Counter[str]()
    for step in result.steps if result is not None else ():
        counts[step.pass_name] += step.rewrites
    made = {p: counts[p.pass_name()] if result is not None else 1 for p in pipeline.passes}
    bound = equivalence.Bound.of(made, equivalence.float_types(model))
    if math.isinf(bound.tolerance):
        raise UsageError(
            "the pipeline approximates (it quantizes or prunes): say what is good with --tolerance or --cmd"
        )
    return bound
