"""The commands, one thin file each: they read flags, call the rooms, and print.

What they share is here; what they do lives in the rooms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from radapter_serve import __version__
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.extras import install_command


def run(function: Callable[..., Any], argv: Sequence[str] | None = None, *, prog: str) -> int:
    """Run a typed function as a command: its signature makes the flags, and its docstring the help.

    Args:
        function: what the command does; may return an exit status, None means 0.
        argv: arguments without the program's name; `sys.argv` if None.
        prog: name of the command, as in `pyproject.toml`.

    Returns:
        The exit status: 2 for an error that the user can mend, 130 after Ctrl-C.
    """
    return guard(lambda: tyro.cli(function, args=argv, prog=prog), argv, prog=prog)


def guard(call: Callable[[], Any], argv: Sequence[str] | None = None, *, prog: str) -> int:
    """`run` for a command that reads its arguments itself."""
    if "--version" in (sys.argv[1:] if argv is None else argv):
        print(f"{prog} {__version__}")
        return 0
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        # Jupyter sets it, and rich would then draw its spinners into a file or a notebook.
        os.environ.pop("FORCE_COLOR", None)
    try:
        return call() or 0
    except RAdapterError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("radapter"):
            raise
        message = f"{error.name} is not installed; {install_command('all')}"
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for the interpreter's last flush
        return 1
    except OSError as error:
        message = (f"{error.filename}: " if error.filename else "") + (error.strerror or reason(error))
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2
