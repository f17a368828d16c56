"""A real tritonserver with the stand-in models of fake_model.py, in two releases."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from radapter_serve.server.triton_server import TritonServer, free_ports

VERSIONS = (1, 2)
TASKS = {
    "embed_image": (
        ["image BYTES 1"],
        ["image_embeds FP32 4"],
    ),
    "embed_text": (
        ["text BYTES 1"],
        ["text_embeds FP32 4"],
    ),
    "classify": (
        ["image BYTES 1", "labels BYTES -1 ?", "label_set BYTES 1 ?", "templates BYTES -1 ?", "top_k INT32 1 ?"],
        ["label BYTES -1", "score FP32 -1"],
    ),
    "segment": (
        [
            "image BYTES 1",
            "labels BYTES -1 ?",
            "label_set BYTES 1 ?",
            "templates BYTES -1 ?",
            "threshold FP32 1 ?",
            "short_side INT32 1 ?",
            "stride INT32 1 ?",
            "refine INT32 1 ?",
            "proposals UINT8 -1,-1,-1 ?",
            "proposal_scores FP32 -1,-1 ?",
            "proposal_weight FP32 1 ?",
        ],
        ["mask UINT16 -1,-1", "label BYTES -1", "score FP32 -1"],
    ),
    "retrieve": (
        ["text BYTES 1 ?", "image BYTES 1 ?", "index BYTES 1", "top_k INT32 1 ?", "where BYTES 1 ?"],
        ["id BYTES -1", "score FP32 -1", "metadata BYTES -1", "thumbnail BYTES -1"],
    ),
}


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
        "label_sets": {"letters": {"labels": 3}},
        "max_batch_size": 64,
        "preprocess": {"size": 224},
        "created": "2026-01-01T00:00:00+00:00",
    }


def write_repository(folder: Path) -> Path:
    """Writes the task models in both versions, with the configurations' parameters."""

    def tensor(spec: str) -> str:
        name, kind, dims, *optional = spec.split()
        datatype = "TYPE_STRING" if kind == "BYTES" else f"TYPE_{kind}"
        return f'{{ name: "{name}" data_type: {datatype} dims: [ {dims} ] {"optional: true" if optional else ""} }}'

    releases = {"release": release(VERSIONS[-1])} | {f"release.{version}": release(version) for version in VERSIONS}
    parameters = "\n".join(
        f'parameters {{ key: "{key}" value: {{ string_value: {json.dumps(json.dumps(value))} }} }}'
        for key, value in releases.items()
    )
    for name, (inputs, outputs) in TASKS.items():
        model = folder / name
        for version in VERSIONS:
            (model / str(version)).mkdir(parents=True)
            shutil.copy(Path(__file__).with_name("fake_model.py"), model / str(version) / "model.py")
        (model / "config.pbtxt").write_text(
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: {0 if name in ("segment", "retrieve") else 64}\n'
            f"input [ {', '.join(map(tensor, inputs))} ]\noutput [ {', '.join(map(tensor, outputs))} ]\n"
            f"instance_group {{ kind: KIND_CPU count: {2 if name == 'classify' else 1} }}\n"
            f"version_policy: {{ latest {{ num_versions: {len(VERSIONS)} }} }}\n{parameters}\n"
        )
    return folder


class FakeServer(TritonServer):
    """A server on free ports, or on those given, that can be made to fail; `urls` has a URL for each protocol."""

    def __init__(self, repository: Path, ports: tuple[int, int, int] | None = None) -> None:
        self.ports = ports or free_ports()
        super().__init__(repository, "127.0.0.1", *self.ports)
        self.urls = {"grpc": self.grpc_url, "http": self.http_url}

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP: the server no longer answers, its connections stay. SIGKILL: it is gone at once."""
        assert self._process is not None
        os.kill(self._process.pid, number)
