"""`graphopt reproduce`: does what `--reproducer` wrote still fail?"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.commands.arguments import ReportFile, check_place, load, read_samples, write_report
from graphopt.commands.containment import contained
from graphopt.commands.terminal import out
from graphopt.errors import GraphoptError, InternalError, InvalidModel, UserError

if TYPE_CHECKING:
    from graphopt.ir import Model


@contained(default=True)
def reproduce(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Written by opt or build --reproducer.")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="SAMPLES", help="In place of the samples in FILE, as for build.")
    ] = None,
    report: ReportFile = None,
) -> None:
    """Run the pass on the model, both in FILE, and say whether it still fails: exit code 0 when it does not, 1 when it does."""
    from graphopt import equivalence, instruments
    from graphopt.backend import ShapeRange
    from graphopt.evaluate import evaluate_node
    from graphopt.pass_base import Context
    from graphopt.pipeline import Instrument, Pipeline
    from graphopt.target import Target

    check_place(report)
    model = load(file)
    facts = _facts(model, file)
    pipeline = Pipeline.parse(facts["pipeline"])
    for value in (v for step in pipeline.passes for v in step.options().values()):
        if isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value):
            raise UserError(
                f"{file!r} wants the code {value!r} to run, which only a command line may name; if you trust it: "
                f"graphopt opt {file} -o out.onnx -p {str(pipeline)!r}"
            )
    feeds, samples = read_samples(data, model.inputs, pipeline, False)
    try:
        if feeds is None and facts.get("feeds"):
            feeds = instruments.unpacked(facts["feeds"])
        shapes = {name: ShapeRange.parse(f"{name}={text}")[1] for name, text in facts.get("shapes", {}).items()}
        seed = int(facts.get("seed", 0))
        target = Target.parse(facts["target"]) if facts.get("target") else None
        for sample in feeds or ():
            equivalence.check_feeds(model.inputs, sample)
    except (ValueError, KeyError, TypeError, AttributeError, GraphoptError) as error:
        raise InvalidModel(f"{file!r}: what it says of the failure is damaged ({error}); write it again") from None
    then = str(facts["error"])
    stack: list[Instrument] = [instruments.Verify()]
    if "onnx.checker" in then:
        stack.append(instruments.FullCheck())
    if "changed the numbers" in then:
        stack.append(instruments.Compare(feeds, seed, shapes))
    context = Context(target=target, seed=seed, evaluate=evaluate_node, data=samples)
    try:
        pipeline.run(model, context, stack)
    except InternalError as error:
        raised = error.__cause__ or error  # what the pass itself raised, as the reproducer was told
        now = f"{type(raised).__name__}: {raised}"
        same = _kind(now) == _kind(then)
        write_report(report, {"fails": True, "same": same, "then": then, "now": now, "pipeline": str(pipeline)})
        told = "it still fails" if same else f"it fails, though otherwise; it was {_first_line(then)}"
        out.print(f"{told}: {_first_line(now)}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    write_report(report, {"fails": False, "same": False, "then": then, "now": None, "pipeline": str(pipeline)})
    out.print(
        f"it does not fail any more: {pipeline} on {file}; it was {_first_line(then)}", markup=False, soft_wrap=True
    )


def _facts(model: Model, file: str) -> dict[str, Any]:
    from graphopt.instruments import Reproducer

    texts = [p.value for p in model.carried.metadata_props if p.key == Reproducer.KEY]
    if not texts:
        raise UserError(
            f"{file!r} is no reproducer: its metadata holds no {Reproducer.KEY!r}; graphopt opt or build --reproducer writes one"
        )
    try:
        facts = json.loads(texts[0])
        if not isinstance(facts["pipeline"], str) or not isinstance(facts["error"], str):
            raise TypeError("pipeline and error must be texts")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidModel(f"{file!r}: what it says of the failure is damaged ({error}); write it again") from None
    return dict(facts)


def _kind(error: str) -> str:
    """What identifies a failure: all but its numbers and what ran before it."""
    text = error.partition("; passes before it")[0]
    if "changed the numbers" in text:
        text = text.partition(" differs by ")[0]
    return text


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
