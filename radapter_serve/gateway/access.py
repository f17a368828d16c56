"""API keys with their limits, and limits on all callers together.

The key file holds names, SHA-256 digests and limits, never the keys themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import hashlib
import hmac
import math
import re
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import date, datetime, timezone
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, TypeVar

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from radapter_serve.contract.errors import OVERLOADED, UNKNOWN_ADAPTER
from radapter_serve.contract.labels import known_as
from radapter_serve.errors import RAdapterError, cause
from radapter_serve.files import first_problem, lock, staged, state_of
from radapter_serve.gateway.upstream import LOG, RATE_LIMITED, UNAUTHORIZED, Entry, Refused
from radapter_serve.release.adapters import unknown_name

T = TypeVar("T")

BASE = "-"  # the release itself in a list of adapters, of which no name begins so
LARGE_ANSWER = 2**22  # bytes; of a mask of two megapixels
LOCK_SECONDS = 10.0  # for another who writes the key file, or its folder
# The parameter of glibc's mallopt, and bytes: with 4 MiB, photos of 2 megapixels take 20 % longer.
MMAP_THRESHOLD = -3, 2**24
TRIM_SECONDS = 2.0  # between returns of freed memory to the system
FREE_SECONDS = 1.0  # for the answers before it to be sent
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
    # Adapters that the key asks and sees, `BASE` for the release itself; None for all
    adapters: frozenset[str] | None = None

    @field_validator("adapters", mode="before")
    @classmethod
    def _split(cls, names: str | None) -> frozenset[str] | None:
        if names is None:
            return None
        if not all(names.split(",")):
            raise ValueError("names of adapters with commas between them are allowed")
        return frozenset(names.split(","))

    def allows(self, adapter: str) -> bool:
        """True if the key may ask an adapter, or the release itself if the name is empty."""
        if self.adapters is None:
            return True
        return known_as(adapter or BASE, self.adapters) is not None

    def check_adapters(self, names: Iterable[str]) -> None:
        """Refuse adapters of others, as unknown: a key learns nothing of them."""
        for name in sorted(names):
            if not self.allows(name):
                raise self.unknown(name)

    @contextlib.contextmanager
    def hiding_others(self, names: Iterable[str]) -> Iterator[None]:
        """Replace the refusal of an unknown adapter, which names the nearest: they may be of other
        keys.
        """
        try:
            yield
        except Refused as error:
            if error.code != UNKNOWN_ADAPTER or self.adapters is None:
                raise
            raise self.unknown(*sorted(filter(None, names))) from None

    def unknown(self, *names: str) -> Refused:
        """The refusal of adapters, one of which at least is not served, or not to this key."""
        others = sorted((self.adapters or frozenset()) - {BASE, *names})
        if names == ("",):
            message = "this key asks adapters only; name one"
        elif len(names) == 1:
            message = unknown_name(names[0], others)
        else:
            message = (
                f"not all of the adapters {', '.join(names)!a:.80} are here; ask for each alone"
            )
        return Refused(400, UNKNOWN_ADAPTER, message)


ANYONE = Key(name="", digest="")  # a caller where no keys are asked


class Keys:
    """The keys of a file, reloaded when it changes; an unreadable file accepts no key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = state_of(path)
        self._keys = _parse(path, _text(path))
        self._trouble = ""  # why no key is accepted

    def check(self, authorization: str | None) -> Key:
        """The valid key in a header `Authorization: Bearer KEY`; raises `Refused` without it."""
        if (state := state_of(self._path)) != self._state:
            try:
                self._keys = _parse(self._path, _text(self._path))
                self._state = state
                self._trouble = ""
                LOG.info("%s has changed: %d keys", self._path, len(self._keys))
            except RAdapterError as error:
                # No key is accepted, so that a revoked one never works again, until the file can be
                # read: each check tries, since only this process may lack a descriptor.
                self._keys = {}
                self._state = "not read"
                if str(error) != self._trouble:
                    LOG.error("no key is accepted: %s", error)
                self._trouble = str(error)
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
        with lock(path.parent, "radapter-gateway", LOCK_SECONDS):
            before = _text(path) if path.exists() else ""
            if name in _parse(path, before):
                raise RAdapterError(
                    f"{path} has a key {name} already; take its line out first, or choose another"
                    " name"
                )
            if before and not before.endswith("\n"):
                before += "\n"
            line = f"{name}: {hashlib.sha256(key.encode()).hexdigest()}\n"
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
            with staged(path) as file:
                file.write_text(before + line, encoding="utf-8")
            path.chmod(mode)
    except OSError as error:
        raise RAdapterError(f"cannot write {path}: {cause(error)}") from None
    return key


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block all callers
            raise OSError(errno.EINVAL, "it is not a file")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RAdapterError(
            f"cannot read the keys {path}: {cause(error)}; make a key with: radapter-gateway"
            f" --api-keys {path} --new-key NAME"
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
    """Counts the requests and images of a key towards its limits; `at_once` is for a key whose line
    says none.
    """

    def __init__(self, key: Key, at_once: int) -> None:
        self.key = key
        self._at_once = key.at_once or at_once
        self._requests = TokenBucket(key.requests_per_second, 1.0)
        self._images = TokenBucket(key.images_per_minute, 60.0)
        self._running = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request from its headers to the last byte of its answer, or raise `Refused`."""
        if self._running >= self._at_once:
            raise self._refused(f"{self._at_once} requests at once", 1)
        if seconds := self._requests.take():
            raise self._refused(f"{self.key.requests_per_second:g} requests per second", seconds)
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
    """Limits the number of running requests, and of requests that wait for a slot; `what` names
    them to who is refused.
    """

    def __init__(self, max_running: int, max_waiting: int, what: str = "requests") -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._what = what
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
                f"{self._max_running} {self._what} run and {self._max_waiting} wait; try again in"
                " a moment",
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


class Lease:
    """The memory of a `MemoryBudget` that one request holds."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.size = 0

    def hold(self, size: int) -> None:
        """Hold so many bytes from now on; raises `Refused` if they are not free."""
        # A request that has all memory to itself runs, whatever its size.
        self._budget.take(min(size, self._budget.max_bytes) - self.size)
        self.size = min(size, self._budget.max_bytes)

    def lend(self, give_up: Callable[[], object]) -> None:
        """Let the budget call `give_up`, which ends the answer, when others need the memory."""
        self._budget.answers[self] = time.monotonic(), give_up


class MemoryBudget:
    """Limits the memory that the bodies and answers of all requests take, in bytes. When it is
    short, the answers that callers have been reading for more than `patience` seconds are given up,
    the oldest first, so that slow readers keep nobody out.
    """

    def __init__(self, max_bytes: int, patience: float) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self.answers: dict[Lease, tuple[float, Callable[[], object]]] = {}  # under way
        self._patience = patience
        self._has_freed = False  # the memory of a large answer, since it was trimmed
        self._making = 0  # bytes of large answers that are being made
        self._line = asyncio.Lock()  # of those that wait
        self._freed = asyncio.Event()

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """Yield a lease that ends with the block."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            self.answers.pop(lease, None)
            lease.hold(0)

    async def trim(self) -> None:
        """Give the memory of large answers back to the system from time to time: the C library
        would keep most of it.
        """
        try:
            trim = ctypes.CDLL(None).malloc_trim
            # It leaves what is free at the ends of heaps, which are short as long as large blocks
            # are not on them.
            ctypes.CDLL(None).mallopt(*MMAP_THRESHOLD)
        except (AttributeError, OSError, TypeError):  # only glibc has these
            return
        while True:
            await asyncio.sleep(TRIM_SECONDS)
            if self._has_freed:
                self._has_freed = False
                await asyncio.to_thread(trim, 0)

    @contextlib.asynccontextmanager
    async def making(self, lease: Lease, size: int) -> AsyncIterator[None]:
        """Hold the most that an answer may take, while the upstream makes it in the block. Large
        answers that are being made take half the memory, which leaves some to all others; those
        beyond wait in line, and the first of them `FREE_SECONDS` for memory, too.
        """
        if size <= LARGE_ANSWER:
            lease.hold(lease.size + size)
            yield
            return
        half = self.max_bytes // 2
        part = min(size, half)
        async with self._line:
            while self._making + part > half:
                self._freed.clear()
                await self._freed.wait()
            end = time.monotonic() + FREE_SECONDS
            while True:
                try:
                    lease.hold(lease.size + size)
                    break
                except Refused:
                    self._freed.clear()
                    with anyio.move_on_after(end - time.monotonic()) as waiting:
                        await self._freed.wait()
                    if waiting.cancelled_caught:
                        raise
            self._making += part
        try:
            yield
        finally:
            self._making -= part
            self._freed.set()

    def take(self, size: int) -> None:
        """Count so many bytes as held; a `Refused` if they are not free."""
        while self.answers and self.held + size > self.max_bytes:
            lease, (start, give_up) = next(iter(self.answers.items()))
            if time.monotonic() - start < self._patience:
                break
            del self.answers[lease]
            lease.hold(0)
            give_up()
        if self.held + size > self.max_bytes:
            raise Refused(
                429,
                OVERLOADED,
                "the requests under way take all memory that is set apart for them; try again in a"
                " moment",
            )
        self.held += size
        if size < 0:
            self._freed.set()
            self._has_freed |= size < -LARGE_ANSWER


class Threads:
    """Runs calls in daemon threads, at most `count` at once, which stay for the next calls. A call
    keeps its place until it has ended, even if the caller has left. Threads of an executor would
    hold the exit.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._free = asyncio.Semaphore(count)
        self._name = name
        self._idle = 0  # threads that have ended their call
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        weakref.finalize(self, self._calls.put, None).atexit = False

    async def run(self, call: Callable[[], T]) -> T:
        """Return the result of a call, which never starts if its caller leaves while it waits."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def end(settle: Callable[[Any], object], outcome: object) -> None:
            self._idle += 1
            self._free.release()
            if not answer.done():
                settle(outcome)

        def run() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                try:
                    result = call()
                except BaseException as error:
                    loop.call_soon_threadsafe(end, answer.set_exception, error)
                else:
                    loop.call_soon_threadsafe(end, answer.set_result, result)

        await self._free.acquire()
        try:
            # The event loop waits for the start of a thread, which takes long while others work.
            if self._idle == 0:
                threading.Thread(
                    target=_work, args=(self._calls,), name=self._name, daemon=True
                ).start()
                self._idle += 1
        except RuntimeError:  # the process may have no more threads
            self._free.release()
            raise
        self._idle -= 1
        self._calls.put(run)
        return await answer

    async def close(self, seconds: float) -> None:
        """Wait for the running calls, so many seconds at most; no call starts any more."""
        with anyio.move_on_after(seconds):
            for _ in range(self._count):
                await self._free.acquire()


def _work(calls: SimpleQueue[Callable[[], object] | None]) -> None:
    """Run calls until there is a None, which stays for the other threads."""
    while (call := calls.get()) is not None:
        call()
        del call  # it would keep the answer and its release
    calls.put(None)
