"""Export of a model to ONNX: a module for each graph, from raw input to unit-length embeddings.

Graphs are exported without weights, which are added by name, as the operators are the same at
every α and for every base of one architecture. So a graph is traced once and kept.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
import torch.nn.functional as F
from onnx_ir import tensor_adapters
from onnx_ir.passes.common import NameFixPass
from torch import Tensor, nn

from radapter_serve.adapter import Adapter
from radapter_serve.adapter.file import PROJECTIONS
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import (
    causal_text_features,
    check_dense,
    is_causal,
    neighbourhood,
    patch_features,
    text_tower,
)
from radapter_serve.errors import RAdapterError, quiet, reason
from radapter_serve.files import lock, remove, staged

# The first opset with Conv in bf16. Opset 23 has Attention, which TensorRT cannot build in fp32.
OPSET = 22
# Size of weights above which they get their own file: protobuf takes seconds to write 350 MB, and
# allows at most 2 GiB.
EXTERNAL_ABOVE = 1 << 26
# Graphs that are kept, of half a megabyte each; the ones that were made first go.
MOST_KEPT = 128
_TOOLS = ("onnx", "onnx-ir", "onnxscript", "open_clip_torch", "timm", "torch", "transformers")


class ImageTower(nn.Module):
    """Images to embeddings: normalise, encode, scale to unit length."""

    mean: Tensor
    std: Tensor

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model = exportable(base.model, only="visual")
        self.register_buffer("mean", torch.tensor(base.preprocess["mean"], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(base.preprocess["std"], dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] in RGB to float32 [B, D] of unit length."""
        return unit(self.model.encode_image(self.pixels(image), normalize=False))

    def pixels(self, image: Tensor) -> Tensor:
        """Normalise images to float32 [B, 3, S, S]."""
        # Convert to float first, as TensorRT cannot transpose uint8.
        return ((image.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


class PixelTower(ImageTower):
    """The image tower for images that are normalised outside the graph."""

    def forward(self, image: Tensor) -> Tensor:
        """float32 [B, 3, S, S] to float32 [B, D] of unit length."""
        return unit(self.model.encode_image(image, normalize=False))


class PatchTower(ImageTower):
    """Images to embeddings of their patches: the image tower with its last block edited."""

    def __init__(self, base: Base, method: str) -> None:
        grid, _ = check_dense(base.model, method).grid_size
        super().__init__(base)
        self.near: Tensor | None
        self.register_buffer("near", neighbourhood(grid) if method == "naclip" else None)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] in RGB to float32 [B, g, g, D] of unit length."""
        return unit(patch_features(self.model.visual, self.pixels(image), self.near))


class TextTower(nn.Module):
    """Token ids to embeddings of unit length; a causal tower takes texts of any length."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model = exportable(base.model, without="visual")
        transformer: Any = getattr(text_tower(self.model), "transformer", None)
        if hasattr(transformer, "set_attn_implementation"):  # a tower of Hugging Face
            # Export plain attention, as in `Attention`: torch's own has a guard against NaN that
            # TensorRT cannot build in 16 bits.
            transformer.set_attn_implementation("eager")
        # Tokens of a text: at most this many if `dynamic_length`, else exactly this many.
        self.context_length = int(base.tokenizer.context_length)  # type: ignore[attr-defined]
        self.dynamic_length = is_causal(base.model)

    def forward(self, tokens: Tensor) -> Tensor:
        """int32 [B, L] to float32 [B, D] of unit length."""
        if self.dynamic_length:
            return unit(causal_text_features(self.model, tokens))
        return unit(self.model.encode_text(tokens, normalize=False))


class Attention(nn.Module):
    """Attention with the parameters of an `nn.MultiheadAttention`, batch first, as plain products:
    exported, it has a quarter fewer nodes than `scaled_dot_product_attention`, and is as fast.
    """

    in_proj_weight: Tensor
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    in_proj_bias: Tensor

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = original.num_heads
        # If keys have another width (`kdim`), there are three weights instead of `in_proj_weight`.
        self._separate = original.in_proj_weight is None
        for name in [*(f"{part}_proj_weight" for part in ("in", "q", "k", "v")), "in_proj_bias"]:
            self.register_parameter(name, getattr(original, name))
        self.out_proj = original.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend from `query` [B, L, D] to `key`, which is `value`, [B, K, E]; `attn_mask`, [L, K]
        or [B·heads, L, K], is added to the scores.
        """
        batch, length, width = query.shape
        depth = width // self.num_heads
        projected: Iterable[Tensor]
        if query is key:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            # Use slices: the exporter turns `chunk` of a weight into a sequence, which TensorRT
            # does not support.
            parts = [slice(i * width, (i + 1) * width) for i in range(3)]
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
            if not self._separate:
                weights = [self.in_proj_weight[part] for part in parts]
            biases = [self.in_proj_bias[part] for part in parts]
            projected = map(F.linear, (query, key, key), weights, biases)
        q, k, v = (
            part.reshape(batch, -1, self.num_heads, depth).transpose(1, 2) for part in projected
        )
        scores = (q * depth**-0.5) @ k.transpose(-1, -2)
        if attn_mask is not None:
            if attn_mask.ndim > 2:
                attn_mask = attn_mask.reshape(batch, self.num_heads, length, -1)
            scores = scores + attn_mask
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return self.out_proj(mixed), None


def unit(x: Tensor) -> Tensor:
    """Scale to unit length in fp32; TensorRT refuses the exported axes of `F.normalize`."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True).clamp_min(1e-24))


def exportable(model: nn.Module, *, only: str = "", without: str = "") -> Any:
    """Copy a model's structure with `Attention` instead of torch's, with one child `only` or
    `without` one. The copy shares the model's parameters and buffers, under the same names.
    """
    memo: dict[int, Any] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    for name, child in model.named_children():
        if name == without or (only and name != only):
            memo[id(child)] = None
    exported = copy.deepcopy(model, memo)
    for module in exported.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, Attention(child))
    return exported


class DynamicAlphaTower(nn.Module):
    """Gives a tower, whose adapted layers it replaces, the input `alpha`, float32 [B, 1]."""

    def __init__(self, tower: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.tower = tower
        # The adapter of the tower's projection, and its key
        self.projection: DynamicAlpha | None = None
        self.key = ""
        self._alpha = _Alpha()
        modules = dict(tower.named_modules())
        of_tower = PROJECTIONS["image" if isinstance(tower, ImageTower) else "text"]
        for key in adapter.keys:
            name = f"model.{key}"
            if key in of_tower:
                self.projection = DynamicAlpha(adapter.layer(key), self._alpha)
                self.key = key
            elif isinstance(layer := modules.get(name), nn.Linear):
                tower.set_submodule(
                    name, DynamicAlphaLinear(layer, adapter.layer(key), self._alpha)
                )

    def forward(self, values: Tensor, alpha: Tensor) -> Tensor:
        """Embed rows, each at its α."""
        self._alpha.rows = alpha
        embeds: Tensor = self.tower(values)
        if self.projection is None:
            return embeds
        # Only the normalisation follows the projection, so its adapter maps the embeddings: the
        # length of an embedding cancels.
        return unit(self.projection(embeds))


class DynamicAlpha(nn.Module):
    """Computes `y + α·F·y`."""

    full: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, adapter: dict[str, Tensor], alpha: _Alpha) -> None:
        super().__init__()
        for name, tensor in adapter.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._full_rank = "full" in adapter
        self._alpha = alpha

    def forward(self, y: Tensor) -> Tensor:
        """Map [B, ..., d] to [B, ..., d]."""
        if self._full_rank:
            change = F.linear(y, self.full)
        else:
            change = F.linear(F.linear(y, self.down), self.up)
        alpha = self._alpha.rows.to(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
        return y + alpha * change


class DynamicAlphaLinear(DynamicAlpha):
    """Computes `y + α·F·y` with `y = W·x + b`, the same as the fold at α: (W + α·F·W)·x + (b +
    α·F·b).
    """

    def __init__(self, layer: nn.Linear, adapter: dict[str, Tensor], alpha: _Alpha) -> None:
        super().__init__(adapter, alpha)
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, ..., k] to [B, ..., d]."""
        return super().forward(F.linear(x, self.weight, self.bias))


def graph_weights(weights: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights of graphs that take α: the base's, and the adapter's as `KEY.full`, or `KEY.up`
    and `KEY.down`.
    """
    named = dict(weights)
    for key in adapter.keys:
        named |= {f"{key}.{name}": tensor for name, tensor in adapter.layer(key).items()}
    return named


class _Alpha:
    """Holds the rows' α while a tower runs, outside the module, whose attributes are its state."""

    rows: Tensor


@dataclass
class Graph:
    """A tower as an ONNX graph without weights; `constants`, such as mean and std, are outside the
    state dict.
    """

    name: str
    model: ir.Model
    constants: dict[str, Tensor]

    def save(
        self, weights: Mapping[str, Tensor], path: Path, *, external_above: int = EXTERNAL_ABOVE
    ) -> int:
        """Add the weights of a CLIP's state dict, cast to the graph's types, write the file and
        check it; returns the size of all written files in bytes.
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
            data_file = f"{path.name}.data" if total > external_above else None
            ir.save(self.model, path, external_data=data_file)
        finally:
            for value in weightless.values():
                value.const_value = None
        onnx.checker.check_model(str(path))
        return size_of(path)


def size_of(path: Path) -> int:
    """Size in bytes of an ONNX file and of its weights."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def image_graph(base: Base, dynamic: Adapter | None = None) -> Graph:
    """Export `image_encoder`: `image` uint8 [B, S, S, 3] to `image_embeds` float32 [B, D]; with
    `dynamic`, here and below, `alpha` float32 [B, 1] is a second input.
    """
    return _export("image", base, ImageTower(base), _pixels(base), dynamic)


def pixels_graph(base: Base) -> Graph:
    """Export the image tower from `image` float32 [B, 3, S, S], normalised."""
    side = base.image_size
    example = torch.zeros(2, 3, side, side, device="meta")
    return _export("image", base, PixelTower(base), example, None)


def patch_graph(base: Base, method: str, dynamic: Adapter | None = None) -> Graph:
    """Export `patch_encoder`: `image` uint8 [B, S, S, 3] to `patch_embeds` float32 [B, g, g, D]."""
    return _export("patch", base, PatchTower(base, method), _pixels(base), dynamic, method=method)


def _pixels(base: Base) -> Tensor:
    side = base.image_size
    return torch.zeros(2, side, side, 3, dtype=torch.uint8, device="meta")


def text_graph(base: Base, dynamic: Adapter | None = None) -> Graph:
    """Export `text_encoder`: `tokens` int32 [B, L] to `text_embeds` float32 [B, D]."""
    tower = TextTower(base)
    length = tower.context_length
    longest = None
    if tower.dynamic_length:
        longest = length
        length = min(9, length)
    tokens = torch.zeros(2, length, dtype=torch.int32, device="meta")
    return _export("text", base, tower, tokens, dynamic, longest=longest)


def _export(
    kind: str,
    base: Base,
    tower: nn.Module,
    example: Tensor,
    dynamic: Adapter | None,
    *,
    longest: int | None = None,
    method: str = "",
) -> Graph:
    """Export a tower, or take the graph that was kept for one of the same form; `longest` is the
    largest size of the second dimension, if that varies, and `method` that of dense embeddings.
    """
    rows = torch.export.Dim("batch", min=1, max=1 << 16)
    shape = {0: rows}
    if longest is not None:
        shape[1] = torch.export.Dim("length", min=1, max=longest)
    inputs = {"tokens" if kind == "text" else "image": (example, shape)}
    if dynamic is not None:
        tower = DynamicAlphaTower(tower, dynamic)
        inputs["alpha"] = torch.zeros(2, 1, device="meta"), {0: rows}
    of_projection = tower.key if isinstance(tower, DynamicAlphaTower) else ""

    def key_of(name: str) -> str:
        holder, _, inner = name.partition(".")
        if holder == "projection":
            return f"{of_projection}.{inner}"
        return name.removeprefix("tower.").removeprefix("model.")

    # Name all that the graph depends on: two models may have one tower in common.
    other = "vision_cfg" if kind == "text" else "text_cfg"
    form = repr(
        (
            kind,
            method,
            longest,
            tuple(example.shape),
            [(name, value) for name, value in sorted(base.config.items()) if name != other],
            tower,
            [(name, each.shape, each.dtype) for name, each in _weights(tower)],
            dynamic and [(key, each.shape) for key, each in sorted(dynamic.tensors.items())],
            _makers(),
        )
    )
    trace = functools.partial(_trace, f"{kind}_encoder", f"{kind}_embeds", tower, inputs, key_of)
    model = _kept(f"{kind}-{hashlib.sha256(form.encode()).hexdigest()[:24]}", trace)

    # The weights are its last inputs.
    graph = model.graph
    weights = graph.inputs[len(inputs) :]
    del graph.inputs[len(inputs) :]
    for value in weights:
        graph.initializers.add(value)
    constants = {key_of(key): buffer for key, buffer in tower.named_buffers()}
    return Graph(f"{kind}_encoder", model, constants)


def _weights(tower: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by their names: all that a graph of the tower has no values of."""
    return [*tower.named_parameters(), *tower.named_buffers()]


@functools.cache
def _makers() -> str:
    """What makes graphs: the versions of the tools, and our own code."""
    digest = hashlib.sha256()
    there = importlib.metadata.distributions()
    versions = {package.name: package.version for package in there if package.name in _TOOLS}
    digest.update(repr(sorted(versions.items())).encode())
    clip = Path(inspect.getfile(Base)).parent
    adapter = Path(inspect.getfile(Adapter)).parent
    for path in (Path(__file__), *sorted(clip.glob("*.py")), *sorted(adapter.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept(name: str, trace: Callable[[], ir.Model]) -> ir.Model:
    """Load a graph from the user's cache, where `trace` puts it if it is not there or is broken."""
    cache = Path(os.environ.get("RADAPTER_CACHE", "~/.cache/radapter-serve")).expanduser()
    folder = cache / "graphs" / name
    with contextlib.ExitStack() as stack:
        # An export that asks for the same graph meanwhile waits for it. Nothing is kept where
        # nobody can write.
        with contextlib.suppress(OSError):
            stack.enter_context(lock(folder, "radapter-export", math.inf))
        with contextlib.suppress(Exception):  # whatever a library raises for a broken file
            return ir.load(folder / "model.onnx")
        model = trace()
        with contextlib.suppress(OSError), staged(folder / "model.onnx") as temporary:
            ir.save(model, temporary)
            by_age = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in by_age[:-MOST_KEPT]:
                remove(old)
    return model


def _skeleton(tower: nn.Module) -> nn.Module:
    """Copy a tower with shapes but no values, so that the exporter cannot fold any weight into the
    graph, and one graph serves every α.
    """
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in tower.buffers()}
    for parameter in tower.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(tower, memo).eval()


def _trace(
    name: str,
    output: str,
    tower: nn.Module,
    inputs: Mapping[str, tuple[Tensor, Mapping[int, Any]]],
    key_of: Callable[[str], str],
) -> ir.Model:
    """Export a tower with torch; its weights are the last inputs, named as `graph_weights` does."""
    try:
        # `optimize=False`: its passes read values, which the copy does not have.
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                _skeleton(tower),
                tuple(values for values, _ in inputs.values()),
                input_names=list(inputs),
                output_names=[output],
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
    assert program is not None  # dynamo always returns one
    model = program.model
    graph = model.graph
    initializers = graph.initializers

    # Fold the arithmetic of shapes. Make the weights inputs meanwhile, so that no pass knows
    # their values.
    named = [name for name, _ in _weights(tower)]
    weights = [initializers.pop(key) for key in named if key in initializers]
    for value in weights:
        value.const_value = None
    graph.inputs.extend(weights)
    with quiet():
        onnxscript.optimizer.optimize_ir(model)

    # Name the weights. torch names values after operators, so another value may have the same name.
    for value in weights:
        value.name = key_of(str(value.name))
    NameFixPass()(model)

    # Drop the exporter's debugging information: stack traces with paths of this machine, which are
    # half of a graph's file.
    model.producer_name = "radapter-export"
    model.producer_version = None
    for holder in (model, graph, *graph, *graph.inputs, *initializers.values()):
        holder.metadata_props.clear()
        holder.doc_string = None
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
    return model
