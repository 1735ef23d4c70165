"""Python's collector of cyclic garbage, patient while a graph is built or rewritten.

A graph of a hundred thousand nodes is millions of small objects that refer to each other and live long. At its usual pace the collector
walks over all of them again and again, for a time per node that grows with the model. Here it looks every few hundred
thousand new objects: often enough for what rewriting throws away.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Final

_YOUNG: Final = 1_000_000  # new objects between two looks at them; the usual number is 700 or 2,000


@contextlib.contextmanager
def patient_collector() -> Iterator[None]:
    """Raise the collector's threshold within, if it is on and lower; nests, and is put back however the block ends."""
    before = gc.get_threshold()
    if not 0 < before[0] < _YOUNG:
        yield
        return
    gc.set_threshold(_YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


__all__ = ["patient_collector"]
