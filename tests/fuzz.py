"""The laws on random models for as long as there is time: ``make fuzz`` or ``python tests/fuzz.py --minutes 60``.

Each round takes another seed. What breaks a law is shrunk and printed as ONNX text with the pipeline, ready for a file in tests/cases, and the
exit code is 1. A round's seed in the output repeats it: ``--seed N --minutes 0``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from graphs import models
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from random_models import wide_models
from test_channel_groups import networks
from test_equal_channels import architectures
from test_laws import check_equivalent, check_valid
from test_random_models import LAWS

from graphopt import equivalence, ir
from graphopt.pipeline import Pipeline

O2 = Pipeline.parse("O2")
EXAMPLES = 100  # of each law in a round

Check = Callable[[ir.Model], None]


def check_small(model: ir.Model) -> None:
    """The law of tests/test_laws.py for -O2."""
    result = O2.run(model)
    check_valid(model, result.model)
    check_equivalent(model, result.model, O2.exactness, result.rewrites)


def check_network(model: ir.Model) -> None:
    """Networks of convolutions, some with weights of one number."""
    result = O2.run(model)
    feeds = [equivalence.generate_inputs(model.inputs, seed=size, dims={"N": size}) for size in (1, 3)]
    report = equivalence.compare(
        model, result.model, feeds=feeds, allowed=2e-5
    )  # or what moves as far with its input's last bit
    assert report.equal, report.differences


CHECKS: dict[str, tuple[SearchStrategy[ir.Model], Check]] = {
    **{f"wide, {name}": (wide_models(), law) for name, law in LAWS.items()},
    "small": (models(), check_small),
    "networks": (networks(), check_network),
    "architectures": (architectures(), check_network),
}


def broken(check: Check, strategy: SearchStrategy[ir.Model], number: int) -> str | None:
    """Run one law with one seed; the smallest model that breaks it and how, or None."""
    last: list[ir.Model] = []

    @seed(number)
    @settings(
        database=None,
        deadline=None,
        max_examples=EXAMPLES,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(strategy)
    def law(model: ir.Model) -> None:
        last[:] = [model]
        check(model)

    try:
        law()
    except Exception as error:  # whatever a law or graphopt itself raises is a finding
        return f"{type(error).__name__}: {str(error)[:2000]}\n---\n{last[0].text()}"
    return None


def main() -> int:
    """Rounds until the time is over; 1 when a law broke."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; default: the time")
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed
    deadline = time.monotonic() + 60 * options.minutes
    findings, number = 0, first
    while number == first or time.monotonic() < deadline:
        for name, (strategy, check) in CHECKS.items():
            found = broken(check, strategy, number)
            if found is not None:
                findings += 1
                print(f"=== {name}, --seed {number}\n{found}\n", flush=True)
        print(f"seed {number}: {EXAMPLES * len(CHECKS)} models, {findings} findings so far", flush=True)
        number += 1
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
