"""Files: atomic writes, one writer of a folder at a time, digests, names, YAML."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from radapter_serve.errors import RAdapterError, reason, short

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import TypeAdapter, ValidationError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
_checkers: dict[Any, TypeAdapter[Any]] = {}
# NumPy reads a header with Python's parser, which counts its depth for all threads together in
# Python 3.11: two that parse at once can fail with a SystemError.
_PARSER = threading.Lock()
# AT_FDCWD of fcntl.h, RENAME_EXCHANGE of linux/fs.h
_HERE = -100
_EXCHANGE = 2
# The first bytes of gzip, bzip2, xz, zip, Zstandard and LZ4
_COMPRESSED = re.compile(
    rb"\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ|PK\x03\x04|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18"
)
# Bytes of a model's files. The largest CLIP has 1,700 tensors, in a header of 0.2 MB; the largest
# vocabulary, of Gemma in SigLIP 2, is a tokenizer.json of 34 MB.
_MAX_HEADER = 4 * 2**20
_MAX_VOCABULARY = 100 * 2**20
# Bytes that a compressed .npz file may unpack to: 1,700 masks of a photo of a megapixel
_MAX_UNPACKED = 2**31


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Atomic write: yields a temporary path that replaces `path` on success.

    The file's mode follows the umask, though safetensors writes files that only the owner can read.
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


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def disk_errors(
    folder: Path, advice: str = "", also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise an error with advice if a folder cannot be written; `also` are a library's errors."""
    refusals: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except refusals as error:
        why = str(error)
        if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
            why = error.args[0][0][2]  # copying a folder collects errors; take the first
        elif isinstance(error, OSError) and error.strerror:
            why = error.strerror + (f" ({error.filename})" if error.filename else "")
        raise RAdapterError(
            f"cannot write into {folder}: {why}{'; ' if advice else ''}{advice}"
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; an `OSError` for a pipe or a device, which may block or never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return path.open("rb")


def check_model_file(path: Path) -> None:
    """Raise ValueError for a file of weights or of a tokenizer that takes far more memory or time
    to read than a model needs, and OSError if it can't be read.

    A link is read like the file that it leads to, wherever that is: the snapshots of the Hugging
    Face hub consist of links to ../../blobs. Nothing of a base is shown to others, and the files of
    a release are compared with its digests.
    """
    with open_regular(path) as file, _numpy_errors():
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            header = int.from_bytes(file.read(8), "little")
            if _MAX_HEADER < header <= size:
                raise ValueError(
                    f"it has a header of {header} bytes, and no model has so many tensors; allowed:"
                    f" at most {_MAX_HEADER}"
                )
        elif path.suffix in (".json", ".txt", ".model"):
            if size > _MAX_VOCABULARY:
                raise ValueError(
                    f"it has {size} bytes, and no tokenizer has so many; allowed: at most"
                    f" {_MAX_VOCABULARY}"
                )
        elif zipfile.is_zipfile(file):
            # torch.save compresses nothing and stores each tensor once.
            unpacked = _unpacked(file)
            if unpacked > size:
                raise ValueError(
                    f"it has {size} bytes and unpacks to {unpacked}, and torch.save compresses"
                    " nothing; save the weights again with torch.save"
                )


def open_table(path: Path) -> BinaryIO:
    """`open_regular`, but an error for a compressed file, which may unpack to any size."""
    file = open_regular(path)
    if _COMPRESSED.match(file.read(16)):
        file.close()
        raise RAdapterError(
            f"{path} is compressed, and could unpack to any size; unpack it first, such as with:"
            f" gunzip -k {shlex.quote(str(path))}"
        )
    file.seek(0)
    return file


def state_of(path: Path) -> object:
    """Inode, size and modification time of a file; None if it cannot be accessed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def map_array(path: Path) -> NDArray[Any]:
    """Map an array of a `.npy` file from the disk; raises OSError or ValueError if it can't be."""
    import numpy as np

    open_regular(path).close()
    with _PARSER, _numpy_errors():
        # A slice of numpy.memmap is slow, so take a plain array.
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))  # type: ignore[no-untyped-call]


def parse_array(content: bytes) -> NDArray[Any]:
    """Parse the bytes of a `.npy` file; raises ValueError if they are none."""
    import numpy as np

    with _PARSER, _numpy_errors():
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)  # type: ignore[no-untyped-call]
        return array


@contextlib.contextmanager
def written_array(
    path: Path, shape: tuple[int, int]
) -> Iterator[Callable[[NDArray[np.float32]], object]]:
    """Write a float32 array [N, D] as `.npy` in parts; yields a function that takes the next rows.
    Without a mapping: on a full disk a mapped write would kill the process.
    """
    import numpy as np

    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        yield lambda rows: file.write(np.ascontiguousarray(rows, "<f4").tobytes())


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a `.npz` file; raises OSError or ValueError if it can't be."""
    import numpy as np

    with open_regular(path) as file, _PARSER, _numpy_errors():
        size = path.stat().st_size
        if zipfile.is_zipfile(file) and (unpacked := _unpacked(file)) > max(size, _MAX_UNPACKED):
            raise ValueError(
                f"it has {size} bytes and unpacks to {unpacked}; allowed: at most {_MAX_UNPACKED},"
                " or any number without compression (numpy.savez)"
            )
        file.seek(0)
        arrays: Any = np.load(file, allow_pickle=False)
        if not hasattr(arrays, "files"):
            raise ValueError("it holds one array, and not several")
        return {name: arrays[name] for name in arrays.files}


def _unpacked(file: BinaryIO) -> int:
    """Bytes of all files in a zip archive, of which zipfile reads no more than it says here."""
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist())


@contextlib.contextmanager
def _numpy_errors() -> Iterator[None]:
    """Raise ValueError for what NumPy and zipfile raise on broken files."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(reason(error)) from None


def digest_of(*parts: Path | bytes) -> str:
    """`sha256:` of bytes and files in this order; the files may be larger than memory."""
    digest = hashlib.sha256()
    for part in parts:
        with io.BytesIO(part) if isinstance(part, bytes) else open_regular(part) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def read_yaml(path: Path, what: str) -> Any:
    """Load a YAML file; `what` names the file in error messages."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RAdapterError(f"could not read {what} {path}: {error.strerror}") from None
    except Exception as error:
        # PyYAML raises many exceptions on values that it cannot construct, and on deep nesting.
        raise RAdapterError(
            f"could not read {what} {path}: {' '.join(str(error).split())[:300]}"
        ) from None


def checker(kind: type[T]) -> TypeAdapter[T]:
    """Pydantic's checker of a dataclass, cached, as building it takes longer than most checks."""
    from pydantic import TypeAdapter  # not a dependency of a client or a base installation

    if kind not in _checkers:
        _checkers[kind] = TypeAdapter(kind)
    return _checkers[kind]


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's errors: the field, and the message about its value."""
    first = error.errors(include_url=False)[0]
    place = short(".".join(map(str, first["loc"])))
    return f"{place}: {first['msg']}" if place else first["msg"]


def shipped(folder: str) -> dict[str, Path]:
    """Find the YAML files in a folder of the package, such as `recipes`, by their stems."""
    package = Path(__file__).parent
    # A wheel has the folder in the package, a checkout next to it.
    home = package if (package / folder).is_dir() else package.parent
    return {path.stem: path for path in sorted((home / folder).glob("*.yaml"))}


@contextlib.contextmanager
def lock(folder: Path, writer: str, patience: float = 0.0) -> Iterator[None]:
    """Keep other writers out of a folder, which is created; `writer` names them in the error, after
    `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(folder))
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    why = f"another {writer} is writing {folder}; wait for it"
                    raise RAdapterError(why) from None
                time.sleep(0.02)
        yield


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes, also of other users and containers; the lock of a
    killed process is free again. Raises `BlockingIOError` if another process holds the lock.
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
            # Windows cannot lock a folder, nor rename a folder with an open file in it.
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
    """Atomic folder: yields a temporary folder that takes the place of `folder` on success; the
    next call removes what a killed one left.
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
            # A live writer holds the lock of its temporary folder, which is at one of two paths.
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
                # Swap the new folder in; an earlier one goes by way of `old`.
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
    """Remove a folder, a file or a link; ignores errors in a folder."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def exchange(first: Path, other: Path) -> bool:
    """Swap two paths of one disk atomically; False if the system or the disk cannot."""
    if sys.platform == "win32":
        return False
    # Python's standard library has no function for this.
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        _HERE, os.fsencode(first), _HERE, os.fsencode(other), _EXCHANGE
    )


def file_name(text: str) -> str:
    """Make a file name of any text: _ replaces all except letters, digits, dots, @ and hyphens."""
    return re.sub(r"[^\w.@-]+", "_", text)


# File names as text. Triton's model processes read file names as ASCII, and no variable changes
# that (their interpreter is started without the locale and without PYTHONUTF8). Python keeps other
# letters as surrogates there, which only its own functions for files understand. In all other
# processes these three functions return their arguments unchanged.


def as_text(name: str) -> str:
    """Decode a file name, as `os` returns it, as text that can be shown and compared."""
    return os.fsencode(name).decode("utf-8", "replace")


def as_name(text: str) -> str:
    """Encode text as a file name for the functions of `os`."""
    return os.fsdecode(text.encode())


def ascii_path(folder: Path) -> Path:
    """A path to the folder that a C library can read: the folder, or a link with an ASCII name."""
    if str(folder).isascii() or sys.getfilesystemencoding() == "utf-8":
        return folder
    link = Path(tempfile.mkdtemp(), "link")
    link.symlink_to(folder)
    return link
