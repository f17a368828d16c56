"""Writing an index's table: images that are not in it yet are read, embedded and appended, batch by
batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.index.cluster import Cluster
from radapter_serve.index.collection import Collection, Item
from radapter_serve.index.facts import IndexFacts, NearestFacts, OnBroken, Plan, build_command
from radapter_serve.index.integrity import DamagedFileError, check_files, files_of
from radapter_serve.index.mapped import FOLDER as SEARCHED
from radapter_serve.index.mapped import Mapped, described, write_mapped
from radapter_serve.index.neighbours import CODES, Neighbours, write_neighbours
from radapter_serve.index.reading import Read, read
from radapter_serve.index.recall import TEXTS, tune
from radapter_serve.index.store import EXACT, TABLE, vectors_of
from radapter_serve.index.store.local import table_errors
from radapter_serve.threads import decoders

BATCH = 256  # images that are embedded, then written; what a killed build loses at most
BROKEN = "broken.txt"
# Less makes LanceDB warn of readers, which there are none of.
_AT_ONCE = datetime.timedelta(milliseconds=1)

Progress = Callable[[int, int], None]  # images done, of how many


@dataclass
class Summary:
    """What a build or an addition did.

    Attributes:
        changed: whether the index is another than before.
        count: images in the index now.
        embedded: images that were embedded.
        kept: images that were in the index before and are unchanged.
        copies: files whose bytes another file has, too; each is in the index, and embedded once.
        removed: images that were taken out.
        broken: why each image that can't be read can't, by id.
        repeated: rows of the table that name an image of an earlier row.
        left_out: number of files of other kinds in the folder, by the end of their names.
        recall: recall@10 of the approximate search; None where every vector is compared.
    """

    changed: bool = True
    count: int = 0
    embedded: int = 0
    kept: int = 0
    copies: int = 0
    removed: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    recall: float | None = None


@dataclass(frozen=True)
class Sizes:
    """How many images a writer takes at once, and how many make an index a big one.

    Args:
        batch: images that are embedded, then written.
        exact: a search of up to so many compares every embedding; of more, FAISS names candidates.
    """

    batch: int = BATCH
    exact: int = EXACT


@dataclass(frozen=True)
class Base:
    """The generation that a new one begins as a copy of.

    Attributes:
        folder: of that generation.
        facts: what is known of it.
    """

    folder: Path
    facts: IndexFacts


class Writer:
    """Writes the table of a generation, which no search sees before it is installed.

    Args:
        folder: of the generation.
        plan: how the index is made.
        loaded: embeds the images.
        out: folder of the index, for messages.
        schema: of a table that is not there yet.
        cluster: reads and embeds in the place of this process.
        sizes: how many images are embedded at once, and up to how many need no FAISS.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        loaded: LoadedRelease,
        out: Path,
        schema: pa.Schema,
        cluster: Cluster | None = None,
        sizes: Sizes = Sizes(),  # frozen
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._loaded = loaded
        self._out = out
        self._cluster = cluster
        self._sizes = sizes
        with table_errors(out, plan):
            database = lancedb.connect(folder)
            if (folder / f"{TABLE}.lance").is_dir():
                self._table = database.open_table(TABLE)
            else:
                self._table = database.create_table(TABLE, schema=schema)
            self._schema = self._table.schema
            self._own = [
                n for n in self._schema.names if n not in ("width", "height", "thumbnail", "vector")
            ]
            rows = self._table.search().select(self._own).to_batches()
            # What is there, by id: its digest, and a hash of its metadata.
            self.known = {
                row["path"]: (row["digest"], self._hash(row))
                for batch in rows
                for row in batch.to_pylist()
            }
        self._digests = {digest for digest, _ in self.known.values()}

    def check_columns(self, collection: Collection) -> None:
        """Refuse a table whose columns, or whose values, the index has no place for."""
        own = {
            name: self._schema.field(name).type
            for name in self._own
            if name not in ("path", "digest")
        }
        again = f"build the index again: {build_command(self._out, self._plan)}"
        if collection.columns and set(collection.columns) != set(own):
            raise RAdapterError(
                f"the table's columns ({', '.join(sorted(collection.columns))}) are not those of"
                f" the index ({', '.join(sorted(own)) or 'none'}); {again}"
            )
        for name in collection.columns:
            try:
                pa.array([item.row[name] for item in collection.items], own[name])
            except (pa.ArrowException, OverflowError) as error:
                raise RAdapterError(
                    f"the table's column {name!r} is {collection.columns[name]} now, and"
                    f" {own[name]} in the index ({error}); {again}"
                ) from None

    def write(
        self, collection: Collection, on_broken: OnBroken, progress: Progress | None
    ) -> Summary:
        """Embed and append what is not there yet."""
        summary = Summary(repeated=collection.repeated, left_out=collection.left_out)
        done = 0
        for found in self._batches(collection.items):
            batch = list(zip(collection.items[done : done + len(found)], found, strict=True))
            for item, image in batch:
                if image.error:
                    _record_broken(item, image.error, summary, on_broken)
            summary.kept += sum(image.kept for image in found)
            with table_errors(self._out, self._plan):
                self._append(
                    [(item, image) for item, image in batch if not (image.error or image.kept)],
                    summary,
                )
            done += len(found)
            if progress is not None:
                progress(done, len(collection.items))
        return summary

    def delete(self, ids: Iterable[str]) -> int:
        """Remove images; returns how many were there."""
        ids = sorted(self.known.keys() & set(ids))
        with table_errors(self._out, self._plan):
            for start in range(0, len(ids), self._sizes.batch):
                names = ", ".join(map(_quoted, ids[start : start + self._sizes.batch]))
                self._table.delete(f"path IN ({names})")
        for id in ids:
            del self.known[id]
        return len(ids)

    def finish(self, summary: Summary, base: Base | None) -> IndexFacts:
        """Complete the generation, and the summary; returns what is known of the index now.

        Args:
            summary: what was done.
            base: what the generation began as a copy of; None where it began with nothing.
        """
        digests = [digest for digest, _ in self.known.values()]
        summary.count = len(digests)
        summary.copies = len(digests) - len(set(digests))
        lines = [f"{id}\t{why}\n" for id, why in sorted(summary.broken.items())]
        _write(self._folder / BROKEN, "".join(lines))
        if base is not None and self._is_same(base):
            summary.changed = False
            facts = base.facts
        else:
            facts = self._commit(base)
        summary.recall = facts.nearest.recall if facts.nearest else None
        return facts

    def _commit(self, base: Base | None) -> IndexFacts:
        """Make what a search reads, and describe the files as they stay."""
        with table_errors(self._out, self._plan):
            version = _compact(self._table)
            files = files_of(self._folder / f"{TABLE}.lance", base.facts.files if base else {})
            place = self._folder / SEARCHED
            shutil.rmtree(place, ignore_errors=True)  # what a stopped build left there
            place.mkdir()
            shape = len(self.known), self._plan.release.embed_dim
            write_mapped(place, self._table.search().to_batches(), shape)
            nearest = self._write_nearest(place, base)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return IndexFacts(
            plan=self._plan,
            count=len(self.known),
            columns=[name for name in self._schema.names if name not in ("vector", "thumbnail")],
            files=files,
            searched=described(place),
            nearest=nearest,
            table_version=version,
            created=base.facts.created if base else now,
            changed=now,
        )

    def _is_same(self, base: Base) -> bool:
        """Whether nothing was written to the copy, and what a search needs is there."""
        if self._table.version != base.facts.table_version:
            return False
        if (base.facts.nearest is None) != (len(self.known) <= self._sizes.exact):
            return False
        with contextlib.suppress(DamagedFileError):
            check_files(base.folder / SEARCHED, base.facts.searched, complete=True)
            return True
        return False

    def _before(self, item: Item) -> str:
        """The digest of an image that the index has with the same metadata; a folder says nothing
        of metadata.
        """
        digest, metadata = self.known.get(item.id, ("", 0))
        return digest if not item.row or metadata == self._hash(_row(item, digest)) else ""

    def _batches(self, items: list[Item]) -> Iterator[list[Read]]:
        """The files, read batch by batch, by threads of this process or by a cluster."""
        turned = self._loaded.preprocess.exif_orientation
        size = self._plan.thumbnails
        many = self._sizes.batch
        if self._cluster is not None:
            asked = [(item.id, item.file, self._before(item)) for item in items]
            yield from self._cluster.read(asked, many, size, turned)
            return
        with ThreadPoolExecutor(decoders(8), thread_name_prefix="decode") as pool:
            for start in range(0, len(items), many):
                batch = items[start : start + many]
                yield list(
                    pool.map(
                        lambda i: read(i.id, i.file, self._before(i), self._loaded, size), batch
                    )
                )

    def _hash(self, row: Mapping[str, Any]) -> int:
        return hash(repr([row.get(name) for name in self._own]))

    def _append(self, images: list[tuple[Item, Read]], summary: Summary) -> None:
        """Embed a batch and write its rows; files with the same bytes are embedded once."""
        if not images:
            return
        embeds = self._embedded({image.digest for _, image in images} & self._digests)
        fresh = {image.digest: image for _, image in images if image.digest not in embeds}
        embeds |= {
            digest: image.vector for digest, image in fresh.items() if image.vector is not None
        }
        waiting = {
            digest: image.prepared for digest, image in fresh.items() if digest not in embeds
        }
        if waiting:
            embeds |= dict(
                zip(waiting, self._loaded.embed_pixels(list(waiting.values())), strict=True)
            )
        summary.embedded += len(fresh)
        rows = [
            {**_row(item, image.digest), **image.details, "vector": embeds[image.digest]}
            for item, image in images
        ]
        self.delete(item.id for item, _ in images)
        self._table.add(pa.Table.from_pylist(rows, schema=self._schema))
        for (item, image), row in zip(images, rows, strict=True):
            self.known[item.id] = image.digest, self._hash(row)
            self._digests.add(image.digest)

    def _embedded(self, digests: set[str]) -> dict[str, NDArray[np.float32]]:
        """The embeddings in the table, by the digest of the file."""
        if not digests:
            return {}
        names = ", ".join(_quoted(digest) for digest in digests)
        found = (
            self._table.search()
            .where(f"digest IN ({names})")
            .select(["digest", "vector"])
            .to_arrow()
        )
        return dict(zip(found["digest"].to_pylist(), vectors_of(found["vector"]), strict=True))

    def _write_nearest(self, place: Path, base: Base | None) -> NearestFacts | None:
        """Make what a search by FAISS needs; None where there are too few images for one."""
        count = len(self.known)
        if count <= self._sizes.exact:
            return None
        vectors = Mapped(place, (count, self._plan.release.embed_dim)).vectors
        before = base.facts.nearest if base else None
        cells = None
        # Of a larger index the vectors have changed much.
        if base is not None and before is not None and count <= 2 * before.trained_on:
            codes = {CODES: base.facts.searched[CODES]}
            with contextlib.suppress(DamagedFileError):
                check_files(base.folder / SEARCHED, codes, complete=True)
                cells = base.folder / SEARCHED
        made = write_neighbours(place, vectors, cells, before)
        effort = tune(Neighbours(place, vectors), self._loaded.embed_texts(TEXTS))
        return dataclasses.replace(
            made,
            nprobes=int(effort["nprobes"]),
            candidates=int(effort["candidates"]),
            recall=effort["recall"],
        )


def _compact(table: Any) -> int:
    """Have LanceDB merge the table's files, and drop all versions but the last, which is
    returned.
    """
    version = None
    while version != table.version:
        version = table.version
        table.optimize(cleanup_older_than=_AT_ONCE)
    return int(version)


def _row(item: Item, digest: str) -> dict[str, Any]:
    return {**item.row, "path": item.id, "digest": digest}


def _record_broken(item: Item, why: str, summary: Summary, on_broken: OnBroken) -> None:
    if on_broken == "refuse":
        raise RAdapterError(
            f"{item.id!r} can't be indexed: {why}; repair it, or leave such images out: --on-broken"
            " skip"
        )
    summary.broken[item.id] = why


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def read_broken(folder: Path) -> list[str]:
    """The ids of the images that could not be read when the index was written."""
    with contextlib.suppress(OSError):
        return [
            line.partition("\t")[0]
            for line in (folder / BROKEN)
            .read_text(encoding="utf-8", errors="backslashreplace")
            .splitlines()
        ]
    return []


def _write(path: Path, text: str) -> None:
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
