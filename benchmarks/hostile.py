"""Hostile requests to a gateway: how many, what came back, and which broke a promise."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro
from common import RESULTS, Report

sys.path.insert(0, str(Path(__file__).parents[1]))  # the requests are those of the tests

from tests.hostile import harness
from tests.hostile.cases import by_hand, case, of_kind


def main(
    count: int = 50_000,
    refused: int = 20_000,
    callers: int = 200,
    seed: int = 1,
    engine: Literal["triton", "process"] = "triton",
    replay: int | None = None,
) -> int:
    """Send hostile requests to a tiny release, and write what came of them.

    Args:
        count: requests to the gateway.
        refused: requests that are refused by their heads, whose bodies come slowly, wrongly or not
            at all.
        callers: how many of those at once.
        seed: of the mutations.
        engine: what answers behind the gateway.
        replay: the number of one request, to be sent alone; what comes back is printed, and nothing
            is written.
    """
    with (
        tempfile.TemporaryDirectory(prefix="hostile-") as folder,
        harness.world(Path(folder), engine) as running,
    ):
        if replay is not None:
            hostile = case(seed, replay)
            outcome = harness.exchange(running.address, hostile)
            why = harness.trouble(hostile, outcome)
            print(f"{hostile.kind}, promised: {hostile.promise}\n{str(hostile.parts[0])[:2000]}")
            print(f"{outcome}\n{why or 'as promised'}")
            return 1 if why else 0
        what = (
            f"The first {len(by_hand()):,} requests are made by hand, the others are mutations of"
            f" right ones (seed {seed}). The release is tiny, the gateway gives a request"
            f" {harness.TIMEOUT:g} s, and a good client asks every task meanwhile. Results are HTTP"
            " statuses, or how the connection ended."
        )
        report = Report("hostile", "Hostile requests", what, timed=False)
        bodies = list(itertools.islice(itertools.cycle(of_kind("refused body")), refused))
        broken = 0
        for title, numbers, workers in (
            ("Gateway", range(count), 6),
            (f"Refused bodies of {callers} callers at once", bodies, callers),
        ):
            before = running.processes()
            start = time.monotonic()
            with harness.Good(running.address) as good:
                found = harness.attack(running.address, seed, numbers, workers)
            rows = [
                [kind, f"{results.total():,}", ", ".join(f"{k}: {n:,}" for k, n in results.items())]
                for kind, results in sorted(found.results.items())
            ]
            report.table(title, ["kind", "count", "result"], rows)
            same = "the same" if running.processes() == before else "NOT the same"
            report.note(
                f"{len(numbers):,} requests in {time.monotonic() - start:.0f} s. Promises broken:"
                f" {len(found.failures)}. The good client compared {good.asked:,} answers byte by"
                f" byte; {len(good.troubles)} differed. The processes are {same} as before."
            )
            for failure in [*found.failures, *good.troubles][:20]:
                print(failure, file=sys.stderr)
            broken += len(found.failures) + len(good.troubles)
        report.write(RESULTS)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
