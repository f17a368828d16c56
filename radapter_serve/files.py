"""Files: atomic writes, one writer of a folder at a time, digests, names, YAML."""

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
from typing import TYPE_CHECKING, Any, TypeVar

from radapter_serve.errors import RAdapterError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
_checkers: dict[Any, TypeAdapter[Any]] = {}
# AT_FDCWD of fcntl.h, RENAME_EXCHANGE of linux/fs.h
_HERE = -100
_EXCHANGE = 2


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Atomic write: yields a temporary path that replaces `path` on success.

    Its mode follows the umask also where safetensors writes, whose files only their owner can read.
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


@contextlib.contextmanager
def disk_errors(
    folder: Path, advice: str = "", also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise an error with advice where a folder can't be written; `also` by a library."""
    refusals: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except refusals as error:
        why = str(error)
        if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
            why = error.args[0][0][2]  # of a whole folder, the first file's
        elif isinstance(error, OSError) and error.strerror and error.filename:
            why = f"{error.strerror} ({error.filename})"
        raise RAdapterError(
            f"cannot write into {folder}: {why}{'; ' if advice else ''}{advice}"
        ) from error


def digest_of(*parts: Path | bytes) -> str:
    """`sha256:` of bytes and of files, one after the other; the files may be larger than memory."""
    digest = hashlib.sha256()
    for part in parts:
        with io.BytesIO(part) if isinstance(part, bytes) else part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def read_yaml(path: Path, what: str) -> Any:
    """Load a YAML file; `what` names it in the error where it can't be read."""
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


def checker(kind: type[T]) -> TypeAdapter[T]:
    """Pydantic's checker of a dataclass; made once, as that takes longer than most checks."""
    from pydantic import TypeAdapter  # which a client and a base installation have not

    if kind not in _checkers:
        _checkers[kind] = TypeAdapter(kind)
    return _checkers[kind]


def shipped(folder: str) -> dict[str, Path]:
    """The YAML files of a folder of the package, such as `recipes`, by their stems."""
    package = Path(__file__).parent
    # In a wheel it is in the package, in a checkout next to it.
    home = package if (package / folder).is_dir() else package.parent
    return {path.stem: path for path in sorted((home / folder).glob("*.yaml"))}


@contextlib.contextmanager
def lock(folder: Path, writer: str) -> Iterator[None]:
    """Keep other writers out of a folder, which is made if it is missing; `writer` names the
    commands that write such a folder, for the error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder))
        except BlockingIOError:
            raise RAdapterError(f"another {writer} is writing {folder}; wait for it") from None
        yield


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, also against other users and containers; a killed program lets go
    of it. Raises `BlockingIOError` if another program holds it.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                pass  # a file system without locks
        else:
            # Windows locks no folder, and renames none with an open file in it.
            import filelock

            name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
            held = filelock.FileLock(Path(tempfile.gettempdir()) / f"radapter-{name}.lock")
            try:
                stack.enter_context(held.acquire(blocking=False))
            except filelock.Timeout:
                raise BlockingIOError from None
        yield


@contextlib.contextmanager
def staged_folder(folder: Path, writer: str) -> Iterator[Path]:
    """Atomic folder: yields a temporary folder that takes the place of `folder` on success.

    A failure leaves what was there before, and the next call removes what a killed one left.
    Readers find one of the two folders; only a disk that can't exchange folders has a moment
    without any. A file, and a second writer at the same time, are refused with an `RAdapterError`,
    in which `writer` is the name of the command.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise RAdapterError(f"{folder} is a file, and a folder is to be written there; remove it")
    temporary = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    new_parents = [path for path in folder.parents if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as held:
            # A live writer holds the folder that it prepares, which lies at one of the two paths.
            was_killed = old.exists()
            try:
                for path in (old, temporary) if was_killed else (temporary,):
                    held.enter_context(lock(path, writer))
            except RAdapterError:
                raise RAdapterError(
                    f"another {writer} is writing {folder}; wait for it, or name another folder"
                ) from None
            if was_killed and not folder.exists():
                old.rename(folder)
            for path in temporary.iterdir():
                remove(path)
            try:
                yield temporary
                # Swap it in for another folder, which goes by way of `old`.
                remove(old)
                if folder.exists():
                    temporary.rename(old)  # a kill from here on leaves one folder at `temporary`
                    if not exchange(old, folder):
                        old.rename(temporary)
                        folder.rename(old)
                        temporary.rename(folder)
                    remove(old)
                else:
                    temporary.rename(folder)
            finally:
                remove(temporary)
    finally:
        for path in new_parents:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def remove(folder: Path) -> None:
    """Remove a folder, a file or a link; what can't be removed stays."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths of one disk in one step; False where the system or the disk can't."""
    if sys.platform == "win32":
        return False
    # Python's own library has no function for it.
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        _HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE
    )


# Triton's model processes read file names as ASCII, and no variable changes that (the interpreter
# in them is started without the locale and without PYTHONUTF8). Python keeps other letters as
# surrogates there, which only its own functions for files understand. Everywhere else these three
# change nothing.


def as_text(name: str) -> str:
    """The name of a file, as `os` gives it, as text that can be shown and compared."""
    return os.fsencode(name).decode("utf-8", "replace")


def as_name(text: str) -> str:
    """Text as the functions of `os` take the name of a file."""
    return os.fsdecode(text.encode())


def ascii_path(folder: Path) -> Path:
    """A path to the folder that a C library can read: itself, or a link with an ASCII name."""
    if str(folder).isascii() or sys.getfilesystemencoding() == "utf-8":
        return folder
    link = Path(tempfile.mkdtemp(), "link")
    link.symlink_to(folder)
    return link
