"""Calibration statistics on disk, so that a second build asks nothing again and an interrupted one goes on where it was.

One file for each model, data and number of samples, named after their hashes; it holds, by tensor, the statistics and how many runs they
have seen. A file that cannot be read counts as none: calibration then starts anew and writes it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from graphopt.analyses.calibration import BINS, Statistics
from graphopt.data import Data
from graphopt.ir import Model

Array = np.ndarray[Any, Any]

VERSION: Final = 1  # of the content; another counts as none
_BOUND: Final = 512 << 20  # bytes of all files
_NUMBERS: Final = 9  # for each tensor: runs, batch, whole, exponent, seen and four extremes


class CalibrationStore:
    """The statistics of one model on one set of samples."""

    def __init__(self, folder: Path, model: Model, data: Data, limit: int | None) -> None:
        what = f"{VERSION} {model.fingerprint()} {data.digest()} {limit}"
        self.path = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npz"
        self.statistics: dict[str, Statistics] = {}
        self.runs: dict[str, int] = {}
        self.batch: dict[str, int] = {}
        self.whole: set[str] = set()  # names whose statistics are of all samples
        self._load()

    def _load(self) -> None:
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                names, numbers, counts = (stored[k] for k in ("names", "numbers", "counts"))
            if numbers.shape != (len(names), _NUMBERS) or counts.shape != (len(names), BINS):
                return
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return
        for name, row, bins in zip(names.tolist(), numbers.tolist(), counts, strict=True):
            self.statistics[name] = Statistics.restored(row[3:], bins)
            self.runs[name], self.batch[name] = int(row[0]), int(row[1])
            if row[2]:
                self.whole.add(name)

    def save(self) -> None:
        """Write all to the file, in one step; a full or read-only disk costs the cache and nothing else."""
        names = sorted(self.statistics)
        rows = [[self.runs[n], self.batch[n], float(n in self.whole), *self.statistics[n].numbers()] for n in names]
        counts = np.stack([self.statistics[n].counts for n in names]) if names else np.zeros((0, BINS), np.int64)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez_compressed(
                    file, names=np.array(names, dtype=str), numbers=np.array(rows).reshape(-1, _NUMBERS), counts=counts
                )
            temporary.replace(self.path)
            self._trim()
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _trim(self) -> None:
        """Remove the files written longest ago until the rest keeps the bound."""
        files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self.path.parent.glob("*.npz")), reverse=True)
        total = 0
        for _, size, path in files:
            total += size
            if total > _BOUND and path != self.path:
                path.unlink(missing_ok=True)
