"""The examples: each build system makes a bundle, makes nothing the second time, and makes it again after a change."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import graphopt
from graphopt import models

ROOT = Path(__file__).parents[1]
NETS = Path(models.__file__).resolve().parent


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the example that the test is for, with its model, and with `graphopt` on the path."""
    folder = tmp_path / "pro ject"
    shutil.copytree(ROOT / "examples" / request.param, folder)
    (folder / "models").mkdir()
    shutil.copy(NETS / "resnet.legacy.onnx", folder / "models/net.onnx")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/graphopt"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m graphopt.cli "$@"\n')
    script.chmod(0o755)
    return folder


def run(project: Path, *command: str) -> str:
    path = f"{project.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(project.parent)}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def needs(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


@pytest.mark.parametrize("project", ["make"], indirect=True)
def test_make(project: Path) -> None:
    needs("make")
    assert "ort-cpu.onnx" in run(project, "make")
    assert "graphopt" not in run(project, "make")
    shutil.copy(NETS / "concat.legacy.onnx", project / "models/net.onnx")
    assert "ort-cpu.onnx" in run(project, "make")
    assert "graphopt build" not in run(project, "make")
    assert "up to date" in run(project, "make", "check")
    assert graphopt.Bundle.load(project / "bundle").damaged() == []
    run(project, "make", "clean")
    assert not (project / "bundle").exists()


@pytest.mark.parametrize("generator", ["Ninja", "Unix Makefiles"])
@pytest.mark.parametrize("project", ["cmake"], indirect=True)
def test_cmake(project: Path, generator: str) -> None:
    needs("cmake")
    needs({"Ninja": "ninja"}.get(generator, "make"))
    run(project, "cmake", "-S", ".", "-B", "out", "-G", generator)
    assert "Optimizing" in run(project, "cmake", "--build", "out")
    assert "Optimizing" not in run(project, "cmake", "--build", "out")
    shutil.copy(NETS / "concat.legacy.onnx", project / "models/net.onnx")
    assert "Optimizing" in run(project, "cmake", "--build", "out")
    assert "Optimizing" not in run(project, "cmake", "--build", "out")
    assert graphopt.Bundle.load(project / "out/bundle").damaged() == []


def instructions(text: str) -> list[tuple[str, str]]:
    """Instruction and argument of each line of a Dockerfile, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.split(None, 1) for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line[0], line[1]) for line in lines]


@pytest.mark.parametrize("project", ["docker"], indirect=True)
def test_the_commands_of_the_dockerfile_run(project: Path) -> None:
    """There is no Docker here: the file is read, and what its stage runs of graphopt is run."""
    found = instructions((project / "Dockerfile").read_text())
    known = {"FROM", "RUN", "WORKDIR", "COPY", "CMD"}
    assert {name for name, _ in found} <= known
    assert found[0][0] == "FROM"
    stages = {m[1] for name, text in found if name == "FROM" and (m := re.search(r" AS (\w+)$", text))}
    ran = []
    for name, text in found:
        if name == "COPY" and (source := re.match(r"--from=(\w+) /src/(\S+)", text)):
            assert source[1] in stages
            assert (project / source[2]).is_dir()  # made by what ran above
        elif name == "COPY":
            assert (project / text.split()[0]).exists()
        elif name == "RUN":
            command = re.sub(r"^(--\S+\s+)*", "", text)
            if command.startswith("graphopt "):
                run(project, *shlex.split(command))
                ran.append(command)
            else:
                assert command == "pip install --no-cache-dir graphopt"
        elif name == "CMD":
            run(project, *(part.replace("/srv/", "") for part in eval(text)))
    assert ran == ["graphopt build", "graphopt verify bundle"]


@pytest.mark.parametrize("project", ["github"], indirect=True)
def test_the_commands_of_the_workflow_run(project: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (mkdocs brings it)")
    workflow: dict[Any, Any] = yaml.safe_load((project / ".github/workflows/bundle.yml").read_text())
    assert workflow.keys() == {"name", True, "jobs"}  # YAML 1.1 reads `on` as true
    job = workflow["jobs"]["bundle"]
    assert job["runs-on"] == "ubuntu-latest"
    for step in job["steps"]:
        assert len({"uses", "run"} & step.keys()) == 1
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
        elif step["run"] != "pip install graphopt":
            run(project, "bash", "-euo", "pipefail", "-c", step["run"])
    for path in next(s for s in job["steps"] if s.get("uses", "").startswith("actions/upload"))["with"]["path"].split():
        assert (project / path).exists()
