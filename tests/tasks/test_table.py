"""The table of tasks against the models' own configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_client._methods import TASKS as ASKED
from radapter_serve.release.release import TASKS as NAMES
from radapter_serve.tasks.probes import GLANCES, PROBES
from radapter_serve.tasks.table import TASKS

MODELS = Path(__file__).parents[2] / "model_repository"


def test_every_list_of_tasks_is_the_same() -> None:
    assert tuple(TASKS) == NAMES == ASKED
    assert set(PROBES) == set(GLANCES) == set(TASKS)
    assert {path.parent.name for path in MODELS.glob("*/model.py")} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_probes_fit_the_models(name: str) -> None:
    text = (MODELS / name / "config.template.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    known = {tensor.name: tensor for tensor in config.input}
    for tensors in (PROBES[name], GLANCES[name]):
        for given, array in tensors.items():
            tensor = known[given]
            assert tensor.data_type == model_config_pb2.TYPE_STRING
            assert array.ndim == len(tensor.dims) + (config.max_batch_size > 0)
