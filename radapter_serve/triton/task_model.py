"""A task as a `TritonPythonModel` of Triton; importable only inside one of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from radapter_serve.tasks.table import TASKS
from radapter_serve.triton import surplus
from radapter_serve.triton.responses import answer
from radapter_serve.triton.version import TritonVersion


class TaskModel:
    """One of the tasks of `radapter_serve.tasks.table`, for all requests that wait together.

    Attributes:
        task: its name.
        version: the release, from `initialize` on.
    """

    task: str
    version: TritonVersion

    def initialize(self, args: dict[str, str]) -> None:
        surplus.of_this_process.heed(self.task)
        task = TASKS[self.task]
        self.version = TritonVersion(args)
        self._answer = partial(task.answer, task.make(self.version))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, self._answer)
