"""Many adapters beside one release: answers per second, tails and memory against none, by both
engines; how soon a new one is served; and many small releases in their place.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from common import LABEL_SET, RESULTS, Process, Report, export, picture, say
from engines import MIB, proportional, served
from loop import Closed, Measured, Send
from loop import measure as loop

from radapter_client import AsyncClient, Client, InvalidRequest
from radapter_serve.encoders.labels import PROMPTS, LabelSet
from radapter_serve.encoders.loaded import load_release
from radapter_serve.files import digest_of, written_array
from radapter_serve.index.build import build
from radapter_serve.release.adapters import AdapterFacts, add
from radapter_serve.release.integrity import write_sums
from radapter_serve.release.release import FILE, LabelSetFacts, Release
from radapter_serve.release.repository import CONFIG, Served, find_release

sys.path.insert(0, str(Path(__file__).parents[1]))  # small releases are made as the tests make them

from tests.helpers.small_release import write_release

WHAT = """{architecture} with random weights in {precision}, served by `radapter-serve --engine
process` and `--engine triton` and asked over HTTP with our own client on the same machine. Adapters
are random, {kind}; a request draws its own, uniformly or with a weight of 1/rank (skewed). Each
cell alternates with the same requests without an adapter; a ratio is the median over {rounds}
rounds of {seconds:g} s each. Texts are all different; classify has an image of 640 x 480 and a
label set of 100 labels; search is for a text, among {images} images. Each task has been asked for
each adapter before, {passes} times in Triton, whose processes of a task each load it."""
TASKS = ("texts", "classify", "search")
LARGE = "thousand"  # a label set of 1,000 labels in 80 templates
Way = Literal["process", "triton"]
PASSES = 6  # a task has two processes by default: 97 % have loaded an adapter then


def add_many(repository: Path, numbers: Sequence[int], rank: int | None) -> None:
    """Put random adapters beside the newest release, or replace them."""
    release = Release.load(find_release(repository))
    width = release.embed_dim
    facts = AdapterFacts(release.text_tower.digest(release.alpha), width, 1.0, rank)
    random = np.random.default_rng(time.time_ns())
    shapes = [(width, width)] if rank is None else [(width, rank), (rank, width)]
    for number in numbers:
        factors = tuple((0.02 * random.normal(size=size)).astype(np.float32) for size in shapes)
        add(repository, f"a{number}", facts, factors, replace=True)  # type: ignore[arg-type]


def add_large_label_set(repository: Path) -> None:
    """Write a label set of 80,000 prompts as an export does, of random embeddings, as the text
    encoder would take minutes.
    """
    from radapter_export.repository import TEMPLATE, config, sources  # as in `export`

    folder = find_release(repository)
    release = Release.load(folder)
    random = np.random.default_rng(0)
    names = tuple(f"thing {number}" for number in range(1000))
    templates = tuple(f"a photo {number} of a {{}}." for number in range(80))
    path = repository / "text_encoder" / folder.name / f"{LARGE}{PROMPTS}"
    shape = len(names) * len(templates), release.embed_dim
    with written_array(path, shape) as write:
        rows = random.normal(size=shape).astype(np.float32)
        write(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    label_set = LabelSet(names, rows[: len(names)], names, templates)
    file = folder / "label_sets" / f"{LARGE}.npz"
    label_set.save(file)
    facts = LabelSetFacts(len(names), list(templates), digest_of(file), prompts=digest_of(path))
    release = replace(release, label_sets={**release.label_sets, LARGE: facts})
    for place in repository.glob(f"*/{folder.name}"):
        model = place.parent
        text = config(sources() / model.name / TEMPLATE, model.name, [release])
        (model / CONFIG).write_text(text)
        (place / CONFIG).write_text(text)
        if (place / FILE).exists():
            release.save(place)
        if (place / "label_sets").is_dir():
            label_set.save(place / "label_sets" / f"{LARGE}.npz")
    write_sums(repository, release.version)


async def open_all(url: str, image: bytes, names: Sequence[str]) -> None:
    """Ask each task for each adapter, with requests that are refused after it is loaded."""
    async with AsyncClient(url, batch_size=1, concurrency=8, retries=0) as client:

        async def refused(request: Awaitable[object]) -> None:
            with contextlib.suppress(InvalidRequest):
                await request

        for start in range(0, len(names), 8):
            some = names[start : start + 8]
            await asyncio.gather(
                *(client.embed_texts(["a cat"], adapter=name) for name in some),
                *(refused(client.classify(image, label_set="-", adapter=name)) for name in some),
                *(
                    refused(
                        client.search("-", index="photos", adapter=name, min_score="calibrated")
                    )
                    for name in some
                ),
            )


async def rate(
    url: str, task: str, image: bytes, names: Iterator[str | None], callers: int, seconds: float
) -> Measured:
    """Measure a closed loop of a task, with the adapters in their order."""
    first = time.time_ns() // 1_000_000  # texts are others each time
    async with AsyncClient(url, batch_size=1, concurrency=callers, retries=0) as client:
        sends: dict[str, Send] = {
            "texts": lambda n: client.embed_texts([f"a photo {first + n}"], adapter=next(names)),
            "classify": lambda _: client.classify(image, label_set=LABEL_SET, adapter=next(names)),
            "search": lambda n: client.search(
                f"a photo {first + n}", index="photos", adapter=next(names)
            ),
        }
        # Eight callers reach each process of a task, which keeps label sets for adapters itself.
        await loop(sends[task], Closed(8), 0.2)
        measured = await loop(sends[task], Closed(callers), seconds)
    if measured.errors:
        say(f"{task}, {callers} callers: {dict(measured.errors)}")
    return measured


def compare(
    url: str,
    task: str,
    image: bytes,
    names: Sequence[str],
    callers: int,
    seconds: float,
    rounds: int,
) -> list[str]:
    """Cells of a row: answers per second and tails, without and with adapters in turn."""
    pairs = []
    for turn in range(rounds):
        draws: list[Iterator[str | None]] = [itertools.repeat(None), itertools.cycle(names)]
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        both = {
            place: asyncio.run(rate(url, task, image, draws[place], callers, seconds))
            for place in order
        }
        pairs.append([both[0], both[1]])
    rates = [[each.throughput for each in pair] for pair in pairs]
    tails = [[1000 * each.percentiles(99)[0] for each in pair] for pair in pairs]
    ratio = statistics.median(with_one / without for without, with_one in rates)
    errors = sum(each.errors.total() for pair in pairs for each in pair)
    tail = statistics.median(with_one / without for without, with_one in tails)
    columns = np.median(np.array(rates), axis=0), np.median(np.array(tails), axis=0)
    cells = [f"{value:.0f}" for value in columns[0]] + [f"{ratio:.2f}"]
    return [*cells, *(f"{value:.1f}" for value in columns[1]), f"{tail:.2f}", str(errors)]


def small_releases(folder: Path, count: int) -> str:
    """Measure an engine of many tiny releases, which a fine-tune each would take."""
    say(f"{count} small releases")
    for number in range(1, count + 1):
        write_release(folder, number, seed=number, dense=False)
    Served(tuple(range(1, count + 1))).save(folder)
    with served("process", folder) as (url, server, start):
        idle = proportional(server)
        begun = time.perf_counter()
        for number in range(1, count + 1):
            with Client(url, release=number) as client:
                client.embed_texts(["a cat"])
        first = time.perf_counter() - begun
        after = proportional(server)
    return (
        f"Instead of the adapters, {count} releases with almost no weights, in the engine of one"
        f" process: start {start:.1f} s, {idle / MIB:.0f} MiB, {after / MIB:.0f} MiB when each has"
        f" answered, which took {1e3 * first / count:.1f} ms each."
    )


def measure(
    architecture: str = "ViT-B-32",
    precision: Literal["fp32", "int8"] = "fp32",
    ways: tuple[Way, ...] = ("process", "triton"),
    adapters: tuple[int, ...] = (1, 10, 100, 1000),
    callers: tuple[int, ...] = (1, 8, 64),
    rank: int | None = None,
    seconds: float = 2.0,
    rounds: int = 3,
    images: int = 200,
    releases: int = 100,
    short: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measure engines with adapters beside a release.

    Args:
        architecture: name in open_clip.
        precision: of the release.
        ways: engines of radapter-serve.
        adapters: numbers of adapters, the last one the largest.
        callers: numbers of callers.
        rank: of the adapters; full rank if not given.
        seconds: of a round.
        rounds: of each cell.
        images: of the index.
        releases: small releases to serve instead of adapters; 0 for none.
        short: 1 and 64 callers, two rounds of 1.5 s, and 50 images: some minutes.
        results: folder of the report, which is written after each cell; Triton alone has a file of
            its own.
    """
    if short:
        callers = (1, 64)
        seconds, rounds, images = 1.5, 2, 50
    kind = "of full rank" if rank is None else f"of rank {rank}"
    what = WHAT.replace("\n", " ").format(
        architecture=architecture,
        precision=precision,
        kind=kind,
        rounds=rounds,
        seconds=seconds,
        images=images,
        passes=PASSES,
    )
    file = f"adapters-{precision}"
    if ways == ("triton",):
        file += "-triton"
    report = Report("adapters", "Adapters beside one release", what, timed=False, file=file)
    random = np.random.default_rng(1)
    most = max(adapters)
    image = picture()
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {}  # of rates, by engine and task
    starts: dict[Way, list[str]] = {}
    bare: dict[Way, int] = {}

    def keep(complete: bool = False) -> None:
        """Write what is measured so far, so that an interrupted run keeps it."""
        head = ["engine, requests", "adapters", "callers", "plain /s", "named /s", "ratio"]
        head += ["plain p99 ms", "named p99 ms", "ratio", "errors"]
        report.table("Requests", head, rows, shown=complete)
        head = ["engine, task", "cells", "median", "least", "most"]
        means = [
            [name, str(len(some))]
            + [f"{value:.2f}" for value in (statistics.median(some), min(some), max(some))]
            for name, some in ratios.items()
        ]
        report.table("Ratios of rates over all cells of a task", head, means, shown=complete)
        head = ["engine", "start s", f"with {most}", "MiB without", "MiB for each", "first ms"]
        head += ["until served s", "1,000 x 80 labels, first s", "again s"]
        report.table("Start, memory, new adapters", head, list(starts.values()), shown=complete)
        report.write(results, complete)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("exporting")
        with Process() as process:
            process.call(export, architecture, precision, folder)
            repository = folder / "repository"
            process.call(add_large_label_set, repository)
        say("building the index")
        indexes = folder / "indexes"
        (folder / "photos").mkdir()
        for number in range(images):
            (folder / "photos" / f"{number}.jpg").write_bytes(picture(seed=number))
        build(str(folder / "photos"), indexes / "photos", load_release(repository))
        flags = ["--indexes", str(indexes)]

        # Start and memory without adapters
        for way in ways:
            say(f"starting {way} without adapters")
            with served(way, repository, flags) as (url, server, start):
                for task in TASKS:
                    asyncio.run(rate(url, task, image, itertools.repeat(None), 1, 0.2))
                bare[way] = proportional(server)
                starts[way] = [way, f"{start:.1f}"]
            keep()

        say(f"adding {most} adapters")
        begun = time.perf_counter()
        add_many(repository, range(most), rank)
        report.note(f"Adding an adapter took {1e3 * (time.perf_counter() - begun) / most:.0f} ms.")

        for way in ways:
            say(f"starting {way} with {most} adapters")
            with served(way, repository, flags) as (url, server, start), Client(url) as client:
                client.embed_texts(["a cat"])
                begun = time.perf_counter()
                for number in range(most):
                    client.embed_texts(["a cat"], adapter=f"a{number}")
                opened = (time.perf_counter() - begun) / most
                for _ in range(PASSES if way == "triton" else 1):
                    asyncio.run(open_all(url, image, [f"a{number}" for number in range(most)]))
                each = (proportional(server) - bare[way]) / most
                starts[way] += [
                    f"{start:.1f}",
                    f"{bare[way] / MIB:.0f}",
                    f"{each / MIB:.2f}",
                    f"{1e3 * opened:.1f}",
                ]
                keep()

                # Answers a second and tails, with and without adapters in turn
                draws = itertools.product(adapters, ("uniform", "skewed"), TASKS, callers)
                for count, draw, task, at_once in draws:
                    if draw == "skewed" and (count < most or task != "texts"):
                        continue
                    say(f"{way}: {task}, {count} adapters, {draw}, {at_once} callers")
                    weights = np.ones(count)
                    if draw == "skewed":
                        weights = 1 / np.arange(1, count + 1)
                    drawn = random.choice(count, 100_000, p=weights / weights.sum())
                    names = [f"a{number}" for number in drawn]
                    cells = compare(url, task, image, names, at_once, seconds, rounds)
                    rows.append([f"{way}, {task}, {draw}", str(count), str(at_once), *cells])
                    ratios.setdefault(f"{way}, {task}", []).append(float(cells[2]))
                    keep()

                # A new adapter: until it has answered, and for the large label set
                before = client.classify(image, label_set=LABEL_SET, adapter="a0").receipt
                begun = time.perf_counter()
                add_many(repository, [0], rank)
                after = client.classify(image, label_set=LABEL_SET, adapter="a0").receipt
                added = time.perf_counter() - begun
                if before == after:
                    raise SystemExit(f"{way} answered with the adapter that was replaced")
                begun = time.perf_counter()
                client.classify(image, label_set=LARGE, adapter="a0")
                large = time.perf_counter() - begun
                begun = time.perf_counter()
                client.classify(image, label_set=LARGE, adapter="a0")
                again = time.perf_counter() - begun
                starts[way] += [f"{added:.3f}", f"{large:.2f}", f"{again:.2f}"]
                keep()
        report.note(
            "MiB are proportional (PSS), after requests of all tasks and adapters."
            " First: the first request of an adapter. Until served: a replaced adapter is written,"
            " and has answered classify. 1,000 x 80: classify with a label set of 80,000 stored"
            " prompts (random), with an adapter that has not asked for it, and again."
        )
        report.note(
            "Published for LoRAs of language models on GPUs, so of another kind: vLLM serves 4 to"
            " 34 % fewer requests per second with one (its issues 11267 and 11613), and S-LoRA up"
            " to 2,000 of them on an A100."
        )
        if releases:
            keep()
            report.note(small_releases(folder / "small", releases))
    keep(complete=True)


if __name__ == "__main__":
    tyro.cli(measure)
