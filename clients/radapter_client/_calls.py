"""How a method that is written once becomes one of `Client` and one of `AsyncClient`.

A method says what to ask and what to make of the replies, and never waits: it is a generator that
yields parts of work, each of which makes one request, is sent their replies, and returns the
answer. `Client` runs it with threads, `AsyncClient` with tasks. `call` and `call_each` are the
decorators for that; type checkers see the method of each client with its own arguments and result.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import MethodType
from typing import (
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    overload,
)

from ._exceptions import ServerUnavailable
from ._images import ImageLike, is_one_image
from ._wire import Request

P = ParamSpec("P")
T = TypeVar("T")
# By these, type checkers tell the clients apart, which are below this file.
Waiting: TypeAlias = AbstractContextManager[Any]  # `Client`
Awaiting: TypeAlias = AbstractAsyncContextManager[Any]  # `AsyncClient`
Part: TypeAlias = Callable[[], Request]
# What a method answers: `Client` returns T, `AsyncClient` returns an awaitable of T.
Answer: TypeAlias = Generator[Sequence[Part], list[Any], T]


class _Method:
    """Reads the keyword `timeout` that all methods have, for the client to keep to."""

    def __init__(self, steps: Callable[..., Answer[Any]]) -> None:
        self._steps = steps
        self.__doc__ = steps.__doc__

    def _bind(self, client: Any) -> Any:
        if client is None:
            return self._steps

        @functools.wraps(MethodType(self._steps, client))
        def method(*args: Any, **kwargs: Any) -> Any:
            return client._run(self._steps(client, *args, **kwargs), kwargs.get("timeout"))

        return method


class call(_Method, Generic[P, T]):
    """A method of both clients."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Answer[T]]) -> None:
        super().__init__(steps)

    @overload
    def __get__(self, client: None, kind: type) -> Callable[Concatenate[Any, P], Answer[T]]: ...
    @overload
    def __get__(self, client: Waiting, kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, kind: type) -> Any:
        return self._bind(client)


class _Each(Protocol[P, T]):
    @overload
    def __call__(self, images: ImageLike, *args: P.args, **kwargs: P.kwargs) -> T: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(
        self, images: Iterable[ImageLike], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]: ...


class _AsyncEach(Protocol[P, T]):
    @overload
    async def __call__(  # type: ignore[overload-overlap]  # a path is also a sequence of texts
        self, images: ImageLike, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def __call__(
        self, images: Iterable[ImageLike], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]: ...


class call_each(_Method, Generic[P, T]):
    """A method of both clients that answers for one image, or with a list for a list of images.

    What is decorated always answers with a list.
    """

    def __init__(self, steps: Callable[Concatenate[Any, Any, P], Answer[list[T]]]) -> None:
        @functools.wraps(steps)
        def one_or_list(client: Any, images: Any, *args: P.args, **kwargs: P.kwargs) -> Answer[Any]:
            answers = yield from steps(client, images, *args, **kwargs)
            return answers[0] if is_one_image(images) else answers

        super().__init__(one_or_list)

    @overload
    def __get__(self, client: Waiting, kind: type) -> _Each[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, kind: type) -> _AsyncEach[P, T]: ...
    def __get__(self, client: Any, kind: type) -> Any:
        return self._bind(client)


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
