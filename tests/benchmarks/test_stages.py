"""Where the time of a request goes, from the server's own statistics."""

from __future__ import annotations

import json

import pytest

from benchmarks.stages import Stages, read_totals
from tests.helpers.stand_ins import http_server


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
    found = Stages.between("classify", before, after, seconds=8 * 0.040, requests=8)
    assert (found.queue, found.task, found.encoder) == pytest.approx((3 + 4, 6, 20))
    assert found.network == pytest.approx(40 - 3 - 30)


def test_a_task_that_the_server_says_nothing_of_is_all_network():
    after = {"embed_text": counts(1, 1, 1, 1)}
    found = Stages.between("classify", {}, after, seconds=0.010, requests=1)
    assert found.network == pytest.approx(10)
    assert (found.queue, found.task, found.encoder) == (0, 0, 0)


def test_statistics_are_added_over_the_versions_of_a_model():
    def version(name: str, count: int) -> dict[str, object]:
        """As Triton has it."""
        times = {
            "success": {"count": count, "ns": 99},
            "queue": {"count": count, "ns": 10},
            "compute_input": {"count": count, "ns": 1},
            "compute_infer": {"count": count, "ns": 2},
            "compute_output": {"count": count, "ns": 4},
            "cache_hit": {"count": count, "ns": 8},
        }
        return {"name": name, "execution_count": 3, "inference_stats": times}

    models = [version("classify", 5), version("classify", 6), version("segment", 0)]
    with http_server(200, json.dumps({"model_stats": models}).encode()) as (url, seen):
        found = read_totals(url)
    assert [path for _, path, *_ in seen] == ["/v2/models/stats"]
    assert found["classify"] == {"count": 11, "executions": 6, "queue": 20, "compute": 14}
    assert found["segment"] == {"count": 0, "executions": 3, "queue": 10, "compute": 7}
