"""Adapters are added, replaced and removed while many ask: each answer is what the fold of the
adapter computes that its receipt names.
"""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import InvalidRequest, Request
from radapter_serve.adapter import save_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.contract.errors import TaskError
from radapter_serve.release import adapters
from tests.helpers.text_adapters import TEXTS, export_base, folded, text_adapter
from tests.helpers.ways import ASKING, Ask

KINDS = 3  # of each name's adapters
STABLE = 5  # one name in so many is replaced, and never removed


@dataclass(frozen=True)
class Tenant:
    """A name, the adapters that it has in turn, and what their folds compute by their digests."""

    name: str
    kinds: list[tuple[adapters.AdapterFacts, adapters.Factors]]
    folds: dict[str, np.ndarray]


def tenants_of(base: Base, count: int, scratch: Path) -> list[Tenant]:
    """Tenants with adapters of their own, of full rank and of rank 3, at several α."""
    tenants = []
    for number in range(count):
        tenant = Tenant(f"tenant-{number}", [], {})
        for kind in range(KINDS):
            alpha = (0.3, 0.7, 1.0)[kind]
            adapter = text_adapter(base, 1000 + KINDS * number + kind, (None, 3)[number % 2], alpha)
            names = ["text_projection"]
            if number % 2:
                names = ["text_projection.up", "text_projection.down"]
            factors: Any = tuple(adapter.tensors[name].numpy() for name in names)
            meta = adapter.metadata
            assert meta.text_tower is not None
            width = len(factors[0])
            facts = adapters.AdapterFacts(meta.text_tower, width, alpha, meta.rank)
            entry = adapters.add(scratch, tenant.name, facts, factors, replace=True)
            tenant.kinds.append((facts, factors))
            digest = adapters.shortened(entry.digest)
            tenant.folds[digest] = folded(base, adapter, alpha, TEXTS)
        tenants.append(tenant)
    return tenants


@pytest.fixture
def base(tiny_clip_dir: str) -> Base:
    return load_base(tiny_clip_dir)


@pytest.fixture
def repository(base: Base, tmp_path: Path, common: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    save_adapter(text_adapter(base, 0), run / "adapter.safetensors")
    return export_base(tmp_path, common, run)


@pytest.mark.parametrize(
    ("way", "names", "callers", "requests"),
    [
        pytest.param("engine", 8, 16, 20, id="engine-small"),
        pytest.param("engine", 50, 64, 60, id="engine", marks=pytest.mark.slow),
        pytest.param("process", 50, 64, 30, id="process", marks=pytest.mark.slow),
        *(
            pytest.param(way, 50, 64, 10, id=way, marks=[pytest.mark.slow, pytest.mark.triton])
            for way in ("triton-http", "triton-grpc")
        ),
    ],
)
def test_each_answer_is_of_the_adapter_that_its_receipt_names(
    base: Base,
    repository: Path,
    tmp_path: Path,
    way: str,
    names: int,
    callers: int,
    requests: int,
) -> None:
    tenants = tenants_of(base, names, tmp_path / "scratch")
    for tenant in tenants:
        facts, factors = tenant.kinds[0]
        adapters.add(repository, tenant.name, facts, factors)
    texts = np.array([[text.encode()] for text in TEXTS], object)
    changes = {"put": 0, "removed": 0}
    stop = threading.Event()

    def change() -> None:
        dice = random.Random(0)
        while not stop.is_set():
            number = dice.randrange(len(tenants))
            tenant = tenants[number]
            facts, factors = dice.choice(tenant.kinds)
            adapters.add(repository, tenant.name, facts, factors, replace=True)
            changes["put"] += 1
            if number % STABLE and dice.random() < 0.3:
                adapters.remove_adapter(repository, tenant.name)
                changes["removed"] += 1

    def caller(ask: Ask, number: int, changing: Future[None]) -> tuple[int, int, int]:
        """Ask until there were many changes; returns how many requests were asked and answered, and
        how many names were unknown.
        """
        dice = random.Random(number)
        calls = answers = unknown_names = 0
        while calls < requests or (changes["put"] < 2 * names and not changing.done()):
            calls += 1
            place = dice.randrange(len(tenants))
            tenant = tenants[place]
            column = np.full((len(TEXTS), 1), tenant.name.encode(), object)
            inputs = {"text": texts, "adapter": column}
            try:
                outputs = ask(Request("infer", "embed_text", inputs=inputs)).outputs
            except (TaskError, InvalidRequest) as error:
                assert error.code == "unknown_adapter"
                assert place % STABLE, "a name that is never removed was unknown"
                unknown_names += 1
                continue
            answers += 1
            [receipt] = {*np.ravel(outputs["receipt"]).tolist()}
            named = json.loads(receipt)
            assert named["adapter"] == tenant.name
            expected = tenant.folds[named["adapter_digest"]]
            np.testing.assert_allclose(outputs["text_embeds"], expected, atol=1e-6)
        return calls, answers, unknown_names

    with (
        ASKING[way](repository, tmp_path / "indexes") as ask,
        ThreadPoolExecutor(callers + 1) as pool,
    ):
        changing = pool.submit(change)
        try:
            counts = list(pool.map(lambda number: caller(ask, number, changing), range(callers)))
        finally:
            stop.set()
        changing.result()
    calls, answers, unknown_names = (sum(each) for each in zip(*counts, strict=True))
    assert calls == answers + unknown_names >= callers * requests
    assert answers > callers * requests // 2
    assert changes["put"] >= 2 * names and changes["removed"]
