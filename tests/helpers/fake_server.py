"""A real tritonserver with the stand-in models of fake_model.py, in two releases."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_export.repository import add_tensors
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer

VERSIONS = (1, 2)
TASKS = ("embed_image", "embed_text", "classify", "segment", "retrieve")
CONFIGS = Path(__file__).parents[2] / "model_repository"


def release(version: int) -> dict[str, Any]:
    """The release.json of one version, with the fields that a client reads."""
    return {
        "format": 1,
        "version": version,
        "alpha": 0.5 * version,
        "architecture": "ViT-B-32",
        "adapter_digest": "sha256:00",
        "precision": "fp32",
        "embed_dim": 4,
        "logit_scale": 100.0,
        "templates": ["a photo of a {}."],
        "label_sets": {},
        "max_batch_size": 64,
        "preprocess": {"size": 224},
        "created": "2026-01-01T00:00:00+00:00",
    }


def write_repository(folder: Path, versions: Sequence[int] = VERSIONS) -> Path:
    """Writes the task models in these versions, with the project's own configurations and a
    release's parameters.
    """
    releases = {"release": release(versions[-1])} | {
        f"release.{version}": release(version) for version in versions
    }
    parameters = "\n".join(
        f'parameters {{ key: "{key}" value: {{ string_value: {json.dumps(json.dumps(value))} }} }}'
        for key, value in releases.items()
    )
    for name in TASKS:
        model = folder / name
        for version in versions:
            (model / str(version)).mkdir(parents=True)
            shutil.copy(
                Path(__file__).with_name("fake_model.py"), model / str(version) / "model.py"
            )
        text = (CONFIGS / name / "config.template.pbtxt").read_text()
        parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
        add_tensors(parsed, name)
        config = text_format.MessageToString(parsed)
        policy = f"version_policy: {{ latest {{ num_versions: {len(versions)} }} }}"
        (model / "config.pbtxt").write_text(f"{config}\n{policy}\n{parameters}\n")
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
