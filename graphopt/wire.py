"""Files: the protobuf wire format scanned without copying weights, external data mapped, outputs replaced in one step.

Encoding: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from graphopt.elements import Buffer
from graphopt.errors import InvalidModel, OutputError

MAP_ABOVE: Final = 1024  # bytes of raw_data from which an initializer stays in the file
MODEL_GRAPH: Final = 7  # field numbers of onnx.proto
GRAPH_INITIALIZER: Final = 5
TENSOR_RAW_DATA: Final = 9


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


def _fields(view: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Field number, start of the field, start and end of its payload (protobuf encoding, https://protobuf.dev)."""
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
        yield key >> 3, start, begin, at


def scan(view: memoryview) -> tuple[bytes, dict[int, Buffer]]:
    """Split a serialized model into its bytes without the large raw_data of root initializers, and views of those."""
    raws: dict[int, Buffer] = {}
    model: list[Buffer] = []
    for number, start, begin, end in _fields(view):
        if number != MODEL_GRAPH:
            model.append(view[start:end])
            continue
        graph, index, body = view[begin:end], 0, list[Buffer]()
        for field, field_start, field_begin, field_end in _fields(graph):
            piece: Buffer = graph[field_start:field_end]
            if field == GRAPH_INITIALIZER:
                if field_end - field_begin > MAP_ABOVE:
                    tensor = graph[field_begin:field_end]
                    kept = list[Buffer]()
                    for part, part_start, part_begin, part_end in _fields(tensor):
                        if part == TENSOR_RAW_DATA and part_end - part_begin > MAP_ABOVE:
                            raws[index] = tensor[part_begin:part_end]
                        else:
                            kept.append(tensor[part_start:part_end])
                    piece = _message(GRAPH_INITIALIZER, b"".join(kept))
                index += 1
            body.append(piece)
        model.append(_message(MODEL_GRAPH, b"".join(body)))
    return b"".join(model), raws


def encode_varint(value: int) -> bytes:
    """`value` in groups of seven bits, low first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, payload: Buffer) -> bytes:
    return b"".join((encode_varint(number << 3 | 2), encode_varint(len(payload)), payload))


def map_beside(model: Path, location: str, tensor: str) -> memoryview:
    """Map the external data file `location` of `model`, for an initializer named `tensor`.

    Raises:
        InvalidModel: it is missing, or lies outside the model's folder (or, where the model is a link, its target's).
    """
    folders = {model.parent.resolve(), model.resolve().parent}
    path = model.parent / location
    resolved = path.resolve()
    if (
        not location
        or Path(location).is_absolute()
        or "://" in location
        or not any(resolved.is_relative_to(f) for f in folders)
    ):
        raise InvalidModel(
            f"initializer {tensor!r} points at {location!r}, outside the model's folder; refused: put the file beside the model"
        )
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidModel(
            f"initializer {tensor!r}: external data {location!r} cannot be read ({reason}); it belongs beside {str(model)!r}"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: it is a folder")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "check the folder and its permissions"
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}; {advice}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
