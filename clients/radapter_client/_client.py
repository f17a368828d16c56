"""The client: turns method calls into requests, and replies into results."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from ._arguments import (
    check_key,
    check_seconds,
    checked,
    count,
    example_values,
    one_each,
    proposal_values,
    several_images,
    several_texts,
)
from ._images import (
    ImageLike,
    chunks,
    encode_image,
    encode_small,
    is_one_image,
    orientation,
    size_bound,
)
from ._results import (
    Classification,
    Hit,
    Hits,
    Receipt,
    Release,
    Segmentation,
    read_releases,
)
from ._sending import Limit, Sender
from ._wire import DEFAULT_URLS, Reply, Request, Rows, Transport, Values, find_server, parse_url
from .failures import (
    InvalidRequest,
    ModelNotFound,
    ServerError,
    ServerUnavailable,
    Timeout,
    bad_argument,
    reading,
    shown,
)

P = ParamSpec("P")
T = TypeVar("T")
One = TypeVar("One", covariant=True)
Many = TypeVar("Many", covariant=True)
Embeddings = npt.NDArray[np.float32]

TASKS = ("embed_image", "embed_text", "retrieve", "segment", "classify")
# Half of the smallest limit on a request's body in use (64 MiB, newer Tritons over HTTP).
MAX_BYTES = 32 * 2**20
# Labels and templates are repeated for each row of a request; this limit keeps their size small
# compared with that of the images.
MAX_STRINGS = 8192
MAX_STARTS = 4  # of a list, when one release after another takes over
MIN_SIDE = 64  # least value of `shrink_to`, in pixels
RECEIPT = "receipt"  # output that says what an answer was computed with
SAME_ALPHA = 1e-6  # a receipt has six digits


class Each(Protocol[P, One, Many]):
    """A method that returns one answer for one image, and a list for several images."""

    @overload
    def __call__(self, images: ImageLike, *args: P.args, **kwargs: P.kwargs) -> One: ...  # type: ignore[overload-overlap]  # a path is also a sequence of texts
    @overload
    def __call__(self, images: Iterable[ImageLike], *args: P.args, **kwargs: P.kwargs) -> Many: ...


def for_each(method: Callable[Concatenate[Any, Any, P], list[T]]) -> Each[P, T, list[T]]:
    """Let a method that returns a list also take one image, and return one answer for it."""

    @wraps(method)
    def one_or_list(client: Any, images: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        answers = method(client, images, *args, **kwargs)
        return answers[0] if is_one_image(images) else answers

    return cast(Any, one_or_list)  # type: ignore[no-any-return]


class Client:
    """A client of one server, safe to use from several threads.

    Args:
        url: http://HOST:8000, https://HOST, grpc://HOST:8001 or grpcs://HOST. None for the server
            on this machine: http://localhost:8000, or grpc://localhost:8001 if only gRPC answers.
        release: version of the release for every call; None for the newest. All requests of one
            call are answered by one release; two calls may get different ones, unless the release
            is given here.
        timeout: seconds for one request with all its retries, unless a call gives another
            time-out.
        retries: how often a request is retried when no server answers, the connection breaks, or
            the server is overloaded. The wait grows, up to 5 s, and is at least the one that the
            server asks for. A time-out is not retried.
        batch_size: most images or texts in a request; the server's limit is
            `release().facts["max_batch_size"]`.
        concurrency: most requests under way at once for calls with lists, over all threads.
        api_key: the key that radapter-gateway asks for. Without TLS (https, grpcs) others can read
            it on the way.
        transport: sends requests instead of gRPC or HTTP, such as a fake server in tests.
        shrink_to: shorter side in pixels to which larger photos are reduced before they are sent,
            to classify, to embed and to search with: less to send, and less for the server to
            decode. Take twice the side of the model's input or more: answers change a little.
            `segment` sends images as they are.
        progress: show a bar on stderr while a call takes several requests.

    Raises:
        RAdapterClientError: from the constructor and every method, the same for every protocol;
            see its subclasses.

    Example:
        ```python
        with Client() as client:
            print(client.classify("cat.jpg", ["a cat", "a dog"]).top)
        ```
    """

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
        transport: Transport | None = None,
        progress: bool = False,
        shrink_to: int | None = None,
    ) -> None:
        if url is None:
            url = find_server() if transport is None else DEFAULT_URLS[0]
        self._url = parse_url(url)
        self._version = None if release is None else count("release", release, 1)
        self._batch_size = count("batch_size", batch_size, 1)
        self._shrink_to = None if shrink_to is None else count("shrink_to", shrink_to, MIN_SIDE)
        if api_key is not None:
            check_key(api_key, self._url)
        if transport is None and self._url.protocol == "grpc":
            from .grpc import GrpcTransport  # here, as this library and the next load slowly

            transport = GrpcTransport(self._url, api_key)
        elif transport is None:
            from ._http import HttpTransport

            transport = HttpTransport(self._url, api_key)
        self._sender = Sender(
            transport,
            timeout=check_seconds(timeout),
            retries=count("retries", retries),
            concurrency=count("concurrency", concurrency, 1),
            progress=progress,
        )

    def __repr__(self) -> str:
        pinned = "" if self._version is None else f", release={self._version}"
        return f"{type(self).__name__}({str(self._url)!r}{pinned})"

    def close(self) -> None:
        """Close the connections; calls under way in other threads fail."""
        self._sender.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @for_each
    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int | None = None,
        adapter: str | None = None,
        alpha: float | None = None,
        multi_label: bool = False,
        threshold: float | None = None,
        calibrated: bool = False,
        unknown: float | None = None,
        examples: Mapping[str, ImageLike | Sequence[ImageLike]] | None = None,
        example_weight: float | Mapping[str, float] | None = None,
        timeout: float | None = None,
    ) -> list[Classification]:
        """Find the best labels of an image, or of each image of a list: a `Classification`, or a
        list of them.

        Args:
            images: a path, the bytes of an image file, a PIL image, a uint8 array [H, W, 3] (RGB)
                or [H, W] (grey); or a list of them, such as `list_images` returns for a folder. The
                server turns an image according to its EXIF orientation, if the release does so.
            labels: the labels to choose from; synonyms after commas ("cat, kitty") count as one
                label. A request with new labels waits until they are embedded; for more than a few
                hundred (times templates) that stay the same, a label set is better.
            label_set: name of a set that was exported with the release (radapter-export
                --label-set), instead of labels.
            templates: prompts with {} for the label; None for the release's own.
            top_k: most labels to return; None for 5, or for all with multi_label.
            adapter: name of an adapter beside the release, whose map of the texts is applied; None
                for the release itself. An answer of another adapter raises a ServerError.
            alpha: weight in [0, 1] of the adapter that is named, None for its own; else of the
                release's, if it takes any (`release().dynamic_alpha`), None for its own.
            multi_label: score each label alone, so that several or no labels can be right.
                Needs a release with calibrated scores (`release().facts["confidence"]`).
            threshold: least score in [0, 1] of a label that multi_label returns; None for 0.5.
            calibrated: return scores that are probabilities of being right, as fitted on the
                release's validation data. The labels and their order stay the same.
            unknown: score in [0, 1], of a label alone as with multi_label, below which no label
                fits: the answer is then "unknown" alone. Needs calibrated scores.
            examples: images that show some of the labels, by label; without `labels`, the keys are
                the labels. A server keeps their embeddings, so they may be sent each time.
            example_weight: weight of a label's examples against its text, in [0, 1], for all labels
                or by label: 0 is the text alone, 1 leaves it out, and a label that a mapping leaves
                out has 0.5. None lets the server choose it by leaving out each example.
            timeout: seconds for the whole call; None for the client's own, for each request.

        Raises:
            InvalidRequest: bad arguments, or the release has no calibrated scores. InvalidImage, a
                subclass, for the first image that cannot be read.

        Example: `client.classify("cat.jpg", ["a cat", "a dog"]).top`
        """
        # Check the arguments.
        limit = self._sender.limit(timeout)
        items = several_images("images", images)
        names = list(examples) if labels is None and examples else labels
        options = checked(
            labels=names,
            label_set=label_set,
            templates=templates,
            top_k=top_k,
            adapter=adapter,
            alpha=alpha,
            multi_label=multi_label or None,
            threshold=threshold,
            calibrated=calibrated or None,
            unknown=unknown,
        )
        if examples is not None or example_weight is not None:
            shown = {} if examples is None else examples
            options |= example_values(list(names or []), shown, example_weight, self._shrink_to)

        # Limit the rows of a request, each of which repeats labels and templates.
        strings = sum(len(value) if isinstance(value, list) else 1 for value in options.values())
        rows = max(1, min(self._batch_size, MAX_STRINGS // max(1, strings)))

        # Ask in batches, and read the rows.
        replies = self._in_batches("classify", "image", items, options, rows, limit)
        answers = []
        with reading():
            for reply in replies:
                table = _output(reply, "score", np.float32, 2).tolist()
                receipts = _receipts(reply, 2, len(table), options)
                names_of_rows = _texts(reply, "label", 2)
                for row, scores, receipt in zip(names_of_rows, table, receipts, strict=True):
                    best = [label for label in row if label]  # shorter rows are padded with ""
                    answers.append(
                        Classification(best, scores[: len(best)], reply.version, receipt)
                    )
            _check_count(answers, items)
        return answers

    @for_each
    def segment(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        adapter: str | None = None,
        alpha: float | None = None,
        threshold: float | None = None,
        short_side: int | None = None,
        stride: int | None = None,
        refine: int | None = None,
        proposals: Any = None,
        proposal_scores: Any = None,
        proposal_weight: float | None = None,
        timeout: float | None = None,
    ) -> list[Segmentation]:
        """Label each pixel of an image: a `Segmentation`, or a list of them for a list of images.

        Each image is one request. Arguments that are not listed here are those of `classify`.

        Args:
            labels: as in `classify`; at most 65,534.
            threshold: probability in [0, 1] below which a pixel is background. With None, only
                pixels outside all proposals are background.
            short_side: shorter side in pixels of the working image that windows go over; None for
                1.5 windows.
            stride: pixels from one window to the next; None for half a window.
            refine: steps of pixel-adaptive refinement along the image's edges; None for 0.
            proposals: masks to classify instead of patches: bool, float in [0, 1] or uint8 (255
                inside) [N, H, W] of the image's own size, from any network that proposes masks. For
                a list of images, a list of them.
            proposal_scores: float [N, C], the proposal network's probabilities of the labels, to be
                fused with CLIP's.
            proposal_weight: w in [0, 1] of the fusion p = p_proposal^(1-w) p_clip^w (OVSeg); None
                for 0.7.

        Raises:
            InvalidRequest: as in `classify`.
            ModelNotFound: the release has no patch encoder, and no proposals were given.

        Example: `client.segment("street.jpg", ["road", "car",
        "sky"]).overlay().save("overlay.png")`
        """
        # Check the arguments.
        limit = self._sender.limit(timeout)
        items = several_images("images", images)
        length = None if is_one_image(images) else len(items)
        options = checked(
            labels=labels,
            label_set=label_set,
            templates=templates,
            adapter=adapter,
            alpha=alpha,
            threshold=threshold,
            short_side=short_side,
            stride=stride,
            refine=refine,
            proposal_weight=proposal_weight,
        )

        # Ask with one request for each image.
        masks = one_each("proposals", proposals, length)
        scores = one_each("proposal_scores", proposal_scores, length)

        def request(index: int, version: str) -> Request:
            values = proposal_values(masks[index], scores[index]) | options
            values["image"] = encode_image(items[index])
            return Request("infer", "segment", version, Values(values))

        parts = [partial(request, index) for index in range(len(items))]
        replies = self._infer("segment", parts, limit)

        # Read the masks, and note for `overlay` which releases turn images by EXIF.
        turned: dict[int, bool] = {}  # by release; asked for only if an image has to be turned
        if any(orientation(image) != 1 for image in items):
            served = self._served(limit)
            turned = {release.version: release.exif_orientation for release in served}
        answers = []
        with reading():
            for image, reply in zip(items, replies, strict=True):
                mask = _output(reply, "mask", np.uint16, 2)
                names = _texts(reply, "label", 1)
                if not mask.size or mask.max() >= len(names):
                    raise ValueError(f"mask {list(mask.shape)} with {len(names)} labels")
                background = None if threshold is None and proposals is None else len(names) - 1
                means = _output(reply, "score", np.float32, 1).tolist()
                upright = turned.get(reply.version, True)
                [receipt] = _receipts(reply, 1, 1, options)
                answer = Segmentation(
                    mask, names, means, reply.version, background, image, upright, receipt
                )
                answers.append(answer)
        return answers

    def search(
        self,
        text: str | Sequence[str] | None = None,
        *,
        image: ImageLike | Sequence[ImageLike] | None = None,
        id: str | Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        index: str,
        top_k: int = 10,
        where: str | None = None,
        min_score: float | Literal["calibrated"] | None = None,
        offset: int | None = None,
        index_version: str | None = None,
        thumbnails: bool = False,
        adapter: str | None = None,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> Hits:
        """Find the images of an index that are nearest to a text or an image, best first.

        Several texts, images and ids, at most 16, are one query: the weighted sum of their
        embeddings.

        Args:
            text: text to search for, or several.
            image: image to search with (as in `classify`), or several.
            id: id of an image of the index to search with, or several.
            weights: of texts, images and ids, in this order; negative weights lead away. None for 1
                each.
            index: name of an index that `radapter-index build` wrote and the server has.
            top_k: most hits to return.
            where: condition in SQL on the index's metadata, such as "year > 2020".
            min_score: least cosine of a hit, in [-1, 1]; "calibrated" for the one that was exported
                with the release, for a search with one text.
            offset: number of best hits to skip, 0 to 1000. Start paging with 0, and pass the
                `index_version` of the first page to the next ones.
            index_version: refuse to search another version of the index, as after it was replaced.
            thumbnails: return thumbnails with the hits.
            adapter: as in `classify`; it changes the texts of a query, and never images and ids.
            alpha: as in `classify`.
            timeout: as in `classify`.

        Raises:
            InvalidRequest: bad arguments, a page past the end, an unknown index, or one of another
                release; its message names the command that builds it.

        Example: `client.search("a red bicycle", index="photos", where="year > 2020")[0].id`
        """
        # Check the arguments.
        limit = self._sender.limit(timeout)
        images = [] if image is None else several_images("image", image)
        by_release = isinstance(min_score, str) and min_score == "calibrated"
        options = checked(
            text=[text] if isinstance(text, str) else text or None,
            id=[id] if isinstance(id, str) else id or None,
            weight=weights,
            index=index,
            top_k=top_k,
            where=where,
            min_score=None if by_release else min_score,
            calibrated=by_release or None,
            offset=offset,
            index_version=index_version,
            adapter=adapter,
            alpha=alpha,
        )
        if not images and not {"text", "id"} & options.keys():
            raise bad_argument("give a text, an image or an id to search for, or several of them")

        # Ask for the outputs that the call needs.
        outputs = ["id", "score", "metadata", RECEIPT]
        if thumbnails:
            outputs.append("thumbnail")
        paged = offset is not None or index_version is not None
        if paged:
            outputs.append("index_version")

        def request(version: str) -> Request:
            values = dict(options)
            if images:
                values["image"] = [encode_small(item, self._shrink_to) for item in images]
            return Request("infer", "retrieve", version, Values(values), outputs)

        try:
            [reply] = self._infer("retrieve", [request], limit)
        except InvalidRequest as error:
            # Only a server that is older than adapters refuses to give a receipt.
            if adapter is not None or RECEIPT not in str(error):
                raise
            outputs.remove(RECEIPT)
            [reply] = self._infer("retrieve", [request], limit)

        # Read the hits.
        hits = Hits()
        with reading():
            [hits.receipt] = _receipts(reply, 1, 1, options)
            ids = _texts(reply, "id", 1)
            scores = _output(reply, "score", np.float32, 1).tolist()
            metadata = _texts(reply, "metadata", 1)
            pictures = [b""] * len(ids)
            if thumbnails:
                pictures = _output(reply, "thumbnail", np.object_, 1).tolist()
            for name, score, facts, file in zip(ids, scores, metadata, pictures, strict=True):
                hits.append(Hit(name, score, dict(json.loads(facts)), bytes(file) or None))
            if paged:
                [hits.index_version] = _texts(reply, "index_version", 1)
        return hits

    def embed_images(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        adapter: str | None = None,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Embed images to unit length: float32 [N, D] in the order of a list, or [D] for one.

        The arguments and the exceptions are those of `classify`; an adapter changes no image.

        Example: `client.embed_images(["cat.jpg", "dog.jpg"]) @ client.embed_texts("a cat")`
        """
        options = checked(adapter=adapter, alpha=alpha)
        embeds = self._embed(
            "image", several_images("images", images), options, self._sender.limit(timeout)
        )
        return embeds[0] if is_one_image(images) else embeds

    def embed_texts(
        self,
        texts: str | Iterable[str],
        *,
        adapter: str | None = None,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Embed texts to unit length: float32 [N, D] in the order of a list, or [D] for one.

        Texts that are too long are cut as open_clip cuts them. The other arguments are those of
        `classify`.

        Example: `client.embed_texts(["a photo of a cat."]).shape`
        """
        items = several_texts("texts", [texts] if isinstance(texts, str) else texts)
        options = checked(adapter=adapter, alpha=alpha)
        embeds = self._embed("text", items, options, self._sender.limit(timeout))
        return embeds[0] if isinstance(texts, str) else embeds

    # The method names of open_clip and sentence-transformers.
    encode_image = embed_images
    encode_text = embed_texts

    @staticmethod
    def similarity(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Cosines of embeddings, float32 [N, M] for [N, D] and [M, D]; either may be a single [D].

        Example: `client.similarity(client.embed_images(paths), client.embed_texts(["a cat"]))`
        """
        return np.asarray(np.asarray(a, np.float32) @ np.asarray(b, np.float32).T)

    def release(self, *, timeout: float | None = None) -> Release:
        """Ask the server for the release that calls use: the one given to the client, or the
        newest.

        Example: `client.release().alpha`
        """
        return self._release(self._sender.limit(timeout))

    def releases(self, *, timeout: float | None = None) -> list[Release]:
        """List all releases that the server serves, oldest first.

        Example: `[release.version for release in client.releases()]`
        """
        return self._served(self._sender.limit(timeout))

    def indexes(self, *, timeout: float | None = None) -> list[str]:
        """List the names of the indexes that `search` can search, in alphabetical order.

        Raises:
            InvalidRequest: the server does not list them, such as Triton.

        Example: `client.indexes()`
        """
        try:
            limit = self._sender.limit(timeout)
            [reply] = self._sender.ask([partial(Request, "indexes", "retrieve")], limit)
        except (InvalidRequest, ModelNotFound) as error:
            if error.code is not None:
                raise
            raise InvalidRequest(
                "this server does not list its indexes, for Triton has no call for it; ask"
                " radapter-gateway --indexes DIR, or radapter-serve --engine process"
            ) from error
        with reading():
            return [str(name) for name in reply["indexes"]]

    def is_ready(self, *, timeout: float | None = None) -> bool:
        """True if the server can answer every method in the client's release; False also if no
        server answers.

        Example: `while not client.is_ready(): time.sleep(1)`
        """
        version = "" if self._version is None else str(self._version)
        try:
            limit = self._sender.limit(timeout)
            parts = [partial(Request, "ready", task, version) for task in TASKS]
            return all(self._sender.ask(parts, limit))
        except (ServerUnavailable, Timeout, ModelNotFound):
            return False

    # Requests and replies that the methods share

    def _release(self, limit: Limit) -> Release:
        releases = self._served(limit)
        if self._version is None:
            return releases[-1]
        for release in releases:
            if release.version == self._version:
                return release
        served = ", ".join(str(release.version) for release in releases)
        raise ModelNotFound(
            f"the server does not serve release {self._version}; it serves {served}"
        )

    def _embed(
        self, kind: str, items: list[Any], options: dict[str, Any], limit: Limit
    ) -> Embeddings:
        if not items:
            width = self._release(limit).embed_dim
            with reading():
                return np.zeros((0, width), np.float32)
        size = self._batch_size
        replies = self._in_batches(f"embed_{kind}", kind, items, options, size, limit)
        with reading():
            parts = []
            receipts: set[Receipt | None] = set()
            for reply in replies:
                part = _output(reply, f"{kind}_embeds", np.float32, 2)
                receipts.update(_receipts(reply, 2, len(part), options))
                parts.append(part)
            # An array has no receipt for each row, so all rows must be of the same adapter.
            adapter = options.get("adapter")
            if adapter is not None and len(receipts) > 1:
                raise ServerError(
                    f"the adapter {shown(adapter)} was replaced in the middle of the call; ask"
                    " again"
                )
            embeds: Embeddings = np.concatenate(parts)
            _check_count(embeds, items)
        return embeds

    def _in_batches(
        self,
        task: str,
        name: str,
        items: list[Any],
        options: dict[str, Any],
        rows: int,
        limit: Limit,
    ) -> list[Reply]:
        """Ask for the items in batches of at most `rows`, all with the same options."""
        room = MAX_BYTES - sum(map(len, options.get("examples", ())))
        sizes = [len(item.encode()) if name == "text" else size_bound(item) for item in items]

        def request(run: range, version: str) -> Request:
            values = [items[row] for row in run]
            if name == "image":
                values = [encode_small(item, self._shrink_to) for item in values]
            return Request("infer", task, version, Rows(options | {name: values}, name))

        parts = [partial(request, run) for run in chunks(sizes, rows, room)]
        return self._infer(task, parts, limit)

    def _infer(
        self, task: str, parts: Sequence[Callable[[str], Request]], limit: Limit
    ) -> list[Reply]:
        """Run inferences of a task, all in one release; each of `parts` makes a request for a
        version. Starts again if another release took over meanwhile.
        """
        version = self._version
        free = version is None and len(parts) > 1
        if free:
            version = self._served(limit, task)[-1].version
        starts = MAX_STARTS if free else 1
        while True:
            starts -= 1
            number = "" if version is None else str(version)
            try:
                replies = self._sender.ask([partial(part, number) for part in parts], limit)
            except (ModelNotFound, ServerUnavailable):
                before = version
                if starts:
                    version = self._served(limit, task)[-1].version
                if version == before:
                    raise
                continue
            for reply in replies:
                if version not in (None, reply.version):
                    raise ServerError(
                        f"release {reply.version} answered, and release {version} was asked"
                    )
            return replies

    def _served(self, limit: Limit, task: str = TASKS[-1]) -> list[Release]:
        # The configuration of the newest version names every release.
        [config] = self._sender.ask([partial(Request, "config", task)], limit)
        with reading():
            return read_releases(config)


def _receipts(
    reply: Reply, axes: int, rows: int, options: Mapping[str, Any]
) -> list[Receipt | None]:
    """Read the receipt of each row of an answer, and refuse an answer of another adapter, α or
    release than was asked; a server that is older than adapters gives none.
    """
    adapter = options.get("adapter")
    alpha = options.get("alpha")
    if RECEIPT not in reply.outputs:
        if adapter is None:
            return [None] * rows
        raise ServerError(
            f"the answer has no receipt, so it may be of another adapter than {shown(adapter)}; the"
            " server is older than adapters"
        )
    asked = f"adapter {shown(adapter)}" if adapter else "no adapter"
    if alpha is not None:
        asked += f" at alpha {alpha:g}"
    receipts: list[Receipt | None] = []
    for text in np.ravel(_texts(reply, RECEIPT, axes)).tolist():
        receipt = Receipt.read(text)
        receipts.append(receipt)
        name = None if receipt.adapter is None else _composed(receipt.adapter)
        other_alpha = alpha is not None and not abs(receipt.alpha - alpha) <= SAME_ALPHA
        if name != (adapter and _composed(adapter)) or other_alpha:
            answered = f"adapter {shown(name)}" if name else "no adapter"
            raise ServerError(
                f"the server answered with {answered} at alpha {receipt.alpha:g}, and {asked} was"
                " asked; the answer is not returned"
            )
        if receipt.release != reply.version:
            raise ServerError(
                f"the receipt of the answer is of release {receipt.release}, and release"
                f" {reply.version} answered"
            )
    if len(receipts) != rows:
        raise ValueError(f"{len(receipts)} receipts for {rows} rows")
    return receipts


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _check_count(answers: Any, items: list[Any]) -> None:
    if len(answers) != len(items):
        raise ValueError(f"{len(answers)} answers for {len(items)} rows")


def _output(reply: Reply, name: str, kind: type[np.generic], axes: int) -> npt.NDArray[Any]:
    array = reply.outputs[name]
    if array.dtype != kind or array.ndim != axes:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
    return array


def _texts(reply: Reply, name: str, axes: int) -> list[Any]:
    """Decode an output of texts: a list, or a list of lists if the task has a batch."""

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(entry) for entry in value]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    outputs = reply.outputs
    if isinstance(outputs, Values) and isinstance(outputs.plain.get(name), list):
        texts: list[Any] = decoded(outputs.plain[name])  # an in-process reply needs no array
    else:
        texts = decoded(_output(reply, name, np.object_, axes).tolist())
    return texts
