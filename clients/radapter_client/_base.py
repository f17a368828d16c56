"""What the two clients share: everything but the waiting.

A method of a client is a Plan: parts of work that each become one request, and how their replies become the answer.
Here the plans are made; Client runs one with threads, AsyncClient with tasks. A new method
is a plan here and a line in each.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._exceptions import InvalidRequest, ModelNotFound, RAdapterClientError, ServerError, ServerUnavailable, Timeout
from ._images import ImageLike, chunks, encode_image, is_one_image, size_bound
from ._profile import Totals, read_statistics
from ._results import Classification, Release, pick_release, read_releases
from ._url import parse_url
from ._wire import Array, Request, Tensors, text_array

T = TypeVar("T")
Embeddings = npt.NDArray[np.float32]

TASKS = ("embed_image", "embed_text", "classify")
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
        self._version = None if release is None else _count("release", release)
        self._timeout = _seconds(timeout)
        self._batch_size = _count("batch_size", batch_size)
        self._concurrency = _count("concurrency", concurrency)
        self._closed = False

    def __repr__(self) -> str:
        pinned = "" if self._version is None else f", release={self._version}"
        return f"{type(self).__name__}({str(self._url)!r}{pinned})"

    def _start(self, timeout: float | None) -> float:
        """The time-out of a call that begins, in seconds."""
        if self._closed:
            raise RAdapterClientError("the client is closed; make a new one")
        return self._timeout if timeout is None else _seconds(timeout)

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

    def _embed_images(self, images: Iterable[ImageLike]) -> Plan[Embeddings]:
        items = _listed("images", images)
        return self._embed("embed_image", "image", "image_embeds", items, encode_image, list(map(size_bound, items)))

    def _embed_texts(self, texts: Iterable[str]) -> Plan[Embeddings]:
        items = [_utf8("texts", text) for text in _listed("texts", texts)]
        return self._embed("embed_text", "text", "text_embeds", items, bytes, list(map(len, items)))

    def _embed(
        self, task: str, name: str, output: str, items: list[Any], encode: Callable[[Any], bytes], sizes: list[int]
    ) -> Plan[Embeddings]:
        if not items:
            release = self._release()
            return Plan(release.parts, lambda replies: np.zeros((0, release.finish(replies).embed_dim), np.float32))

        def part(rows: range) -> Request:
            return Request("infer", task, inputs={name: text_array([[encode(items[row])] for row in rows])})

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
    ) -> Plan[Any]:
        """Gives one Classification for one image, else a list of them."""
        one = is_one_image(images)
        items: list[Any] = [images] if one else _listed("images", images)
        options = _classify_options(labels, label_set, templates, top_k)

        def part(rows: range) -> Request:
            inputs = {name: np.repeat(array, len(rows), axis=0) for name, array in options.items()}
            inputs["image"] = text_array([[encode_image(items[row])] for row in rows])
            return Request("infer", "classify", inputs=inputs)

        def finish(replies: list[Tensors]) -> Classification | list[Classification]:
            found = [
                Classification([name.decode("utf-8", "replace") for name in names], scores.tolist(), reply.version)
                for reply in replies
                for names, scores in zip(_output(reply, "label"), _output(reply, "score"), strict=True)
            ]
            return found[0] if one else found

        strings = sum(array.shape[1] for array in options.values())
        rows = max(1, min(self._batch_size, MAX_STRINGS // strings))
        runs = chunks(list(map(size_bound, items)), rows, MAX_BYTES)
        return Plan([partial(part, run) for run in runs], finish, one_release=len(runs) > 1)

    @staticmethod
    def _sample_image(release: Release) -> Image.Image:
        """A picture of the size that the release takes, for a request whose time is measured."""
        side = int(release.facts.get("preprocess", {}).get("size", 224))
        return Image.radial_gradient("L").resize((side, side)).convert("RGB")


def _classify_options(
    labels: Sequence[str] | None, label_set: str | None, templates: Sequence[str] | None, top_k: int
) -> dict[str, Array]:
    """The inputs of `classify` beside the image, as arrays of one row."""
    if labels is not None and label_set is not None:
        raise InvalidRequest("give labels or a label_set, not both", code="invalid_argument")
    options: dict[str, Array] = {"top_k": np.array([[_count("top_k", top_k)]], np.int32)}
    if label_set is not None:
        options["label_set"] = text_array([[_utf8("label_set", label_set)]])
    else:
        names = [] if labels is None else [_utf8("labels", label) for label in _listed("labels", labels)]
        if not names:
            raise InvalidRequest('no labels: give labels=["a cat", "a dog"] or label_set="NAME"', code="no_labels")
        options["labels"] = text_array([names])
    if templates is not None:
        texts = [_utf8("templates", template) for template in _listed("templates", templates)]
        if not texts:
            why = 'no templates: give some, such as "a photo of a {}.", or None for the release\'s own'
            raise InvalidRequest(why, code="invalid_argument")
        options["templates"] = text_array([texts])
    return options


def _output(reply: Tensors, name: str) -> Array:
    if name not in reply.outputs:
        raise ServerError(f"the server's answer has no {name!r}, but {sorted(reply.outputs)}")
    return reply.outputs[name]


def _listed(name: str, items: Any) -> list[Any]:
    """A list of many; one alone would otherwise fall apart into letters or rows."""
    if is_one_image(items) or not isinstance(items, Iterable):
        raise InvalidRequest(f"{name} takes a list, not one {type(items).__name__}", code="invalid_argument")
    return list(items)


def _utf8(name: str, text: str) -> bytes:
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} takes texts, not {type(text).__name__} {text!r}", code="invalid_argument")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} has a text that is not Unicode: {text!r}", code="invalid_argument") from error


def _count(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number < 2**31 or isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r}; allowed are whole numbers from 1", code="invalid_argument")
    return number


def _seconds(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise InvalidRequest(f"timeout is {value!r}; allowed are seconds above 0", code="invalid_argument")
    return float(value)
