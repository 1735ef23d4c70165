"""Calibration data: samples from files or from Python, a piece at a time, so that memory does not grow with their number.

    calib.npz            input name -> samples on the first axis; read in pieces, compressed or not
    folder/              such files, in the order of their names; each file may have shapes of its own
    x.npy                samples of a model with one input, mapped
    package.mod:name     a callable, or an iterable, that gives one mapping of input name -> array for each call of the model

The first axis of a stored array counts samples; a number without axes, for an input without any, is fed with every sample. Where the model's input has as many dimensions as the array, samples are the slices
along that axis, fed several at once if the model's first dimension is free and in groups of that dimension if it is fixed; where the
input has one dimension less, each sample is fed alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from graphopt.errors import UsageError
from graphopt.ir import TensorSpec, dtype_name

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

_PIECE: Final = 16 << 20  # bytes that are read from a file at once
HEAD_BYTES: Final = 128 << 20  # of samples that are kept in memory


class Data(ABC):
    """A source of samples that can be read again and again."""

    name: str  # for messages
    count: int | None  # samples, where known without reading them all
    cache: Path | None = None  # folder for what is computed from them and worth keeping
    watch: Callable[[int, int | None], None] | None = None  # is told samples done, and samples in all

    @functools.cached_property
    def memo(self) -> dict[Any, Any]:
        """What was computed from these samples, kept for the next pass that asks (keyed by the model, too)."""
        return {}

    @abstractmethod
    def feeds(self, batch: int = 1, limit: int | None = None) -> Iterator[Arrays]:
        """What the model is called with, in order: up to `batch` samples at once, `limit` samples in all.

        Raises:
            UsageError: samples that do not fit the model, or hold NaN or infinity.
        """

    def digest(self) -> str:
        """sha256 over all samples."""
        found = hashlib.sha256()
        for feeds in self.feeds():
            for name in sorted(feeds):
                found.update(f"{name} {feeds[name].dtype} {feeds[name].shape} ".encode())
                found.update(np.ascontiguousarray(feeds[name]).tobytes())
        return found.hexdigest()

    def head(self, count: int, batch: int = 1, budget: int = HEAD_BYTES) -> ListData:
        """The first `count` samples, fewer where they take more than `budget` bytes, in memory, to be fed up to `batch` at once."""
        kept: list[Arrays] = []
        used = 0
        for feeds in self.feeds(self.at_once(batch), count):
            used += sum(a.nbytes for a in feeds.values())
            if kept and used > budget:
                break
            kept.append(feeds)
        return ListData(f"{count} samples of {self.name}", kept)

    def at_once(self, most: int, budget: int = _PIECE) -> int:
        """How many samples to feed at once so that they take at most `budget` bytes."""
        first = next(iter(self.feeds(1, 1)), {})
        return max(1, min(most, budget // max(1, sum(a.nbytes for a in first.values()))))


class _Member(ABC):
    """The samples of one input, read front to back."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def slices(self, batch: int) -> Iterator[Array]:
        """Consecutive slices of `batch` samples; the last may be shorter."""


class _InMemory(_Member):
    def __init__(self, array: Array) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def slices(self, batch: int) -> Iterator[Array]:
        for start in range(0, len(self.array), batch):
            yield np.asarray(self.array[start : start + batch])


class _Zipped(_Member):
    """One array of an .npz file, decompressed as it is read."""

    def __init__(self, path: Path, member: str) -> None:
        self.path, self.member = path, member
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            self.shape, fortran, self.dtype = _header(file, f"{str(path)!r}: {member}")
        if fortran and len(self.shape) > 1:
            raise UsageError(f"{str(path)!r}: {member} is in Fortran order; store np.ascontiguousarray of it")

    def slices(self, batch: int) -> Iterator[Array]:
        size = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _header(file, self.member)
            for start in range(0, self.shape[0], batch):
                count = min(batch, self.shape[0] - start)
                raw = _exactly(file, count * size, self.path)
                yield np.frombuffer(raw, self.dtype).reshape(count, *self.shape[1:])


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except ValueError as error:
        raise UsageError(f"{where} is no NumPy array ({error})") from None
    if dtype.hasobject:
        raise UsageError(f"{where} holds Python objects; store numbers")
    return shape, fortran, dtype


def _exactly(file: IO[bytes], count: int, path: Path) -> bytes:
    parts = []
    while count:
        part = file.read(min(count, _PIECE))
        if not part:
            raise UsageError(f"{str(path)!r} is truncated")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class ArrayData(Data):
    """Samples on the first axis of one array for each input."""

    def __init__(self, name: str, members: Mapping[str, _Member | Array], inputs: Sequence[TensorSpec]) -> None:
        """Check names, dtypes and shapes against `inputs`.

        Raises:
            UsageError: they do not fit.
        """
        self.name = name
        arrays = {k: m if isinstance(m, _Member) else _InMemory(m) for k, m in members.items()}
        wanted = {spec.name: spec for spec in inputs}
        missing = [n for n in wanted if n not in arrays]
        if missing and len(wanted) == 1 and list(arrays) == ["arr_0"]:  # np.savez without a name, for the one input
            arrays = {missing[0]: arrays["arr_0"]}
            missing = []
        if not wanted:
            raise UsageError(f"{name}: the model has no inputs, so there is nothing to give samples for")
        if missing:
            raise UsageError(
                f"{name} lacks samples for {', '.join(map(repr, missing))}; it holds {', '.join(map(repr, arrays)) or 'nothing'}, "
                f"the model takes {', '.join(map(str, inputs))}"
            )
        shared = {n: m.array for n, m in arrays.items() if n in wanted and isinstance(m, _InMemory) and not m.shape}
        self._shared = {n: a for n, a in shared.items() if wanted[n].shape in (None, ())}  # the same for every sample
        for name in self._shared:
            self._check_dtype(wanted[name], arrays[name])
        self._members = {n: arrays[n] for n in wanted if n not in self._shared}
        counts = {n: (m.shape[0] if m.shape else 0) for n, m in self._members.items()}
        if len(set(counts.values())) > 1:
            raise UsageError(f"{name}: the inputs have different numbers of samples on their first axis: {counts}")
        self.count = next(iter(counts.values()), 0)
        if not self.count:
            raise UsageError(f"{name} holds no samples")
        checked = {n: self._check(wanted[n], member) for n, member in self._members.items()}
        firsts = checked.values()
        self._single = -1 in firsts  # each sample alone
        self._bare = {n for n, f in checked.items() if f == -1}  # and without the first axis
        self._group = max((f for f in firsts if f > 0), default=None)  # samples of one call, where the model fixes them
        if self._single and (self._group or 1) > 1:
            raise UsageError(
                f"{name}: the model takes {self._group} samples at once for some inputs and one for "
                f"{', '.join(map(repr, sorted(self._bare)))}; give the feeds as module:callable"
            )
        if self._group is not None and self.count < self._group:
            raise UsageError(f"{name} holds {self.count} samples, the model takes {self._group} at once")

    def _check_dtype(self, spec: TensorSpec, member: _Member) -> None:
        if spec.dtype is not None and dtype_name(member.dtype) != spec.dtype:
            hint = " (scale and normalise the images as the model expects)" if member.dtype == np.uint8 else ""
            raise UsageError(
                f"{self.name}: input {spec.name!r} is {dtype_name(member.dtype)}, the model takes {spec}; "
                f"convert it with .astype{hint}"
            )

    def _check(self, spec: TensorSpec, member: _Member) -> int:
        """The model's fixed number of samples, 0 where it is free, -1 where its input has no axis for them."""
        where = f"{self.name}: input {spec.name!r}"
        self._check_dtype(spec, member)
        if spec.shape is None:
            return 0
        found = 0
        rank = len(member.shape)
        if rank == len(spec.shape) + 1:
            dims: Sequence[int | str | None] = spec.shape
            found = -1
        elif rank == len(spec.shape):
            dims = spec.shape[1:]
            first = spec.shape[0] if spec.shape else None
            found = first if isinstance(first, int) else 0
        else:
            raise UsageError(
                f"{where} has shape {list(member.shape)}, the model takes {spec}: samples lie on the first axis"
            )
        for have, dim in zip(member.shape[1:], dims, strict=True):
            if isinstance(dim, int) and dim != have:
                raise UsageError(f"{where} has samples of shape {list(member.shape[1:])}, the model takes {spec}")
        return found

    def feeds(self, batch: int = 1, limit: int | None = None) -> Iterator[Arrays]:
        """Up to `batch` samples at once; where the model fixes the number, that many, and what is left over is not fed."""
        size = 1 if self._single else self._group or max(1, batch)
        left = self.count if limit is None else min(limit, self.count or 0)
        assert left is not None
        done = 0
        streams = {n: m.slices(size) for n, m in self._members.items()}
        for pieces in zip(*streams.values(), strict=True):
            feeds = dict(zip(streams, pieces, strict=True))
            count = len(pieces[0])
            if done + count > left and self._group is None:
                count = left - done
                feeds = {n: a[:count] for n, a in feeds.items()}
            if count < 1 or (self._group is not None and count < self._group) or done >= left:
                break
            _finite(feeds, f"{self.name}: samples {done} to {done + count - 1}")
            yield {**{n: a[0] if n in self._bare else a for n, a in feeds.items()}, **self._shared}
            done += count


class ListData(Data):
    """Feeds as the model takes them; each is one call of the model."""

    def __init__(self, name: str, feeds: Sequence[Arrays]) -> None:
        self.name = name
        self._feeds = list(feeds)
        self.count = len(self._feeds)

    def feeds(self, batch: int = 1, limit: int | None = None) -> Iterator[Arrays]:
        """One by one, whatever `batch` says."""
        for number, feeds in enumerate(self._feeds[:limit]):
            _finite(feeds, f"{self.name}: feed {number}")
            yield feeds


class FolderData(Data):
    """The samples of several files, one after the other."""

    def __init__(self, name: str, parts: Sequence[Data]) -> None:
        self.name = name
        self.parts = parts
        self.count = sum(p.count or 0 for p in parts)

    def feeds(self, batch: int = 1, limit: int | None = None) -> Iterator[Arrays]:
        """File by file; a batch never reaches over two files."""
        left = limit
        for part in self.parts:
            if left is not None and left <= 0:
                return
            yield from part.feeds(batch, left)
            if left is not None:
                left -= part.count or 0


class CallableData(Data):
    """What a callable of the user's gives, asked anew for each reading."""

    def __init__(self, name: str, make: Callable[[], Iterable[Arrays]], inputs: Sequence[TensorSpec]) -> None:
        self.name, self._make, self._inputs = name, make, inputs
        self.count = None

    def feeds(self, batch: int = 1, limit: int | None = None) -> Iterator[Arrays]:
        """One by one, whatever `batch` says: the callable decides."""
        from graphopt.equivalence import check_feeds

        number = -1
        for number, given in enumerate(self._given()):
            if limit is not None and number >= limit:
                return
            if not isinstance(given, Mapping):
                raise UsageError(f"{self.name} gave {type(given).__name__}; give a mapping of input name -> array")
            feeds = {n: np.asarray(a) for n, a in given.items()}
            try:
                check_feeds(self._inputs, feeds)
            except UsageError as error:
                raise UsageError(f"{self.name}, feed {number}: {error}") from None
            _finite(feeds, f"{self.name}: feed {number}")
            yield feeds
        if number < 0:
            raise UsageError(
                f"{self.name} gave no samples; give a callable that can be called again, not a used-up iterator"
            )

    def _given(self) -> Iterator[Any]:
        """What the callable gives; what goes wrong in it is its author's to mend."""
        number = 0
        try:
            made = self._make()
            if not isinstance(made, Iterable):
                raise UsageError(f"{self.name} returned {type(made).__name__}; return an iterable of feeds")
            for given in made:
                yield given
                number += 1
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{self.name}, feed {number}: it raised {type(error).__name__}: {error}; mend it"
            ) from error


def _finite(feeds: Arrays, where: str) -> None:
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))[0].tolist()
            raise UsageError(
                f"{where}: input {name!r} holds NaN or infinity (first at {bad}); mend or drop that sample"
            )


def open_data(source: str | Path | Data | Mapping[str, Array], inputs: Sequence[TensorSpec]) -> Data:
    """The samples that `source` names, checked against the inputs of a model.

    Args:
        source: a file, a folder, ``module:callable``, arrays with samples on the first axis, or a `Data`.
        inputs: what the model takes.

    Raises:
        UsageError: there is no such thing, or it does not fit the model.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, Mapping):
        return ArrayData("the data", {n: np.asarray(a) for n, a in source.items()}, inputs)
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix == ".npz")
        if not files:
            raise UsageError(f"calibration data {str(path)!r} holds no .npz files")
        return FolderData(str(path), [_file(p, inputs) for p in files])
    if path.is_file():
        return _file(path, inputs)
    module, separator, attribute = str(source).partition(":")
    if separator and attribute.replace(".", "").replace("_", "").isalnum() and "/" not in module:
        return _callable(str(source), module, attribute, inputs)
    raise UsageError(
        f"calibration data {str(source)!r}: no such file or folder; give an .npz file (input name -> samples on the first axis), "
        "a folder of them, an .npy file, or module:callable"
    )


def _file(path: Path, inputs: Sequence[TensorSpec]) -> Data:
    where = f"calibration data {str(path)!r}"
    if path.suffix == ".npy":
        if len(inputs) != 1:
            raise UsageError(f"{where} is one array, the model takes {', '.join(map(str, inputs))}: store an .npz file")
        try:
            return ArrayData(where, {inputs[0].name: np.load(path, mmap_mode="r")}, inputs)
        except ValueError as error:
            raise UsageError(f"{where} is no NumPy array ({error})") from None
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{where} cannot be read as an .npz file ({error}); write it with np.savez") from None
    known = {spec.name for spec in inputs}
    wanted = {n.removesuffix(".npy"): n for n in names}
    if known & wanted.keys():  # labels and other arrays beside the inputs are not read
        wanted = {n: f for n, f in wanted.items() if n in known}
    members: dict[str, _Member | Array] = {n: _Zipped(path, f) for n, f in wanted.items()}
    scalars = [n for n, m in members.items() if not m.shape]
    if scalars:
        with np.load(path) as stored:
            members.update((n, stored[n]) for n in scalars)
    return ArrayData(where, members, inputs)


def _callable(source: str, module: str, attribute: str, inputs: Sequence[TensorSpec]) -> Data:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module is the user's
        told = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"calibration data {source!r}: {told}; give module:callable, importable from here") from None
    if callable(found):
        return CallableData(source, found, inputs)
    if isinstance(found, Sequence) or (isinstance(found, Iterable) and not isinstance(found, Iterator)):
        return CallableData(source, lambda: found, inputs)
    raise UsageError(
        f"calibration data {source!r} is a {type(found).__name__}; give a callable that returns an iterable of feeds"
    )
