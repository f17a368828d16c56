"""The limit of what waits: from Triton's metrics to the requests that a model refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.server.backlog import Backlog, Counts, Queue, read_counts
from radapter_serve.triton.surplus import Surplus, write

METRICS = """
# HELP nv_inference_pending_request_count Pending requests awaiting execution per-model.
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="classify",version="1"} 3
nv_inference_pending_request_count{model="classify",version="2"} 4
nv_inference_request_success{model="classify",version="2"} 10
nv_inference_request_failure{model="classify",reason="OTHER",version="2"} 1
nv_inference_request_failure{model="classify",reason="REJECTED",version="2"} 2
nv_inference_request_success{model="segment",version="2"} 5
nv_inference_count{model="classify",version="2"} 700
nv_cpu_utilization 0.5
"""


def test_the_metrics_of_all_versions_count_together():
    assert read_counts(METRICS) == {"classify": Counts(7, 13), "segment": Counts(0, 5)}


def test_more_than_may_wait_is_surplus():
    queue = Queue(max_waiting=128, max_seconds=60)
    assert [
        queue.surplus(0.25 * n, Counts(waiting)) for n, waiting in enumerate((0, 128, 129, 500, 12))
    ] == [*(0, 0, 1, 372, 0)]


def test_what_has_waited_too_long_is_surplus_and_nothing_else():
    queue = Queue(max_waiting=128, max_seconds=60)
    assert queue.surplus(0, Counts(5, 100)) == 0
    assert queue.surplus(30, Counts(9, 101)) == 0  # one was begun, five came
    assert queue.surplus(59.9, Counts(9, 101)) == 0
    assert queue.surplus(60, Counts(9, 101)) == 4  # of the first five
    assert queue.surplus(60.25, Counts(5, 105)) == 0
    assert queue.surplus(90, Counts(5, 105)) == 5


def test_a_queue_that_was_empty_holds_nothing_old():
    queue = Queue(max_waiting=128, max_seconds=60)
    queue.surplus(0, Counts(3, 0))
    queue.surplus(1, Counts(0, 3))
    queue.surplus(50, Counts(3, 3))
    assert queue.surplus(70, Counts(3, 3)) == 0


def test_a_triton_that_counts_anew_is_seen():
    queue = Queue(max_waiting=128, max_seconds=60)
    queue.surplus(0, Counts(50, 1000))
    queue.surplus(30, Counts(2, 0))
    assert queue.surplus(61, Counts(2, 0)) == 0


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=30))
def test_never_more_is_refused_than_waits(steps: list[tuple[int, int]]):
    queue = Queue(max_waiting=20, max_seconds=5)
    waiting = done = 0
    for now, (came, answered) in enumerate(steps):
        answered = min(answered, waiting + came)
        waiting += came - answered
        done += answered
        assert max(0, waiting - 20) <= queue.surplus(now, Counts(waiting, done)) <= waiting


def test_each_process_refuses_its_share_once(tmp_path: Path):
    processes = {"classify": 2, "segment": 1}
    backlog = Backlog("http://localhost:1/metrics", tmp_path, lambda: processes, max_waiting=4)
    one = Surplus(tmp_path / "classify")
    other = Surplus(tmp_path / "classify")
    none = Surplus(tmp_path / "segment")
    backlog.observe({"classify": Counts(9)}, 0.0)
    assert (one.take(2), one.take(10), one.take(10)) == (2, 1, 0)
    assert (other.take(10), none.take(10)) == (3, 0)
    backlog.observe({"classify": Counts(9)}, 0.25)  # as many again
    assert one.take(10) == 3
    backlog.observe({"classify": Counts(4)}, 0.5)
    assert other.take(10) == 0
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("RADAPTER_SURPLUS", raising=False)
    surplus = Surplus()
    surplus.heed("classify")
    assert surplus.take(1000) == 0
    monkeypatch.setenv("RADAPTER_SURPLUS", str(tmp_path))
    surplus.heed("classify")
    write(tmp_path / "classify", 1, 7)
    assert surplus.take(1000) == 7
