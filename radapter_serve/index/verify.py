"""Comparing an index with the files that it was made of."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index.collection import Progress, open_collection
from radapter_serve.index.index import open_index
from radapter_serve.index.table import UNIT, vectors_of
from radapter_serve.index.writer import BATCH, read_broken
from radapter_serve.threads import decoders


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
        known.update(read_broken(out))
        with contextlib.suppress(RAdapterError):  # a source that is gone shows in `missing`
            collection = open_collection(plan.source, image_column=plan.image_column, root=root)
            result.new = [item.id for item in collection.items if item.id not in known]
    for ids in (result.missing, result.changed, result.new, result.damaged):
        ids.sort()
    return result
