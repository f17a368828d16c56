"""Proof that a graph computes what torch computes: ONNX Runtime against torch with adapters attached.

The reference is not folded and goes through open_clip's own code, so fold, export and ONNX Runtime are tested together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from radapter_serve.base import Base
from radapter_serve.dense import encode_patches
from radapter_serve.errors import RAdapterError
from radapter_serve.serving.encoder import Encoder
from radapter_serve.serving.tokenizer import Tokenizer
from radapter_serve.towers import encode_image

BATCHES = (1, 2, 7)  # constants baked into a Reshape show up at the odd ones
TOLERANCE = 1e-4

Array = npt.NDArray[np.float32]

_WORDS = ["a", "photo", "of", "red", "bicycle,", "leaning", "against", "the", "old", "wall", "near", "1887"]


@dataclass(frozen=True)
class Agreement:
    """How far a graph is from torch, over all rows of all batches.

    Attributes:
        max_error: largest absolute difference of a component of the unit-length embeddings.
        min_cosine: smallest cosine between an embedding and its reference.
    """

    max_error: float
    min_cosine: float


class Samples:
    """Seeded inputs at each batch size.

    Attributes:
        images: uint8 [B, S, S, 3] each.
        tokens: what the server sends, int32 [B, L] each, cropped to the longest text where the tower allows it.
        full_tokens: the same texts through open_clip's own tokenizer, int64 [B, context length] each.
    """

    def __init__(self, base: Base, tokenizer: Tokenizer, size: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.images = [random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8) for batch in BATCHES]
        self.tokens, self.full_tokens = [], []
        for number, batch in enumerate(BATCHES):
            # The first batch is one short text; each later one holds a text that is too long, in another row.
            lengths = [int(n) for n in random.integers(1, 40, batch)]
            if number:
                lengths[number] = 200
            texts = [" ".join(random.choice(_WORDS, length)) for length in lengths]
            self.tokens.append(tokenizer(texts))
            self.full_tokens.append(base.tokenizer(texts))


class References:
    """torch's embeddings of `Samples`, from open_clip's own towers with adapters attached.

    Attributes:
        embeds: of each graph, float32 [B, D] a batch; [B, g, g, D] for `patch_encoder`.

    Args:
        base: with adapters attached.
        samples: what is embedded.
        way: how patches are, one of `radapter_serve.dense.WAYS`; None if they are not.
    """

    @torch.inference_mode()
    def __init__(self, base: Base, samples: Samples, way: str | None = None) -> None:
        model: Any = base.model
        mean, std = (torch.tensor(base.preprocess[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
        images, patches, texts = [], [], []
        for image, tokens in zip(samples.images, samples.full_tokens, strict=True):
            pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
            images.append(encode_image(model, pixels).numpy())
            if way is not None:
                patches.append(encode_patches(model, pixels, way).numpy())
            # Not towers.encode_text, which crops: that cropping is exact is part of what is checked.
            texts.append(nn.functional.normalize(model.encode_text(tokens).float(), dim=-1).numpy())
        self.embeds: dict[str, list[Array]] = {
            "image_encoder": images,
            "patch_encoder": patches,
            "text_encoder": texts,
        }


def compare(
    name: str,
    encoder: Encoder,
    inputs: Sequence[npt.NDArray[np.generic]],
    references: Sequence[Array],
    tolerance: float,
) -> Agreement:
    """Run a graph on every batch and compare it with its reference.

    Args:
        name: of the graph, for the message.
        encoder: the exported graph.
        inputs: batches for it.
        references: torch's embeddings of the same batches.
        tolerance: largest `max_error` allowed.

    Raises:
        RAdapterError: the graph fails on a batch, gives NaN, another shape, or differs by more than the tolerance.
    """
    max_error, min_cosine = 0.0, 1.0
    for values, reference in zip(inputs, references, strict=True):
        try:
            embeds = encoder(values)
        except Exception as error:
            raise RAdapterError(f"{name} fails in ONNX Runtime on a batch of shape {values.shape}: {error}") from error
        if embeds.shape != reference.shape:
            raise RAdapterError(f"{name} gives {embeds.shape} where torch gives {reference.shape}; nothing was written")
        if not (np.isfinite(embeds).all() and np.isfinite(reference).all()):
            raise RAdapterError(f"{name} gives values that are not finite at batch {len(values)}; nothing was written")
        a, b = embeds.astype(np.float64), reference.astype(np.float64)
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        max_error = max(max_error, float(np.abs(a - b).max()))
        min_cosine = min(min_cosine, float(cosine.min()))
    if not max_error <= tolerance:
        raise RAdapterError(
            f"{name} differs from torch by up to {max_error:.2e} (smallest cosine {min_cosine:.6f}), the tolerance is "
            f"{tolerance:.0e}; nothing was written. If you accept that, give --tolerance {max_error * 1.5:.0e}"
        )
    return Agreement(max_error, min_cosine)
