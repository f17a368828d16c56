"""What `radapter-index` does with an index: build it, of images or of embeddings that are there
already, add to it, compare it with the files that it was made of, and publish it in Qdrant.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from radapter_serve.contract.labels import RULE, is_name
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import digest_of, lock
from radapter_serve.index.collection import Cluster, Progress, open_collection, read_rows
from radapter_serve.index.facts import FACTS, MadeBy, OnBroken, Plan, build_command, mismatch
from radapter_serve.index.folder import (
    GENERATION,
    THUMBNAIL,
    UNIT,
    VECTOR,
    generations_of,
    plain,
    vector_column,
    vectors_of,
    write_text,
)
from radapter_serve.index.index import LINK, Index, current, link_of, open_index
from radapter_serve.index.qdrant import (
    FACTS_KEY,
    OWN,
    Qdrant,
    is_collection_of,
    key_of,
    kind_of,
    qdrant_errors,
)
from radapter_serve.index.writer import BATCH, BROKEN, Summary, writing
from radapter_serve.process import decoders
from radapter_serve.release.repository import releases_with_digest, split_repository

SCHEMAS = {"number": "float", "text": "keyword", "truth": "bool", "time": "datetime"}  # Qdrant's
_ROWS = 4096  # rows that are written at once
_POINTS = 64  # of a request, of which Qdrant takes 32 MB
_TIMEOUT = 120  # seconds for such a request, and to begin an index of a column


def build(
    source: str,
    out: Path,
    loaded: LoadedRelease,
    *,
    image_column: str = "image",
    thumbnails: int = 128,
    exif_orientation: bool | None = None,
    on_broken: OnBroken = "refuse",
    resume: bool = True,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Make an index, whole or not at all.

    A stopped build goes on. An index that the same release made of the same images is brought up to
    date. Any other index at `out` is replaced when the new one is complete. `exif_orientation` None
    turns images if the release does; `ray` is the address of a cluster that reads and embeds.
    """
    out = out.absolute()
    if not 0 <= thumbnails <= 1024:
        raise RAdapterError(f"--thumbnails is {thumbnails}; allowed: 0 (none) to 1024 px")
    _check_place(out)
    if exif_orientation is not None:
        loaded = loaded.turned(exif_orientation)
    collection = open_collection(source, image_column=image_column)
    plan = Plan(
        source=collection.source,
        root=collection.root.as_posix(),
        image_column=image_column,
        column_types={name: str(kind) for name, kind in collection.columns.items()},
        thumbnails=thumbnails,
        exif_orientation=loaded.preprocess.exif_orientation,
        on_broken=on_broken,
        release=MadeBy.of(loaded.release),
        origin=dict(loaded.origin),
    )
    cluster = None if ray is None else Cluster(ray, loaded)
    with writing(out, plan, loaded, collection.columns, resume=resume) as writer:
        summary = writer.write(collection, progress, cluster)
        readable = {item.id for item in collection.items} - summary.broken.keys()
        gone = writer.known.keys() - readable
        summary.removed = len(gone)
        for id in gone:
            del writer.known[id]
        if not writer.known:
            raise RAdapterError(
                f"none of the {len(collection.items)} images of {collection.source} can be read"
            )
        writer.publish(summary)
    return summary


def add(
    out: Path,
    loaded: LoadedRelease,
    source: str | None = None,
    *,
    prune: bool = False,
    on_broken: OnBroken | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Embed images that are new or have other bytes, and keep the rest; seen whole or not at all.

    The release must be the one that made the index, or the same exported again. `source` None takes
    the index's own; `prune` removes images whose files are gone; `on_broken` None does as the last
    build or addition did.
    """
    out = out.absolute()
    _refuse_link(out)
    plan = current(out)[1].plan
    if plan.rows:
        raise RAdapterError(
            f"the index {out} was made of embeddings; build it again: {build_command(out, plan)}"
        )
    if loaded.release.dynamic_alpha:
        loaded = loaded.at(plan.release.alpha)
    if plan.release.digest != loaded.release.digest:
        again = build_command(out, plan, loaded.release, loaded.origin)
        text = f"the index {out} {mismatch(plan.release, loaded.release)}; build it again: {again}"
        repository, version = made_by(plan)
        if version is not None:
            place = f"{repository}@{version}"
            command = ["radapter-index", "add", "--out", str(out), "--model-repository", place]
            text += f"; or add to it by the release that made it: {shlex.join(command)}"
        raise RAdapterError(text)
    loaded = loaded.turned(plan.exif_orientation)
    plan = dataclasses.replace(
        plan, origin=dict(loaded.origin), on_broken=on_broken or plan.on_broken
    )
    root = Path(plan.root)
    collection = open_collection(source or plan.source, image_column=plan.image_column, root=root)
    with writing(out, plan, loaded, collection.columns, extend=True) as writer:
        # A table has the columns of the index, and values that fit them.
        kinds = {
            name: writer.schema.field(name).type
            for name in writer.metadata
            if name not in ("path", "digest")
        }
        again = f"build the index again: {build_command(out, plan)}"
        if collection.columns and set(collection.columns) != set(kinds):
            raise RAdapterError(
                f"the table's columns ({', '.join(sorted(collection.columns))}) are not those of"
                f" the index ({', '.join(sorted(kinds)) or 'none'}); {again}"
            )
        for name, kind in collection.columns.items():
            try:
                pa.array([item.row[name] for item in collection.items], kinds[name])
            except (pa.ArrowException, OverflowError) as error:
                raise RAdapterError(
                    f"the table's column {name!r} is {kind} now, and {kinds[name]} in the index"
                    f" ({error}); {again}"
                ) from None

        summary = writer.write(collection, progress)
        if prune:
            gone = {id for id in writer.known if not os.path.lexists(root / id)}
            summary.removed = len(gone)
            for id in gone:
                del writer.known[id]
        writer.publish(summary)
    return summary


def build_from_embeddings(
    vectors: Path,
    rows: Path,
    out: Path,
    loaded: LoadedRelease,
    *,
    image_column: str = "image",
    resume: bool = True,
    progress: Progress | None = None,
) -> Summary:
    """Make an index of embeddings that are there already, whole or not at all; no image is read.

    `vectors` is a NumPy file [N, D] of floats, which is mapped; each row is made unit length. The
    table `rows`, .parquet or .csv, has a row for each: its id in `image_column`, and metadata.
    """
    out = out.absolute()
    vectors = vectors.absolute()
    rows = rows.absolute()
    _check_place(out)
    try:
        array = np.load(vectors, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RAdapterError(f"{vectors} is not an array of NumPy's: {reason(error):.200}") from None
    dim = loaded.release.embed_dim
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise RAdapterError(f"{vectors} does not hold vectors; allowed: floats [N, {dim}] (.npy)")
    if array.shape[1] != dim:
        raise RAdapterError(
            f"the vectors of {vectors} have the width {array.shape[1]}, and the embeddings of"
            f" release {loaded.release.version} have {dim}; name their release with"
            " --model-repository DIR@N"
        )
    table = read_rows(rows, image_column)
    if len(table) != len(array):
        raise RAdapterError(f"{rows} has {len(table):,} rows, and {vectors} {len(array):,} vectors")
    ids = table[image_column]
    if len(ids.unique()) != len(ids):
        twice, _ = Counter(ids.to_pylist()).most_common(1)[0]
        raise RAdapterError(f"{rows} names {twice!r:.200} twice; an id is of one row")
    metadata = table.drop_columns([image_column])
    plan = Plan(
        source=str(vectors),
        root=rows.parent.as_posix(),
        image_column=image_column,
        column_types={column.name: str(column.type) for column in metadata.schema},
        thumbnails=0,
        exif_orientation=loaded.preprocess.exif_orientation,
        on_broken="refuse",
        release=MadeBy.of(loaded.release),
        origin=dict(loaded.origin),
        rows=str(rows),
    )
    columns = {column.name: column.type for column in metadata.schema}

    def batches(schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(array), _ROWS):
            part = np.array(array[start : start + _ROWS], np.float64)
            lengths = np.linalg.norm(part, axis=1, keepdims=True)
            bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
            if len(bad):
                raise RAdapterError(
                    f"{vectors}, row {start + bad[0]}: the vector has no direction (zero, or not"
                    " finite)"
                )
            some = table.slice(start, len(part))
            values = {name: some[name] for name in columns}
            values["path"] = some[image_column]
            values[VECTOR] = vector_column((part / lengths).astype(np.float32))
            for name in ("width", "height", "digest", THUMBNAIL):
                values[name] = pa.nulls(len(part))
            whole = pa.table({name: values[name] for name in schema.names}).cast(schema)
            yield from whole.combine_chunks().to_batches()
            if progress is not None:
                progress(start + len(part), len(array))

    with writing(out, plan, loaded, columns, resume=resume) as writer:
        summary = Summary(count=len(array))
        writer.publish(summary, batches(writer.schema))
    return summary


@dataclass
class Verification:
    """Differences between an index and its files, as ids of images."""

    alpha: float  # that the images were embedded at
    missing: list[str] = field(default_factory=list)  # files that are gone
    changed: list[str] = field(default_factory=list)  # files that have other bytes now
    new: list[str] = field(default_factory=list)  # files that the index does not have yet
    damaged: list[str] = field(default_factory=list)  # embeddings without unit length

    @property
    def ok(self) -> bool:
        """Whether index and files agree."""
        return not (self.missing or self.changed or self.new or self.damaged)


def verify(out: Path, *, progress: Progress | None = None) -> Verification:
    """Compare an index with its digests and with the images: every file is read, and no image is
    embedded. Of an index of embeddings, its own files are compared alone.
    """
    index = open_index(out, complete=True)
    plan = index.facts.plan
    root = Path(plan.root)
    result = Verification(plan.release.alpha)
    known: set[str] = set()

    def digest(id: str) -> str | None:
        with contextlib.suppress(OSError):
            return digest_of(root / id)
        return None

    with ThreadPoolExecutor(decoders(8)) as pool:
        for batch in index.rows(["path", "digest", "vector"], BATCH):
            ids = batch["path"].to_pylist()
            lengths = np.linalg.norm(vectors_of(batch["vector"]), axis=1)
            result.damaged += [
                id for id, length in zip(ids, lengths, strict=True) if not abs(length - 1) < UNIT
            ]
            if not plan.rows:
                digests = batch["digest"].to_pylist()
                for id, before, now in zip(ids, digests, pool.map(digest, ids), strict=True):
                    if now is None:
                        result.missing.append(id)
                    elif now != before:
                        result.changed.append(id)
            known.update(ids)
            if progress is not None:
                progress(len(known), len(index))

    if not plan.rows:
        with contextlib.suppress(OSError):
            lines = (out / BROKEN).read_text(encoding="utf-8", errors="backslashreplace")
            known.update(line.partition("\t")[0] for line in lines.splitlines())
        with contextlib.suppress(RAdapterError):  # a source that is gone shows in `missing`
            collection = open_collection(plan.source, image_column=plan.image_column, root=root)
            result.new = [item.id for item in collection.items if item.id not in known]
    for ids in (result.missing, result.changed, result.new, result.damaged):
        ids.sort()
    return result


def made_by(plan: Plan) -> tuple[str, int | None]:
    """The model repository that an index was made from, and the number there of the release that
    made it; empty if a server made the index, and None if the release is gone.
    """
    repository, _ = split_repository(plan.origin.get("model_repository", ""))
    if not repository:
        return "", None
    versions = releases_with_digest(Path(repository), plan.release.digest, plan.release.alpha)
    return repository, max(versions, default=None)


def _check_place(out: Path) -> None:
    if not is_name(out.name):
        raise RAdapterError(f"{out.name!r} can't be the name of an index; {RULE}")
    _refuse_link(out)
    if out.exists() and not (out / FACTS).is_file() and not generations_of(out):
        raise RAdapterError(
            f"{out} already exists and is not an index; give another folder with --out"
        )


def _refuse_link(out: Path) -> None:
    if link_of(out):
        raise RAdapterError(
            f"{out} links to a published index, which is read-only; change the index that was"
            " published there, and publish it again with radapter-index publish"
        )


def publish(folder: Path, url: str, progress: Progress | None = None) -> bool:
    """Put an index into Qdrant, in place of the one there; readers see one or the other. Returns
    False if it is there already.
    """
    from qdrant_client import models  # here: others need no client

    place = Qdrant(url)
    if link_of(folder):
        raise RAdapterError(
            f"{folder} links to a published index; publish the index that it was made of"
        )
    current(folder)  # locking would make the folder
    with lock(folder, "radapter-index"), qdrant_errors(url):
        index = open_index(folder, complete=True)
        odd = next((name for name in index.facts.columns if '"' in name or "\\" in name), None)
        if odd is not None:
            raise RAdapterError(
                f'the index {folder} has a column {odd!r}; Qdrant takes no " and \\ in a name'
            )
        client = place.client(_TIMEOUT)

        # Find the current collection. The name may be of something else.
        aliases = {alias.alias_name: alias for alias in client.get_aliases().aliases}
        before = aliases[place.name].collection_name if place.name in aliases else None
        if before is None:
            foreign = client.collection_exists(place.name)
        else:
            foreign = not is_collection_of(place.name, before)
        if foreign:
            raise RAdapterError(
                f"{url} is a collection that radapter-index did not make; give another name, or"
                " delete it there"
            )
        fresh = f"{place.name}-{index.generation}"
        if before == fresh and client.count(fresh, exact=True).count == len(index):
            return False

        # Fill a new collection.
        if client.collection_exists(fresh):  # a stopped publication left it
            client.delete_collection(fresh)
        facts = dataclasses.replace(index.facts, nearest=None, files={})
        client.create_collection(
            fresh,
            vectors_config=models.VectorParams(
                size=facts.plan.release.embed_dim, distance=models.Distance.DOT, on_disk=True
            ),
            on_disk_payload=True,
            metadata={FACTS_KEY: json.dumps({**dataclasses.asdict(facts), GENERATION: fresh})},
        )
        for column, arrow in (OWN | facts.plan.column_types).items():
            kind = kind_of(arrow)
            if kind is not None:
                schema: Any = SCHEMAS[kind]
                client.create_payload_index(fresh, key_of(column), field_schema=schema, wait=True)
        done = 0
        for batch in points_of(index):
            client.upsert(fresh, models.Batch(**batch), wait=True)
            done += len(batch["ids"])
            if progress is not None:
                progress(done, len(index))
        count = client.count(fresh, exact=True).count
        if count != len(index):
            raise RAdapterError(
                f"{url} has {count:,} of {len(index):,} images after all were put there;"
                " publish again"
            )

        # Switch the alias. Only the new collection and the one before it stay.
        create = models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=fresh, alias_name=place.name)
        )
        delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=place.name))
        client.update_collection_aliases([create] if before is None else [delete, create])
        for collection in client.get_collections().collections:
            name = collection.name
            if is_collection_of(place.name, name) and name not in (before, fresh):
                client.delete_collection(name)
    return True


def points_of(index: Index) -> Iterator[dict[str, Any]]:
    """The rows of the table as Qdrant's points, with their numbers as ids, batch by batch."""
    numbers = itertools.count()
    columns = [*index.facts.columns, THUMBNAIL]
    for batch in index.rows([*columns, VECTOR], _POINTS):
        for start in range(0, len(batch), _POINTS):
            part = batch.slice(start, _POINTS)
            payloads = []
            for row in part.select(columns).to_pylist():
                thumbnail = base64.b64encode(row.pop(THUMBNAIL) or b"").decode()
                payload = {name: plain(value) for name, value in row.items()}
                payloads.append({**payload, THUMBNAIL: thumbnail})
            yield {
                "ids": list(itertools.islice(numbers, len(payloads))),
                "vectors": vectors_of(part[VECTOR]).tolist(),
                "payloads": payloads,
            }


def link(url: str, out: Path) -> None:
    """Make a folder that links to a published index, for a server to serve."""
    Qdrant(url).current()
    if out.exists() and not link_of(out):
        raise RAdapterError(
            f"{out} already exists and is not a link to a published index; give another folder with"
            " --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / FACTS, json.dumps({LINK: url}))
