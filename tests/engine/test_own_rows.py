"""Each caller gets its own rows, whoever else waits: callers of two releases, of each encoder, with
one need or two, beside the same needs alone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from radapter_serve.encoders.loaded import LoadedRelease, Part, TaskSteps
from radapter_serve.engine.engine import Engine
from tests.helpers.fake_upstream import until
from tests.helpers.small_release import SIZE, Local, together, write_release


class HeldBack(Local):
    """Encodes once the test lets it; notes in `begun` that a call has come."""

    gate = threading.Event()
    begun: ClassVar[list[str]] = []

    def _run(self, name: str, tensor: str, array: np.ndarray) -> np.ndarray:
        self.begun.append(name)
        assert self.gate.wait(60)
        return super()._run(name, tensor, array)


def rows_of(part: Part, seed: int) -> Any:
    """Rows for an encoder, another number of them for each seed."""
    random = np.random.default_rng(seed)
    count = 1 + seed % 3
    if part == "tokens":
        return random.integers(1, 400, (count, 4)).tolist()
    return random.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def task(loaded: LoadedRelease, part: Part, rows: Any) -> TaskSteps[np.ndarray]:
    return (yield from loaded.encoded(part, rows))


def test_each_caller_gets_its_own_rows(tmp_path: Path) -> None:
    for version in (1, 2):
        write_release(tmp_path, version, seed=version)
    releases = [HeldBack(tmp_path, version).loaded for version in (1, 2)]
    parts: tuple[Part, ...] = ("images", "patches", "tokens")
    seeds = itertools.count()

    def needs_of(loaded: LoadedRelease, part: Part, count: int) -> list[Any]:
        return [(loaded, part, rows_of(part, next(seeds))) for _ in range(count)]

    # For each encoder of each release, callers of 1, 2, 1 and 2 needs, and one that needs both.
    callers: list[list[Any]] = []
    for part in parts:
        for loaded in releases:
            callers += [needs_of(loaded, part, count) for count in (1, 2, 1, 2)]
            callers += [[need for each in releases for need in needs_of(each, part, 1)]]
    HeldBack.gate.set()
    alone = [[together([task(*need)])[0] for need in needs] for needs in callers]

    with Engine(releases) as engine, ThreadPoolExecutor(len(callers)) as pool:
        served = list(engine._served.values())
        HeldBack.gate.clear()
        HeldBack.begun.clear()

        def arrived() -> int:
            queues = {queue for each in served for queue in each.queues.values()}
            return len(HeldBack.begun) + sum(len(queue._waiting) for queue in queues)

        def ask(number: int, needs: Sequence[Any]) -> list[Any]:
            asked = served[number % 2]  # a search may need the other release
            return together([task(*need) for need in needs], partial(engine._encode, asked))

        answers = []
        for number, needs in enumerate(callers):
            answers.append(pool.submit(ask, number, needs))
            until(lambda: arrived() > number)  # noqa: B023
        HeldBack.gate.set()
        for answer, expected in zip(answers, alone, strict=True):
            for rows, same in zip(answer.result(60), expected, strict=True):
                np.testing.assert_allclose(rows, same, atol=1e-6)
