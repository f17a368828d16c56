"""What one hostile request is, and what is promised of its answer."""

from __future__ import annotations

from dataclasses import dataclass

REFUSED = "refused"  # 4xx with a code
CHECKED = "refused, or answered right"  # what was broken may still be valid
BROKEN = "refused, or closed"  # HTTP itself is broken, so that there may be nobody to answer to


@dataclass(frozen=True)
class Case:
    """One hostile request, on a connection of its own.

    Args:
        kind: the row of the table that it counts in.
        parts: what is sent, in this order; numbers are seconds to wait.
        promise: `REFUSED`, `CHECKED` or `BROKEN`.
        answers: how many answers may come on this connection.
        hang_up: seconds without an answer after which the caller ends its side; None to wait for
            the server.
    """

    kind: str
    parts: tuple[bytes | float, ...]
    promise: str = REFUSED
    answers: int = 1
    hang_up: float | None = None

    @property
    def method(self) -> str:
        """The method of the first request line, as far as there is one."""
        first = next((part for part in self.parts if isinstance(part, bytes)), b"")
        return first.partition(b" ")[0][:20].decode("latin-1")

    @property
    def raw(self) -> bytes:
        """All bytes of it, for a file."""
        return b"".join(part for part in self.parts if isinstance(part, bytes))
