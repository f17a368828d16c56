"""Commands on an index in a folder: build it from images or from existing embeddings, add to it,
and compare it with its image files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from radapter_serve.contract.labels import RULE, is_name
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index.collection import Cluster, Progress, open_collection, read_rows
from radapter_serve.index.facts import FACTS, BuildPlan, MadeBy, OnBroken
from radapter_serve.index.folder import (
    THUMBNAIL,
    VECTOR,
    FolderIndex,
    generations_of,
    map_vectors,
    read_pointer,
    unit_vectors,
    vector_column,
)
from radapter_serve.index.qdrant import refuse_link
from radapter_serve.index.writer import (
    BATCH,
    BROKEN,
    Summary,
    building,
    new_facts,
    schema_of,
    write_generation,
    writing,
)
from radapter_serve.process import decoders

_ROWS = 4096  # rows written at once


def build(
    source: str,
    out: Path,
    loaded: LoadedRelease,
    *,
    image_column: str = "image",
    thumbnails: int = 128,
    exif_orientation: bool = True,
    on_broken: OnBroken = "refuse",
    resume: bool = True,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Build an index, atomically, or continue a stopped build; of the same images by the same
    release, only changes are embedded.
    """
    out = _checked(out)
    if not 0 <= thumbnails <= 1024:
        raise RAdapterError(f"--thumbnails is {thumbnails}; allowed: 0 (none) to 1024 px")
    if not exif_orientation:
        loaded = loaded.turned(False)
    collection = open_collection(source, image_column=image_column)
    plan = BuildPlan(
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
        if not readable:
            raise RAdapterError(
                f"none of the {len(collection.items)} images of {collection.source} can be read"
            )
        writer.remove(writer.known.keys() - readable, summary)
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
    """Embed new images and those with other bytes, atomically, with the release that made the
    index; `prune` removes images whose files are gone.
    """
    out = out.absolute()
    refuse_link(out)
    facts = read_pointer(out)[1]
    plan = facts.plan
    if plan.rows:
        raise RAdapterError(
            f"the index {out} was made of embeddings; build it again: {plan.command(out)}"
        )
    if loaded.release.dynamic_alpha:
        loaded = loaded.at(plan.release.alpha)
    if not plan.release.is_of(loaded.release):
        raise RAdapterError(
            f"the index {out} {plan.release.differs_from(loaded.release)}; add to it with a release"
            f" that embeds images as it did, or build it again ({facts.cost}):"
            f" {plan.command(out, loaded)}"
        )
    loaded = loaded.turned(plan.exif_orientation)
    plan = dataclasses.replace(
        plan, origin=dict(loaded.origin), on_broken=on_broken or plan.on_broken
    )
    root = Path(plan.root)
    collection = open_collection(source or plan.source, image_column=plan.image_column, root=root)
    with writing(out, plan, loaded, collection.columns, extend=True) as writer:
        summary = writer.write(collection, progress)
        if prune:
            gone = {id for id in writer.known if not os.path.lexists(root / id)}
            if len(gone) == len(writer.known):
                raise RAdapterError(
                    f"every image of the index {out} is gone, and an index has one at least; to end"
                    " it, remove its folder"
                )
            writer.remove(gone, summary)
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
    """Build an index, atomically, from a NumPy file [N, D] and a table with a row for each."""
    out = _checked(out)
    vectors = vectors.absolute()
    rows = rows.absolute()

    # Read the rows, and map their vectors.
    dim = loaded.release.embed_dim
    table = read_rows(rows, image_column)
    array = map_vectors(vectors, rows, table[image_column], unique=True)
    if array.shape[1] != dim:
        raise RAdapterError(
            f"the vectors of {vectors} have the width {array.shape[1]}, and the embeddings of"
            f" release {loaded.release.version} have {dim}; name their release with"
            " --model-repository DIR@N"
        )

    columns = {name: table[name].type for name in table.column_names if name != image_column}
    schema = schema_of(columns, dim)
    plan = BuildPlan(
        source=str(vectors),
        root=rows.parent.as_posix(),
        image_column=image_column,
        column_types={name: str(kind) for name, kind in columns.items()},
        thumbnails=0,
        exif_orientation=loaded.preprocess.exif_orientation,
        on_broken="refuse",
        release=MadeBy.of(loaded.release),
        origin=dict(loaded.origin),
        rows=str(rows),
    )
    facts = new_facts(plan, len(array), schema)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(array), _ROWS):
            part = np.array(array[start : start + _ROWS], np.float64)
            some = table.slice(start, len(part))
            values = {name: some[name] for name in columns}
            values["path"] = some[image_column]
            values[VECTOR] = vector_column(unit_vectors(part, vectors, range(start, len(array))))
            for name in ("width", "height", "digest", THUMBNAIL):
                values[name] = pa.nulls(len(part))
            whole = pa.table({name: values[name] for name in schema.names}).cast(schema)
            yield from whole.combine_chunks().to_batches()
            if progress is not None:
                progress(start + len(part), len(array))

    with building(out, resume=resume) as folder:
        nearest = write_generation(folder, out, facts, batches(), loaded).nearest
        (out / BROKEN).unlink(missing_ok=True)  # of an index that was replaced
    return Summary(count=len(array), recall=nearest.recall if nearest else None)


@dataclass
class Verification:
    """Differences between an index and its files, as ids of images."""

    missing: list[str] = field(default_factory=list)  # files that are gone
    changed: list[str] = field(default_factory=list)  # files that have other bytes now
    new: list[str] = field(default_factory=list)  # files that the index does not have yet

    @property
    def ok(self) -> bool:
        """True if the index and its files agree."""
        return not (self.missing or self.changed or self.new)


def verify(out: Path, *, progress: Progress | None = None) -> Verification:
    """Compare an index with its digests and with its images, if it was made of images."""
    refuse_link(out)
    index = FolderIndex(out, complete=True)
    plan = index.facts.plan
    result = Verification()
    if plan.rows:
        return result
    root = Path(plan.root)
    known: set[str] = set()

    def digest(id: str) -> str | None:
        with contextlib.suppress(OSError):
            return digest_of(root / id)
        return None

    with ThreadPoolExecutor(decoders(8)) as pool:
        for batch in index.rows(["path", "digest"], BATCH):
            ids = batch["path"].to_pylist()
            digests = batch["digest"].to_pylist()
            for id, before, now in zip(ids, digests, pool.map(digest, ids), strict=True):
                if now is None:
                    result.missing.append(id)
                elif now != before:
                    result.changed.append(id)
            known.update(ids)
            if progress is not None:
                progress(len(known), len(index))

    with contextlib.suppress(OSError):
        lines = (out / BROKEN).read_text(encoding="utf-8", errors="backslashreplace")
        known.update(line.partition("\t")[0] for line in lines.splitlines())
    with contextlib.suppress(RAdapterError):  # the images of a missing source are in `missing`
        collection = open_collection(plan.source, image_column=plan.image_column, root=root)
        result.new = [item.id for item in collection.items if item.id not in known]
    for ids in (result.missing, result.changed, result.new):
        ids.sort()
    return result


def _checked(out: Path) -> Path:
    """The absolute path of an index to build; raises an error if it may not be written there."""
    out = out.absolute()
    if not is_name(out.name):
        raise RAdapterError(f"{out.name!r} can't be the name of an index; {RULE}")
    refuse_link(out)
    if out.exists() and not (out / FACTS).is_file() and not generations_of(out):
        raise RAdapterError(
            f"{out} already exists and is not an index; give another folder with --out"
        )
    return out
