"""The exception for wrong input, whose sentence says how to correct it; and how to install a
library that is missing.
"""

from __future__ import annotations

import json
import logging
import reprlib
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any
from urllib.parse import unquote, urlsplit

MAX_LISTED = 20  # lines below a message
_NAME = "radapter-serve"


class RAdapterError(Exception):
    """An error for people: what is wrong, which value, what is allowed, what to run next."""


def install_command(extra: str) -> str:
    """What to run so that this installation has an extra, or several with commas.

    Where the package did not come from a folder, an index of packages is not asked for it by its
    name, which anybody could have published there.
    """
    origin: dict[str, Any] = {}
    with suppress(PackageNotFoundError):
        origin = json.loads(distribution(_NAME).read_text("direct_url.json") or "{}")
    if "dir_info" not in origin:
        return f"install {_NAME} again as you did before, with its extra: {_NAME}[{extra}]"
    target = shlex.quote(f"{unquote(urlsplit(origin['url']).path)}[{extra}]")
    return f"run: pip install {'-e ' if origin['dir_info'].get('editable') else ''}{target}"


def check_installed(name: str, extra: str) -> None:
    """Refuse to go on without a module, which an extra (or several, with commas) brings."""
    if find_spec(name) is None:
        raise RAdapterError(f"{name} is not installed; {install_command(extra)}")


def reason(error: BaseException) -> str:
    """The first line of another library's error; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def short(value: Any) -> str:
    """A value on one line of a message, cut to 40 characters."""
    return value[:40] if isinstance(value, str) and value.isprintable() else reprlib.repr(value)


def listed(lines: Sequence[str]) -> str:
    """Lines for the end of a message, as many as people read, and how many more there are."""
    shown = "".join(f"\n    {line}" for line in lines[:MAX_LISTED])
    return shown + (
        f"\n    and {len(lines) - MAX_LISTED:,} more" if len(lines) > MAX_LISTED else ""
    )


@contextmanager
def one_line(extra: str | None = None) -> Iterator[None]:
    """Turn what a missing library or the disk raises within the block into an `RAdapterError`;
    `extra` brings all that the block needs.
    """
    try:
        yield
    except BrokenPipeError:  # is for the caller, who prints
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("radapter"):
            raise
        missing = error.name or str(error)
        install = install_command(extra or "all")
        raise RAdapterError(f"{missing} is not installed; {install}") from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise RAdapterError(f"{place}{error.strerror or reason(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what other libraries warn of and log, short of errors, within the block."""
    disabled = logging.root.manager.disable
    handler = logging.NullHandler()  # without one, `logging.warning` adds one for the terminal
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.removeHandler(handler)
