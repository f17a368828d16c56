"""Qdrant's REST interface over the local mode of its own client, for tests without its server."""

from __future__ import annotations

import json
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models

_OK = models.UpdateResult(operation_id=0, status=models.UpdateStatus.COMPLETED)


class FakeQdrant:
    """What the server holds, whom it lets in, and, where a test sets `answer`, what it says in
    place of the truth.
    """

    def __init__(self) -> None:
        self.local = QdrantClient(":memory:")
        self.key: str | None = None
        self.answer: Callable[[str, Any], Any] | None = (
            None  # of the path and the true result; bytes are sent as such
        )
        self.asked: list[tuple[str, str, Any]] = []
        self.url = ""
        self.pause = 0.0  # seconds between two bytes of an answer
        self.gone = False
        self._lock = threading.Lock()

    def result(self, method: str, path: str, body: Any) -> Any:
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._result(method, path, body)

    def _result(self, method: str, path: str, body: Any) -> Any:
        local = self.local
        if path == "/aliases":
            return local.get_aliases()
        if path == "/collections":
            return local.get_collections()
        if path == "/collections/aliases":
            return local.update_collection_aliases(
                [
                    TypeAdapter(models.AliasOperations).validate_python(one)
                    for one in body["actions"]
                ]
            )
        name, _, rest = path.removeprefix("/collections/").partition("/")
        if rest == "exists":
            return {"exists": local.collection_exists(name)}
        if (method, rest) == ("PUT", ""):
            asked = models.CreateCollection.model_validate(body)
            return local.create_collection(name, asked.vectors, metadata=asked.metadata)
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
            asked_for = models.QueryRequest.model_validate(body)
            return local.query_points(
                name,
                query=getattr(asked_for.query, "nearest", asked_for.query),
                query_filter=asked_for.filter,
                limit=asked_for.limit or 10,
                with_payload=asked_for.with_payload or False,
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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if fake.gone:
                self.close_connection = True
                return
            path = self.path.partition("?")[0]
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            body = json.loads(data) if data else None
            fake.asked.append((self.command, path, body))
            if fake.key is not None and self.headers.get("api-key") != fake.key:
                return self.say(401, b'{"status": {"error": "who are you?"}}')
            try:
                result = fake.result(self.command, path, body)
            except ValueError as error:
                return self.say(404 if re.search("not found", str(error)) else 400, b"{}")
            plain = result.model_dump(mode="json") if hasattr(result, "model_dump") else result
            if fake.answer is not None:
                plain = fake.answer(path, plain)
            if not isinstance(plain, bytes):
                plain = json.dumps({"result": plain, "status": "ok", "time": 0.1}).encode()
            return self.say(200, plain)

        do_PUT = do_POST = do_DELETE = do_GET

        def say(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            for start in range(len(data)) if fake.pause else ():
                self.wfile.write(data[start : start + 1])
                time.sleep(fake.pause)
            if not fake.pause:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a caller that gave up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"qdrant://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        fake.gone = True
        server.shutdown()
        server.server_close()
        thread.join()
