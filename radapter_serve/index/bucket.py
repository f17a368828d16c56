"""Indexes on object storage: published as a whole, opened read-only by any number of servers.

`s3://BUCKET/PATH/index.json` names the generation that counts, a folder beside it; to replace that one object is to
replace the index. Who may read and write is what the environment says (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, or the role of the machine).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.lock import lock

SCHEME = "s3://"
CACHE = "RADAPTER_CACHE"  # where the files lie that are searched in memory
POINTER = "index.json"
LINK = "at"  # the one fact in the index.json of a folder that stands for an index in a bucket
GENERATION = "generation"
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
                f"{self.url.rpartition('@')[2]!r:.200} is no place of an index; allowed: s3://BUCKET/PATH"
            )

    @property
    def path(self) -> str:
        """As pyarrow wants it."""
        return self.url.removeprefix(SCHEME).strip("/")

    def facts(self) -> dict[str, Any]:
        """What the index's `index.json` says, with the generation that counts.

        Raises:
            RAdapterError: there is no index, or it can't be read.
        """
        with bucket_errors(self.url), file_system().open_input_stream(f"{self.path}/{POINTER}") as file:
            data = file.read(1 << 20)
        try:
            facts: dict[str, Any] = json.loads(data)
            if not is_generation(facts[GENERATION]):
                raise ValueError("it names no generation")
        except (ValueError, KeyError, TypeError) as error:
            raise RAdapterError(
                f"{self.url}/{POINTER} can't be read ({reason(error)}); publish the index again"
            ) from None
        return facts

    def table(self, facts: Mapping[str, Any]) -> str:
        """Where LanceDB finds the tables of the generation."""
        return f"{SCHEME}{self.path}/{facts[GENERATION]}"

    def fetch(self, facts: Mapping[str, Any], folder: Path, *, anew: bool = False) -> Path:
        """A folder of the generation on this machine's disk, from the cache or into it.

        Args:
            facts: of the index.
            folder: as it lay in the index that was published: two names from its end count.
            anew: not from the cache, which is damaged; what was fetched just now is as the storage has it.

        Raises:
            RAdapterError: it can't be read, or there is no room.
        """
        folder = Path(folder.parent.name, folder.name)
        own = _cache() / hashlib.sha256(self.path.encode()).hexdigest()[:16]
        wanted = own / str(facts[GENERATION])
        with bucket_errors(self.url), _cache_errors(own), lock(own, "radapter-index", wait=True):
            for left in own.glob(".g-*.new"):  # of a download that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not (wanted / folder).is_dir() or (anew and _is_old(wanted / folder, own)):
                fresh = own / f".{facts[GENERATION]}.new"
                try:
                    (fresh / folder).mkdir(parents=True)
                    copy(f"{self.path}/{facts[GENERATION]}/{folder}", str(fresh / folder), down=True)
                    shutil.rmtree(wanted, ignore_errors=True)
                    fresh.rename(wanted)
                finally:
                    shutil.rmtree(fresh, ignore_errors=True)
            os.utime(wanted)
            others = sorted(
                (path for path in own.iterdir() if is_generation(path.name)), key=lambda p: p.stat().st_mtime
            )
            for path in others[:-KEPT]:
                shutil.rmtree(path, ignore_errors=True)
        return wanted / folder


def link_of(folder: Path) -> str:
    """The address of the published index that a folder stands for; empty where it stands for none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return str(json.loads((folder / POINTER).read_text(encoding="utf-8"))[LINK])
    return ""


def storage_options() -> dict[str, str]:
    """What LanceDB has to be told beside the variables that it reads itself."""
    endpoint = _endpoint()
    plain = {"allow_http": "true"} if endpoint and endpoint.startswith("http://") else {}
    return {"aws_endpoint": endpoint, "aws_virtual_hosted_style_request": "false", **plain} if endpoint else {}


@contextlib.contextmanager
def bucket_errors(url: str) -> Iterator[None]:
    """Turn what the storage refuses into an error for people."""
    try:
        yield
    except FileNotFoundError:
        raise RAdapterError(f"no index at {url}; put one there: radapter-index publish INDEX {url}") from None
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise RAdapterError(f"{url} is no place on object storage: {reason(error):.300}") from None
    except (OSError, ImportError) as error:
        raise RAdapterError(
            f"{url} can't be used: {reason(error):.300}; see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and "
            "AWS_ENDPOINT_URL"
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
            f"cannot write the cache {place}: {error.strerror or error}; make room, or name another folder: {CACHE}=DIR"
        ) from None


def _is_old(folder: Path, cache: Path) -> bool:
    os.utime(cache)  # by the clock that dated the folder: a shared disk has its own
    return abs(cache.stat().st_mtime - folder.stat().st_mtime) > _JUST_NOW


def is_generation(name: Any) -> bool:
    """Whether a name is that of a generation."""
    return isinstance(name, str) and len(name) == 18 and name.startswith("g-") and name[2:].isalnum() and name.isascii()


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

    options = {"endpoint_override": endpoint or None, "region": region, "connect_timeout": 10, "request_timeout": 60}
    return fs.S3FileSystem(**{name: value for name, value in options.items() if value is not None})


def copy(source: str, target: str, *, down: bool) -> None:
    """Copy a folder from the storage to the disk (`down`), or from the disk to the storage."""
    from pyarrow import fs

    ends = (file_system(), fs.LocalFileSystem()) if down else (fs.LocalFileSystem(), file_system())
    fs.copy_files(source, target, source_filesystem=ends[0], destination_filesystem=ends[1])


def _cache() -> Path:
    return Path(
        os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radapter-serve"
    )
