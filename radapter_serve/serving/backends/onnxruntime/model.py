"""Triton backend `onnxruntime` in Python, for servers without the C++ backend of that name; same configs, same numbers.

Of the C++ backend's parameters it knows `intra_op_thread_count`, `inter_op_thread_count`, `execution_mode`,
`enable_mem_arena` and `session.*` entries, and `graph_optimization_level` of the `optimization` block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb
from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]

if int(np.__version__.split(".")[0]) >= 2:
    raise RuntimeError(
        f"numpy {np.__version__} is installed, but Triton's Python backend misreads tensors under numpy 2; "
        'run: pip install "radapter-serve[server]"'
    )


# A server tells nobody but its callers.
ort.disable_telemetry_events()


class TritonPythonModel:
    """One ONNX Runtime session; the requests of an `execute` become one run."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Nothing to complete: the exporter writes every input and output into the config."""
        return config

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        if not path.exists():
            raise RuntimeError(f"{path} does not exist; export again: radapter-export")
        self._batched = config["max_batch_size"] > 0
        self._outputs = [(o["name"], pb.triton_string_to_numpy(o["data_type"])) for o in config["output"]]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self._session = ort.InferenceSession(str(path), _options(config), providers=_providers(device))
        used = self._session.get_providers()[0]
        if device is not None and used != "CUDAExecutionProvider":
            raise RuntimeError(
                f"instance on GPU {device}: ONNX Runtime fell back to {used} without an error; "
                "install onnxruntime-gpu with CUDA and cuDNN, or set instance_group kind: KIND_CPU"
            )
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
        del self._session

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
            return _failed(error)

    def _run(self, feed: Feed) -> list[NDArray[Any]]:
        return list(self._session.run([name for name, _ in self._outputs], feed))

    def _response(self, outputs: Sequence[NDArray[Any]]) -> Any:
        pairs = zip(self._outputs, outputs, strict=True)
        tensors = [pb.Tensor(name, output.astype(dtype, copy=False)) for (name, dtype), output in pairs]
        return pb.InferenceResponse(tensors)

    def _check_names(self) -> None:
        for kind, wanted, actual in (
            ("input", self._inputs, [i.name for i in self._session.get_inputs()]),
            ("output", [name for name, _ in self._outputs], [o.name for o in self._session.get_outputs()]),
        ):
            if unknown := sorted(set(wanted) - set(actual)):
                raise RuntimeError(f"config.pbtxt names the {kind} {unknown}, the graph has {sorted(actual)}")


def _options(config: dict[str, Any]) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if parameters.get("execution_mode") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if parameters.get("enable_mem_arena") == "0":
        options.enable_cpu_mem_arena = False
    # As the C++ backend has it: below 0 basic, 0 as ONNX Runtime itself (all), above 0 all.
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level:
        basic, all_ = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.graph_optimization_level = basic if level < 0 else all_
    for key, value in parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def _providers(device: int | None) -> list[Any]:
    cpu = ["CPUExecutionProvider"]
    return cpu if device is None else [("CUDAExecutionProvider", {"device_id": device}), *cpu]


def _same_shapes(arrays: list[Feed]) -> bool:
    first = [array.shape[1:] for array in arrays[0].values()]
    return all([array.shape[1:] for array in one.values()] == first for one in arrays[1:])


def _failed(error: Exception) -> Any:
    return pb.InferenceResponse(error=pb.TritonError(f"ONNX Runtime: {error}", pb.TritonError.INTERNAL))
