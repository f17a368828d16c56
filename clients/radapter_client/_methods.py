"""The methods that both clients have, what they ask and what they answer.

A method is written once, and never waits: it is a generator that yields parts of work, each of
which makes one request, is sent their replies, and returns the answer. `Client` runs it with
threads, `AsyncClient` with tasks. `call` and `call_each` are the decorators for that; type checkers
see the method of each client with its own arguments and result.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    overload,
)

import numpy as np
import numpy.typing as npt

from ._arguments import (
    ImageLike,
    chunks,
    counts,
    encode_image,
    encode_small,
    example_values,
    for_each,
    is_one_image,
    label_values,
    numbers,
    orientation,
    proposal_values,
    query_values,
    result_values,
    several_images,
    several_texts,
    size_bound,
)
from ._results import (
    Classification,
    Hit,
    Hits,
    Release,
    Segmentation,
    pick_release,
    read_releases,
)
from ._wire import Reply, Request, Rows, Values
from .failures import (
    InvalidRequest,
    ModelNotFound,
    ServerError,
    ServerUnavailable,
    Timeout,
    bad_argument,
)

P = ParamSpec("P")
T = TypeVar("T")
# By these, type checkers tell the clients apart, which are below this file.
Waiting: TypeAlias = AbstractContextManager[Any]  # `Client`
Awaiting: TypeAlias = AbstractAsyncContextManager[Any]  # `AsyncClient`
Part: TypeAlias = Callable[[], Request]
# What a method answers: `Client` returns T, `AsyncClient` returns an awaitable of T.
Answer: TypeAlias = Generator[Sequence[Part], list[Any], T]


Embeddings = npt.NDArray[np.float32]

TASKS = ("embed_image", "embed_text", "retrieve", "segment", "classify")
# Half of the smallest limit on a request's body in use (64 MiB, newer Tritons over HTTP).
MAX_BYTES = 32 * 2**20
# Labels and templates are repeated for each row of a request; this many keep it small compared with
# its images.
MAX_STRINGS = 8192


# How a method becomes one of each client


class call(Generic[P, T]):
    """A method of both clients, with the keyword `timeout` for the client to keep to."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Answer[T]]) -> None:
        self._steps: Callable[..., Answer[Any]] = steps
        self.__doc__ = steps.__doc__

    @overload
    def __get__(self, client: None, kind: type) -> Callable[Concatenate[Any, P], Answer[T]]: ...
    @overload
    def __get__(self, client: Waiting, kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, kind: type) -> Any:
        if client is None:
            return self._steps

        @functools.wraps(MethodType(self._steps, client))
        def method(*args: Any, **kwargs: Any) -> Any:
            return client._run(self._steps(client, *args, **kwargs), kwargs.get("timeout"))

        return method


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


class call_each(Generic[P, T]):
    """A method of both clients that answers for one image, or with a list for a list of images;
    what is decorated always answers with a list.
    """

    def __init__(self, steps: Callable[Concatenate[Any, Any, P], Answer[list[T]]]) -> None:
        @functools.wraps(steps)
        def one_or_list(client: Any, images: Any, *args: P.args, **kwargs: P.kwargs) -> Answer[Any]:
            answers = yield from steps(client, images, *args, **kwargs)
            return answers[0] if is_one_image(images) else answers

        self._call = call(one_or_list)  # type: ignore[arg-type]
        self.__doc__ = steps.__doc__

    @overload
    def __get__(self, client: Waiting, kind: type) -> _Each[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, kind: type) -> _AsyncEach[P, T]: ...
    def __get__(self, client: Any, kind: type) -> Any:
        return self._call.__get__(client, kind)


class Methods:
    """The methods of both clients; these set what is declared here, and run them."""

    _version: int | None
    _batch_size: int
    _shrink_to: int | None

    @call_each
    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int | None = None,
        alpha: float | None = None,
        multi_label: bool = False,
        threshold: float | None = None,
        calibrated: bool = False,
        unknown: float | None = None,
        examples: Mapping[str, ImageLike | Sequence[ImageLike]] | None = None,
        example_weight: float | Mapping[str, float] | None = None,
        timeout: float | None = None,
    ) -> Answer[list[Classification]]:
        """The best labels of an image, or of each of a list of images: a `Classification`, or a
        list of them.

        Args:
            images: a path, the bytes of an image file, a PIL image, a uint8 array [H, W, 3] (RGB)
                or [H, W] (grey); or a list of them, such as `list_images` gives of a folder. The
                server turns an image by its EXIF
                orientation, unless its release says otherwise.
            labels: the labels to choose from; synonyms after commas ("cat, kitty") count as one
                label. The first request with new ones waits until they are embedded; more than
                some hundred (times templates) that stay the same are better a label set.
            label_set: instead of labels, the name of a set that was exported with the release
                (radapter-export --label-set).
            templates: prompts with {} for the label; None for the release's own.
            top_k: labels to return, fewer where there are fewer; None for 5, or with multi_label
                for all.
            alpha: the adapter's weight in [0, 1], of a release that takes any
                (`release().dynamic_alpha`); None for the release's own.
            multi_label: score each label by itself, so that several can be right, or none. Needs a
                release with calibrated scores (`release().facts["confidence"]`).
            threshold: score in [0, 1] from which a label is returned, of multi_label; None for 0.5.
            calibrated: scores that say how often a label is right, as the release was fitted to
                validation data. The labels and their order stay the same.
            unknown: score in [0, 1], of a label by itself as with multi_label, below which no label
                fits: the answer is then "unknown" alone. Needs calibrated scores.
            examples: images that show some of the labels, by label; without labels, its keys are
                the labels. A server keeps their embeddings, so they may be sent each time.
            example_weight: weight of a label's examples against its text, in [0, 1], for all labels
                or by label; 1 leaves the text out, 0.5 is taken where none is given.
            timeout: seconds for each request of this call; None for the client's own.

        Raises:
            InvalidRequest: bad arguments, or the release has no calibrated scores; InvalidImage
                among them, for the first image that cannot be read.

        Example: `client.classify("cat.jpg", ["a cat", "a dog"]).top`
        """
        items = several_images("images", images)
        names = list(examples) if labels is None and examples else labels
        options = label_values(names, label_set, templates)
        options |= numbers(alpha=alpha, threshold=threshold, unknown=unknown)
        options |= counts(top_k=5 if top_k is None and not multi_label else top_k)
        if multi_label:
            options["multi_label"] = True
        if calibrated:
            options["calibrated"] = True
        if not isinstance(example_weight, Mapping):
            weight = numbers(example_weight=example_weight)
            options |= {name: [value] for name, value in weight.items()}
        room = MAX_BYTES
        if examples is not None:
            options |= example_values(list(names or []), examples, example_weight, self._shrink_to)
            room -= sum(map(len, options["examples"]))
            if room < MAX_BYTES // 2:
                raise bad_argument(
                    f"examples of {(MAX_BYTES - room) / 2**20:.0f} MiB; at most"
                    f" {MAX_BYTES // 2**21} MiB are allowed, so send smaller ones"
                )
        strings = sum(len(value) if isinstance(value, list) else 1 for value in options.values())
        rows = max(1, min(self._batch_size, MAX_STRINGS // strings))
        runs = chunks(list(map(size_bound, items)), rows, room)
        replies = yield from self._infer(
            "classify",
            [
                partial(_batch, "classify", "image", items, run, options, self._shrink_to)
                for run in runs
            ],
        )
        answers = []
        for reply in replies:
            rows_of_scores = _output(reply, "score")
            for row, scores in zip(_texts(reply, "label"), rows_of_scores, strict=True):
                best = [label for label in row if label]  # empty ones fill up a shorter row
                answer = Classification(best, scores[: len(best)].tolist(), reply.version)
                answers.append(answer)
        return answers

    @call_each
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
    ) -> Answer[list[Segmentation]]:
        """Which label each pixel of an image has: a `Segmentation`, or a list of them for a list of
        images.

        Each image is one request. The arguments that are not named here are those of `classify`.

        Args:
            labels: as in `classify`; at most 65,534.
            threshold: probability in [0, 1] below which a pixel is background; None: only those in
                no proposal are.
            short_side: shorter side in pixels of the working image that windows go over; None for
                1.5 windows.
            stride: pixels from one window to the next; None for half a window.
            refine: steps of pixel-adaptive refinement along the image's edges; None for 0.
            proposals: masks to classify instead of patches: bool, float in [0, 1] or uint8 (255
                inside) [N, H, W] of the image's own size, from any network that proposes masks. For
                a list of images, a list of them.
            proposal_scores: float [N, C], the proposals' own probabilities of the labels, to be
                fused with CLIP's.
            proposal_weight: w in [0, 1] of the fusion p = p_proposal^(1-w) p_clip^w (OVSeg); None
                for 0.7.

        Raises:
            InvalidRequest: as in `classify`.
            ModelNotFound: the release has no patch encoder, and no proposals were given.

        Example: `client.segment("street.jpg", ["road", "car",
        "sky"]).overlay().save("overlay.png")`
        """
        items = several_images("images", images)
        length = None if is_one_image(images) else len(items)
        options = label_values(labels, label_set, templates)
        options |= numbers(alpha=alpha, threshold=threshold)
        options |= counts(short_side=short_side, stride=stride) | counts(0, refine=refine)
        masks = for_each("proposals", proposals, length)
        scores = for_each("proposal_scores", proposal_scores, length)

        def part(index: int) -> Request:
            item = items[index]
            values = proposal_values(item, masks[index], scores[index], proposal_weight)
            values |= {"image": encode_image(item), **options}
            return Request("infer", "segment", inputs=Values(values))

        replies = yield from self._infer(
            "segment", [partial(part, index) for index in range(len(items))]
        )
        turned: dict[int, bool] = {}  # by release, asked only where it matters
        if any(orientation(image) != 1 for image in items):
            turned = {
                release.version: release.exif_orientation for release in (yield from self._served())
            }
        answers = []
        for image, reply in zip(items, replies, strict=True):
            mask = _output(reply, "mask")
            names = _texts(reply, "label")
            if mask.ndim != 2 or not mask.size or mask.max() >= len(names):
                raise ServerError(
                    f"the server's mask {list(mask.shape)} does not fit its {len(names)} labels"
                )
            background = None if threshold is None and proposals is None else len(names) - 1
            means = _output(reply, "score").tolist()
            upright = turned.get(reply.version, True)
            answers.append(
                Segmentation(mask, names, means, reply.version, background, image, upright)
            )
        return answers

    @call
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
        timeout: float | None = None,
    ) -> Answer[Hits]:
        """The images of an index that are nearest to a text or an image, best first.

        Several texts, images and ids, at most 16, are one query: the weighted sum of their
        embeddings.

        Args:
            text: what to search for, or several; or
            image: an image (as in `classify`) to find the like of, or several; or
            id: an image of the index, by its id, or several.
            weights: of texts, images and ids, in this order; negative ones lead away. None for 1
                each.
            index: name of an index that `radapter-index build` wrote and the server has.
            top_k: hits to return, fewer where there are fewer.
            where: condition in SQL on the index's metadata, such as "year > 2020".
            min_score: cosine in [-1, 1] from which images are returned; "calibrated" for the one
                that the release was exported with, of a search by one text.
            offset: images to leave out before the first, 0 to 1000. Pages of one search begin with
                0, and go on with the `index_version` of the first page.
            index_version: refuse to search another version of the index, as after it was replaced.
            thumbnails: whether hits bring their thumbnails.
            timeout: as in `classify`.

        Raises:
            InvalidRequest: bad arguments, a page past the end, an unknown index, or one of another
                release; its message names the command that builds it.

        Example: `client.search("a red bicycle", index="photos", where="year > 2020")[0].id`
        """
        query, images = query_values(text, image, id, weights)
        options = result_values(index, top_k, where, min_score, offset, index_version)
        outputs = ["id", "score", "metadata"]
        if thumbnails:
            outputs.append("thumbnail")
        paged = offset is not None or index_version is not None
        asked = [*outputs, "index_version"] if paged else outputs

        def part() -> Request:
            values = query | options
            if images:
                values["image"] = [encode_small(item, self._shrink_to) for item in images]
            return Request("infer", "retrieve", inputs=Values(values), outputs=tuple(asked))

        [reply] = yield from self._infer("retrieve", [part])
        ids = _texts(reply, "id")
        scores = _output(reply, "score").tolist()
        metadata = _texts(reply, "metadata")
        pictures = list(_output(reply, "thumbnail")) if thumbnails else [b""] * len(ids)
        hits = Hits()
        try:
            for name, score, facts, file in zip(ids, scores, metadata, pictures, strict=True):
                hits.append(Hit(name, score, json.loads(facts), bytes(file) or None))
        except ValueError as error:
            raise ServerError(f"the server's hits cannot be read: {error}") from error
        if paged:
            [hits.index_version] = _texts(reply, "index_version")
        return hits

    @call
    def embed_images(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> Answer[Embeddings]:
        """Embeddings of images, unit length: float32 [N, D] in the order of a list, or [D] of one.

        The arguments and the exceptions are those of `classify`.

        Example: `client.embed_images(["cat.jpg", "dog.jpg"]) @ client.embed_texts("a cat")`
        """
        items = several_images("images", images)
        embeds = yield from self._embed("image", items, list(map(size_bound, items)), alpha)
        return embeds[0] if is_one_image(images) else embeds

    @call
    def embed_texts(
        self,
        texts: str | Iterable[str],
        *,
        alpha: float | None = None,
        timeout: float | None = None,
    ) -> Answer[Embeddings]:
        """Embeddings of texts, unit length: float32 [N, D] in the order of a list, or [D] of one.

        Texts that are too long are cut as by open_clip. The other arguments are those of
        `classify`.

        Example: `client.embed_texts(["a photo of a cat."]).shape`
        """
        items = several_texts("texts", [texts] if isinstance(texts, str) else texts)
        sizes = [len(text.encode()) for text in items]
        embeds = yield from self._embed("text", items, sizes, alpha)
        return embeds[0] if isinstance(texts, str) else embeds

    # The names of open_clip and of sentence-transformers.
    encode_image = embed_images
    encode_text = embed_texts

    @staticmethod
    def similarity(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Cosines of embeddings, of a list with a list float32 [N, M]; each may also be one, [D].

        Example: `client.similarity(client.embed_images(paths), client.embed_texts(["a cat"]))`
        """
        return np.asarray(np.asarray(a, np.float32) @ np.asarray(b, np.float32).T)

    @call
    def release(self, *, timeout: float | None = None) -> Answer[Release]:
        """The release that calls use, asked of the server: the one given to the client, or the
        newest.

        Example: `client.release().alpha`
        """
        return pick_release((yield from self._served()), self._version)

    @call
    def releases(self, *, timeout: float | None = None) -> Answer[list[Release]]:
        """All releases that the server serves, oldest first.

        Example: `[release.version for release in client.releases()]`
        """
        return (yield from self._served())

    @call
    def indexes(self, *, timeout: float | None = None) -> Answer[list[str]]:
        """The names of the indexes that `search` can search, in alphabetical order.

        Raises:
            InvalidRequest: a server that does not list them, such as Triton.

        Example: `client.indexes()`
        """
        try:
            [reply] = yield [partial(Request, "indexes", "retrieve")]
        except (InvalidRequest, ModelNotFound) as error:
            if error.code is not None:
                raise
            raise InvalidRequest(
                "this server does not list its indexes, for Triton has no call for it; ask"
                " radapter-gateway --indexes DIR, or radapter-serve --engine process"
            ) from error
        try:
            return [str(name) for name in reply["indexes"]]
        except (KeyError, TypeError) as error:
            raise ServerError("the server's list of indexes cannot be read") from error

    @call
    def is_ready(self, *, timeout: float | None = None) -> Answer[bool]:
        """Whether the server can answer every method, in the client's release; False also where
        no server answers.

        Example: `while not client.is_ready(): time.sleep(1)`
        """
        version = "" if self._version is None else str(self._version)
        try:
            return all((yield [partial(Request, "ready", task, version) for task in TASKS]))
        except (ServerUnavailable, Timeout, ModelNotFound):
            return False

    # What the methods share

    def _infer(self, task: str, parts: Sequence[Part]) -> Answer[list[Reply]]:
        """The replies to inferences of a task, all from one release; asked again where another took
        over meanwhile.
        """
        version = self._version
        free = self._version is None and len(parts) > 1
        if free:
            version = (yield from self._served(task))[-1].version
        while True:
            number = "" if version is None else str(version)
            try:
                return (yield [partial(_pinned, part, number) for part in parts])
            except (ModelNotFound, ServerUnavailable):
                before = version
                if free:
                    version = (yield from self._served(task))[-1].version
                if version == before:
                    raise

    def _served(self, task: str = TASKS[-1]) -> Answer[list[Release]]:
        # The newest configuration names every release.
        [config] = yield [partial(Request, "config", task)]
        return read_releases(config)

    def _embed(
        self, kind: str, items: list[Any], sizes: list[int], alpha: float | None
    ) -> Answer[Embeddings]:
        options = numbers(alpha=alpha)
        if not items:
            release = pick_release((yield from self._served()), self._version)
            return np.zeros((0, release.embed_dim), np.float32)
        runs = chunks(sizes, self._batch_size, MAX_BYTES)
        task = f"embed_{kind}"
        replies = yield from self._infer(
            task,
            [partial(_batch, task, kind, items, run, options, self._shrink_to) for run in runs],
        )
        embeds: list[Embeddings] = [_output(reply, f"{kind}_embeds") for reply in replies]
        return np.concatenate(embeds).astype(np.float32, copy=False)


def _batch(
    task: str,
    name: str,
    items: list[Any],
    rows: range,
    options: dict[str, Any],
    shrink_to: int | None,
) -> Request:
    """The request for some images or texts, and the options that they share."""
    values = [items[row] for row in rows]
    if name == "image":
        values = [encode_small(item, shrink_to) for item in values]
    return Request("infer", task, inputs=Rows(options | {name: values}, name))


def _pinned(part: Part, version: str) -> Request:
    return replace(part(), version=version)


def _output(reply: Reply, name: str) -> Any:
    if name not in reply.outputs:
        raise ServerError(f"the server's answer has no {name!r}, but {sorted(reply.outputs)}")
    return reply.outputs[name]


def _texts(reply: Reply, name: str) -> list[Any]:
    """An output of texts: a list, or with a batch a list of lists."""

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(entry) for entry in value]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    outputs = reply.outputs
    if isinstance(outputs, Values) and isinstance(outputs.plain.get(name), list):
        texts: list[Any] = decoded(outputs.plain[name])  # in this process no array is made
    else:
        texts = decoded(_output(reply, name).tolist())
    return texts
