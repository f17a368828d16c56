"""Facts of an index: how it was made, what it holds, and how it is searched, as in its
`index.json`.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_text, checker
from radapter_serve.release.release import Release

FORMAT = 6
FACTS = "index.json"
OnBroken = Literal["refuse", "skip"]


def index_names(indexes: Path) -> list[str]:
    """The names of the indexes in a folder."""
    names = sorted(as_text(path.parent.name) for path in indexes.glob(f"*/{FACTS}"))
    return [name for name in names if name[0] != "."]


@dataclass(frozen=True)
class MadeBy:
    """The facts of the release that made an index, as in `Release`, with the α that the images were
    embedded at, and its digest.
    """

    architecture: str
    alpha: float
    dynamic_alpha: bool
    version: int
    precision: str
    base_digest: str
    adapter_digest: str
    embed_dim: int
    digest: str

    @classmethod
    def of(cls, release: Release) -> MadeBy:
        """The facts of a release."""
        names = (name for name in cls.__dataclass_fields__ if name != "digest")
        return cls(**{name: getattr(release, name) for name in names}, digest=release.digest)

    def is_of(self, release: Release) -> bool:
        """Whether the embeddings are of a release; one that takes any α has that of the index."""
        with contextlib.suppress(RAdapterError):  # an α that no release has
            used = release.at(self.alpha) if release.dynamic_alpha else release
            return self.digest == used.digest
        return False

    def __str__(self) -> str:
        return f"{self.architecture} at alpha {self.alpha:g}, release {self.version}"


@dataclass(frozen=True)
class Plan:
    """How an index is made; if two plans differ in one of _DECIDING, all images are embedded
    again.
    """

    source: str  # as `radapter-index build` takes it; the file of vectors of an index of embeddings
    root: str  # folder that ids start from
    image_column: str
    column_types: dict[str, str]  # Arrow types of the table's other columns
    thumbnails: int  # longest side, in px; 0 for none
    exif_orientation: bool
    on_broken: OnBroken
    release: MadeBy
    origin: dict[str, str]  # the release's place, as in `LoadedRelease`
    rows: str = ""  # the table of an index of embeddings; empty for images

    def differences(self, other: Plan) -> list[str]:
        """In what another plan makes another index, in words."""
        words = [
            word for name, word in _DECIDING.items() if getattr(self, name) != getattr(other, name)
        ]
        return words if self.release.digest == other.release.digest else ["release", *words]


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
    """The size of a file in bytes, and its digest, `sha256:` and hexadecimal digits."""

    size: int
    digest: str


@dataclass(frozen=True)
class NearestFacts:
    """How FAISS finds the nearest."""

    cells: int
    trained_on: int  # number of vectors that the cells were computed from
    nprobes: int = 1  # cells that a search for ten looks into
    candidates: int = 1  # vectors that FAISS names, to be sorted exactly
    recall: float = 0.0  # recall@10 on a sample


@dataclass(frozen=True)
class IndexFacts:
    """The facts of a generation of an index."""

    plan: Plan
    count: int
    columns: list[str]  # of the metadata
    files: dict[str, FileFacts]  # that a search reads
    nearest: NearestFacts | None  # None if every vector is compared
    created: str  # when the index was made first, in UTC, ISO 8601
    changed: str
    format: int = FORMAT

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, data: bytes | str) -> IndexFacts:
        """Read the text of `to_json`; raise `ValueError` for anything else."""
        values = json.loads(data)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            other = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"it has the format {other!r:.40} and this version reads {FORMAT}")
        facts: IndexFacts = read_facts(cls, values)
        if facts.count < 0:
            raise ValueError(f"count: {facts.count} is less than 0")
        return facts


def read_facts(kind: Any, values: Any) -> Any:
    """A dataclass from JSON values; raise `ValueError` that names the first wrong one."""
    import pydantic  # a base installation, which lacks it, shows the help of its commands

    try:
        return checker(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def build_command(
    folder: Path,
    plan: Plan,
    release: Release | None = None,
    origin: Mapping[str, str] | None = None,
) -> str:
    """The command that builds an index again, by the release and the place of its plan, or by
    others.
    """
    command = ["radapter-index", "build"]
    if plan.rows:
        command += ["--from-embeddings", plan.source, "--rows", plan.rows, "--out", str(folder)]
    else:
        command += [plan.source, "--out", str(folder)]
    if plan.image_column != "image":
        command += ["--image-column", plan.image_column]
    if plan.thumbnails != 128 and not plan.rows:
        command += ["--thumbnails", str(plan.thumbnails)]
    if not plan.exif_orientation and not plan.rows:
        command.append("--no-exif-orientation")
    if plan.on_broken != "refuse":
        command += ["--on-broken", plan.on_broken]
    for name, place in (plan.origin if origin is None else origin).items():
        command += [f"--{name.replace('_', '-')}", place]
    if release.dynamic_alpha if release else plan.release.dynamic_alpha:
        command += ["--alpha", f"{plan.release.alpha:g}"]
    return shlex.join(command)


def mismatch(made: MadeBy, release: Release) -> str:
    """Why an index can't be searched by a release that did not make it, as the end of a sentence
    about the index.
    """
    now = MadeBy.of(release)
    return (
        f"is of another release ({made} then; this is {now}), so their embeddings can't be compared"
    )
