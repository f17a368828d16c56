"""Names of checkpoints that were tuned elsewhere: what can be seen before torch is loaded."""

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
    """What `load_base` loads as a whole, with architecture and preprocessing; None for a file of
    weights.

    Raises:
        RAdapterError: there is no such checkpoint.
    """
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
    """Refuse a checkpoint whose base has to be named, and is not.

    Args:
        checkpoint: as `load_checkpoint` takes it, like the next two.
        base: what was tuned.
        pretrained: weights of the base, where `base` does not say them.
        alphas: that it is asked for.

    Raises:
        RAdapterError: there is no such checkpoint; it is a file of weights, which do not say their
            architecture; or an α below 1 needs the weights of the base.
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
    """The error where an α is asked for that a checkpoint without its base has not.

    Args:
        alpha: less than 1.
        name: of the checkpoint.
    """
    return RAdapterError(
        f"alpha is {alpha:g}, which needs the weights that {name} was tuned from; give them with"
        " --base, such as --base ViT-B-32:openai, or take alpha 1"
    )
