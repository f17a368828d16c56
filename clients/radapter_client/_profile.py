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
        task: the task's own work: decoding, resizing or tokenizing, and the hand-over to the encoder.
        encoder: the encoder's work.
        requests: how many were averaged. On a server with other callers, theirs are in the server's means.

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
    def between(cls, before: Totals, after: Totals, seconds: float, requests: int) -> Profile:
        """From the totals of task and encoder before and after `requests` requests that took `seconds` in all."""

        def mean(model: str, kind: str) -> float:
            counts, start = after.get(model, {}), before.get(model, {})
            count = counts.get("count", 0) - start.get("count", 0)
            return (counts[kind] - start.get(kind, 0)) / count / 1e6 if count else 0.0

        total = seconds / requests * 1e3
        encoder, encoder_queue = mean("image_encoder", "compute"), mean("image_encoder", "queue")
        queue = mean("embed_image", "queue") + encoder_queue
        # The task waits for its encoder, so the encoder's time is inside the task's.
        task = max(0.0, mean("embed_image", "compute") - encoder - encoder_queue)
        return cls(total, max(0.0, total - queue - task - encoder), queue, task, encoder, requests)


def read_statistics(statistics: Mapping[str, Any]) -> Totals:
    """Per model, over its versions: requests answered, and nanoseconds in queue and compute."""
    totals: Totals = {}
    for model in statistics.get("model_stats", []):
        counters = model.get("inference_stats", {})
        total = totals.setdefault(model["name"], {"count": 0, "queue": 0, "compute": 0})
        total["count"] += int(counters.get("success", {}).get("count", 0))
        total["queue"] += int(counters.get("queue", {}).get("ns", 0))
        total["compute"] += sum(int(counters.get(kind, {}).get("ns", 0)) for kind in COMPUTE)
    return totals
