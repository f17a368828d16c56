"""Comparing an index with the files that it was made of."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.index.collection import open_collection
from radapter_serve.index.index import open_index
from radapter_serve.index.store import vectors_of
from radapter_serve.index.store.local import table_errors
from radapter_serve.index.writer import BATCH, Progress, read_broken
from radapter_serve.threads import decoders


@dataclass(frozen=True)
class Verification:
    """How an index and its files differ.

    Attributes:
        missing: ids of images whose files are gone.
        changed: ids of images whose files have other bytes now.
        new: ids of images that the index does not have yet.
        damaged: ids of images whose embedding has not unit length.
        alpha: the α that the images were embedded at.
    """

    missing: list[str]
    changed: list[str]
    new: list[str]
    damaged: list[str]
    alpha: float

    @property
    def ok(self) -> bool:
        """Whether index and files agree."""
        return not (self.missing or self.changed or self.new or self.damaged)


def verify(out: Path, *, progress: Progress | None = None) -> Verification:
    """Compare an index with its digests and with the images: every file is read, and no image is
    embedded.

    Raises:
        RAdapterError: there is no index, or a broken one.
    """
    index = open_index(out, complete=True)
    plan = index.facts.plan
    root = Path(plan.root)
    known: set[str] = set()
    missing = []
    changed = []
    damaged = []
    new = []
    with table_errors(out, plan), ThreadPoolExecutor(decoders(8)) as pool:
        for batch in index.rows(["path", "digest", "vector"], BATCH):
            ids = batch["path"].to_pylist()
            digests = batch["digest"].to_pylist()
            for id, digest, now in zip(
                ids, digests, pool.map(lambda id: _file_digest(root / id), ids), strict=True
            ):
                if now is None:
                    missing.append(id)
                elif now != digest:
                    changed.append(id)
            lengths = np.linalg.norm(vectors_of(batch["vector"]), axis=1)
            damaged += [
                id for id, length in zip(ids, lengths, strict=True) if not abs(length - 1) < 1e-3
            ]
            known.update(ids)
            if progress is not None:
                progress(len(known), len(index))
    broken = set(read_broken(out))
    with contextlib.suppress(RAdapterError):  # a source that is gone shows in `missing`
        collection = open_collection(plan.source, image_column=plan.image_column, root=root)
        new = [
            item.id for item in collection.items if item.id not in known and item.id not in broken
        ]
    return Verification(
        sorted(missing), sorted(changed), sorted(new), sorted(damaged), plan.release.alpha
    )


def _file_digest(file: Path) -> str | None:
    try:
        return digest_of(file)
    except OSError:
        return None
