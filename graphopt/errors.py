"""The error tree: what a user can mend is a `UserError`, what only we can mend is an `InternalError`.

Texts follow one form: what happened, where (node, op, tensor), what to do next; lower-case, values with ``!r``.
"""

import difflib
import itertools
from collections.abc import Iterable
from typing import Final

_LONGEST: Final = 200  # characters of a name that is worth comparing, which takes their square
_MOST: Final = 10_000  # names


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` may have been meant to be."""
    if len(name) > _LONGEST:
        return None
    names = [k for k in itertools.islice(known, _MOST) if len(k) <= _LONGEST]
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


class GraphoptError(Exception):
    """Base of every error that graphopt raises on purpose."""


class UserError(GraphoptError):
    """The input, the options or the machine is at fault; shown in one to three lines, never with a traceback."""


class UsageError(UserError):
    """The call itself is wrong (option, pipeline text, target or shape text); the command line exits with 2."""


class InvalidModel(UserError):
    """The file is not a valid ONNX model, or breaks a rule of the format."""


class UnsupportedModel(UserError):
    """A valid model holds something that graphopt or the target cannot carry."""


class PipelineSyntaxError(UsageError):
    """A pipeline text does not parse; the message points at the column with a caret."""


class UnknownPass(UsageError):
    """A pipeline names a pass that discovery does not find."""


class UnknownTarget(UsageError):
    """A target text names no runtime or device that graphopt knows."""


class ShapeError(UsageError):
    """A shape text does not parse or contradicts the model."""


class BackendUnavailable(UserError):
    """A backend cannot work on this machine; the message says why and what to install."""


class OutputError(UserError):
    """The output cannot be written."""


class NotEquivalent(UserError):
    """Two models that should agree do not."""


class InternalError(GraphoptError):
    """A bug in graphopt or in a plug-in pass; the command line exits with 3 and keeps the traceback."""


class PassError(InternalError):
    """A pass raised, or reported something other than what it did."""


class VerifyError(InternalError):
    """A pass left an invalid graph."""
