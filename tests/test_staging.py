"""A folder replaced in one step: killed at each of its file operations, a replacement leaves the old content or the new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt import staging
from graphopt.errors import OutputError
from graphopt.staging import MANIFEST, SCHEMA, recover, staged

ROOT = Path(__file__).parents[1]
# Fork, replace the bundle by another, and die at file operation number k, for every k; prints what each left.
KILLED = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from graphopt import staging
home, mode = Path(sys.argv[1]), sys.argv[2]
out = home / "out"
if mode == "without exchange":
    staging._swap = lambda a, b: False
if mode == "pinned":
    staging._is_pinned = lambda place: True
CONTENT = {"old": ["a", "b"], "new": ["b", "c"]}
def write(which):
    with staging.staged(out) as folder:
        for name in CONTENT[which]:
            (folder / name).write_text(which)
        entry = {"files": [{"name": name} for name in CONTENT[which]]}
        (folder / staging.MANIFEST).write_text(json.dumps({"schema": staging.SCHEMA, "which": which, "variants": [entry]}))
def state():
    staging.recover(out)
    which = json.loads((out / staging.MANIFEST).read_text())["which"]
    files = {p.name: p.read_text() for p in out.iterdir() if p.name not in (staging.MANIFEST, "notes") and not p.name.startswith(".")}
    mine = (out / "notes").read_text() if (out / "notes").exists() else None
    return which if files == dict.fromkeys(CONTENT[which], which) and mine == "mine" else f"{which} with {files}, notes {mine}"
write("old")
(out / "notes").write_text("mine")
states, number = [], 0
while True:
    number += 1
    child = os.fork()
    if child == 0:
        left = number
        def hook(event, arguments):
            global left
            if event[:3] in ("os.", "shu", "ope"):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write("new")
        os._exit(0)
    ended = os.waitpid(child, 0)[1] == 0
    states.append(state())
    if ended:
        break
    write("old")
left = [p.name for folder in (home, out) for p in folder.iterdir() if p.name.startswith(".graphopt")]
print(json.dumps({"states": states, "left": left}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["exchange", "without exchange", "pinned"])
def test_killed_at_each_file_operation_it_leaves_the_old_or_the_new(mode: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), mode, str(ROOT)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["states"]) == {"old", "new"}
    assert found["states"][0] == "old"
    assert found["states"][-1] == "new"
    assert len(found["states"]) > 20
    assert found["left"] == []


def test_builds_killed_at_random_moments_leave_no_mix(tmp_path: Path) -> None:
    from benchmarks.kills import run

    met, mixed = run(10, tmp_path)
    assert mixed == []
    assert met >= 5  # those at a file operation always meet a running build


def fill(out: Path, *names: str) -> None:
    with staged(out) as folder:
        for name in names:
            (folder / name).write_text(name)
        entry = {"files": [{"name": name} for name in names]}
        (folder / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "variants": [entry]}))


def test_the_exchange_of_two_folders_works_here_or_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/x").touch()
    if not staging._swap(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["x"]


def test_what_is_not_the_bundles_is_kept_folders_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "a")
    (out / "logs/deep").mkdir(parents=True)
    (out / "logs/deep/x").write_text("mine")
    (out / "link").symlink_to("nowhere")
    fill(out, "b")
    assert sorted(p.name for p in out.iterdir()) == ["b", "link", "logs", MANIFEST]
    assert (out / "logs/deep/x").read_text() == "mine"


def test_a_stage_without_a_process_is_swept_and_one_with_a_process_is_not(tmp_path: Path) -> None:
    dead = tmp_path / f"{staging._STAGE}dead"
    dead.mkdir()
    with staged(tmp_path / "one") as alive:
        (alive / "x").write_text("x")
        fill(tmp_path / "two", "a")
        assert (alive / "x").exists()
        assert not dead.exists()
        (alive / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "variants": [{"files": [{"name": "x"}]}]}))
    assert (tmp_path / "one/x").exists()


def test_a_move_that_was_broken_off_is_finished_by_whoever_opens_the_bundle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "a")
    commit = out / staging._COMMIT
    commit.mkdir()
    (commit / "b").write_text("new")
    (commit / ".gone").write_text('["a"]')
    (commit / MANIFEST).write_text((out / MANIFEST).read_text().replace('"a"', '"b"'))
    recover(out)
    assert sorted(p.name for p in out.iterdir()) == ["b", MANIFEST]


def test_a_folder_in_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="check space and permissions"):
            fill(tmp_path / "out", "a")
    finally:
        tmp_path.chmod(0o700)
