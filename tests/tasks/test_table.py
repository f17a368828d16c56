"""The table of tasks against the models' own configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

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
def test_probes_fit_the_tasks(name: str) -> None:
    for tensors in (PROBES[name], GLANCES[name]):
        for given, array in tensors.items():
            tensor = TASKS[name].inputs[given]
            assert tensor.datatype == "BYTES"
            assert array.ndim == len(tensor.dims) + TASKS[name].batched
