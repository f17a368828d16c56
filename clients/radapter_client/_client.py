"""Client waits with threads; what it asks and answers is in _base.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, overload

from ._arguments import count
from ._base import NOT_READY, BaseClient, Embeddings, Plan, T
from ._images import ImageLike
from ._profile import Profile
from ._results import Classification, Hit, Release, Segmentation
from ._url import ServerURL
from ._wire import Request, Transport


class Client(BaseClient):
    """A client of one server, safe to use from several threads.

    Args:
        url: grpc://HOST:8001, grpcs://HOST, http://HOST:8000 or https://HOST.
        release: version of the release that every call is to use; None for the newest. A call of several requests gets
            all its answers from one release; two calls may not, unless the release is given here.
        timeout: seconds that one request may take; each method takes its own as well.
        batch_size: images or texts in a request at most; the server's limit is `release.facts["max_batch_size"]`.
        concurrency: requests that calls with lists keep under way at once, over all threads.

    Raises:
        RAdapterClientError: here and in every method; the same for every protocol: see its subclasses.
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
        self._transport = _transport(self._url)
        self._threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="radapter-client")

    @overload
    def classify(  # type: ignore[overload-overlap]  # a path is also a sequence of texts
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
    def classify(
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

    def classify(
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
        """The best labels of an image, or of each of a list of images.

        Args:
            images: a path, the bytes of an image file, a PIL image, a uint8 array [H, W, 3] (RGB) or [H, W] (grey);
                or a list of them.
            labels: the labels to choose from; synonyms after commas ("cat, kitty") count as one label.
            label_set: instead of labels, the name of a set that was exported with the release.
            templates: prompts with {} for the label; None for the release's own.
            top_k: labels to return, fewer where there are fewer.
            alpha: the adapter's weight in [0, 1], of a release that takes any (`release.dynamic_alpha`); None for the
                release's own.
            timeout: seconds for each request of this call.

        Raises:
            InvalidRequest: bad arguments; InvalidImage among them, for the first image that is none.
        """
        return self._run(self._classify(images, labels, label_set, templates, top_k, alpha), timeout)

    @overload
    def segment(  # type: ignore[overload-overlap]
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
    def segment(
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

    def segment(
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
        """Which label each pixel of an image has, or of each of a list of images; there, one request an image.

        Args:
            images: as in `classify`.
            labels: as in `classify`; at most 65,534.
            label_set: as in `classify`.
            templates: as in `classify`.
            alpha: as in `classify`.
            threshold: probability in [0, 1] below which a pixel is background; None: only those in no proposal are.
            short_side: shorter side in pixels of the working image that windows go over; None for 1.5 windows.
            stride: pixels from one window to the next; None for half a window.
            refine: steps of pixel-adaptive refinement along the image's edges; None for 0.
            proposals: masks to classify instead of patches: bool, float in [0, 1] or uint8 (255 inside) [N, H, W] of
                the image's own size, from any network that proposes masks. For a list of images, a list of them.
            proposal_scores: float [N, C], the proposals' own probabilities of the labels, to be fused with CLIP's.
            proposal_weight: w in [0, 1] of the fusion p = p_proposal^(1-w) p_clip^w (OVSeg); None for 0.7.
            timeout: seconds for each request of this call.

        Raises:
            InvalidRequest: bad arguments; InvalidImage among them.
            ModelNotFound: the release has no patch encoder, and no proposals were given.
        """
        options = (threshold, short_side, stride, refine, proposals, proposal_scores, proposal_weight, alpha)
        return self._run(self._segment(images, labels, label_set, templates, *options), timeout)

    def search(
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
        """The images of an index that are nearest to a text or an image, best first.

        Args:
            text: what to search for; or
            image: an image (as in `classify`) to find the like of.
            index: name of an index that `radapter-index build` wrote and the server has.
            top_k: hits to return, fewer where there are fewer.
            where: condition in SQL on the index's metadata, such as "year > 2020".
            thumbnails: whether hits bring their thumbnails.
            timeout: seconds for the request.

        Raises:
            InvalidRequest: bad arguments, an unknown index, or one of another release; its message names the command
                that builds it.
        """
        return self._run(self._search(text, image, index, top_k, where, thumbnails), timeout)

    def embed_images(
        self, images: Iterable[ImageLike], *, alpha: float | None = None, timeout: float | None = None
    ) -> Embeddings:
        """Embeddings of images, at `alpha` (both as in `classify`): float32 [N, D], unit length, in the order given."""
        return self._run(self._embed_images(images, alpha), timeout)

    def embed_texts(
        self, texts: Iterable[str], *, alpha: float | None = None, timeout: float | None = None
    ) -> Embeddings:
        """Embeddings of texts, as of images; long texts are cut as by open_clip."""
        return self._run(self._embed_texts(texts, alpha), timeout)

    @property
    def release(self) -> Release:
        """The release that calls use, asked of the server: the one given to the client, or the newest."""
        return self._run(self._release())

    @property
    def releases(self) -> list[Release]:
        """All releases that the server serves, oldest first."""
        return self._run(self._releases())

    def is_ready(self, *, timeout: float | None = None) -> bool:
        """Whether the server can answer every method, in the client's release; False also where nobody answers."""
        try:
            return self._run(self._ready(), timeout)
        except NOT_READY:
            return False

    def profile(self, *, requests: int = 10, timeout: float | None = None) -> Profile:
        """Where the time of an `embed_images` request of one image goes: print it. Sends `requests` of them."""
        requests = count("requests", requests)
        image = self._sample_image(self.release)
        self.embed_images([image], timeout=timeout)  # connects and warms up
        before, start = self._run(self._statistics(), timeout), time.perf_counter()
        for _ in range(requests):
            self.embed_images([image], timeout=timeout)
        seconds = time.perf_counter() - start
        return Profile.between(before, self._run(self._statistics(), timeout), seconds, requests)

    def close(self) -> None:
        """Closes the connections; calls under way in other threads fail, over HTTP after the request they wait for."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, plan: Plan[T], timeout: float | None = None) -> T:
        seconds = self._start(timeout)
        version = self._version
        if plan.one_release and version is None:
            version = self.release.version

        def send(part: Callable[[], Request]) -> Any:
            return self._transport.send(self._pinned(part(), version), seconds)

        with self._until_closed():
            if len(plan.parts) == 1:
                return plan.finish([send(plan.parts[0])])  # no hand-over to another thread
            return plan.finish(list(self._threads.map(send, plan.parts)))


# The protocol's libraries are loaded by the first client that needs them: gRPC and HTTP take 0.2 s each.
def _transport(url: ServerURL) -> Transport:
    if url.protocol == "grpc":
        from ._grpc import GrpcTransport

        return GrpcTransport(url)
    from ._http import HttpTransport

    return HttpTransport(url)
