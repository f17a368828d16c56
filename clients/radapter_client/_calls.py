"""How a method that is written once becomes one of `Client` and one of `AsyncClient`.

A method says what to ask and what to make of the replies, and never waits: it is a generator that
yields parts of work, each of which makes one request, is sent their replies, and returns the
answer. `Client` runs it with threads, `AsyncClient` with tasks. `call` and `call_each` are the
decorators for that; type checkers see the method of each client with its own arguments and result.
"""

from __future__ import annotations

import functools
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
            found = yield from steps(client, images, *args, **kwargs)
            return found[0] if is_one_image(images) else found

        super().__init__(one_or_list)

    @overload
    def __get__(self, client: Waiting, kind: type) -> _Each[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, kind: type) -> _AsyncEach[P, T]: ...
    def __get__(self, client: Any, kind: type) -> Any:
        return self._bind(client)
