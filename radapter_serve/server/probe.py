"""Asking each task whether it answers: all it does before the server is called ready, and a little
while it runs.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import ENCODERS
from radapter_serve.server.control import Answer, Control, NoAnswer
from radapter_serve.server.watch import SERVER
from radapter_serve.tasks.probes import GLANCES, PROBES, Tensors

INTERVAL_SECONDS = 5.0  # from an answer to the next question
TIMEOUT_SECONDS = 10.0  # to wait for an answer
MAX_UNANSWERED = 2  # questions, one after the other
# Hundredths of a second of processor time: a model that uses them before the time-out is busy, not
# frozen.
BUSY_TICKS = 10


def in_json(tensors: Tensors) -> list[dict[str, Any]]:
    """The inputs of a request, texts and encoded images, as its JSON body has them."""

    def text(name: str, value: bytes) -> str:
        return base64.b64encode(value).decode() if name == "image" else value.decode()

    return [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "BYTES",
            "data": [text(name, value) for value in array.ravel()],
        }
        for name, array in tensors.items()
    ]


def warm_up(
    control: Control, models: Mapping[str, Sequence[int]], timeout: float, clock: Clock = SYSTEM
) -> None:
    """Ask each version of each task once, and wait for the answers.

    Args:
        control: of a server whose models are loaded.
        models: their versions.
        timeout: seconds for all of them together.
        clock: tells the time.

    Raises:
        RAdapterError: one fails or does not answer.
    """
    deadline = clock.monotonic() + timeout
    for model, versions in models.items():
        for version in versions if model in PROBES else ():
            path = f"models/{model}/versions/{version}/infer"
            try:
                answer = control.ask(
                    path,
                    {"inputs": in_json(PROBES[model])},
                    timeout=max(0.1, deadline - clock.monotonic()),
                )
            except NoAnswer:
                raise RAdapterError(
                    f"{model} version {version} did not answer within {timeout:g} s; allow more"
                    " with --timeout"
                ) from None
            if not works(answer):
                raise RAdapterError(f"{model} version {version} fails: {answer.error}")


def works(answer: Answer) -> bool:
    """Whether this came from a task that works, as a refusal does."""
    return answer.status in (200, 400)


@dataclass
class _Asked:
    """What is known of one model: the question that waits for an answer, and how many got none."""

    due: float = 0.0
    answer: Future[bool] | None = None
    ticks: int = 0
    misses: int = 0


class Probe:
    """Finds what lives but does not answer, such as a process that waits for itself.

    A server under load may leave a question in its queue for long. So silence counts only while
    nothing that could answer, the model or an encoder, does any work.

    Args:
        control: of the server.
        ticks: the processor's time that models have used together, as `Watch.ticks` tells it.
        clock: tells the time.
        threads: wait for the answers; some of its own if None.
        interval: seconds from an answer to the next question.
        timeout: seconds to wait for an answer.
    """

    def __init__(
        self,
        control: Control,
        ticks: Callable[[Collection[str]], int],
        *,
        clock: Clock = SYSTEM,
        threads: Executor | None = None,
        interval: float = INTERVAL_SECONDS,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self._control = control
        self._ticks_of = ticks
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._interval = interval
        self._timeout = timeout
        self._threads = threads or ThreadPoolExecutor(len(GLANCES) + 1, thread_name_prefix="probe")

    def step(self, models: Collection[str]) -> list[str]:
        """Ask who has not been asked for a while, without waiting for the answers.

        Args:
            models: that are served.

        Returns:
            Those that no longer answer; `SERVER` alone if it is the server itself.
        """
        silent = [
            name
            for name in (SERVER, *GLANCES)
            if (name == SERVER or name in models) and self._step(name)
        ]
        return [SERVER] if SERVER in silent else silent

    def forget(self) -> None:
        """Begin anew: something was started again."""
        self._asked.clear()

    def _step(self, name: str) -> bool:
        now = self._clock.monotonic()
        asked = self._asked.setdefault(name, _Asked(due=now + self._interval))
        if asked.answer is None:
            if now >= asked.due:
                asked.ticks = self._ticks(name)
                asked.answer = self._threads.submit(self._ask, name)
        elif asked.answer.done():
            alive = asked.answer.result() or self._ticks(name) - asked.ticks >= BUSY_TICKS
            asked.misses = 0 if alive else asked.misses + 1
            asked.answer = None
            asked.due = now + self._interval
        return asked.misses >= MAX_UNANSWERED

    def _ticks(self, name: str) -> int:
        return self._ticks_of([name] if name == SERVER else [name, *ENCODERS])

    def _ask(self, name: str) -> bool:
        """Whether there was any answer: even a failure comes from a process that lives."""
        path = "health/live" if name == SERVER else f"models/{name}/infer"
        body = None if name == SERVER else {"inputs": in_json(GLANCES[name])}
        try:
            self._control.ask(path, body, timeout=self._timeout)
        except NoAnswer:
            return False
        return True
