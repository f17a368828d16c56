"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Where to write a file: next to its place, which it takes at the end; whatever fails before
    leaves nothing.

    Its mode follows the umask, whoever writes it: safetensors makes files that only their owner can
    read.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest_of(*parts: Path | bytes) -> str:
    """`sha256:` of bytes and of files, one after the other; the files may be larger than memory."""
    digest = hashlib.sha256()
    for part in parts:
        with io.BytesIO(part) if isinstance(part, bytes) else part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds.

    Args:
        path: of the file.
        what: to call it in a message.

    Raises:
        RAdapterError: it can't be read, or is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RAdapterError(f"could not read {what} {path}: {error.strerror}") from None
    except Exception as error:
        # PyYAML raises many kinds on values that it can't construct, and on deep nesting.
        raise RAdapterError(
            f"could not read {what} {path}: {' '.join(str(error).split())[:300]}"
        ) from None


def shipped(folder: str) -> dict[str, Path]:
    """The YAML files of a folder that comes with the package, by their names without the ending.

    Args:
        folder: such as `recipes`, as a checkout has it.
    """
    package = Path(__file__).parent
    # In a wheel it is in the package, in a checkout next to it.
    home = package if (package / folder).is_dir() else package.parent
    return {path.stem: path for path in sorted((home / folder).glob("*.yaml"))}


def swap_in(staged: Path, folder: Path, old: Path) -> None:
    """Put a finished folder in the place of another one, or of none.

    Whoever looks, also after this was killed, finds one of the two. Only where the disk can't
    exchange folders is there a moment without any.

    Args:
        staged: the finished folder, on the same disk.
        folder: the place.
        old: where the other one goes before it is removed; what a killed call left there is removed
            first.
    """
    remove(old)
    if not folder.exists():
        staged.rename(folder)
        return
    staged.rename(old)  # first, so that a killed program does not leave the other one at `staged`
    if not exchange(old, folder):
        old.rename(staged)
        folder.rename(old)
        staged.rename(folder)
    remove(old)


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one; what can't be removed stays."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Have two paths of a disk change places in one step; False where the system or the disk
    can't.
    """
    if sys.platform == "win32":
        return False
    # Python's own library has no function for it.
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        _HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE
    )


# AT_FDCWD of fcntl.h, RENAME_EXCHANGE of linux/fs.h
_HERE = -100
_EXCHANGE = 2


# Triton's model processes read file names as ASCII, and no variable changes that (the interpreter
# in them is started without the locale and without PYTHONUTF8). Python keeps other letters as
# surrogates there, which only its own functions for files understand. Everywhere else these three
# change nothing.


def as_text(name: str) -> str:
    """A file's name, as the functions for files have it, as text that can be shown and compared."""
    return os.fsencode(name).decode("utf-8", "replace")


def as_name(text: str) -> str:
    """Text as the functions for files want a name."""
    return os.fsdecode(text.encode())


def ascii_path(folder: Path) -> Path:
    """A folder for a library that is not Python's: where it couldn't read the path, a link to
    it.
    """
    if str(folder).isascii() or sys.getfilesystemencoding() == "utf-8":
        return folder
    link = Path(tempfile.mkdtemp(), "link")
    link.symlink_to(folder)
    return link
