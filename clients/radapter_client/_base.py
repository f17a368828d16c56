"""What the two clients share: everything but the waiting.

A method of a client is a Plan: parts of work that each become one request, and how their replies become the answer.
Here the plans are made; Client runs one with threads, AsyncClient with tasks. A new method
is a plan here and a line in each.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._arguments import (
    alpha_input,
    count,
    for_each,
    image_input,
    label_inputs,
    listed,
    proposal_inputs,
    search_inputs,
    seconds,
    segment_inputs,
    utf8,
)
from ._exceptions import ModelNotFound, RAdapterClientError, ServerError, ServerUnavailable, Timeout
from ._images import ImageLike, chunks, encode_image, is_one_image, size_bound
from ._profile import Totals, read_statistics
from ._results import Classification, Hit, Release, Segmentation, pick_release, read_hits, read_releases
from ._url import parse_url
from ._wire import Array, Request, Tensors, text_array

T = TypeVar("T")
Embeddings = npt.NDArray[np.float32]

TASKS = ("embed_image", "embed_text", "retrieve", "segment", "classify")
NOT_READY = (ServerUnavailable, Timeout, ModelNotFound)
# Half of the smallest limit on a request's body in use (64 MiB, newer Tritons over HTTP).
MAX_BYTES = 32 * 2**20
# Labels and templates are repeated for each row of a request; this many keep it small beside its images.
MAX_STRINGS = 8192


@dataclass(frozen=True)
class Plan(Generic[T]):
    """What a call does.

    Args:
        parts: each makes one request, when its turn comes.
        finish: the answer from the replies, in the parts' order.
        one_release: several requests whose replies must come from one release.
    """

    parts: Sequence[Callable[[], Request]]
    finish: Callable[[list[Any]], T]
    one_release: bool = False


class BaseClient:
    def __init__(self, url: str, *, release: int | None, timeout: float, batch_size: int, concurrency: int) -> None:
        self._url = parse_url(url)
        self._version = None if release is None else count("release", release)
        self._timeout = seconds(timeout)
        self._batch_size = count("batch_size", batch_size)
        self._concurrency = count("concurrency", concurrency)
        self._closed = False

    def __repr__(self) -> str:
        pinned = "" if self._version is None else f", release={self._version}"
        return f"{type(self).__name__}({str(self._url)!r}{pinned})"

    def _start(self, timeout: float | None) -> float:
        """The time-out of a call that begins, in seconds."""
        if self._closed:
            raise RAdapterClientError("the client is closed; make a new one")
        return self._timeout if timeout is None else seconds(timeout)

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        """Each protocol has its own way to fail in a call under way when its connection is closed."""
        try:
            yield
        except RAdapterClientError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if self._closed:
                raise RAdapterClientError("the client was closed in the middle of a call") from error
            raise

    def _pinned(self, request: Request, version: int | None) -> Request:
        if request.action in ("config", "statistics") or version is None:
            return request  # the newest configuration names every release
        return replace(request, version=str(version))

    # The plans

    def _ready(self) -> Plan[bool]:
        return Plan([partial(Request, "ready", task) for task in TASKS], all)

    def _releases(self) -> Plan[list[Release]]:
        return Plan([partial(Request, "config", TASKS[-1])], lambda replies: read_releases(replies[0]))

    def _release(self) -> Plan[Release]:
        releases = self._releases()
        return Plan(releases.parts, lambda replies: pick_release(releases.finish(replies), self._version))

    def _statistics(self) -> Plan[Totals]:
        return Plan([partial(Request, "statistics", "")], lambda replies: read_statistics(replies[0]))

    def _embed_images(self, images: Iterable[ImageLike], alpha: float | None = None) -> Plan[Embeddings]:
        items = listed("images", images)
        sizes = list(map(size_bound, items))
        return self._embed("embed_image", "image", "image_embeds", items, encode_image, sizes, alpha)

    def _embed_texts(self, texts: Iterable[str], alpha: float | None = None) -> Plan[Embeddings]:
        items = [utf8("texts", text) for text in listed("texts", texts)]
        return self._embed("embed_text", "text", "text_embeds", items, bytes, list(map(len, items)), alpha)

    def _embed(
        self,
        task: str,
        name: str,
        output: str,
        items: list[Any],
        encode: Callable[[Any], bytes],
        sizes: list[int],
        alpha: float | None,
    ) -> Plan[Embeddings]:
        options = alpha_input(alpha)
        if not items:
            release = self._release()
            return Plan(release.parts, lambda replies: np.zeros((0, release.finish(replies).embed_dim), np.float32))

        def part(rows: range) -> Request:
            inputs = _rows(options, len(rows)) | {name: text_array([[encode(items[row])] for row in rows])}
            return Request("infer", task, inputs=inputs)

        def finish(replies: list[Tensors]) -> Embeddings:
            return np.concatenate([_output(reply, output) for reply in replies]).astype(np.float32, copy=False)

        runs = chunks(sizes, self._batch_size, MAX_BYTES)
        return Plan([partial(part, rows) for rows in runs], finish, one_release=len(runs) > 1)

    def _classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None,
        label_set: str | None,
        templates: Sequence[str] | None,
        top_k: int,
        alpha: float | None = None,
    ) -> Plan[Any]:
        """Gives one Classification for one image, else a list of them."""
        one = is_one_image(images)
        items: list[Any] = [images] if one else listed("images", images)
        options = label_inputs(labels, label_set, templates) | alpha_input(alpha)
        options["top_k"] = np.array([count("top_k", top_k)], np.int32)

        def part(rows: range) -> Request:
            inputs = _rows(options, len(rows)) | {"image": text_array([[encode_image(items[row])] for row in rows])}
            return Request("infer", "classify", inputs=inputs)

        def finish(replies: list[Tensors]) -> Classification | list[Classification]:
            found = [
                Classification(_texts(names), scores.tolist(), reply.version)
                for reply in replies
                for names, scores in zip(_output(reply, "label"), _output(reply, "score"), strict=True)
            ]
            return found[0] if one else found

        strings = sum(map(len, options.values()))
        rows = max(1, min(self._batch_size, MAX_STRINGS // strings))
        runs = chunks(list(map(size_bound, items)), rows, MAX_BYTES)
        return Plan([partial(part, run) for run in runs], finish, one_release=len(runs) > 1)

    def _segment(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None,
        label_set: str | None,
        templates: Sequence[str] | None,
        threshold: float | None,
        short_side: int | None,
        stride: int | None,
        refine: int | None,
        proposals: Any,
        proposal_scores: Any,
        proposal_weight: float | None,
        alpha: float | None = None,
    ) -> Plan[Any]:
        """Gives one Segmentation for one image, else a list of them; a request takes one image."""
        one = is_one_image(images)
        items: list[Any] = [images] if one else listed("images", images)
        many = None if one else len(items)
        options = label_inputs(labels, label_set, templates) | alpha_input(alpha)
        options |= segment_inputs(threshold, short_side, stride, refine)
        masks, scores = for_each("proposals", proposals, many), for_each("proposal_scores", proposal_scores, many)

        def part(index: int) -> Request:
            given = proposal_inputs(items[index], masks[index], scores[index], proposal_weight)
            return Request("infer", "segment", inputs={"image": image_input(items[index]), **options, **given})

        def finish(replies: list[Tensors]) -> Segmentation | list[Segmentation]:
            found = []
            for image, reply in zip(items, replies, strict=True):
                mask, names = _output(reply, "mask"), _texts(_output(reply, "label"))
                if mask.ndim != 2 or not mask.size or mask.max() >= len(names):
                    raise ServerError(f"the server's mask {list(mask.shape)} does not fit its {len(names)} labels")
                background = None if threshold is None and proposals is None else len(names) - 1
                scored = _output(reply, "score").tolist()
                found.append(Segmentation(mask, names, scored, reply.version, background, image))
            return found[0] if one else found

        return Plan([partial(part, index) for index in range(len(items))], finish, one_release=len(items) > 1)

    def _search(
        self, text: str | None, image: ImageLike | None, index: str, top_k: int, where: str | None, thumbnails: bool
    ) -> Plan[list[Hit]]:
        options = search_inputs(text, image, index, top_k, where)
        outputs = ("id", "score", "metadata", *(["thumbnail"] if thumbnails else []))

        def part() -> Request:
            inputs = options if image is None else {"image": image_input(image), **options}
            return Request("infer", "retrieve", inputs=inputs, outputs=outputs)

        def finish(replies: list[Tensors]) -> list[Hit]:
            return read_hits(*(_output(replies[0], name) for name in outputs))

        return Plan([part], finish)

    @staticmethod
    def _sample_image(release: Release) -> Image.Image:
        """A picture of the size that the release takes, for a request whose time is measured."""
        side = int(release.facts.get("preprocess", {}).get("size", 224))
        return Image.radial_gradient("L").resize((side, side)).convert("RGB")


def _rows(options: dict[str, Array], count: int) -> dict[str, Array]:
    """What all rows of a request share, once for each."""
    return {name: np.tile(array, (count, 1)) for name, array in options.items()}


def _output(reply: Tensors, name: str) -> Array:
    if name not in reply.outputs:
        raise ServerError(f"the server's answer has no {name!r}, but {sorted(reply.outputs)}")
    return reply.outputs[name]


def _texts(array: Array) -> list[str]:
    return [text.decode("utf-8", "replace") for text in array]
