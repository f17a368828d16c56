"""What the gateway stands in front of: Triton, or an engine in this process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from radapter_client import Reply
from radapter_serve.encoders.steps import Step
from radapter_serve.gateway.models import Model
from radapter_serve.gateway.requests import Inference

LOG = logging.getLogger("radapter-gateway")
SHORT_TIMEOUT = 10.0  # seconds for what computes nothing


@dataclass
class Followed:
    """What follows one request.

    Attributes:
        id: in the journal.
        traceparent: of W3C's Trace Context, for the server that computes; None where no spans are
            sent.
        steps: that an engine took for it.
    """

    id: str = ""
    traceparent: str | None = None
    steps: list[Step] = field(default_factory=list)


class Upstream(Protocol):
    """What the gateway asks; a task that is cancelled while it waits cancels the request there
    too.
    """

    async def infer(
        self, asked: Inference, timeout: float, followed: Followed | None = None
    ) -> Reply:
        """The answer of a model, within `timeout` seconds; all methods raise nothing but
        `Refused`.
        """

    async def config(self, model: str, version: str = "") -> Model:
        """What a model takes and gives, and its releases."""

    async def versions(self, model: str) -> list[str]:
        """The versions of a model."""

    async def ready(self, model: str, version: str = "") -> bool:
        """Whether a model is ready."""

    async def outdated_indexes(self) -> Mapping[str, bool]:
        """Whether another release than the newest that is served made the indexes, by the names of
        these; of what has no metrics of its own.
        """

    async def close(self) -> None:
        """Ends the connection."""
