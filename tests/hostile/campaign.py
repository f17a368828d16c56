"""Many hostile requests, several at once, and the table of what came of them."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.case import BROKEN, CHECKED, REFUSED, Case
from tests.hostile.generate import by_hand, case
from tests.hostile.judge import trouble
from tests.hostile.wire import Outcome, exchange

_WEAKER = (REFUSED, CHECKED, BROKEN)


@dataclass
class Row:
    """One kind of hostile requests.

    Attributes:
        promise: what was promised at least.
        count: how many were sent.
        results: what came back, and how often.
        slowest: seconds of the slowest.
    """

    promise: str
    count: int = 0
    results: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0


@dataclass
class Failure:
    """A promise that was broken; its seed and number make it again."""

    seed: int
    number: int
    kind: str
    why: str

    def __str__(self) -> str:
        return f"seed {self.seed}, number {self.number} ({self.kind}): {self.why}"


@dataclass
class Report:
    """What came of a campaign."""

    rows: dict[str, Row] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(row.count for row in self.rows.values())

    def add(self, one: Case, outcome: Outcome) -> None:
        """Count an outcome."""
        kind = group(one.kind)
        row = self.rows.setdefault(kind, Row(one.promise))
        row.promise = max(row.promise, one.promise, key=_WEAKER.index)
        row.count += 1
        row.results[result(outcome)] += 1
        row.slowest = max(row.slowest, outcome.seconds)


def group(kind: str) -> str:
    """The row of a kind: what stands before the colon."""
    return kind.partition(":")[0]


def result(outcome: Outcome) -> str:
    """An outcome in a word: the status of its last answer, or how the connection ended."""
    return (
        str(outcome.answers[-1].status)
        if outcome.answers and outcome.how != "hung"
        else outcome.how
    )


def run(
    address: tuple[str, int],
    seed: int,
    numbers: Iterable[int],
    *,
    workers: int = 6,
    seconds: float = math.inf,
    failures: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Send the hostile requests of some numbers.

    Args:
        address: of the gateway.
        seed: of the mutations.
        numbers: which requests.
        workers: how many at once; slow ones by hand go beside them.
        seconds: after which no more are sent.
        failures: folder for the bytes of requests that break a promise.
        progress: called now and then with how many are done.
    """
    report = Report()
    lock = threading.Lock()

    deadline = time.monotonic() + seconds

    def one(number: int) -> None:
        if time.monotonic() > deadline:
            return
        made = case(seed, number)
        outcome = exchange(address, made)
        why = trouble(made, outcome)
        with lock:
            report.add(made, outcome)
            if report.count % 500 == 0:
                progress(report.count)
            if why:
                report.failures.append(Failure(seed, number, made.kind, why))
                if failures is not None:
                    failures.mkdir(parents=True, exist_ok=True)
                    name = re.sub(r"\W+", "-", made.kind)[:60]
                    (failures / f"{seed}-{number}-{name}.http").write_bytes(made.raw)

    numbers = list(numbers)
    slow = [number for number in numbers if is_slow(number)]
    with ThreadPoolExecutor(max(1, len(slow))) as patient, ThreadPoolExecutor(workers) as pool:
        waiting = [patient.submit(one, number) for number in slow]
        waiting += [pool.submit(one, number) for number in numbers if not is_slow(number)]
        for future in waiting:
            future.result()
    report.failures.sort(key=lambda failure: failure.number)
    return report


def is_slow(number: int) -> bool:
    """Whether a request takes its time by intention."""
    return number < len(by_hand()) and by_hand()[number][0].startswith("slow")


def rows(report: Report) -> list[list[str]]:
    """The table of a report: kind, count, promise, results, seconds of the slowest."""
    found = []
    for kind, row in sorted(report.rows.items()):
        results = ", ".join(f"{name}: {count:,}" for name, count in sorted(row.results.items()))
        found.append([kind, f"{row.count:,}", row.promise, results, f"{row.slowest:.1f}"])
    return found
