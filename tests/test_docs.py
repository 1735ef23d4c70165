"""The documentation: every block that shows a command or code is run, and the site builds with strict links.

How a page is written is in CONTRIBUTING.md, "Write a page of the documentation".
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import ir, models

ROOT = Path(__file__).resolve().parents[1]
NETS = Path(models.__file__).resolve().parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("bash", "python")
SHOWN = ("console", "text", "toml", "json", "yaml", "make", "cmake", "dockerfile", "html", "protobuf", "diff")
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*([\w.-]*)(.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
# The README shows an ImageNet network; this one has its input and output, and little else.
IMAGENET = """<ir_version: 10, opset_import: ["" : 21]> resnet (float[N,3,224,224] x) => (float[N,2] y)
<float[2,3,1,1] w = {1, 2, 3, 4, 5, 6}, float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {0, 0}, float[2] v = {1, 1}>
{ c = Conv <strides = [32, 32]> (x, w)  n = BatchNormalization (c, s, b, m, v)  r = Relu (n)
  p = GlobalAveragePool (r)  y = Flatten (p) }"""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of text
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        opened = _FENCE.match(lines[at])
        at += 1
        if opened is None:
            continue
        indent, fence, language, rest = opened.groups()
        start = at
        while at < len(lines) and lines[at].strip() != fence:
            at += 1
        assert at < len(lines), f"{page.name}:{start}: the block is never closed"
        text = "\n".join(line.removeprefix(indent) for line in lines[start:at]) + "\n"
        title = _TITLE.search(rest)
        yield Block(page, start + 1, language, title and title[1], text)
        at += 1


def furnish(folder: Path, page: Path) -> None:
    """The files that every page may use by name."""
    for net in ("resnet", "mobilenet", "concat", "vit"):
        shutil.copy(NETS / f"{net}.legacy.onnx", folder / f"{net}.onnx")
    shutil.copy(NETS / "resnet.legacy.onnx", folder / "model.onnx")
    if page.name == "README.md" and page.parent == ROOT:
        ir.save(ir.parse(IMAGENET), folder / "resnet.onnx")
    with np.load(NETS / "digits.npz") as digits:
        np.savez(folder / "calib.npz", x=digits["x_calib"])
        np.save(folder / "labels.npy", digits["y_calib"])
        np.savez(folder / "test.npz", x=digits["x_test"])
        np.save(folder / "test-labels.npy", digits["y_test"])
        np.savez(folder / "sample.npz", x=digits["x_test"][:1])


def run_bash(block: Block, folder: Path) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{block} ended with {done.returncode}\n{block.text}\n{done.stdout}\n{done.stderr}"


def run_page(page: Path, folder: Path, module: types.ModuleType) -> str | None:
    """Run the blocks of `page` in order in `folder`; returns why some were left out."""
    skipped = None
    for block in blocks(page):
        if block.title is not None:
            path = folder / block.title
            assert path.resolve().is_relative_to(folder), f"{block}: the title names a file outside the page's folder"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif "import torch" in block.text and importlib.util.find_spec("torch") is None:
            skipped = f"{block} needs torch, which is not installed"
        elif block.language == "bash":
            run_bash(block, folder)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), vars(module))
    return skipped


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(b.language in RUN and b.title is None for b in blocks(page)):
        return
    furnish(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # a dataclass looks its module up
    skipped = run_page(page, tmp_path, module)
    if skipped:
        pytest.skip(f"all other blocks ran; {skipped}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        assert block.language in (*RUN, *SHOWN) or block.title, f"{block}: tag the block: {', '.join((*RUN, *SHOWN))}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_command_hides_in_an_indented_block(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.text, "\n" * block.text.count("\n"))
    for number, line in enumerate(text.splitlines(), 1):
        command = re.match(r"(    |\t)\s*(graphopt|python|pip|docker|make) ", line)
        assert not command, (
            f"{page.name}:{number}: fence this command: ```bash runs in the tests, ```console is only shown"
        )


def commands(text: str) -> Iterator[list[str]]:
    """Words of the graphopt commands in a block, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = line.partition(" #")[0].removeprefix("$ ").split()
        if words[:1] == ["graphopt"] and len(words) > 1:
            yield words[1:]


def test_commands_that_are_only_shown_exist_with_their_options() -> None:
    """A block that is not run still names commands, options and benchmark scripts that there are."""
    import typer

    from graphopt.cli import app

    known: Any = typer.main.get_command(app)
    for block in (b for page in PAGES for b in blocks(page) if b.language == "console"):
        for command, *words in commands(block.text):
            if command.startswith("-"):
                continue
            assert command in known.commands, f"{block}: no command {command!r}"
            found = known.commands[command]
            context = found.make_context(command, [], resilient_parsing=True)
            options = {o for p in found.get_params(context) for o in (*p.opts, *p.secondary_opts)}
            for word in words:
                option = word.partition("=")[0]
                if option.startswith("--") or re.fullmatch(r"-[a-zN-Z]", option):
                    assert option in options, f"{block}: graphopt {command} has no option {option!r}"
        for module in re.findall(r"python -m (benchmarks\.\w+)", block.text):
            assert importlib.util.find_spec(module), f"{block}: no script {module}"


def test_the_site_builds_with_strict_links(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install graphopt[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "reference/passes.html", "reference/command-line.html", "reference/manifest.html"} <= pages
    text = (tmp_path / "site/reference/passes.html").read_text(encoding="utf-8")
    assert 'id="fuse-conv-bn"' in text
    why = (tmp_path / "site/why.html").read_text(encoding="utf-8")
    assert why.count("<table>") >= 3  # taken from the pages that hold them
    assert why.count("python -m benchmarks") + why.count("benchmarks.") >= 3
    assert "https://fonts." not in (tmp_path / "site/index.html").read_text(encoding="utf-8")
