"""What Triton backends in Python share: the requests of one `execute` become one run of a graph.

Importable only inside one of Triton's processes, like `radapter_serve.tasks.triton`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Graph:
    """A graph that a runtime has loaded.

    Attributes:
        inputs: their names.
        outputs: their names.
        run: from inputs by name, and the names of outputs, to these outputs.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    run: Callable[[Feed, Sequence[str]], Sequence[NDArray[Any]]]


class GraphModel(ABC):
    """One graph in one runtime, as Triton wants a `TritonPythonModel` to be.

    Attributes:
        runtime: its name, for errors.
    """

    runtime: str

    @abstractmethod
    def load(self, path: Path, config: Mapping[str, Any], parameters: Mapping[str, str], device: int | None) -> Graph:
        """Load a graph.

        Args:
            path: of its file.
            config: the model's config.
            parameters: those of the config.
            device: number of the GPU, None on the CPU.
        """

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Nothing to complete: the exporter writes every input and output into the config."""
        return config

    def initialize(self, args: dict[str, str]) -> None:
        if int(np.__version__.split(".")[0]) >= 2:
            raise RuntimeError(
                f"numpy {np.__version__} is installed, but Triton's Python backend misreads tensors under numpy 2; "
                'run: pip install "radapter-serve[server]"'
            )
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        if not path.exists():
            raise RuntimeError(f"{path} does not exist; export again: radapter-export")
        self._batched = config["max_batch_size"] > 0
        self._outputs = [(o["name"], pb.triton_string_to_numpy(o["data_type"])) for o in config["output"]]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self._graph = self.load(path, config, parameters, device)
        self._check_names()

    def execute(self, requests: list[Any]) -> list[Any]:
        arrays = [
            {name: pb.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        if self._batched and len(requests) > 1 and _same_shapes(arrays):
            return self._run_together(arrays)
        return [self._run_alone(feed) for feed in arrays]

    def finalize(self) -> None:
        del self._graph

    def _run_together(self, arrays: list[Feed]) -> list[Any]:
        feed = {name: np.concatenate([one[name] for one in arrays]) for name in self._inputs}
        try:
            outputs = self._run(feed)
        except Exception:  # of one of them; the others are not to fail with it
            return [self._run_alone(feed) for feed in arrays]
        ends = np.cumsum([len(one[self._inputs[0]]) for one in arrays])[:-1]
        parts = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [self._response(part) for part in parts]

    def _run_alone(self, feed: Feed) -> Any:
        try:
            return self._response(self._run(feed))
        except Exception as error:
            return pb.InferenceResponse(error=pb.TritonError(f"{self.runtime}: {error}", pb.TritonError.INTERNAL))

    def _run(self, feed: Feed) -> Sequence[NDArray[Any]]:
        return self._graph.run(feed, [name for name, _ in self._outputs])

    def _response(self, outputs: Sequence[NDArray[Any]]) -> Any:
        pairs = zip(self._outputs, outputs, strict=True)
        tensors = [pb.Tensor(name, output.astype(dtype, copy=False)) for (name, dtype), output in pairs]
        return pb.InferenceResponse(tensors)

    def _check_names(self) -> None:
        for kind, wanted, actual in (
            ("input", self._inputs, self._graph.inputs),
            ("output", [name for name, _ in self._outputs], self._graph.outputs),
        ):
            if unknown := sorted(set(wanted) - set(actual)):
                raise RuntimeError(f"config.pbtxt names the {kind} {unknown}, the graph has {sorted(actual)}")


def _same_shapes(arrays: list[Feed]) -> bool:
    first = [array.shape[1:] for array in arrays[0].values()]
    return all([array.shape[1:] for array in one.values()] == first for one in arrays[1:])
