"""Names of checkpoints that were tuned elsewhere, as far as they can be checked without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from radapter_serve.errors import RAdapterError, short
from radapter_serve.hub import HUB, LOCAL

_FILES_OF_FOLDERS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_ALLOWED = (
    "allowed: a .pt or .safetensors file, a model's folder, hf-hub:NAME, or NAME:TAG such as"
    " ViT-B-32:openai"
)


def model_name(checkpoint: str) -> str | None:
    """The name by which `load_base` loads a checkpoint as a whole; None for a file of weights."""
    path = Path(checkpoint)
    if path.is_dir():
        return f"{LOCAL}{path}"
    if path.is_file():
        whole = path.name in _FILES_OF_FOLDERS and (path.parent / "open_clip_config.json").is_file()
        return f"{LOCAL}{path.parent}" if whole else None
    if checkpoint.startswith((LOCAL, HUB)) or ":" in checkpoint:
        return checkpoint
    raise RAdapterError(f"there is no checkpoint {short(checkpoint)}; {_ALLOWED}")


def check_base_is_named(
    checkpoint: str, base: str | None, pretrained: str | None, alphas: Iterable[float] = ()
) -> None:
    """Refuse a checkpoint that needs a base, and has none: a file of weights, which does not say
    its architecture, and any α below 1.
    """
    if model_name(checkpoint) is None and base is None:
        raise RAdapterError(
            f"{checkpoint} holds weights alone; name what was tuned with --base, such as --base"
            " ViT-B-32:openai"
        )
    has_weights = base is not None and (pretrained or ":" in base)
    for alpha in alphas:
        if 0 <= alpha < 1 and not has_weights:
            raise needs_base(alpha, Path(checkpoint).name)


def needs_base(alpha: float, name: str) -> RAdapterError:
    """The error for an α below 1 of a checkpoint without its base."""
    return RAdapterError(
        f"alpha is {alpha:g}, which needs the weights that {name} was tuned from; give them with"
        " --base, such as --base ViT-B-32:openai, or take alpha 1"
    )
