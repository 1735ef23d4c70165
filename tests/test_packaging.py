"""The wheel: every tracked file of the package and nothing else, working from where it is unpacked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import graphopt

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = {
    "graphopt": "graphopt",
    "passes": "graphopt/passes",
    "backends": "graphopt/backends",
    "models": "graphopt/models",
}


def tracked() -> list[Path]:
    """Files that git tracks or would add; from a release without git, all files."""
    command = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        pytest.skip("this tree is no git checkout")
    return [Path(p) for p in sorted(set(os.fsdecode(done.stdout).split("\0"))) if p and os.path.lexists(ROOT / p)]


def packaged(path: Path) -> str | None:
    """Where a file of the tree lies in the wheel; None for what does not belong there."""
    room = ROOMS.get(path.parts[0])
    if room is None or len(path.parts) == 1 or (ROOT / path).is_symlink():
        return None
    return "/".join([room, *path.parts[1:]])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from a clean copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        copy = folder / "tree" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [*pip, "--wheel-dir", str(folder), str(folder / "tree")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(wheel.parent / "site")
    return wheel.parent / "site"


def isolated(code: str, site: Path, *arguments: str) -> str:
    """What `code` prints in a Python that sees the unpacked wheel and not the tree."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {name for path in tracked() if (name := packaged(path)) is not None}
    assert {"graphopt/py.typed", "graphopt/manifest.schema.json", "graphopt/models/digits.npz"} <= names
    assert {"graphopt/passes/__init__.py", "graphopt/backends/_tensorrt_session.py"} <= names


def test_the_wheel_carries_its_licence_and_the_readme(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n.partition(".dist-info/")[2]: n for n in archive.namelist() if ".dist-info/" in n}
        metadata = archive.read(names["METADATA"]).decode()
    assert "licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert f"Version: {graphopt.__version__}" in metadata
    assert wheel.name == f"graphopt-{graphopt.__version__}-py3-none-any.whl"


def test_the_unpacked_wheel_finds_its_passes_backends_and_models(unpacked: Path) -> None:
    code = """
import graphopt
from graphopt import discovery, models
print(graphopt.__file__)
print(",".join(discovery.pass_modules()))
print(",".join(discovery.backends()))
print(models.digits()["x_test"].dtype, len(list(__import__("pathlib").Path(models.__file__).parent.glob("*.onnx"))))
"""
    where, passes, backends, digits = isolated(code, unpacked).splitlines()
    assert Path(where).is_relative_to(unpacked)
    assert passes.split(",") == sorted(p.stem.replace("_", "-") for p in (ROOT / "passes").glob("[!_]*.py"))
    assert backends == "onnxruntime,tensorrt"
    assert digits == f"float32 {len(list((ROOT / 'models').glob('*.onnx')))}"


def test_the_unpacked_wheel_runs_the_main_job(unpacked: Path, tmp_path: Path) -> None:
    code = """
import sys, graphopt
from pathlib import Path
from graphopt import models
graphopt.build(Path(models.__file__).parent / "resnet.legacy.onnx", sys.argv[1], targets=["ort:cpu"])
print(graphopt.open(sys.argv[1]).run({"x": models.digits()["x_test"][:2]})["y"].shape)
"""
    assert isolated(code, unpacked, str(tmp_path / "out")) == "(2, 10)\n"


def test_the_entry_point_works(unpacked: Path) -> None:
    [scripts] = unpacked.glob("*.dist-info/entry_points.txt")
    assert "graphopt = graphopt.cli:main" in scripts.read_text()
    code = "import sys; sys.argv = ['graphopt', '--help']; from graphopt.cli import main; main()"
    assert "Usage: graphopt" in isolated(code, unpacked)


def requirements(lines: list[str]) -> list[str]:
    return [re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0] for line in lines]


def test_the_core_depends_on_six_packages() -> None:
    assert requirements(PROJECT["project"]["dependencies"]) == [
        "onnx",
        "onnx-graphsurgeon",
        "onnxruntime",
        "numpy",
        "typer",
        "rich",
    ]


def test_no_extra_installs_onnxruntime_gpu_which_would_overwrite_onnxruntime() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"rtx", "tensorrt", "test", "dev"} <= set(extras)
    assert [e for e, lines in extras.items() if any(r.startswith("onnxruntime") for r in requirements(lines))] == []


def test_every_dependency_is_a_real_import_of_the_core() -> None:
    """What is not imported need not be installed."""
    source = "\n".join(p.read_text() for room in ROOMS for p in (ROOT / room).rglob("*.py"))
    for name in requirements(PROJECT["project"]["dependencies"]):
        assert re.search(rf"^\s*(import|from) {name.replace('-', '_')}\b", source, re.MULTILINE), name


def test_the_links_in_the_package_are_there_and_relative() -> None:
    for room in ("passes", "backends", "models"):
        link = ROOT / "graphopt" / room
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{room}"


def test_every_folder_of_code_is_in_the_package_map() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {packaged(p) for p in tracked() if p.name == "__init__.py"} - {None}
    assert listed == {str(f).removesuffix("/__init__.py").replace("/", ".") for f in folders}
