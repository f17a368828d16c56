"""Building an index, adding to it, and comparing it with the files that it was made of."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from radapter_serve.errors import RAdapterError
from radapter_serve.index.collection import open_collection
from radapter_serve.index.index import FACTS, FORMAT, TABLE, Index, engine_errors, mismatch, read_facts, vectors_of
from radapter_serve.index.writer import (
    BATCH,
    OnBroken,
    Progress,
    Release,
    Summary,
    Writer,
    digest_of,
    read_broken,
)
from radapter_serve.lock import lock
from radapter_serve.release.facts import release_digest
from radapter_serve.threads import decoders

_NAMES = ("architecture", "alpha", "version", "precision", "base_digest", "adapter_digest", "embed_dim")
_KEEP = datetime.timedelta(hours=1)  # for servers that still read what an addition replaced


@dataclass(frozen=True)
class Verification:
    """How an index and the files differ, ids of each kind.

    Attributes:
        missing: in the index, the file is gone.
        changed: the file has other bytes now.
        new: in the source, not in the index.
        damaged: the embedding is not of unit length.
        alpha: what the index was embedded at.
    """

    missing: list[str]
    changed: list[str]
    new: list[str]
    damaged: list[str]
    alpha: float

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.changed or self.new or self.damaged)


def build(
    source: str,
    out: Path,
    release: Release,
    *,
    image_column: str = "image",
    thumbnails: int = 128,
    on_broken: OnBroken = "refuse",
    resume: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Make an index, whole or not at all; one that stands at `out` is replaced when the new one is complete.

    Args:
        source: folder, `csv:FILE` or `parquet:FILE`.
        out: folder of the index.
        release: embeds.
        image_column: of a table.
        thumbnails: longer side at most in px; 0 for none.
        on_broken: skip counts and names images that can't be read, refuse stops.
        resume: go on with a build that was stopped; it begins anew otherwise.
        progress: told after every batch.

    Raises:
        RAdapterError: no image, a broken one to be refused, another thing at `out`, or nothing could be written.
    """
    if not 0 <= thumbnails <= 1024:
        raise RAdapterError(f"--thumbnails is {thumbnails}; allowed: 0 (none) to 1024 px")
    out = out.absolute()
    if out.exists() and not (out / FACTS).is_file():
        raise RAdapterError(f"{out} stands already and is no index; give another folder with --out")
    collection = open_collection(source, image_column=image_column)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "source": collection.source,
        "image_column": image_column,
        "root": collection.root.as_posix(),
        "release_digest": release_digest(release.facts),
        "release": {name: release.facts[name] for name in _NAMES},
        "thumbnails": thumbnails,
        "columns": {name: str(kind) for name, kind in collection.columns.items()},
    }
    staged = out.with_name(f".{out.name}.building")
    plan = staged / "plan.json"
    with (
        disk_errors(out),
        lock(staged, "radapter-index"),
        lock(out, "radapter-index") if out.exists() else contextlib.nullcontext(),
    ):
        if resume and plan.is_file():
            before = json.loads(plan.read_text(encoding="utf-8"))
            other = [name for name in facts if name not in ("release", "source") and before.get(name) != facts[name]]
            if other:
                raise RAdapterError(
                    f"the build of {out} that was stopped had another {', '.join(other)}; build without --resume"
                )
        else:
            _clear(staged)
            plan.write_text(json.dumps(facts), encoding="utf-8")
        try:
            writer = Writer(staged, facts, release, _schema(facts, collection.columns))
            summary = writer.write(collection, on_broken, progress)
            writer.delete(set(writer.known) - {item.id for item in collection.items})  # gone since it was stopped
            if not writer.known:
                raise RAdapterError(f"none of the {len(collection.items)} images of {source} can be read")
            writer.finish(summary, datetime.timedelta(milliseconds=1))
            plan.unlink()
            _replace(staged, out)
        except BaseException as error:
            if not _rows(staged):  # nothing to resume
                shutil.rmtree(staged, ignore_errors=True)
            elif isinstance(error, RAdapterError):
                raise RAdapterError(f"{error}; what is embedded is kept, go on with --resume") from error
            raise
    return summary


def add(
    out: Path,
    release: Release,
    source: str | None = None,
    *,
    prune: bool = False,
    on_broken: OnBroken = "refuse",
    progress: Progress | None = None,
) -> Summary:
    """Bring an index up to date: embed what is new or has other bytes, keep the rest. Seen whole or not at all.

    Args:
        out: folder of the index.
        release: embeds; of the index's own digest.
        source: where to look, as of `build`; the index's own source if None.
        prune: remove images whose files are gone.
        on_broken, progress: as of `build`.

    Raises:
        RAdapterError: no index, one of another release, or as of `build`.
    """
    out = out.absolute()
    read_facts(out)  # locking would make the folder
    with disk_errors(out), lock(out, "radapter-index"):
        facts = read_facts(out)
        if release.facts.get("dynamic_alpha"):
            release.dial(facts["release"]["alpha"])
        if facts["release_digest"] != release_digest(release.facts):
            raise RAdapterError(mismatch(out, facts, release.facts))
        root = Path(facts["root"])
        collection = open_collection(source or facts["source"], image_column=facts["image_column"], root=root)
        writer = Writer(out, facts, release, None)
        writer.check_columns(collection)
        summary = writer.write(collection, on_broken, progress)
        if prune:
            gone = {id for id in writer.known if not os.path.lexists(root / id)}
            writer.delete(gone)
            summary.removed = len(gone)
        writer.finish(summary, _KEEP)
    return summary


def verify(out: Path, *, progress: Progress | None = None) -> Verification:
    """Compare an index with the files: every file is read, no image is embedded.

    Raises:
        RAdapterError: no index, or a broken one.
    """
    index = Index(out)
    root = Path(index.facts["root"])
    known: set[str] = set()
    missing, changed, damaged, new = [], [], [], []
    with engine_errors(out), ThreadPoolExecutor(decoders(8)) as pool:
        for batch in index.table.search().select(["path", "digest", "vector"]).to_batches(BATCH):
            ids, digests = batch["path"].to_pylist(), batch["digest"].to_pylist()
            for id, digest, now in zip(ids, digests, pool.map(lambda id: _file_digest(root / id), ids), strict=True):
                if now is None:
                    missing.append(id)
                elif now != digest:
                    changed.append(id)
            lengths = np.linalg.norm(vectors_of(batch["vector"]), axis=1)
            damaged += [id for id, length in zip(ids, lengths, strict=True) if not abs(length - 1) < 1e-3]
            known.update(ids)
            if progress is not None:
                progress(len(known), len(index))
    broken = set(read_broken(out))
    with contextlib.suppress(RAdapterError):  # a source that is gone shows in `missing`
        collection = open_collection(index.facts["source"], image_column=index.facts["image_column"], root=root)
        new = [item.id for item in collection.items if item.id not in known and item.id not in broken]
    alpha = float(index.facts["release"]["alpha"])
    return Verification(sorted(missing), sorted(changed), sorted(new), sorted(damaged), alpha)


def _schema(facts: Mapping[str, Any], columns: Mapping[str, Any]) -> pa.Schema:
    dim = int(facts["release"]["embed_dim"])
    return pa.schema(
        [
            ("path", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("digest", pa.string()),
            *columns.items(),
            ("thumbnail", pa.binary()),
            ("vector", pa.list_(pa.float32(), dim)),
        ]
    )


def _file_digest(file: Path) -> str | None:
    try:
        return digest_of(file.read_bytes())
    except OSError:
        return None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _rows(staged: Path) -> bool:
    """Whether a stopped build has written any row."""
    with contextlib.suppress(Exception):
        return bool(lancedb.connect(staged).open_table(TABLE).count_rows())
    return False


def _replace(staged: Path, out: Path) -> None:
    """Put the new index in place of what stands there."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staged.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What the disk refuses, as an error for people."""
    try:
        yield
    except OSError as error:
        raise RAdapterError(f"cannot write {out}: {error.strerror or error}") from error
