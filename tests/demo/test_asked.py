"""Whom the demo asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from radapter_serve import Model
from radapter_serve.demo import run
from radapter_serve.errors import RAdapterError
from tests.helpers.small_release import png


def test_the_demo_asks_in_this_process_where_there_is_no_triton(
    exported_tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise RAdapterError("there is none")

    monkeypatch.setattr(run, "find_tritonserver", none)
    said: list[str] = []
    with run.asked(exported_tiny_clip / "model_repository", tmp_path, said.append) as client:
        assert isinstance(client, Model)
        assert client.classify(png(0), ["cat", "dog"]).top in ("cat", "dog")
    assert said == ["ask in this process, for Triton is not installed"]
