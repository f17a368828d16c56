"""What callers are told of a model: its inputs, its outputs and its releases."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from radapter_serve.contract.errors import redact
from radapter_serve.gateway.errors import NOT_FOUND, Refused
from radapter_serve.index.facts import index_names
from radapter_serve.release.tensors import Tensor
from radapter_serve.tasks.table import TASKS, outputs_of

_PATH = re.compile(r"((?:[\w-]+:)?)([/~].*|(?<=local-dir:).*)", re.DOTALL)
_OF_USERS = ("templates",)  # texts, in which a slash is no path


@dataclass(frozen=True)
class Model:
    """A task model.

    Args:
        max_batch_size: rows of a request at most; 0 where its tensors have no batch dimension.
        releases: the facts of its releases, as JSON, by the names of their parameters.
    """

    name: str
    max_batch_size: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    releases: dict[str, str]

    @classmethod
    def of(cls, task: str, releases: Mapping[str, str]) -> Model:
        """A task with some releases.

        Args:
            task: its name.
            releases: their facts, as JSON, by the names of their parameters; one is `release`, the
                newest.
        """
        public = {name: _public(facts) for name, facts in releases.items()}
        newest = json.loads(releases.get("release", "{}"))
        rows = int(newest.get("max_batch_size", 64)) if TASKS[task].batched else 0
        outputs = outputs_of(task, int(newest.get("embed_dim", -1)))
        return cls(task, rows, dict(TASKS[task].inputs), outputs, public)

    def config(self) -> dict[str, Any]:
        """The answer to `/config`, in the form of Triton's."""
        return {
            "name": self.name,
            "max_batch_size": self.max_batch_size,
            "input": [
                {**_described(one), "optional": one.optional} for one in self.inputs.values()
            ],
            "output": [_described(one) for one in self.outputs.values()],
            "parameters": {key: {"string_value": value} for key, value in self.releases.items()},
        }

    def metadata(self, versions: list[str]) -> dict[str, Any]:
        """The answer to `/v2/models/MODEL`, in the form of KServe's."""
        batch = [-1] if self.max_batch_size else []
        inputs, outputs = (
            [
                {"name": one.name, "datatype": one.datatype, "shape": [*batch, *one.dims]}
                for one in tensors.values()
            ]
            for tensors in (self.inputs, self.outputs)
        )
        return {
            "name": self.name,
            "versions": versions,
            "platform": "python",
            "inputs": inputs,
            "outputs": outputs,
        }


def _public(facts: str) -> str:
    """The facts of a release, as JSON, with no path of the machine that made it: of a file or
    folder, only its name.
    """

    def without_paths(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: value if key in _OF_USERS else without_paths(value)
                for key, value in value.items()
            }
        if isinstance(value, list):
            return [without_paths(one) for one in value]
        if not isinstance(value, str):
            return value
        path = _PATH.fullmatch(value)
        return redact(value) if path is None else path[1] + PurePosixPath(path[2]).name

    return json.dumps(without_paths(json.loads(facts)))


def _described(tensor: Tensor) -> dict[str, Any]:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.dims)}


def list_indexes(folder: Path | None) -> dict[str, list[str]]:
    """The names of the indexes in the folder that `retrieve` searches; None where nobody said it.

    Raises:
        Refused: it is not known.
    """
    if folder is None:
        raise Refused(
            404,
            NOT_FOUND,
            "the indexes are not listed here: radapter-gateway --indexes DIR does it",
        )
    return {"indexes": index_names(folder)}
