"""The two clients: `Client` waits with threads, `AsyncClient` with tasks. Their methods are in
_methods.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

from ._arguments import check_key, count, seconds
from ._methods import Answer, Methods, Part, T
from ._wire import (
    DEFAULT_URLS,
    AsyncTransport,
    Request,
    ServerURL,
    Transport,
    find_server,
    parse_url,
)
from .failures import RAdapterClientError, ServerUnavailable

W = TypeVar("W")
MIN_SIDE = 64  # of photos that are made small
# seconds before the first repetition, and at most
FIRST = 0.1
MOST = 5.0


class Tries:
    """The tries of one request: `retries` repetitions at most, in so many `seconds` with the waits.

    Every request only reads, so one that got no answer can be repeated. A time-out is not: the
    server is slow, and the caller has waited long enough.
    """

    def __init__(self, retries: int, seconds: float) -> None:
        self._left = retries
        self._wait = FIRST
        self._end = time.monotonic() + seconds
        self.seconds = seconds  # for the next try

    def pause(self, error: ServerUnavailable) -> float:
        """Seconds to wait before the next try: longer each time, never less than the server asks
        for. Raises `error` where no try or no time is left.
        """
        wait = max(self._wait * random.uniform(0.5, 1), error.retry_after)
        self._wait = min(2 * self._wait, MOST)
        self._left -= 1
        self.seconds = self._end - time.monotonic() - wait
        if self._left < 0 or self.seconds <= 0:
            raise error
        return wait


class BaseClient(Methods, Generic[W]):
    """Everything of the clients but the waiting."""

    def __init__(
        self,
        url: str | None = None,
        *,
        release: int | None = None,
        timeout: float = 60.0,
        retries: int = 2,
        batch_size: int = 16,
        concurrency: int = 4,
        api_key: str | None = None,
        transport: W | None = None,
        progress: bool = False,
        shrink_to: int | None = None,
    ) -> None:
        if url is None:
            url = find_server() if transport is None else DEFAULT_URLS[0]
        self._url = parse_url(url)
        self._version = None if release is None else count("release", release)
        self._timeout = seconds(timeout)
        self._retries = count("retries", retries, 0)
        self._batch_size = count("batch_size", batch_size)
        self._concurrency = count("concurrency", concurrency)
        self._progress = progress
        self._shrink_to = None if shrink_to is None else count("shrink_to", shrink_to, MIN_SIDE)
        self._closed = False
        if api_key is not None:
            check_key(api_key, self._url)
        self._transport: W = self._connect(self._url, api_key) if transport is None else transport
        self._threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="radapter-client")

    def __repr__(self) -> str:
        pinned = "" if self._version is None else f", release={self._version}"
        return f"{type(self).__name__}({str(self._url)!r}{pinned})"

    def _connect(self, url: ServerURL, api_key: str | None) -> W:
        raise NotImplementedError

    def _start(self, timeout: float | None) -> float:
        """The time-out of a call that begins, in seconds."""
        if self._closed:
            raise RAdapterClientError("the client is closed; make a new one")
        return self._timeout if timeout is None else seconds(timeout)

    def _tries(self, request: Request, seconds: float) -> Tries:
        """The tries of a request. Whether a server is ready is asked once, for "no server answers"
        is an answer too.
        """
        return Tries(0 if self._closed or request.action == "ready" else self._retries, seconds)

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        """Each protocol has its own way to fail in a call under way when its connection is
        closed.
        """
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            if self._closed:
                raise RAdapterClientError(
                    "the client was closed in the middle of a call"
                ) from error
            raise


# The protocol's libraries are loaded by the first client that needs them: gRPC and HTTP take 0.2 s
# each.


class Client(BaseClient[Transport]):
    """A client of one server, safe to use from several threads.

    Args:
        url: http://HOST:8000, https://HOST, grpc://HOST:8001 or grpcs://HOST; None for the server
            on this machine: http://localhost:8000, or grpc://localhost:8001 where only that
            listens.
        release: version of the release that every call is to use; None for the newest. A call of
            several requests gets all its answers from one release; two calls may not, unless the
            release is given here.
        timeout: seconds that one request may take, with all its tries, unless a call brings
            another time-out.
        retries: how often a request is tried again where no server answers, the connection breaks,
            or the server has too much to do; after a growing wait, or that which the server asks
            for. A time-out is not tried again.
        batch_size: images or texts in a request at most; the server's limit is
            `release().facts["max_batch_size"]`.
        concurrency: requests that calls with lists keep under way at once, over all threads.
        api_key: that radapter-gateway asks for. Without TLS (https, grpcs) others can read it on
            the way.
        transport: what requests go through instead of gRPC or HTTP, such as a fake server
            in tests.
        shrink_to: pixels; photos whose shorter side has more are made so small before they are
            sent, to classify, to embed and to search by: less to send, and less for the server to
            decode. Take twice the side of the model's input or more: answers change a little.
            `segment` sends images as they are.
        progress: show a bar on stderr while a call takes several requests; `AsyncClient` shows
            none.

    Raises:
        RAdapterClientError: here and in every method; the same for every protocol: see its
            subclasses.

    Example:
        ```python
        with Client() as client:
            print(client.classify("cat.jpg", ["a cat", "a dog"]).top)
        ```
    """

    def close(self) -> None:
        """Closes the connections; calls under way in other threads fail."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, url: ServerURL, api_key: str | None) -> Transport:
        if url.protocol == "grpc":
            from ._grpc import GrpcTransport

            return GrpcTransport(url, api_key)
        from ._http import HttpTransport

        return HttpTransport(url, api_key)

    def _run(self, answer: Answer[T], timeout: float | None) -> T:
        seconds = self._start(timeout)

        def send(part: Part) -> Any:
            request = part()
            tries = self._tries(request, seconds)
            while True:
                try:
                    return self._transport.send(request, tries.seconds)
                except ServerUnavailable as error:
                    pause = tries.pause(error)
                time.sleep(pause)

        step = partial(next, answer)
        with self._until_closed():
            try:
                while True:
                    parts = step()
                    try:  # one request is not handed over to another thread
                        replies = list(
                            map(send, parts) if len(parts) == 1 else self._in_threads(send, parts)
                        )
                        step = partial(answer.send, replies)
                    except RAdapterClientError as error:
                        step = partial(answer.throw, error)
            except StopIteration as done:
                value: T = done.value
                return value

    def _in_threads(self, send: Callable[[Part], Any], parts: Sequence[Part]) -> Iterator[Any]:
        replies = self._threads.map(send, parts)
        if not self._progress:
            return replies
        from rich.console import Console  # here: few calls show a bar
        from rich.progress import track

        console = Console(stderr=True)
        watched = console.is_terminal or console.is_jupyter
        return iter(
            track(
                replies, "asking", len(parts), console=console, transient=True, disable=not watched
            )
        )


class AsyncClient(BaseClient[AsyncTransport]):
    """Client for asyncio: the same arguments, methods and results, to be awaited.

    It belongs to one event loop, that of its first call.

    Example:
        ```python
        async with AsyncClient() as client:
            print((await client.classify("cat.jpg", ["a cat", "a dog"])).top)
        ```
    """

    async def close(self) -> None:
        """Closes the connections; calls under way in other tasks fail."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _connect(self, url: ServerURL, api_key: str | None) -> AsyncTransport:
        if url.protocol == "grpc":
            from ._grpc import AsyncGrpcTransport

            return AsyncGrpcTransport(url, api_key)
        from ._http import AsyncHttpTransport

        return AsyncHttpTransport(url, api_key)

    @cached_property
    def _slots(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(self._concurrency)

    async def _run(self, answer: Answer[T], timeout: float | None) -> T:
        seconds = self._start(timeout)

        async def send(part: Part) -> Any:
            async with self._slots:
                with self._until_closed():
                    # Reads files, encodes images.
                    request = await asyncio.get_running_loop().run_in_executor(self._threads, part)
                    tries = self._tries(request, seconds)
                    while True:
                        try:
                            return await self._transport.send(request, tries.seconds)
                        except ServerUnavailable as error:
                            pause = tries.pause(error)
                        await asyncio.sleep(pause)

        step = partial(next, answer)
        try:
            while True:
                parts = step()
                try:
                    replies = await _together([send(part) for part in parts])
                    step = partial(answer.send, replies)
                except RAdapterClientError as error:
                    step = partial(answer.throw, error)
        except StopIteration as done:
            value: T = done.value
            return value


async def _together(calls: list[Any]) -> list[Any]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:  # where one failed, the others have nothing left to do
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
