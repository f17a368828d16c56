"""The facts of an index in its `index.json`: its contents, plan and release; and the search, which
each kind of index implements.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    UNKNOWN_INDEX,
    Cancelled,
    TaskError,
    check_cancelled,
    invalid,
)
from radapter_serve.contract.facts import PreprocessFacts
from radapter_serve.contract.images import POLL_SECONDS
from radapter_serve.contract.labels import check_length
from radapter_serve.errors import RAdapterError, in_words
from radapter_serve.files import as_text, checker, first_problem
from radapter_serve.release.release import IN_BF16, Release, Tower

if TYPE_CHECKING:
    from radapter_serve.encoders.loaded import LoadedRelease

FORMAT = 7
FACTS = "index.json"
OnBroken = Literal["refuse", "skip"]
DEFAULT_TOP_K = 10
MAX_TOP_K = 1000
OPENING_SECONDS = 60.0  # that a server waits for its indexes before it is ready
UNIT = 1e-3  # tolerance for unit length, and for the bounds of a cosine

T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Start a call in a thread of its own, which does not keep the process from its end."""
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(future, call), daemon=True).start()
    return future


def _run(future: Future[T], call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future, call  # the error holds this frame, and would be in a circle with both


def wait_for(future: Future[T], cancelled: Cancelled | None) -> T:
    """Wait for a result that others may wait for, too, until the caller gives up."""
    while not future.done():
        check_cancelled(cancelled)
        wait([future], POLL_SECONDS)
    try:
        return future.result()
    finally:
        del future  # as in `_run`


def index_names(indexes: Path) -> list[str]:
    """List the names of the indexes in a folder."""
    names = sorted(as_text(path.parent.name) for path in indexes.glob(f"*/{FACTS}"))
    return [name for name in names if name[0] != "."]


@dataclass(frozen=True)
class MadeBy:
    """Facts of the release that made an index, at the α of the embeddings. Any other release and α
    of the same `image_digest` searches the index, or of the same tower in a near precision.
    """

    architecture: str
    alpha: float  # of the image tower: 0 if it is the base's at any α
    dynamic_alpha: bool
    version: int
    precision: str
    embed_dim: int
    image_tower: Tower
    preprocess: PreprocessFacts
    image_digest: str
    image_distance: float | None = None  # also None in an index of an older version

    @classmethod
    def of(cls, release: Release) -> MadeBy:
        """Take the facts from a release."""
        facts = {name: getattr(release, name) for name in cls.__dataclass_fields__}
        if release.image_tower.change is None:
            facts["alpha"] = 0.0
        return cls(**facts)

    def is_of(self, release: Release) -> bool:
        """True if a release, at this α if it takes any, embeds images like those of the index."""
        with contextlib.suppress(RAdapterError):  # the release may refuse the α
            used = release.at(self.alpha) if release.dynamic_alpha else release
            return self.image_digest == used.image_digest
        return False

    def is_near(self, release: Release) -> bool:
        """True if a release embeds images like those of the index except in precision, and each
        was measured within the bounds of bf16.
        """
        try:
            other = MadeBy.of(release.at(self.alpha) if release.dynamic_alpha else release)
        except RAdapterError:  # it refuses the α
            return False
        ours, theirs = (
            (facts.image_tower.digest(facts.alpha), facts.preprocess, facts.embed_dim)
            for facts in (self, other)
        )
        limit = 1 - IN_BF16.min_cosine
        return ours == theirs and all(
            facts.image_distance is not None and facts.image_distance <= limit
            for facts in (self, other)
        )

    def differs_from(self, release: Release) -> str:
        """Explain why another release cannot search the index, as the end of a sentence."""
        other = MadeBy.of(release)

        def named(facts: MadeBy) -> str:
            return f"{facts.architecture} at alpha {facts.alpha:g}, release {facts.version}"

        differences = [
            name
            for name, ours, theirs in (
                ("base", self.image_tower.base, other.image_tower.base),
                ("fine-tune", self.image_tower.change, other.image_tower.change),
                ("alpha", self.alpha, other.alpha),
                ("preprocessing", self.preprocess, other.preprocess),
                ("precision", self.precision, other.precision),
            )
            if ours != theirs
        ]
        return (
            f"has images embedded with another {' and '.join(differences) or 'rounding'}"
            f" ({named(self)} then; this is {named(other)}), so they can't be compared"
        )


@dataclass(frozen=True)
class BuildPlan:
    """Settings of an index; another value of a `_DECIDING` field embeds all images again."""

    source: str  # as for `radapter-index build`; for an index of embeddings the file of vectors
    root: str  # folder that ids are relative to
    image_column: str
    column_types: dict[str, str]  # Arrow types of the table's other columns
    thumbnails: int  # longest side, in px; 0 for none
    exif_orientation: bool
    on_broken: OnBroken
    release: MadeBy
    origin: dict[str, str]  # the release's place, as in `LoadedRelease`
    rows: str = ""  # the table of an index of embeddings; empty for images

    def differences(self, other: BuildPlan) -> list[str]:
        """List the settings in which another plan makes a different index, in words."""
        words = [
            word for name, word in _DECIDING.items() if getattr(self, name) != getattr(other, name)
        ]
        is_same = self.release.image_digest == other.release.image_digest
        return words if is_same else ["image tower", *words]

    def command(self, out: Path, loaded: LoadedRelease | None = None) -> str:
        """Command that builds the index again, with the release that made it or by `loaded`."""
        command = ["radapter-index", "build"]
        if self.rows:
            command += ["--from-embeddings", self.source, "--rows", self.rows, "--out", str(out)]
        else:
            command += [self.source, "--out", str(out)]
            if self.thumbnails != 128:
                command += ["--thumbnails", str(self.thumbnails)]
            if not self.exif_orientation:
                command.append("--no-exif-orientation")
        if self.image_column != "image":
            command += ["--image-column", self.image_column]
        if self.on_broken != "refuse":
            command += ["--on-broken", self.on_broken]
        return shlex.join(command + self._flags(loaded))

    def map_command(self, out: Path, loaded: LoadedRelease) -> str:
        """Command that maps the index to the image tower of `loaded`."""
        return shlex.join(["radapter-index", "map", str(out), *self._flags(loaded)])

    def _flags(self, loaded: LoadedRelease | None) -> list[str]:
        """Flags of a command that name the release, its precision and its α."""
        flags = []
        for name, place in (loaded.origin if loaded else self.origin).items():
            flags += [f"--{name.replace('_', '-')}", place]
        made_by = loaded.release if loaded else self.release
        if made_by.precision == "bf16" and "--url" not in flags:
            flags += ["--precision", "bf16"]
        if made_by.dynamic_alpha:
            flags += ["--alpha", f"{self.release.alpha:g}"]
        return flags


_DECIDING = {
    "root": "folder",
    "image_column": "image column",
    "column_types": "columns",
    "thumbnails": "size of thumbnails",
    "exif_orientation": "EXIF orientation",
    "rows": "table of embeddings",
}


@dataclass(frozen=True)
class FileFacts:
    """Size of a file in bytes, and its digest, `sha256:` and hexadecimal digits."""

    size: int
    digest: str


@dataclass(frozen=True)
class NearestFacts:
    """Settings of FAISS's search for the nearest vectors, as tuned."""

    cells: int
    nprobes: int  # cells searched for ten hits
    candidates: int  # vectors that FAISS finds, to be sorted exactly
    recall: float  # recall@10 on a sample


@dataclass(frozen=True)
class Mapped:
    """How well the embeddings of an index are mapped from those of another image tower."""

    release: MadeBy  # embedded the images
    sample: int  # images that were embedded again, to fit and to measure the map
    by_image: float  # recall@10 of a search with an image, on images that the fit did not see
    by_text: float  # the same of a search with a text

    @property
    def recall(self) -> float:
        """The lower recall."""
        return min(self.by_image, self.by_text)


@dataclass(frozen=True)
class IndexFacts:
    """The facts of a generation of an index."""

    plan: BuildPlan
    count: int
    columns: list[str]  # of the metadata
    files: dict[str, FileFacts]  # files that a search reads
    nearest: NearestFacts | None  # None if every vector is compared
    rate: float | None  # images embedded a second by the last build; None if it embedded none
    created: str  # time of the first build, in UTC, ISO 8601
    changed: str
    mapped: Mapped | None = None  # None if the release of the plan has embedded every image
    format: int = FORMAT

    def to_json(self) -> str:
        """Format as the text that `from_json` reads."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @property
    def cost(self) -> str:
        """The work of embedding all images again, such as "12,000 images, about 5 minutes"."""
        images = f"{self.count:,} images"
        if not self.rate:
            return images
        return f"{images}, about {in_words(max(1.0, self.count / self.rate))}"

    @classmethod
    def from_json(cls, data: bytes | str) -> IndexFacts:
        """Parse the text of `to_json`; raises `ValueError` for any other text."""
        values = json.loads(data)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            other = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"it has the format {other!r:.40} and this version reads {FORMAT}")
        import pydantic  # imported here, as a base installation lacks it and still shows --help

        try:
            facts = checker(cls).validate_python(values)
        except pydantic.ValidationError as error:
            raise ValueError(first_problem(error)) from None
        if facts.count < 0:
            raise ValueError(f"count: {facts.count} is less than 0")
        return facts


@dataclass(frozen=True)
class Hit:
    """An image that a search found."""

    id: str
    score: float  # cosine, in [-1, 1]
    metadata: dict[str, Any]  # all columns but embedding and thumbnail, ready for JSON
    thumbnail: bytes = b""  # JPEG; empty if not requested or missing


@dataclass(frozen=True, eq=False)
class Search:
    """A checked search of an index."""

    embedding: NDArray[np.float32]  # [D], unit length
    top_k: int
    where: str | None  # a condition
    thumbnails: bool
    cancelled: Cancelled | None


class Index(ABC):
    """A generation of an index, which never changes."""

    def __init__(self, folder: Path, generation: str, facts: IndexFacts) -> None:
        self.folder = folder
        self.generation = generation
        self.facts = facts

    def __len__(self) -> int:
        return self.facts.count

    @property
    def name(self) -> str:
        """Name of the index for callers: that of its folder."""
        return as_text(self.folder.name)

    @abstractmethod
    def _find(self, search: Search) -> list[Hit]:
        """Find the nearest images, in any order."""

    @abstractmethod
    def _embeddings(
        self, ids: list[str], cancelled: Cancelled | None
    ) -> dict[str, NDArray[np.float32]]:
        """Get the embeddings, float32 [D], of those ids that the index has."""

    def search(
        self,
        embedding: NDArray[np.float32],
        top_k: int = 10,
        where: str | None = None,
        *,
        thumbnails: bool = False,
        offset: int | None = None,
        min_score: float | None = None,
        cancelled: Cancelled | None = None,
    ) -> list[Hit]:
        """Find the nearest images, best first, that meet the condition `where`; with an `offset`, a
        page of them.
        """
        if not 1 <= top_k <= MAX_TOP_K:
            raise invalid(f"top_k is {top_k}; allowed are whole numbers from 1 to {MAX_TOP_K}")
        if offset is not None and not 0 <= offset <= MAX_TOP_K:
            raise invalid(f"offset is {offset}; allowed are whole numbers from 0 to {MAX_TOP_K}")
        if min_score is not None and not -1 <= min_score <= 1:
            raise invalid(f"min_score is {min_score:g}; allowed are numbers from -1 to 1")
        condition = where if where and where.strip() else None
        # In a big index the hits depend on the depth, so all pages are searched equally deep.
        depth = top_k if offset is None else MAX_TOP_K
        check_cancelled(cancelled)
        hits = self._find(Search(embedding, depth, condition, thumbnails, cancelled))
        for hit in hits:
            if not abs(hit.score) <= 1 + UNIT:
                raise self._damaged(f"gives {hit.id!r:.200} the score {hit.score:g}")
        if min_score is not None:
            hits = [hit for hit in hits if hit.score >= min_score]
        hits = sorted(hits, key=lambda hit: (-hit.score, hit.id))
        if offset is None:
            return hits
        if offset > len(hits):
            raise invalid(f"offset is {offset}, past the end; this search finds {len(hits)} images")
        return hits[offset : offset + top_k]

    def embeddings(
        self, ids: Sequence[str], cancelled: Cancelled | None = None
    ) -> list[NDArray[np.float32]]:
        """Get the embeddings of images, float32 [D] each, unit length."""
        for id in ids:
            check_length(id, what="name of an image")
        vectors = self._embeddings(list(dict.fromkeys(ids)), cancelled)
        for id in ids:
            if id not in vectors:
                raise invalid(f"the index {self.name!r} has no image {id!r:.200}")
            if not abs(np.linalg.norm(vectors[id]) - 1) < UNIT:
                raise self._damaged(f"has no unit length for {id!r:.200}")
        return [vectors[id] for id in ids]

    def _damaged(self, why: str) -> TaskError:
        """Error of a search in damaged files; the log gets the reason."""
        print(f"the index {self.name} {why}, see radapter-index verify", file=sys.stderr)
        return TaskError(
            UNKNOWN_INDEX,
            f"the index {self.name} can't be searched: a file is damaged; the server's log says"
            " why",
        )
