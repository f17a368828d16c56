"""`LoadedRelease`: a release with its encoder, in this process or on a live server; and `Need`, the
rows that a task asks it to encode.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import shlex
import weakref
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from radapter_client import Client, RAdapterClientError
from radapter_serve.contract.embeddings import DEFAULT_POINT, Cache, Point
from radapter_serve.contract.errors import (
    NOT_CALIBRATED,
    UNKNOWN_ADAPTER,
    Cancelled,
    TaskError,
    check_cancelled,
    request_alpha,
)
from radapter_serve.contract.images import LARGE_IMAGES, ImageFile
from radapter_serve.contract.preprocess import Decoder, Preprocess, decode_pixels
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.encoder import Encoder, GraphEncoder, ServerEncoder
from radapter_serve.encoders.labels import (
    PROMPTS,
    LabelSet,
    load_label_sets,
    load_prompts,
)
from radapter_serve.encoders.precision import AS_EXPORTED, Choice, choose, load_graphs
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_name
from radapter_serve.process import decoders, total
from radapter_serve.release.adapters import (
    CALIBRATED_RUN,
    AdaptersBeside,
    TextAdapter,
    unknown_name,
)
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.release import HOW_TO_CALIBRATE, Confidence, Release
from radapter_serve.release.repository import find_release

A = TypeVar("A")
Part: TypeAlias = Literal["pixels", "images", "patches", "tokens"]

# Images in one call of the encoder. More are slower on a CPU: the activations between the layers no
# longer fit into its cache. In bf16 they do, and 64 at once are encoded faster than 16.
CHUNK = 16
MAX_LABELS = 20_000  # labels and prompts whose embeddings a cache keeps


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


@dataclass(frozen=True)
class Place:
    """A `Point` of a release, checked: the adapter itself, and the α of the adapter, if there is
    one, and of the encoders.
    """

    alpha: float  # of the adapter, if there is one, else of the encoders
    encoder_alpha: float | None  # None if it is folded into the weights
    adapter: TextAdapter | None = None

    @property
    def base(self) -> Place:
        """The place of embeddings that the adapter has not mapped."""
        if self.adapter is None:
            return self
        return Place(self.encoder_alpha or 0.0, self.encoder_alpha)

    @property
    def key(self) -> Hashable:
        """A key of caches: text embeddings of one release differ if their keys do."""
        if self.adapter is None:
            return self.encoder_alpha
        return self.adapter.digest, self.alpha, self.encoder_alpha

    def map(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map text embeddings of the encoder, float32 [N, D], to this place."""
        return embeds if self.adapter is None else self.adapter.map(embeds, self.alpha)


TaskSteps: TypeAlias = Generator[Need, Any, A]  # the way of a task to its answer, an `A`


@dataclass(frozen=True)
class Answered(Generic[A]):
    """An answer, and the place where it was computed; for a search of a mapped index, with its
    recall.
    """

    answer: A
    place: Place
    mapped: float | None = None


class LoadedRelease:
    """A release at an α, with its encoder, its tokenizer and its label sets, which are read at
    first use.
    """

    def __init__(
        self,
        release: Release,
        encoder: Encoder,
        tokenizer: Tokenizer | ServerEncoder,
        *,
        read_label_sets: Callable[[LoadedRelease], Mapping[str, LabelSet]] = lambda loaded: {},
        indexes: Path = Path("indexes"),
        origin: Mapping[str, str] | None = None,
        adapters: Path | None = None,
        maps_adapters: bool = False,
    ) -> None:
        self.release = release
        # `at` does not change these.
        self.exported_alpha = float(np.float32(release.alpha))
        self._exported_tower = release.text_tower.digest(release.alpha)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.preprocess = Preprocess.from_dict(vars(release.preprocess))
        self.indexes = indexes
        self.large_images = LARGE_IMAGES  # an engine puts its own limit here
        self.origin = dict(origin or {})
        self._read_label_sets = read_label_sets
        self._adapters = adapters
        self._maps_adapters = maps_adapters

    @cached_property
    def adapters(self) -> AdaptersBeside | None:
        """The adapters beside the release, in its model repository; None if it is in none."""
        if self._adapters is None:
            return None
        text_tower = self.release.text_tower.digest(self.release.alpha)
        # A weak reference: a release that nobody uses any more is freed at once.
        check = partial(LoadedRelease._check, weakref.proxy(self))
        return AdaptersBeside(self._adapters, text_tower, check, mapped=self._maps_adapters)

    @cached_property
    def label_sets(self) -> Mapping[str, LabelSet]:
        """The release's label sets by name."""
        return self._read_label_sets(self)

    @cached_property
    def decoder(self) -> Decoder:
        """Decodes images to the pixels that the encoder takes."""
        return Decoder(self.preprocess, decoders())

    @cached_property
    def label_cache(self) -> Cache:
        """Cached embeddings of requests' labels."""
        return Cache(MAX_LABELS)

    @cached_property
    def prompt_cache(self) -> Cache:
        """Cached embeddings of prompts, which adapters map."""
        return Cache(MAX_LABELS)

    @cached_property
    def _stored_prompts(self) -> dict[str, NDArray[np.float32] | None]:
        """The stored prompts of label sets by name, each read at its first use."""
        return {}

    def stored_prompts(
        self, lines: Sequence[str], templates: Sequence[str], place: Place
    ) -> NDArray[np.float32] | None:
        """Embeddings without an adapter for all prompts of a label set with these labels and
        templates, in the order of `load_prompts`; None if the export has stored none for the place.
        """
        adapter = place.adapter
        if adapter is None or adapter.facts.text_tower != self._exported_tower:
            return None
        for name, label_set in self.label_sets.items():
            if label_set.lines == tuple(lines) and label_set.templates == tuple(templates):
                if name not in self._stored_prompts:
                    facts = self.release.label_sets.get(name)
                    stored = None
                    if facts is not None and facts.prompts is not None:
                        path = self._text_encoder / as_name(name + PROMPTS)
                        stored = load_prompts(path, label_set, facts.prompts)
                    self._stored_prompts[name] = stored
                return self._stored_prompts[name]
        return None

    @property
    def _text_encoder(self) -> Path:
        """The folder of the release's text encoder, with what adapters need of it."""
        assert self.adapters is not None
        return self.adapters.repository / "text_encoder" / str(self.release.version)

    def confidence(self, place: Place) -> Confidence:
        """The calibration of the release or the adapter; refuses another α than that of its fit."""
        what = "this release"
        advice = HOW_TO_CALIBRATE
        fitted = self.exported_alpha
        confidence = self.release.confidence
        if place.adapter is not None:
            what = f"the adapter {place.adapter.name}"
            advice = CALIBRATED_RUN
            fitted = place.adapter.facts.alpha
            confidence = place.adapter.facts.confidence
        if confidence is None:
            raise TaskError(NOT_CALIBRATED, f"{what} has no calibrated scores; {advice}")
        if np.float32(place.alpha) != np.float32(fitted):
            raise TaskError(
                NOT_CALIBRATED,
                f"the scores of {what} are calibrated at alpha {fitted:g}, not at {place.alpha:g}",
            )
        return confidence

    def place(self, point: Point | Place = DEFAULT_POINT) -> Place:
        """Check a point of a request, and look its adapter up; a `Place` is as it is."""
        if isinstance(point, Place):
            return point
        release = self.release
        alpha = None if point.adapter else point.alpha
        encoder_alpha = request_alpha(alpha, release.alpha, dynamic=release.dynamic_alpha)
        if not point.adapter:
            used = release.alpha if encoder_alpha is None else encoder_alpha
            return Place(float(used), encoder_alpha)
        if self.adapters is None:
            raise TaskError(UNKNOWN_ADAPTER, unknown_name(point.adapter, {}))
        adapter = self.adapters.get(point.adapter)
        alpha = adapter.facts.alpha if point.alpha is None else point.alpha
        return Place(request_alpha(alpha, alpha, dynamic=True) or 0.0, encoder_alpha, adapter)

    @cached_property
    def _samples(self) -> tuple[Samples, list[NDArray[np.float32]]]:
        """The texts that the export has embedded with torch, and their embeddings with this
        encoder.
        """
        samples = Samples.load(self._text_encoder)
        return samples, [self.encoder.tokens(*inputs) for inputs, _ in samples.batches()]

    def _check(self, adapter: TextAdapter) -> None:
        """Compare an adapter's embeddings with those of torch, mapped in double precision."""
        release = self.release
        if adapter.facts.width != release.embed_dim:
            raise RAdapterError(
                f"the adapter {adapter.name!r} maps embeddings of width {adapter.facts.width}, and"
                f" those of release {release.version} have {release.embed_dim}; remove it with"
                f" radapter-release remove-adapter {shlex.quote(adapter.name)}, or replace it with"
                " a run of this release's base: radapter-release add-adapter"
                f" {shlex.quote(adapter.name)} RUN --replace"
            )
        samples, embeds = self._samples
        alpha = adapter.facts.alpha
        change = adapter.factors[0].astype(np.float64)
        for factor in adapter.factors[1:]:
            change = change @ factor
        references = []
        for reference in samples.references:
            rows = reference + alpha * reference @ change.T
            references.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        mapped = iter([adapter.map(rows, alpha) for rows in embeds])
        compare(
            f"the text encoder of release {release.version} with the adapter {adapter.name!r}",
            lambda *inputs: next(mapped),
            Samples(samples.inputs, references, samples.alphas),
            release.bounds,
        )

    def at(self, alpha: float) -> LoadedRelease:
        """The release at another α, which it must support."""
        return self._changed(release=self.release.at(alpha))

    def turned(self, exif_orientation: bool) -> LoadedRelease:
        """The release that turns images according to their EXIF orientation, or does not."""
        preprocess = dataclasses.replace(self.preprocess, exif_orientation=exif_orientation)
        return self._changed(preprocess=preprocess)

    def _changed(self, **fields: Any) -> LoadedRelease:
        # Drop the cached properties, which depend on the fields.
        changed = copy.copy(self)
        for name, attribute in vars(LoadedRelease).items():
            if isinstance(attribute, cached_property):
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
        return self.encode([Need(self, part, rows, self.place().encoder_alpha, None)])

    def encode(self, needs: Sequence[Need]) -> NDArray[np.float32]:
        """Embed the rows of all needs, in their order; all needs are of one encoder."""
        size = self.release.max_batch_size
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
                tokens = self.tokenizer.batch([row for row, _ in batch])
                if batch[0][1] is not None:
                    alphas = np.array([[alpha] for _, alpha in batch], np.float32)
                parts.append(self.encoder.tokens(tokens, alphas))
            places = {text: place for place, text in enumerate(unique)}
            return np.concatenate(parts)[[places[text] for text in asked]]

        # Encode images in as few calls as possible, of about equal size.
        encoder = self.encoder.images if needs[0].part == "images" else self.encoder.patches
        rows = [np.asarray(need.rows) for need in needs]
        pixels = rows[0] if len(rows) == 1 else np.concatenate(rows)
        if not len(pixels):
            return np.zeros((0, self.release.embed_dim), np.float32)
        if needs[0].alpha is not None:
            each = [np.full((len(need.rows), 1), need.alpha, np.float32) for need in needs]
            alphas = np.concatenate(each)
        if self.release.precision != "bf16":
            size = min(CHUNK, size)
        count = math.ceil(len(pixels) / size)
        edges = [len(pixels) * number // count for number in range(count + 1)]
        for start, end in itertools.pairwise(edges):
            parts.append(encoder(pixels[start:end], None if alphas is None else alphas[start:end]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encoded(
        self,
        part: Part,
        rows: Sequence[Any] | NDArray[np.uint8],
        place: Place | None = None,
        cancelled: Cancelled | None = None,
    ) -> TaskSteps[NDArray[Any]]:
        """Step of a task: encode rows at a place, by default the release's own. Here alone an
        adapter maps texts, so it needs no graph of its own, and rows of several share a batch.
        """
        check_cancelled(cancelled)
        place = place or self.place()
        embeds: NDArray[Any] = yield Need(self, part, rows, place.encoder_alpha, cancelled)
        return place.map(embeds) if part == "tokens" else embeds

    def decoded(
        self, files: Sequence[ImageFile], cancelled: Cancelled | None = None
    ) -> TaskSteps[NDArray[np.uint8]]:
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
    choice: Choice = AS_EXPORTED,
) -> LoadedRelease:
    """Load release N of `DIR@N`, `version`, or the served one, with the encoders that `choice` has
    tried already, or with its runtime and precision.
    """
    folder = find_release(repository if version is None else f"{repository}@{version}")
    release = choice.facts(Release.load(folder))
    graphs = choice.graphs.get(release.version)
    if graphs is None:
        threads = total() if threads is None else threads
        graphs = load_graphs(folder.parents[1], release, threads, device)
    return LoadedRelease(
        release,
        GraphEncoder(graphs),
        Tokenizer.load(folder / "tokenizer.json", release.tokenizer),
        read_label_sets=lambda loaded: load_label_sets(folder / "label_sets"),
        indexes=indexes,
        origin={"model_repository": str(Path(repository).absolute())},
        adapters=folder.parents[1],
    )


def release_at(
    origin: Mapping[str, str],
    version: int | None = None,
    precision: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> LoadedRelease:
    """Load the release of an `origin`; of a repository without `@N`, `version` or the served one,
    computed in `precision`; `say` is called with what AUTO takes.
    """
    if "url" in origin:
        return served_release(origin["url"])
    repository = origin["model_repository"]
    choice = AS_EXPORTED
    if precision is not None:
        folder = find_release(repository if version is None else f"{repository}@{version}")
        choice = choose(folder.parents[1], [int(folder.name)], None, precision, total())
        if choice.note:
            say(choice.note)
    return load_release(repository, version, choice=choice)


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
