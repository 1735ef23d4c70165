"""The command line as users type it: every command, and every kind of bad input, which gets one to three lines and leaves nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import cli as command_line
from graphopt import ir, models, pipeline
from graphopt.discovery import pass_modules
from graphopt.errors import PassError, VerifyError

NETS = sorted(Path(models.__file__).resolve().parent.glob("*.onnx"))
RESNET = next(p for p in NETS if p.name == "resnet.legacy.onnx")
ROOT = Path(graphopt.__file__).parent.parent
HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'
SMALL = HEADER + "g (float[N,3] x) => (float[N,3] y) { a = Identity (x)  y = Relu (a) }"
CONV_BN = (
    HEADER
    + """g (float[1,1,3,3] x) => (float[1,1,3,3] y)
<float[1,1,1,1] w = {2}, float[1] s = {3}, float[1] b = {0.5}, float[1] m = {0}, float[1] v = {1}>
{ [c1] c = Conv (x, w)
  [b1] y = BatchNormalization (c, s, b, m, v) }"""
)

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = command_line.run([str(a) for a in arguments])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.onnxtxt"
    path.write_text(SMALL)
    return path


def process(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "graphopt.cli", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, cwd=cwd, env=environment, check=False, timeout=120, **options)


def listing(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with the digest of each file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def assert_told(outcome: Outcome, *codes: int, carets: bool = False) -> str:
    """One to three lines on stderr that say what is wrong, no traceback, nothing on stdout."""
    lines = outcome.err.strip().splitlines()
    assert outcome.code in (codes or (1, 2)), outcome
    assert 1 <= len(lines) <= 3, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert carets == (lines[-1].strip() == "^")
    return outcome.err


# ------------------------------------------------------------------------------------------------------------ build


@needs_rtx
def test_build_takes_the_best_engine_here_and_onnx_runtime(cli: Cli, tmp_path: Path) -> None:
    done = cli("build", RESNET, "-o", "out/")
    assert done.code == 0
    assert "tensorrt-rtx" in done.out
    assert "ort:cpu" in done.out
    assert "range 1x1x8x8:8x1x8x8:32x1x8x8 taken" in done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "ort-cpu.onnx",
        "tensorrt-rtx-default.engine",
    ]


@needs_rtx
def test_build_takes_targets_and_a_shape(cli: Cli, tmp_path: Path) -> None:
    targets = ("--target", "tensorrt-rtx:sm86+sm89", "--target", "ort:cpu")
    done = cli("build", RESNET, "-o", "out/", *targets, "--shape", "x=1x1x8x8:8x1x8x8:32x1x8x8")
    assert done.code == 0
    assert done.err == ""
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [v["target"] for v in manifest["variants"]] == ["tensorrt-rtx:sm86+sm89", "ort:cpu"]
    assert [v["shapes"] for v in manifest["variants"]] == [{"x": "1x1x8x8:8x1x8x8:32x1x8x8"}] * 2
    assert any("Float" in k["outputs"] for k in manifest["variants"][0]["kernels"])


def test_build_says_that_it_falls_back_and_records_it(cli: Cli, small: Path, tmp_path: Path) -> None:
    done = cli("build", small, "-o", "out", "-t", "tensorrt:sm89")
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("enterprise TensorRT is installed")
    assert done.code == 0
    assert done.err.startswith(
        "note: falling back to ort:cpu for tensorrt:sm89 (--no-fallback forbids it): tensorrt is not"
    )
    assert 'pip install "graphopt[tensorrt]"' in done.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [v["target"] for v in manifest["variants"]] == ["ort:cpu"]
    assert manifest["fallbacks"][0]["target"] == "tensorrt:sm89"


def test_no_fallback_forbids_it(cli: Cli, small: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("enterprise TensorRT is installed")
    before = listing(tmp_path)
    message = assert_told(cli("build", small, "-o", "out", "-t", "tensorrt", "--no-fallback"), 1)
    assert "--no-fallback forbids ort:cpu instead" in message
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("arguments", "expected"), [
    (["-O0"], ""),
    (["-O2"], str(pipeline.Pipeline.parse("O2"))),
    (["-O", "1"], str(pipeline.Pipeline.parse("O1"))),
    (["--passes", "fold-constants,fuse-conv-bn"], "fold-constants,fuse-conv-bn"),
    (["-p", "O1,fuse-conv-bn"], str(pipeline.Pipeline.parse("O1,fuse-conv-bn"))),
    (["-p", ""], ""),
    ([], str(pipeline.Pipeline.parse("default"))),
])  # fmt: skip
def test_build_takes_levels_and_pipelines(arguments: list[str], expected: str, cli: Cli, small: Path) -> None:
    assert cli("build", small, "-o", "out", "-t", "ort:cpu", *arguments).code == 0
    assert graphopt.Bundle.load("out").manifest["pipeline"] == expected


def test_build_writes_a_report_with_what_the_manifest_says(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("build", small, "-o", "out", "-t", "ort:cpu", "--report", "report.json").code == 0
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(
        (tmp_path / "out/manifest.json").read_text()
    )


def test_a_report_in_the_bundle_survives_the_next_build(cli: Cli, small: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert cli("build", small, "-o", "out", "-t", "ort:cpu", "--report", "out/report.json").code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "ort-cpu.onnx", "report.json"]


def test_build_measures_on_request(cli: Cli) -> None:
    done = cli("build", RESNET, "-o", "out", "-t", "ort:cpu", "--measure", "--threads", 1)
    assert done.code == 0
    latency = graphopt.Bundle.load("out").manifest["variants"][0]["latency"]
    assert 0.1 < latency["ratio"] < 10
    assert f"x{latency['ratio']:.2f} ({latency['verdict']})" in done.out
    assert sorted(p.name for p in Path("out").iterdir()) == ["manifest.json", "ort-cpu.onnx"]


def test_build_proves_on_data(cli: Cli, small: Path) -> None:
    np.savez("x.npz", x=np.ones((5, 3), np.float32))
    assert cli("build", small, "-o", "out", "-t", "ort:cpu", "--data", "x.npz").code == 0
    assert graphopt.Bundle.load("out").manifest["variants"][0]["proof"]["samples"] == 1


def test_build_can_compare_after_each_pass(cli: Cli) -> None:
    assert cli("build", RESNET, "-o", "out", "-t", "ort:cpu", "--compare-each").code == 0


def test_build_reads_stdin(cli: Cli) -> None:
    assert cli("build", "-", "-o", "out", "-t", "ort:cpu", stdin=RESNET.read_bytes()).code == 0
    assert cli("build", "-", "-o", "out", "-t", "ort:cpu", stdin=SMALL.encode()).code == 0


def break_identity(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int]) -> None:
    from graphopt.passes.eliminate_identity import EliminateIdentity

    monkeypatch.setattr(EliminateIdentity, "run", run)


def negate(self: Any, model: Any, ctx: Any) -> int:
    """A wrong pass: Relu becomes Neg."""
    nodes = [n for n in model.nodes() if n.op == "Relu"]
    for node in nodes:
        node.op = "Neg"
    return len(nodes)


def test_a_failing_pass_leaves_a_reproducer_and_no_bundle(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_identity(monkeypatch, negate)
    done = cli(
        "build",
        small,
        "-o",
        "out",
        "-t",
        "ort:cpu",
        "-p",
        "eliminate-identity",
        "--compare-each",
        "--reproducer",
        "r.onnx",
    )
    assert done.code == 3
    assert "reproduce with: graphopt opt r.onnx -o out.onnx -p eliminate-identity" in done.err
    assert "this is a bug in graphopt or in a plug-in pass" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.onnx", "small.onnxtxt"]
    assert [n.op for n in ir.load(tmp_path / "r.onnx").nodes()] == ["Identity", "Relu"]


# -------------------------------------------------------------------------------------------------------------- opt


def test_opt_runs_passes_on_files(cli: Cli, tmp_path: Path) -> None:
    done = cli("opt", RESNET, "-o", "out.onnx", "-p", "fold-constants,fuse-conv-bn")
    assert done.code == 0
    assert done.out == ""
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    assert not [n for n in ir.load("out.onnx").nodes() if n.op == "BatchNormalization"]


def test_opt_reads_stdin_and_writes_stdout() -> None:
    done = process("opt", "-", "-o", "-", "-p", "eliminate-identity", cwd=ROOT, input=RESNET.read_bytes())
    assert done.returncode == 0
    assert len(list(ir.loads(done.stdout).nodes())) == len(list(ir.load(RESNET).nodes())) - 2


def test_opt_reads_and_writes_text(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("opt", small, "-o", "o.onnxtxt", "-p", "eliminate-identity").code == 0
    assert [n.op for n in ir.load(tmp_path / "o.onnxtxt").nodes()] == ["Relu"]
    done = cli("opt", "-", "-o", "-", "--text", "-p", "eliminate-identity", stdin=SMALL.encode())
    assert done.code == 0
    assert [n.op for n in ir.parse(done.out).nodes()] == ["Relu"]
    done = cli("opt", "-", "-o", "-", "--text", "-p", "", stdin=SMALL.partition("\n")[2].encode())
    assert done.code == 0


@pytest.mark.parametrize("path", NETS, ids=lambda p: p.name)
def test_the_empty_pipeline_gives_the_same_model(path: Path, cli: Cli) -> None:
    assert cli("opt", path, "-o", "a.onnx", "-p", "").code == 0
    assert onnx.load("a.onnx") == onnx.load(path)
    assert cli("opt", "a.onnx", "-o", "b.onnx", "-p", "").code == 0
    assert Path("b.onnx").read_bytes() == Path("a.onnx").read_bytes()


def test_opt_works_in_place(cli: Cli) -> None:
    Path("m.onnx").write_bytes(RESNET.read_bytes())
    assert cli("opt", "m.onnx", "-o", "m.onnx", "-O2").code == 0
    assert cli("compare", RESNET, "m.onnx").code == 0


def test_opt_writes_external_data(cli: Cli, tmp_path: Path) -> None:
    assert cli("opt", RESNET, "-o", "e.onnx", "-p", "", "--external-data").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.onnx", "e.onnx.data"]
    assert (tmp_path / "e.onnx").stat().st_size < 50_000
    assert cli("compare", RESNET, "e.onnx", "--tolerance", 0).code == 0


def test_opt_shows_what_happens(cli: Cli) -> None:
    done = cli(
        "opt", RESNET, "-o", "o.onnx", "-p", "eliminate-identity,fuse-conv-bn", "--dump", "steps", "--time",
        "--print-after-change", "--remarks", "--check", "--compare-each", "--report", "r.json",
    )  # fmt: skip
    assert done.code == 0
    assert [p.name for p in sorted(Path("steps").iterdir())] == [
        "000-input.onnx",
        "001-eliminate-identity.onnx",
        "002-fuse-conv-bn.onnx",
    ]
    assert "--- before" in done.err
    assert "+++ after fuse-conv-bn" in done.err
    assert "CPU s" in done.err
    assert "54 -> 37 nodes" in done.err
    assert [p["rewrites"] for p in json.loads(Path("r.json").read_text())["passes"]] == [2, 15]


def test_opt_shows_remarks(cli: Cli) -> None:
    text = HEADER + "g (float[1,1,3,3] x, float[1] s) => (float[1,1,3,3] y) <float[1,1,1,1] w = {2}, float[1] z = {1}> "
    text += "{ c = Conv (x, w)  y = BatchNormalization (c, s, z, z, z) }"
    done = cli("opt", "-", "-o", "o.onnx", "-p", "fuse-conv-bn", "--remarks", stdin=text.encode())
    assert done.code == 0
    assert "remark: fuse-conv-bn: " in done.err


def test_opt_carries_an_unknown_domain_on_request(cli: Cli) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20, "acme" : 1]>\ng (float[N] x) => (float[N] y) { y = acme.Blur (x) }'
    Path("m.onnxtxt").write_text(text)
    assert "--allow-domain acme" in assert_told(cli("opt", "m.onnxtxt", "-o", "o.onnx"), 1)
    assert cli("opt", "m.onnxtxt", "-o", "o.onnx", "--allow-domain", "acme").code == 0


# ---------------------------------------------------------------------------------------- passes, backends, inspect


def test_passes_lists_all_with_their_first_lines(cli: Cli) -> None:
    done = cli("passes")
    assert done.code == 0
    for name in [*pass_modules(), *pipeline.PRESETS]:
        assert f" {name} " in done.out


@pytest.mark.parametrize("name", list(pass_modules()))
def test_passes_explains_one(name: str, cli: Cli) -> None:
    done = cli("passes", name)
    assert done.code == 0
    assert done.out.startswith(f"{name}: ")
    assert "Before:" in done.out
    assert "After:" in done.out


def test_passes_spells_out_a_preset(cli: Cli) -> None:
    assert cli("passes", "O3").out.strip() == str(pipeline.Pipeline.parse("O3"))


def test_passes_names_the_nearest(cli: Cli) -> None:
    assert "did you mean 'fold-constants'?" in assert_told(cli("passes", "fold-constant"), 2)


def test_backends_says_what_works_here_and_why_not(cli: Cli) -> None:
    done = cli("backends")
    assert done.code == 0
    for word in ("ort", "tensorrt", "tensorrt-rtx", "CPUExecutionProvider"):
        assert word in done.out


def test_inspect_shows_a_model(cli: Cli) -> None:
    done = cli("inspect", RESNET)
    assert done.code == 0
    assert "float32[batch,1,8,8] x" in done.out
    assert "BatchNormalization" in done.out
    assert cli("inspect", "-", stdin=RESNET.read_bytes()).code == 0


def test_inspect_gives_json(cli: Cli) -> None:
    facts = json.loads(cli("inspect", RESNET, "--json").out)
    assert facts["nodes"] == 54
    assert facts["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["batch", 1, 8, 8], "text": "float32[batch,1,8,8] x"}
    ]
    assert json.loads(cli("inspect", "-", "--json", stdin=RESNET.read_bytes()).out) == facts


def test_inspect_shows_a_bundle(cli: Cli, small: Path) -> None:
    cli("build", small, "-o", "out", "-t", "ort:cpu")
    assert "ort:cpu" in cli("inspect", "out").out
    assert json.loads(cli("inspect", "out", "--json").out) == graphopt.Bundle.load("out").manifest


# ----------------------------------------------------------------------------------------------- compare, run, bench


def test_compare_says_equal(cli: Cli) -> None:
    cli("opt", RESNET, "-o", "o.onnx", "-p", "fold-constants,fuse-conv-bn")
    done = cli("compare", RESNET, "o.onnx", "--report", "r.json")
    assert done.code == 0
    assert "equal within 0.0001 on 2 samples" in done.err
    assert json.loads(Path("r.json").read_text())["equal"] is True
    assert cli("compare", RESNET, "o.onnx", "--shape", "x=5x1x8x8").code == 0


def test_compare_ends_with_1_when_the_numbers_differ(cli: Cli, small: Path) -> None:
    Path("neg.onnxtxt").write_text(SMALL.replace("Relu", "Neg"))
    done = cli("compare", small, "neg.onnxtxt", "--report", "r.json")
    assert done.code == 1
    assert "output 'y' differs by" in done.err
    assert json.loads(Path("r.json").read_text())["equal"] is False


def test_compare_ends_with_1_when_the_names_differ(cli: Cli, small: Path) -> None:
    Path("other.onnxtxt").write_text(SMALL.replace("float[N,3] y", "float[N,3] z").replace("y =", "z ="))
    assert "outputs differ: ['y'] and ['z']" in assert_told(cli("compare", small, "other.onnxtxt"), 1)


def test_run_takes_data_and_writes_outputs(cli: Cli, small: Path) -> None:
    cli("build", small, "-o", "out", "-t", "ort:cpu")
    x = np.array([[1, -2, 3]], np.float32)
    np.savez("x.npz", x=x)
    done = cli("run", "out/", "--data", "x.npz", "-o", "y.npz")
    assert done.code == 0
    assert "float32" in done.out
    with np.load("y.npz") as y:
        np.testing.assert_array_equal(y["y"], np.maximum(x, 0))


def test_run_without_data_generates_some(cli: Cli, small: Path) -> None:
    cli("build", small, "-o", "out", "-t", "ort:cpu")
    assert cli("run", "out").code == 0
    assert cli("run", "out", "--target", "ort", "--threads", 1).code == 0
    assert cli("run", RESNET).code == 0
    assert cli("run", small).code == 0


def test_run_says_what_it_passed_over(cli: Cli, small: Path) -> None:
    cli("build", small, "-o", "out", "-t", "ort:cuda", "-t", "ort:cpu")
    done = cli("run", "out")
    assert done.code == 0
    assert "note: passed over ort:cuda: provider 'cuda' is not in this onnxruntime" in done.err


@pytest.mark.parametrize(("text", "dtypes"), [
    ("g (string[2] s, float16[2] b) => (string[2] file, float16[2] z) { file = Identity (s)  z = Add (b, b) }",
     ["<U1", "float16"]),
    ("g (bfloat16[2] a, bool[1] c) => (bfloat16[2] y, bool[1] d) { y = Identity (a)  d = Not (c) }", ["V2", "bool"]),
])  # fmt: skip
def test_outputs_of_every_type_and_name_go_to_a_file_and_come_back(text: str, dtypes: list[str], cli: Cli) -> None:
    Path("m.onnxtxt").write_text(HEADER + text)
    done = cli("run", "m.onnxtxt", "-o", "y.npz")
    assert done.code == 0
    with np.load("y.npz") as file:
        found = {name: file[name] for name in file.files}
    names = [spec.name for spec in ir.load("m.onnxtxt").outputs]
    assert [str(found[name].dtype).replace("<U2", "<U1").replace("|", "") for name in names] == dtypes
    inputs = [spec.name for spec in ir.load("m.onnxtxt").inputs]
    np.savez("x.npz", **{i: found[o] for i, o in zip(inputs, names, strict=True)})
    assert cli("run", "m.onnxtxt", "--data", "x.npz").code == 0


def test_bench_is_interleaved_with_ratios_and_a_sign_test(cli: Cli, small: Path) -> None:
    cli("build", RESNET, "-o", "out", "-t", "ort:cpu")
    done = cli("bench", "out", RESNET, "out", "--rounds", 7, "--report", "r.json", "--threads", 1)
    assert done.code == 0
    for word in ("median ms", "ratio", "99 % interval", "verdict", "baseline"):
        assert word in done.out
    rows = json.loads(Path("r.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["out", str(RESNET), "out (3)"]
    assert rows[1]["comparison"]["rounds"] == 7
    assert 0 < rows[1]["comparison"]["p_value"] <= 1


@pytest.mark.parametrize("command", ["", "build", "opt", "passes", "backends", "inspect", "compare", "run", "bench"])
def test_help_is_there_for_every_command(command: str, cli: Cli) -> None:
    done = cli(*command.split(), "--help")
    assert done.code == 0
    assert "Usage: graphopt" in done.out
    assert "int range" not in done.out
    assert done.err == ""


def test_no_command_shows_the_help(cli: Cli) -> None:
    done = cli()
    assert done.code == 2
    assert "Commands:" in done.err


# -------------------------------------------------------------------------------------------------------- bad input


def external(location: str) -> bytes:
    """A model whose one initializer lies in `location`."""
    proto = onnx.parser.parse_model(CONV_BN)
    weight = proto.graph.initializer[0]
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    return bytes(proto.SerializeToString())


def with_header(header: str) -> bytes:
    proto = onnx.parser.parse_model(SMALL)
    proto.opset_import[0].version = 999 if header == "opset" else 20
    proto.ir_version = 999 if header == "ir" else 10
    return bytes(proto.SerializeToString())


UNREADABLE: dict[str, tuple[str, bytes | None, str]] = {  # id -> file name, content (None: a folder), what is told
    "not ONNX": ("m.onnx", b"hello, world\n", "cannot be read as an ONNX model"),
    "zero bytes": ("m.onnx", b"", "is empty (0 bytes)"),
    "truncated": ("m.onnx", RESNET.read_bytes()[:300_000], "cannot be read as an ONNX model"),
    "cut in the header": ("m.onnx", RESNET.read_bytes()[:10], ""),
    "random bytes": ("m.onnx", bytes(range(255, 0, -1)), "cannot be read as an ONNX model"),
    "an npz file": ("m.onnx", b"PK\x03\x04" + bytes(100), "cannot be read as an ONNX model"),
    "a folder": ("m.onnx", None, "is a folder; name the .onnx file in it"),
    "no such file": ("", b"", "No such file"),
    "text that does not parse": ("m.onnxtxt", (HEADER + "g (float[N] x) => (float[N] y { }").encode(), "line"),
    "text in another encoding": ("m.onnxtxt", b"\xff\xfe\x00g", "is not text"),
    "a duplicate name": ("m.onnxtxt", (HEADER + "g (float[N] x) => (float[N] y) { y = Relu (x)  y = Neg (x) }").encode(),
                         "defined twice"),
    "a name that nothing defines": ("m.onnxtxt", (HEADER + "g (float[N] x) => (float[N] y) { y = Relu (xx) }").encode(),
                                    "which nothing defines"),
    "an output that nothing produces": ("m.onnxtxt", (HEADER + "g (float[N] x) => (float[N] y) { z = Relu (x) }").encode(),
                                        "produced by no node"),
    "a missing external file": ("m.onnx", external("weights.bin"), "'weights.bin' cannot be read"),
    "an external path upwards": ("m.onnx", external("../../etc/passwd"), "outside the model's folder; refused"),
    "an absolute external path": ("m.onnx", external("/etc/passwd"), "outside the model's folder; refused"),
    "an opset of the future": ("m.onnx", with_header("opset"), "uses opset 999"),
    "an IR version of the future": ("m.onnx", with_header("ir"), "has IR version 999"),
}  # fmt: skip
INVALID: dict[str, tuple[str, bytes | None, str]] = {
    "a cycle": ("m.onnxtxt", (HEADER + "g (float[N] x) => (float[N] y) { [n1] a = Add (x, b)  [n2] b = Relu (a)  y = Relu (b) }").encode(),
                "'n1' (Add)"),
    "an unknown operator": ("m.onnxtxt", SMALL.replace("Relu", "Rellu").encode(), "did you mean 'Relu'?"),
    "an unknown domain": ("m.onnxtxt", SMALL.replace('"" : 20', '"" : 20, "acme" : 1').replace("Relu", "acme.Relu").encode(),
                          "unknown domain 'acme'"),
    "a domain without an import": ("m.onnxtxt", SMALL.replace("Relu", "acme.Relu").encode(), "acme"),
}  # fmt: skip


def place(tmp_path: Path, name: str, content: bytes | None) -> Path:
    path = tmp_path / (name or "missing.onnx")
    if content is None:
        path.mkdir()
        (path / "inner.onnx").write_bytes(b"x")
    elif name:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "command", [["build", "-o", "out", "-t", "ort:cpu"], ["opt", "-o", "o.onnx"], ["inspect"]], ids=lambda c: c[0]
)
@pytest.mark.parametrize("case", UNREADABLE)
def test_a_model_that_cannot_be_read(case: str, command: list[str], cli: Cli, tmp_path: Path) -> None:
    name, content, told = UNREADABLE[case]
    path = place(tmp_path, name, content)
    before = listing(tmp_path)
    if command == ["inspect"] and content is None:
        told = "is no bundle"
    message = assert_told(cli(command[0], path, *command[1:]), 1)
    assert told in message
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "command", [["build", "-o", "out", "-t", "ort:cpu"], ["opt", "-o", "o.onnx"]], ids=lambda c: c[0]
)
@pytest.mark.parametrize("case", INVALID)
def test_a_model_that_breaks_the_rules(case: str, command: list[str], cli: Cli, tmp_path: Path) -> None:
    name, content, told = INVALID[case]
    path = place(tmp_path, name, content)
    before = listing(tmp_path)
    assert told in assert_told(cli(command[0], path, *command[1:]), 1)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("stdin", [b"", b"hello", b"<ir_version", b"g (float[N] x) => (", external("w.bin")])
def test_bad_stdin(stdin: bytes, cli: Cli, tmp_path: Path) -> None:
    assert_told(cli("opt", "-", "-o", "o.onnx", stdin=stdin), 1)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("case", ["not ONNX", "zero bytes", "truncated", "a folder", "no such file"])
def test_run_bench_and_compare_take_no_such_model(case: str, cli: Cli, tmp_path: Path, small: Path) -> None:
    path = place(tmp_path, *UNREADABLE[case][:2])
    assert_told(cli("run", path), 1)
    assert_told(cli("bench", path), 1)
    assert_told(cli("compare", small, path), 1)
    assert_told(cli("compare", path, small), 1)


@pytest.mark.parametrize(("text", "column", "told"), [
    ("fold-constant,eliminate-dead", 0, "did you mean 'fold-constants'?"),
    ("eliminate-dead,,fold-constants", 15, "expected the name of a pass"),
    ("fixpoint(eliminate-dead", 23, "expected ')'"),
    ("fold-constants{budget=x}", 22, "budget"),
    ("fold-constants{bugdet=1}", 15, "did you mean 'budget'?"),
    ("O2 eliminate-dead", 3, "expected ','"),
])  # fmt: skip
def test_a_wrong_pipeline_has_a_caret_under_its_column(
    text: str, column: int, told: str, cli: Cli, small: Path
) -> None:
    for command in (["build", small, "-o", "out"], ["opt", small, "-o", "o.onnx"]):
        message = assert_told(cli(*command, "-p", text), 2, carets=True)
        assert told in message
        assert message.splitlines()[1:] == [f"  {text}", "  " + " " * column + "^"]
    assert not Path("out").exists()


USAGE = {
    "an unknown target": (["-t", "openvino"], "unknown target 'openvino': known runtimes: ort, tensorrt, tensorrt-rtx"),
    "a misspelt target": (["-t", "tensorrtx"], "did you mean 'tensorrt"),
    "an unknown provider": (["-t", "ort:npu"], "no execution provider 'npu'; here are:"),
    "a GPU that is none": (["-t", "tensorrt-rtx:rtx4090"], "as in sm86+sm89"),
    "a shape of another rank": (["-t", "ort:cpu", "--shape", "x=1x3x3"], "has 3 dimensions, the model declares float32[N,3] x"),
    "a shape against a fixed dimension": (["-t", "ort:cpu", "--shape", "x=4x4"], "dimension 1 is fixed to 3"),
    "a shape for no input": (["-t", "ort:cpu", "--shape", "z=4x3"], "its inputs are x"),
    "a shape that is no shape": (["--shape", "x=4,3"], "integers joined by 'x'"),
    "a shape without a name": (["--shape", "4x3"], "expected NAME=SHAPE"),
    "a shape in disorder": (["--shape", "x=4x3:2x3:8x3"], "min <= opt <= max"),
    "a shape twice": (["--shape", "x=4x3", "--shape", "x=4x3"], "names input 'x' twice"),
    "a shape of mixed ranks": (["--shape", "x=4x3:4:4x3"], "differ in rank"),
    "a level and passes": (["-O1", "-p", "O2"], "exclude each other"),
    "a level that is none": (["-O9"], "graphopt build --help"),
    "an unknown graph level": (["-t", "ort:cpu", "--graph-level", "max"], "none of disabled, basic, extended, all"),
    "an unknown option": (["--fast"], "no such option"),
    "data that is not there": (["--data", "none.npz"], "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_wrong_arguments_end_with_2(case: str, cli: Cli, small: Path, tmp_path: Path) -> None:
    arguments, told = USAGE[case]
    before = listing(tmp_path)
    assert told in assert_told(cli("build", small, "-o", "out", *arguments), 2)
    assert listing(tmp_path) == before


@needs_rtx
@pytest.mark.parametrize(("arguments", "told"), [
    (["--shape", "x=1x3x3"], "has 3 dimensions, the model declares float32[N,3] x"),
    (["--shape", "x=4x4"], "dimension 1 is fixed to 3"),
    (["--optimization-level", "9"], "has 0 (fast build) to 5"),
    (["--workspace", "0"], "above 0"),
    (["--version-compatible"], "has no version compatible engines"),
    (["--hardware-compatible", "ampere-plus"], "name the GPUs in the target instead"),
])  # fmt: skip
def test_wrong_arguments_for_an_engine_end_with_2(
    arguments: list[str], told: str, cli: Cli, small: Path, tmp_path: Path
) -> None:
    before = listing(tmp_path)
    assert told in assert_told(cli("build", small, "-o", "out", "-t", "tensorrt-rtx:sm89", *arguments), 2)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("arguments", "told"), [
    (["build"], "missing argument 'MODEL'; see graphopt build --help"),
    (["build", "m.onnx"], "missing option '--output'"),
    (["frobnicate"], "no such command 'frobnicate'; see graphopt --help"),
    (["opt", "small.onnxtxt", "-o", "o.onnx", "--text"], "--text goes with -o -"),
    (["opt", "small.onnxtxt", "-o", "-", "--external-data"], "--external-data needs a file"),
    (["bench"], "missing argument"),
    (["bench", "small.onnxtxt", "--rounds", "0"], "graphopt bench --help"),
    (["bench", "small.onnxtxt", "--shape", "q=1x2"], "there is no such input; the inputs are x"),
    (["verify", "out", "--max-drop", "1"], "add --data"),
    (["run", "small.onnxtxt", "--threads", "many"], "graphopt run --help"),
])  # fmt: skip
def test_usage_errors_are_one_line_and_name_the_help(arguments: list[str], told: str, cli: Cli, small: Path) -> None:
    assert told in assert_told(cli(*arguments), 2)


DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "another name": (lambda p: np.savez(p, y=np.ones((2, 3), np.float32)), "missing ['x'], unknown ['y']"),
    "another dtype": (lambda p: np.savez(p, x=np.ones((2, 3))), "input 'x' is float64"),
    "another rank": (lambda p: np.savez(p, x=np.ones(3, np.float32)), "has shape [3]"),
    "another size": (lambda p: np.savez(p, x=np.ones((2, 4), np.float32)), "has shape [2, 4]"),
    "objects": (lambda p: np.savez(p, x=np.array([{}, 1], object)), "an array of Python objects"),
    "one array": (lambda p: np.save(p.open("wb"), np.ones(3)), "is no .npz file"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"x": 1})), "is no .npz file"),
    "text": (lambda p: p.write_text("x=1"), "is no .npz file"),
    "nothing": (lambda p: p.write_bytes(b""), "is no .npz file"),
    "a folder": (lambda p: p.mkdir(), "Is a directory"),
    "other files": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "hello"), "write plain arrays"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("case", DATA)
def test_data_that_does_not_fit(case: str, cli: Cli, small: Path, tmp_path: Path) -> None:
    write, told = DATA[case]
    write(tmp_path / "x.npz")
    before = listing(tmp_path)
    commands = (["build", small, "-o", "out", "-t", "ort:cpu"], ["opt", small, "-o", "o.onnx"], ["run", small],
                ["bench", small], ["compare", small, small])  # fmt: skip
    for command in commands:
        assert told in assert_told(cli(*command, "--data", "x.npz"), 2)
    assert listing(tmp_path) == before


def test_damaged_data_is_told(cli: Cli, small: Path, tmp_path: Path) -> None:
    np.savez("x.npz", x=np.ones((200, 3), np.float32))
    whole = (tmp_path / "x.npz").read_bytes()
    at = whole.index(b"NUMPY") + 300
    (tmp_path / "x.npz").write_bytes(whole[:at] + b"\x55" + whole[at + 1 :])
    assert_told(cli("run", small, "--data", "x.npz"), 2)
    (tmp_path / "x.npz").write_bytes(whole[:500])
    assert_told(cli("run", small, "--data", "x.npz"), 2)


def test_a_model_beyond_onnx_runtime_says_what_to_do(cli: Cli, tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    text = SMALL.replace('"" : 20', f'"" : {newest}')
    Path("m.onnxtxt").write_text(text)
    import onnxruntime

    try:
        onnxruntime.InferenceSession(ir.saves(ir.parse(text)), providers=["CPUExecutionProvider"])
    except Exception:
        message = assert_told(cli("run", "m.onnxtxt"), 1)
        assert "upgrade onnxruntime, or convert the model down" in message
    else:
        pytest.skip(f"this onnxruntime knows opset {newest}, the newest of this onnx")


# ------------------------------------------------------------------------------------------------- places to write to


def test_places_that_cannot_be_written(cli: Cli, small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "a web app"}')
    (tmp_path / "web/index.html").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    before = listing(tmp_path)
    for place_, told in {
        "file": "it is a file",
        "file/out": "Not a directory",
        "foreign": "holds other files",
        "web": "holds a manifest.json that is no bundle's",
        ".": "holds other files",
        "/proc/out": "No such file",
    }.items():
        assert told in assert_told(cli("build", small, "-o", place_, "-t", "ort:cpu"), 1)
    for place_, told in {
        "file/o.onnx": "'file' is no folder",
        "none/o.onnx": "'none' is no folder; make it first",
        "foreign": "it is no file",
        "fifo": "it is no file",
        "/dev/null": "it is no file",
    }.items():
        assert told in assert_told(cli("opt", small, "-o", place_), 1)
        assert told in assert_told(cli("run", small, "-o", place_), 1)
        assert told in assert_told(cli("opt", small, "-o", "o.onnx", "--report", place_), 1)
        assert told in assert_told(cli("build", small, "-o", "out", "-t", "ort:cpu", "--report", place_), 1)
        assert told in assert_told(cli("compare", small, small, "--report", place_), 1)
    assert listing(tmp_path) == before
    assert Path("/dev/null").is_char_device()


def test_folders_made_on_the_way_vanish_with_a_failed_build(cli: Cli, small: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    assert_told(cli("build", small, "-o", "a/b/out", "-t", "ort:npu"), 2)
    assert listing(tmp_path) == before
    assert cli("build", small, "-o", "a/b/out", "-t", "ort:cpu").code == 0
    assert (tmp_path / "a/b/out/manifest.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [
    ["opt", RESNET, "-o", "-", "-p", ""],
    ["inspect", RESNET, "--json"],
    ["inspect", RESNET],
    ["passes"],
    ["backends"],
], ids=lambda a: " ".join(map(str, a[:1])))  # fmt: skip
def test_stdout_on_a_full_disk(arguments: list[Any], tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = process(*arguments, cwd=tmp_path, stdout=full)
    outcome = Outcome(done.returncode, "", done.stderr.decode())
    assert "No space left on device; free some space" in assert_told(outcome, 1)


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m graphopt.cli inspect --json {RESNET} | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.stdout == b"{\n"
    assert done.stderr == b""
    command = f"{sys.executable} -m graphopt.cli opt {RESNET} -o - 2>/dev/null | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode in (0, 1)
    assert done.stderr == b""


def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("arguments", [
    ["opt", RESNET, "-o", "o.onnx"],
    ["opt", RESNET, "-o", "o.onnx", "--external-data"],
    ["build", RESNET, "-o", "new/out", "-t", "ort:cpu"],
    ["build", RESNET, "-o", "old", "-t", "ort:cpu"],
], ids=["opt", "external", "build", "rebuild"])  # fmt: skip
def test_a_disk_that_takes_no_more_leaves_everything_as_it_was(
    arguments: list[Any], cli: Cli, small: Path, tmp_path: Path
) -> None:
    assert cli("build", small, "-o", "old", "-t", "ort:cpu").code == 0
    before = listing(tmp_path)
    done = process(*arguments, cwd=tmp_path, preexec_fn=no_large_files)
    assert "File too large" in assert_told(Outcome(done.returncode, done.stdout.decode(), done.stderr.decode()), 1)
    assert listing(tmp_path) == before


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_leaves_everything_as_it_was(tiny_disk: Path, cli: Cli, small: Path) -> None:
    assert cli("build", small, "-o", "disk/old", "-t", "ort:cpu").code == 0
    before = listing(tiny_disk)
    for arguments in (["opt", RESNET, "-o", "disk/o.onnx"], ["build", RESNET, "-o", "disk/out", "-t", "ort:cpu"],
                      ["build", RESNET, "-o", "disk/old", "-t", "ort:cpu"]):  # fmt: skip
        message = assert_told(cli(*arguments), 1)
        assert "No space left on device; free some space" in message
        assert "/.o" not in message  # the name of a temporary file says nothing
        assert listing(tiny_disk) == before


def test_a_mounted_folder_is_filled_in_place(tiny_disk: Path, cli: Cli, small: Path) -> None:
    for _ in range(2):
        assert cli("build", small, "-o", "disk", "-t", "ort:cpu").code == 0
        assert sorted(p.name for p in tiny_disk.iterdir()) == ["manifest.json", "ort-cpu.onnx"]
    before = listing(tiny_disk)
    assert_told(cli("build", RESNET, "-o", "disk", "-t", "ort:cpu"), 1)
    assert listing(tiny_disk) == before
    assert cli("run", "disk").code == 0


# ------------------------------------------------------------------------------------------------------------ bundles


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another version": (lambda m: m.update(schema="graphopt-bundle/99"), "has schema 'graphopt-bundle/99'"),
    "no variants": (lambda m: m.pop("variants"), "it lacks 'variants'"),
    "variants of another kind": (lambda m: m.update(variants=3), "is damaged"),
    "no files": (lambda m: m["variants"][0].update(files=[]), "has no files"),
    "no digest": (lambda m: m["variants"][0]["files"][0].pop("sha256"), "it lacks 'sha256'"),
    "an unknown target": (lambda m: m["variants"][0].update(target="abacus"), "unknown target 'abacus'"),
    "a shape that is none": (lambda m: m["variants"][0].update(shapes={"x": "wide"}), "is damaged"),
    "inputs without names": (lambda m: m.update(inputs=[{}]), "it lacks 'shape'"),
    "a file elsewhere": (lambda m: m["variants"][0]["files"][0].update(name="../small.onnxtxt"), "lies outside the bundle"),
    "a file that is missing": (lambda m: m["variants"][0]["files"][0].update(name="none.onnx"), "'none.onnx' is missing or differs"),
    "a file that differs": (lambda m: m["variants"][0]["files"][0].update(sha256="0" * 64), "'ort-cpu.onnx' is missing or differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_manifest_that_tells_lies(case: str, cli: Cli, small: Path, tmp_path: Path) -> None:
    change, told = BROKEN[case]
    cli("build", small, "-o", "out", "-t", "ort:cpu")
    manifest = json.loads(Path("out/manifest.json").read_text())
    change(manifest)
    Path("out/manifest.json").write_text(json.dumps(manifest))
    before = listing(tmp_path)
    assert told in assert_told(cli("run", "out"), 1)
    assert told in assert_told(cli("bench", "out"), 1)
    done = cli("inspect", "out")
    assert done.code == 1
    assert "error: " in done.err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": []}'])
def test_a_manifest_that_is_none(content: bytes, cli: Cli) -> None:
    Path("out").mkdir()
    Path("out/manifest.json").write_bytes(content)
    for command in ("run", "bench", "inspect"):
        assert_told(cli(command, "out"), 1)


def test_a_file_of_a_bundle_that_changed_is_told(cli: Cli, small: Path) -> None:
    cli("build", small, "-o", "out", "-t", "ort:cpu")
    file = Path("out/ort-cpu.onnx")
    file.write_bytes(file.read_bytes()[:-5])
    assert "'ort-cpu.onnx' is missing or differs" in assert_told(cli("run", "out"), 1)
    done = cli("inspect", "out")
    assert done.code == 1
    assert "is damaged: ort-cpu.onnx differ" in done.err


def test_a_variant_that_the_bundle_lacks_is_answered_with_those_it_has(cli: Cli, small: Path) -> None:
    cli("build", small, "-o", "out", "-t", "ort:cpu")
    assert "it has ort:cpu" in assert_told(cli("run", "out", "--target", "tensorrt-rtx:sm89"), 1)


# ---------------------------------------------------------------------------------------------- our own faults, and ends


@pytest.mark.parametrize("error", [PassError("p did wrong"), VerifyError("broken"), ZeroDivisionError("oops")])
def test_our_own_faults_end_with_3_and_keep_the_traceback(
    error: Exception, cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr("graphopt.report.summary", fail)
    done = cli("inspect", small)
    assert done.code == 3
    assert "Traceback" in done.err
    assert "this is a bug in graphopt" in done.err


def test_out_of_memory_is_told(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise MemoryError

    monkeypatch.setattr("graphopt.report.summary", fail)
    assert "out of memory" in assert_told(cli("inspect", small), 1)


def test_an_interrupt_ends_with_130(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.building._prove", stop)
    before = listing(tmp_path)
    done = cli("build", small, "-o", "out", "-t", "ort:cpu")
    assert done.code == 130
    assert "Traceback" not in done.err
    assert listing(tmp_path) == before


def test_the_command_line_of_a_process_tells_warnings(tmp_path: Path) -> None:
    logging.getLogger("graphopt")
    code = "import logging, graphopt.cli as c, sys; sys.argv[1:] = ['--help']\ntry: c.main()\nfinally: logging.getLogger('x').warning('w')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr == b"warning: w\n"
