"""radapter-bench: how fast a running server answers, by task, protocol and load."""

from __future__ import annotations

import asyncio
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from radapter_client import AsyncClient, Profile, RAdapterClientError
from radapter_serve import __version__
from radapter_serve.bench.load import Closed, Open, measure
from radapter_serve.bench.report import Row, draw, latency_table, stages_table, write_json
from radapter_serve.bench.requests import LABELS, Content, check, picture, read_image, sender
from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError

PROG = "radapter-bench"


def bench(
    url: tuple[str, ...] = (),
    tasks: tuple[str, ...] = ("classify", "embed_image", "embed_text"),
    concurrency: tuple[int, ...] = (1, 8),
    rate: tuple[float, ...] = (),
    seconds: float = 10.0,
    warmup: float = 2.0,
    image: Path | None = None,
    labels: tuple[str, ...] = LABELS,
    label_set: str | None = None,
    index: str | None = None,
    timeout: float = 60.0,
    out: Path | None = None,
) -> int:
    """Measure a running server: latency, throughput, errors, and where the time goes.

    Closed loop (the default): so many callers, each of which waits for its answer before it asks again. Open loop
    (--rate): requests come at random times whether or not the server keeps up, as those of independent users do, and
    latency counts from the time at which a request was due. Exits with 1 where a request failed.

    Args:
        url: of the server, several to compare protocols: grpc://HOST:8001 http://HOST:8000; the environment variable
            RADAPTER_SERVER sets the default.
        tasks: classify, embed_image, embed_text, retrieve (needs --index) and segment, one after another.
        concurrency: callers at once in a closed loop, each number a row.
        rate: requests a second in an open loop, each number a row; in place of --concurrency.
        seconds: that each row is measured.
        warmup: seconds of the same load before it, which do not count.
        image: file to send; a smooth picture of 640 x 480 pixels if none is given.
        labels: for classify and segment.
        label_set: instead of labels, one that was exported with the release.
        index: name of the index that retrieve searches.
        timeout: seconds that a request may take.
        out: folder for bench.json and bench.png; none is written if it is not given.
    """
    for flag, values in {"--seconds": [seconds], "--rate": rate, "--concurrency": concurrency}.items():
        if wrong := [value for value in values if not 0 < value < math.inf]:
            raise RAdapterError(f"{flag} is {wrong[0]:g}; allowed is what is above 0")
    if not 0 <= warmup < math.inf:
        raise RAdapterError(f"--warmup is {warmup:g}; allowed are 0 and more seconds")
    loads: list[Closed | Open] = [*map(Open, rate)] if rate else [*map(Closed, concurrency)]
    content = Content(picture() if image is None else read_image(image), tuple(labels), label_set, index)
    check(tasks, content)
    urls = url or (os.environ.get("RADAPTER_SERVER") or "grpc://localhost:8001",)
    rows: list[Row] = []
    facts: dict[str, Any] = {"version": __version__, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    facts |= {"client": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}", "seconds": seconds}
    with Console(stderr=True).status("connecting") as status:
        for one in urls:
            for load in loads:
                for task in tasks:
                    status.update(escape(f"{task} at {one}, {load}: {seconds:g} s ..."))
                    measured = _Bench(one, timeout, content, seconds, warmup)
                    row, facts["release"] = asyncio.run(measured(task, load))
                    rows.append(row)
    console = Console()
    console.print(latency_table(rows))
    if any(row.stages for row in rows):
        console.print(stages_table(rows))
    for row in rows:
        for kind, count in row.errors.items():
            print(f"{row.task}, {row.protocol}, {row.load}: {count} x {kind}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(rows, facts, out / "bench.json")
        draw(rows, out / "bench.png")
        print(f"wrote {out / 'bench.json'} and {out / 'bench.png'}")
    return int(any(row.errors for row in rows))


@dataclass(frozen=True)
class _Bench:
    """Measures one server; a call is one row, and the facts of the release that was served."""

    url: str
    timeout: float
    content: Content
    seconds: float
    warmup: float

    async def __call__(self, task: str, load: Closed | Open) -> tuple[Row, dict[str, Any]]:
        at_once = load.callers if isinstance(load, Closed) else load.at_most
        try:
            async with AsyncClient(self.url, timeout=self.timeout, concurrency=at_once) as client:
                send = sender(client, task, self.content)
                release = await client.release()
                await send(0)  # what can't work at all fails here, with its own words
                if self.warmup:
                    await measure(send, load, self.warmup)
                before = await _statistics(client)
                measured = await measure(send, load, self.seconds)
                after = await _statistics(client)
        except RAdapterClientError as error:
            raise RAdapterError(f"{self.url}: {error}") from None
        profile = None
        if before and after and measured.latencies:
            spent = sum(measured.latencies)
            profile = Profile.between(task, before, after, spent, len(measured.latencies))
        return Row.of(task, self.url, load, measured, profile), dict(release.facts)


async def _statistics(client: AsyncClient) -> dict[str, dict[str, float]]:
    """Those of the server; none where it keeps them closed, as a gateway does."""
    try:
        return await client.statistics()
    except RAdapterClientError:
        return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `radapter-bench`."""
    return run(bench, argv, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
