"""A stand-in for the Hugging Face hub's HTTP, in the test's process, which keeps every commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_test"


class FakeHub:
    """Repositories by name, each a list of commits."""

    def __init__(self) -> None:
        # Commits of each, the newest last: a name of 40 digits, and the files
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        # Statuses in place of an answer, by method and a pattern of the path
        self.answers: dict[tuple[str, str], int] = {}
        self.asked: list[tuple[str, str]] = []  # method and path
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _any(self) -> None:
                path = unquote(urlsplit(self.path).path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.asked.append((self.command, path))
                status, headers, content = hub.answer(
                    self.command, path, body, self.headers.get("Authorization")
                )
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = _any  # names of the base class

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, name: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        return self.repositories[name][-1][1]

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add a commit; gives its name."""
        commits = self.repositories.setdefault(name, [])
        oid = hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def answer(
        self, method: str, path: str, body: bytes, token: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        for (wanted, pattern), status in self.answers.items():
            if method == wanted and re.search(pattern, path):
                return status, {}, b""
        if path == "/":
            return 200, {}, b""
        if method == "POST" and token != f"Bearer {TOKEN}":
            return 401, {}, b""
        if path == "/api/validate-yaml":
            return _json({})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path):
            return self._of_model(found[1], found[2], found[3], body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._of_model(found[1], "revision", "main", body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        return 404, {}, b""

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        name = f"{asked['organization'] or 'someone'}/{asked['name']}"
        known = name in self.repositories
        if not known:
            self.commit(name, {".gitattributes": b""})
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
        return _json({"url": f"{self.url}/{name}"}, 409 if known else 200)

    def _of_model(
        self, name: str, action: str, revision: str, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        commit = self._at(name, revision)
        if commit is None:
            code = "RevisionNotFound" if name in self.repositories else "RepoNotFound"
            return 404, {"X-Error-Code": code}, b""
        oid, files = commit
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            return _json({"id": name, "sha": oid, "siblings": siblings, "tags": []})
        if action == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": _blob(data)}
                for file, data in files.items()
            ]
            return _json(entries)
        if action == "preupload":
            asked = json.loads(body)["files"]
            known = [{"path": one["path"], "uploadMode": "regular"} for one in asked]
            return _json({"files": [{**one, "shouldIgnore": False} for one in known]})
        changed = dict(files)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del changed[line["value"]["path"]]
        made = self.commit(name, changed)
        url = f"{self.url}/{name}/commit/{made}"
        return _json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, name: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        commit = self._at(name, revision)
        if commit is None or file not in commit[1]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = commit[1][file]
        return 200, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": commit[0]}, data

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        if revision == "main" and commits:
            return commits[-1]
        return {oid: (oid, files) for oid, files in commits}.get(revision)


@contextmanager
def fake_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, with a token and a cache of its own; the libraries of this process ask it."""
    from huggingface_hub import constants

    from radapter_serve.sources import unreachable

    hub = FakeHub()
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("NO_PROXY", "127.0.0.1")
    unreachable.cache_clear()
    try:
        yield hub
    finally:
        hub.close()
        unreachable.cache_clear()


def _json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _blob(data: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
