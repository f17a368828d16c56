"""What only `radapter-serve` may ask of its tritonserver: which models are there, and to load or
unload one.

Triton's own interface for it takes code from anyone who may use it, so it is closed to all who do
not send the secret.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from radapter_serve.errors import RAdapterError, reason

SECRET_HEADER = "radapter-secret"

# A proxy of the environment is not for this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NoAnswer(RAdapterError):
    """The server did not answer, or not in time."""


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        status: of HTTP, such as 200.
        body: what it said, from JSON; a refusal is `{"error": ...}`.
    """

    status: int
    body: Any

    @property
    def error(self) -> str:
        """Why it was refused; empty if it was not."""
        return (
            str(self.body.get("error", self.body))
            if self.status != 200 and isinstance(self.body, dict)
            else ""
        )


@dataclass(frozen=True)
class ServedVersion:
    """One version of a model, as Triton sees it.

    Attributes:
        model: its name.
        version: its number; 0 for a model that was never loaded.
        state: READY, LOADING, UNLOADING or UNAVAILABLE; empty if it was never loaded.
        reason: why it is not ready.
    """

    model: str
    version: int
    state: str
    reason: str = ""


class Control:
    """A running tritonserver, as its owner asks it.

    Args:
        url: of its HTTP endpoint.
        secret: that it was started with.
    """

    def __init__(self, url: str, secret: str) -> None:
        self.url = url
        self._secret = secret

    def index(self, *, ready: bool = False) -> list[ServedVersion]:
        """All versions of all models that the server knows.

        Args:
            ready: those that answer requests alone.

        Raises:
            RAdapterError: no answer, or a refusal.
        """
        return [
            ServedVersion(
                one["name"],
                int(one.get("version") or 0),
                one.get("state", ""),
                one.get("reason", ""),
            )
            for one in self._need("repository/index", {"ready": ready})
        ]

    def serving(self) -> dict[str, list[int]]:
        """The versions of each model that answer requests."""
        models: dict[str, list[int]] = {}
        for one in self.index(ready=True):
            models.setdefault(one.model, []).append(one.version)
        return {name: sorted(versions) for name, versions in sorted(models.items())}

    def load(self, model: str, *, timeout: float = 120.0) -> None:
        """Load a model as its folder is now, and wait until it answers; one that is loaded is
        served meanwhile.

        Raises:
            RAdapterError: it does not load, or no answer in `timeout` seconds.
        """
        self._need(f"repository/models/{quote(model)}/load", {}, timeout=timeout)

    def unload(self, model: str, *, timeout: float = 30.0) -> None:
        """Take a model away: it answers what it has begun, and takes no more. This does not wait
        for the answers.

        Raises:
            RAdapterError: no answer, or a refusal.
        """
        self._need(f"repository/models/{quote(model)}/unload", {}, timeout=timeout)

    def is_ready(self, *, timeout: float = 5.0) -> bool:
        """Whether the server says that all its models are ready."""
        try:
            return self.ask("health/ready", timeout=timeout).status == 200
        except NoAnswer:
            return False

    def version(self) -> str:
        """Of Triton, such as 2.51.0.

        Raises:
            RAdapterError: no answer.
        """
        return str(self.ask("").body["version"])

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = 10.0
    ) -> Answer:
        """Send JSON to a path below /v2, or get what is there if `body` is None.

        Raises:
            NoAnswer: none, or not within `timeout` seconds.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", SECRET_HEADER: self._secret}
        url = f"{self.url}/v2/{path}".rstrip("/")
        request = urllib.request.Request(url, data, headers)
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                return Answer(response.status, _json(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _json(error.read()))
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"{self.url}: no answer ({reason(error)})") from error

    def _need(self, path: str, body: Mapping[str, Any], *, timeout: float = 10.0) -> Any:
        answer = self.ask(path, body, timeout=timeout)
        if answer.status != 200:
            raise RAdapterError(f"{self.url}: {answer.error or answer.status}")
        return answer.body


def _json(body: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(body)
    return {}
