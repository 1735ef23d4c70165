"""A fixed number of mutated models, the same in every run; `make fuzz-files` goes on from there."""

from __future__ import annotations

import random

import fuzz_files
import onnx


def test_mutated_models_end_in_a_result_or_a_message(tmp_path):
    mutator = fuzz_files.Mutator(fuzz_files.corpus(), random.Random(20261126))
    tally = fuzz_files.fuzz(mutator.draw, lambda t: t.tried < 120, tmp_path)
    assert tally.finds == [], "\n".join(p.with_suffix(".txt").read_text() for p in tally.finds)
    assert tally.outcomes["optimized"] >= 20
    assert tally.outcomes["refused"] >= 20


def test_the_fuzzer_tells_a_crash_a_hang_and_an_error(tmp_path, monkeypatch):
    def disaster(data: bytes) -> str:
        match data:
            case b"crash":
                import ctypes

                ctypes.string_at(0)
            case b"hang":
                while True:
                    pass
            case b"error":
                raise KeyError("boom")
            case b"memory":
                raise MemoryError
        return "optimized"

    monkeypatch.setattr(fuzz_files, "attempt", disaster)
    monkeypatch.setattr(fuzz_files, "SLOW", 1.0)
    draws = iter([b"fine", b"crash", b"fine", b"hang", b"error", b"memory", b"fine"])
    tally = fuzz_files.fuzz(lambda: next(draws), lambda t: t.tried < 7, tmp_path)
    assert tally.outcomes == {"optimized": 3, "crash": 1, "hang": 1, "error": 1, "out of memory": 1}
    assert sorted(p.stem.partition("-")[0] for p in tally.finds) == ["crash", "error", "hang"]
    assert "exit code -11" in next(tmp_path.glob("crash-*.txt")).read_text()
    assert "KeyError: 'boom'" in next(tmp_path.glob("error-*.txt")).read_text()
    assert str(tally).endswith("3 finds")


def test_mutations_are_the_same_for_the_same_seed_and_mostly_still_models():
    seeds = fuzz_files.corpus()
    one, two = (fuzz_files.Mutator(seeds, random.Random(5)) for _ in range(2))
    drawn = [one.draw() for _ in range(60)]
    assert drawn == [two.draw() for _ in range(60)]
    parsed = 0
    for data in drawn:
        try:
            parsed += onnx.ModelProto.FromString(data).HasField("graph")
        except Exception:
            continue
    assert parsed > 30
    assert len(set(drawn) & set(seeds)) < 10  # a change may change nothing
