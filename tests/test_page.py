"""The page of a build: self-contained, escaped, the same for the same build, and shown by a browser in light and dark."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from graphopt import building, charts, cli, drawing, ir, models, page
from graphopt.instruments import Statistics, Timing, Verify
from graphopt.ir import Model
from graphopt.pipeline import Pipeline

NETS = Path(models.__file__).resolve().parent
EVIL = "<script>document.title='XSS'</script>\"'><img src=x onerror=\"document.title='XSS'\">{{7*7}}$\\frac$\x07"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


class Tags(HTMLParser):
    """What a page holds: tags, attributes, and text outside of style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def assert_self_contained(text: str) -> Tags:
    """No script, no handler, and nothing that is fetched from anywhere."""
    found = Tags(text)
    assert not found.tags & {"script", "img", "link", "iframe", "object", "embed", "a", "form", "base", "foreignobject"}
    for name, value in found.attributes:
        assert not name.startswith("on"), (name, value)
        assert name not in ("src", "href", "srcset", "action", "data") or name == "xlink:href"
        if name == "xlink:href":
            assert value.startswith("#")
    assert set(re.findall(r"https?://[^\s\"'<)]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    return found


def evil_model() -> Model:
    model = ir.load(NETS / "resnet.legacy.onnx")
    for number, node in enumerate(model.nodes()):
        node.name = f"{EVIL}{number}"
        for tensor in node.outputs:
            if tensor.name != "y":
                tensor.name = f"{EVIL}{tensor.name}"
    model.graph.inputs[0].name = EVIL
    model.graph.inputs[0].shape = (EVIL, 1, 8, 8)
    model.graph.name = EVIL
    return model


def built(model: Model, folder: Path, **options: Any) -> str:
    path = folder / "page.html"
    building.build(model, folder / "out", ["ort:cpu"], html=path, **options)
    return path.read_text(encoding="utf-8")


def test_a_page_shows_the_build(tmp_path: Path) -> None:
    text = built(ir.load(NETS / "resnet.legacy.onnx"), tmp_path, measure=True)
    found = assert_self_contained(text)
    told = " ".join(" ".join(found.text).split())
    for words in (
        "54 → 37",
        "ort-cpu.onnx",
        "Before: 54 nodes",
        "After: 37 nodes",
        "fuse-conv-bn",
        "15 rewrites",
        "tolerance",
    ):
        assert words in told, words
    assert "rounds in turns" in told
    assert told.count("milliseconds a call") == 1
    assert len(text) < 400_000
    assert text.count('class="node linear"') == 16 + 16
    ids = [value for name, value in found.attributes if name == "id"]
    repeated = {i for i in ids if ids.count(i) > 1}
    assert all(re.fullmatch(r"[mp][0-9a-f]{10}", i) for i in repeated)  # markers and clips, named by what they hold


def test_int8_coverage_and_noise_are_shown(tmp_path: Path) -> None:
    with np.load(NETS / "digits.npz") as digits:
        data = {"x": digits["x_calib"][:32]}
    model = ir.load(NETS / "mobilenet.legacy.onnx")
    text = built(model, tmp_path, pipeline="default,quantize-qdq", data=data)
    assert_self_contained(text)
    assert "SQNR, dB" in text
    assert "no bound: approximate" in text
    part = {
        "int8": {"layers": [{"int8": True}, {"int8": False}, {"int8": True}]},
        "kernels": [{"inputs": ["Int8"]}, {"inputs": ["Float", "Int8"]}, {"inputs": ["Half"]}, {"inputs": []}],
    }
    assert page._coverage(part) == [
        ("layers", {"int8": 2, "float": 1}),
        ("kernels", {"int8": 2, "Half": 1, "none": 1}),
    ]


def test_what_comes_from_the_model_is_escaped(tmp_path: Path) -> None:
    text = built(evil_model(), tmp_path)
    found = assert_self_contained(text)
    assert "&lt;script&gt;" in text
    assert "{{7*7}}" in text
    assert "\x07" not in text
    assert any("<script>document.title='XSS'</script>" in t for t in found.text)  # shown as text


def test_operators_and_passes_with_strange_names_are_escaped_in_charts() -> None:
    for svg in (
        charts.bars([(EVIL, 1.0, EVIL), ("$a_b$", 2.0, "")], "s"),
        charts.pairs([(EVIL, 1, 2)], "nodes"),
        charts.shares([(EVIL, {EVIL: 3, "float": 0})]),
        charts.spread({EVIL: [1e-3, 2e-3]}),
    ):
        assert_self_contained(svg)
        assert "&lt;script&gt;" in svg


def test_charts_hold_for_extreme_numbers_and_are_the_same_every_time() -> None:
    inf, nan = float("inf"), float("nan")
    for values in ([], [0.0], [inf, 0.0, 1e-300, 1e300], [1e-6] * 5000):
        assert "<svg" in charts.errors(values, None, False)
        assert "<svg" in charts.errors(values, 1e-5, True)
    assert "<svg" in charts.decibels([inf, nan, -inf, 30.0])
    assert "<svg" in charts.decibels([])
    assert charts.bars([], "s") == charts.bars([], "s")
    svg = charts.pairs([("Conv", 3, 2)], "nodes")
    assert svg == charts.pairs([("Conv", 3, 2)], "nodes")
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "svg.fonttype": "path"}):
        assert svg == charts.pairs([("Conv", 3, 2)], "nodes")
    assert "var(--first)" in svg
    assert not re.search(r"#(0[1-6])\1\1", svg)


def test_large_graphs_come_in_blocks_cut_where_few_tensors_pass() -> None:
    text = ["g (float[2] x) => (float[2] y) {"]
    last = "x"
    for i in range(60):
        text.append(f"a{i} = Relu ({last}) b{i} = Neg (a{i}) c{i} = Abs (a{i}) d{i} = Add (b{i}, c{i})")
        last = f"d{i}"
    model = ir.parse("\n".join([*text, f"y = Exp ({last}) }}"]))
    blocks = drawing.draw(model.graph)
    assert sum(len(b.nodes) for b in blocks) == 241
    assert [n for b in blocks for n in b.nodes] == list(model.graph.nodes)
    assert len(blocks) >= 6
    assert all(b.through == 1 for b in blocks[:-1])
    assert blocks[1].like == 1
    assert not blocks[1].svg
    assert blocks[0].svg.count("<rect") == len(blocks[0].nodes)


def test_ten_thousand_nodes_are_drawn_in_bounded_size() -> None:
    ops = ["Relu", "Neg", "Abs", "Exp", "Log", "Sqrt", "Sin"]
    lines, last = [], "x"
    for i in range(10_000):
        lines.append(f"t{i} = {ops[(i * i + i // 7) % 7]} ({last})")
        last = f"t{i}"
    model = ir.parse(f"g (float[2] x) => (float[2] y) {{ {' '.join(lines)} y = Neg ({last}) }}")
    blocks = drawing.draw(model.graph)
    assert sum(b.svg.count("<rect") for b in blocks) <= 1540
    assert sum(len(b.nodes) for b in blocks) == 10_001


def test_bodies_wide_graphs_and_odd_nodes_are_drawn() -> None:
    names = [f"t{i}" for i in range(80)]
    model = ir.parse(
        "g (float[2] x, bool c) => (float[2] y) { "
        + " ".join(f"{n} = Neg (x)" for n in names)
        + f" s = Sum ({', '.join(names)}) y = If (c) <then_branch = a () => (float[2] p) {{ p = Relu (s) }},"
        " else_branch = b () => (float[2] q) { q = Abs (s) }> }"
    )
    blocks = drawing.draw(model.graph)
    svg = "".join(b.svg for b in blocks)
    assert "If (2 inside)" in svg
    assert "nan" not in svg


def test_a_page_says_why_layers_were_not_compared(tmp_path: Path) -> None:
    model = ir.parse("g (float[N] x) => (float[N] y) <int64[1] s = {77}> { a = Identity (x) y = Reshape (a, s) }")
    text = built(model, tmp_path)
    assert "Not compared: " in text
    assert "not proven" in text


def test_the_page_of_two_builds_differs_in_times_only() -> None:
    model = ir.load(NETS / "concat.legacy.onnx")
    timing, statistics = Timing(), Statistics()
    result = Pipeline.parse("O2").run(model, instruments=[Verify(), timing, statistics])
    entry = {"files": [], "proof": {"tolerance": 1e-5}, "kernels": []}
    part = page.Part(entry, result.model, result.steps, timing.times, statistics.history)

    def feeds() -> list[Any]:
        return [next(building.samples(model))]

    assert page._part(model, part, feeds) is not None
    first, second = (page._part(model, part, feeds) for _ in range(2))
    for key in first:
        if key not in ("layers", "rows"):
            assert first[key] == second[key], key


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return cli.run([str(a) for a in arguments]), *capfd.readouterr()

    return call


def test_html_on_the_command_line(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETS / "concat.legacy.onnx"
    assert run("build", net, "-o", "out", "-t", "ort:cpu", "--html", "out/page.html")[0] == 0
    assert_self_contained(Path("out/page.html").read_text(encoding="utf-8"))
    code, _, err = run("build", net, "-o", "other", "--html", "missing/page.html")
    assert code == 1
    assert "no folder" in err
    real = importlib.util.find_spec
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    code, _, err = run("build", net, "-o", "other", "-t", "ort:cpu", "--html", "page.html")
    assert code == 1
    assert err == "error: --html needs matplotlib, not installed here: pip install 'graphopt[report]'\n"
    assert not Path("other").exists()


def browse(path: Path, *options: str) -> str:
    """What Chromium prints; it reaches no network here and needs none."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = [
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={path.parent / 'profile'}",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags.split(), *more, *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@needs_chromium
def test_a_browser_shows_it_in_light_and_dark(tmp_path: Path) -> None:
    from PIL import Image

    built(ir.load(NETS / "concat.legacy.onnx"), tmp_path)
    seen = []
    for scheme in (1, 0):  # Blink's numbers: light, dark
        shot = tmp_path / f"{scheme}.png"
        browse(
            tmp_path / "page.html",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
            "--window-size=1000,1600",
        )
        with Image.open(shot) as image:
            picture = np.asarray(image.convert("RGB")).astype(int)
        assert picture.shape == (1600, 1000, 3)
        paper = picture[2, 2]
        drawn = np.abs(picture - paper).sum(axis=2) > 150
        assert 0.01 < drawn.mean() < 0.6  # letters, bars and boxes, and room between them
        seen.append(paper.mean())
    assert seen[0] > 240
    assert seen[1] < 40


@needs_chromium
def test_a_browser_runs_nothing_that_a_model_brings(tmp_path: Path) -> None:
    built(evil_model(), tmp_path)
    dom = browse(tmp_path / "page.html", "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    assert title[1].startswith("graphopt: &lt;script&gt;")
    assert "<script" not in dom
    assert "<img" not in dom
