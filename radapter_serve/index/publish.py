"""Publishing an index into a running Qdrant, next to the one that is searched there, then in its
place; and a folder that links to it.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qdrant_client import models

from radapter_serve.errors import RAdapterError
from radapter_serve.files import lock
from radapter_serve.index.facts import FACTS
from radapter_serve.index.filters import OWN, key_of, kind_of
from radapter_serve.index.folder import GENERATION, write_text
from radapter_serve.index.index import LINK, Index, current, link_of, open_index
from radapter_serve.index.qdrant import FACTS_KEY, Qdrant, is_collection_of, qdrant_errors
from radapter_serve.index.table import THUMBNAIL, VECTOR, plain, vectors_of

_BATCH = 64  # points of a request, of which Qdrant takes 32 MB
_TIMEOUT = 120  # seconds for a batch, and to begin an index of a column
SCHEMAS = {"number": "float", "text": "keyword", "truth": "bool", "time": "datetime"}


def publish(folder: Path, url: str, progress: Callable[[int, int], None] | None = None) -> bool:
    """Put an index into Qdrant, in place of the one there; readers see one or the other. Returns
    False if it is there already.
    """
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
    for batch in index.rows([*columns, VECTOR], _BATCH):
        for start in range(0, len(batch), _BATCH):
            part = batch.slice(start, _BATCH)
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
