"""Calibration data and the statistics made from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt import ir
from graphopt.analyses import calibration
from graphopt.analyses.calibration import Runner, Statistics, calibrate
from graphopt.analyses.ranges import METHODS, SIGNED, UNSIGNED, affine, find_range
from graphopt.data import ArrayData, open_data
from graphopt.errors import UsageError
from graphopt.ir import TensorSpec

X = TensorSpec("x", "float32", ("N", 3))
RNG = np.random.default_rng(0)
SAMPLES = RNG.standard_normal((10, 3)).astype(np.float32)

MODEL = """
    g (float[N,3] x) => (float[N,2] y)
    <float[3,2] w = {1, -2, 3, 4, 5, 6}>
    { a = MatMul (x, w)
      b = Relu (a)
      y = Log (b) }
"""


def joined(data, **options) -> np.ndarray:
    return np.concatenate([f["x"] for f in data.feeds(**options)])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_is_read_in_pieces_without_its_labels(tmp_path: Path, save) -> None:
    save(tmp_path / "c.npz", x=SAMPLES, y=np.arange(10))
    data = open_data(tmp_path / "c.npz", [X])
    assert data.count == 10
    assert [len(f["x"]) for f in data.feeds(4)] == [4, 4, 2]
    assert [len(f["x"]) for f in data.feeds(4, 5)] == [4, 1]
    np.testing.assert_array_equal(joined(data, batch=3), SAMPLES)
    np.testing.assert_array_equal(joined(data, batch=3), SAMPLES)  # and again


def test_a_folder_a_memmap_and_a_callable_give_the_same_samples(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "f").mkdir()
    np.savez(tmp_path / "f" / "1.npz", x=SAMPLES[:4])
    np.savez(tmp_path / "f" / "2.npz", x=SAMPLES[4:])
    np.save(tmp_path / "x.npy", SAMPLES)
    np.save(tmp_path / "samples.npy", SAMPLES)
    (tmp_path / "loader.py").write_text(
        "import numpy as np\ndef feeds():\n    for row in np.load('samples.npy'):\n        yield {'x': row[None]}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for source in (tmp_path / "f", tmp_path / "x.npy", "loader:feeds", {"x": SAMPLES}):
        np.testing.assert_array_equal(joined(open_data(source, [X]), batch=3), SAMPLES)


def test_the_model_decides_how_many_samples_are_fed_at_once() -> None:
    fixed = ArrayData("d", {"x": SAMPLES}, [TensorSpec("x", "float32", (4, 3))])
    assert [len(f["x"]) for f in fixed.feeds(1)] == [4, 4]
    single = ArrayData("d", {"x": SAMPLES}, [TensorSpec("x", "float32", (3,))])
    assert [f["x"].shape for f in single.feeds(8, 2)] == [(3,), (3,)]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"z": SAMPLES, "u": SAMPLES}, "lacks samples for 'x'; it holds 'z', 'u'"),
        ({"x": SAMPLES.astype(np.float64)}, "is float64, the model takes float32"),
        ({"x": (SAMPLES * 9).astype(np.uint8)}, "scale and normalise"),
        ({"x": SAMPLES[:, :2]}, "samples of shape [2], the model takes"),
        ({"x": SAMPLES[None, None]}, "samples lie on the first axis"),
        ({"x": SAMPLES[:0]}, "holds no samples"),
        ({"image": SAMPLES}, "lacks samples for 'x'; it holds 'image'"),
        (
            {"x": np.where(SAMPLES[3, 1] == SAMPLES, np.nan, SAMPLES)},
            "samples 2 to 3: input 'x' holds NaN or infinity (first at [1, 1])",
        ),
    ],
)
def test_data_that_do_not_fit_are_named(arrays, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        for _ in ArrayData("calib", arrays, [X]).feeds(2):
            pass
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["missing.npz", "not a thing", "no.such.module:feeds", "os:nothing"])
def test_a_source_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(UsageError, match="calibration data"):
        open_data(name, [X])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def feeds():\n    raise ValueError('boom')", "feed 0: it raised ValueError: boom"),
        ("def feeds():\n    yield {'x': ROW}\n    raise ValueError('boom')", "feed 1: it raised ValueError: boom"),
        ("def feeds(): return None", "returned NoneType; return an iterable of feeds"),
        ("def feeds(path): return []", "it raised TypeError"),
        ("1 / 0", "ZeroDivisionError"),
        ("feeds = [", "SyntaxError"),
    ],
)
def test_code_of_the_users_that_goes_wrong_is_named(body: str, told: str, tmp_path: Path, monkeypatch) -> None:
    name = f"calib_{abs(hash(body)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(f"import numpy as np\nROW = np.zeros((1, 3), np.float32)\n{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as caught:
        list(open_data(f"{name}:feeds", [X]).feeds())
    assert told in str(caught.value)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.npz").write_bytes(b"no zip")
    with pytest.raises(UsageError, match=r"cannot be read as an \.npz file"):
        open_data(tmp_path / "c.npz", [X])


def test_statistics_do_not_depend_on_order_or_batches() -> None:
    values = (RNG.standard_normal(5000) * np.geomspace(1e-3, 50, 5000)).astype(np.float32)
    whole, reversed_, pieces = Statistics(), Statistics(), Statistics()
    whole.add(values)
    reversed_.add(values[::-1])
    for piece in np.split(values, 50):
        pieces.add(piece)
    for other in (reversed_, pieces):
        assert (other.low, other.high, other.seen) == (values.min(), values.max(), 5000)
        for one, two in zip(whole.histogram(), other.histogram(), strict=True):
            np.testing.assert_array_equal(one, two)
    edges, counts = whole.histogram()
    expected, _ = np.histogram(values, edges)
    assert abs(counts - expected).sum() <= 4  # values on an edge
    assert counts.sum() == 5000


def test_constant_zero_has_a_range() -> None:
    seen = Statistics()
    seen.add(np.zeros(8, np.float32))
    for method in METHODS:
        for scheme in (SIGNED, UNSIGNED):
            assert affine(*find_range(seen, method, scheme), scheme).scale == 1


@pytest.mark.parametrize("scheme", [SIGNED, UNSIGNED])
def test_mse_finds_a_range_with_less_error_than_minmax(scheme) -> None:
    values = RNG.laplace(size=50_000).astype(np.float32)
    values[0] = 40
    seen = Statistics()
    seen.add(values)
    errors = {}
    for method in METHODS:
        low, high = find_range(seen, method, scheme)
        assert seen.low <= low < high <= seen.high
        errors[method] = float(np.mean((affine(low, high, scheme).round_trip(values) - values) ** 2))
    assert errors["mse"] == min(errors.values()) < errors["minmax"]


def test_zero_is_exact_and_codes_stay_in_range() -> None:
    for low, high in RNG.standard_normal((200, 2)) * 10:
        codes = affine(min(low, high), max(low, high), UNSIGNED)
        assert 0 <= codes.zero_point <= 255
        assert codes.round_trip(np.zeros(1))[0] == 0
        assert affine(low, high, SIGNED).zero_point == 0


def test_a_model_is_calibrated_in_bounded_pieces() -> None:
    model = ir.parse(MODEL)
    data = open_data({"x": np.abs(SAMPLES) + 1}, model.inputs)
    names = ["a", "b", "x"]
    found = calibrate(model, names, data)
    pieces = calibrate(model, names, data, budget=1)
    values = (np.abs(SAMPLES) + 1) @ np.array([[1, -2], [3, 4], [5, 6]], np.float32)
    for seen in (found["a"], pieces["a"]):
        assert seen.low == pytest.approx(values.min(), rel=1e-6)
        assert seen.high == pytest.approx(values.max(), rel=1e-6)
        assert seen.seen == 20
    assert model.fingerprint() == ir.parse(MODEL).fingerprint()
    assert set(Runner(model, ["b"]).run({"x": SAMPLES})) == {"b"}


def test_an_activation_that_becomes_infinite_is_named() -> None:
    model = ir.parse(MODEL)
    data = open_data({"x": -np.abs(SAMPLES)}, model.inputs)
    with pytest.raises(UsageError, match="tensor 'y' becomes NaN or infinite"):
        calibrate(model, ["y"], data)


# ------------------------------------------------------------------------------------------------------------- cache


def test_statistics_are_kept_and_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    model = ir.parse("g (float[N,4] x) => (float[N,4] y) { r = Relu (x) y = Exp (r) }")
    values = RNG.standard_normal((96, 4)).astype(np.float32)
    plain = calibrate(model, ["r", "y"], ArrayData("d", {"x": values}, model.inputs))

    def source() -> ArrayData:
        data = ArrayData("d", {"x": values}, model.inputs)
        data.cache = tmp_path
        return data

    seen: list[int] = []

    def stop(done: int, total: int | None) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_SAVE_EVERY", -1.0)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, ["r", "y"], source(), progress=stop)
    seen.clear()
    found = calibrate(model, ["r", "y"], source(), progress=lambda done, total: seen.append(done))
    assert seen == [64, 96]  # the first 32 samples were not run again
    for name in ("r", "y"):
        assert found[name].numbers() == plain[name].numbers()
        np.testing.assert_array_equal(found[name].counts, plain[name].counts)
    seen.clear()
    calibrate(model, ["y"], source(), progress=lambda done, total: seen.append(done))
    assert seen == []
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    assert calibrate(model, ["y"], source())["y"].numbers() == plain["y"].numbers()
