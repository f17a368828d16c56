"""API keys with their limits, and limits on all callers together.

The key file holds names, SHA-256 digests and limits, never the keys themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radapter_serve.contract.errors import OVERLOADED
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import first_problem, staged
from radapter_serve.gateway.upstream import LOG, RATE_LIMITED, UNAUTHORIZED, Entry, Refused

_LINE = re.compile(r"([\w.@-]{1,64}):\s*([0-9a-f]{64})((?:\s+[a-z_]+=\S+)*)")


class Key(BaseModel):
    """An entry of the key file; a limit of None means no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # of the owner
    digest: str  # SHA-256, in hex
    requests_per_second: Annotated[float, Field(gt=0, lt=1e9)] | None = None
    at_once: Annotated[int, Field(gt=0, lt=1e9)] | None = None  # concurrent inferences
    images_per_minute: Annotated[float, Field(gt=0, lt=1e9)] | None = None
    until: date | None = None  # last day on which the key is valid, in UTC


class Keys:
    """The keys of a file, reloaded when it changes; an unreadable file accepts no key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = _state(path)
        self._keys = _parse(path, _text(path))

    def check(self, authorization: str | None) -> Key:
        """The valid key in a header `Authorization: Bearer KEY`; raises `Refused` without it."""
        if (state := _state(self._path)) != self._state:
            self._state = state
            try:
                self._keys = _parse(self._path, _text(self._path))
                LOG.info("%s has changed: %d keys", self._path, len(self._keys))
            except RAdapterError as error:
                self._keys = {}  # so that a revoked key never works again
                LOG.error("no key is accepted: %s", error)
        kind, _, secret = (authorization or "").partition(" ")
        digest = hashlib.sha256(secret.strip().encode("utf-8", "replace")).hexdigest()
        # Compare with every digest, so that the time does not reveal which one matches.
        keys = [key for key in self._keys.values() if hmac.compare_digest(digest, key.digest)]
        if kind.lower() != "bearer" or not keys:
            raise Refused(
                401,
                UNAUTHORIZED,
                "send the header Authorization: Bearer KEY, with a key of this gateway",
            )
        until = keys[0].until
        if until is not None and datetime.now(timezone.utc).date() > until:
            raise Refused(401, UNAUTHORIZED, f"this key ended with {until}; ask for another")
        return keys[0]


def new_key(path: Path, name: str) -> str:
    """Make a key, and append its digest to a new or an existing file."""
    if not _LINE.fullmatch(f"{name}: {'0' * 64}"):
        raise RAdapterError(f"--new-key {name!r}: a name has 1 to 64 letters, digits and . _ @ -")
    key = f"radapter-{secrets.token_urlsafe(32)}"
    try:
        before = _text(path) if path.exists() else ""
        if name in _parse(path, before):
            raise RAdapterError(
                f"{path} has a key {name} already; take its line out first, or choose another name"
            )
        if before and not before.endswith("\n"):
            before += "\n"
        line = f"{name}: {hashlib.sha256(key.encode()).hexdigest()}\n"
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        with staged(path) as file:
            file.write_text(before + line, encoding="utf-8")
        path.chmod(mode)
    except OSError as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise RAdapterError(f"cannot write {path}: {why}") from None
    return key


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block all callers
            raise OSError(errno.EINVAL, "it is not a file")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise RAdapterError(
            f"cannot read the keys {path}: {why}; make a key with: radapter-gateway --api-keys"
            f" {path} --new-key NAME"
        ) from None


def _parse(path: Path, text: str) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        match = _LINE.fullmatch(line)
        if not match or match[1] in keys:
            raise RAdapterError(
                f"{where}: each line is `name: SHA-256 in hex`, which limits such as at_once=4 may"
                " follow, and no name comes twice"
            )
        words = [("name", match[1]), ("digest", match[2])]
        words += re.findall(r"(\w+)=(\S+)", match[3])
        if len(dict(words)) < len(words):
            raise RAdapterError(f"{where}: a limit comes twice")
        try:
            keys[match[1]] = Key.model_validate(dict(words))
        except ValidationError as error:
            raise RAdapterError(f"{where}: {first_problem(error)}") from None
    return keys


def _state(path: Path) -> object:
    """Inode, size and modification time of a file; None if it cannot be accessed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class TokenBucket:
    """A token bucket: `limit` tokens per `period` seconds, any number if None; full at first."""

    def __init__(
        self, limit: float | None, period: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._period = period
        self._now = now
        self._size = max(1.0, limit or 0.0)
        self._left = self._size
        self._updated = now()

    def take(self, count: int = 1) -> float:
        """Take `count` tokens and return 0, or take none and return the seconds to wait."""
        if self._limit is None:
            return 0.0
        now = self._now()
        self._left += (now - self._updated) * self._limit / self._period
        self._left = min(self._size, self._left)
        self._updated = now
        # A count larger than the bucket needs a full bucket, and leaves a debt.
        lacking = min(count, self._size) - self._left
        if lacking > 1e-9:  # more than a rounding error
            return lacking * self._period / self._limit
        self._left -= count
        return 0.0


class Quota:
    """Counts the requests and images of a key towards its limits."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self._requests = TokenBucket(key.requests_per_second, 1.0)
        self._images = TokenBucket(key.images_per_minute, 60.0)
        self._running = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs, or raise `Refused`."""
        key = self.key
        if key.at_once is not None and self._running >= key.at_once:
            raise self._refused(f"{key.at_once} requests at once", 1)
        if seconds := self._requests.take():
            raise self._refused(f"{key.requests_per_second:g} requests a second", seconds)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def images(self, count: int) -> None:
        """Count the images of a request, or raise `Refused`."""
        if seconds := self._images.take(count):
            raise self._refused(f"{self.key.images_per_minute:g} images a minute", seconds)

    def _refused(self, allowed: str, seconds: float) -> Refused:
        after = max(1, math.ceil(seconds))
        message = f"the key {self.key.name} may send {allowed}; try again in {after} s"
        return Refused(429, RATE_LIMITED, message, retry_after=after)


class ConcurrencyLimit:
    """Limits the number of running requests, and of requests that wait for a slot."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._free = asyncio.Semaphore(max_running)
        self.running = 0
        self.waiting = 0

    @contextlib.asynccontextmanager
    async def slot(self, entry: Entry) -> AsyncIterator[None]:
        """Hold a slot for the block, and time it in `entry`; refuses if too many requests wait."""
        asked = time.monotonic()
        if self._free.locked() and self.waiting >= self._max_waiting:
            raise Refused(
                429,
                OVERLOADED,
                f"{self._max_running} requests run and {self._max_waiting} wait; try again in a"
                " moment",
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
            entry.queue_ms = 1e3 * (time.monotonic() - asked)
        began = time.monotonic()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
            entry.model_ms = 1e3 * (time.monotonic() - began)


class MemoryBudget:
    """Limits the memory that the bodies of all requests take, in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves bytes until the block ends, or raises `Refused`."""
        leased = 0

        def acquire(size: int) -> None:
            nonlocal leased
            if self.held + size > self.max_bytes:
                raise Refused(
                    429,
                    OVERLOADED,
                    "the requests under way take all memory that is set apart for them; try again"
                    " in a moment",
                )
            self.held += size
            leased += size

        try:
            yield acquire
        finally:
            self.held -= leased
