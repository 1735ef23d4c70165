"""Budgets: what a recipe demands of a bundle before it may take the place of the earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.errors import UserError
from graphopt.recipe import Budget


class OverBudget(UserError):
    """A bundle breaks a bound of its recipe; it is not written."""


def within(budget: Budget, manifest: Mapping[str, Any]) -> None:
    """Hold the variants of a manifest to `budget`.

    Raises:
        OverBudget: with every bound that does not hold.
    """
    broken = [f"{v['target']}: {told}" for v in manifest["variants"] for told in _broken(budget, v)]
    if broken:
        raise OverBudget(
            f"over the budget, so nothing is written: {'; '.join(broken)}; change the build, or the budget in the recipe"
        )


def _broken(budget: Budget, variant: Mapping[str, Any]) -> list[str]:
    found = []
    size = sum(f["bytes"] for f in variant["files"])
    if budget.max_bytes is not None and size > budget.max_bytes:
        found.append(f"{size / 1e6:.2f} MB, max-size is {budget.max_size}")
    if budget.max_error is not None:
        proof = variant["proof"]
        error = proof.get("relative")
        if error is None:
            found.append(
                f"its error is not known ({proof.get('unproven', 'not finite')}), max-error is {budget.max_error:g}"
            )
        elif error > budget.max_error:
            found.append(f"differs by {error:.3g} from the original, max-error is {budget.max_error:g}")
    latency = variant.get("latency")
    if budget.max_latency_ratio is not None and variant["target"].startswith("ort"):
        if latency is None:
            found.append(f"could not be timed, max-latency-ratio is {budget.max_latency_ratio:g}")
        elif latency["interval_low"] > budget.max_latency_ratio:  # beyond what timing noise explains
            found.append(f"takes {latency['ratio']:.2f} of the time, max-latency-ratio is {budget.max_latency_ratio:g}")
    quantized = variant.get("int8")
    if budget.max_drop is not None and quantized is not None:
        before, after = quantized["before"], quantized["after"]
        if before is None or after is None or before - after > budget.max_drop:
            lost = (
                "its metric is not known" if before is None or after is None else f"loses {before - after:.2f} points"
            )
            found.append(f"{lost}, max-drop is {budget.max_drop:g}")
    return found
