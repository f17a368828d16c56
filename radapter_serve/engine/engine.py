"""`Engine`: the tasks of a model repository in this process, asked as a server is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from radapter_client import Reply, Request
from radapter_client._exceptions import RAdapterClientError, from_server
from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.errors import (
    SERVER_STOPPING,
    TIMED_OUT,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.engine.version import LocalVersion
from radapter_serve.engine.waiting import MAX_WAITING, Together
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import TASKS as NAMES
from radapter_serve.release.repository import (
    config_of,
    find_release,
    name_releases,
    split_repository,
)
from radapter_serve.release.served import Served
from radapter_serve.release.tensors import Tensor, tensors_of
from radapter_serve.tasks.outcome import Outcome
from radapter_serve.tasks.retrieve import Embedder
from radapter_serve.tasks.table import TASKS, Inputs, Tensors
from radapter_serve.tasks.version import Version

MAX_SECONDS = 120.0  # of one request, whatever its caller allows
# Batches that one task runs at once: while one is encoded, the next is decoded.
_AT_ONCE = 2


class NotServed(RAdapterError):
    """A model or a release that the engine does not have."""


@dataclass(frozen=True)
class _Given:
    """What a request brings, as the tasks read it."""

    tensors: Tensors
    outputs: Sequence[str]
    cancelled: Cancelled

    def get(self, name: str) -> Any:
        return self.tensors.get(name)

    def wants(self, output: str) -> bool:
        return output in self.outputs


class _Served:
    """A release with its tasks, each made when it is first asked for."""

    def __init__(self, version: Version, config: Callable[[str], Any], max_waiting: int) -> None:
        self.version = version
        self._config = config
        self._max_waiting = max_waiting

    def inputs(self, task: str) -> dict[str, Tensor]:
        return self._inputs[task]

    def rows(self, task: str) -> int:
        """The most rows of a batch; 0 where tensors have no batch dimension."""
        return self._rows[task]

    @cached_property
    def _inputs(self) -> dict[str, dict[str, Tensor]]:
        return {name: tensors_of(self._config(name).input) for name in NAMES}

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: int(self._config(name).max_batch_size) for name in NAMES}

    @cached_property
    def tasks(self) -> dict[str, Together[Inputs, Tensors]]:
        return {name: self._task(name) for name in NAMES}

    def _task(self, name: str) -> Together[Inputs, Tensors]:
        task = TASKS[name]
        lock = threading.Lock()
        made: list[Any] = []

        def run(requests: Sequence[Inputs]) -> list[Outcome[Tensors]]:
            with lock:
                if not made:
                    made.append(task.make(self.version))
            return task.answer(made[0], requests)

        rows = self.rows(name)
        return Together(
            run,
            max_rows=rows or 1,
            # Queries embed their texts with those of others, so they must not wait for each other.
            at_once=self._max_waiting if name == "retrieve" else _AT_ONCE,
            max_waiting=self._max_waiting,
        )


class Engine:
    """Releases of a model repository in this process; a `Transport` of the client.

    Its answers are those of Triton, for both go through the same tasks and the same runtimes.

    Args:
        repository: the model repository; `DIR@N` serves release N alone, else what
            `radapter-release` chose, or the newest export.
        indexes: folder of the indexes that `retrieve` searches.
        device: number of a GPU for ONNX Runtime; None for the CPU.
        threads: that compute a batch; None for one a core.
        max_waiting: requests that wait for a task at most.

    Raises:
        RAdapterError: no such release, a broken one, or one that its runtime can't load.
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        indexes: str | Path = "indexes",
        device: int | None = None,
        threads: int | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        folder = find_release(repository)
        self.repository = folder.parent.parent
        _, number = split_repository(repository)
        numbers = [int(number)] if number else list(Served.load(self.repository).releases)
        self._indexes = Path(indexes)
        self._device = device
        self._threads = threads
        self._max_waiting = max_waiting
        self._closed = False
        self._served = {one: self._load(one) for one in sorted(numbers)}

    def send(self, request: Request, timeout: float) -> Any:
        """The reply to a request of the client's; see `Transport`."""
        try:
            if request.action == "infer":
                return self.infer(
                    request.model,
                    request.version,
                    request.inputs,
                    request.outputs,
                    deadline=time.monotonic() + timeout,
                )
            if request.action == "config":
                config = self.config(request.model, request.version)
                return json_format.MessageToDict(config, preserving_proto_field_name=True)
            if request.action == "ready":
                self._pick(request.model, request.version)
                return True
        except TaskError as error:
            raise from_server(error.status, str(error)) from error
        except NotServed as error:
            raise from_server("NOT_FOUND", str(error)) from error
        except RAdapterError as error:
            raise RAdapterClientError(str(error)) from error
        raise RAdapterClientError(
            "a model in this process keeps no statistics; ask a server for them"
        )

    def infer(
        self,
        model: str,
        version: str,
        inputs: Tensors,
        outputs: Sequence[str] = (),
        *,
        deadline: float | None = None,
        cancelled: Cancelled = lambda: False,
    ) -> Reply:
        """The answer of a task.

        Args:
            model: its name.
            version: number of the release; empty for the newest.
            inputs: by name, with the batch first where the task has one.
            outputs: names of those to give back; none for all.
            deadline: of `time.monotonic`, after which the caller no longer waits.
            cancelled: whether the caller has given up.

        Raises:
            TaskError: why there is no answer.
            NotServed: no such task or release.
        """
        if self._closed:
            raise TaskError(SERVER_STOPPING, "the model is closed")
        number, served = self._pick(model, version)
        rows = _check(model, inputs, served.inputs(model), served.rows(model))
        end = time.monotonic() + MAX_SECONDS
        until = end if deadline is None else min(end, deadline)

        def given_up() -> bool:
            if time.monotonic() > until:
                raise TaskError(TIMED_OUT, "no answer within the time-out")
            return cancelled()

        outcome = served.tasks[model](_Given(inputs, outputs, given_up), rows, until)
        found = outcome.unwrap()
        return Reply(
            number,
            {
                name: _on_the_wire(array)
                for name, array in found.items()
                if not outputs or name in outputs
            },
        )

    def config(self, model: str, version: str = "") -> Any:
        """A task's `ModelConfig`, which names the releases that are served.

        Raises:
            NotServed: no such task or release.
        """
        number, _ = self._pick(model, version)
        config = config_of(self.repository, model, number)
        name_releases(config, {one: kept.version.release for one, kept in self._served.items()})
        config.version_policy.specific.versions[:] = sorted(self._served)
        return config

    def versions(self) -> list[int]:
        """The releases that are served, the newest last."""
        return sorted(self._served)

    def warm_up(self) -> None:
        """Ask every task once, so that no caller's first request has to wait.

        Raises:
            RAdapterError: one fails.
        """
        for number in self._served:
            for name, task in TASKS.items():
                try:
                    self.infer(name, str(number), task.probe)
                except TaskError as error:
                    if error.status != "INVALID_ARGUMENT":  # a refusal comes from a task that works
                        raise

    def close(self) -> None:
        """Let go of the releases; what is asked after that is refused."""
        self._closed = True
        for served in self._served.values():
            served.version.close()
        self._served = {}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, number: int) -> _Served:
        version = LocalVersion(
            self.repository,
            number,
            self._indexes,
            self._query,
            lambda: self._others(number),
            device=self._device,
            threads=self._threads,
        )
        version.load()
        return _Served(
            version,
            lambda model: config_of(self.repository, model, number),
            self._max_waiting,
        )

    def _pick(self, model: str, version: str) -> tuple[int, _Served]:
        if model not in TASKS:
            raise NotServed(f"there is no task {model!r:.80}; there are {', '.join(TASKS)}")
        known = ", ".join(map(str, self._served))
        if not version and self._served:
            number = max(self._served)
            return number, self._served[number]
        if not version.isdecimal() or int(version) not in self._served:
            raise NotServed(f"no release {version[:20]} of {model} here; there are {known}")
        return int(version), self._served[int(version)]

    def _query(
        self, number: int, kind: str, value: bytes, alpha: Alpha | None
    ) -> NDArray[np.float32]:
        """A text or an encoded image -> float32 [D], together with what others ask for."""
        inputs: dict[str, NDArray[Any]] = {kind: np.array([[value]], object)}
        if alpha is not None:
            inputs["alpha"] = alpha
        reply = self.infer(f"embed_{kind}", str(number), inputs)
        return np.asarray(reply.outputs[f"{kind}_embeds"], np.float32).ravel()

    def _others(self, number: int) -> Iterator[Embedder]:
        for one, served in self._served.items():
            if one != number:
                yield served.version.embedder()


def _check(
    model: str, given: Mapping[str, NDArray[Any]], known: Mapping[str, Tensor], max_rows: int
) -> int:
    """The rows of a request whose inputs have the names, types and shapes of the model's.

    Raises:
        TaskError: the first that has not.
    """
    batches = set()
    for name, array in given.items():
        if name not in known:
            raise invalid(f"{model} has no input {name!r:.80}; it has {', '.join(known)}")
        tensor = known[name]
        datatype = np_to_triton_dtype(array.dtype)
        if datatype != tensor.datatype:
            raise invalid(f"{name} is {datatype or array.dtype}; {tensor.datatype} is taken")
        shape = array.shape[1:] if max_rows else array.shape
        fits = len(shape) == len(tensor.dims) and all(
            wanted in (-1, size) for wanted, size in zip(tensor.dims, shape, strict=True)
        )
        if not fits or not array.size:
            batch = [-1] if max_rows else []
            raise invalid(
                f"{name} has shape {list(array.shape)}; {[*batch, *tensor.dims]} is taken, where"
                " -1 is any number from 1"
            )
        batches.add(len(array))
    if not max_rows:
        return 1
    if len(batches) > 1:
        raise invalid(f"all inputs of a request have as many rows; these have {sorted(batches)}")
    rows = batches.pop() if batches else 1
    if rows > max_rows:
        raise invalid(f"{rows} rows in a request; at most {max_rows} are taken")
    return rows


def _on_the_wire(array: NDArray[Any]) -> NDArray[Any]:
    """An output as a server sends it: texts are bytes in UTF-8."""
    if array.dtype != object:
        return array
    flat = [value.encode() if isinstance(value, str) else bytes(value) for value in array.ravel()]
    texts = np.empty(array.size, object)
    texts[:] = flat
    return texts.reshape(array.shape)
