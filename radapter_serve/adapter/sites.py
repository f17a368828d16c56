"""Where adapters sit: after attention and after the feed-forward layer of every block of both towers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from radapter_serve.errors import RAdapterError


@dataclass(frozen=True)
class Site:
    """One adapted layer.

    Attributes:
        key: the layer's name in the state dict; `key.weight` and `key.bias` are what the fold changes.
        layer: the linear layer itself.
        output: the module whose output the adapter sees. `nn.MultiheadAttention` never calls its `out_proj`
            as a module, so there it is the attention as a whole.
    """

    key: str
    layer: nn.Linear
    output: nn.Module


@dataclass(frozen=True)
class _Layout:
    """Names of one family of models: lists of blocks for each tower, then (layer, output) inside a block."""

    image: tuple[str, ...]
    text: tuple[str, ...]
    layers: tuple[tuple[str, str], ...]
    between: tuple[str, ...]  # modules between a layer and the residual: anything but Identity makes a fold inexact


OPEN_CLIP = _Layout(
    image=("visual.transformer.resblocks",),
    text=("transformer.resblocks", "text.transformer.resblocks"),
    layers=(("attn.out_proj", "attn"), ("mlp.c_proj", "mlp.c_proj")),
    between=("ls_1", "ls_2", "ln_attn"),
)


def find_sites(model: nn.Module, *, text: bool = True) -> list[Site]:
    """Find the adapted layers of a CLIP, image tower first, and prove that each can be folded exactly.

    Args:
        model: an open_clip model.
        text: look in the text tower too.

    Raises:
        RAdapterError: a tower has no known sites, or something stands between a site and its residual.
    """
    modules = dict(model.named_modules())
    layout = OPEN_CLIP
    sites = []
    for tower, names in (("image", layout.image), ("text", layout.text))[: 1 + text]:
        blocks = next((name for name in names if isinstance(modules.get(name), nn.ModuleList)), None)
        if blocks is None:
            raise RAdapterError(
                f"the {tower} tower of {type(model).__name__} has no transformer blocks that adapters fit: "
                f"looked for {' or '.join(names)}; use an open_clip model whose towers are both transformers of "
                f"open_clip's own kind, such as ViT-B-32"
            )
        for index in range(len(modules[blocks])):  # type: ignore[arg-type]
            sites += _sites_of_block(f"{blocks}.{index}", modules, layout)
    return sites


def _sites_of_block(block: str, modules: dict[str, nn.Module], layout: _Layout) -> list[Site]:
    for name in layout.between:
        module = modules.get(f"{block}.{name}")
        if module is not None and not isinstance(module, nn.Identity):
            raise RAdapterError(
                f"{block}.{name} ({type(module).__name__}) stands between an adapted layer and its residual: "
                f"the adapter could not be folded exactly; nothing was changed"
            )
    sites = []
    for layer_name, output_name in layout.layers:
        layer = modules.get(f"{block}.{layer_name}")
        if not isinstance(layer, nn.Linear):
            found = "missing" if layer is None else type(layer).__name__
            raise RAdapterError(f"{block}.{layer_name} must be a linear layer but is {found}; nothing was changed")
        sites.append(Site(f"{block}.{layer_name}", layer, modules[f"{block}.{output_name}"]))
    return sites
