"""Many adapters beside one release: requests a second and memory against none, and how soon a new
one is served.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from common import RESULTS, Process, Report, export, memory, picture, say

from radapter_client import Values
from radapter_serve.encoders.loaded import load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.index.build import build
from radapter_serve.release.adapters import AdapterFacts, add
from radapter_serve.release.release import Release
from radapter_serve.release.repository import find_release

WHAT = """{architecture} with random weights in {precision}, by the engine of one process. Adapters
are random, {kind}; a request draws its own, uniformly or with a weight of 1/rank (skewed). Rows
alternate with the same requests without one; a ratio is the median over rounds of
{seconds:g} s. Texts are all different; classify has an image of 640 x 480 and a label set of
100 labels; search is of {images} images."""


def add_many(repository: Path, count: int, rank: int | None) -> float:
    """Put random adapters beside the newest release; the seconds that the last one took."""
    release = Release.load(find_release(repository))
    width = release.embed_dim
    facts = AdapterFacts(release.text_tower.digest(release.alpha), width, 1.0, rank)
    random = np.random.default_rng(0)
    shapes = [(width, width)] if rank is None else [(width, rank), (rank, width)]
    start = 0.0
    for number in range(count):
        factors = tuple((0.02 * random.normal(size=size)).astype(np.float32) for size in shapes)
        start = time.perf_counter()
        add(repository, f"a{number}", facts, factors, replace=True)  # type: ignore[arg-type]
    return time.perf_counter() - start


def rate(ask: Callable[[int], object], callers: int, seconds: float) -> tuple[float, float]:
    """Requests a second, and the 99th percentile of their latency in ms, of a closed loop."""
    end = time.perf_counter() + seconds
    latencies: list[float] = []
    lock = threading.Lock()
    count = 0

    def caller(_: int) -> None:
        nonlocal count
        while (start := time.perf_counter()) < end:
            with lock:
                count += 1
                number = count
            ask(number)
            latencies.append(time.perf_counter() - start)

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(caller, range(callers)))
    return len(latencies) / (time.perf_counter() - began), 1e3 * float(np.quantile(latencies, 0.99))


def compare(
    ask: Callable[[int, str | None], object],
    names: Sequence[str],
    callers: int,
    seconds: float,
    rounds: int,
) -> list[str]:
    """Cells of a row: rates and tails without and with adapters, in turn, and the ratio."""
    pairs = []
    for turn in range(rounds):
        first = 10_000_000 * turn + 1_000 * int(time.time())  # texts are others each time

        def plain(number: int, first: int = first) -> object:
            return ask(first + number, None)

        def named(number: int, first: int = first) -> object:
            return ask(first + 500_000 + number, names[number % len(names)])

        pairs.append((*rate(plain, callers, seconds), *rate(named, callers, seconds)))
    ratio = statistics.median(with_one / without for without, _, with_one, _ in pairs)
    middle = np.median(np.array(pairs), axis=0)
    cells = [f"{middle[0]:.0f}", f"{middle[2]:.0f}", f"{ratio:.2f}"]
    return [*cells, f"{middle[1]:.0f}", f"{middle[3]:.0f}"]


def measure(
    architecture: str = "ViT-B-32",
    precision: Literal["fp32", "int8"] = "fp32",
    adapters: tuple[int, ...] = (1, 10, 100, 1000),
    callers: tuple[int, ...] = (1, 8, 64),
    rank: int | None = None,
    seconds: float = 2.0,
    rounds: int = 3,
    images: int = 200,
    results: Path = RESULTS,
) -> None:
    """Measure an engine with adapters beside its release.

    Args:
        architecture: name in open_clip.
        precision: of the release.
        adapters: numbers of adapters.
        callers: numbers of callers.
        rank: of the adapters; full rank if not given.
        seconds: of a round.
        rounds: of each cell.
        images: of the index.
        results: folder of the report.
    """
    kind = "of full rank" if rank is None else f"of rank {rank}"
    what = WHAT.format(
        architecture=architecture, precision=precision, kind=kind, seconds=seconds, images=images
    )
    file = f"adapters-{precision}"
    report = Report("adapters", "Adapters beside one release", what, timed=False, file=file)
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("exporting")
        with Process() as process:
            process.call(export, architecture, precision, folder)
        repository = folder / "repository"
        photos = folder / "photos"
        photos.mkdir()
        for number in range(images):
            (photos / f"{number}.jpg").write_bytes(picture(seed=number))
        say("building the index")
        loaded = load_release(repository, indexes=folder / "indexes")
        build(str(photos), folder / "indexes" / "photos", loaded)
        image = picture()
        with Engine([loaded]) as engine:

            def ask(task: str, number: int, adapter: str | None) -> object:
                text = f"a photo of {number} things"
                values: dict[str, object] = {"text": (text,)}
                if task == "classify":
                    values = {"image": [image], "label_set": "names"}
                if task == "search":
                    values["index"] = "photos"
                if adapter is not None:
                    values["adapter"] = adapter
                model = {"texts": "embed_text", "search": "retrieve"}.get(task, task)
                return engine.infer(model, "", Values(values)).outputs["receipt"]

            # Throughput and tails, with and without adapters in turn
            rows = []
            before = memory("VmRSS")
            for count in adapters:
                add_many(repository, count, rank)
                began = time.perf_counter()
                for number in range(count):
                    ask("texts", number, f"a{number}")
                opened = time.perf_counter() - began
                grown = (memory("VmRSS") - before) / count / 1e6
                for task in ("texts", "classify", "search"):
                    for at_once in callers:
                        for draw in ("uniform", "skewed") if task == "texts" else ("uniform",):
                            say(f"{task}, {count} adapters, {draw}, {at_once} callers")
                            weights = np.ones(count)
                            if draw == "skewed":
                                weights = 1 / np.arange(1, count + 1)
                            drawn = random.choice(count, 100_000, p=weights / weights.sum())
                            names = [f"a{number}" for number in drawn]
                            cells = compare(partial(ask, task), names, at_once, seconds, rounds)
                            rows.append([f"{task}, {draw}", str(count), str(at_once), *cells])
                report.note(
                    f"{count} adapters: first requests of all {opened:.2f} s,"
                    f" {1e3 * opened / count:.1f} ms each; {grown:.2f} MB of memory each, mapped"
                    " pages and caches included."
                )
            head = ["requests", "adapters", "callers", "plain /s", "named /s", "ratio"]
            report.table("Requests", [*head, "plain p99 ms", "named p99 ms"], rows)

            # A new adapter, until it is served
            facts_at = time.perf_counter()
            add_many(repository, 1, rank)
            ask("texts", 1, "a0")
            report.note(
                f"add-adapter until it has answered: {time.perf_counter() - facts_at:.3f} s."
            )
    report.write(results)


if __name__ == "__main__":
    tyro.cli(measure)
