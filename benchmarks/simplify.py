"""Fewest nodes, never wrong? graphopt -O2 beside each other simplifier, on the same graphs, in one run.

    python -m benchmarks.simplify --graphs 'vit_*' --rounds 1
    python -m benchmarks.simplify --peers onnxsim,onnxslim_ort --markdown simplify.md --json simplify.json

Each tool is a process of its own, start-up and imports included, and each result is judged in another: what it declares
against what the original declares, the checker, and its numbers under ONNX Runtime without optimizations, at sizes other
than the traced ones. A result is

- ``valid``: the full checker takes it, required inputs and outputs have the same names, dtypes and dimensions (symbols too),
  no operator domain came in, and its numbers agree at every sample that the original itself accepts;
- ``flawed``: its numbers agree, but the checker, a declared dimension or a foreign operator speaks against it;
- ``wrong``: ONNX Runtime does not load it or refuses a sample, an input or output came or went, or numbers differ;
- ``failed``: there is none: the process failed or took too long.

Numbers agree within the bound that `graphopt.equivalence` argues for re-associated floats, or within what the original itself does
to a rounding of its inputs. Nodes are counted in the graph, its subgraphs and functions, without Constants, which some tools keep as
nodes and others as initializers. A ConstantOfShape of a constant shape is a weight in small, too, but a node: it counts, and the
table says how many there are.

With ``--resume FOLDER`` each graph's outcomes are kept there, and a run that was broken off goes on where it was.
"""

from __future__ import annotations

import compileall
import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from benchmarks.graphs import (
    ROOT,
    Graph,
    GraphsFolder,
    Patterns,
    catalogue,
    generated,
    graphs_folder,
    matches,
)
from benchmarks.harness import (
    PEERS_VARIABLE,
    Column,
    DataFolder,
    JsonFile,
    MarkdownFile,
    PeerRun,
    Rounds,
    Seed,
    Table,
    Timeout,
    peer_contest,
    peer_process,
    publish,
    script,
)
from benchmarks.simplify_judge import Finding, count
from graphopt.errors import OutputError, UsageError
from graphopt.measure import ProcessCost

OURS: Final = "graphopt"
MEMORY_FACTOR: Final = 1.5  # of the model's bytes, and
MEMORY_BASE_MB: Final = 150.0  # on top: the memory that we allow ourselves


@dataclass(frozen=True)
class Peer:
    """A simplifier as its own documentation runs it; the snippet reads ``sys.argv[1]`` and writes ``sys.argv[2]``."""

    snippet: str
    package: str
    heading: str = ""  # of its column; its name where empty
    compiled: bool = False  # the work is done in C++: no competitor in CPU seconds, only a reference


# None in sys.modules hides an installed package from import and from find_spec. torch is what benchmarks.graphs needs; onnxsim
# and polygraphy would import it where it is, for 2 CPU seconds and 250 MB that their users without torch do not pay.
_HIDE: Final = "import sys; sys.modules[{!r}] = None; "
_NO_TORCH: Final = _HIDE.format("torch")
_SLIM: Final = "import onnxslim; onnxslim.slim(sys.argv[1], sys.argv[2])"
PEERS: Final[dict[str, Peer]] = {
    OURS: Peer(
        "import runpy, sys; sys.argv = ['graphopt', 'opt', sys.argv[1], '-o', sys.argv[2], '-O2']; "
        "runpy.run_module('graphopt.cli', run_name='__main__')",
        "graphopt",
    ),
    "onnxsim": Peer(
        "import sys, onnx, onnxsim; model, ok = onnxsim.simplify(sys.argv[1]); onnx.save(model, sys.argv[2])",
        "onnxsim",
        compiled=True,
    ),
    "onnxslim": Peer(_HIDE.format("onnxruntime") + _SLIM, "onnxslim", heading="onnxslim\nno ORT"),
    "onnxslim_ort": Peer(_SLIM, "onnxslim", heading="onnxslim\n+ ORT"),
    "onnxscript": Peer(
        "import sys, onnx, onnxscript.optimizer as o; onnx.save(o.optimize(onnx.load(sys.argv[1])), sys.argv[2])",
        "onnxscript",
        heading="onnx\nscript",
    ),
    "ort_basic": Peer(
        "import sys, onnxruntime as ort; options = ort.SessionOptions(); "
        "options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC; "
        "options.optimized_model_filepath = sys.argv[2]; "
        "ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])",
        "onnxruntime",
        heading="ORT\nbasic",
        compiled=True,
    ),
    "polygraphy": Peer(
        "import sys; from polygraphy.tools import main; "
        "sys.argv = ['polygraphy', 'surgeon', 'sanitize', '--fold-constants', sys.argv[1], '-o', sys.argv[2]]; "
        "sys.exit(main())",
        "polygraphy",
        heading="poly\ngraphy",
    ),
    "onnxoptimizer": Peer(
        "import sys, onnx, onnxoptimizer; onnx.save(onnxoptimizer.optimize(onnx.load(sys.argv[1])), sys.argv[2])",
        "onnxoptimizer",
        heading="onnx\noptimizer",
        compiled=True,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One tool on one graph."""

    runs: tuple[PeerRun, ...]
    finding: Finding | None  # None when it failed

    @property
    def state(self) -> str:
        """``valid``, ``flawed``, ``wrong`` or ``failed``."""
        return self.finding.state if self.finding else "failed"

    @property
    def right(self) -> bool:
        """Whether the numbers agree, whatever else."""
        return self.state in ("valid", "flawed")

    @property
    def nodes(self) -> int | None:
        """Without Constants; None when there is no result."""
        return self.finding.nodes if self.finding else None

    @property
    def cpu_seconds(self) -> float | None:
        """Median of the rounds; None when it failed."""
        done = [run.cost.cpu_seconds for run in self.runs if run.cost]
        return statistics.median(done) if done and self.finding else None

    @property
    def peak_mb(self) -> float | None:
        """Largest of the rounds; None when it failed."""
        done = [run.cost.peak_mb for run in self.runs if run.cost]
        return max(done) if done and self.finding else None

    @property
    def reason(self) -> str:
        """Why it is not valid, in one line; empty when it is."""
        if self.finding is None:
            return next((run.failure for run in self.runs if run.failure), "no result")
        return "; ".join((*self.finding.broken, *self.finding.flaws))


# The contest


def contest(
    graph: Graph, peers: Sequence[str], *, rounds: int, seed: int, timeout: float, python: str
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """Run the peers on one graph and judge what they wrote; what the original is, and each peer's outcome.

    Raises:
        UsageError: the original runs on none of its samples.
    """
    here = {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="graphopt-simplify-") as temporary:
        home = Path(temporary)
        reference = home / "reference.npz"
        given = json.dumps([asdict(sample) for sample in graph.samples])
        told = peer_process(
            "from benchmarks import simplify_judge; simplify_judge.reference_main()",
            graph.path,
            given,
            reference,
            env=here,
        )
        facts = _last_json(told)
        if facts is None or len(facts["refusals"]) == len(graph.samples):
            reason = facts["refusals"][0] if facts else told.failure
            raise UsageError(f"{graph.name}: ONNX Runtime does not run the original: {reason}")
        calls = {}
        for name in peers:
            (home / name).mkdir()
            calls[name] = functools.partial(
                peer_process,
                _NO_TORCH + PEERS[name].snippet,
                graph.path,
                home / name / "result.onnx",
                timeout=timeout,
                python=sys.executable if name == OURS else python,
                env=here if name == OURS else {},
                cwd=home,
            )
        _, runs = peer_contest(calls, rounds=rounds, seed=seed, title=graph.name)
        outcomes = {}
        for name in peers:
            result = home / name / "result.onnx"
            finding = None
            if not runs[name][-1].failure and result.exists():
                finding = _judged(graph, result, reference, facts["allowed"], timeout)
            outcomes[name] = Outcome(runs[name], finding)
            shutil.rmtree(home / name)
        return facts, outcomes


def _judged(graph: Graph, result: Path, reference: Path, allowed: float, timeout: float) -> Finding:
    snippet = "from benchmarks import simplify_judge; simplify_judge.judge_main()"
    run = peer_process(
        snippet, graph.path, result, reference, str(allowed), timeout=timeout, env={"PYTHONPATH": str(ROOT)}
    )
    found = _last_json(run)
    return Finding(**found) if found else Finding(broken=[f"the judge died of it: {run.failure}"])


def _last_json(run: PeerRun) -> dict[str, Any] | None:
    if run.failure or run.cost is None:
        return None
    answer = json.loads(run.cost.stdout.strip().splitlines()[-1])
    return answer if isinstance(answer, dict) else None


# Outcomes that an earlier, broken-off run left


def _digest(*paths: Path) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def _keep(folder: Path, name: str, asked: dict[str, Any], facts: dict[str, Any], outcomes: dict[str, Outcome]) -> None:
    """Write one graph's outcomes, whole or not at all.

    Raises:
        OutputError: the folder cannot be written to.
    """
    found = {peer: asdict(outcome) for peer, outcome in outcomes.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps({"asked": asked, "facts": facts, "outcomes": found}))
        partial.replace(folder / f"{name}.json")
    except OSError as error:
        raise OutputError(
            f"cannot write {str(folder)!r}: {error.strerror}; name another folder with --resume"
        ) from error


def _recalled(folder: Path, name: str, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Outcome]] | None:
    """What `_keep` wrote, if the same was asked for; None: run it."""
    try:
        held = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    if held["asked"] != asked:
        return None
    outcomes = {
        peer: Outcome(
            tuple(PeerRun(run["cost"] and ProcessCost(**run["cost"]), run["failure"]) for run in told["runs"]),
            told["finding"] and Finding(**told["finding"]),
        )
        for peer, told in held["outcomes"].items()
    }
    return held["facts"], outcomes


# Verdicts


@dataclass(frozen=True)
class Verdict:
    """Ours against the smallest result of the others."""

    word: str  # win, tie, LOSS, or what stands in the way of one
    nodes: int | None  # of the best of the others
    by: tuple[str, ...]  # who has it

    def __str__(self) -> str:
        return self.word if self.nodes is None else f"{self.word} ({self.nodes} {', '.join(self.by)})"


def verdict(outcomes: Mapping[str, Outcome], states: Sequence[str]) -> Verdict:
    """Compare our nodes with the minimum over the others whose state is one of `states`."""
    rivals = {
        name: outcome.nodes
        for name, outcome in outcomes.items()
        if name != OURS and outcome.state in states and outcome.nodes is not None
    }
    best = min(rivals.values(), default=None)
    by = tuple(name for name, nodes in rivals.items() if nodes == best)
    mine = outcomes[OURS]
    if mine.nodes is None or mine.state not in ("valid",):
        return Verdict(f"LOSS: ours is {mine.state}", best, by)
    if best is None:
        return Verdict("win: no other is", None, ())
    difference = mine.nodes - best
    return Verdict(f"LOSS by {difference}" if difference > 0 else "tie" if not difference else "win", best, by)


def fastest(outcomes: Mapping[str, Outcome]) -> tuple[str, float] | None:
    """The Python peer whose right result took the fewest CPU seconds."""
    rivals = [
        (outcome.cpu_seconds, name)
        for name, outcome in outcomes.items()
        if name != OURS and not PEERS[name].compiled and outcome.right and outcome.cpu_seconds is not None
    ]
    if not rivals:
        return None
    seconds, name = min(rivals)
    return name, seconds


def gaps(ours: Mapping[str, int], best: Mapping[str, int]) -> str:
    """The operators of which we keep more (+) or fewer (-) than the best, the largest first; Constants left out."""
    differences = {op: ours.get(op, 0) - best.get(op, 0) for op in {*ours, *best} if op != "Constant"}
    ranked = sorted(differences.items(), key=lambda item: (-abs(item[1]), item[0]))
    return ", ".join(f"{op} {number:+d}" for op, number in ranked if number)


# Tables

Results = dict[str, tuple[Graph, dict[str, Any], dict[str, Outcome]]]


def nodes_table(results: Results, peers: Sequence[str]) -> Table:
    """Graphs down, tools across: nodes, and what is wrong with them."""
    columns = [Column("graph", "graph"), Column("original", "before", "d"), *_columns(peers, ">")]
    columns.append(Column("word", "we have"))
    note = (
        "Nodes without Constants. * flawed: numbers agree, but the checker rejects it or it declares other dimensions; "
        "wrong, failed: see the reasons below. We have: against the fewest among valid results."
    )
    table = Table("Nodes after", columns, note)
    for name, (_, facts, outcomes) in results.items():
        cells = {peer: _nodes_text(outcome) for peer, outcome in outcomes.items()}
        word = verdict(outcomes, ("valid",)).word.split(":")[0].split()[0]
        we_have = {"win": "fewer", "tie": "equal"}.get(word, "more")
        table.add(graph=name, original=count(facts["operators"]), **cells, word=we_have)
    table.extra = {
        name: {
            "operators": facts["operators"],
            "refused samples": facts["refusals"],
            "tools": {peer: _raw(outcome) for peer, outcome in outcomes.items()},
        }
        for name, (_, facts, outcomes) in results.items()
    }
    return table


def outcomes_table(results: Results) -> Table:
    """A row a graph and tool: everything."""
    columns = [
        *(
            Column("graph", "graph"),
            Column("tool", "tool"),
            Column("nodes", "nodes", "d"),
            Column("fills", "fills", "d"),
        ),
        *(Column("cpu", "CPU s", ".2f"), Column("peak", "peak MB", ".0f"), Column("size", "MB", ".3g")),
        *(Column("state", "valid"), Column("max_abs", "max difference", ".1e")),
    ]
    table = Table("All results", columns, "fills: of the nodes, ConstantOfShapes of constant shape.")
    for name, (_, _, outcomes) in results.items():
        for peer, outcome in outcomes.items():
            table.add(
                graph=name,
                tool=peer,
                nodes=outcome.nodes,
                fills=outcome.finding.fills if outcome.finding else None,
                cpu=outcome.cpu_seconds,
                peak=outcome.peak_mb,
                size=_number(outcome, "megabytes"),
                state=outcome.state,
                max_abs=_number(outcome, "max_abs"),
            )
    return table


def _columns(peers: Sequence[str], spec: str) -> list[Column]:
    return [Column(name, PEERS[name].heading or name, spec) for name in peers]


def _nodes_text(outcome: Outcome) -> str:
    return {"valid": f"{outcome.nodes}", "flawed": f"{outcome.nodes}*"}.get(outcome.state, outcome.state)


def _raw(outcome: Outcome) -> dict[str, Any]:
    return {
        "state": outcome.state,
        "nodes": outcome.nodes,
        "cpu_seconds": outcome.cpu_seconds,
        "peak_mb": outcome.peak_mb,
        "reason": outcome.reason,
        "finding": asdict(outcome.finding) if outcome.finding else None,
        "runs": [{"failure": r.failure, **(r.cost.as_dict() if r.cost else {})} for r in outcome.runs],
    }


def number_table(title: str, results: Results, peers: Sequence[str], key: str, spec: str, note: str) -> Table:
    """Graphs down, tools across, one number of each outcome."""
    table = Table(title, [Column("graph", "graph"), *_columns(peers, spec)], note)
    for name, (_, _, outcomes) in results.items():
        table.add(graph=name, **{peer: _number(outcome, key) for peer, outcome in outcomes.items()})
    return table


def _number(outcome: Outcome, key: str) -> float | None:
    if key == "megabytes":
        return outcome.finding.bytes / 1e6 if outcome.finding else None
    if key == "max_abs":
        return outcome.finding.max_abs if outcome.finding else None
    return outcome.cpu_seconds if key == "cpu_seconds" else outcome.peak_mb


def verdict_table(results: Results) -> Table:
    """A row a graph: nodes, time and memory against the best of the others, and the sum below."""
    columns = [
        *(Column("graph", "graph"), Column("nodes", "ours", ">"), Column("valid", "against valid")),
        *(Column("right", "against right"), Column("cpu", "CPU s", ".2f"), Column("ratio", "ratio", ".2f")),
        *(Column("rival", "to"), Column("peak", "peak MB", ".0f"), Column("limit", "allowed", ".0f")),
        Column("memory", "memory"),
    ]
    table = Table("Verdicts", columns)
    counts: dict[str, Counter[str]] = {"valid": Counter(), "right": Counter()}
    slower = over = 0
    for name, (graph, _, outcomes) in results.items():
        mine = outcomes[OURS]
        words = {"valid": verdict(outcomes, ("valid",)), "right": verdict(outcomes, ("valid", "flawed"))}
        for key, found in words.items():
            counts[key][found.word.split()[0].rstrip(":")] += 1
        rival = fastest(outcomes)
        limit = MEMORY_FACTOR * graph.path.stat().st_size / 1e6 + MEMORY_BASE_MB
        ratio = mine.cpu_seconds / rival[1] if rival and mine.cpu_seconds is not None else None
        fits = mine.peak_mb is not None and mine.peak_mb <= limit
        slower += ratio is None or ratio >= 1
        over += not fits
        table.add(
            graph=name,
            nodes=_nodes_text(mine),
            **{key: str(found) for key, found in words.items()},
            cpu=mine.cpu_seconds,
            ratio=ratio,
            rival=rival[0] if rival else None,
            peak=mine.peak_mb,
            limit=limit,
            memory="ok" if fits else "OVER",
        )
    sums = "; ".join(
        f"against {key} results {c['win']} wins, {c['tie']} ties, {c['LOSS']} losses" for key, c in counts.items()
    )
    table.note = (
        f"{sums}; CPU seconds not below the fastest Python tool with a right result on {slower} of {len(results)} graphs; "
        f"memory over {MEMORY_FACTOR} x model + {MEMORY_BASE_MB:.0f} MB on {over}. Right: valid or flawed."
    )
    return table


def reasons_table(results: Results) -> Table:
    """Why a result is not valid."""
    table = Table(
        "Why not valid",
        [Column("graph", "graph"), Column("tool", "tool"), Column("state", "state"), Column("reason", "reason")],
    )
    for name, (_, _, outcomes) in results.items():
        for peer, outcome in outcomes.items():
            if outcome.state != "valid":
                table.add(graph=name, tool=peer, state=outcome.state, reason=outcome.reason)
    return table


def gaps_table(results: Results) -> Table:
    """Where another is right with fewer nodes: which operators we keep."""
    columns = [
        Column("graph", "graph"),
        Column("ours", "ours", "d"),
        Column("best", "best"),
        Column("gap", "operators"),
    ]
    table = Table("What we keep", columns, "+ we have more of it than the best right result, - fewer.")
    for name, (_, _, outcomes) in results.items():
        found = verdict(outcomes, ("valid", "flawed"))
        mine = outcomes[OURS].finding
        if mine is None or found.nodes is None or mine.nodes <= found.nodes:
            continue
        for peer in found.by:
            theirs = outcomes[peer].finding
            if theirs is not None:
                told = gaps(mine.operators, theirs.operators)
                table.add(graph=name, ours=mine.nodes, best=f"{found.nodes} {peer}", gap=told)
    return table


# Command line


def selected(folder: Path, data: Path | None, patterns: str, python: str) -> Iterator[Graph]:
    """The graphs that match; those that can be made are, those of absent packages are skipped with a line.

    Raises:
        UsageError: nothing matches, or the graphs cannot be made.
    """
    chosen = [graph for graph in catalogue(folder, data) if matches(graph.name, patterns)]
    if not chosen:
        raise UsageError(
            f"no graph matches {patterns!r}; there are {', '.join(g.name for g in catalogue(folder, data))}"
        )
    made = {graph.name for graph in generated(folder)}
    missing = [graph.name for graph in chosen if graph.name in made and not graph.path.exists()]
    if missing:
        command = [python, "-m", "benchmarks.graphs", "--folder", str(folder.absolute()), "--graphs", ",".join(missing)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise UsageError(f"the graphs could not be made: see above; the command was {' '.join(command)}")
    for graph in chosen:
        if graph.path.exists():
            yield graph
        else:
            _say(
                f"{graph.name} is skipped: {graph.path} is not there; python -m benchmarks.graphs --fetch downloads it"
            )


def chosen_peers(names: str | None, python: str) -> list[str]:
    """Ours and those named, or all that are installed.

    Raises:
        UsageError: a name is unknown.
    """
    if names is not None:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in PEERS]
        if unknown:
            raise UsageError(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
        return [OURS, *(name for name in PEERS if name in wanted and name != OURS)]
    found = [OURS]
    for name, peer in PEERS.items():
        if name == OURS:
            continue
        snippet = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.package!r}) is None)"
        if subprocess.run([python, "-P", "-c", snippet], check=False).returncode:
            _say(f"{name} is skipped: {peer.package} is not installed for {python}; see benchmarks/requirements.txt")
        else:
            found.append(name)
    return found


def _say(text: str) -> None:
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def main(
    graphs: Patterns = "*",
    peers: Annotated[str | None, typer.Option("--peers", help="As 'onnxsim,onnxslim_ort'; default all.")] = None,
    folder: GraphsFolder = None,
    python: Annotated[
        str | None, typer.Option("--python", help=f"The peers' interpreter; default ${PEERS_VARIABLE}, else this one.")
    ] = None,
    rounds: Rounds = 3,
    seed: Seed = 0,
    timeout: Timeout = 300,
    data: DataFolder = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FOLDER", help="Keep each graph's outcomes there, and go on.")
    ] = None,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
) -> None:
    interpreter = python or os.environ.get(PEERS_VARIABLE) or sys.executable
    names = chosen_peers(peers, interpreter)
    for folder_of_ours in ("graphopt", "passes", "backends"):  # as pip has done with the peers' modules
        compileall.compile_dir(ROOT / folder_of_ours, quiet=1)
    results: Results = {}
    sources = _digest(*sorted([*(ROOT / "graphopt").rglob("*.py"), *(ROOT / "passes").glob("*.py")]))
    for graph in selected(graphs_folder(folder), data, graphs, interpreter):
        asked = {
            "ours": sources,
            "peers": names,
            "rounds": rounds,
            "seed": seed,
            "timeout": timeout,
            "model": _digest(graph.path),
        }
        kept = _recalled(resume, graph.name, asked) if resume is not None else None
        try:
            facts, outcomes = kept or contest(
                graph, names, rounds=rounds, seed=seed, timeout=timeout, python=interpreter
            )
        except UsageError as error:
            _say(f"skipped {error}")
            continue
        if resume is not None and kept is None:
            _keep(resume, graph.name, asked, facts, outcomes)
        results[graph.name] = graph, facts, outcomes
        _say(f"{graph.name}: {', '.join(f'{name} {_nodes_text(outcome)}' for name, outcome in outcomes.items())}")
    if not results:
        raise UsageError("no graph could be compared")
    process = f"Whole process, start-up included; {rounds} round(s)."
    tables = [
        outcomes_table(results),
        nodes_table(results, names),
        number_table("CPU seconds", results, names, "cpu_seconds", ".2f", f"{process} Medians."),
        number_table("Peak MB", results, names, "peak_mb", ".0f", f"{process} Largest."),
        number_table("Megabytes written", results, names, "megabytes", ".3g", "External data included."),
        number_table("Largest difference", results, names, "max_abs", ".1e", "Absolute, over all samples and outputs."),
        *(table for table in (reasons_table(results), gaps_table(results)) if table.rows),
        verdict_table(results),
    ]
    publish(*tables, markdown=markdown, json_file=json_file)


if __name__ == "__main__":
    script(main)
