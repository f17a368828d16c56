"""The end of `radapter-demo --open`."""

from __future__ import annotations

from pathlib import Path

import pytest

from radapter_client import Client
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import TASKS
from tests.helpers.small_release import png, write_release


def test_the_page_has_a_server_where_there_is_no_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from radapter_serve.demo import play  # here: it needs torch

    def missing() -> None:
        raise RAdapterError("no tritonserver")

    monkeypatch.setattr(play, "find_tritonserver", missing)
    write_release(tmp_path / "models", 1, seed=1, tasks=TASKS)
    with play.served(tmp_path / "models", tmp_path / "indexes") as url, Client(url) as client:
        assert url.startswith("http://")
        assert client.classify(png(0), ["a", "b"]).release == 1
