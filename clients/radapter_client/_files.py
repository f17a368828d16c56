"""Files of the command line: lists that are read, results that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ._exceptions import RAdapterClientError


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file that are neither empty nor `#` comments."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RAdapterClientError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise RAdapterClientError(f"{path} is empty: it needs {what} a line")
    return lines


def check_output(flag: str, path: Path, *suffixes: str) -> None:
    """Fails before any work where the file could not be written after it."""
    if path.suffix.lower() not in suffixes:
        raise RAdapterClientError(f"{flag} {path} does not end in {' or '.join(suffixes)}")
    if not path.parent.is_dir() or path.is_dir():
        raise RAdapterClientError(f"{flag} {path}: {path.parent} is no folder, or the file itself is one")


def save(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except OSError as error:
        raise RAdapterClientError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
