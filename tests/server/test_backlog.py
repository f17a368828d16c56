"""The limit of what waits: from Triton's metrics to the requests that a model refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.server.backlog import Backlog, Queue, read_counts
from radapter_serve.triton.surplus import Surplus

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
    assert read_counts(METRICS) == {"classify": (7, 13), "segment": (0, 5)}


@pytest.mark.parametrize(
    ("looks", "surplus"),
    [
        # seconds, requests that wait, requests that were answered; more than 128 wait
        (
            [(0.0, 0, 0), (0.25, 128, 0), (0.5, 129, 0), (0.75, 500, 0), (1, 12, 0)],
            [0, 0, 1, 372, 0],
        ),
        # some wait for more than 60 s: of the first five requests one was begun
        ([(0, 5, 100), (30, 9, 101), (59.9, 9, 101), (60, 9, 101), (90, 5, 105)], [0, 0, 0, 4, 5]),
        # an empty queue holds nothing old
        ([(0, 3, 0), (1, 0, 3), (50, 3, 3), (70, 3, 3)], [0, 0, 0, 0]),
        # another Triton counts anew
        ([(0, 50, 1000), (30, 2, 0), (61, 2, 0)], [0, 0, 0]),
    ],
)
def test_too_many_requests_and_old_ones_are_surplus(
    looks: list[tuple[float, int, int]], surplus: list[int]
) -> None:
    queue = Queue(max_waiting=128, max_seconds=60)
    assert [queue.surplus(*look) for look in looks] == surplus


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=30))
def test_never_more_is_refused_than_waits(steps: list[tuple[int, int]]):
    queue = Queue(max_waiting=20, max_seconds=5)
    waiting = done = 0
    for now, (came, answered) in enumerate(steps):
        answered = min(answered, waiting + came)
        waiting += came - answered
        done += answered
        assert max(0, waiting - 20) <= queue.surplus(now, waiting, done) <= waiting


def test_each_process_refuses_its_share_once(tmp_path: Path):
    processes = {"classify": 2, "segment": 1}
    # Its thread reads no metrics there.
    backlog = Backlog("http://localhost:1/metrics", tmp_path, lambda: processes, max_waiting=4)
    one = Surplus(tmp_path / "classify")
    other = Surplus(tmp_path / "classify")
    none = Surplus(tmp_path / "segment")
    backlog.observe({"classify": (9, 0)}, 0.0)
    assert (one.take(2), one.take(10), one.take(10)) == (2, 1, 0)
    assert (other.take(10), none.take(10)) == (3, 0)
    backlog.observe({"classify": (9, 0)}, 0.25)  # as many again
    assert one.take(10) == 3
    backlog.observe({"classify": (4, 0)}, 0.5)
    assert other.take(10) == 0
    assert list(tmp_path.iterdir()) == []
    backlog.stop()
