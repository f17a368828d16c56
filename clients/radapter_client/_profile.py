"""Where the time of a request goes, from the clock here and the server's own statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Totals = dict[str, dict[str, float]]
COMPUTE = ("compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Profile:
    """Mean times of one request, in milliseconds; str() draws them as a tree.

    Args:
        total: from call to answer, seen here.
        network: what is neither queue nor model: encoding, the way there and back, decoding.
        queue: waiting in the server, for the task and for its encoder.
        task: the task's own work: decoding, resizing or tokenizing, and the hand-over to the
            encoder.
        encoder: the encoder's work.
        requests: how many were averaged. On a server with other callers, theirs are in the server's
            means.

    Example: `print(client.profile())`
    """

    total: float
    network: float
    queue: float
    task: float
    encoder: float
    requests: int

    def __str__(self) -> str:
        lines = [
            ("request", self.total),
            ("├── network and client", self.network),
            ("└── server", self.total - self.network),
            ("    ├── queue", self.queue),
            ("    ├── task", self.task),
            ("    └── encoder", self.encoder),
        ]
        return "\n".join(f"{name:<24}{value:9.2f} ms" for name, value in lines)

    @classmethod
    def between(
        cls, task: str, before: Totals, after: Totals, seconds: float, requests: int
    ) -> Profile:
        """From the server's totals before and after `requests` requests of a task that took
        `seconds` in all.
        """

        def more(model: str, kind: str) -> float:
            return after[model][kind] - before.get(model, {}).get(kind, 0)

        def mean(model: str, kind: str) -> float:
            """Of a request of the task, in ms; of what the task calls, as much as one of its
            batches waits for it.
            """
            per = more(task, "count" if model == task else "executions")
            return more(model, kind) / per / 1e6 if per else 0.0

        total = seconds / requests * 1e3
        called = [model for model in after if model != task] if task in after else []
        encoder = sum(mean(model, "compute") for model in called if model.endswith("_encoder"))
        waiting = sum(mean(model, "queue") for model in called)
        queue, work = (mean(task, kind) if task in after else 0.0 for kind in ("queue", "compute"))
        # The task waits for what it calls, so their time is inside the task's.
        own = max(0.0, work - encoder - waiting)
        return cls(
            total,
            max(0.0, total - queue - waiting - own - encoder),
            queue + waiting,
            own,
            encoder,
            requests,
        )


def read_statistics(statistics: Mapping[str, Any]) -> Totals:
    """By model, over its versions: requests answered, batches run, and nanoseconds in queue and
    compute.
    """
    totals: Totals = {}
    for model in statistics.get("model_stats", []):
        counters = model.get("inference_stats", {})
        total = totals.setdefault(
            model["name"], {"count": 0, "executions": 0, "queue": 0, "compute": 0}
        )
        total["count"] += int(counters.get("success", {}).get("count", 0))
        total["executions"] += int(model.get("execution_count", 0))
        total["queue"] += int(counters.get("queue", {}).get("ns", 0))
        total["compute"] += sum(int(counters.get(kind, {}).get("ns", 0)) for kind in COMPUTE)
    return totals
