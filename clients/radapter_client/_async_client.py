"""AsyncClient waits with tasks; what it asks and answers is in _base.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, overload

from ._arguments import count
from ._base import NOT_READY, BaseClient, Embeddings, Plan, T
from ._images import ImageLike
from ._profile import Profile
from ._results import Classification, Hit, Release, Segmentation
from ._url import ServerURL
from ._wire import AsyncTransport, Request


class AsyncClient(BaseClient):
    """Client for asyncio: the same arguments, methods and results, to be awaited (`await client.release`, too).

    It belongs to one event loop, that of its first call.
    """

    def __init__(
        self,
        url: str = "grpc://localhost:8001",
        *,
        release: int | None = None,
        timeout: float = 60.0,
        batch_size: int = 16,
        concurrency: int = 4,
    ) -> None:
        super().__init__(url, release=release, timeout=timeout, batch_size=batch_size, concurrency=concurrency)
        self._transport = _async_transport(self._url)
        self._slots = asyncio.Semaphore(self._concurrency)

    @overload
    async def classify(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> Classification: ...

    @overload
    async def classify(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> list[Classification]: ...

    async def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> Any:
        """See Client.classify."""
        return await self._run(self._classify(images, labels, label_set, templates, top_k, alpha), timeout)

    @overload
    async def segment(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        alpha: float | None = None,
        threshold: float | None = None,
        short_side: int | None = None,
        stride: int | None = None,
        refine: int | None = None,
        proposals: Any = None,
        proposal_scores: Any = None,
        proposal_weight: float | None = None,
        timeout: float | None = None,
    ) -> Segmentation: ...

    @overload
    async def segment(
        self,
        images: Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        alpha: float | None = None,
        threshold: float | None = None,
        short_side: int | None = None,
        stride: int | None = None,
        refine: int | None = None,
        proposals: Any = None,
        proposal_scores: Any = None,
        proposal_weight: float | None = None,
        timeout: float | None = None,
    ) -> list[Segmentation]: ...

    async def segment(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        alpha: float | None = None,
        threshold: float | None = None,
        short_side: int | None = None,
        stride: int | None = None,
        refine: int | None = None,
        proposals: Any = None,
        proposal_scores: Any = None,
        proposal_weight: float | None = None,
        timeout: float | None = None,
    ) -> Any:
        """See Client.segment."""
        options = (threshold, short_side, stride, refine, proposals, proposal_scores, proposal_weight, alpha)
        return await self._run(self._segment(images, labels, label_set, templates, *options), timeout)

    async def search(
        self,
        text: str | None = None,
        *,
        image: ImageLike | None = None,
        index: str,
        top_k: int = 10,
        where: str | None = None,
        thumbnails: bool = False,
        timeout: float | None = None,
    ) -> list[Hit]:
        """See Client.search."""
        return await self._run(self._search(text, image, index, top_k, where, thumbnails), timeout)

    async def embed_images(
        self, images: Iterable[ImageLike], *, alpha: float | None = None, timeout: float | None = None
    ) -> Embeddings:
        """See Client.embed_images."""
        return await self._run(self._embed_images(images, alpha), timeout)

    async def embed_texts(
        self, texts: Iterable[str], *, alpha: float | None = None, timeout: float | None = None
    ) -> Embeddings:
        """See Client.embed_texts."""
        return await self._run(self._embed_texts(texts, alpha), timeout)

    @property
    def release(self) -> Coroutine[Any, Any, Release]:
        """See Client.release; `await client.release`."""
        return self._run(self._release())

    @property
    def releases(self) -> Coroutine[Any, Any, list[Release]]:
        """See Client.releases; `await client.releases`."""
        return self._run(self._releases())

    async def is_ready(self, *, timeout: float | None = None) -> bool:
        """See Client.is_ready."""
        try:
            return await self._run(self._ready(), timeout)
        except NOT_READY:
            return False

    async def profile(self, *, requests: int = 10, timeout: float | None = None) -> Profile:
        """See Client.profile."""
        requests = count("requests", requests)
        image = self._sample_image(await self.release)
        await self.embed_images([image], timeout=timeout)
        before, start = await self._run(self._statistics(), timeout), time.perf_counter()
        for _ in range(requests):
            await self.embed_images([image], timeout=timeout)
        seconds = time.perf_counter() - start
        return Profile.between(before, await self._run(self._statistics(), timeout), seconds, requests)

    async def close(self) -> None:
        """Closes the connections; calls under way in other tasks fail."""
        self._closed = True
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, plan: Plan[T], timeout: float | None = None) -> T:
        seconds = self._start(timeout)
        version = self._version
        if plan.one_release and version is None:
            version = (await self.release).version

        async def send(part: Callable[[], Request]) -> Any:
            async with self._slots:
                with self._until_closed():
                    request = await asyncio.to_thread(part)  # reads files, encodes images
                    return await self._transport.send(self._pinned(request, version), seconds)

        tasks = [asyncio.ensure_future(send(part)) for part in plan.parts]
        try:
            return plan.finish(await asyncio.gather(*tasks))
        finally:  # where one failed, the others have nothing left to do
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _async_transport(url: ServerURL) -> AsyncTransport:
    if url.protocol == "grpc":
        from ._grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(url)
    from ._http import AsyncHttpTransport

    return AsyncHttpTransport(url)
