"""`LoadedRelease`: a release with its encoder, in this process or on a live server; and
`run_together`, which encodes the rows of several tasks as one batch.

A task is a generator: it yields a `Need`, is sent the embeddings, and returns its answer. So its
code reads from top to bottom and does not depend on other requests, while its rows are encoded
together with theirs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from radapter_client import Client, RAdapterClientError
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    IMAGE_TOO_LARGE,
    OVERLOADED,
    RESTARTING,
    SERVER_STOPPING,
    Alpha,
    Cancelled,
    TaskError,
    check_cancelled,
    request_alpha,
    task_error,
)
from radapter_serve.contract.images import ImageFile
from radapter_serve.contract.preprocess import Decoder, Preprocess, decode_pixels
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.encoder import Encoder, EncoderGraph, GraphEncoder
from radapter_serve.encoders.labels import LabelCache, LabelSet, load_label_sets
from radapter_serve.errors import RAdapterError
from radapter_serve.process import decoders, total
from radapter_serve.release.release import Release
from radapter_serve.release.repository import (
    RUNTIMES,
    SPINNING,
    Served,
    find_release,
    split_repository,
)

A = TypeVar("A")
Part: TypeAlias = Literal["pixels", "images", "patches", "tokens"]
Rows = NDArray[np.generic]

# Images in one call of the encoder. More are slower on a CPU: the activations between the layers no
# longer fit into its cache.
CHUNK = 16
MOST_ROWS = 256  # rows of several tasks in one batch


class Tokenize(Protocol):
    """Turns texts into token ids, as `Tokenizer` does."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""

    def batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        """Rows of `encode` padded to one length, int32 [N, L]."""


@dataclass(frozen=True, eq=False)
class Need:
    """Rows that a task needs from one part of a release: "pixels" decodes images to uint8
    [N, S, S, 3]; "images" and "patches" encode such pixels, "tokens" encodes texts.
    """

    loaded: LoadedRelease
    part: Part
    rows: Any  # headers of images, pixels, or the token ids of each text
    alpha: float | None  # None if it is folded into the weights
    cancelled: Cancelled | None  # whether the caller has given up


Steps: TypeAlias = Generator[Need, Any, A]
Result: TypeAlias = "Rows | TaskError"


def encode_together(needs: Sequence[Need]) -> list[Result]:
    """Encode needs of one part of one release in few batches, so that none affects the others."""
    loaded = needs[0].loaded
    results: list[Result] = []
    if needs[0].part == "pixels":
        # Start to decode the images of all needs, before waiting for the first.
        waits: list[Callable[[], Rows] | None] = []
        for need in needs:
            try:
                waits.append(loaded.decoder.start(need.rows, need.cancelled))
            except MemoryError:
                waits.append(None)
        for wait in waits:
            if wait is None:
                why = "the server has not enough memory for the images; send fewer"
                results.append(TaskError(IMAGE_TOO_LARGE, why))
                continue
            try:
                results.append(wait())
            except Exception as error:
                results.append(task_error(error))
        return results
    try:
        embeds = encode(loaded, needs)
    except Exception as error:
        later = (OVERLOADED, RESTARTING, SERVER_STOPPING)
        if len(needs) == 1 or (isinstance(error, TaskError) and error.code in later):
            return [task_error(error)] * len(needs)
    else:
        ends = itertools.accumulate(len(need.rows) for need in needs)
        return [embeds[end - len(need.rows) : end] for need, end in zip(needs, ends, strict=True)]
    # Halve a batch that fails until the failing need is found. Outside of `except`, so that the
    # log does not repeat this error for each half.
    half = len(needs) // 2
    return encode_together(needs[:half]) + encode_together(needs[half:])


def encode(loaded: LoadedRelease, needs: Sequence[Need]) -> NDArray[np.float32]:
    """Embed the rows of all needs, in their order; all needs are of one encoder."""
    size = loaded.release.max_batch_size
    alphas: NDArray[np.float32] | None = None
    parts = []
    if needs[0].part == "tokens":
        # Encode each text once at each α, together with texts of similar length.
        asked = [(tuple(row), need.alpha) for need in needs for row in need.rows]
        unique = sorted(dict.fromkeys(asked), key=lambda text: len(text[0]))
        for start in range(0, len(unique), size):
            if start and len(needs) == 1:
                check_cancelled(needs[0].cancelled)
            batch = unique[start : start + size]
            tokens = loaded.tokenizer.batch([row for row, _ in batch])
            if batch[0][1] is not None:
                alphas = np.array([[alpha] for _, alpha in batch], np.float32)
            parts.append(loaded.encoder.tokens(tokens, alphas))
        places = {text: place for place, text in enumerate(unique)}
        return np.concatenate(parts)[[places[text] for text in asked]]

    # Encode images in as few calls as possible, of about equal size.
    encoder = loaded.encoder.images if needs[0].part == "images" else loaded.encoder.patches
    rows = [np.asarray(need.rows) for need in needs]
    pixels = rows[0] if len(rows) == 1 else np.concatenate(rows)
    if not len(pixels):
        return np.zeros((0, loaded.release.embed_dim), np.float32)
    if needs[0].alpha is not None:
        each = [np.full((len(need.rows), 1), need.alpha, np.float32) for need in needs]
        alphas = np.concatenate(each)
    count = math.ceil(len(pixels) / min(CHUNK, size))
    edges = [len(pixels) * number // count for number in range(count + 1)]
    for start, end in itertools.pairwise(edges):
        parts.append(encoder(pixels[start:end], None if alphas is None else alphas[start:end]))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def complete(steps: Steps[A]) -> A:
    """Run one task, and return its answer or raise its `TaskError`."""
    [answer] = run_together([steps])
    if isinstance(answer, TaskError):
        raise answer
    return answer


def run_together(
    tasks: Sequence[Steps[A]],
    together: Callable[[Sequence[Need]], Sequence[Result]] = encode_together,
) -> list[A | TaskError]:
    """Run tasks side by side, with needs encoded by `together`; each has an answer or error."""
    answers: list[Any] = [None] * len(tasks)
    needs: dict[int, Need] = {}

    def advance(number: int, resume: Callable[[], Need]) -> None:
        """Run a task until its next need, or its end."""
        try:
            needs[number] = resume()
        except StopIteration as done:
            answers[number] = done.value
        except Exception as error:
            answers[number] = task_error(error)

    with contextlib.ExitStack() as stack:
        for number, task in enumerate(tasks):
            stack.callback(task.close)
            advance(number, partial(next, task))
        while needs:
            # Take the first waiting need and others of the same kind, up to `MOST_ROWS` rows: the
            # rest have their turn after other callers.
            first = next(iter(needs.values()))
            numbers: list[int] = []
            rows = 0
            for number, need in needs.items():
                if need.loaded is not first.loaded or need.part != first.part:
                    continue
                rows += len(need.rows)
                if numbers and rows > MOST_ROWS:
                    break
                numbers.append(number)
            asked = [needs.pop(number) for number in numbers]
            try:
                results = together(asked)
            except Exception as error:
                results = [task_error(error)] * len(asked)
            for number, result in zip(numbers, results, strict=True):
                task = tasks[number]
                if isinstance(result, TaskError):
                    advance(number, partial(task.throw, result))
                else:
                    advance(number, partial(task.send, result))
    return answers


class LoadedRelease:
    """A release at an α, with its encoder, its tokenizer and its label sets, which are read at
    first use.
    """

    def __init__(
        self,
        release: Release,
        encoder: Encoder,
        tokenizer: Tokenize,
        *,
        read_label_sets: Callable[[LoadedRelease], Mapping[str, LabelSet]] = lambda loaded: {},
        indexes: Path = Path("indexes"),
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self.release = release
        self.exported_alpha = float(np.float32(release.alpha))  # `at` does not change it
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.preprocess = Preprocess.from_dict(release.preprocess)
        self.indexes = indexes
        self.origin = dict(origin or {})
        self._read_label_sets = read_label_sets

    @cached_property
    def label_sets(self) -> Mapping[str, LabelSet]:
        """The release's label sets by name."""
        return self._read_label_sets(self)

    @cached_property
    def decoder(self) -> Decoder:
        """Decodes images to the pixels that the encoder takes."""
        return Decoder(self.preprocess, decoders())

    @cached_property
    def label_cache(self) -> LabelCache:
        """Cached embeddings of requests' labels."""
        return LabelCache()

    def request_alpha(self, alpha: float | None) -> float | None:
        """The encoder's α for a request, the release's if `alpha` is None; None if α is folded."""
        return request_alpha(alpha, self.release.alpha, dynamic=self.release.dynamic_alpha)

    def at(self, alpha: float) -> LoadedRelease:
        """The release at another α, which it must support."""
        return self._changed(release=self.release.at(alpha))

    def turned(self, exif_orientation: bool) -> LoadedRelease:
        """The release with images turned by their EXIF orientation, or left as they are."""
        preprocess = dataclasses.replace(self.preprocess, exif_orientation=exif_orientation)
        return self._changed(preprocess=preprocess)

    def _changed(self, **fields: Any) -> LoadedRelease:
        # Drop the cached properties, which depend on the fields.
        changed = copy.copy(self)
        for name in ("decoder", "label_cache", "label_sets"):
            changed.__dict__.pop(name, None)
        changed.__dict__.update(fields)
        return changed

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """Decode and prepare one image file, uint8 [S, S, 3]. Thread-safe."""
        return decode_pixels(data, self.preprocess)

    def embed_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed prepared images, any number N, to float32 [N, D]."""
        return self._encode("images", np.asarray(pixels))

    def embed_patches(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed the patches of prepared images, any number N, to float32 [N, g, g, D]."""
        return self._encode("patches", np.asarray(pixels))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts to float32 [N, D]."""
        if not texts:
            return np.zeros((0, self.release.embed_dim), np.float32)
        return self._encode("tokens", self.tokenizer.encode(texts))

    def _encode(self, part: Part, rows: Sequence[Any] | NDArray[np.uint8]) -> NDArray[np.float32]:
        return encode(self, [Need(self, part, rows, self.request_alpha(None), None)])

    def encoded(
        self,
        part: Part,
        rows: Sequence[Any] | NDArray[np.uint8],
        alpha: float | None = None,
        cancelled: Cancelled | None = None,
    ) -> Steps[NDArray[Any]]:
        """Step of a task: encode rows at a checked α, or the release's."""
        check_cancelled(cancelled)
        if alpha is None:
            alpha = self.request_alpha(None)
        embeds: NDArray[Any] = yield Need(self, part, rows, alpha, cancelled)
        return embeds

    def decoded(
        self, files: Sequence[ImageFile], cancelled: Cancelled | None = None
    ) -> Steps[NDArray[np.uint8]]:
        """Step of a task: decode images to uint8 [N, S, S, 3]."""
        pixels: NDArray[np.uint8] = yield Need(self, "pixels", files, None, cancelled)
        return pixels

    def close(self) -> None:
        """Stop the threads that decode images, and close the encoder."""
        if "decoder" in self.__dict__:
            self.decoder.close()
        self.encoder.close()


def load_release(
    repository: str | Path,
    version: int | None = None,
    *,
    indexes: Path = Path("indexes"),
    device: int | None = None,
    threads: int | None = None,
    runtime: str | None = None,
    spin: bool = False,
) -> LoadedRelease:
    """Load release N of `DIR@N`, `version`, or the newest. `spin` makes a call a fifth quicker, but
    programs that share the cores slower.
    """
    folder = find_release(repository if version is None else f"{repository}@{version}")
    release = Release.load(folder)
    runtime = runtime or release.runtime
    parameters = dict(RUNTIMES[runtime].parameters)
    if spin:
        parameters.pop(SPINNING, None)
    graphs: dict[str, EncoderGraph] = {}
    for name in ("image_encoder", "text_encoder", "patch_encoder"):
        if name == "patch_encoder" and not release.dense:
            continue
        graphs[name] = EncoderGraph(
            folder.parents[1] / name / folder.name / RUNTIMES[runtime].file,
            runtime,
            precision=release.precision,
            threads=total() if threads is None else threads,
            device=device if runtime == "onnxruntime" else None,
            parameters=parameters,
        )
    return LoadedRelease(
        release,
        GraphEncoder(graphs),
        Tokenizer.load(folder / "tokenizer.json", release.tokenizer),
        read_label_sets=lambda loaded: load_label_sets(folder / "label_sets"),
        indexes=indexes,
        origin={"model_repository": str(Path(repository).absolute())},
    )


def release_at(origin: Mapping[str, str], version: int | None = None) -> LoadedRelease:
    """Load the release of an `origin`; of a repository without `@N`, `version`
    or the served one.
    """
    if "url" in origin:
        return served_release(origin["url"])
    repository, number = split_repository(origin["model_repository"])
    if version is None and not number:
        version = max(Served.load(Path(repository)).releases, default=None)
    return load_release(origin["model_repository"], version)


def served_release(url: str) -> LoadedRelease:
    """The newest release of a live server; stays the same when a newer one appears."""
    try:
        with Client(url) as client:
            served = client.release()
        # A batch is split into several concurrent requests.
        rows = min(16, int(served.facts.get("max_batch_size", 16)))
        pinned = Client(url, release=served.version, batch_size=rows)
    except RAdapterClientError as error:
        raise RAdapterError(f"{url}: {error}") from error
    encoder = ServerEncoder(pinned, url)
    return LoadedRelease(Release.from_dict(served.facts), encoder, encoder, origin={"url": url})


class ServerEncoder:
    """Encoders and tokenizer of a live server's release, to which the client is pinned."""

    def __init__(self, client: Client, url: str) -> None:
        self.client = client
        self._url = url

    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._embed(self.client.embed_images, pixels, alpha)

    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        raise TaskError(ENCODER_FAILED, f"{self._url} gives no dense embeddings")

    def tokens(self, tokens: NDArray[Any], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return self._embed(self.client.embed_texts, tokens, alpha)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Wrap texts as rows, without tokens: the server has the tokenizer."""
        return [[text] for text in texts]

    def batch(self, rows: Sequence[Any]) -> NDArray[Any]:
        """The texts of rows."""
        return np.array([text for (text,) in rows], object)

    def ask(self, task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of the client; its errors become a `TaskError`."""
        try:
            return task(*arguments, **options)
        except RAdapterClientError as error:
            raise TaskError(error.code or ENCODER_FAILED, f"{self._url}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def _embed(
        self, task: Callable[..., Any], rows: NDArray[Any], alpha: Alpha | None
    ) -> NDArray[np.float32]:
        # All rows have the same α.
        embeds = self.ask(task, list(rows), alpha=None if alpha is None else float(alpha[0, 0]))
        return np.asarray(embeds, np.float32)
