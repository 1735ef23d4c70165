"""What was computed before: a folder of entries, each found by the hash of all that decides its content.

    GRAPHOPT_CACHE        the folder; ``off`` for none; default: ``graphopt`` in the user's cache folder
    GRAPHOPT_CACHE_SIZE   its bound, as in ``2 GB``; default 5 GB; entries used longest ago go first

An entry is a folder of plain files (ONNX, engines) and ``entry.json``, which holds the sha256 of each file and of itself: what is
damaged is found out, removed and computed again. Nothing is pickled. Entries appear by a rename, so that processes may share
the folder; where it cannot be written everything works, and is computed each time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from graphopt.errors import UsageError
from graphopt.recipe import parse_size

_FORMAT: Final = 1  # of entries; another is not found
_ENTRY: Final = "entry.json"
_BOUND: Final = "5 GB"
_SETTLED: Final = 2 * 10**9  # nanoseconds after which a file's time stamp tells a change for certain
_BLOCK: Final = 4096  # bytes that a small file takes
_ABANDONED: Final = 3600  # seconds after which a half-written entry is a killed process's


@dataclass(frozen=True)
class Entry:
    """One entry, checked against its digests."""

    folder: Path
    meta: Any  # the JSON value that was stored beside the files


class Cache:
    """A folder of entries."""

    def __init__(self, folder: Path, bound: int = parse_size(_BOUND)) -> None:
        self.folder = folder
        self.bound = bound

    @classmethod
    def of_user(cls) -> Cache | None:
        """The cache that the environment names; None where it is off.

        Raises:
            UsageError: the variables do not make sense.
        """
        wanted = os.environ.get("GRAPHOPT_CACHE")
        if wanted is not None and wanted.lower() in ("", "off"):
            return None
        folder = Path(wanted) if wanted else _user_folder()
        if folder is None:
            return None
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"GRAPHOPT_CACHE names {str(folder)!r}, which is no folder; name one, or 'off'")
        try:
            return cls(folder.absolute(), parse_size(os.environ.get("GRAPHOPT_CACHE_SIZE") or _BOUND))
        except ValueError as error:
            raise UsageError(f"GRAPHOPT_CACHE_SIZE: {error}") from None

    def lock_file(self, place: Path) -> Path:
        """The file whose lock means: somebody builds into `place`."""
        name = hashlib.sha256(os.fsencode(os.path.realpath(place))).hexdigest()
        return self.folder / "locks" / name[:32]

    def find(self, kind: str, ingredients: Mapping[str, Any]) -> Entry | None:
        """What was stored for these ingredients, if it is there and undamaged."""
        folder = self._place(kind, ingredients)
        try:
            meta, files = _read_entry(folder)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            files = None
        if files is None or any(_sha256(folder / name) != digest for name, digest in files.items()):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / _ENTRY)  # used now
        return Entry(folder, meta)

    def add(self, kind: str, ingredients: Mapping[str, Any], write: Callable[[Path], Any]) -> None:
        """Store what `write` puts into the folder that it is given, and the JSON value that it returns.

        An entry that cannot be written (a full disk, a read-only folder) is left out.
        """
        place = self._place(kind, ingredients)
        stage = place.with_name(f".{secrets.token_hex(8)}")
        try:
            stage.mkdir(parents=True)
            meta = write(stage)
            files = {p.name: _sha256(p) for p in sorted(stage.iterdir())}
            text = json.dumps(
                {"meta": meta, "files": files}, ensure_ascii=False, default=lambda v: v.item()
            )  # of NumPy
            digest = hashlib.sha256(text.encode()).hexdigest()
            (stage / _ENTRY).write_text(f"{digest}\n{text}", encoding="utf-8")
            if not place.exists():
                stage.rename(place)
        except OSError:
            return
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def trim(self) -> None:
        """Remove the entries used longest ago until the rest keeps the bound, and what killed processes left half-written."""
        entries: list[tuple[float, int, Path]] = []
        for folder in self.folder.glob("entries/*/*"):
            with contextlib.suppress(OSError):
                size = sum(p.stat().st_size for p in folder.iterdir())
                if folder.name.startswith("."):
                    if time.time() - folder.stat().st_mtime > _ABANDONED:
                        shutil.rmtree(folder, ignore_errors=True)
                    continue
                entries.append(((folder / _ENTRY).stat().st_mtime, size, folder))
        for memo in self.folder.glob("files/*/*"):
            with contextlib.suppress(OSError):
                entries.append((memo.stat().st_mtime, _BLOCK, memo))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.bound:
                break
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            total -= size

    def _place(self, kind: str, ingredients: Mapping[str, Any]) -> Path:
        machine = f"{sys.platform} {platform.machine()}"
        text = json.dumps([_FORMAT, kind, machine, ingredients], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
        return self.folder / "entries" / key[:2] / key


class Digests:
    """sha256 of files, remembered in the cache by their size and time stamps, so that large files are read once."""

    def __init__(self, cache: Cache | None) -> None:
        self.folder = None if cache is None else cache.folder / "files"

    def of(self, path: Path) -> tuple[str, int]:
        """Digest and bytes of a file.

        Raises:
            OSError: it cannot be read.
        """
        if not path.is_file():  # a device never ends
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        before = _stamp(path)
        memo = None
        if self.folder is not None:
            name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
            memo = self.folder / name[:2] / name[:40]
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(memo.read_bytes())
                if known["stamp"] == before:
                    return str(known["sha256"]), int(before[0])
        digest = _sha256(path)
        old = time.time_ns() - max(before[1], before[2]) > _SETTLED  # else it may change again within the same stamp
        if memo is not None and old and _stamp(path) == before:
            with contextlib.suppress(OSError):
                memo.parent.mkdir(parents=True, exist_ok=True)
                beside = memo.with_name(f".{secrets.token_hex(8)}")
                beside.write_text(json.dumps({"stamp": before, "sha256": digest}))
                beside.replace(memo)
        return digest, before[0]


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _read_entry(folder: Path) -> tuple[Any, dict[str, str]]:
    digest, _, text = (folder / _ENTRY).read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError("entry.json is damaged")
    content = json.loads(text)
    return content["meta"], {str(name): str(value) for name, value in content["files"].items()}


def _user_folder() -> Path | None:
    """Where this system keeps caches; None where the user has no home."""
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library/Caches/graphopt"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "graphopt" / "cache"
        named = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(named) if named.startswith("/") else Path.home() / ".cache") / "graphopt"
    except RuntimeError:
        return None
