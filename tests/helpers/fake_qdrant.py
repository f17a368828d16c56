"""Qdrant's REST interface over the local mode of its own client, for tests without its server."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from typing import Any

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models

from tests.helpers.answering import Answer, answering

JSON = {"Content-Type": "application/json"}
_OK = models.UpdateResult(operation_id=0, status=models.UpdateStatus.COMPLETED)


class FakeQdrant:
    """A server with collections, a key, and `answer`, by which a test replaces true results."""

    def __init__(self) -> None:
        self.local = QdrantClient(":memory:")
        self.key: str | None = None
        # Of the path and the true result; bytes are sent as such.
        self.answer: Callable[[str, Any], Any] | None = None
        self.requests: list[tuple[str, str, Any]] = []
        self.url = ""

    def result(self, method: str, path: str, body: Any) -> Any:
        local = self.local
        if path == "/aliases":
            return local.get_aliases()
        if path == "/collections":
            return local.get_collections()
        if path == "/collections/aliases":
            actions = TypeAdapter(list[models.AliasOperations]).validate_python(body["actions"])
            return local.update_collection_aliases(actions)
        name, _, rest = path.removeprefix("/collections/").partition("/")
        if rest == "exists":
            return {"exists": local.collection_exists(name)}
        if (method, rest) == ("PUT", ""):
            collection = models.CreateCollection.model_validate(body)
            return local.create_collection(name, collection.vectors, metadata=collection.metadata)
        if (method, rest) == ("DELETE", ""):
            return local.delete_collection(name)
        info = local.get_collection(name)
        if rest == "points":
            batch = models.PointsBatch.model_validate(body).batch
            local.upsert(name, batch)
            return _OK
        if rest == "points/count":
            return local.count(name)
        if rest == "points/query":
            query = models.QueryRequest.model_validate(body)
            return local.query_points(
                name,
                query=getattr(query.query, "nearest", query.query),
                query_filter=query.filter,
                limit=query.limit or 10,
                with_payload=query.with_payload or False,
            )
        if rest == "points/scroll":
            scroll = models.ScrollRequest.model_validate(body)
            points, following = local.scroll(
                name,
                scroll_filter=scroll.filter,
                limit=scroll.limit or 10,
                with_payload=scroll.with_payload or False,
                with_vectors=scroll.with_vector or False,
            )
            return models.ScrollResult(points=points, next_page_offset=following)
        return _OK if rest == "index" else info


@contextmanager
def fake_qdrant() -> Iterator[FakeQdrant]:
    """A server in this process."""
    fake = FakeQdrant()
    lock = threading.Lock()

    def answer(method: str, path: str, headers: Message, data: bytes) -> Answer:
        body = json.loads(data) if data else None
        fake.requests.append((method, path, body))
        if fake.key is not None and headers.get("api-key") != fake.key:
            return 401, JSON, b'{"status": {"error": "who are you?"}}'
        try:
            with lock, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = fake.result(method, path, body)
        except ValueError as error:
            return (404 if re.search("not found", str(error)) else 400), JSON, b"{}"
        plain = result.model_dump(mode="json") if hasattr(result, "model_dump") else result
        if fake.answer is not None:
            plain = fake.answer(path, plain)
        if not isinstance(plain, bytes):
            plain = json.dumps({"result": plain, "status": "ok", "time": 0.1}).encode()
        return 200, JSON, plain

    with answering(answer) as port:
        fake.url = f"qdrant://127.0.0.1:{port}"
        yield fake
