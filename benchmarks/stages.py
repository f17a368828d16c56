"""The stages of a request's time, from the client's clock and Triton's statistics."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass

# By model: requests, batches, and nanoseconds of requests in queue and compute.
Totals = dict[str, dict[str, float]]
COMPUTE = ("compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Stages:
    """Mean times of a request, in milliseconds.

    Args:
        network: the rest of the client's time: encoding, the way there and back, decoding.
        queue: waiting for the task and its encoder.
        task: decoding, resizing or tokenizing, and the hand-over to the encoder.
    """

    network: float
    queue: float
    task: float
    encoder: float

    @classmethod
    def between(
        cls, task: str, before: Totals, after: Totals, seconds: float, requests: int
    ) -> Stages:
        """Compare the server's totals before and after requests of a task, of `seconds` in all."""

        def more(model: str, kind: str) -> float:
            return after[model][kind] - before.get(model, {}).get(kind, 0)

        def mean(model: str, kind: str) -> float:
            """Return ms of a request of the task, or of a batch of it for a model that it calls."""
            per = more(task, "count" if model == task else "executions")
            return more(model, kind) / per / 1e6 if per else 0.0

        total = seconds / requests * 1e3
        called = [model for model in after if model != task] if task in after else []
        encoder = sum(mean(model, "compute") for model in called if model.endswith("_encoder"))
        waiting = sum(mean(model, "queue") for model in called)
        queue, work = (mean(task, kind) if task in after else 0.0 for kind in ("queue", "compute"))
        # The task waits for the models that it calls, so its time includes theirs.
        own = max(0.0, work - encoder - waiting)
        network = max(0.0, total - queue - waiting - own - encoder)
        return cls(network, queue + waiting, own, encoder)


def read_totals(url: str) -> Totals:
    """Read a server's totals since its start, by model, over the model's versions."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    totals: Totals = {}
    with opener.open(f"{url}/v2/models/stats") as response:
        models = json.load(response)["model_stats"]
    for model in models:
        counters = model["inference_stats"]
        total = totals.setdefault(
            model["name"], {"count": 0, "executions": 0, "queue": 0, "compute": 0}
        )
        total["count"] += counters["success"]["count"]
        total["executions"] += model["execution_count"]
        total["queue"] += counters["queue"]["ns"]
        total["compute"] += sum(counters[kind]["ns"] for kind in COMPUTE)
    return totals
