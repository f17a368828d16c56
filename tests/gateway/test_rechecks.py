"""Encoders are asked again for stored samples while they serve."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from radapter_serve.contract.errors import OVERLOADED, TaskError
from radapter_serve.encoders.precision import bf16_of_processor
from radapter_serve.engine.engine import Engine
from radapter_serve.gateway.in_process import EngineServer, InProcess
from radapter_serve.gateway.rechecks import TRIES, Rechecks
from tests.conftest import export_into
from tests.helpers.fake_upstream import until
from tests.helpers.ways import in_process

ENCODERS = ("image_encoder", "text_encoder")


def equal(*arrays: Any) -> np.ndarray:
    """The same embedding for every row."""
    return np.full((len(arrays[0]), 32), 32**-0.5, np.float32)


def steps(engine: Engine, repository: Path, ask: Callable[[Rechecks], Any]) -> Counter[Any]:
    """Call a function with the rechecks of an engine; returns how often each outcome came."""
    counts: Counter[Any] = Counter()

    async def run() -> None:
        upstream = InProcess(engine, 2)
        rechecks = Rechecks(upstream, repository, 1.0, lambda *outcome: counts.update([outcome]))
        await ask(rechecks)
        await upstream.close()

    asyncio.run(run())
    return counts


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_that_begins_to_answer_wrongly_fails_readiness_by_its_name(
    exported_tiny_clip: Path, tmp_path: Path, encoder: str
) -> None:
    repository = exported_tiny_clip / "model_repository"
    with in_process(repository, tmp_path, recheck_seconds=0.02) as running:

        def get(path: str) -> tuple[int, str]:
            answer = urllib3.request("GET", f"{running.url}{path}", retries=False)
            return answer.status, answer.data.decode()

        def counted(outcome: str) -> bool:
            line = f'rechecks_total{{encoder="{encoder}",outcome="{outcome}"}}'
            return line in get("/metrics")[1]

        until(lambda: counted("ok"))
        assert get("/health/ready")[0] == 200 and not counted("deviates")
        assert isinstance(running.server, EngineServer)
        release = running.server.engine.releases("classify")[-1].version
        loaded: Any = running.server.engine._served[release].loaded
        graphs = loaded.encoder.graphs
        right = graphs[encoder]
        graphs[encoder] = equal
        until(lambda: get("/health/ready")[0] == 503)
        said = get("/v2/health/ready")[1]
        assert f"{encoder} of release {release} differs from torch by up to" in said
        assert counted("deviates")
        graphs[encoder] = right
        until(lambda: get("/health/ready")[0] == 200)


def test_a_deviation_that_does_not_stay_is_counted_alone(exported_tiny_clip: Path) -> None:
    repository = exported_tiny_clip / "model_repository"
    with Engine.open(f"{repository}@2", threads=1) as engine:
        graphs = engine._served[2].loaded.encoder.graphs  # type: ignore[attr-defined]
        right = graphs["image_encoder"]
        answers = iter([equal] * (TRIES - 1))
        graphs["image_encoder"] = lambda *arrays: next(answers, right)(*arrays)

        async def ask(rechecks: Rechecks) -> None:
            await rechecks.step()
            assert rechecks.trouble is None

        counts = steps(engine, repository, ask)
    assert counts == {("image_encoder", "deviates"): TRIES - 1, ("image_encoder", "ok"): 1}


def test_they_wait_in_the_queue_of_callers_and_no_answer_is_no_deviation(
    exported_tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = exported_tiny_clip / "model_repository"
    with Engine.open(f"{repository}@2", threads=1) as engine:
        served = engine._served[2]
        asked: list[str] = []

        def refusing(needs: Any) -> Any:
            asked.extend(need.part for need in needs)
            raise TaskError(OVERLOADED, "later")

        monkeypatch.setattr(served, "queues", dict.fromkeys(served.queues, refusing))

        async def ask(rechecks: Rechecks) -> None:
            for _ in ENCODERS:
                await rechecks.step()
            assert rechecks.trouble is None

        counts = steps(engine, repository, ask)
    assert asked == ["images", "tokens"]
    assert counts == {(encoder, "no_answer"): 1 for encoder in ENCODERS}


@pytest.mark.parametrize("precision", ["bf16", "int8", "dynamic alpha"])
def test_an_encoder_that_is_right_in_its_precision_stays(
    exported_tiny_clip: Path, common: Path, tmp_path: Path, precision: str
) -> None:
    if precision == "bf16" and not (bf16_of_processor() and importlib.util.find_spec("openvino")):
        pytest.skip("this processor has no bf16, or openvino is not installed")
    repository = exported_tiny_clip / "model_repository"
    if precision != "bf16":
        settings = {"precision": "int8"} if precision == "int8" else {}
        alphas = [0.3] if precision == "int8" else "dynamic"
        adapter = exported_tiny_clip / "adapter.safetensors"
        export_into(tmp_path, common, adapter, alphas, **settings)
        repository = tmp_path / "model_repository"
    how = {"precision": "bf16"} if precision == "bf16" else {}
    with Engine.open(repository, threads=1, **how) as engine:  # type: ignore[arg-type]

        async def ask(rechecks: Rechecks) -> None:
            for _ in range(2 * len(ENCODERS) * len(engine.versions())):
                await rechecks.step()
            assert rechecks.trouble is None

        counts = steps(engine, repository, ask)
    assert set(counts) == {(encoder, "ok") for encoder in ENCODERS}
