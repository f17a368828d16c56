"""A task as Triton's `TritonPythonModel`, which calls the encoders of the same server. Importable
only inside Triton's processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from numpy.typing import NDArray

from radapter_client.failures import read_failure
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    OVERLOADED,
    RETRYABLE,
    Alpha,
    Cancelled,
    TaskError,
    redact,
    task_error,
)
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.batcher import run_together
from radapter_serve.encoders.encoder import GraphEncoder
from radapter_serve.encoders.labels import load_label_sets
from radapter_serve.encoders.loaded import LoadedRelease, TaskSteps
from radapter_serve.index.facts import OPENING_SECONDS
from radapter_serve.process import INDEXES
from radapter_serve.release.release import FILE, Release
from radapter_serve.release.repository import CONFIG, ENCODERS
from radapter_serve.tasks.table import TASKS, embeds_label_set, forms
from radapter_serve.triton import backlog
from radapter_serve.triton.responses import answer, cancelled_by, trace_of_request

_TOO_MANY_LABEL_SETS = TaskError(
    OVERLOADED, "too many requests with label sets at another alpha; ask again later"
)


class TritonPythonModel:
    """Runs the task that its folder is named after; all waiting requests are encoded together."""

    task: str
    loaded: LoadedRelease

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"])
        self.task = folder.name
        backlog.of_this_process.open(self.task)
        # The release as the server computes it, which the config says.
        version = args["model_version"]
        text = json.loads(args["model_config"])["parameters"][f"release.{version}"]["string_value"]
        self.loaded = load_version(folder / version, Release.from_dict(json.loads(text)))
        others: dict[int, LoadedRelease] = {}

        def other_releases() -> list[LoadedRelease]:
            """The other served releases: one of them may have built an index."""
            # Imported here: gRPC with it takes 7 MB, which each task's process would have.
            from radapter_serve.release.config import named_releases, read_config

            task = folder.parent / "embed_text"
            config = read_config(task / CONFIG)
            named = named_releases(config)
            served = config.version_policy.specific.versions
            for number in served:
                if number != self.loaded.release.version and number not in others:
                    others[number] = load_version(task / str(number), named[number])
            return [others[number] for number in served if number in others]

        self._run = TASKS[self.task].make(self.loaded, other_releases, OPENING_SECONDS)
        # Loading a tokenizer takes 13 MB more than it keeps. Give them back: a server has a process
        # for each task, release and instance.
        with contextlib.suppress(AttributeError, OSError):  # only glibc has this
            ctypes.CDLL(None).malloc_trim(0)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, self._answers)

    def _answers(self, requests: Sequence[Any]) -> list[Mapping[str, NDArray[Any]] | TaskError]:
        """The output tensors or the error of each request."""
        task = TASKS[self.task]

        # From tensors to typed requests; one request may become several.
        # A request that embeds a label set, which may be a minute of work, runs alone, and in
        # one process at a time: the others stay for everybody else.
        together: list[tuple[list[Any], TaskSteps[Any]]] = []  # each with the place of its answer
        alone: list[tuple[list[Any], list[Any], Cancelled]] = []
        parts: list[list[Any]] = [[] for _ in requests]  # answers and errors of each request
        for request, place in zip(requests, parts, strict=True):
            names = request.requested_output_names()
            try:
                tensors = (pb.get_input_tensor_by_name(request, name) for name in task.inputs)
                inputs = {
                    tensor.name(): tensor.as_numpy() for tensor in tensors if tensor is not None
                }
                task.check(self.task, forms(inputs), self.loaded.release.max_batch_size)
                typed = task.read(self.loaded, inputs, names.__contains__)
                runs_alone = embeds_label_set(self.loaded, typed)
            except Exception as error:
                place.append(task_error(error))
                continue
            cancelled = cancelled_by(request)
            if runs_alone:
                alone.append((place, typed, cancelled))
            else:
                together += [(place, self._run(row, cancelled)) for row in typed]

        # Run them, and convert their answers to tensors.
        answers = run_together([row for _, row in together])
        for (place, _), part in zip(together, answers, strict=True):
            place.append(part)
        for place, typed, cancelled in alone:
            with backlog.of_this_process.turn() as has_turn:
                if has_turn or not embeds_label_set(self.loaded, typed):
                    place += run_together([self._run(row, cancelled) for row in typed])
                else:
                    place.append(_TOO_MANY_LABEL_SETS)
        results: list[Mapping[str, NDArray[Any]] | TaskError] = []
        for place in parts:
            failed = next((part for part in place if isinstance(part, TaskError)), None)
            try:
                results.append(failed or task.values(self.loaded.release.version, place))
            except Exception as error:
                results.append(task_error(error))
        return results


def load_version(folder: Path, release: Release) -> LoadedRelease:
    """Load the release of a task model's version, with the encoders of the same server."""
    # The server's folder has links to the files of the model repository.
    repository = (folder / FILE).resolve().parents[2]
    # Only tasks that embed labels or texts have a tokenizer.
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        tokenizer = repository / "embed_text" / folder.name / tokenizer.name
    return LoadedRelease(
        release,
        GraphEncoder({name: partial(_encode, name, release.version) for name in ENCODERS}),
        Tokenizer.load(tokenizer, release.tokenizer),
        read_label_sets=lambda loaded: load_label_sets(folder / "label_sets"),
        indexes=Path(os.environ.get(INDEXES, "indexes")),
        origin={"model_repository": f"{repository}@{release.version}"},
        adapters=repository,
        maps_adapters=True,  # the processes of all tasks share the memory
    )


def _encode(
    model: str, version: int, rows: NDArray[Any], alpha: Alpha | None = None
) -> NDArray[np.float32]:
    """Call an encoder of the same server."""
    inputs = [pb.Tensor("tokens" if model == "text_encoder" else "image", rows)]
    if alpha is not None:
        inputs.append(pb.Tensor("alpha", alpha))
    output = model.replace("_encoder", "_embeds")
    response = pb.InferenceRequest(
        model_name=model,
        model_version=version,
        inputs=inputs,
        requested_output_names=[output],
        preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
        **trace_of_request(),
    ).exec()
    if not response.has_error():
        return np.array(pb.get_output_tensor_by_name(response, output).as_numpy(), np.float32)

    message = response.error().message()
    failure = read_failure(message)
    if failure.code is None:
        print(f"{model} version {version} failed: {message}", file=sys.stderr)
        raise TaskError(ENCODER_FAILED, f"{model} version {version} failed: {redact(message)}")
    if failure.by_task:
        raise TaskError(failure.code, failure.message)
    raise TaskError(failure.code, RETRYABLE[failure.code].format(model))
