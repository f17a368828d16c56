"""The one exception that means: the input was wrong, and this sentence says how to correct it."""

from __future__ import annotations

import logging
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from radapter_serve.extras import extra_of, install_command

MAX_LISTED = 20  # lines below a message


class RAdapterError(Exception):
    """An error for people: what is wrong, which value, what is allowed, which command to run
    next.
    """


def check_installed(name: str, extra: str) -> None:
    """Refuse to go on without a library.

    Args:
        name: of its module.
        extra: of radapter-serve, which brings it; or several, with commas.

    Raises:
        RAdapterError: says how to install it.
    """
    if find_spec(name) is None:
        raise RAdapterError(f"{name} is not installed; {install_command(extra)}")


def not_installed(name: str, extra: str, error: ImportError) -> RAdapterError:
    """The error where a library is missing, with the command that installs it.

    Args:
        name: of the library, for people.
        extra: of radapter-serve, which brings it.
        error: what the import said.
    """
    return RAdapterError(f"{name} is not installed ({error}); {install_command(extra)}")


def reason(error: BaseException) -> str:
    """The first line of another library's error, for a message of ours; its class where it says
    nothing.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def short(value: Any) -> str:
    """What a file or a caller calls something, on one line of a message and cut to 40
    characters.
    """
    return value[:40] if isinstance(value, str) and value.isprintable() else reprlib.repr(value)


def listed(lines: Sequence[str]) -> str:
    """Lines for the end of a message, as many as people read, and how many more there are."""
    shown = "".join(f"\n    {line}" for line in lines[:MAX_LISTED])
    return shown + (
        f"\n    and {len(lines) - MAX_LISTED:,} more" if len(lines) > MAX_LISTED else ""
    )


def all_of(problems: Sequence[str], subject: str) -> RAdapterError:
    """One error for all problems of a subject; one alone is its message."""
    if len(problems) == 1:
        return RAdapterError(problems[0])
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return RAdapterError(f"{subject} won't do, for {len(problems)} reasons:{lines}")


@contextmanager
def one_line(extra: str | None = None) -> Iterator[None]:
    """Turn what a missing library or the disk raises within the block into an `RAdapterError`.

    Args:
        extra: of radapter-serve, which brings all that the block usually needs.
    """
    try:
        yield
    except BrokenPipeError:  # is for whoever prints
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("radapter"):
            raise
        missing = error.name or str(error)
        install = install_command(extra_of(missing, extra))
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
