"""A switch of releases whose encoders are engines of TensorRT, on fakes of TensorRT and of the GPU.

No real tritonserver takes part: it refuses models for a GPU that it does not see. In its place each
load and unload runs the backend's own code in this process.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from radapter_serve.encoders.tensorrt.plan_writer import build_engines
from radapter_serve.release.agreement import Samples
from radapter_serve.release.repository import ENCODERS, TENSORRT
from radapter_serve.server.control import ServedVersion
from radapter_serve.server.installation import OUR_BACKENDS, Installation, our_backends
from radapter_serve.server.launch import MODELS, put
from radapter_serve.server.models import ModelEntry, parsed, plan_models
from radapter_serve.server.runtime_choice import configure
from radapter_serve.server.switch import carry_out, check_side_by_side, plan_switch
from tests.helpers import fake_triton
from tests.helpers.fake_tensorrt import Driver, install


class Server:
    """A server and its tritonserver: loads engines as they lie in its folder, and asks all of them
    after each step.
    """

    def __init__(self, repository: Path, folder: Path) -> None:
        self._repository = repository
        self._folder = folder
        (folder / MODELS).mkdir()
        self.offered: dict[str, ModelEntry] = {}
        self.engines: dict[str, dict[int, Any]] = {name: {} for name in ENCODERS}
        self.most = 0  # releases whose engines were on the GPU at once
        self.control = self

    def put(self, name: str, model: ModelEntry | None) -> None:
        put(self._folder, self._repository, name, model)
        if model is None:
            del self.offered[name]
        else:
            self.offered[name] = model

    def load(self, model: str, *, timeout: float) -> None:
        self._have(model, set(self.offered[model].versions))

    def unload(self, model: str, *, timeout: float = 30.0) -> None:
        self._have(model, set())

    def index(self, *, ready: bool = False) -> list[ServedVersion]:
        return []

    def refresh_shared_memory(self) -> None:
        pass

    def _have(self, model: str, versions: set[int]) -> None:
        if model not in ENCODERS:
            return
        own = self.engines[model]
        for version in set(own) - versions:
            own.pop(version).finalize()
        for version in versions - set(own):
            own[version] = self._started(model, version)
        self.most = max(self.most, *map(len, self.engines.values()))
        for name, engines in self.engines.items():
            for version, engine in engines.items():
                samples = Samples.load(self._repository / name / str(version))
                source = "tokens" if name == "text_encoder" else "image"
                for values, reference in zip(samples.inputs, samples.references, strict=True):
                    [answer] = engine.execute([fake_triton.Request(**{source: values})])
                    [embeds] = answer.outputs().values()
                    np.testing.assert_allclose(embeds, reference, atol=1e-5)

    def _started(self, model: str, version: int) -> Any:
        folder = self._folder / MODELS / model
        config = parsed((folder / "config.pbtxt").read_text(encoding="utf-8"))
        assert (config.backend, list(config.instance_group[0].gpus)) == (TENSORRT, [0])
        engine = fake_triton.load(OUR_BACKENDS / TENSORRT / "model.py")
        engine.initialize(
            {
                "model_config": json.dumps(
                    {"max_batch_size": 0, **MessageToDict(config, preserving_proto_field_name=True)}
                ),
                "model_name": model,
                "model_repository": str(folder),
                "model_version": str(version),
                "model_instance_kind": "GPU",
                "model_instance_device_id": "0",
            }
        )
        return engine


def test_engines_of_two_releases_stand_side_by_side_and_those_of_the_old_one_leave_the_gpu(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    mine = tmp_path / "repository"
    install(monkeypatch, driver)
    fake_triton.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(repository, mine)
    build_engines(mine)  # release 2 alone has patches

    def planned(release: int) -> dict[str, ModelEntry]:
        installation = Installation(Path("/bin/false"), our_backends())
        configured = configure(mine, [release], None, 1, installation, lambda line: None)
        return plan_models(mine, [release], [], configured.configs)

    def on_the_gpu() -> tuple[int, int, list[int]]:
        return driver.contexts, driver.streams, sorted(map(len, driver.memory.values()))

    server = Server(mine, tmp_path)
    seen: dict[int, Any] = {}
    for release in (1, 2, 1):
        new = planned(release)
        check_side_by_side(server.offered, new)
        carry_out(plan_switch(server.offered, new), server, lambda line: None)
        assert server.offered == new
        assert {tuple(engines) for engines in server.engines.values() if engines} == {(release,)}
        assert seen.setdefault(release, on_the_gpu()) == on_the_gpu()
    assert server.most == 2
