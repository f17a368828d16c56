"""The exception for wrong input, whose message says how to correct it; and libraries that may be
missing: the command that installs one, and names that are imported on first use.
"""

from __future__ import annotations

import importlib
import json
import logging
import reprlib
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote, urlsplit

MAX_LISTED = 20  # most lines after a message
_NAME = "radapter-serve"


class RAdapterError(Exception):
    """Wrong input, in a message for people: the wrong value, the allowed ones, the next command."""


def install_command(extra: str) -> str:
    """Command that installs an extra, or several with commas, from the folder of this installation;
    else advice in words.
    """
    origin: dict[str, Any] = {}
    with suppress(PackageNotFoundError):
        origin = json.loads(distribution(_NAME).read_text("direct_url.json") or "{}")
    if "dir_info" not in origin:  # anybody could have published the name at an index
        return f"install {_NAME} again as you did before, with its extra: {_NAME}[{extra}]"
    target = shlex.quote(f"{unquote(urlsplit(origin['url']).path)}[{extra}]")
    return f"run: pip install {'-e ' if origin['dir_info'].get('editable') else ''}{target}"


def check_installed(name: str, extra: str) -> None:
    """Raise an error if a module, which an extra (or several, with commas) brings, is missing."""
    if find_spec(name) is None:
        raise RAdapterError(f"{name} is not installed; {install_command(extra)}")


def reason(error: BaseException) -> str:
    """First line of another library's error; its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cause(error: BaseException) -> str:
    """The system's words for an OSError, without its path; else the `reason`."""
    return str(getattr(error, "strerror", None) or reason(error))


def short(value: Any) -> str:
    """Shorten a value for one line of a message, to about 40 characters."""
    return value[:40] if isinstance(value, str) and value.isprintable() else reprlib.repr(value)


def listed(lines: Sequence[str]) -> str:
    """Format lines for the end of a message: the first ones, and the number of the rest."""
    shown = "".join(f"\n    {line}" for line in lines[:MAX_LISTED])
    return shown + (
        f"\n    and {len(lines) - MAX_LISTED:,} more" if len(lines) > MAX_LISTED else ""
    )


def in_words(seconds: float) -> str:
    """A time as people say it, such as "50 seconds", "3 minutes" or "5 hours"."""
    count = round(seconds)
    unit = "second"
    for size, name in ((60, "minute"), (3600, "hour")):
        if seconds >= 2 * size:
            count = round(seconds / size)
            unit = name
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


@contextmanager
def one_line(extra: str | None = None) -> Iterator[None]:
    """Raise an `RAdapterError` for a missing library, of an `extra`, or a disk error."""
    try:
        yield
    except BrokenPipeError:  # handled where commands print
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("radapter"):
            raise
        missing = error.name or str(error)
        install = install_command(extra or "all")
        raise RAdapterError(f"{missing} is not installed; {install}") from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise RAdapterError(f"{place}{cause(error)}") from error


def lazily(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package, whose names are imported from their modules on first use."""

    def find(name: str) -> Any:
        for module, names in modules.items():
            if name in names:
                with one_line():
                    return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and log records below errors, of other libraries, within the block."""
    disabled = logging.root.manager.disable
    handler = logging.NullHandler()  # without a handler, `logging.warning` adds one for stderr
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.removeHandler(handler)
