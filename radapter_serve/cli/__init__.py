"""The commands, one thin file each: they parse flags, call other packages, and print.

The functions that they share are here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import tyro

from radapter_client import RAdapterClientError
from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.version import __version__

HELP = ("-h", "--help")
HELP_ALL = "--help-all"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# The extra that each command usually needs.
EXTRAS = {
    "radapter-demo": "demo",
    "radapter-eval": "train",
    "radapter-export": "export",
    "radapter-gateway": "gateway",
    "radapter-index": "server",
    "radapter-playground": "playground",
    "radapter-release": "server",
    "radapter-serve": "server",
    "radapter-train": "train",
}


def run(
    commands: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    first: Mapping[str, Collection[str]] | None = None,
    description: str | None = None,
) -> int:
    """Run a typed function as a command, or one of several as sub-commands; returns the exit
    status, 2 for an error that the user can correct. `first` names the options that `--help` shows,
    by sub-command; `--help-all` shows all.
    """
    by_name = commands if isinstance(commands, Mapping) else {"": commands}
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments and arguments[0] in by_name else ""
    if first and name in first and asks_for_help(arguments):
        shown = options(by_name[name], first[name])
        return guard(lambda: show_help(shown, prog=f"{prog} {name}".rstrip()), arguments, prog=prog)
    if HELP_ALL in arguments:
        arguments = [name, "--help"] if name else ["--help"]

    def call() -> Any:
        if not isinstance(commands, Mapping):
            return tyro.cli(commands, args=arguments, prog=prog)
        return tyro.extras.subcommand_cli_from_dict(
            dict(commands), args=arguments, prog=prog, description=description
        )

    return guard(call, arguments, prog=prog)


def printable(text: object) -> str:
    """Spell out control characters, which a terminal would obey, except line ends and tabs."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def asks_for_help(arguments: Sequence[str]) -> bool:
    """True if the arguments have `--help` or `-h`, and not `--help-all`."""
    return any(flag in arguments for flag in HELP) and HELP_ALL not in arguments


def show_help(first: Callable[..., Any], *, prog: str, description: str | None = None) -> None:
    """Print the help of some `options`, and how to see all; exits the process, as tyro does."""
    try:
        tyro.cli(first, args=["--help"], prog=prog, description=description)
    finally:
        print(f"These are the options that most people set; {prog} {HELP_ALL} shows all.")


def options(kind: Callable[..., Any], names: Collection[str], values: Any = None) -> type:
    """Build a dataclass with some options of a function or a dataclass, for its help; `values` is
    an instance with the defaults.
    """
    hints = get_type_hints(kind, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(kind).parameters.items():
        value = parameter.default if values is None else getattr(values, name)
        if dataclasses.is_dataclass(value):
            inner = options(type(value), names, value)
            if dataclasses.fields(inner):
                # mypy takes a star in Annotated[...] for the syntax of Python 3.11
                nested = operator.getitem(Annotated, (inner, *hints[name].__metadata__))
                fields.append((name, nested, dataclasses.field(default_factory=inner)))
        elif name in names and value is inspect.Parameter.empty:
            fields.append((name, hints[name], dataclasses.field()))
        elif name in names:
            default = dataclasses.field(default_factory=lambda value=value: value)  # type: ignore[misc]
            fields.append((name, hints[name], default))
    subset = dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)
    # The docstring of the class, with the attributes of its base classes.
    bases = inspect.getmro(kind) if inspect.isclass(kind) else (kind,)
    first, *inherited = [inspect.getdoc(base) or "" for base in bases if base is not object]
    subset.__doc__ = "\n".join([first, *(text.partition("Attributes:\n")[2] for text in inherited)])
    return subset


def guard(call: Callable[[], Any], argv: Sequence[str] | None = None, *, prog: str) -> int:
    """Call a command that parses its own arguments, with the exit statuses of `run`."""
    if "--version" in (sys.argv[1:] if argv is None else argv):
        print(f"{prog} {__version__}")
        return 0
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        # Jupyter sets FORCE_COLOR, which makes rich draw spinners into files and notebooks.
        os.environ.pop("FORCE_COLOR", None)
    try:
        with one_line(EXTRAS.get(prog)):
            status = call() or 0
            sys.stdout.flush()
            return status
    except (RAdapterError, RAdapterClientError) as error:
        print(printable(f"{prog}: error: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, ended; let the flush at exit succeed
        with contextlib.suppress(OSError):  # stdout may have no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return 130
