"""The merged weights as a folder of the library `transformers`: model, processor and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from radapter_export.files import disk_errors
from radapter_export.folder import NewFolder
from radapter_export.processor import PROCESSOR, check_processor, write_processor
from radapter_serve.clip.base import Base
from radapter_serve.clip.form import Form, to_transformers
from radapter_serve.clip.from_transformers import quiet
from radapter_serve.errors import check_installed
from radapter_serve.files import staged
from radapter_serve.release.agreement import Agreement, Samples, Tolerance, compare

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_CLASSES = {"clip": ("CLIPConfig", "CLIPModel"), "siglip": ("SiglipConfig", "SiglipModel")}


class TransformersFolder(NewFolder):
    """Folders that `transformers` opens, in the making; see `NewFolder`."""

    flag = "--transformers"
    library = "transformers"
    files = frozenset({CONFIG, WEIGHTS, *PROCESSOR})

    def add(
        self,
        name: str,
        base: Base,
        form: Form,
        state_dict: Mapping[str, Tensor],
        samples: Mapping[str, Samples],
        bounds: Tolerance,
    ) -> Agreement:
        """Write a model into the subfolder `name`, "" for the folder itself, and check it as it is
        loaded again.

        Args:
            name: of the subfolder.
            base: gives preprocessing and tokenizer.
            form: of the base.
            state_dict: the folded weights, by open_clip's names.
            samples: of `image_encoder` and `text_encoder` at the α that was folded.
            bounds: how far from torch it may be.

        Raises:
            RAdapterError: its embeddings, pixels or tokens differ from open_clip's, or the disk is
                full.
        """
        with disk_errors(self.folder.parent), quiet():
            target = self.staged(name)
            with staged(target / WEIGHTS) as path:
                save_file(
                    to_transformers(state_dict, form.weights), path, metadata={"format": "pt"}
                )
            config = library_class(form, 0)(**form.config)
            config.architectures = [_CLASSES[form.kind][1]]
            config.save_pretrained(target)
            write_processor(target, base)
        with quiet():
            check_processor(target, base)
            model = library_class(form, 1).from_pretrained(target, local_files_only=True)
        return agreement("the model in transformers form", model, base, samples, bounds)

    def size(self, name: str) -> int:
        """Bytes of the weights in the subfolder `name`."""
        return (self._staged / name / WEIGHTS).stat().st_size


def library_class(form: Form, number: int) -> Any:
    """The configuration (0) or the model (1) of a form.

    Raises:
        RAdapterError: `transformers` is not installed.
    """
    check_installed("transformers", "huggingface")
    import transformers

    return getattr(transformers, _CLASSES[form.kind][number])


def agreement(
    name: str, model: Any, base: Base, samples: Mapping[str, Samples], bounds: Tolerance
) -> Agreement:
    """Compare a model of `transformers` with torch's embeddings.

    Args:
        name: of the model, for the message.
        model: a `CLIPModel` or a `SiglipModel`.
        base: gives mean and standard deviation of the pixels.
        samples: of `image_encoder` and `text_encoder`.
        bounds: how far it may be from them.

    Raises:
        RAdapterError: it differs by more.
    """
    model.eval()
    mean, std = (torch.tensor(base.preprocess[key], dtype=torch.float32) for key in ("mean", "std"))

    def images(batch: NDArray[Any]) -> Tensor:
        pixels = (torch.from_numpy(batch).float() / 255 - mean) / std
        return features(model.get_image_features(pixel_values=pixels.permute(0, 3, 1, 2)))

    def texts(batch: NDArray[Any]) -> Tensor:
        return features(model.get_text_features(input_ids=torch.from_numpy(batch).long()))

    found = [
        compare(f"{name}, {kind},", _unit(encode), samples[f"{kind}_encoder"], bounds)
        for kind, encode in (("image", images), ("text", texts))
    ]
    return Agreement(max(one.max_error for one in found), min(one.min_cosine for one in found))


def features(output: Any) -> Tensor:
    """Embeddings as all versions of `transformers` give them: a tensor up to 4, something that
    holds it from 5 on.
    """
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def _unit(encode: Callable[[NDArray[Any]], Tensor]) -> Callable[..., NDArray[np.float32]]:
    @torch.inference_mode()
    def unit(batch: NDArray[Any]) -> NDArray[np.float32]:
        embeds: NDArray[np.float32] = torch.nn.functional.normalize(
            encode(batch).float(), dim=-1
        ).numpy()
        return embeds

    return unit
