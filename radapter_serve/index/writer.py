"""The table of an index while it is written: what is not there yet is read, embedded and appended, batch by batch."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfPq
from numpy.typing import NDArray
from PIL import Image, ImageOps

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.index.collection import Collection, Item
from radapter_serve.index.index import EXACT, FACTS, TABLE, engine_errors, rebuild, vectors_of
from radapter_serve.index.recall import TEXTS, tune
from radapter_serve.inputs.errors import TaskError
from radapter_serve.threads import decoders

BATCH = 256  # images that are embedded, then written; what a killed build loses at most
BROKEN = "broken.txt"
_NEVER = datetime.timedelta(days=36500)

OnBroken = Literal["refuse", "skip"]
Progress = Callable[[int, int], None]  # images done, of how many


class Release(Protocol):
    """What embeds: a `LocalRelease`, or a server's.

    Attributes:
        facts: its `release.json`, with the α that it embeds at.
    """

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def dial(self, alpha: float) -> None:
        """Embed at this α from now on; `facts` say so."""

    def prepare(self, data: bytes) -> Any:
        """From an image file to what `encode_images` takes; thread-safe, raises TaskError."""

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Prepared images to float32 [B, D] of unit length."""

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to float32 [N, D] of unit length; asked for where search is approximate."""


@dataclass
class Summary:
    """What a build or an addition did.

    Attributes:
        count: images in the index now.
        embedded: newly embedded.
        kept: there before, unchanged.
        copies: files whose bytes another one has, too; each is in the index, and embedded once.
        removed: pruned.
        broken: what could not be read and why, by id.
        repeated: rows of the table left out, for an earlier one names the same image.
        recall: recall@10 of the approximate search; None where every vector is compared.
    """

    count: int = 0
    embedded: int = 0
    kept: int = 0
    copies: int = 0
    removed: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    recall: float | None = None


class Writer:
    """The table of an index while it is written."""

    def __init__(self, folder: Path, facts: dict[str, Any], release: Release, schema: pa.Schema | None) -> None:
        self._folder, self._facts, self._release = folder, facts, release
        with engine_errors(folder):
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
        again = f"build the index again: {rebuild(self._folder, self._facts)}"
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
        summary = Summary(repeated=collection.repeated)
        with ThreadPoolExecutor(decoders(8), thread_name_prefix="decode") as pool:
            for start in range(0, len(collection.items), BATCH):
                batch = collection.items[start : start + BATCH]
                found = list(pool.map(self._read, batch))
                for image in found:
                    if image.error:
                        _complain(image, summary, on_broken)
                summary.kept += sum(image.kept for image in found)
                with engine_errors(self._folder):
                    self._append([image for image in found if not (image.error or image.kept)], summary)
                if progress is not None:
                    progress(start + len(batch), len(collection.items))
        return summary

    def delete(self, ids: Iterable[str]) -> None:
        """Remove rows."""
        ids = sorted(ids)
        with engine_errors(self._folder):
            for start in range(0, len(ids), BATCH):
                names = ", ".join(map(_quoted, ids[start : start + BATCH]))
                self._table.delete(f"path IN ({names})")
        for id in ids:
            self.known.pop(id, None)

    def finish(self, summary: Summary, keep: datetime.timedelta) -> None:
        """Make the approximate index where one is needed, and say in `index.json` that all this counts.

        Args:
            summary: what was done.
            keep: how old a version of the table stays, for those who read it.
        """
        summary.count = len(self.known)
        digests = [digest for digest, _ in self.known.values()]
        summary.copies = len(digests) - len(set(digests))
        with engine_errors(self._folder):
            engine = self._index(self._facts.get("engine", {}))
            summary.recall = engine.get("recall")
            engine["table_version"] = self._table.version
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        facts = {
            **self._facts,
            "count": summary.count,
            "columns": [name for name in self._schema.names if name not in ("vector", "thumbnail")],
            "engine": engine,
            "created": self._facts.get("created", now),
            "changed": now,
        }
        lines = "".join(f"{id}\t{why}\n" for id, why in sorted(summary.broken.items()))
        _write(self._folder / BROKEN, lines)
        _write(self._folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False))
        with engine_errors(self._folder):
            self._table.optimize(cleanup_older_than=keep)

    def _read(self, item: Item) -> _Image:
        """In one of several threads; the file's bytes are given back before the next."""
        try:
            item.id.encode()
            data = item.file.read_bytes()
            digest = digest_of(data)
            before, metadata = self.known.get(item.id, ("", 0))
            # A folder says nothing of metadata, so it changes none.
            if before == digest and (not item.row or metadata == self._hash(_row(item, digest))):
                return _Image(item, digest, kept=True)
            prepared = self._release.prepare(data)
            return _Image(item, digest, prepared, _look(data, int(self._facts["thumbnails"])))
        except UnicodeEncodeError:
            return _Image(item, error="its name is not UTF-8")
        except OSError as error:
            return _Image(item, error=error.strerror or str(error))
        except TaskError as error:
            return _Image(item, error=error.message)

    def _hash(self, row: Mapping[str, Any]) -> int:
        return hash(repr([row.get(name) for name in self._own]))

    def _append(self, images: list[_Image], summary: Summary) -> None:
        """Embed one batch, each content once, and write its rows."""
        if not images:
            return
        embeds = self._embedded({image.digest for image in images} & self._digests)
        fresh = {image.digest: image.prepared for image in images if image.digest not in embeds}
        if fresh:
            embeds |= dict(zip(fresh, self._release.encode_images(list(fresh.values())), strict=True))
            summary.embedded += len(fresh)
        rows = [{**_row(image.item, image.digest), **image.look} for image in images]
        arrays = {
            column.name: pa.array([row.get(column.name) for row in rows], column.type)
            for column in self._schema
            if column.name != "vector"
        }
        vectors = np.stack([embeds[image.digest] for image in images])
        arrays["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        self.delete(image.item.id for image in images if image.item.id in self.known)
        self._table.add(pa.table([arrays[name] for name in self._schema.names], schema=self._schema))
        for image, row in zip(images, rows, strict=True):
            self.known[image.item.id] = image.digest, self._hash(row)
            self._digests.add(image.digest)

    def _embedded(self, digests: set[str]) -> dict[str, NDArray[np.float32]]:
        """The embeddings of contents that are in the table."""
        if not digests:
            return {}
        names = ", ".join(_quoted(digest) for digest in digests)
        found = self._table.search().where(f"digest IN ({names})").select(["digest", "vector"]).to_arrow()
        return dict(zip(found["digest"].to_pylist(), vectors_of(found["vector"]), strict=True))

    def _index(self, engine: dict[str, Any]) -> dict[str, Any]:
        """An approximate index above EXACT vectors, searched with the least effort that has the recall."""
        count = len(self.known)
        basis = {"name": "lancedb", "version": importlib.metadata.version("lancedb")}
        if count <= EXACT:
            self._settle()
            return basis
        if count > 2 * engine.get("trained_on", 0):  # its cells are of what there was then
            dim = int(self._facts["release"]["embed_dim"])
            self._table.create_index("vector", config=IvfPq("dot", num_sub_vectors=max(1, dim // 8)))
            engine = {"trained_on": count}
        self._settle()
        effort = tune(self._table, count, self._release.embed_texts(TEXTS))
        return {**basis, "index": "IVF_PQ", "trained_on": engine["trained_on"], **effort}

    def _settle(self) -> None:
        """Optimize until nothing is left to do, so that doing it once more only removes old versions.

        What `index.json` names must stay, however old, until it is replaced.
        """
        before = None
        while before != self._table.version:
            before = self._table.version
            self._table.optimize(cleanup_older_than=_NEVER)


@dataclass(frozen=True)
class _Image:
    """A file that was read: kept as it is in the index, or prepared and looked at, or broken."""

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


def _look(data: bytes, size: int) -> dict[str, Any]:
    """Width and height as the file has them, and a thumbnail, upright as people look at it."""
    look: dict[str, Any] = {}
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:  # it was decoded once; do without
        look["width"], look["height"] = image.size
        if size:
            image.draft("RGB", (size, size))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((size, size))
            out = io.BytesIO()
            small.save(out, "JPEG", quality=80)
            look["thumbnail"] = out.getvalue()
    return look


def digest_of(data: bytes) -> str:
    """Of a file's content."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def read_broken(folder: Path) -> list[str]:
    """Ids of the images that could not be read."""
    with contextlib.suppress(OSError):
        return [line.partition("\t")[0] for line in (folder / BROKEN).read_text(encoding="utf-8").splitlines()]
    return []


def _write(path: Path, text: str) -> None:
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
