"""Hostile requests: what was promised and what came, from the gateway and from Triton's own
ports.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from common import RESULTS, Report, say

sys.path.insert(0, str(Path(__file__).parents[1]))  # the requests are those of the tests

from tests.hostile import campaign, tritons_own
from tests.hostile.generate import by_hand, case, of_kind
from tests.hostile.judge import trouble
from tests.hostile.wire import exchange
from tests.hostile.world import TIMEOUT, Good, World, world

COLUMNS = ["kind", "count", "promised", "result", "slowest, s"]
FAILURES = Path("hostile-failures")


def main(
    count: int = 50_000,
    refused: int = 20_000,
    callers: int = 200,
    triton: int = 2_000,
    grpc: int = 2_000,
    seed: int = 1,
    minutes: float = math.inf,
    replay: int | None = None,
) -> int:
    """Send hostile requests to a tiny release, and write what came of them.

    Args:
        count: requests to the gateway.
        refused: requests that are refused by their heads, whose bodies come slowly, wrongly or not
            at all.
        callers: how many of those at once.
        triton: of the same, to Triton's own HTTP port.
        grpc: messages to Triton's gRPC port.
        seed: of the mutations.
        minutes: for each of the four, after which no more are sent.
        replay: the number of one request, to be sent alone; what comes back is printed, and nothing
            is written.
    """
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, world(Path(folder)) as running:
        if replay is not None:
            return again(running, seed, replay)
        what = (
            f"The first {len(by_hand()):,} requests are made by hand, the others are mutations of"
            f" right ones (seed {seed}). The release is tiny, the gateway gives a request"
            f" {TIMEOUT:g} s, and a good client asks every task meanwhile. Results are HTTP"
            " statuses, or how the connection ended."
        )
        report = Report("hostile", "Hostile requests", what, timed=False)
        broken = gateway(running, report, seed, count, minutes) if count else 0
        report.write(RESULTS)
        if refused:
            broken += refused_bodies(running, report, seed, refused, callers, minutes)
            report.write(RESULTS)
        if triton or grpc:
            tritons_ports(running, report, seed, triton, grpc, minutes * 60)
            report.write(RESULTS)
    return 1 if broken else 0


def gateway(running: World, report: Report, seed: int, count: int, minutes: float) -> int:
    """The campaign against the gateway; how many promises were broken."""
    return attacked(running, report, "Gateway", seed, range(count), minutes)


def refused_bodies(
    running: World, report: Report, seed: int, count: int, callers: int, minutes: float
) -> int:
    """Many callers at once, whose bodies the gateway throws away; how many promises were broken."""
    before = running.gateway_files()
    title = f"Refused bodies of {callers} callers at once"
    numbers = list(itertools.islice(itertools.cycle(of_kind("refused body")), count))
    broken = attacked(running, report, title, seed, numbers, minutes, callers)
    left = running.gateway_files() - before
    report.note(f"Of their connections, {left} were open in the end.")
    return broken + (left > 0)


def attacked(
    running: World,
    report: Report,
    title: str,
    seed: int,
    numbers: Sequence[int],
    minutes: float,
    callers: int = 6,
) -> int:
    """Hostile requests and a good client's beside them; how many promises were broken."""

    def progress(done: int) -> None:
        say(f"{done:,} of {len(numbers):,}")

    before = running.processes()
    start = time.monotonic()
    with Good(running.address) as good:
        found = campaign.run(
            running.address,
            seed,
            numbers,
            workers=callers,
            seconds=minutes * 60,
            failures=FAILURES,
            progress=progress,
        )
    seconds = time.monotonic() - start
    report.table(title, COLUMNS, campaign.rows(found))
    same = (
        "are the same as before" if running.processes() == before else "are NOT the same as before"
    )
    memory = ", ".join(f"{name} {size:,} MiB" for name, size in running.memory().items())
    report.note(
        f"{found.count:,} requests in {seconds:.0f} s. Promises broken: {len(found.failures)}. The"
        f" good client compared {good.asked:,} answers byte by byte; {len(good.troubles)} differed,"
        f" and all five tasks answered it within {good.slowest:.1f} s."
        f" The processes {same}. Peak memory: {memory}."
    )
    for failure in found.failures:
        say(f"{failure}; its bytes are in {FAILURES}")
    for trouble_ in good.troubles[:20]:
        say(f"the good client: {trouble_}")
    if found.failures:
        report.note("Broken: " + "; ".join(map(str, found.failures[:20])) + ".")
    return len(found.failures) + len(good.troubles)


def tritons_ports(
    running: World, report: Report, seed: int, triton: int, grpc: int, seconds: float
) -> None:
    """The same against Triton itself, for what it is."""

    def progress(done: int) -> None:
        if done % 100 == 0:
            say(f"Triton's own port: {done:,}")

    def table(title: str, found: campaign.Report) -> None:
        report.table(
            title, ["kind", "count", "result"], [[*row[:2], row[3]] for row in campaign.rows(found)]
        )

    table("Triton's own HTTP port", tritons_own.over_http(running, seed, triton, seconds, progress))
    table("Triton's own gRPC port", tritons_own.over_grpc(running, seed, grpc, seconds, progress))
    report.note(
        "Nothing is promised of Triton's own ports: they are for a trusted network. Whatever died"
        " or hung was started again, as radapter-serve does."
    )


def again(running: World, seed: int, number: int) -> int:
    """Send one request again."""
    made = case(seed, number)
    outcome = exchange(running.address, made)
    why = trouble(made, outcome)
    print(
        f"{made.kind}, promised:"
        f" {made.promise}\n{made.raw[:2000]!r}\n{outcome}\n{why or 'as promised'}"
    )
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
