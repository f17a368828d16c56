"""Requests to each task: one through its encoders before the server is ready, one that it answers
at once while it runs.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.process import SYSTEM, Clock
from radapter_serve.release.repository import ENCODERS
from radapter_serve.server.control import Control, NoAnswer
from radapter_serve.server.watch import SERVER
from radapter_serve.tasks.table import GLANCES, PROBES, Tensors

INTERVAL_SECONDS = 5.0  # from an answer to the next request
TIMEOUT_SECONDS = 10.0  # to wait for an answer
MAX_UNANSWERED = 2  # requests in a row
BUSY_SECONDS = 0.1  # processor time before the timeout that shows a model busy, not frozen


def in_json(tensors: Tensors) -> list[dict[str, Any]]:
    """Inputs of a request, texts and encoded images, for its JSON body."""
    return [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "BYTES",
            "data": [
                base64.b64encode(value).decode() if name == "image" else value.decode()
                for value in array.ravel()
            ],
        }
        for name, array in tensors.items()
    ]


def warm_up(control: Control, models: Mapping[str, Sequence[int]], timeout: float) -> None:
    """Ask each version of each task once, within `timeout` seconds each; raise an error if one
    fails.
    """
    for model, versions in models.items():
        for version in versions if model in PROBES else ():
            path = f"models/{model}/versions/{version}/infer"
            try:
                answer = control.ask(path, {"inputs": in_json(PROBES[model])}, timeout=timeout)
            except NoAnswer:
                raise RAdapterError(
                    f"{model} version {version} did not answer within {timeout:g} s; allow more"
                    " with --timeout"
                ) from None
            if answer.status not in (200, 400):  # a refusal comes from a task that works
                raise RAdapterError(f"{model} version {version} fails: {answer.error}")


@dataclass
class _Asked:
    """One model: when to ask next, the answer that is waited for, the processor time at its
    request, and how many requests in a row got no answer.
    """

    due: float
    answer: Future[bool] | None = None
    used: float = 0.0
    misses: int = 0


class Probe:
    """Finds what lives but does not answer, such as a process that waits for itself.

    A loaded server may leave a request in its queue for long. So silence counts only while nothing
    that could answer, the model or an encoder, computes: `cpu_seconds` gives the processor time of
    models.
    """

    def __init__(
        self,
        control: Control,
        cpu_seconds: Callable[[Collection[str]], float],
        *,
        clock: Clock = SYSTEM,
        threads: Executor | None = None,  # they wait for the answers
        interval: float = INTERVAL_SECONDS,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self._control = control
        self._cpu_seconds = cpu_seconds
        self._clock = clock
        self._interval = interval
        self._timeout = timeout
        self._threads = threads or ThreadPoolExecutor(len(GLANCES) + 1, thread_name_prefix="probe")
        self._asked: dict[str, _Asked] = {}

    def step(self, models: Collection[str]) -> list[str]:
        """Send the requests that are due, without waiting; return the models that no longer
        answer, or `SERVER` alone if it is the server itself.
        """
        silent = [name for name in GLANCES if name in models and self._is_silent(name)]
        return [SERVER] if self._is_silent(SERVER) else silent

    def forget(self) -> None:
        """Begin anew, after something was started again."""
        self._asked.clear()

    def _is_silent(self, name: str) -> bool:
        now = self._clock.monotonic()
        asked = self._asked.setdefault(name, _Asked(now + self._interval))
        answering = [SERVER] if name == SERVER else [name, *ENCODERS]
        if asked.answer is None:
            if now >= asked.due:
                asked.used = self._cpu_seconds(answering)
                asked.answer = self._threads.submit(self._answers, name)
        elif asked.answer.done():
            is_alive = asked.answer.result()
            if not is_alive:
                is_alive = self._cpu_seconds(answering) - asked.used >= BUSY_SECONDS
            asked.misses = 0 if is_alive else asked.misses + 1
            asked.answer = None
            asked.due = now + self._interval
        return asked.misses >= MAX_UNANSWERED

    def _answers(self, name: str) -> bool:
        """Whether any answer comes: even a failure is one of a process that lives."""
        path = "health/live" if name == SERVER else f"models/{name}/infer"
        body = None if name == SERVER else {"inputs": in_json(GLANCES[name])}
        try:
            self._control.ask(path, body, timeout=self._timeout)
        except NoAnswer:
            return False
        return True
