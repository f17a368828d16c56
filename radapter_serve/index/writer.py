"""Writing an index's table: images that are not in it yet are read, embedded and appended, batch by batch."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfPq
from numpy.typing import NDArray
from PIL import ExifTags, Image

from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, staged
from radapter_serve.index.collection import Collection, Item
from radapter_serve.index.index import EXACT, FACTS, TABLE, build_command, table_errors, vectors_of
from radapter_serve.index.recall import TEXTS, tune
from radapter_serve.inputs.errors import TaskError
from radapter_serve.inputs.preprocess import oriented
from radapter_serve.runtimes.embedding_release import EmbeddingRelease
from radapter_serve.threads import decoders

BATCH = 256  # images that are embedded, then written; what a killed build loses at most
BROKEN = "broken.txt"
_ORIENTATION = ExifTags.Base.Orientation
_NEVER = datetime.timedelta(days=36500)

OnBroken = Literal["refuse", "skip"]
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


class Writer:
    """Writes an index's table, which nobody sees before `finish`.

    Args:
        folder: of the index.
        facts: what `index.json` is to say, but for what only the table tells.
        release: embeds the images.
        schema: of a table that is not there yet.
    """

    def __init__(
        self, folder: Path, facts: dict[str, Any], release: EmbeddingRelease, schema: pa.Schema | None = None
    ) -> None:
        self._folder, self._facts, self._release = folder, facts, release
        with table_errors(folder):
            database = lancedb.connect(folder)
            if (folder / f"{TABLE}.lance").is_dir():
                self._table = database.open_table(TABLE)
            else:
                self._table = database.create_table(TABLE, schema=schema)
            self._schema = self._table.schema
            self._own = [n for n in self._schema.names if n not in ("width", "height", "thumbnail", "vector")]
            rows = self._table.search().select(self._own).to_batches()
            # What is there, by id: its digest, and a hash of its metadata.
            self.known = {row["path"]: (row["digest"], self._hash(row)) for batch in rows for row in batch.to_pylist()}
        self._digests = {digest for digest, _ in self.known.values()}

    def check_columns(self, collection: Collection) -> None:
        """Refuse a table whose columns, or whose values, the index has no place for."""
        own = {name: self._schema.field(name).type for name in self._own if name not in ("path", "digest")}
        again = f"build the index again: {build_command(self._folder, self._facts)}"
        if collection.columns and set(collection.columns) != set(own):
            raise RAdapterError(
                f"the table's columns ({', '.join(sorted(collection.columns))}) are not those of the index "
                f"({', '.join(sorted(own)) or 'none'}); {again}"
            )
        for name in collection.columns:
            try:
                pa.array([item.row[name] for item in collection.items], own[name])
            except (pa.ArrowException, OverflowError) as error:
                raise RAdapterError(
                    f"the table's column {name!r} is {collection.columns[name]} now, and {own[name]} in the index "
                    f"({error}); {again}"
                ) from None

    def write(self, collection: Collection, on_broken: OnBroken, progress: Progress | None) -> Summary:
        """Embed and append what is not there yet."""
        summary = Summary(repeated=collection.repeated, left_out=collection.left_out)
        with ThreadPoolExecutor(decoders(8), thread_name_prefix="decode") as pool:
            for start in range(0, len(collection.items), BATCH):
                batch = collection.items[start : start + BATCH]
                found = list(pool.map(self._read, batch))
                for image in found:
                    if image.error:
                        _complain(image, summary, on_broken)
                summary.kept += sum(image.kept for image in found)
                with table_errors(self._folder):
                    self._append([image for image in found if not (image.error or image.kept)], summary)
                if progress is not None:
                    progress(start + len(batch), len(collection.items))
        return summary

    def delete(self, ids: Iterable[str]) -> int:
        """Remove images; returns how many were there."""
        ids = sorted(self.known.keys() & set(ids))
        with table_errors(self._folder):
            for start in range(0, len(ids), BATCH):
                names = ", ".join(map(_quoted, ids[start : start + BATCH]))
                self._table.delete(f"path IN ({names})")
        for id in ids:
            del self.known[id]
        return len(ids)

    def finish(self, summary: Summary, keep: datetime.timedelta) -> None:
        """Make the approximate index where one is needed, and say in `index.json` that all this counts.

        Args:
            summary: what was done.
            keep: how old a version of the table stays, for those who read it.
        """
        summary.count = len(self.known)
        digests = [digest for digest, _ in self.known.values()]
        summary.copies = len(digests) - len(set(digests))
        search = self._facts.get("search", {})
        summary.changed = search.get("table_version") != self._table.version
        if summary.changed:
            with table_errors(self._folder):
                search = {**self._index(search), "table_version": self._table.version}
        summary.recall = search.get("recall")
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        facts = {
            **self._facts,
            "count": summary.count,
            "columns": [name for name in self._schema.names if name not in ("vector", "thumbnail")],
            "search": search,
            "created": self._facts.get("created", now),
            "changed": now if summary.changed else self._facts["changed"],
        }
        lines = "".join(f"{id}\t{why}\n" for id, why in sorted(summary.broken.items()))
        _write(self._folder / BROKEN, lines)
        _write(self._folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False))
        with table_errors(self._folder):
            self._table.optimize(cleanup_older_than=keep)

    def _read(self, item: Item) -> _Image:
        """Read a file, and prepare it where the index does not have it; several threads do so at once."""
        try:
            item.id.encode()
            data = item.file.read_bytes()
            digest = digest_of(data)
            before, metadata = self.known.get(item.id, ("", 0))
            # A folder says nothing of metadata, so it changes none.
            if before == digest and (not item.row or metadata == self._hash(_row(item, digest))):
                return _Image(item, digest, kept=True)
            prepared = self._release.prepare(data)
            return _Image(item, digest, prepared, self._look(data))
        except UnicodeEncodeError:
            return _Image(item, error="its name is not UTF-8")
        except OSError as error:
            return _Image(item, error=error.strerror or str(error))
        except TaskError as error:
            return _Image(item, error=error.message)

    def _look(self, data: bytes) -> dict[str, Any]:
        """Width and height of the image as it was embedded, and a thumbnail, which always stands upright."""
        look: dict[str, Any] = {}
        size = int(self._facts["thumbnails"])
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:  # it was decoded once; do without
            sideways = self._release.preprocess.exif_orientation and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
            look["width"], look["height"] = image.size[::-1] if sideways else image.size
            if size:
                image.draft("RGB", (size, size))
                small = oriented(image).convert("RGB")
                small.thumbnail((size, size))
                out = io.BytesIO()
                small.save(out, "JPEG", quality=80)
                look["thumbnail"] = out.getvalue()
        return look

    def _hash(self, row: Mapping[str, Any]) -> int:
        return hash(repr([row.get(name) for name in self._own]))

    def _append(self, images: list[_Image], summary: Summary) -> None:
        """Embed a batch and write its rows; files with the same bytes are embedded once."""
        if not images:
            return
        embeds = self._embedded({image.digest for image in images} & self._digests)
        fresh = {image.digest: image.prepared for image in images if image.digest not in embeds}
        if fresh:
            embeds |= dict(zip(fresh, self._release.encode_images(list(fresh.values())), strict=True))
            summary.embedded += len(fresh)
        rows = [{**_row(image.item, image.digest), **image.look, "vector": embeds[image.digest]} for image in images]
        self.delete(image.item.id for image in images)
        self._table.add(pa.Table.from_pylist(rows, schema=self._schema))
        for image, row in zip(images, rows, strict=True):
            self.known[image.item.id] = image.digest, self._hash(row)
            self._digests.add(image.digest)

    def _embedded(self, digests: set[str]) -> dict[str, NDArray[np.float32]]:
        """The embeddings in the table, by the digest of the file."""
        if not digests:
            return {}
        names = ", ".join(_quoted(digest) for digest in digests)
        found = self._table.search().where(f"digest IN ({names})").select(["digest", "vector"]).to_arrow()
        return dict(zip(found["digest"].to_pylist(), vectors_of(found["vector"]), strict=True))

    def _index(self, search: dict[str, Any]) -> dict[str, Any]:
        """Make the approximate index that a table of more than EXACT images needs; returns how to search the table."""
        count = len(self.known)
        basis = {"name": "lancedb", "version": importlib.metadata.version("lancedb")}
        if count <= EXACT:
            self._settle()
            return basis
        if count > 2 * search.get("trained_on", 0):  # its cells are of what there was then
            dim = int(self._facts["release"]["embed_dim"])
            self._table.create_index("vector", config=IvfPq("dot", num_sub_vectors=max(1, dim // 8)))
            search = {"trained_on": count}
        self._settle()
        effort = tune(self._table, count, self._release.embed_texts(TEXTS))
        return {**basis, "index": "IVF_PQ", "trained_on": search["trained_on"], **effort}

    def _settle(self) -> None:
        """Let LanceDB tidy up until nothing is left to do; later it only has to remove old versions.

        The version that `index.json` names has to stay, however old it is, until `index.json` is replaced.
        """
        before = None
        while before != self._table.version:
            before = self._table.version
            self._table.optimize(cleanup_older_than=_NEVER)


@dataclass(frozen=True)
class _Image:
    """A file that was read: it is in the index already, or it is prepared for the encoder, or it is broken."""

    item: Item
    digest: str = ""
    prepared: Any = None
    look: Mapping[str, Any] = field(default_factory=dict)
    kept: bool = False
    error: str = ""


def _row(item: Item, digest: str) -> dict[str, Any]:
    return {**item.row, "path": item.id, "digest": digest}


def _complain(image: _Image, summary: Summary, on_broken: OnBroken) -> None:
    if on_broken == "refuse":
        raise RAdapterError(
            f"{image.item.id!r} can't be indexed: {image.error}; mend it, or leave such images out: --on-broken skip"
        )
    summary.broken[image.item.id] = image.error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def read_broken(folder: Path) -> list[str]:
    """The ids of the images that could not be read when the index was written."""
    with contextlib.suppress(OSError):
        return [line.partition("\t")[0] for line in (folder / BROKEN).read_text(encoding="utf-8").splitlines()]
    return []


def _write(path: Path, text: str) -> None:
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
