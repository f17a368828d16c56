"""Callers of a real server who overlap: nobody waits for what is not there to wait for."""

from __future__ import annotations

import threading
import time

import pytest

from radapter_client import Client

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("callers", [2, 4])
def test_no_text_waits_for_half_a_second(server, callers):
    """A queue with a limit made Triton overlook a free encoder: one answer in twenty took 0.5 s."""
    seconds: list[float] = []

    def ask(caller: int) -> None:
        with Client(server.grpc_url, retries=0) as client:
            for number in range(400 // callers):
                start = time.monotonic()
                client.embed_texts([f"text {number} of caller {caller}"])
                seconds.append(time.monotonic() - start)

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seconds) == 400
    assert [one for one in seconds if one > 0.4] == []
