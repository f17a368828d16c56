"""What Triton backends in Python share: the requests of one `execute` become one run of a graph.

Importable only inside one of Triton's processes.
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
from radapter_serve.encoders.encoder import load_graph
from radapter_serve.extras import install_command
from radapter_serve.triton import surplus
from radapter_serve.triton.responses import answer

Feed = dict[str, NDArray[Any]]


class GraphModel:
    """One graph in one runtime, as Triton wants a `TritonPythonModel` to be.

    Attributes:
        runtime: one of `RUNTIMES`.
        title: its name, for errors.
    """

    runtime: str
    title: str

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Nothing to complete: the exporter writes every input and output into the config."""
        return config

    def initialize(self, args: dict[str, str]) -> None:
        if int(np.__version__.split(".")[0]) >= 2:
            raise RuntimeError(
                f"numpy {np.__version__} is installed, but Triton's Python backend misreads tensors"
                f" under numpy 2; {install_command('triton')}"
            )
        config = json.loads(args["model_config"])
        surplus.of_this_process.heed(args["model_name"])
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        if not path.exists():
            raise RuntimeError(f"{path} does not exist; export again: radapter-export")
        self._batched = config["max_batch_size"] > 0
        self._outputs = [
            (o["name"], pb.triton_string_to_numpy(o["data_type"])) for o in config["output"]
        ]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        device = (
            int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        )
        parameters = {
            key: value["string_value"] for key, value in config.get("parameters", {}).items()
        }
        tokenizer = json.loads(parameters.get("release", "{}")).get("tokenizer", {})
        self._most_tokens = float(tokenizer.get("context_length", math.inf))
        level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
        self._graph = load_graph(path, self.runtime, parameters, device=device, optimization=level)
        self._check_names()

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self._answers)

    def finalize(self) -> None:
        del self._graph

    def _answers(self, requests: Sequence[Any]) -> list[Feed | TaskError]:
        results: list[Any] = [None] * len(requests)
        feeds: dict[int, Feed] = {}
        for number, request in enumerate(requests):
            try:
                feeds[number] = self._feed(request)
            except Exception as error:
                results[number] = task_error(error)
        for number, result in zip(feeds, self._run_all(list(feeds.values())), strict=True):
            results[number] = result
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

    def _run_all(self, feeds: Sequence[Feed]) -> list[Feed | TaskError]:
        """The outputs for each feed, of as many as can be run together; where they fail together,
        one by one.
        """
        shapes = {tuple(array.shape[1:] for array in feed.values()) for feed in feeds}
        if self._batched and len(feeds) > 1 and len(shapes) == 1:
            names = self._inputs
            whole = {name: np.concatenate([feed[name] for feed in feeds]) for name in names}
            with contextlib.suppress(Exception):
                outputs = self._run(whole)
                ends = np.cumsum([len(feed[names[0]]) for feed in feeds])[:-1]
                parts = zip(*(np.split(one, ends) for one in outputs.values()), strict=True)
                return [dict(zip(outputs, part, strict=True)) for part in parts]
        results: list[Feed | TaskError] = []
        for feed in feeds:
            try:
                results.append(self._run(feed))
            except Exception as error:
                results.append(task_error(error))
        return results

    def _run(self, feed: Feed) -> Feed:
        try:
            outputs = self._graph.run(feed, [name for name, _ in self._outputs])
        except Exception as error:
            # Runtimes' errors have no common base; ONNX Runtime names what a caller did wrong.
            code = INVALID_ARGUMENT if type(error).__name__ == "InvalidArgument" else ENCODER_FAILED
            raise TaskError(code, f"{self.title}: {redact(str(error))}") from None
        pairs = zip(self._outputs, outputs, strict=True)
        return {name: output.astype(dtype, copy=False) for (name, dtype), output in pairs}

    def _check_names(self) -> None:
        for kind, wanted, actual in (
            ("input", self._inputs, self._graph.inputs),
            ("output", [name for name, _ in self._outputs], self._graph.outputs),
        ):
            if unknown := sorted(set(wanted) - set(actual)):
                raise RuntimeError(
                    f"config.pbtxt names the {kind} {unknown}, the graph has {sorted(actual)}"
                )
