"""A second build does nothing, a changed one only what depends on the change; what the cache holds is checked before it is used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt import building, ir, models, provenance, recall
from graphopt import cli as command_line
from graphopt.backend import BuildOptions
from graphopt.cache import Cache, Digests
from graphopt.errors import InvalidModel
from graphopt.evaluate import evaluate_node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline
from graphopt.recall import Recall
from graphopt.recipe import Settings
from graphopt.target import Target

ROOT = Path(__file__).parents[1]
NETS = Path(models.__file__).resolve().parent
SMALL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N,3] x) => (float[N,3] y) <float[3] w = {1, 2, 3}> { a = Identity (x)  b = Add (a, w)  y = Relu (b) }"""
Build = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def build(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Run `graphopt build` in this process, in `tmp_path`, which holds m.onnxtxt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnxtxt").write_text(SMALL)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = command_line.run(["build", "--no-isolate", *map(str, arguments)])  # in a child nobody could spy
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the steps that were computed, not recalled."""
    seen: list[str] = []
    run, value, emit = Pipeline.run, building._compared, None

    def spy_run(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        seen.append(f"passes from {options.get('done', 0)}")
        return run(self, *arguments, **options)

    def spy_value(*arguments: Any) -> Any:
        seen.append("proof")
        return value(*arguments)

    from graphopt.discovery import backend_for

    backend = type(backend_for("ort")[1])
    emit = backend.emit

    def spy_emit(self: Any, model: Any, target: Any, *rest: Any) -> Any:
        seen.append(f"emit {target}")
        return emit(self, model, target, *rest)

    monkeypatch.setattr(Pipeline, "run", spy_run)
    monkeypatch.setattr(building, "_compared", spy_value)
    monkeypatch.setattr(backend, "emit", spy_emit)
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------------------------- up to date


def test_a_second_build_does_nothing_and_says_so(build: Build, ran: list[str]) -> None:
    assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")[0] == 0
    assert ran == ["passes from 0", "proof", "emit ort:cpu"]
    before = {p: p.stat().st_mtime_ns for p in Path("out").iterdir()}
    ran.clear()
    assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu") == (0, "out: up to date\n", "")
    assert ran == []
    assert {p: p.stat().st_mtime_ns for p in Path("out").iterdir()} == before


def test_finding_out_that_nothing_is_to_do_imports_nothing_heavy(build: Build) -> None:
    build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    code = (
        "import sys; from graphopt import cli; assert cli.run(sys.argv[1:]) == 0; "
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    arguments = ["build", "m.onnxtxt", "-o", "out", "-t", "ort:cpu", "--no-isolate"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert "up to date" in done.stdout
    assert not {"onnx", "numpy", "onnxruntime", "onnx_graphsurgeon", "tensorrt_rtx"} & set(done.stdout.split())


CHANGES: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "an option": (lambda: None, ["-O1"], "option level: none -> 1"),
    "a target": (lambda: None, ["-t", "ort:cuda"], "option targets"),
    "the model": (lambda: Path("m.onnxtxt").write_text(SMALL.replace("{1, 2, 3}", "{1, 2, 4}")), [], "model m.onnxtxt changed"),
    "the data": (lambda: np.savez("d.npz", x=np.ones((2, 3), np.float32)), [], "data d.npz changed"),
    "a file of the bundle": (lambda: Path("out/ort-cpu.onnx").write_bytes(b"x"), [], "ort-cpu.onnx in the bundle was changed"),
    "a missing file": (lambda: Path("out/ort-cpu.onnx").unlink(), [], "ort-cpu.onnx is missing from the bundle"),
    "no record": (lambda: Path("out/manifest.json").write_text('{"schema": "graphopt-bundle/1", "variants": []}'), [], "the bundle there says nothing of how it was built"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_named_fails_locked_and_is_built(case: str, build: Build) -> None:
    change, flags, told = CHANGES[case]
    np.savez("d.npz", x=np.zeros((2, 3), np.float32))
    arguments = ["m.onnxtxt", "-o", "out", "-t", "ort:cpu", "--data", "d.npz"]
    assert build(*arguments)[0] == 0
    change()
    before = contents(Path("out"))
    code, out, err = build(*arguments, *flags, "--locked")
    assert (code, out) == (1, "")
    assert told in err
    assert "without --locked" in err
    assert contents(Path("out")) == before
    code, out, err = build(*arguments, *flags)
    assert code == 0
    assert f"out was built again: {told}" in err
    assert build(*arguments, *flags, "--locked") == (0, "out: up to date\n", "")


def test_versions_count(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    newer = {**provenance.core_versions(), "onnxruntime": "99.0"}
    monkeypatch.setattr(provenance, "core_versions", lambda: newer)
    code, _, err = build("m.onnxtxt", "-o", "out", "-t", "ort:cpu", "--locked")
    assert code == 1
    assert "onnxruntime: " in err
    assert "-> 99.0" in err


def test_locked_without_a_bundle_fails(build: Build) -> None:
    code, _, err = build("m.onnxtxt", "-o", "out", "-t", "ort:cpu", "--locked")
    assert (code, "there is no bundle yet" in err) == (1, True)
    assert not Path("out").exists()


def test_external_data_counts(build: Build, tmp_path: Path) -> None:
    ir.save(ir.load(NETS / "vit.legacy.onnx"), tmp_path / "v.onnx", external=True)
    arguments = ["v.onnx", "-o", "out", "-t", "ort:cpu"]
    assert build(*arguments)[0] == 0
    roles = [f["role"] for f in json.loads(Path("out/manifest.json").read_text())["build"]["files"]]
    assert roles == ["model", "external data"]
    data = bytearray(Path("v.onnx.data").read_bytes())
    data[100] ^= 1
    Path("v.onnx.data").write_bytes(data)
    assert "external data v.onnx.data changed" in build(*arguments, "--locked")[2]


def test_a_comment_in_the_recipe_changes_nothing(build: Build) -> None:
    text = '[build.m]\nmodel = "m.onnxtxt"\ntargets = ["ort:cpu"]\n'
    Path("graphopt.toml").write_text(text)
    assert build()[0] == 0
    Path("graphopt.toml").write_text("# a comment\n" + text)
    assert build("--locked") == (0, "out/m: up to date\n", "")
    assert build("--locked", "m")[0] == 0
    assert build("-O1")[0] == 0  # flags override
    assert build("--locked")[0] == 1


def test_a_failing_budget_leaves_the_earlier_bundle(build: Build) -> None:
    text = '[build.m]\nmodel = "m.onnxtxt"\ntargets = ["ort:cpu"]\n'
    Path("graphopt.toml").write_text(text)
    build()
    before = contents(Path("out/m"))
    Path("graphopt.toml").write_text(text + '[build.m.budget]\nmax-size = "10 B"\n')
    code, _, err = build()
    assert code == 1
    assert "over the budget, so nothing is written: ort:cpu: 0.00 MB, max-size is 10 B" in err
    assert contents(Path("out/m")) == before


def test_an_error_in_one_of_several_builds_says_in_which(build: Build) -> None:
    Path("graphopt.toml").write_text(
        '[defaults]\ntargets = ["ort:cpu"]\n[build.a]\nmodel = "m.onnxtxt"\n[build.b]\nmodel = "none.onnx"\n'
    )
    code, out, err = build()
    assert (code, "out/a/" in out) == (1, True)
    assert err.splitlines()[-1] == "in the build of out/b; those before it are done"
    assert build() == (1, "out/a: up to date\n", err)


def test_depends_are_watched(build: Build) -> None:
    Path("in").mkdir()
    Path("in/a.txt").write_text("a")
    Path("graphopt.toml").write_text('[build.m]\nmodel = "m.onnxtxt"\ntargets = ["ort:cpu"]\ndepends = ["in/*.txt"]\n')
    assert build()[0] == 0
    Path("in/b.txt").write_text("b")
    assert "depends b.txt is new" in build("--locked")[2]


def test_a_model_that_changes_while_it_is_built_fails_the_build(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = building._compared

    def meanwhile(*arguments: Any) -> Any:
        Path("m.onnxtxt").write_text(SMALL + " ")
        return proof(*arguments)

    monkeypatch.setattr(building, "_compared", meanwhile)
    code, _, err = build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    assert (code, err) == (1, "error: 'm.onnxtxt' changed while it was being built from; build again\n")
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------------------ the steps


def test_what_does_not_depend_on_an_option_is_not_done_again(build: Build, ran: list[str]) -> None:
    build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    for flags, expected in (
        (["--threads", "1"], ["emit ort:cpu"]),
        (["-t", "ort:cuda"], ["passes from 0", "emit ort:cuda"]),
        (["--seed", "7"], ["passes from 0", "proof"]),
        (["--workspace", "64"], []),  # TensorRT's
        (["-o", "elsewhere"], []),
        (["--no-cache"], ["passes from 0", "proof", "emit ort:cpu"]),
    ):
        ran.clear()
        assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu", *flags)[0] == 0
        assert ran == expected, flags


def test_a_pipeline_goes_on_from_the_longest_prefix_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "_WORTH", 0)  # keep every prefix
    model = ir.load(NETS / "vit.legacy.onnx")
    pipeline = Pipeline.parse("default")

    def context() -> Context:
        return Context(target=Target.parse("ort:cpu"), evaluate=evaluate_node)

    straight = pipeline.run(model, context(), [])
    cache = Cache(tmp_path)
    keys = [Recall(cache)._graph_key(pipeline, n + 1, model, context()) for n in range(len(pipeline.steps))]
    for length in range(len(keys), 0, -1):
        if length in (len(keys), len(keys) - 1, 4, 1):
            found = Recall(cache).optimize(pipeline, model, context(), [])
            assert found.model.fingerprint() == straight.model.fingerprint(), length
            assert (found.steps, found.remarks, found.stops) == (straight.steps, straight.remarks, straight.stops)
            assert recall._origins(found.model) == recall._origins(straight.model)
        for key in keys[length - 1 :]:
            shutil.rmtree(cache._place("graph", key), ignore_errors=True)


@pytest.mark.parametrize(
    "flags", [[], ["--int8", "--no-gate", "--data", "d.npz"], ["--prune", "0.2", "--data", "d.npz"]]
)
def test_a_bundle_from_the_cache_has_the_bytes_of_one_without(flags: list[str], build: Build) -> None:
    with np.load(NETS / "digits.npz") as digits:
        np.savez("d.npz", x=digits["x_calib"][:16])
    arguments = [str(NETS / "resnet.legacy.onnx"), "-t", "ort:cpu", *flags]
    first, second = build(*arguments, "-o", "a"), build(*arguments, "-o", "b")
    assert first[0] == second[0] == 0
    assert first[2] == second[2]  # what is said, too
    assert contents(Path("a")) == contents(Path("b"))


# ------------------------------------------------------------------------------------------------------------ the cache


def entries() -> Iterator[Path]:
    yield from Path(os.environ["GRAPHOPT_CACHE"]).glob("entries/*/*/*")


@pytest.mark.parametrize("damage", ["a bit", "empty", "gone", "no JSON"])
def test_damaged_entries_are_found_out_and_made_again(damage: str, build: Build, ran: list[str]) -> None:
    build("m.onnxtxt", "-o", "a", "-t", "ort:cpu")
    wanted = contents(Path("a"))
    ran.clear()
    for path in list(entries()):
        data = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "no JSON":
            path.write_bytes(b"\x80\x04.")  # a pickle
        else:
            path.write_bytes(b"" if damage == "empty" else data[:-1] + bytes([data[-1] ^ 1]))
    assert build("m.onnxtxt", "-o", "b", "-t", "ort:cpu")[0] == 0
    assert ran == ["passes from 0", "proof", "emit ort:cpu"]
    assert contents(Path("b")) == wanted


def test_the_cache_keeps_its_bound(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE_SIZE", "20 kB")
    for level in range(4):
        assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu", f"-O{level}")[0] == 0
    assert 0 < sum(p.stat().st_size for p in entries()) <= 20000
    monkeypatch.setenv("GRAPHOPT_CACHE_SIZE", "much")
    code, _, err = build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    assert (code, "GRAPHOPT_CACHE_SIZE: 'much' is no size" in err) == (2, True)


@pytest.mark.parametrize("value", ["off", "/proc/none/cache"])
def test_without_a_cache_all_works(value: str, build: Build, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", value)
    assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")[0] == 0
    ran.clear()
    assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu") == (0, "out: up to date\n", "")
    assert build("m.onnxtxt", "-o", "b", "-t", "ort:cpu")[0] == 0
    assert ran == ["passes from 0", "proof", "emit ort:cpu"]


def test_a_cache_that_is_a_file_is_told(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "m.onnxtxt"))
    code, _, err = build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    assert (code, "which is no folder" in err) == (2, True)


def test_a_digest_is_remembered_only_when_time_stamps_can_tell(tmp_path: Path) -> None:
    digests = Digests(Cache(tmp_path / "cache"))
    file = tmp_path / "f"
    file.write_text("a")
    first = digests.of(file)
    os.utime(file, ns=(1, 1))  # looks old, but its change time is now
    assert digests.of(file) == first
    stamp = file.stat()
    file.write_text("b")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert digests.of(file) != first


def test_two_processes_on_one_folder_do_not_harm_each_other(build: Build) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "graphopt.cli", "build", "m.onnxtxt", "-o", "out", "-t", "ort:cpu"]
    many = [subprocess.Popen([*command, f"-O{n % 2}"], env=environment, stdout=subprocess.DEVNULL) for n in range(4)]
    assert [process.wait(120) for process in many] == [0, 0, 0, 0]
    assert graphopt.Bundle.load("out").damaged() == []
    assert sorted(p.name for p in Path("out").iterdir()) == ["manifest.json", "ort-cpu.onnx"]
    assert not list(Path().glob(".graphopt*"))


def test_jobs_fill_the_cache_and_change_no_byte(build: Build, ran: list[str]) -> None:
    Path("graphopt.toml").write_text(
        '[defaults]\nmodel = "m.onnxtxt"\n[build.a]\ntargets = ["ort:cpu", "ort:cuda"]\n[build.b]\nlevel = 1\ntargets = ["ort:cpu"]\n'
    )
    assert build("-j", "3")[0] == 0
    assert ran == []  # other processes did it
    parallel = contents(Path("out/a")), contents(Path("out/b"))
    assert build("--no-cache")[0] == 0
    assert (contents(Path("out/a")), contents(Path("out/b"))) == parallel


# ------------------------------------------------------------------------------------------------------------ depfiles


@pytest.mark.parametrize("tool", ["make", "ninja"])
def test_make_and_ninja_read_the_dependencies(tool: str, build: Build, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    Path("a b#$é").mkdir()
    shutil.move("m.onnxtxt", "a b#$é/m.onnxtxt")
    np.savez("d.npz", x=np.zeros((2, 3), np.float32))
    graphopt_command = f"{sys.executable} -m graphopt.cli build -f recipe.toml --depfile out.d"
    Path("recipe.toml").write_text(
        '[build.m]\nmodel = "a b#$é/m.onnxtxt"\noutput = "out"\ntargets = ["ort:cpu"]\ndata = "d.npz"\n'
    )
    if tool == "make":
        Path("Makefile").write_text(f"out/manifest.json:\n\t{graphopt_command}\n-include out.d\n")
    else:
        Path("build.ninja").write_text(
            f"rule g\n  command = {graphopt_command}\n  depfile = out.d\nbuild out/manifest.json: g\n"
        )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run() -> str:
        done = subprocess.run([tool], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "ort-cpu.onnx" in run()
    assert "graphopt" not in run()
    for file in ("a b#$é/m.onnxtxt", "d.npz", "recipe.toml"):
        os.utime(file)  # newer, and the same
        assert "up to date" in run(), file
        assert "graphopt" not in run(), file


def test_md_writes_beside_the_bundle_and_locked_touches_nothing(build: Build) -> None:
    build("m.onnxtxt", "-o", "out", "-t", "ort:cpu", "-MD")
    assert Path("out.d").read_text() == "out/manifest.json: \\\n  m.onnxtxt\n"
    os.utime("m.onnxtxt")
    before = Path("out/manifest.json").stat().st_mtime_ns
    assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu", "--locked")[0] == 0
    assert Path("out/manifest.json").stat().st_mtime_ns == before


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "missing argument 'MODEL'; see graphopt build --help (there is no graphopt.toml here"),
    (["-f", "none.toml"], "cannot read the recipe 'none.toml': No such file"),
    (["m.onnxtxt"], "missing option '--output'"),
    (["m.onnxtxt", "n.onnxtxt", "-o", "out"], "one model at a time"),
    (["m.onnxtxt", "-o", "out", "--depfile", "no/where.d"], "is no folder; make it first"),
])  # fmt: skip
def test_arguments_that_do_not_fit(arguments: list[str], told: str, build: Build) -> None:
    code, out, err = build(*arguments)
    assert code in (1, 2)
    assert told in err
    assert out == ""


def test_source_date_epoch_is_the_only_time_in_a_bundle(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    assert "created" not in json.loads(Path("out/manifest.json").read_text())["build"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert (
        "SOURCE_DATE_EPOCH, time: none -> 2023-11-14T22:13:20Z" in build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")[2]
    )
    assert json.loads(Path("out/manifest.json").read_text())["build"]["created"] == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")[0] == 2


def test_python_can_use_the_cache_too(tmp_path: Path, ran: list[str]) -> None:
    cache = Cache(tmp_path / "cache")
    model = ir.parse(SMALL)
    for name in ("a", "b"):
        graphopt.build(model, tmp_path / name, ["ort"], options=BuildOptions(threads=1), recall=Recall(cache))
    assert ran == ["passes from 0", "proof", "emit ort:cpu"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_inputs_are_looked_at_again_before_anything_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "m.onnxtxt"
    file.write_text(SMALL)
    digests = Digests(None)
    files = provenance.input_files(Settings(model=file), digests)
    provenance.require_unchanged(files, digests)
    file.unlink()
    with pytest.raises(InvalidModel, match="changed while it was being built from"):
        provenance.require_unchanged(files, digests)


# ------------------------------------------------------------------------------------------------------------- hostile


def test_names_that_are_no_text_build_and_are_told(build: Build) -> None:
    name = os.fsdecode(b"m\xff.onnxtxt")
    shutil.copy("m.onnxtxt", name)
    for said in ("ort-cpu.onnx", "out: up to date"):
        code, out, _ = build(name, "-o", "out", "-t", "ort:cpu", "-MD")
        assert (code, said in out) == (0, True)
    assert command_line.run(["init", name]) == 2


def test_a_manifest_from_elsewhere_cannot_make_a_build_read_devices_or_remove_other_files(build: Build) -> None:
    build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    Path("precious").write_text("mine")
    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest["variants"][0]["files"] += [
        {"name": n, "sha256": "0" * 64, "bytes": 1} for n in ("../precious", "/dev/zero")
    ]
    manifest["build"]["files"].append({"role": "external data", "name": "/dev/zero", "sha256": "0" * 64, "bytes": 1})
    Path("out/manifest.json").write_text(json.dumps(manifest))
    Path("out/.graphopt-commit").mkdir()
    Path("out/.graphopt-commit/.gone").write_text('["../precious", "..", "/dev/null"]')
    code, _, err = build("m.onnxtxt", "-o", "out", "-t", "ort:cpu")
    assert code == 0
    assert "../precious in the bundle was changed" in err
    assert Path("precious").read_text() == "mine"
    assert sorted(p.name for p in Path("out").iterdir()) == ["manifest.json", "ort-cpu.onnx"]


def test_a_linked_folder_is_one_folder(build: Build) -> None:
    Path("link").symlink_to("real")
    assert build("m.onnxtxt", "-o", "link", "-t", "ort:cpu")[0] == 0
    assert build("m.onnxtxt", "-o", "real", "-t", "ort:cpu") == (0, "real: up to date\n", "")
    assert Path("link").is_symlink()
    Path("graphopt.toml").write_text(
        '[defaults]\nmodel = "m.onnxtxt"\n[build.a]\noutput = "link"\n[build.b]\noutput = "real"\n'
    )
    assert "writes 'link' too" in build()[2] or "writes 'real' too" in build()[2]
