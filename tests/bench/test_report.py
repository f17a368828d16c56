"""What a load came to, as table, JSON and picture."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from radapter_client import Profile
from radapter_serve.bench.load import Closed, Measured, Open
from radapter_serve.bench.report import Row, draw, latency_table, stages_table, write_json

PROFILE = Profile(total=12.0, network=1.25, queue=2.5, task=3.0, encoder=5.25, requests=4)
ROWS = [
    Row.of("classify", "grpc://h:1", Closed(8), Measured([0.010, 0.020], Counter(), 2.0), PROFILE),
    Row.of("classify", "http://h:2", Open(2.5), Measured([], Counter({"Timeout": 3}), 2.0), None),
]


def test_a_row_names_its_load_and_has_milliseconds():
    first, second = ROWS
    assert (first.protocol, first.load, first.throughput) == ("grpc", "8 callers", 1.0)
    assert first.latency == pytest.approx({"p50": 15.0, "p90": 19.0, "p95": 19.5, "p99": 19.9})
    assert (second.protocol, second.load, str(Closed(1))) == ("http", "2.5/s", "1 caller")
    assert (first.loop, second.loop) == ("closed", "open")


def shown(drawn: Table) -> list[str]:
    """The lines about classify, in a terminal of 80 columns."""
    console = Console(width=80, record=True)
    console.print(drawn)
    return [" ".join(line.split()) for line in console.export_text().splitlines() if "classify" in line]


def test_the_tables_show_errors_and_leave_out_what_is_not_known():
    assert shown(latency_table(ROWS)) == [
        "classify grpc 8 callers 2 0 1.0 15.0 19.0 19.5 19.9",
        "classify http 2.5/s 0 3 0.0 - - - -",
    ]
    assert shown(stages_table(ROWS)) == ["classify grpc 8 callers 1.2 2.5 3.0 5.2"]


def test_json_is_strict(tmp_path: Path):
    write_json(ROWS, {"version": "1"}, tmp_path / "bench.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "bench.json").read_text(), parse_constant=refuse)
    assert found["version"] == "1"
    assert found["rows"][0]["stages"] == {"network": 1.25, "queue": 2.5, "task": 3.0, "encoder": 5.25}
    assert found["rows"][1]["latency"]["p99"] is None
    assert found["rows"][1]["errors"] == {"Timeout": 3}


OTHERS = [replace(ROWS[0], task=task) for task in ("embed_text", "retrieve", "segment")]


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:], ROWS + OTHERS], ids=["points", "no answer at all", "four tasks"])
def test_the_picture_is_one(rows: list[Row], tmp_path: Path):
    draw(rows, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as image:
        assert image.format == "PNG"
        assert image.width > 500


def counts(count: int, executions: int, queue: float, compute: float) -> dict[str, float]:
    return {"count": count, "executions": executions, "queue": queue * 1e6, "compute": compute * 1e6}


def test_where_the_time_goes_by_hand():
    """8 requests of classify in 2 batches: each batch takes 30 ms, of which the encoder computes 20 and waits for 4."""
    before = {"classify": counts(10, 10, 5, 7), "image_encoder": counts(10, 10, 1, 1), "embed_text": counts(1, 1, 1, 1)}
    after = {
        "classify": counts(18, 12, 5 + 8 * 3, 7 + 8 * 30),
        "image_encoder": counts(12, 12, 1 + 2 * 4, 1 + 2 * 20),
        "embed_text": counts(1, 1, 1, 1),
    }
    found = Profile.between("classify", before, after, seconds=8 * 0.040, requests=8)
    assert (found.total, found.queue, found.task, found.encoder) == pytest.approx((40, 3 + 4, 6, 20))
    assert found.network == pytest.approx(40 - 3 - 30)


def test_a_task_that_the_server_says_nothing_of_is_all_network():
    found = Profile.between("classify", {}, {"embed_text": counts(1, 1, 1, 1)}, seconds=0.010, requests=1)
    assert (found.network, found.queue, found.task, found.encoder) == pytest.approx((10, 0, 0, 0))
