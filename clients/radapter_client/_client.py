"""The two clients: `Client` waits with threads, `AsyncClient` with tasks. Their methods are in
_methods.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

from ._calls import Answer, Part, T
from ._exceptions import RAdapterClientError, ServerUnavailable
from ._methods import BaseClient
from ._url import ServerURL
from ._wire import AsyncTransport, Transport

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
