"""A low-rank adapter as a folder of the library `peft`: a LoRA for the model in `transformers` form.

F = up·down after the layer `W, b` changes them by `α·up·down·W` and `α·up·down·b`. So B = up, A = down·W, and the bias
of B is `up·(down·b)`; what `peft` calls `lora_alpha / r` is α.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from radapter_export.files import disk_errors
from radapter_export.folder import NewFolder
from radapter_export.transformers_folder import agreement, library_class
from radapter_serve.adapter import Adapter
from radapter_serve.clip.base import Base
from radapter_serve.clip.form import Form, to_transformers
from radapter_serve.clip.from_transformers import quiet
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.files import staged
from radapter_serve.release.agreement import Agreement, Samples, Tolerance

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class PeftFolder(NewFolder):
    """Folders that `peft` opens, in the making; see `NewFolder`."""

    flag = "--peft"
    files = frozenset({CONFIG, WEIGHTS})

    def add(
        self,
        name: str,
        base: Base,
        form: Form,
        state_dict: Mapping[str, Tensor],
        adapter: Adapter,
        alpha: float,
        samples: Mapping[str, Samples],
        bounds: Tolerance,
    ) -> Agreement:
        """Write a LoRA into the subfolder `name`, "" for the folder itself, and check it as `peft` merges it.

        Args:
            name: of the subfolder.
            base: gives mean and standard deviation of the pixels.
            form: of the base.
            state_dict: of the base, by open_clip's names.
            adapter: of low rank.
            alpha: re-scaling in [0, 1].
            samples: of `image_encoder` and `text_encoder` at this α.
            bounds: how far from torch it may be.

        Raises:
            RAdapterError: its embeddings differ from torch's, or the disk is full.
        """
        layers = {key: form.layer(key) for key in adapter.keys}
        with disk_errors(self.folder.parent):
            target = self.staged(name)
            _config(adapter, alpha, sorted(layers.values())).save_pretrained(target)
            with staged(target / WEIGHTS) as path:
                save_file(_tensors(adapter, layers, state_dict), path, metadata={"format": "pt"})
        with quiet():
            import peft

            model = library_class(form, 1)(library_class(form, 0)(**form.config))
            model.load_state_dict(to_transformers(state_dict, form.weights))
            merged = peft.PeftModel.from_pretrained(model, str(target)).merge_and_unload()
        return agreement("the adapter as a LoRA of peft", merged, base, samples, bounds)

    def size(self, name: str) -> int:
        """Bytes of the weights in the subfolder `name`."""
        return (self._staged / name / WEIGHTS).stat().st_size


def check_low_rank(adapter: Adapter) -> None:
    """Refuse an adapter of full rank, whose LoRA would be larger than the merged weights.

    Raises:
        RAdapterError: it has full rank.
    """
    check_installed("peft", "huggingface")
    if adapter.metadata.rank is None:
        raise RAdapterError(
            "--peft takes adapters of low rank (radapter-train --rank 4), and this one has full rank: its LoRA would "
            "be larger than the merged weights, which --transformers FOLDER writes"
        )


def _config(adapter: Adapter, alpha: float, layers: list[str]) -> Any:
    from peft import LoraConfig

    rank = adapter.metadata.rank
    assert rank is not None
    return LoraConfig(
        r=rank,
        lora_alpha=alpha * rank,  # type: ignore[arg-type]  # a whole number is usual, and any is divided by r
        target_modules=layers,
        lora_bias=True,
        inference_mode=True,
    )


@torch.no_grad()
def _tensors(adapter: Adapter, layers: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for key, layer in layers.items():
        up, down = (part.float() for part in adapter.layer(key).values())
        begin = f"base_model.model.{layer}.lora"
        tensors[f"{begin}_A.weight"] = down @ state_dict[f"{key}.weight"].float()
        tensors[f"{begin}_B.weight"] = up.contiguous()
        tensors[f"{begin}_B.bias"] = up @ (down @ state_dict[f"{key}.bias"].float())
    return tensors
