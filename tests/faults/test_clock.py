"""A clock that jumps, as it does when a machine wakes up or its time is set."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from radapter_client import Client
from tests.faults.conftest import RunningGateway, outcome
from tests.helpers.fake_server import FakeServer
from tests.test_house import sources


def test_no_wait_reads_the_time_of_day() -> None:
    """The beginning of a span alone does."""
    modules = {**sources("radapter_serve"), **sources("clients/radapter_client")}
    del modules["radapter_serve.encoders.steps"]
    for name, path in modules.items():
        assert not re.search(r"\btime\.time(_ns)?\(", path.read_text(encoding="utf-8")), name


@pytest.mark.triton
@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_a_clock_that_jumps_in_the_middle_of_a_call(
    running: FakeServer, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """A client's clock that jumps a day ahead or back changes no answer and no time-out."""
    true = time.time
    for jumps, url in enumerate((*running.urls.values(), gateway.url), 1):
        with Client(url, retries=0) as client, ThreadPoolExecutor(2) as threads:
            classify = partial(client.classify, b'{"sleep": 0.6}', ["a"], timeout=20.0)
            segment = partial(client.segment, b'{"sleep": 1.5}', ["a"], timeout=0.8)
            good = threads.submit(outcome, classify)
            late = threads.submit(outcome, segment)
            time.sleep(0.2)
            seconds = jumps * jump
            monkeypatch.setattr(time, "time", lambda seconds=seconds: true() + seconds)
            assert good.result(30) == "an answer"
            assert late.result(30).startswith("Timeout")
