"""What Prometheus reads. Labels are tasks, codes and names of keys, never what a caller sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from radapter_serve.gateway.errors import CODES
from radapter_serve.gateway.limits import ConcurrencyLimit, MemoryBudget
from radapter_serve.index.facts import OUTDATED, OUTDATED_MEANS

OK = "ok"
GONE = "caller_gone"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one gateway."""

    def __init__(self, concurrency: ConcurrencyLimit, memory: MemoryBudget) -> None:
        self._registry = registry = CollectorRegistry()
        self._seconds = Histogram(
            "radapter_gateway_request_seconds",
            "From a request's headers to its answer",
            ["task"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._requests = Counter(
            "radapter_gateway_requests", "By outcome", ["task", "code"], registry=registry
        )
        self._of_keys = Counter(
            "radapter_gateway_key_requests",
            "By the caller's key and outcome",
            ["key", "code"],
            registry=registry,
        )
        self._images = Counter(
            "radapter_gateway_key_images",
            "Images that were sent with a key",
            ["key"],
            registry=registry,
        )
        for name, what, read in (
            ("running", "Requests that Triton works on", lambda: concurrency.running),
            ("waiting", "Requests in the queue", lambda: concurrency.waiting),
            ("body_bytes", "Bytes of bodies in memory", lambda: memory.held),
        ):
            Gauge(f"radapter_gateway_{name}", what, registry=registry).set_function(read)

    def count(self, task: str, code: str, seconds: float) -> None:
        """Notes the end of a request: its task ("none" where it named none), its code, and how long
        it took.
        """
        self._requests.labels(task, _known(code)).inc()
        if task != "none":
            self._seconds.labels(task).observe(seconds)

    def count_key(self, key: str, code: str) -> None:
        """Notes the end of a request by the name of its key."""
        self._of_keys.labels(key, _known(code)).inc()

    def count_images(self, key: str, count: int) -> None:
        """Notes images that came with a key."""
        self._images.labels(key).inc(count)

    def text(self, outdated: Mapping[str, bool]) -> bytes:
        """All of it, as Prometheus reads it, with what `Upstream.outdated_indexes` says."""
        return generate_latest(self._registry) + _of_indexes(outdated)


class _Indexes(Collector):
    """Which indexes another release made."""

    def __init__(self, outdated: Mapping[str, bool]) -> None:
        self._outdated = outdated

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gauge = GaugeMetricFamily(OUTDATED, OUTDATED_MEANS, labels=["index"])
        for index, is_outdated in self._outdated.items():
            gauge.add_metric([index], float(is_outdated))
        if gauge.samples:
            yield gauge


def _of_indexes(outdated: Mapping[str, bool]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Indexes(outdated))
    return generate_latest(registry)


def _known(code: str) -> str:
    return code if code in CODES or code in (OK, GONE) else "other"
