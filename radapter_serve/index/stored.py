"""Images on object storage, read like files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.index.store.s3 import SCHEME, bucket_errors, file_system


@dataclass(frozen=True)
class StoredFile:
    """An object, such as s3://bucket/photos/a.jpg; who may read it is what the environment says."""

    url: str

    def __str__(self) -> str:
        return self.url

    def read_bytes(self) -> bytes:
        """Its bytes.

        Raises:
            FileNotFoundError: there is none.
            RAdapterError: the storage does not give it; no fault of the object, which may be whole.
        """
        try:
            with file_system().open_input_stream(self._path) as file:
                return bytes(file.read())
        except (FileNotFoundError, ValueError) as error:
            # pyarrow's ArrowInvalid, of a name with // in it.
            raise FileNotFoundError(2, "no such object") from error
        except OSError as error:
            raise RAdapterError(f"{self.url} can't be read: {reason(error):.300}") from error

    def exists(self) -> bool:
        """Whether it is there.

        Raises:
            RAdapterError: the storage does not say.
        """
        with bucket_errors(self.url):
            return bool(file_system().get_file_info(self._path).is_file)

    @property
    def _path(self) -> str:
        return self.url.removeprefix(SCHEME)


def file_of(id: str, root: Path) -> Path | StoredFile:
    """Where an image of an index lies.

    Args:
        id: what the index calls it: its address on object storage, or its path from the root.
        root: folder that ids start from.
    """
    return StoredFile(id) if id.startswith(SCHEME) else root / id


def stored_files(url: str) -> Iterator[str]:
    """The addresses of all objects below one, in the order of their names, hidden ones left out.

    Raises:
        RAdapterError: the storage refuses.
    """
    from pyarrow import fs

    place = url.removeprefix(SCHEME).strip("/")
    with bucket_errors(url):
        found = file_system().get_file_info(
            fs.FileSelector(place, recursive=True, allow_not_found=True)
        )
    for path in sorted(info.path for info in found if info.is_file):
        if not any(part.startswith(".") for part in path.removeprefix(place).split("/")):
            yield f"{SCHEME}{path}"
