"""Files: the protobuf wire format scanned without copying weights, external data mapped, outputs replaced in one step.

Encoding: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from graphopt import isolation
from graphopt.elements import Buffer
from graphopt.errors import InvalidModel, OutputError

MAP_ABOVE: Final = 1024  # bytes of raw_data from which an initializer stays in the file
MODEL_GRAPH: Final = 7  # field numbers of onnx.proto
GRAPH_INITIALIZER: Final = 5
TENSOR_RAW_DATA: Final = 9
_PIECE: Final = 1 << 24


class WireError(ValueError):
    """The bytes are no protobuf message."""


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError("varint runs over the end")


def _tag(field: int) -> int:
    """How a field that holds bytes or a message starts: its number and wire type 2."""
    return field << 3 | 2


def _fields(view: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Tag (number and wire type), start of the field, start and end of its payload."""
    at = 0
    while at < len(view):
        start = at
        key, at = _varint(view, at)
        match key & 7:
            case 0:
                begin = at
                _, at = _varint(view, at)
            case 1:
                begin, at = at, at + 8
            case 2:
                size, begin = _varint(view, at)
                at = begin + size
            case 5:
                begin, at = at, at + 4
            case _:
                raise WireError(f"wire type {key & 7}")
        if at > len(view) or key >> 3 == 0:
            raise WireError("field runs over the end")
        yield key, start, begin, at


def scan(view: memoryview) -> tuple[bytes, dict[int, Buffer]]:
    """Split a serialized model into its bytes without the large raw_data of root initializers, and views of those by index.

    Raises:
        WireError: the bytes are no protobuf message.
    """
    raws: dict[int, Buffer] = {}
    model: list[Buffer] = []
    index = 0
    for tag, start, begin, end in _fields(view):
        if tag != _tag(MODEL_GRAPH):
            model.append(view[start:end])
            continue
        graph, body = view[begin:end], list[Buffer]()
        for field, field_start, field_begin, field_end in _fields(graph):
            piece: Buffer = graph[field_start:field_end]
            if field == _tag(GRAPH_INITIALIZER):
                if field_end - field_begin > MAP_ABOVE:
                    slim, raw = _split(graph[field_begin:field_end])
                    if raw is not None:
                        piece, raws[index] = _message(GRAPH_INITIALIZER, slim), raw
                index += 1
            body.append(piece)
        model.append(_message(MODEL_GRAPH, b"".join(body)))
    return b"".join(model), raws


_BODIES: Final = {  # message -> tag of a field -> message in it: the way from a graph to the bodies of its nodes
    "model": {_tag(MODEL_GRAPH): "graph"},
    "graph": {_tag(1): "node"},
    "node": {_tag(5): "attribute"},
    "attribute": {_tag(6): "graph", _tag(11): "graph"},
}


def nesting(view: memoryview) -> int:
    """How many graphs lie inside one another in a serialized model, as far as its bytes are messages; 1 for no bodies."""
    deepest, pending = 0, [(view, "model", 0)]
    while pending:
        message, kind, depth = pending.pop()
        deepest = max(deepest, depth)
        try:
            for tag, _, begin, end in _fields(message):
                if inner := _BODIES[kind].get(tag):
                    pending.append((message[begin:end], inner, depth + (inner == "graph")))
        except WireError:
            continue
    return deepest


def _split(tensor: memoryview) -> tuple[bytes, memoryview | None]:
    """A serialized TensorProto without its raw_data, and that, when it is large."""
    raw: memoryview | None = None
    kept: list[Buffer] = []
    for tag, start, begin, end in _fields(tensor):
        if tag == _tag(TENSOR_RAW_DATA):
            raw = tensor[begin:end]  # of a field that comes twice the last counts
        else:
            kept.append(tensor[start:end])
    if raw is None or len(raw) <= MAP_ABOVE:
        return bytes(tensor), None
    return b"".join(kept), raw


def encode_varint(value: int) -> bytes:
    """`value` in groups of seven bits, low first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, payload: Buffer) -> bytes:
    return b"".join((encode_varint(_tag(number)), encode_varint(len(payload)), payload))


def pieces(buffer: Buffer) -> Iterator[Buffer]:
    """`buffer` in parts of 16 MiB; a mapped file's pages are given back after each, so that a sweep holds one part only."""
    view = memoryview(buffer)
    for start in range(0, len(view), _PIECE):
        yield view[start : start + _PIECE]
        if isinstance(view.obj, MappedFile) and hasattr(mmap, "MADV_DONTNEED"):
            view.obj.madvise(mmap.MADV_DONTNEED)


class MappedFile(mmap.mmap):
    """A file mapped for reading."""


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read when they are looked at.

    Raises:
        OSError: as `open` does.
    """
    with path.open("rb") as file:
        return _map_open(file)


def map_beside(model: Path, location: str, what: str) -> memoryview:
    """Map the external data file `location` of `model`; `what` wants it, for messages.

    Where the model is a link, as in the Hugging Face cache, its data may lie beside the link, beside its target, or be a link
    from the one to the other.

    Raises:
        InvalidModel: it is missing, or lies outside these folders.
    """
    try:
        folders = [model.parent.resolve(), model.resolve().parent]
        paths = [folder / location for folder in folders]
        path = next((p for p in paths if p.exists()), paths[0])
        inside = any(path.resolve().is_relative_to(f) for f in folders)
        if not location or Path(location).is_absolute() or "://" in location or not inside:
            raise InvalidModel(
                f"{what} points at {location!r}, outside the model's folder; refused: put the file beside the model"
            )
        if path.exists() and not path.is_file():
            raise InvalidModel(f"{what}: external data {location!r} is no regular file; put the file beside the model")
        return _map_within(next(f for f in folders if path.resolve().is_relative_to(f)), path.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise InvalidModel(
            f"{what}: external data {location!r} cannot be read ({reason}); it belongs beside the model"
        ) from None


def _map_within(folder: Path, path: Path) -> memoryview:
    """Map a file below `folder`; both are free of links, and one that takes a place on the way meanwhile is not followed.

    Raises:
        OSError: as `open` does, and where it meets a link or no regular file.
    """
    if os.open not in os.supports_dir_fd:
        return map_file(path)
    *inner, name = path.relative_to(folder).parts
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in inner:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = below
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place), "rb") as file:
            return _map_open(file)
    finally:
        os.close(place)


def _map_open(file: IO[bytes]) -> memoryview:
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    return memoryview(MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)) if state.st_size else memoryview(b"")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Whoever has the old file mapped keeps it. Devices and pipes (``/dev/stdout``) are written directly.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full.
    """
    temporary = None
    if "\0" in str(path):
        raise OutputError(f"cannot write {str(path)!r}: a path holds no NUL; name another file")
    try:
        if path.is_dir():
            raise OutputError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        beside = path.with_name(f".graphopt-{secrets.token_hex(8)}")
        with beside.open("xb") as file:
            temporary = beside
            isolation.scratch(beside)
            yield file
            settle(file)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "check the folder and its permissions"
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}; {advice}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def settle(file: IO[bytes]) -> None:
    """Bring what was written to the disk, so that a full one is noticed now."""
    file.flush()
    os.fsync(file.fileno())
