"""The command line: arguments in, one call of the library, text out.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 a failed build or unequal models, 2 usage, 3 a bug in graphopt.
Nothing heavy is imported before a command needs it: `graphopt --help` loads neither onnx nor a runtime.
"""

from __future__ import annotations

import errno
import gc
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from graphopt.commands.backends import list_backends
from graphopt.commands.bench import bench
from graphopt.commands.bisect import bisect
from graphopt.commands.build import build
from graphopt.commands.compare import compare
from graphopt.commands.explain import explain
from graphopt.commands.export import export
from graphopt.commands.groups import groups
from graphopt.commands.init import init
from graphopt.commands.inspect import inspect
from graphopt.commands.opt import opt
from graphopt.commands.passes import passes
from graphopt.commands.reduce import reduce
from graphopt.commands.reproduce import reproduce
from graphopt.commands.run import run_bundle
from graphopt.commands.sensitivity import sensitivity
from graphopt.commands.terminal import HarmlessFormatter, complain, err, mute_stdout
from graphopt.commands.verify import verify
from graphopt.errors import GraphoptError, InternalError, OutputError, UsageError, UserError

app = typer.Typer(
    name="graphopt",
    help="Optimize ONNX graphs; build TensorRT engines and ONNX Runtime models from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app.command(short_help="Optimize models for targets; write bundles.")(build)
app.command(short_help="Write a recipe for a model.")(init)
app.command(short_help="Check a bundle: files, that it runs here, its numbers.")(verify)
app.command(short_help="Write a bundle into a Triton model repository.")(export)
app.command()(opt)
app.command()(explain)
app.command()(passes)
app.command("backends", short_help="Say what can be built and run here.")(list_backends)
app.command()(inspect)
app.command(short_help="Show which channels can be removed, and what keeps the others.")(groups)
app.command(short_help="Say what int8 costs, layer by layer.")(sensitivity)
app.command(short_help="Run two models on the same inputs.")(compare)
app.command(short_help="Find the rewrite that breaks a model.")(bisect)
app.command(short_help="Say whether a reproducer still fails.")(reproduce)
app.command(short_help="Make a failing model as small as it gets.")(reduce)
app.command("run", short_help="Run a bundle or a model on this machine.")(run_bundle)
app.command(short_help="Time bundles and models side by side.")(bench)


def main() -> None:
    """Run the command line and exit with its code."""
    from graphopt.garbage import patient_collector

    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter("warning: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with patient_collector():  # imports alone are a hundred thousand objects that live long
        code = run(sys.argv[1:])
    gc.freeze()  # the system takes all memory back at once; the interpreter would look for cycles in it first, for 0.1 s
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line on `arguments` and return the exit code; what goes wrong is told on stderr, not raised."""
    return exit_code(lambda: app(args=list(arguments), prog_name="graphopt", standalone_mode=False))


def exit_code(call: Callable[[], Any]) -> int:
    """Make `call` and return the exit code that its result or its error means; errors are told on stderr."""
    try:
        code = call()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except UserError as error:
        complain(error)
        return 2 if isinstance(error, UsageError) else 1
    except MemoryError:
        complain(UserError("out of memory; the model or a value in it is too large for this machine"))
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        mute_stdout()
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            return _unexpected(error)
        mute_stdout()
        complain(OutputError(f"cannot write the output: {error.strerror}; free some space or name another place"))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (InternalError, GraphoptError) as error:
        _print_traceback(error)
        complain(error)
        err.print(
            "this is a bug in graphopt or in a plug-in pass; --reproducer FILE writes what is needed to report it"
        )
        return 3
    except Exception as error:
        return _usage(error) if hasattr(error, "format_message") else _unexpected(error)


def _usage(error: Any) -> int:
    """Say what typer found wrong with the arguments; it bundles its own click, so its errors are known by their form."""
    shown = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(shown, file=sys.stderr)
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "graphopt"
    complain(UsageError(f"{shown[:1].lower()}{' '.join(shown[1:].split()).rstrip('.')}; see {command} --help"))
    return 2


def _print_traceback(error: Exception) -> None:
    err.print("".join(traceback.format_exception(error)).rstrip(), markup=False, soft_wrap=True)


def _unexpected(error: Exception) -> int:
    _print_traceback(error)
    err.print(f"error: unexpected {type(error).__name__}; this is a bug in graphopt", markup=False)
    return 3


if __name__ == "__main__":
    main()
