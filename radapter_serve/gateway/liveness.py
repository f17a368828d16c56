"""Whether a gateway that runs also answers, asked again and again without waiting for it."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from radapter_serve.clock import SYSTEM, Clock

INTERVAL_SECONDS = 5.0  # from one question to the next
TIMEOUT_SECONDS = 5.0  # that an answer may take
MAX_SILENCE_SECONDS = 30.0  # without an answer, after which it counts as hanging
MAX_START_SECONDS = 120.0  # that it may take until it first answers


class Liveness:
    """Asks something whether it lives, in a thread of its own.

    Args:
        ask: True where it answers; may take its time.
        clock: tells the time.
    """

    def __init__(self, ask: Callable[[], bool], clock: Clock = SYSTEM) -> None:
        self._ask = ask
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="liveness")
        self.restart()

    def restart(self) -> None:
        """Begin anew: it has just been started."""
        self._asked: Future[bool] | None = None
        self._asked_at = self._clock.monotonic()
        self._patient_until = self._clock.monotonic() + MAX_START_SECONDS

    def silent(self) -> bool:
        """Whether it has not answered for too long; returns at once."""
        now = self._clock.monotonic()
        if self._asked is not None and self._asked.done():
            if self._asked.result():
                self._patient_until = self._asked_at + MAX_SILENCE_SECONDS
            self._asked = None
        if self._asked is None and now - self._asked_at >= INTERVAL_SECONDS:
            self._asked = self._thread.submit(self._ask)
            self._asked_at = now
        return now >= self._patient_until

    def close(self) -> None:
        """Ask no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def asks(
    address: str, port: int, *, tls: bool, timeout: float = TIMEOUT_SECONDS
) -> Callable[[], bool]:
    """Whether the gateway at an address of this machine answers, within `timeout` seconds."""

    def ask() -> bool:
        connection = http.client.HTTPConnection(address, port, timeout=timeout)
        if tls:  # its certificate is for the names that callers use
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = http.client.HTTPSConnection(
                address, port, timeout=timeout, context=context
            )
        try:
            connection.request("GET", "/health/live", headers={"Host": "localhost"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return ask
