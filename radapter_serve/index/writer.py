"""Writes the next generation of an index.

A build appends one Parquet file for each batch to a hidden folder next to the index. A stopped
build continues from these files; at the end they become the files of a new generation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import checker, disk_errors, lock, map_array, staged, write_text
from radapter_serve.index.collection import (
    COLUMNS,
    Cluster,
    Collection,
    Item,
    Progress,
    Read,
    read,
)
from radapter_serve.index.facts import BuildPlan, IndexFacts
from radapter_serve.index.folder import (
    EXACT,
    THUMBNAIL,
    VECTOR,
    VECTORS,
    FolderIndex,
    describe_files,
    install,
    vector_column,
    vectors_of,
    write_table,
)
from radapter_serve.index.neighbours import CODES, write_neighbours
from radapter_serve.process import decoders

BATCH = 256  # images embedded and then written; a killed build loses at most one batch
BROKEN = "broken.txt"
KEEP = datetime.timedelta(hours=1)  # how long a replaced generation stays for servers to read
_PLAN = "building.json"  # in the folder of an unfinished build
_ROWS = 4096  # rows copied at once
_NAMED = 10  # broken images that a refusal names


@dataclass
class Summary:
    """Result of a build or an addition; counts are numbers of images unless noted."""

    changed: bool = True  # False if the index has the same rows as before
    count: int = 0
    embedded: int = 0
    kept: int = 0  # unchanged since the index before
    copies: int = 0  # files with the same bytes as another one; embedded once
    removed: int = 0
    broken: dict[str, str] = field(default_factory=dict)  # reason, by id
    repeated: int = 0  # rows of the table that name an image of an earlier row
    left_out: Mapping[str, int] = field(default_factory=dict)  # files of other kinds, by suffix
    rate: float | None = None  # images embedded a second; None if none were
    recall: float | None = None  # recall@10; None if every vector is compared


@contextlib.contextmanager
def building(out: Path, *, resume: bool = True) -> Iterator[Path]:
    """Yield the folder where one command at a time writes the next generation of an index; it goes
    at the end, unless it has the files of a stopped build, which goes on later. Without `resume`
    such files go before.
    """
    folder = out.with_name(f".{out.name}.building")
    with disk_errors(out), lock(folder, "radapter-index"):
        if not (resume and parts_in(folder)):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield folder
        finally:
            if not parts_in(folder):
                shutil.rmtree(folder, ignore_errors=True)


class NotResumed(RAdapterError):
    """The files of a stopped command can't be used; the message says why."""


@contextlib.contextmanager
def writing(
    out: Path,
    plan: BuildPlan,
    loaded: LoadedRelease,
    columns: Mapping[str, Any],
    *,
    resume: bool = True,
    extend: bool = False,
) -> Iterator[Writer]:
    """Write the next generation of an index, alone. The rows of a current generation with the same
    plan, and of a stopped command, are taken over unless `resume` is False.
    """
    with building(out, resume=resume) as folder:
        try:
            with disk_errors(out):
                yield Writer(folder, plan, loaded, out, columns, resume=resume, extend=extend)
                shutil.rmtree(folder)
        except NotResumed as error:
            # An addition has no flag to discard them.
            discard = f"remove {folder}" if extend else "discard it with --no-resume"
            raise RAdapterError(
                f"the stopped build of {out} can't be resumed: {error}; {discard}"
            ) from None
        except BaseException as error:
            if not parts_in(folder):
                raise
            kept = "the embeddings so far are kept: give the same command again to continue"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from error
            if isinstance(error, RAdapterError):
                raise RAdapterError(f"{error}; {kept}") from error
            raise


def parts_in(folder: Path) -> list[Path]:
    """The files of a stopped build, in their order."""
    return sorted(folder.glob("*.parquet"))


def write_generation(
    folder: Path,
    out: Path,
    facts: IndexFacts,
    rows: Iterable[pa.RecordBatch],
    loaded: LoadedRelease,
) -> IndexFacts:
    """Write rows in the folder of `building`, and make them the current generation of an index;
    returns the facts with those of its files, and the time.
    """
    place = folder / "new"
    shutil.rmtree(place, ignore_errors=True)  # left by a stopped command
    place.mkdir()
    write_table(place, rows, (facts.count, facts.plan.release.embed_dim))
    nearest = None
    if facts.count > EXACT:
        vectors = map_array(place / VECTORS)
        nearest = write_neighbours(place, vectors, loaded.embed_texts)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = dataclasses.replace(
        facts,
        files=describe_files(place),
        nearest=nearest,
        created=facts.created or now,
        changed=now,
    )
    install(place, out, facts, KEEP)
    return facts


def schema_of(columns: Mapping[str, pa.DataType], dim: int) -> pa.Schema:
    """The columns of an index with these metadata, and embeddings of width `dim`."""
    sizes = {"width": pa.int32(), "height": pa.int32()}
    ends = {THUMBNAIL: pa.large_binary(), VECTOR: pa.list_(pa.float32(), dim)}
    return pa.schema({"path": pa.string(), **sizes, "digest": pa.string(), **columns, **ends})


def new_facts(plan: BuildPlan, count: int, schema: pa.Schema) -> IndexFacts:
    """Facts of a new index, as far as they are known before it is written."""
    columns = [name for name in schema.names if name not in (VECTOR, THUMBNAIL)]
    return IndexFacts(plan, count, columns, {}, None, None, "", "")


# Known rows are in the current generation, and in files of a stopped build and this one.
_Source: TypeAlias = FolderIndex | Path


def _rows_of(source: _Source, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Read columns of a source of rows."""
    if isinstance(source, FolderIndex):
        yield from source.rows(columns, _ROWS)
        return
    try:
        table = parquet.read_table(source, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        why = reason(error) if source.exists() else f"{source.name} is gone"
        raise NotResumed(f"{why:.200}") from None
    yield from table.select(columns).combine_chunks().to_batches()


def _vectors_of(source: _Source) -> NDArray[np.float32]:
    """All vectors of a source of rows, [N, D]."""
    if isinstance(source, FolderIndex):
        return source.vectors
    return np.concatenate([vectors_of(batch[VECTOR]) for batch in _rows_of(source, [VECTOR])])


class _KnownRow(NamedTuple):
    """A known row: digest of its file, hash of its metadata, and its place."""

    digest: str
    metadata: int
    source: _Source
    row: int


class Writer:
    """Writes the next generation of an index, which searches see once it is published."""

    def __init__(
        self,
        folder: Path,
        plan: BuildPlan,
        loaded: LoadedRelease,
        out: Path,
        columns: Mapping[str, Any],
        *,
        resume: bool,
        extend: bool,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._loaded = loaded
        self._out = out
        self._vectors = lru_cache(8)(_vectors_of)

        # Take over the current generation, if it has the same plan. A build replaces a damaged one,
        # and embeds the images of a mapped one, which an addition takes as they are.
        self._base: FolderIndex | None = None
        try:
            base = FolderIndex(out, complete=True, codes=extend) if resume else None
        except RAdapterError:
            if extend:
                raise
            base = None
        if base is not None and (extend or base.facts.mapped is None):
            self._base = None if base.facts.plan.differences(plan) else base

        # Take over the rows of a stopped command.
        self._parts = parts_in(folder)
        if self._parts:
            try:
                values = json.loads((folder / _PLAN).read_bytes())
                stopped = checker(BuildPlan).validate_python(values)
            except (OSError, ValueError):
                raise NotResumed(f"{_PLAN} can't be read") from None
            if other := stopped.differences(plan):
                raise NotResumed(
                    f"it had another {', '.join(other)}, to finish with {stopped.command(out)}"
                )
        write_text(folder / _PLAN, json.dumps(dataclasses.asdict(plan)))

        # The columns of the current generation stay; a new table's may have other types.
        if self._base is not None:
            names = [name for name in self._base.schema.names if name not in COLUMNS]
            columns = {name: self._base.schema.field(name).type for name in names}
        self._columns = columns
        self.schema = schema_of(columns, plan.release.embed_dim)
        self._metadata = ["path", "digest", *columns]

        # Note the known rows by id; a later row replaces an earlier one of the same image.
        self.known: dict[str, _KnownRow] = {}
        self._by_digest: dict[str, _KnownRow] = {}
        for source in self._sources():
            batches = _rows_of(source, self._metadata)
            self._note(source, (row for batch in batches for row in batch.to_pylist()))

    def write(
        self, collection: Collection, progress: Progress | None, cluster: Cluster | None = None
    ) -> Summary:
        """Embed and append the images that are new or changed."""
        # Check that the table has the columns of the index, and values that fit them.
        kinds = self._columns
        again = f"build the index again: {self._plan.command(self._out)}"
        if collection.columns and collection.columns.keys() != kinds.keys():
            raise RAdapterError(
                f"the table's columns ({', '.join(sorted(collection.columns))}) are not those of"
                f" the index ({', '.join(sorted(kinds)) or 'none'}); {again}"
            )
        for name, kind in collection.columns.items():
            try:
                if kind != kinds[name]:
                    pa.array([item.row[name] for item in collection.items], kinds[name])
            except (pa.ArrowException, OverflowError) as error:
                raise RAdapterError(
                    f"the table's column {name!r} is {kind} now, and {kinds[name]} in the index"
                    f" ({error}); {again}"
                ) from None

        # Read the images in batches, and embed what is fresh.
        summary = Summary(repeated=collection.repeated, left_out=collection.left_out)
        start = time.monotonic()
        done = 0
        for images in self._read_images(collection.items, cluster):
            items = collection.items[done : done + len(images)]
            fresh = []
            for item, image in zip(items, images, strict=True):
                if image.error:
                    summary.broken[item.id] = image.error
                elif image.kept:
                    summary.kept += 1
                else:
                    fresh.append((item, image))
            refuses = bool(summary.broken) and self._plan.on_broken == "refuse"
            if fresh and not refuses:  # after a broken image, only look for others
                summary.embedded += self._append(fresh)
            done += len(images)
            if progress is not None:
                progress(done, len(collection.items))
            is_last = done == len(collection.items) or len(summary.broken) >= _NAMED
            if refuses and is_last:
                named = list(summary.broken.items())[:_NAMED]
                reasons = ", ".join(f"{id!r:.200} can't be indexed: {why}" for id, why in named)
                raise RAdapterError(
                    f"{reasons}; repair what is named, or leave such images out: --on-broken skip"
                )
        if summary.embedded:
            summary.rate = summary.embedded / max(time.monotonic() - start, 1e-3)
        return summary

    def remove(self, ids: Iterable[str], summary: Summary) -> None:
        """Leave images out of the next generation."""
        for id in list(ids):
            del self.known[id]
            summary.removed += 1

    def publish(self, summary: Summary) -> None:
        """Make the known rows the current generation; completes `summary`."""
        base = self._base
        summary.count = len(self.known)
        summary.copies = summary.count - len({row.digest for row in self.known.values()})

        # Keep the generation if it has the same rows; its codes may be damaged.
        is_same = base is not None and not self._parts and summary.count == len(base)
        if base is not None and is_same and (not base.facts.nearest or base.is_whole(CODES)):
            summary.changed = False
            facts = base.facts
        else:
            facts = new_facts(self._plan, summary.count, self.schema)
            facts = dataclasses.replace(facts, rate=summary.rate)
            if base is not None:
                facts = dataclasses.replace(
                    facts,
                    rate=summary.rate or base.facts.rate,
                    created=base.facts.created,
                    mapped=base.facts.mapped,
                )
            facts = write_generation(self._folder, self._out, facts, self._rows(), self._loaded)
        lines = [f"{id}\t{why}\n" for id, why in sorted(summary.broken.items())]
        write_text(self._out / BROKEN, "".join(lines))
        summary.recall = facts.nearest.recall if facts.nearest else None

    def _sources(self) -> list[_Source]:
        """What has known rows, in the order of writing."""
        return [*self._parts] if self._base is None else [self._base, *self._parts]

    def _rows(self) -> Iterator[pa.RecordBatch]:
        """Read all known rows, in the order of writing."""
        kept: dict[_Source, list[int]] = {}
        for row in self.known.values():
            kept.setdefault(row.source, []).append(row.row)
        for source, numbers in ((source, kept.get(source)) for source in self._sources()):
            if numbers is None:
                continue
            rows = np.sort(numbers)
            start = 0
            for batch in _rows_of(source, self.schema.names):
                first, last = np.searchsorted(rows, [start, start + len(batch)])
                if first < last:
                    yield batch.take(pa.array(rows[first:last] - start)).cast(self.schema)
                start += len(batch)

    def _read_images(self, items: list[Item], cluster: Cluster | None) -> Iterator[list[Read]]:
        """Read files in batches, with threads of this process or with a cluster."""
        size = self._plan.thumbnails

        def before(item: Item) -> str:
            """Digest of an image that is known with the same metadata, or empty."""
            row = self.known.get(item.id)
            if row is None:
                return ""
            same = not item.row or row.metadata == self._hash(_values_of(item, row.digest))
            return row.digest if same else ""

        if cluster is not None:
            asked = [(item.id, item.file, before(item)) for item in items]
            yield from cluster.read(asked, BATCH, size)
            return
        with ThreadPoolExecutor(decoders(8), thread_name_prefix="decode") as pool:
            for start in range(0, len(items), BATCH):
                batch = items[start : start + BATCH]
                yield list(
                    pool.map(lambda i: read(i.id, i.file, before(i), self._loaded, size), batch)
                )

    def _append(self, images: list[tuple[Item, Read]]) -> int:
        """Embed a batch and write its rows; returns the number of embedded images."""
        embeds: dict[str, NDArray[np.float32]] = {}
        waiting: dict[str, Any] = {}
        embedded = 0
        for _, image in images:
            if image.digest in embeds or image.digest in waiting:
                continue
            if image.digest in self._by_digest:
                row = self._by_digest[image.digest]
                embeds[image.digest] = self._vectors(row.source)[row.row]
                continue
            embedded += 1
            if image.vector is not None:  # a worker of the cluster embedded it
                embeds[image.digest] = image.vector
            else:
                waiting[image.digest] = image.prepared
        if waiting:
            fresh = self._loaded.embed_pixels(list(waiting.values()))
            embeds |= dict(zip(waiting, fresh, strict=True))

        rows = [{**_values_of(item, image.digest), **image.details} for item, image in images]
        table = pa.Table.from_pylist(
            rows, schema=self.schema.remove(self.schema.names.index(VECTOR))
        )
        vectors = np.stack([embeds[image.digest] for _, image in images])
        table = table.append_column(VECTOR, vector_column(vectors)).cast(self.schema)
        part = self._folder / f"{len(self._parts):06}.parquet"
        with staged(part) as temporary:
            parquet.write_table(table, temporary, use_dictionary=False, write_page_checksum=True)
        self._parts.append(part)
        self._note(part, rows)
        return embedded

    def _note(self, source: _Source, rows: Iterable[Mapping[str, Any]]) -> None:
        # A mapped embedding stays that of its file, and is not taken for a copy of the file.
        is_mapped = isinstance(source, FolderIndex) and source.facts.mapped is not None
        for number, values in enumerate(rows):
            row = _KnownRow(values["digest"], self._hash(values), source, number)
            self.known[values["path"]] = row
            if not is_mapped:
                self._by_digest[row.digest] = row

    def _hash(self, row: Mapping[str, Any]) -> int:
        return hash(repr([row.get(name) for name in self._metadata]))


def _values_of(item: Item, digest: str) -> dict[str, Any]:
    return {**item.row, "path": item.id, "digest": digest}
