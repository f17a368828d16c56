"""The client for asyncio: runs each call of `Client` in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from ._client import Client, Each
from ._sending import CANCELLED

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 1024  # most calls under way; threads are started on demand


def _constructor(
    init: Callable[Concatenate[Client, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[AsyncClient, P], None]]:
    """Give a constructor the signature of `init`."""
    return wraps(init)  # type: ignore[return-value]


def _awaited(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Make a coroutine of a method of `Client`."""

    @wraps(method)
    async def call(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        client._client._sender.check_open()
        cancelled = threading.Event()

        def work() -> T:
            CANCELLED.set(cancelled)
            return method(client._client, *args, **kwargs)

        try:
            return await asyncio.get_running_loop().run_in_executor(client._calls, work)
        finally:  # a cancelled call sends no further requests
            cancelled.set()

    return call


def _each_awaited(
    method: Each[P, T, list[T]],
) -> Each[P, Coroutine[Any, Any, T], Coroutine[Any, Any, list[T]]]:
    return cast(Any, _awaited(cast(Any, method)))  # type: ignore[no-any-return]


class AsyncClient:
    """Client for asyncio, with the arguments, methods and results of `Client`, to be awaited.

    Calls run in threads, so it takes the same `transport` as `Client`. A cancelled call ends at
    once for its caller; its requests under way end when they are answered or time out.

    Example:
        ```python
        async with AsyncClient() as client:
            print((await client.classify("cat.jpg", ["a cat", "a dog"])).top)
        ```
    """

    @_constructor(Client.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        self._client = Client(*args, **options)
        self._calls = ThreadPoolExecutor(THREADS, thread_name_prefix="radapter-client-call")

    def __repr__(self) -> str:
        return f"Async{self._client!r}"

    async def close(self) -> None:
        """Close the connections; calls under way in other tasks fail."""
        self._client.close()
        self._calls.shutdown(wait=False)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    classify = _each_awaited(Client.classify)
    segment = _each_awaited(Client.segment)
    search = _awaited(Client.search)
    embed_images = encode_image = _awaited(Client.embed_images)
    embed_texts = encode_text = _awaited(Client.embed_texts)
    release = _awaited(Client.release)
    releases = _awaited(Client.releases)
    indexes = _awaited(Client.indexes)
    is_ready = _awaited(Client.is_ready)
    similarity = staticmethod(Client.similarity)
