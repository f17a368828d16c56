"""Whether requests are followed by spans, as the environment asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from radapter_serve.environment import otlp_endpoint
from radapter_serve.extras import install_command

if TYPE_CHECKING:
    from radapter_serve.gateway.spans import Spans


def spans() -> Spans | None:
    """What sends spans; None where they are not asked for, or can't be sent."""
    made = None if otlp_endpoint() is None else _of_opentelemetry()
    return None if made is None else made()


def what_is_missing() -> str | None:
    """What a user should know where spans are asked for and can't be sent; None if nothing."""
    variable = otlp_endpoint()
    if variable is None or _of_opentelemetry() is not None:
        return None
    return (
        f"{variable} is set, but no traces are sent, because OpenTelemetry is not installed;"
        f" {install_command('otel')}"
    )


def _of_opentelemetry() -> type[Spans] | None:
    try:
        from radapter_serve.gateway.spans import Spans  # here: it takes a while, and few need it
    except ImportError:
        return None
    return Spans
