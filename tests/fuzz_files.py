"""Fuzzing of reading and optimizing: mutated models in, and nothing but a result or a `UserError` may come out.

    python tests/fuzz_files.py --runs 300 --seed 1            a fixed number of inputs, the same for the same seed
    python tests/fuzz_files.py --seconds 1200 --atheris       guided by coverage

Inputs come from the networks of models/, the operator models and light_* models of the onnx package, and some made here. They are mutated
as protobuf (fields dropped, doubled, exchanged between models, numbers made absurd) and as bytes. Each runs in a process that is
watched: an input that crashes it, or takes too long, is written to the folder of finds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from graphopt import Context, Pipeline, ir, models, verify
from graphopt.discovery import find_pass, pass_modules
from graphopt.errors import UserError
from graphopt.evaluate import evaluate_node

SLOW = 60.0  # seconds after which an input counts as a hang; what takes one second on an idle machine may take ten on a busy one
MEMORY = 6 << 30  # bytes of its own that a process may have
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    -1,
    -2,
    64,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 40,
    (1 << 62) + 1,
    -(1 << 63),
    (1 << 63) - 1,
)
_REALS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "",
    "x",
    "y",
    "axis",
    "Relu",
    "Add",
    "If",
    "Loop",
    "Constant",
    "ai.onnx",
    "com.microsoft",
    "\x1b[31m",
    "\0",
    "a" * 300,
    "../x",
    "é",
)


def corpus() -> list[bytes]:
    """The seeds, smallest first."""
    found = [p.read_bytes() for p in sorted(Path(models.__file__).resolve().parent.glob("*.legacy.onnx"))]
    found += [p.read_bytes() for p in sorted((Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx"))]
    found += [ir.saves(ir.parse(text)) for text in _HAND_MADE]
    return sorted({data for data in found if len(data) < 1 << 18}, key=lambda d: (len(d), d))


_HAND_MADE = (
    "g (float[2] x) => (float[2] y) { y = Relu (x) }",
    """g (bool c, float[N,3] x) => (float[N,3] y) <float[3] w = {1, 2, 3}> { t = Add (x, w)
       y = If (c) <then_branch = a () => (p) { p = Neg (t) }, else_branch = b () => (q) { q = Abs (t) }> }""",
    """<ir_version: 10, opset_import: ["" : 21, "local" : 1]> g (float[2] x) => (float[2] y) { y = local.f (x) }
       <domain: "local", opset_import: ["" : 21]> f (a) => (b) { b = Elu (a) }""",
    """g (float[N,2,3] x) => (float[N,6] y) <int64 z = {0}, int64[1] a = {0}, int64[1] six = {6}> { s = Shape (x)
       n = Gather <axis = 0> (s, z) u = Unsqueeze (n, a) t = Concat <axis = 0> (u, six) y = Reshape (x, t) }""",
    """g (float[1,2,8,8] x) => (float[1,2,6,6] y) <float[2,2,3,3] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9},
       float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {0, 0}, float[2] v = {1, 1}>
       { c = Conv (x, w) n = BatchNormalization (c, s, b, m, v) y = Clip (n) }""",
)


class Mutator:
    """Changes a model at random; the same seed gives the same changes."""

    def __init__(self, seeds: list[bytes], rng: random.Random) -> None:
        self.seeds = seeds
        self.rng = rng

    def draw(self) -> bytes:
        """A seed with one to eight changes."""
        return self.mutate(self.rng.choice(self.seeds))

    def mutate(self, data: bytes) -> bytes:
        """`data` with one to eight changes: of its fields where it is a model, of its bytes else and sometimes."""
        model = onnx.ModelProto()
        try:
            model.ParseFromString(data)
        except Exception:
            return self.bytes(data)
        for _ in range(1 << self.rng.randrange(4)):
            with contextlib.suppress(Exception):  # a change that protobuf itself refuses
                self.message(model)
        out = model.SerializeToString()
        return self.bytes(out) if self.rng.random() < 0.2 else out

    def bytes(self, data: bytes) -> bytes:
        """Flip, insert, drop, repeat or cut."""
        out = bytearray(data or b"\0")
        for _ in range(1 << self.rng.randrange(4)):
            at, size = self.rng.randrange(len(out) or 1), self.rng.randrange(1, 9)
            match self.rng.randrange(5):
                case 0 if out:
                    out[at] ^= 1 << self.rng.randrange(8)
                case 1:
                    out[at:at] = self.rng.randbytes(size)
                case 2:
                    del out[at : at + size]
                case 3:
                    out[at:at] = out[at : at + size * 8]
                case _:
                    out[at : at + size] = b"\xff" * size
        return bytes(out)

    def message(self, root: Message) -> None:
        """One change of one field, somewhere below `root`."""
        message, descriptor = self.rng.choice(list(_fields(root)))
        value = getattr(message, descriptor.name)
        if not descriptor.is_repeated:
            if self.rng.random() < 0.15:
                message.ClearField(descriptor.name)
            elif descriptor.type != FieldDescriptor.TYPE_MESSAGE:
                setattr(message, descriptor.name, self.scalar(descriptor, value, root))
            else:
                value.CopyFrom(self.other(type(value), root) or value)
            return
        at = self.rng.randrange(len(value)) if len(value) else 0
        items = list(value)
        match self.rng.randrange(5):
            case 0 if items:
                del items[at]
            case 1 if items:
                items.insert(at, items[self.rng.randrange(len(items))])
            case 2:
                self.rng.shuffle(items)
            case _ if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
                items[at : at + 1] = [self.other(type(value.add()), root) or items[at]]
            case _:
                items[at : at + 1] = [self.scalar(descriptor, items[at] if items else None, root)]
        copies = [type(i).FromString(i.SerializeToString()) if isinstance(i, Message) else i for i in items]
        message.ClearField(descriptor.name)
        getattr(message, descriptor.name).extend(copies)

    def other(self, kind: type, root: Message) -> Any:
        """A message of that kind from this model or another."""
        source = root
        if self.rng.random() < 0.5:
            source = onnx.ModelProto.FromString(self.rng.choice(self.seeds))
        found = [m for m in _messages(source) if type(m) is kind]
        # a copy: protobuf crashes where a message is copied into one that holds it
        return kind.FromString(self.rng.choice(found).SerializeToString()) if found else None

    def scalar(self, descriptor: Any, old: Any, root: Message) -> Any:
        """Another value of a field of one value: a name from the model, an absurd number, or nearly the old one."""
        match descriptor.type:
            case FieldDescriptor.TYPE_STRING:
                names = [
                    n
                    for m in _messages(root)
                    if isinstance(m, onnx.NodeProto)
                    for n in (*m.input, *m.output, m.op_type)
                ]
                return self.rng.choice([*_TEXTS, *names])
            case FieldDescriptor.TYPE_BYTES:
                return self.bytes(old or b"")
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
                return self.rng.choice(_REALS)
            case FieldDescriptor.TYPE_INT32 | FieldDescriptor.TYPE_ENUM:
                return self.rng.randrange(-1, 30)
            case _:
                near = (old or 0) + self.rng.choice((-1, 1, 2))
                return self.rng.choice([*_NUMBERS, near, near])


def _messages(root: Message) -> Iterator[Message]:
    pending = [root]
    while pending:
        message = pending.pop()
        yield message
        for descriptor, value in message.ListFields():
            if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
                pending.extend(value if descriptor.is_repeated else [value])


def _fields(root: Message) -> Iterator[tuple[Message, Any]]:
    for message in _messages(root):
        for descriptor, _ in message.ListFields():
            yield message, descriptor


PIPELINES = ("O2", "O2", "O1", "infer-shapes", "simplify", "fuse-weights")


def attempt(data: bytes) -> str:
    """Read `data`, check it, optimize it, write it and read it again; says how far it came. Raises what a user would report."""
    try:
        loaded = ir.loads(data)
        verify.cycles(loaded)
        verify.operators(loaded)
    except UserError:
        return "refused"
    pipeline = PIPELINES[int.from_bytes(hashlib.sha256(data).digest()[:2], "little") % len(PIPELINES)]
    try:
        result = Pipeline.parse(pipeline).run(loaded, Context(evaluate=evaluate_node))
        faults = verify.structure(result.model)
        if faults:
            raise AssertionError(f"{pipeline} leaves an invalid graph: {faults[0]}")
        ir.loads(ir.saves(result.model))
    except UserError:
        return "refused later"
    return "optimized"


# ----------------------------------------------------------------------------------------------------------- the loop


@dataclass
class Tally:
    """What came of the inputs."""

    tried: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    finds: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.outcomes.items()))
        return f"{self.tried:,} inputs: {counts or 'none'}; {len(self.finds)} finds"


def quiet() -> None:
    """What a model makes NumPy and onnx say is its own affair."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _work(pipe: Any, theirs: Any) -> None:
    theirs.close()  # else this process would never see that the other has ended
    quiet()
    faulthandler.disable()  # the parent tells of a crash
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    with contextlib.suppress(EOFError):
        _answer(pipe)


def _answer(pipe: Any) -> None:
    while (data := pipe.recv_bytes()) != b"":
        try:
            told = attempt(data)
        except MemoryError:
            told = "out of memory"  # which the command line says, too
        except BaseException:
            told = f"!{traceback.format_exc()}"
        pipe.send_bytes(told.encode(errors="replace"))


class Worker:
    """A process that attempts one input after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.pipe), daemon=True)
        self.process.start()
        theirs.close()

    def attempt(self, data: bytes) -> str:
        """What became of it: an outcome, ``!`` and a traceback, or how the process ended."""
        self.pipe.send_bytes(data)
        if not self.pipe.poll(SLOW):
            self.close()
            return f"!hang: no answer in {SLOW:g} s"
        try:
            return self.pipe.recv_bytes().decode()
        except EOFError:
            self.process.join()
            return f"!crash: exit code {self.process.exitcode}"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def fuzz(draw: Callable[[], bytes], goes_on: Callable[[Tally], bool], finds: Path | None) -> Tally:
    """Attempt what `draw` gives while `goes_on`; inputs that fail go to the folder `finds`, with what they did beside them."""
    tally, worker = Tally(), Worker()
    try:
        while goes_on(tally):
            data = draw()
            if not data:
                continue
            told = worker.attempt(data)
            tally.tried += 1
            name = told if told[0] != "!" else told[1:].partition(":")[0] if told[1] != "T" else "error"
            tally.outcomes[name] = tally.outcomes.get(name, 0) + 1
            if told[0] != "!":
                continue
            if not told.startswith("!Traceback"):
                worker.close()
                worker = Worker()
            path = Path(finds or ".") / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.onnx"
            tally.finds.append(path)
            if finds is not None:
                finds.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                path.with_suffix(".txt").write_text(told[1:])
    finally:
        worker.close()
    return tally


def guided(seconds: int, seed: int, finds: Path) -> None:
    """Let atheris choose, by the branches of graphopt that an input reaches; ends this process."""
    import atheris

    quiet()
    for name in pass_modules():
        find_pass(name)
    for module in [m for name, m in sys.modules.items() if name.startswith(("graphopt.", "graphopt.passes."))]:
        homes = [module, *(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)]
        for home in homes:
            for name, found in list(vars(home).items()):
                if isinstance(found, types.FunctionType) and found.__module__ == module.__name__:
                    with contextlib.suppress(Exception):  # what atheris cannot instrument runs as it is
                        setattr(home, name, atheris.instrument_func(found))
    seeds = corpus()
    mutator = Mutator(seeds, random.Random(seed))
    folder = finds / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for data in seeds[:400]:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def change(data: bytes, limit: int, number: int) -> bytes:
        mutator.rng.seed(number)
        return mutator.mutate(data)[:limit]

    def one(data: bytes) -> None:
        if data:
            with contextlib.suppress(MemoryError):
                attempt(data)

    options = [
        f"-max_total_time={seconds}",
        f"-timeout={SLOW:g}",
        "-rss_limit_mb=8000",
        "-max_len=262144",
        f"-seed={seed}",
    ]
    atheris.Setup([sys.argv[0], str(folder), f"-artifact_prefix={finds}/", *options], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> None:
    """Fuzz as the arguments say; exits with 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="inputs to try")
    parser.add_argument("--seconds", type=int, help="how long to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"), help="folder for inputs that fail")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    given = parser.parse_args()
    if given.atheris:
        guided(given.seconds or 60, given.seed, given.finds)
    end = time.monotonic() + (given.seconds or float("inf"))
    runs = given.runs or (None if given.seconds else 1000)
    mutator = Mutator(corpus(), random.Random(given.seed))
    tally = fuzz(mutator.draw, lambda t: time.monotonic() < end and (runs is None or t.tried < runs), given.finds)
    print(tally)
    for path in tally.finds:
        print(path)
    sys.exit(bool(tally.finds))


if __name__ == "__main__":
    main()
