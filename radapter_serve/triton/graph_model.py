"""What Triton backends in Python share: the requests of one `execute` become one run of a graph.

Importable only inside one of Triton's processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
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
)
from radapter_serve.extras import install_command
from radapter_serve.runtimes.encoder import load_graph
from radapter_serve.tasks.outcome import Outcome, isolated, run_good
from radapter_serve.tasks.table import need
from radapter_serve.triton import surplus
from radapter_serve.triton.responses import RequestInputs, answer

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
        return answer(requests, self._answer)

    def finalize(self) -> None:
        del self._graph

    def _answer(self, requests: Sequence[RequestInputs]) -> list[Outcome[Mapping[str, Any]]]:
        feeds = [Outcome.of(partial(self._feed, request)) for request in requests]
        return run_good(feeds, partial(isolated, self._run_all))

    def _feed(self, request: RequestInputs) -> Feed:
        feed = {name: need(request, name) for name in self._inputs}
        for name, values in feed.items():
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

    def _run_all(self, feeds: Sequence[Feed]) -> list[Outcome[Mapping[str, Any]]]:
        if not self._batched or len(feeds) == 1 or not _same_shapes(feeds):
            return [Outcome.of(partial(self._run, feed)) for feed in feeds]
        outputs = self._run(
            {name: np.concatenate([one[name] for one in feeds]) for name in self._inputs}
        )
        ends = np.cumsum([len(one[self._inputs[0]]) for one in feeds])[:-1]
        parts = zip(*(np.split(output, ends) for output in outputs.values()), strict=True)
        return [Outcome(dict(zip(outputs, part, strict=True))) for part in parts]

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


def _same_shapes(arrays: Sequence[Feed]) -> bool:
    first = [array.shape[1:] for array in arrays[0].values()]
    return all([array.shape[1:] for array in one.values()] == first for one in arrays[1:])
