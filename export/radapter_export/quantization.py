"""int8 by ONNX Runtime's own quantizer: the weights of matrix products, and what goes into them.

Weights get 7 bits (`reduce_range`): CPUs without VNNI add products of bytes in 16 bits and saturate
there, so that with 8 bits one file would give other numbers there, and worse ones than the lost bit
costs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from radapter_export.graph import EXTERNAL_ABOVE, size_of

Batches = Sequence[NDArray[np.generic]]


def quantize(path: Path, calibration: Batches = ()) -> int:
    """Exchange an encoder in fp32 for one in int8.

    Args:
        path: `model.onnx` with weights; it is replaced.
        calibration: inputs by which the ranges of activations are found, to be constants of the
            graph (static, in QuantizeLinear and DequantizeLinear, symmetric, which TensorRT reads
            too). Without any they are found for each batch as it comes (dynamic, for CPUs only).

    Returns:
        Size in bytes of all that was written.
    """
    large = size_of(path) > EXTERNAL_ABOVE
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": large,
    }
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        plain = Path(name, "plain.onnx")
        made = Path(name, "made", path.name)
        made.parent.mkdir()
        _fold_constants(path, plain)
        if calibration:
            quantize_static(
                str(plain),
                str(made),
                _Reader(plain, calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                nodes_to_exclude=_products_of_activations(plain),
                extra_options={
                    "ActivationSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                },
                **common,
            )
        else:
            quantize_dynamic(str(plain), str(made), **common)
        for old in path.parent.glob(f"{path.name}*"):
            old.unlink()
        for file in made.parent.iterdir():
            file.rename(path.parent / file.name)
    return size_of(path)


def _fold_constants(path: Path, plain: Path) -> None:
    """Fold the transposing of weights, which would else hide that they are constants.

    ONNX Runtime's own `quant_pre_process` does this too, but up to 1.23, the last for Python 3.10,
    it reads its result after deleting it.
    """
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(plain)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if size_of(path) > EXTERNAL_ABOVE:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{plain.name}.data"
        )
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(plain, load_external_data=False)
    add_pre_process_metadata(model)  # else it warns that this was not done
    onnx.save(model, plain)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives calibration its batches one by one."""

    def __init__(self, path: Path, batches: Batches) -> None:
        (name,) = (value.name for value in onnx.load(path, load_external_data=False).graph.input)
        self._feeds: Iterator[Mapping[str, NDArray[np.generic]]] = iter(
            [{name: batch} for batch in batches]
        )

    def get_next(self) -> Mapping[str, NDArray[np.generic]] | None:
        return next(self._feeds, None)


def _products_of_activations(path: Path) -> list[str]:
    """Names of the products that have no weights: queries by keys, and attention by values."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] not in weights
    ]
