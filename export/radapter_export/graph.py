"""From a tower to an ONNX file.

The graph is made from a tower without weights, and the weights are put in afterwards by name. So
nothing in it can depend on their values (torch's exporter would else drop zero biases and merge
equal tensors), every α has the same operators as the untouched base, and one export serves any
number of folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir import tensor_adapters
from onnx_ir.passes.common import NameFixPass
from torch import Tensor, nn

from radapter_export.towers import (
    DynamicAlphaTower,
    ImageTower,
    PatchTower,
    TextTower,
    name_in_base,
    skeleton,
)
from radapter_serve.adapter import Adapter
from radapter_serve.clip.base import Base
from radapter_serve.errors import RAdapterError, quiet, reason

# The first with Conv in bf16; the Attention of the next one is not built by TensorRT in fp32.
OPSET = 22
# Bytes of weights above which they go into a file beside the graph; protobuf ends at 2 GiB.
EXTERNAL_ABOVE = 1 << 30
BATCH = torch.export.Dim("batch", min=1, max=1 << 16)


@dataclass
class Graph:
    """A tower as ONNX, still without weights; `name` is the model's in the repository.

    `constants` are values that no state dict holds: mean, std, the causal mask, the neighbourhood
    of patches.
    """

    name: str
    model: ir.Model
    constants: dict[str, Tensor]

    def save(
        self, weights: Mapping[str, Tensor], path: Path, *, external_above: int = EXTERNAL_ABOVE
    ) -> int:
        """Put weights in, write the file, check it; returns the bytes of all that was written.

        `weights` is a state dict of the whole CLIP, cast to the types of the initializers of the
        same names. More than `external_above` bytes of weights go beside the file.
        """
        initializers = self.model.graph.initializers
        weightless = {
            name: value for name, value in initializers.items() if value.const_value is None
        }
        total = 0
        try:
            for name, value in weightless.items():
                tensor = (weights[name] if name in weights else self.constants[name]).detach()
                assert value.shape is not None and tuple(tensor.shape) == tuple(value.shape), name
                kind = tensor_adapters.to_torch_dtype(value.dtype or ir.DataType.FLOAT)
                value.const_value = tensor_adapters.TorchTensor(
                    tensor.to("cpu", kind).contiguous(), name=name
                )
                total += value.const_value.nbytes
            beside = f"{path.name}.data" if total > external_above else None
            ir.save(self.model, path, external_data=beside)
        finally:
            for value in weightless.values():
                value.const_value = None
        onnx.checker.check_model(str(path))
        return size_of(path)


def size_of(path: Path) -> int:
    """Bytes of an ONNX file and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def image_graph(base: Base, dynamic: Adapter | None = None) -> Graph:
    """The graph of `image_encoder`: `image` uint8 [B, S, S, 3] to `image_embeds` float32 [B, D].

    With `dynamic`, here and below, `alpha` float32 [B, 1] is a second input; the weights are the
    base's and the adapter's.
    """
    return _of_images("image_encoder", ImageTower(base), "image_embeds", base.image_size, dynamic)


def patch_graph(base: Base, method: str, dynamic: Adapter | None = None) -> Graph:
    """The graph of `patch_encoder`: `image` uint8 [B, S, S, 3] to `patch_embeds` float32 [B, g, g,
    D].
    """
    return _of_images(
        "patch_encoder", PatchTower(base, method), "patch_embeds", base.image_size, dynamic
    )


def text_graph(base: Base, dynamic: Adapter | None = None) -> Graph:
    """The graph of `text_encoder`: `tokens` int32 [B, L] to `text_embeds` float32 [B, D]."""
    tower = TextTower(base)
    shape: dict[int, torch.export.Dim] = {0: BATCH}
    length = tower.context_length
    if tower.dynamic_length:
        shape[1] = torch.export.Dim("length", min=1, max=length)
        length = min(9, length)
    example = torch.zeros(2, length, dtype=torch.int32, device="meta")
    return _export("text_encoder", tower, example, ("tokens", "text_embeds"), shape, dynamic)


def _of_images(
    name: str, tower: ImageTower, output: str, size: int, dynamic: Adapter | None
) -> Graph:
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8, device="meta")
    return _export(name, tower, example, ("image", output), {0: BATCH}, dynamic)


def _export(
    name: str,
    tower: nn.Module,
    example: Tensor,
    names: tuple[str, str],
    shape: dict[int, torch.export.Dim],
    dynamic: Adapter | None,
) -> Graph:
    inputs = {names[0]: (example, shape)}
    if dynamic is not None:
        tower = DynamicAlphaTower(tower, dynamic)
        inputs["alpha"] = torch.zeros(2, 1, device="meta"), {0: shape[0]}
    try:
        # `optimize=False`: its passes look at values, which a skeleton does not have.
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                skeleton(tower).eval(),
                tuple(values for values, _ in inputs.values()),
                input_names=list(inputs),
                output_names=[names[1]],
                dynamic_shapes=tuple(dims for _, dims in inputs.values()),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        why = reason(error.__cause__ or error)
        raise RAdapterError(
            f"torch {torch.__version__} cannot export {name} of this model: {why}"
        ) from error
    if program is None:
        raise RAdapterError(
            f"torch {torch.__version__} gave no ONNX program for {name}; install torch 2.9 or newer"
        )
    model = program.model
    graph = model.graph
    initializers = graph.initializers

    # Fold the arithmetic of shapes, with the weights made inputs, and so unknown to every pass.
    named = [name for name, _ in (*tower.named_parameters(), *tower.named_buffers())]
    weights = [initializers.pop(key) for key in named if key in initializers]
    count = len(graph.inputs)
    for value in weights:
        value.const_value = None
    graph.inputs.extend(weights)
    with quiet():
        onnxscript.optimizer.optimize_ir(model)
    del graph.inputs[count:]

    # Call the weights as in the base. torch calls values after operators, so one of them may have
    # the same name.
    for value in weights:
        value.name = name_in_base(str(value.name))
        initializers.add(value)
    NameFixPass()(model)

    # Drop the exporter's notes for debugging: stack traces with paths of this machine, half of a
    # file's graph.
    model.producer_name = "radapter-export"
    model.producer_version = None
    for holder in (model, graph, *graph, *graph.inputs, *initializers.values()):
        holder.metadata_props.clear()
        holder.doc_string = None
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
    return Graph(name, model, {name_in_base(key): buffer for key, buffer in tower.named_buffers()})
