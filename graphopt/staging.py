"""A folder replaced in one step: whoever is killed on the way leaves the old content or the new, never a mix.

The new content is made in a hidden folder beside the old and the two names are exchanged by one system call (``renameat2`` on Linux,
``renamex_np`` on macOS). Where a folder's name cannot be given to another (a mount point, the current folder, a parent that is
read-only, a file system that cannot exchange), the new content is complete in ``.graphopt-commit`` inside the folder before the first
file moves; who finds that folder finishes the move.

A hidden folder is locked (``flock``) by the process that fills it, so one without a lock is what a killed build left behind, and the
next build removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from graphopt import isolation
from graphopt.errors import GraphoptError, OutputError

fcntl: Any = None  # Windows has none: no locks, and what a killed build leaves stays
with contextlib.suppress(ImportError):
    fcntl = importlib.import_module("fcntl")

MANIFEST: Final = "manifest.json"
SCHEMA: Final = "graphopt-bundle/1"
_STAGE: Final = ".graphopt-stage-"
_COMMIT: Final = ".graphopt-commit"
_CANNOT: Final = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP, errno.EPERM)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and vanishes when it does not.

    What stands at `out` may be an empty folder or an earlier bundle; of that one, files that its manifest does not name are
    kept. A link is followed.

    Raises:
        OutputError: something else stands there, or the place cannot be written.
    """
    with _staged(out, lambda place: _own_files(place, out), "bundle") as stage:
        yield stage


@contextmanager
def staged_folder(out: Path, marker: str, what: str) -> Iterator[Path]:
    """As `staged`, for a `what` that is known by the file `marker` in it; nothing of an earlier one is kept.

    Raises:
        OutputError: something else stands there, or the place cannot be written.
    """

    def own(place: Path) -> set[str]:
        names = {p.name for p in place.iterdir()} if place.is_dir() else set()
        if (place.exists() and not place.is_dir()) or (names and marker not in names):
            raise OutputError(f"cannot write the {what} {str(out)!r}: it holds something else; name another")
        return names

    with _staged(out, own, what) as stage:
        yield stage


@contextmanager
def _staged(out: Path, own_files: Callable[[Path], set[str]], what: str) -> Iterator[Path]:
    place = Path(os.path.realpath(out))
    made: list[Path] = []
    stage = None
    try:
        recover(place)
        own_files(place)
        made += _make_folders(place.parent)
        inside = place.is_dir() and _is_pinned(place)
        with _new_stage(place if inside else place.parent) as stage:
            isolation.scratch(stage)
            yield stage
            own = own_files(place)  # another build may have ended meanwhile
            if inside:
                _refill(stage, place, own)
            else:
                _exchange(stage, place, own)
        made.clear()
    except OSError as error:
        raise OutputError(
            f"cannot write the {what} {str(out)!r}: {error.strerror or error}; check space and permissions"
        ) from None
    except GraphoptError as error:
        if stage is not None:  # a name that nobody will find afterwards
            error.args = (str(error).replace(str(stage), str(out)),)
        raise
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another build may live there by now
                folder.rmdir()


def recover(place: Path) -> None:
    """Finish a move into `place` that was broken off; does nothing where there is none.

    Raises:
        OSError: `place` cannot be written.
    """
    commit = place / _COMMIT
    if not commit.is_dir():
        return
    with _locked(commit, wait=True):
        if commit.is_dir():
            _move_up(commit, place, set())


@contextmanager
def exclusive(path: Path, told: Any = None) -> Iterator[None]:
    """Hold the lock file `path`; `told` is called once where another process holds it and must be waited for.

    Where the file cannot be made or locked, nothing is held: the exchange of folders is safe without.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError:
        yield
        return
    try:
        if fcntl is not None and not _try_lock(handle):
            if told is not None:
                told()
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Whether nobody else holds the lock; a file system without locks counts as free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a folder itself; yields whether it is held."""
    if fcntl is None:
        yield True
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:  # moved away this moment
        yield False
        return
    try:
        held = _try_lock(handle)
        if not held and wait:
            fcntl.flock(handle, fcntl.LOCK_EX)
            held = True
        yield held
    finally:
        os.close(handle)


@contextmanager
def _new_stage(home: Path) -> Iterator[Path]:
    """A new hidden folder in `home`, locked; what killed builds left there is removed first, and this one afterwards."""
    stage = home / f"{_STAGE}{secrets.token_hex(8)}"
    with contextlib.ExitStack() as locks:
        with _locked(home, wait=True):  # nobody sweeps between the making and the lock
            _sweep(home)
            stage.mkdir()
            locks.enter_context(_locked(stage, wait=False))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _sweep(home: Path) -> None:
    """Remove the folders of builds that are no more; by the time of an exchange all that was worth keeping was linked."""
    for path in home.glob(f"{_STAGE}*"):
        with contextlib.suppress(OSError), _locked(path, wait=False) as held:
            if held and fcntl is not None:
                shutil.rmtree(path, ignore_errors=True)


def _own_files(place: Path, out: Path) -> set[str]:
    """Names of the files that an earlier build wrote into `place`.

    Raises:
        OutputError: something stands there that no build wrote.
    """
    if not place.exists():
        return set()
    if not place.is_dir():
        raise OutputError(f"cannot write the bundle {str(out)!r}: it is a file; name a folder")
    if all(p.name.startswith(_STAGE) for p in place.iterdir()):
        return set()
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
        if not str(manifest["schema"]).startswith(SCHEMA.partition("/")[0]):
            raise ValueError(manifest["schema"])
        return {MANIFEST, *_plain(str(f["name"]) for v in manifest["variants"] for f in v["files"])}
    except FileNotFoundError:
        what = "holds other files"
    except (ValueError, KeyError, TypeError, RecursionError):
        what = f"holds a {MANIFEST} that is no bundle's"
    raise OutputError(f"cannot write the bundle {str(out)!r}: it {what}; name a new folder, or empty this one")


def _plain(names: Iterable[str]) -> set[str]:
    """Those that name something in the folder itself: a manifest from elsewhere must not have other files removed."""
    return {name for name in names if Path(name).name == name and name != ".."}


def _make_folders(folder: Path) -> list[Path]:
    """Make `folder` and its parents; returns those made, outer first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()][::-1]
    made: list[Path] = []
    try:
        for each in missing:
            with contextlib.suppress(FileExistsError):  # another build was faster
                each.mkdir()
                made.append(each)
    except OSError:
        for each in reversed(made):
            each.rmdir()
        raise
    return made


def _is_pinned(place: Path) -> bool:
    """Whether another folder cannot take the name of `place`: a mount point, a shell's folder, a parent that is read-only."""
    return place.is_mount() or place.samefile(Path.cwd()) or not os.access(place.parent, os.W_OK)


def _exchange(stage: Path, place: Path, own: set[str]) -> None:
    """Give `stage` the name of `place`; the old bundle goes away under the name of the stage."""
    with _locked(place.parent, wait=True):
        if not place.exists():
            stage.rename(place)
            return
        foreign = [p for p in place.iterdir() if p.name not in own and not p.name.startswith(_STAGE)]
        linked = [stage / p.name for p in foreign if not (stage / p.name).exists()]
        for link in linked:
            _link(place / link.name, link)
        if not _swap(stage, place):
            for link in linked:  # they are where they belong
                _remove_folder(link)
                link.unlink(missing_ok=True)
            _refill(stage, place, own)


def _link(source: Path, target: Path) -> None:
    """The same file or folder under a second name, so that it is in the old bundle and in the new."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: Any, target: Any) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    with contextlib.suppress(OSError, TypeError):
        library = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(a), os.fsencode(b)
        if hasattr(library, "renameat2"):
            done = library.renameat2(-100, first, -100, second, 2)  # AT_FDCWD, RENAME_EXCHANGE
        elif hasattr(library, "renamex_np"):
            done = library.renamex_np(first, second, 2)  # RENAME_SWAP
        else:
            return False
        if done and ctypes.get_errno() not in _CANNOT:
            code = ctypes.get_errno()
            raise OutputError(f"cannot exchange {str(b)!r}: {os.strerror(code)}; check the folder and its permissions")
        return not done
    return False


def _remove_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _refill(stage: Path, place: Path, own: set[str]) -> None:
    """Move the files of `stage` into `place`; from the moment that it is called ``.graphopt-commit`` the new bundle holds."""
    keep = {p.name for p in stage.iterdir()}
    commit = place / _COMMIT
    (stage / ".gone").write_text(json.dumps(sorted(own - keep)))
    stage.rename(commit)
    _move_up(commit, place, own - keep)


def _move_up(commit: Path, place: Path, gone: set[str]) -> None:
    """Move what is in `commit` up, the manifest last, remove what the old bundle had and the new has not, then `commit`."""
    noted = commit / ".gone"
    with contextlib.suppress(OSError, ValueError, TypeError):
        gone |= _plain(map(str, json.loads(noted.read_bytes())))
    paths = sorted((p for p in commit.iterdir() if p.name != ".gone"), key=lambda p: (p.name == MANIFEST, p.name))
    if any(p.name == MANIFEST for p in paths):
        (place / MANIFEST).unlink(missing_ok=True)  # until the last file is there, nobody takes this for a bundle
    for path in paths:
        _remove_folder(place / path.name)  # which nothing can be renamed over
        path.replace(place / path.name)
    for name in gone:
        _remove_folder(place / name)
        (place / name).unlink(missing_ok=True)
    noted.unlink(missing_ok=True)
    commit.rmdir()
