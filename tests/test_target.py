"""Targets: what parses, what does not and why."""

from __future__ import annotations

import pytest

from graphopt.errors import UnknownTarget
from graphopt.target import Target, cpu_features


@pytest.mark.parametrize(
    "text", ["ort", "ort:cpu", "ort:cpu-avx2", "ort:cuda", "tensorrt:sm89", "tensorrt-rtx:sm86+sm89"]
)
def test_a_target_survives_its_text_form(text: str) -> None:
    assert str(Target.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tensorr", "did you mean 'tensorrt'"),
        ("gpu", "known runtimes: ort, tensorrt, tensorrt-rtx"),
        ("tensorrt:ampere", "one or more of smNN"),
        ("ort:cpu-nonsense", "a CPU is one of cpu-avx2"),
        ("ort:?", "no execution provider"),
    ],
)
def test_an_unknown_target_says_what_there_is(text: str, told: str) -> None:
    with pytest.raises(UnknownTarget, match=told.replace("?", r"\?")):
        Target.parse(text)


def test_compute_capabilities_are_those_of_tensorrt_targets_only() -> None:
    assert Target.parse("tensorrt-rtx:sm86+sm89").compute_capabilities == ("sm86", "sm89")
    assert Target.parse("ort:cuda").compute_capabilities == ()


def test_features_of_this_cpu_are_named_as_in_targets() -> None:
    assert cpu_features() <= {"avx2", "avx512f", "vnni", "amx"}


def test_channels_are_aligned_to_the_blocks_of_the_cpu_that_is_named() -> None:
    wanted = {"ort:cpu-avx2": 8, "ort:cpu-avx512f": 16, "ort:cpu": 16, "ort": 16, "ort:cuda": 8, "tensorrt:sm89": 32}
    assert {text: Target.parse(text).channel_alignment for text in wanted} == wanted
