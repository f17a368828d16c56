"""The demo's server."""

from __future__ import annotations

from pathlib import Path

from radapter_client import Client
from radapter_serve.demo.ask import served
from radapter_serve.release.release import TASKS
from tests.helpers.small_release import png, write_release


def test_it_answers_and_lists_its_indexes(tmp_path: Path) -> None:
    write_release(tmp_path / "models", 1, seed=1, tasks=TASKS)
    with served(tmp_path / "models", tmp_path / "indexes") as url, Client(url) as client:
        assert client.classify(png(0), ["a", "b"]).release == 1
        assert client.indexes() == []
