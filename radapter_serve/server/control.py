"""Triton's interface for its owner: which models are there, load one, unload one.

It can load code into the server, so it is closed to requests without the secret.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from radapter_serve.errors import RAdapterError, reason

SECRET_HEADER = "radapter-secret"


class NoAnswer(RAdapterError):
    """The server did not answer, or not in time."""


@dataclass(frozen=True)
class Answer:
    """An HTTP status, and the JSON of the body."""

    status: int
    body: Any

    @property
    def error(self) -> str:
        """Reason of a refusal; empty if there is none."""
        if self.status == 200 or not isinstance(self.body, dict):
            return ""
        return str(self.body.get("error", self.body))


class Control:
    """A client of a running tritonserver, at the URL of its HTTP endpoint, with its secret."""

    def __init__(self, url: str, secret: str) -> None:
        self.url = url
        self._headers = {"Content-Type": "application/json", SECRET_HEADER: secret}

    def index(self, *, ready: bool = False) -> list[dict[str, Any]]:
        """Versions of models, or those that are ready: name, version, state, reason."""
        versions: list[dict[str, Any]] = self._need("repository/index", {"ready": ready})
        return versions

    def serving(self) -> dict[str, list[int]]:
        """Versions of each model that answer requests."""
        models: dict[str, list[int]] = {}
        for version in self.index(ready=True):
            models.setdefault(version["name"], []).append(int(version["version"]))
        return {name: sorted(versions) for name, versions in sorted(models.items())}

    def load(self, model: str, *, timeout: float = 120.0) -> None:
        """Load a model from its folder, and wait until it answers; its loaded versions are served
        meanwhile.
        """
        self._need(f"repository/models/{quote(model)}/load", {}, timeout=timeout)

    def unload(self, model: str) -> None:
        """Let a model answer what it has begun, without waiting for that, and take no more."""
        self._need(f"repository/models/{quote(model)}/unload", {}, timeout=30.0)

    def is_ready(self) -> bool:
        """Whether the server says that all its models are ready."""
        try:
            return self.ask("health/ready", timeout=5.0).status == 200
        except NoAnswer:
            return False

    def version(self) -> str:
        """Version of Triton, such as 2.51.0."""
        return str(self.ask("").body["version"])

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = 10.0
    ) -> Answer:
        """Post JSON to a path below /v2, or get it if `body` is None; raise `NoAnswer` if nothing
        comes within `timeout` seconds.
        """
        address = self.url.removeprefix("http://")
        method = "GET" if body is None else "POST"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection = http.client.HTTPConnection(address, timeout=timeout)
            with contextlib.closing(connection):
                connection.request(method, f"/v2/{path}".rstrip("/"), data, self._headers)
                response = connection.getresponse()
                text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"{self.url}: no answer ({reason(error)})") from error
        try:
            return Answer(response.status, json.loads(text))
        except ValueError:
            return Answer(response.status, {})

    def _need(self, path: str, body: Mapping[str, Any], *, timeout: float = 10.0) -> Any:
        answer = self.ask(path, body, timeout=timeout)
        if answer.status != 200:
            raise RAdapterError(f"{self.url}: {answer.error or answer.status}")
        return answer.body
