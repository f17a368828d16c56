"""Where the time of a request goes, from the server's own statistics."""

from __future__ import annotations

import pytest

from radapter_client import Profile
from radapter_client._profile import read_statistics


def counts(count: int, executions: int, queue: float, compute: float) -> dict[str, float]:
    return {
        "count": count,
        "executions": executions,
        "queue": queue * 1e6,
        "compute": compute * 1e6,
    }


def test_where_the_time_goes_by_hand():
    """8 requests of classify in 2 batches of 30 ms each; its encoder takes 20 and waits for 4."""
    others = counts(1, 1, 1, 1)
    before = {
        "classify": counts(10, 10, 5, 7),
        "image_encoder": counts(10, 10, 1, 1),
        "embed_text": others,
    }
    after = {
        "classify": counts(18, 12, 5 + 8 * 3, 7 + 8 * 30),
        "image_encoder": counts(12, 12, 1 + 2 * 4, 1 + 2 * 20),
        "embed_text": others,
    }
    found = Profile.between("classify", before, after, seconds=8 * 0.040, requests=8)
    assert (found.total, found.queue) == pytest.approx((40, 3 + 4))
    assert (found.task, found.encoder) == pytest.approx((6, 20))
    assert found.network == pytest.approx(40 - 3 - 30)


def test_a_task_that_the_server_says_nothing_of_is_all_network():
    after = {"embed_text": counts(1, 1, 1, 1)}
    found = Profile.between("classify", {}, after, seconds=0.010, requests=1)
    assert (found.total, found.network) == pytest.approx((10, 10))
    assert (found.queue, found.task, found.encoder) == (0, 0, 0)


def test_a_profile_is_drawn_as_a_tree():
    tree = """\
request                     40.00 ms
├── network and client       7.00 ms
└── server                  33.00 ms
    ├── queue                7.00 ms
    ├── task                 6.00 ms
    └── encoder             20.00 ms"""
    assert str(Profile(40, 7, 7, 6, 20, requests=8)) == tree


def test_statistics_are_added_over_the_versions_of_a_model():
    def version(count: int) -> dict[str, object]:
        """As Triton has it: whole numbers are texts in its JSON."""
        times = {
            name: {"count": str(count), "ns": str(nanoseconds)}
            for name, nanoseconds in (
                ("success", 0),
                ("queue", 10),
                ("compute_input", 1),
                ("compute_infer", 2),
                ("compute_output", 4),
                ("cache_hit", 8),
            )
        }
        return {"name": "classify", "execution_count": "3", "inference_stats": times}

    found = read_statistics({"model_stats": [version(5), version(6), {"name": "segment"}]})
    assert found["classify"] == {"count": 11, "executions": 6, "queue": 20, "compute": 14}
    assert found["segment"] == {"count": 0, "executions": 0, "queue": 0, "compute": 0}
    assert read_statistics({}) == {}
