"""Triton's metric of the indexes that another release made; importable only inside one of its
processes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb

from radapter_serve.index.facts import OUTDATED, OUTDATED_MEANS

INTERVAL = 10.0  # seconds from one look to the next
CLOSE_SECONDS = 10.0  # that a look on a slow disk may still take


class IndexMetric:
    """A thread that looks every `interval` seconds whether another release made the indexes, by
    their names.

    All processes of `retrieve` share the metric.
    """

    def __init__(self, look: Callable[[], Mapping[str, bool]], interval: float = INTERVAL) -> None:
        self._look = look
        self._interval = interval
        self._family = pb.MetricFamily(
            name=OUTDATED, description=OUTDATED_MEANS, kind=pb.MetricFamily.GAUGE
        )
        self._metrics: dict[str, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="indexes", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, look: Callable[[], Mapping[str, bool]]) -> IndexMetric | None:
        """Begin to look; None if the server was started without metrics."""
        try:
            return cls(look)
        except pb.TritonModelException:
            return None

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)
        self._metrics.clear()  # before their family, as Triton wants it

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # of a disk or a mount: the last look holds
                outdated = self._look()
                for name in set(self._metrics) - set(outdated):
                    self._metrics.pop(name).set(0)  # a killed process would hold it for ever
                for name, is_outdated in outdated.items():
                    if name not in self._metrics:
                        self._metrics[name] = self._family.Metric(labels={"index": name})
                    self._metrics[name].set(int(is_outdated))
            if self._closed.wait(self._interval):
                return
