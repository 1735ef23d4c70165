"""Which functions call which, and in what order they end."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def callees_first(calls: Mapping[Key, Iterable[Key]]) -> list[Key]:
    """The functions that end, each behind those that it calls; a function that calls itself, directly or through others, is left out.

    Args:
        calls: each function's key -> keys of the functions that it calls.
    """
    callers: dict[Key, list[Key]] = {key: [] for key in calls}
    waiting: dict[Key, int] = {}
    for key, called in calls.items():
        each = set(called)
        waiting[key] = len(each)
        for call in each:
            callers[call].append(key)
    order = [key for key, count in waiting.items() if not count]
    for done in order:
        for caller in callers[done]:
            waiting[caller] -= 1
            if not waiting[caller]:
                order.append(caller)
    return order
