"""A real tritonserver with the stand-in models of fake_model.py, in two releases."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radapter_export.repository import TEMPLATE, config, sources
from radapter_serve.release.release import TASKS, Release
from radapter_serve.server.config import Endpoints, ServerConfig
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.small_models import release as facts

VERSIONS = (1, 2)


def release(version: int) -> dict[str, Any]:
    """The release.json of one version."""
    created = "2026-01-01T00:00:00+00:00"
    return facts(version, alpha=0.5 * version, embed_dim=4, created=created).to_dict()


def write_repository(folder: Path, versions: Sequence[int] = VERSIONS) -> Path:
    """Writes the task models in these versions, with the exporter's own configurations."""
    releases = [Release.from_dict(release(version)) for version in versions]
    for name in TASKS:
        for version in versions:
            (folder / name / str(version)).mkdir(parents=True)
            model = Path(__file__).with_name("fake_model.py")
            shutil.copy(model, folder / name / str(version) / "model.py")
        text = config(sources() / name / TEMPLATE, name, releases)
        (folder / name / "config.pbtxt").write_text(text)
    return folder


class FakeServer(TritonServer):
    """A server on free ports that can be made to fail; `urls` has a URL for each protocol."""

    def __init__(self, repository: Path, **options: Any) -> None:
        super().__init__(ServerConfig(repository, Endpoints.on_free_ports(), **options))
        self.urls = {"grpc": self.grpc_url, "http": self.http_url}

    def __enter__(self) -> FakeServer:
        super().__enter__()
        return self

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP: the server no longer answers, its connections stay. SIGKILL: it is gone at
        once.
        """
        assert self.pid is not None
        os.kill(self.pid, number)
