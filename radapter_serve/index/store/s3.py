"""Indexes on object storage: published as a whole, opened read-only by any number of servers.

`s3://BUCKET/PATH/index.json` names the generation that counts, a folder next to it; to replace that
one object is to replace the index. Who may read and write is what the environment says
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, or the
role of the machine).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.index.facts import FACTS, IndexFacts
from radapter_serve.index.integrity import DamagedFileError
from radapter_serve.index.mapped import FOLDER
from radapter_serve.index.store.local import GENERATION, is_generation
from radapter_serve.index.store.table import Table
from radapter_serve.lock import lock

SCHEME = "s3://"
CACHE = "RADAPTER_CACHE"  # where the files lie that are searched
MAX_FACTS = 16 << 20  # bytes
KEPT = 2  # generations of an index in the cache: a server may still open the one before
_JUST_NOW = 600.0  # seconds; a broken index is not fetched again and again


@dataclass(frozen=True)
class Bucket:
    """The place of an index on object storage.

    Args:
        url: `s3://BUCKET/PATH`.

    Raises:
        RAdapterError: it is no such place.
    """

    url: str

    def __post_init__(self) -> None:
        bucket, _, path = self.url.removeprefix(SCHEME).partition("/")
        odd = not self.url.startswith(SCHEME) or not bucket or not path.strip("/") or "@" in bucket
        if odd or any(part in ("", ".", "..") for part in path.strip("/").split("/")):
            raise RAdapterError(
                f"{self.url.rpartition('@')[2]!r:.200} is no place of an index; allowed:"
                " s3://BUCKET/PATH"
            )

    @property
    def path(self) -> str:
        """As pyarrow wants it."""
        return self.url.removeprefix(SCHEME).strip("/")

    def current(self) -> tuple[str, IndexFacts]:
        with (
            bucket_errors(self.url),
            file_system().open_input_stream(f"{self.path}/{FACTS}") as file,
        ):
            data = file.read(MAX_FACTS)
        try:
            values = json.loads(data)
            generation = values.pop(GENERATION)
            if not is_generation(generation):
                raise ValueError("it names no generation")
            return generation, IndexFacts.from_json(json.dumps(values))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RAdapterError(
                f"{self.url}/{FACTS} can't be read ({reason(error)}); {_again(self.url)}"
            ) from None

    def open(self, generation: str, facts: IndexFacts, *, complete: bool) -> Table:
        name = self.url.rpartition("/")[2]
        with contextlib.suppress(DamagedFileError):
            return Table(name, self.fetch(generation), facts, complete=complete)
        try:
            return Table(name, self.fetch(generation, anew=True), facts, complete=complete)
        except DamagedFileError as error:
            raise RAdapterError(
                f"the index {self.url} can't be used: {error}; {_again(self.url)}"
            ) from None

    def put(self, folder: Path, generation: str, facts: IndexFacts) -> bool:
        """Copy a generation here, then have it be the one that counts, and drop all but the one
        before.

        Args:
            folder: of the generation.
            generation, facts: as in `current`.

        Returns:
            False where it counts already.

        Raises:
            RAdapterError: the storage refuses.
        """
        before = None
        with contextlib.suppress(RAdapterError):
            before, _ = self.current()
        if before == generation:
            return False
        with bucket_errors(self.url):
            copy(str(folder / FOLDER), f"{self.path}/{generation}/{FOLDER}", down=False)
            system = file_system()
            with system.open_output_stream(f"{self.path}/{FACTS}") as file:  # seen when it is whole
                file.write(json.dumps({**asdict(facts), GENERATION: generation}).encode())
            if before is not None:  # else no one knows which one is being read
                _drop_all_but({before, generation}, system, self.path)
        return True

    def fetch(self, generation: str, *, anew: bool = False) -> Path:
        """The files of a generation that a search maps, on this machine's disk, from the cache or
        into it.

        Args:
            generation: its name.
            anew: not from the cache, which is damaged; what was fetched just now is as the storage
                has it.

        Raises:
            RAdapterError: it can't be read, or there is no room.
        """
        own = _cache() / hashlib.sha256(self.path.encode()).hexdigest()[:16]
        wanted = own / generation
        with bucket_errors(self.url), _cache_errors(own), lock(own, "radapter-index", wait=True):
            for left in own.glob(".g-*.new"):  # of a download that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not (wanted / FOLDER).is_dir() or (anew and _is_old(wanted / FOLDER, own)):
                fresh = own / f".{generation}.new"
                try:
                    (fresh / FOLDER).mkdir(parents=True)
                    self._download(generation, fresh / FOLDER)
                    shutil.rmtree(wanted, ignore_errors=True)
                    fresh.rename(wanted)
                finally:
                    shutil.rmtree(fresh, ignore_errors=True)
            os.utime(wanted)
            others = sorted(
                (path for path in own.iterdir() if is_generation(path.name)),
                key=lambda p: p.stat().st_mtime,
            )
            for path in others[:-KEPT]:
                shutil.rmtree(path, ignore_errors=True)
        return wanted / FOLDER

    def _download(self, generation: str, target: Path) -> None:
        try:
            copy(f"{self.path}/{generation}/{FOLDER}", str(target), down=True)
        except FileNotFoundError:
            raise RAdapterError(
                f"{self.url} lacks the files of {generation}; {_again(self.url)}"
            ) from None


@contextlib.contextmanager
def bucket_errors(url: str) -> Iterator[None]:
    """Turn what the storage refuses into an error for people."""
    try:
        yield
    except FileNotFoundError:
        raise RAdapterError(
            f"no index at {url}; put one there: radapter-index publish INDEX {url}"
        ) from None
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise RAdapterError(f"{url} is no place on object storage: {reason(error):.300}") from None
    except (OSError, ImportError) as error:
        raise RAdapterError(
            f"{url} can't be used: {reason(error):.300}; see AWS_ACCESS_KEY_ID,"
            " AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
        ) from None


@contextlib.contextmanager
def _cache_errors(place: Path) -> Iterator[None]:
    """Turn what this machine's disk refuses into an error for people."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # the storage's
            raise
        raise RAdapterError(
            f"cannot write the cache {place}: {error.strerror or error}; make room, or name another"
            f" folder: {CACHE}=DIR"
        ) from None


def _is_old(folder: Path, cache: Path) -> bool:
    os.utime(cache)  # by the clock that dated the folder: a shared disk has its own
    return abs(cache.stat().st_mtime - folder.stat().st_mtime) > _JUST_NOW


def _again(url: str) -> str:
    return f"publish it again: radapter-index publish INDEX {url}"


def _drop_all_but(kept: set[str], system: Any, path: str) -> None:
    """Remove the other generations, those of publications that were killed included."""
    from pyarrow import fs

    for info in system.get_file_info(fs.FileSelector(path)):
        if is_generation(info.base_name) and info.base_name not in kept:
            system.delete_dir(info.path)


def _endpoint() -> str:
    return (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or os.environ.get("AWS_ENDPOINT", "")
    )


def file_system() -> Any:
    """The storage, for who may use it by the environment."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _connected(_endpoint(), region, os.environ.get("AWS_ACCESS_KEY_ID"))


@lru_cache(4)  # one keeps its connections
def _connected(endpoint: str, region: str | None, key: str | None) -> Any:
    from pyarrow import fs

    options = {
        "endpoint_override": endpoint or None,
        "region": region,
        "connect_timeout": 10,
        "request_timeout": 60,
    }
    return fs.S3FileSystem(**{name: value for name, value in options.items() if value is not None})


def copy(source: str, target: str, *, down: bool) -> None:
    """Copy a folder from the storage to the disk (`down`), or from the disk to the storage."""
    from pyarrow import fs

    ends = (file_system(), fs.LocalFileSystem()) if down else (fs.LocalFileSystem(), file_system())
    fs.copy_files(source, target, source_filesystem=ends[0], destination_filesystem=ends[1])


def _cache() -> Path:
    return Path(
        os.environ.get(CACHE)
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radapter-serve"
    )
