"""Putting an index into a running Qdrant, next to the one that is searched there, then in its
place.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from qdrant_client import models

from radapter_serve.errors import RAdapterError
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.filters import OWN, key_of, kind_of
from radapter_serve.index.index import Index
from radapter_serve.index.store import THUMBNAIL, plain, vectors_of
from radapter_serve.index.store.local import GENERATION, table_errors
from radapter_serve.index.store.qdrant import (
    FACTS_KEY,
    Qdrant,
    collection_of,
    is_collection_of,
    qdrant_errors,
)

_BATCH = 64  # points of a request, of which Qdrant takes 32 MB
_TIMEOUT = 120  # seconds for a batch, and to begin an index of a column
SCHEMAS = {"number": "float", "text": "keyword", "truth": "bool", "time": "datetime"}


def upload(index: Index, place: Qdrant, progress: Callable[[int, int], None] | None = None) -> bool:
    """Put an index into Qdrant; readers see the index that was there until all of this one is.

    Args:
        index: to publish.
        place: where Qdrant is.
        progress: called after every batch, with the images that are there and all.

    Returns:
        False where it is there already.

    Raises:
        RAdapterError: Qdrant refuses, something else has that name there, or a column's name can't
            be one there.
    """
    odd = next((name for name in index.facts.columns if '"' in name or "\\" in name), None)
    if odd is not None:
        raise RAdapterError(
            f'the index {index.folder} has a column {odd!r}; Qdrant takes no " and \\ in a name'
        )
    facts = dataclasses.replace(index.facts, nearest=None, files={})
    fresh = collection_of(place.name, index.generation)
    with table_errors(index.folder, index.facts.plan), qdrant_errors(place.url):
        client = place.client(_TIMEOUT)
        before = _counts(client, place)
        if before == fresh and client.count(fresh, exact=True).count == len(index):
            return False
        _create(client, fresh, facts)
        done = 0
        for batch in points_of(index):
            client.upsert(fresh, models.Batch(**batch), wait=True)
            done += len(batch["ids"])
            if progress is not None:
                progress(done, len(index))
        there = client.count(fresh, exact=True).count
        if there != len(index):
            raise RAdapterError(
                f"{place.url} has {there:,} of {len(index):,} images after all were put there;"
                " publish again"
            )
        _switch(client, place.name, before, fresh)
    return True


def _counts(client: Any, place: Qdrant) -> str | None:
    """The collection that counts now; None where there is none yet.

    Raises:
        RAdapterError: the name is taken by something else.
    """
    found = {alias.alias_name: alias.collection_name for alias in client.get_aliases().aliases}
    collection = found.get(place.name)
    if (collection is None and client.collection_exists(place.name)) or (
        collection is not None and not is_collection_of(place.name, collection)
    ):
        raise RAdapterError(
            f"{place.url} is a collection that radapter-index did not make; give another name, or"
            " delete it there"
        )
    return collection


def _create(client: Any, name: str, facts: IndexFacts) -> None:
    if client.collection_exists(name):  # what a publication left that was stopped
        client.delete_collection(name)
    client.create_collection(
        name,
        vectors_config=models.VectorParams(
            size=facts.plan.release.embed_dim, distance=models.Distance.DOT, on_disk=True
        ),
        on_disk_payload=True,
        metadata={FACTS_KEY: json.dumps({**dataclasses.asdict(facts), GENERATION: name})},
    )
    for column, arrow in (OWN | facts.plan.column_types).items():
        kind = kind_of(arrow)
        if kind is not None:
            client.create_payload_index(name, key_of(column), field_schema=SCHEMAS[kind], wait=True)


def points_of(index: Index) -> Iterator[dict[str, Any]]:
    """The rows of the table, with their numbers as ids, batch by batch."""
    numbers = itertools.count()
    columns = [*index.facts.columns, THUMBNAIL]
    for batch in index.rows([*columns, "vector"], _BATCH):
        for start in range(0, len(batch), _BATCH):
            part = batch.slice(start, _BATCH)
            rows = part.select(columns).to_pylist()
            vectors = vectors_of(part["vector"]).tolist()
            payloads = [_payload(row) for row in rows]
            yield {
                "ids": list(itertools.islice(numbers, len(rows))),
                "vectors": vectors,
                "payloads": payloads,
            }


def _payload(row: dict[str, Any]) -> dict[str, Any]:
    thumbnail = row.pop(THUMBNAIL) or b""
    return {
        **{name: plain(value) for name, value in row.items()},
        THUMBNAIL: base64.b64encode(thumbnail).decode(),
    }


def _switch(client: Any, name: str, before: str | None, fresh: str) -> None:
    """Have the alias name the new collection, and remove all but this one and the one before it."""
    create = models.CreateAliasOperation(
        create_alias=models.CreateAlias(collection_name=fresh, alias_name=name)
    )
    delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name))
    client.update_collection_aliases([create] if before is None else [delete, create])
    for collection in client.get_collections().collections:
        if is_collection_of(name, collection.name) and collection.name not in (before, fresh):
            client.delete_collection(collection.name)
