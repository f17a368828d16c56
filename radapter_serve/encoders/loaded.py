"""`LoadedRelease`: a release with what it takes to ask it, in this process or of a live server; and
how the rows that several tasks need are encoded together.

A task is a generator: it yields a `Need`, is sent the embeddings, and returns its answer. So it
reads from top to bottom, and knows nothing of other requests; the server encodes its rows with
those of all that wait.
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

# Images that the encoder takes at once. On a CPU more are slower: what lies between the layers no
# longer fits in its cache.
CHUNK = 16
MOST_ROWS = 256  # of several tasks that are encoded at once


class Tokenize(Protocol):
    """Turns texts into token ids; `Tokenizer` does."""

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
    rows: Any  # the headers of images; pixels; or the token ids of each text
    alpha: float | None  # None where it is folded
    cancelled: Cancelled | None  # whether the caller has given up


Steps: TypeAlias = Generator[Need, Any, A]
Result: TypeAlias = "Rows | TaskError"
# The results of needs of one part of one release.
EncodeTogether: TypeAlias = Callable[[Sequence[Need]], Sequence[Result]]


def encode_together(needs: Sequence[Need]) -> list[Result]:
    """Encode needs of one part of one release as few batches.

    Needs that fail together are halved until the one is found that does it, so that no request
    touches its neighbours; but not where the encoder can't answer anybody now.
    """
    loaded = needs[0].loaded
    results: list[Result] = []
    if needs[0].part == "pixels":
        # Begin to decode the images of all needs before the first is waited for.
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
    # Here the error is let go of: the log has it once, not again for each half.
    half = len(needs) // 2
    return encode_together(needs[:half]) + encode_together(needs[half:])


def encode(loaded: LoadedRelease, needs: Sequence[Need]) -> NDArray[np.float32]:
    """Embeddings of the rows of all needs, which are of one encoder, in their order."""
    size = loaded.release.max_batch_size
    alphas: NDArray[np.float32] | None = None
    parts = []
    if needs[0].part == "tokens":
        # Each text once at each α, with others of about its length.
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

    # Images in as few calls as there can be, of about as many rows.
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


def complete(steps: Steps[A], together: EncodeTogether = encode_together) -> A:
    """Run one task; raises the `TaskError` that it ends with."""
    [answer] = run_together([steps], together)
    if isinstance(answer, TaskError):
        raise answer
    return answer


def run_together(
    tasks: Sequence[Steps[A]], together: EncodeTogether = encode_together
) -> list[A | TaskError]:
    """Run tasks side by side, whose needs are encoded `together`; an error is one task's."""
    answers: list[Any] = [None] * len(tasks)
    needs: dict[int, Need] = {}

    def advance(number: int, resume: Callable[[], Need]) -> None:
        """Let a task go on until it needs something, or ends."""
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
            # Those of the first task that waits, and others of the same kind, up to some rows: the
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
    """A release with the α that it is used at, its encoder, its tokenizer and its label sets, which
    are read when one is first needed.

    `indexes` is the folder of those that `retrieve` searches; `origin` is the flag of
    radapter-index that names the release, `model_repository` or `url`, and its value.
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
        self.exported_alpha = float(np.float32(release.alpha))  # also where it is used at another
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
        """Decodes images to what the encoder takes."""
        return Decoder(self.preprocess, decoders())

    @cached_property
    def label_cache(self) -> LabelCache:
        """The embeddings of labels that requests brought."""
        return LabelCache()

    def request_alpha(self, alpha: float | None) -> float | None:
        """The encoder's α for a request, which may bring one; None where it is folded."""
        return request_alpha(alpha, self.release.alpha, dynamic=self.release.dynamic_alpha)

    def at(self, alpha: float) -> LoadedRelease:
        """The release as it is used at one α, which it must have."""
        return self._changed(release=self.release.at(alpha))

    def turned(self, exif_orientation: bool) -> LoadedRelease:
        """The release with images turned by their EXIF orientation, or left as they are."""
        preprocess = dataclasses.replace(self.preprocess, exif_orientation=exif_orientation)
        return self._changed(preprocess=preprocess)

    def _changed(self, **fields: Any) -> LoadedRelease:
        # What was made of other fields is made again.
        changed = copy.copy(self)
        for name in ("decoder", "label_cache", "label_sets"):
            changed.__dict__.pop(name, None)
        changed.__dict__.update(fields)
        return changed

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """Decode and prepare one image file, uint8 [S, S, 3]. Thread-safe."""
        return decode_pixels(data, self.preprocess)

    def embed_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Prepared images to float32 [N, D]; any N."""
        return self._encode("images", np.asarray(pixels))

    def embed_patches(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Prepared images to float32 [N, g, g, D]; any N."""
        return self._encode("patches", np.asarray(pixels))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to float32 [N, D]."""
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
        """The step of a task that encodes rows, at a checked α or the release's own."""
        check_cancelled(cancelled)
        if alpha is None:
            alpha = self.request_alpha(None)
        embeds: NDArray[Any] = yield Need(self, part, rows, alpha, cancelled)
        return embeds

    def decoded(
        self, files: Sequence[ImageFile], cancelled: Cancelled | None = None
    ) -> Steps[NDArray[np.uint8]]:
        """The step of a task that decodes images, uint8 [N, S, S, 3]."""
        pixels: NDArray[np.uint8] = yield Need(self, "pixels", files, None, cancelled)
        return pixels

    def close(self) -> None:
        """End the threads that decode images, and let go of what the encoder holds open."""
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
    """A release of a model repository: `DIR@N` or `version` names it, else it is the newest.

    It runs on GPU `device` of ONNX Runtime, or on the CPU; with `threads`, or one a core; in
    `runtime`, or the one of its export. With `spin` the threads of ONNX Runtime wait for work
    busily: a call is a fifth quicker, and others who share the cores are slower.
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
    """The release at the `model_repository` (perhaps `DIR@N`) or the `url` that `origin` has; of a
    repository that names none, that of `version`, or the one that is served. Close it at the end.
    """
    if "url" in origin:
        return served_release(origin["url"])
    repository, number = split_repository(origin["model_repository"])
    if version is None and not number:
        version = max(Served.load(Path(repository)).releases, default=None)
    return load_release(origin["model_repository"], version)


def served_release(url: str) -> LoadedRelease:
    """The newest release of a live server, also when a newer one appears meanwhile."""
    try:
        with Client(url) as client:
            served = client.release()
        # A batch becomes some requests at once.
        rows = min(16, int(served.facts.get("max_batch_size", 16)))
        pinned = Client(url, release=served.version, batch_size=rows)
    except RAdapterClientError as error:
        raise RAdapterError(f"{url}: {error}") from error
    encoder = ServerEncoder(pinned, url)
    return LoadedRelease(Release.from_dict(served.facts), encoder, encoder, origin={"url": url})


class ServerEncoder:
    """The encoders and the tokenizer of a live server's release, which the client is pinned to."""

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
        """Texts as they are: the server has the tokenizer."""
        return [[text] for text in texts]

    def batch(self, rows: Sequence[Any]) -> NDArray[Any]:
        """The texts of rows."""
        return np.array([text for (text,) in rows], object)

    def ask(self, task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer of one of the client's methods; raises a `TaskError` where there is none."""
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
