"""The Triton backend in Python: runs the requests of one `execute` as one batch.

Importable only inside Triton's processes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    INVALID_ARGUMENT,
    TaskError,
    invalid,
    redact,
    task_error,
)
from radapter_serve.encoders.runtimes import load_graph
from radapter_serve.errors import RAdapterError
from radapter_serve.triton import backlog
from radapter_serve.triton.responses import answer

Feed = dict[str, NDArray[Any]]


class GraphModel:
    """A graph in the runtime that is its config's backend, as Triton's `TritonPythonModel`."""

    runtime: str  # one of `RUNTIMES`

    def initialize(self, args: dict[str, str]) -> None:
        backlog.of_this_process.open(args["model_name"])

        # Read the config.
        config = json.loads(args["model_config"])
        self.runtime = config["backend"]
        parameters = {
            key: value["string_value"] for key, value in config.get("parameters", {}).items()
        }
        tokenizer = json.loads(parameters.get("release", "{}")).get("tokenizer", {})
        self._most_tokens = float(tokenizer.get("context_length", math.inf))
        self._batched = config["max_batch_size"] > 0
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = {
            tensor["name"]: pb.triton_string_to_numpy(tensor["data_type"])
            for tensor in config["output"]
        }

        # Load the graph, and refuse a config that names other inputs or outputs.
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        device = None
        if args["model_instance_kind"] == "GPU":
            device = int(args["model_instance_device_id"])
        self._graph = load_graph(path, self.runtime, parameters, device=device)
        known = [*self._graph.inputs, *self._graph.outputs]
        wrong = set(self._inputs) ^ set(self._graph.inputs) or set(self._outputs) - set(known)
        if wrong:
            raise RAdapterError(
                f"config.pbtxt and {path} differ in the tensor {min(wrong)}; the graph has"
                f" {', '.join(known)}: export the release again with radapter-export"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self._answers)

    def finalize(self) -> None:
        del self._graph

    def _answers(self, requests: Sequence[Any]) -> list[Feed | TaskError]:
        """The outputs or the error of each request; an error does not affect other requests."""
        results: list[Any] = [None] * len(requests)
        feeds: dict[int, Feed] = {}
        for number, request in enumerate(requests):
            try:
                feeds[number] = self._feed(request)
            except Exception as error:
                results[number] = task_error(error)

        # Run them as one batch, if they have the same shapes.
        shapes = {tuple(array.shape[1:] for array in feed.values()) for feed in feeds.values()}
        if self._batched and len(feeds) > 1 and len(shapes) == 1:
            with contextlib.suppress(Exception):
                outputs = self._run(
                    {
                        name: np.concatenate([feed[name] for feed in feeds.values()])
                        for name in self._inputs
                    }
                )
                rows = [len(feed[self._inputs[0]]) for feed in feeds.values()]
                parts = {
                    name: np.split(array, np.cumsum(rows)[:-1]) for name, array in outputs.items()
                }
                for place, number in enumerate(feeds):
                    results[number] = {name: split[place] for name, split in parts.items()}
                return results

        # Otherwise, or if the batch fails, run them one by one.
        for number, feed in feeds.items():
            try:
                results[number] = self._run(feed)
            except Exception as error:
                results[number] = task_error(error)
        return results

    def _feed(self, request: Any) -> Feed:
        feed = {}
        for name in self._inputs:
            tensor = pb.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise invalid(f"the input {name} is missing")
            values = feed[name] = tensor.as_numpy()
            if not values.size:
                raise invalid(
                    f"{name} of shape {list(values.shape)} holds nothing; send one or more"
                )
        tokens = feed.get("tokens")
        if tokens is not None and (tokens.min() < 0 or tokens.shape[-1] > self._most_tokens):
            raise invalid(
                f"tokens of shape {list(tokens.shape)} from {tokens.min()}; allowed are numbers"
                f" from 0, and at most {self._most_tokens:g} for a text"
            )
        return feed

    def _run(self, feed: Feed) -> Feed:
        try:
            outputs = self._graph.run(feed, list(self._outputs))
        except Exception as error:
            # Runtimes' errors have no common base; ONNX Runtime has a class for callers' mistakes.
            code = INVALID_ARGUMENT if type(error).__name__ == "InvalidArgument" else ENCODER_FAILED
            raise TaskError(code, f"{self.runtime}: {redact(str(error))}") from None
        return {
            name: output.astype(dtype, copy=False)
            for (name, dtype), output in zip(self._outputs.items(), outputs, strict=True)
        }
