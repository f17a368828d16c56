"""`Engine`: the tasks of releases in this process, asked as a server is asked."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import np_to_triton_dtype

from radapter_client import Reply, Request
from radapter_client._exceptions import RAdapterClientError, from_server
from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.errors import (
    OVERLOADED,
    SERVER_STOPPING,
    TIMED_OUT,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.engine.steps import step
from radapter_serve.engine.version import InProcess, LocalVersion
from radapter_serve.engine.waiting import MAX_WAITING, Together
from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import check
from radapter_serve.release.release import TASKS as NAMES
from radapter_serve.release.repository import find_release, name_releases, split_repository
from radapter_serve.release.served import Served
from radapter_serve.release.tensors import Tensor, tensors_of
from radapter_serve.tasks.outcome import Outcome
from radapter_serve.tasks.probes import PROBES, Tensors
from radapter_serve.tasks.retrieve import Embedder
from radapter_serve.tasks.table import TASKS


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

    def __init__(self, version: InProcess, max_waiting: int) -> None:
        self.version = version
        self.number = version.release.version
        self.configs = {name: version.config(name) for name in NAMES}
        self.inputs = {name: tensors_of(config.input) for name, config in self.configs.items()}
        # The most rows of a batch; 0 where tensors have no batch dimension.
        self.rows = {name: int(config.max_batch_size) for name, config in self.configs.items()}
        self.tasks: dict[str, Together[Any, Tensors]] = {}
        # Requests with large images wait for each other and for nobody else.
        self.large: dict[str, Together[Any, Tensors]] = {}
        for name in NAMES:
            run = self._runner(name)
            self.tasks[name] = Together(
                run,
                max_rows=self.rows[name] or 1,
                # Queries embed their texts with those of others, so they must not wait for each
                # other.
                at_once=max_waiting if name == "retrieve" else 1,
                max_waiting=max_waiting,
            )
            self.large[name] = Together(
                run,
                # Each in its own thread, so that they have turns with each image; but a segmented
                # one is in memory for longer.
                at_once=1 if name == "segment" else max_waiting,
                max_waiting=max_waiting,
            )

    def _runner(self, name: str) -> Callable[[Sequence[Any]], list[Outcome[Tensors]]]:
        task = TASKS[name]
        lock = threading.Lock()
        made: list[Any] = []

        def run(requests: Sequence[Any]) -> list[Outcome[Tensors]]:
            with lock:
                if not made:
                    made.append(task.make(self.version))
            with step(name):
                return task.run(made[0], requests)

        return run


@dataclass(frozen=True)
class Prepared:
    """What an engine serves, or is to; replaced as a whole, so that a request sees one of two
    states.

    Attributes:
        served: the releases by number.
        kept: older ones, which embed the queries for the indexes that they made.
    """

    served: Mapping[int, _Served]
    kept: Mapping[int, _Served] = field(default_factory=dict)


class Engine:
    """Releases in this process; a `Transport` of the client.

    Its answers are those of Triton, for both go through the same tasks and the same runtimes.

    Args:
        versions: the releases.
        max_waiting: requests that wait for a task at most; a quarter as many with large images,
            which take turns, are under way at most.
        max_seconds: of one request, whatever its caller allows.
    """

    def __init__(
        self,
        versions: Sequence[InProcess],
        *,
        max_waiting: int = MAX_WAITING,
        max_seconds: float = math.inf,
    ) -> None:
        self._closed = False
        self._max_seconds = max_seconds
        self._max_waiting = max_waiting
        # So many are under way at most, so that others find a place.
        self._large = threading.Semaphore(max(1, max_waiting // 4))
        self._state = Prepared({one.release.version: self._join(one) for one in versions})

    @classmethod
    def open(
        cls,
        repository: str | Path,
        *,
        indexes: str | Path = "indexes",
        device: int | None = None,
        threads: int | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> Engine:
        """The releases of a model repository.

        Args:
            repository: the model repository; `DIR@N` serves release N alone, else what
                `radapter-release` chose, or the newest export.
            indexes: folder of the indexes that `retrieve` searches.
            device: number of a GPU for ONNX Runtime; None for the CPU.
            threads: that compute a batch; None for one a core.
            max_waiting: requests that wait for a task at most.

        Raises:
            RAdapterError: no such release, one whose files are not those of its export, or one that
                its runtime can't load.
        """
        folder = find_release(repository).parent.parent
        _, number = split_repository(repository)
        numbers = [int(number)] if number else list(Served.load(folder).releases)
        check(folder, numbers)
        versions = [
            LocalVersion(folder, one, Path(indexes), device=device, threads=threads)
            for one in numbers
        ]
        return cls(versions, max_waiting=max_waiting)

    def prepare(self, versions: Sequence[InProcess], kept: Sequence[InProcess] = ()) -> Prepared:
        """Make other releases ready to be served, next to those that are.

        Each new release has then answered a question to each of its tasks.

        Args:
            versions: that are to be served; those of before may be among them.
            kept: older ones, for the indexes that they made.

        Raises:
            TaskError: a task fails.
        """
        known = {**self._state.kept, **self._state.served}
        ready: dict[int, _Served] = {}
        for version in (*versions, *kept):
            before = known.get(version.release.version)
            if before is not None and before.version is version:
                ready[before.number] = before
                continue
            joined = self._join(version)
            self._probe(joined)
            ready[joined.number] = joined
        return Prepared(
            {one.release.version: ready[one.release.version] for one in versions},
            {one.release.version: ready[one.release.version] for one in kept},
        )

    def commit(self, prepared: Prepared) -> None:
        """Serve what was made ready, from one request to the next; what is under way ends as it
        began.
        """
        self._state = prepared

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
            self._pick(self._state, request.model, request.version)
            return True  # it is ready
        except TaskError as error:
            raise from_server(error.status, str(error)) from error
        except NotServed as error:
            raise from_server("NOT_FOUND", str(error)) from error
        except RAdapterError as error:
            raise RAdapterClientError(str(error)) from error

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
        with step("engine"):
            served = self._pick(self._state, model, version)
            return self._answer(served, model, inputs, outputs, deadline, cancelled)

    def config(self, model: str, version: str = "") -> Any:
        """A task's `ModelConfig`, which names the releases that are served.

        Raises:
            NotServed: no such task or release.
        """
        present = self._state
        releases = {number: one.version.release for number, one in present.served.items()}
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(self._pick(present, model, version).configs[model])
        name_releases(config, releases)
        config.version_policy.specific.versions[:] = sorted(releases)
        return config

    def outdated_indexes(self) -> dict[str, bool]:
        """Whether another release than the newest that is served made the indexes, by the names of
        these.
        """
        from radapter_serve.index.index import outdated  # here: its libraries take a while

        served = self._state.served
        if not served:
            return {}
        newest = served[max(served)].version
        return outdated(newest.indexes, newest.release)

    def versions(self) -> list[int]:
        """The releases that are served, the newest last."""
        return sorted(self._state.served)

    def close(self) -> None:
        """Let go of the releases; what is asked after that is refused."""
        self._closed = True
        state = self._state
        self._state = Prepared({})
        for one in (*state.served.values(), *state.kept.values()):
            one.version.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _join(self, version: InProcess) -> _Served:
        served = _Served(version, self._max_waiting)
        version.join(partial(self._query, served), partial(self._others, served.number))
        return served

    def _pick(self, present: Prepared, model: str, version: str) -> _Served:
        if self._closed:
            raise TaskError(SERVER_STOPPING, "the model is closed")
        if model not in TASKS:
            raise NotServed(f"there is no task {model!r:.80}; there are {', '.join(TASKS)}")
        served = present.served
        number = int(version) if version.isdecimal() else 0
        if not version:
            number = max(served, default=0)
        if number not in served:
            known = ", ".join(map(str, served))
            raise NotServed(f"no release {version[:20]} of {model} here; there are {known}")
        return served[number]

    def _answer(
        self,
        served: _Served,
        model: str,
        inputs: Tensors,
        outputs: Sequence[str] = (),
        deadline: float | None = None,
        cancelled: Cancelled = lambda: False,
    ) -> Reply:
        rows = _check(model, inputs, served.inputs[model], served.rows[model])
        end = time.monotonic() + self._max_seconds
        until = end if deadline is None else min(end, deadline)

        def given_up() -> bool:
            if time.monotonic() > until:
                raise TaskError(TIMED_OUT, "no answer within the time-out")
            return cancelled()

        task = TASKS[model]
        request = Outcome.of(partial(task.read, _Given(inputs, outputs, given_up))).unwrap()
        if not task.is_large(request):
            outcome = served.tasks[model](request, rows, until)
        elif not self._large.acquire(blocking=False):
            raise TaskError(OVERLOADED, "too many requests with large images; ask again later")
        else:
            try:
                outcome = served.large[model](request, rows, until)
            finally:
                self._large.release()
        wanted = {
            name: _on_the_wire(array)
            for name, array in outcome.unwrap().items()
            if not outputs or name in outputs
        }
        return Reply(served.number, wanted)

    def _probe(self, served: _Served) -> None:
        for name, inputs in PROBES.items():
            try:
                self._answer(served, name, inputs)
            except TaskError as error:
                if error.status != "INVALID_ARGUMENT":  # a refusal comes from a task that works
                    raise

    def _query(
        self,
        served: _Served,
        kind: str,
        value: bytes,
        alpha: Alpha | None,
        cancelled: Cancelled | None,
    ) -> NDArray[np.float32]:
        """A text or an encoded image -> float32 [D], together with what others ask for."""
        inputs: dict[str, NDArray[Any]] = {kind: np.array([[value]], object)}
        if alpha is not None:
            inputs["alpha"] = alpha
        asks = (lambda: False) if cancelled is None else cancelled
        reply = self._answer(served, f"embed_{kind}", inputs, cancelled=asks)
        return np.asarray(reply.outputs[f"{kind}_embeds"], np.float32).ravel()

    def _others(self, number: int) -> Iterator[Embedder]:
        state = self._state
        for one in (*state.served.values(), *state.kept.values()):
            if one.number != number:
                yield one.version.embedder()


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
