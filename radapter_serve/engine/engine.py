"""`Engine`: the tasks of releases in this process, with the interface of a server; and `Queue`,
which encodes the rows of concurrent callers together.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from radapter_client import Reply, Request, Values
from radapter_client.failures import RAdapterClientError, from_server
from radapter_serve.contract.errors import (
    INTERNAL_ERROR,
    OVERLOADED,
    SERVER_STOPPING,
    UNKNOWN_MODEL,
    Cancelled,
    TaskError,
    check_cancelled,
    until_deadline,
)
from radapter_serve.contract.images import LARGE, FifoLimit
from radapter_serve.encoders.batcher import Result, encode_together, run_together
from radapter_serve.encoders.encoder import Span, add_spans, collect_spans, span
from radapter_serve.encoders.loaded import LoadedRelease, Need, Part, load_release
from radapter_serve.encoders.precision import AS_EXPORTED, choose
from radapter_serve.errors import RAdapterError
from radapter_serve.index.facts import OPENING_SECONDS, index_names
from radapter_serve.process import total
from radapter_serve.release.integrity import verify
from radapter_serve.release.release import Release, release_parameters
from radapter_serve.release.repository import Served, find_release, split_repository
from radapter_serve.tasks.table import PROBES, TASKS, Run, Tensors, embeds_label_set, forms

SEGMENTED = 2  # images at once; each may take half a gigabyte for cosines
TEXTS = 256  # texts of a batch, unless one caller has more
MAX_WAITING = 128  # waiting callers of one encoder
POLL_SECONDS = 0.2  # between checks whether a waiting caller has given up


@dataclass(eq=False)
class _Caller:
    """A caller in the queue."""

    needs: Sequence[Need]
    # Set once there are results, or a batch that this caller is to encode.
    wake: threading.Event = field(default_factory=threading.Event)
    batch: list[_Caller] = field(default_factory=list)  # callers to encode for, itself included
    results: Sequence[Result] | None = None
    spans: list[Span] = field(default_factory=list)  # of the batch that had its needs


class Queue:
    """Batches concurrent calls: a caller that finds the encoder idle encodes at once; of those that
    wait, the first encodes for all, up to `max_rows` rows, in its own thread.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Need]], Sequence[Result]],
        *,
        max_rows: int,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._encode = encode
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._waiting: deque[_Caller] = deque()
        self._is_busy = False

    def __call__(self, needs: Sequence[Need]) -> Sequence[Result]:
        """The results of one caller; raises `TaskError` if it gave up, or too many callers wait."""
        caller = _Caller(needs)
        with self._lock:
            if not self._is_busy:
                self._is_busy = True
                caller.batch = [caller]
            elif len(self._waiting) < self._max_waiting:
                self._waiting.append(caller)
            else:
                raise TaskError(OVERLOADED, "too many requests wait; ask again later")
        try:
            # Wait for results, or for a batch to encode.
            while not caller.batch and not caller.wake.wait(POLL_SECONDS):
                check_cancelled(needs[0].cancelled)
        finally:
            with self._lock:
                if caller in self._waiting:
                    self._waiting.remove(caller)
            # Even if this thread is interrupted: the callers of its batch wait.
            if caller.batch:
                self._lead(caller.batch)
        add_spans(caller.spans)
        if caller.results is None:
            raise TaskError(INTERNAL_ERROR, "the batch of this request was given up")
        return caller.results

    def _lead(self, batch: list[_Caller]) -> None:
        """Encode a batch, and hand the next one to the first waiting caller."""
        needs = [need for caller in batch for need in caller.needs]
        try:
            with collect_spans() as spans:
                results = list(self._encode(needs))
            for caller in batch:
                caller.spans = spans
                caller.results = results[: len(caller.needs)]
                results = results[len(caller.needs) :]
        finally:
            with self._lock:
                # Form the next batch from the waiting callers.
                following: list[_Caller] = []
                rows = 0
                while self._waiting:
                    rows += sum(len(need.rows) for need in self._waiting[0].needs)
                    if following and rows > self._max_rows:
                        break
                    following.append(self._waiting.popleft())
                self._is_busy = bool(following)
                if following:
                    following[0].batch = following
                    following[0].wake.set()
            for caller in batch:
                caller.wake.set()
            batch.clear()  # its first caller holds it: a circle would keep rows and their release


class ServedRelease:
    """A release with the queues of its encoder and its tasks; `served` returns all releases.

    The release is closed with the last reference to this object, which the engine and the running
    requests have.
    """

    def __init__(
        self,
        loaded: LoadedRelease,
        served: Callable[[], Sequence[LoadedRelease]],
        max_waiting: int,
    ) -> None:
        self.loaded = loaded
        rows = loaded.release.max_batch_size
        self.queues = {
            part: Queue(encode_together, max_rows=size, max_waiting=max_waiting)
            for part, size in (("images", rows), ("patches", rows), ("tokens", TEXTS))
        }
        self.segmentations = FifoLimit(SEGMENTED, max_waiting, "requests to segment")
        # Each may be a minute of work, which is cached for those that wait.
        self.label_sets = FifoLimit(1, max_waiting, "requests with label sets at another alpha")
        self._served = served
        # A lock a task: while `retrieve` imports its libraries, others are answered.
        self._locks = {name: threading.Lock() for name in TASKS}
        self._runs: dict[str, Run[Any, Any]] = {}
        weakref.finalize(self, loaded.close).atexit = False

    def run(self, name: str, seconds: float = 0.0) -> Run[Any, Any]:
        """Return a task, which is made at its first use and may wait some seconds for indexes."""
        loaded = self.loaded
        served = self._served
        with self._locks[name]:
            if name not in self._runs:
                # A task that refers to `self` would keep the release open.
                self._runs[name] = TASKS[name].make(
                    loaded, lambda: [other for other in served() if other is not loaded], seconds
                )
            return self._runs[name]


class Engine:
    """Runs releases in this process, in the callers' threads; a `Transport` of the client."""

    def __init__(
        self, releases: Sequence[LoadedRelease], *, max_waiting: int = MAX_WAITING
    ) -> None:
        self._closed = False
        self._max_waiting = max_waiting
        # Large images take at most a quarter of the waiting places.
        self.large_images = FifoLimit(1, max(1, max_waiting // 4), LARGE)
        # Replaced as a whole, so that a request sees either the old or the new releases.
        self._served: Mapping[int, ServedRelease] = {
            loaded.release.version: self._ready(loaded) for loaded in releases
        }

    @classmethod
    def open(
        cls,
        repository: str | Path,
        *,
        indexes: str | Path = "indexes",
        device: int | None = None,
        threads: int | None = None,
        precision: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Engine:
        """Open release N of `DIR@N`, or the releases that a server would serve; `say` is called
        with what `precision` AUTO takes.
        """
        folder = find_release(repository).parent.parent
        _, number = split_repository(repository)
        numbers = [int(number)] if number else list(Served.load(folder).releases)
        for version in numbers:
            verify(folder, version)
        choice = AS_EXPORTED
        if precision is not None:
            cores = total() if threads is None else threads
            on_gpu = device is not None
            choice = choose(folder, numbers, None, precision, cores, on_gpu=on_gpu)
            if choice.note:
                say(choice.note)
        releases = [
            load_release(
                folder,
                version,
                indexes=Path(indexes),
                device=device,
                threads=threads,
                choice=choice,
            )
            for version in numbers
        ]
        return cls(releases)

    def prepare(self, releases: Sequence[LoadedRelease]) -> Mapping[int, ServedRelease]:
        """Prepare releases next to the served ones, and probe each task of those that are new."""
        prepared: dict[int, ServedRelease] = {}
        known = {served.loaded: served for served in self._served.values()}
        for loaded in releases:
            prepared[loaded.release.version] = served = known.get(loaded) or self._ready(loaded)
            for name, inputs in PROBES.items() if loaded not in known else ():
                try:
                    served.run(name, OPENING_SECONDS)
                    self._answer(served, name, inputs)
                except TaskError as error:
                    # A refusal shows that the task works.
                    if error.status != "INVALID_ARGUMENT":
                        raise
        return prepared

    def commit(self, prepared: Mapping[int, ServedRelease]) -> None:
        """Serve prepared releases from the next request on; a replaced one is closed after the
        requests that run on it.
        """
        self._served = prepared

    def send(self, request: Request, timeout: float) -> Any:
        """Answer a request of the client; see `Transport`."""
        model = request.model
        version = request.version
        try:
            if request.action == "infer":
                deadline = time.monotonic() + timeout
                return self.infer(
                    model, version, request.inputs, request.outputs, deadline=deadline
                )
            if request.action == "config":
                named = release_parameters(self.releases(model, version))
                return {
                    "parameters": {key: {"string_value": value} for key, value in named.items()}
                }
            if request.action == "indexes":
                return {"indexes": self.indexes()}
            self._pick(model, version)
            return True  # it is ready
        except TaskError as error:
            raise from_server(error.status, str(error)) from error
        except RAdapterError as error:
            raise RAdapterClientError(str(error)) from error

    def infer(
        self,
        model: str,
        version: str,
        inputs: Tensors,
        outputs: Sequence[str] = (),
        *,
        deadline: float = math.inf,
        cancelled: Cancelled = lambda: False,
    ) -> Reply:
        """Run a task of a release, the newest if `version` is empty, and return the named outputs,
        or all; `deadline` is in seconds of `time.monotonic`.
        """
        with span("engine"):
            served = self._pick(model, version)
            return self._answer(served, model, inputs, outputs, deadline, cancelled)

    def encode(
        self, encoder: str, version: str, inputs: Tensors, *, cancelled: Cancelled = lambda: False
    ) -> NDArray[Any]:
        """Encode rows of an encoder of a release at one α, in its queue with those of callers."""
        served = self._pick("classify", version)
        part: Part = "images" if encoder == "image_encoder" else "patches"
        rows: Any = inputs.get("image")
        if rows is None:
            part = "tokens"
            rows = inputs["tokens"].tolist()
        alpha = float(inputs["alpha"][0, 0]) if "alpha" in inputs else None
        [result] = self._encode(served, [Need(served.loaded, part, rows, alpha, cancelled)])
        if isinstance(result, TaskError):
            raise result
        return result

    def releases(self, model: str, version: str = "") -> list[Release]:
        """The served releases, the newest last; refuses an unknown task or release."""
        self._pick(model, version)
        served = self._served
        return [served[number].loaded.release for number in sorted(served)]

    def indexes(self) -> list[str]:
        """Names of the indexes that `retrieve` searches."""
        served = self._served
        return index_names(served[max(served)].loaded.indexes) if served else []

    def versions(self) -> list[int]:
        """Numbers of the served releases, the newest last."""
        return sorted(self._served)

    def close(self) -> None:
        """Close the releases; later requests are refused."""
        self._closed = True
        releases = self._releases()
        self._served = {}
        for loaded in releases:
            loaded.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self, loaded: LoadedRelease) -> ServedRelease:
        loaded.large_images = self.large_images
        return ServedRelease(loaded, self._releases, self._max_waiting)

    def _releases(self) -> list[LoadedRelease]:
        return [served.loaded for served in self._served.values()]

    def _pick(self, model: str, version: str) -> ServedRelease:
        if self._closed:
            raise TaskError(SERVER_STOPPING, "the model is closed")
        if model not in TASKS:
            why = f"there is no task {model!r:.80}; there are {', '.join(TASKS)}"
            raise TaskError(UNKNOWN_MODEL, why)
        served = self._served
        number = int(version) if version.isdecimal() else 0
        if not version:
            number = max(served, default=0)
        if number not in served:
            known = ", ".join(map(str, served))
            why = f"no release {version[:20]} of {model} here; there are {known}"
            raise TaskError(UNKNOWN_MODEL, why)
        return served[number]

    def _answer(
        self,
        served: ServedRelease,
        model: str,
        inputs: Tensors,
        asked: Sequence[str] = (),
        deadline: float = math.inf,
        cancelled: Cancelled = lambda: False,
    ) -> Reply:
        task = TASKS[model]

        cancelled = until_deadline(cancelled, deadline, "no answer within the time-out")

        def wants(name: str) -> bool:
            return not asked or name in asked

        # Typed requests, from a caller in this process or from tensors.
        if isinstance(inputs, Values):
            requests = [task.request(dict(inputs.plain), wants)]
        else:
            task.check(model, forms(inputs), served.loaded.release.max_batch_size)
            requests = task.read(served.loaded, inputs, wants)

        # Run them in this thread.
        with contextlib.ExitStack() as stack:
            if embeds_label_set(served.loaded, requests):
                stack.enter_context(served.label_sets(cancelled))
            if model == "segment":
                stack.enter_context(served.segmentations(cancelled))
            stack.enter_context(span(model))
            run = served.run(model)
            encode = partial(self._encode, served)
            answers = run_together([run(request, cancelled) for request in requests], encode)

        # Convert the answers to outputs, which become tensors only in a server.
        answered = []
        for answer in answers:
            if isinstance(answer, TaskError):
                try:
                    raise answer
                finally:
                    # An error holds this frame, which must not hold the error and the release.
                    del answer, answers
            answered.append(answer)
        version = served.loaded.release.version
        values = task.values(version, answered).plain
        return Reply(version, Values({name: values[name] for name in values if wants(name)}))

    def _encode(self, asked: ServedRelease, needs: Sequence[Need]) -> Sequence[Result]:
        """Encode needs of one release in its queue; images are decoded without a queue."""
        first = needs[0]
        if first.part == "pixels":
            return encode_together(needs)
        for served in (asked, *self._served.values()):
            if served.loaded is first.loaded:
                return served.queues[first.part](needs)
        return encode_together(needs)  # of another release that is no longer served
