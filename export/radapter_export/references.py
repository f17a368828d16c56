"""What a graph must compute: inputs, and torch's embeddings of them with adapters attached.

The reference is not folded and goes through open_clip's own code, so fold, export and runtime are
tested together (`radapter_serve.release.agreement` compares).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_patches, normalised
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.release.agreement import Samples
from radapter_serve.release.repository import ENCODERS, PATCH_ENCODER

BATCHES = (1, 2, 7)  # constants baked into a Reshape show up at the odd ones

Array = npt.NDArray[np.float32]

_WORDS = [
    *("a", "photo", "of", "red", "bicycle,", "leaning"),
    *("against", "the", "old", "wall", "near", "1887"),
]


class Inputs:
    """Seeded inputs at each batch size: `images`, uint8 [B, S, S, 3]; `tokens` as the server sends
    them, int32 [B, L], cropped to the longest text where the tower allows it; and `full_tokens`,
    the same texts through open_clip's tokenizer, int64 [B, context length].
    """

    def __init__(self, base: Base, tokenizer: Tokenizer, size: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.images = [
            random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8) for batch in BATCHES
        ]
        self.tokens = []
        self.full_tokens = []
        for number, batch in enumerate(BATCHES):
            # The first batch is one short text; each later one holds a text that is too long, in
            # another row.
            lengths = [int(n) for n in random.integers(1, 40, batch)]
            if number:
                lengths[number] = 200
            texts = [" ".join(random.choice(_WORDS, length)) for length in lengths]
            self.tokens.append(tokenizer(texts))
            self.full_tokens.append(base.tokenizer(texts))

    def of(self, graph: str) -> Sequence[npt.NDArray[np.generic]]:
        """The batches for a graph, by its name."""
        return self.tokens if graph == "text_encoder" else self.images


def samples_at(
    base: Base,
    set_alpha: Callable[[float], None],
    inputs: Inputs,
    alpha: float,
    dense: str | None = None,
    *,
    mixed: bool = False,
) -> dict[str, Samples]:
    """Inputs of each graph, and torch's embeddings of them at one α; where α is an input of the
    graphs, `mixed`, each row has the default or another one.

    The whole of `inputs` is embedded once for each α, which `set_alpha` puts into the base's model.
    `dense` is the method for patches, if any.
    """
    values = itertools.cycle((alpha, 0.0, 1.0, 0.25) if mixed else (alpha,))
    alphas: list[npt.NDArray[Any]] = [
        np.array([[next(values)] for _ in range(batch)], np.float32 if mixed else np.float64)
        for batch in BATCHES
    ]
    embeds = {}
    for number in {float(value) for batch in alphas for value in batch.ravel()}:
        set_alpha(number)
        embeds[number] = references(base, inputs, dense)
    samples = {}
    for graph in ENCODERS:
        if graph == PATCH_ENCODER and dense is None:
            continue
        rows = [
            [embeds[float(value)][graph][batch][row] for row, value in enumerate(of.ravel())]
            for batch, of in enumerate(alphas)
        ]
        stacked = [np.stack(batch) for batch in rows]
        samples[graph] = Samples(inputs.of(graph), stacked, alphas if mixed else ())
    return samples


@torch.inference_mode()
def references(base: Base, inputs: Inputs, dense: str | None = None) -> dict[str, list[Array]]:
    """torch's embeddings of inputs, from open_clip's own towers with adapters attached: of each
    graph float32 [B, D] a batch, [B, g, g, D] for `patch_encoder`.
    """
    model: Any = base.model
    images = []
    patches = []
    texts = []
    for image, tokens in zip(inputs.images, inputs.full_tokens, strict=True):
        pixels = normalised(image, base.preprocess, "cpu")
        images.append(encode_image(model, pixels).numpy())
        if dense is not None:
            patches.append(encode_patches(model, pixels, dense).numpy())
        # Not towers.encode_text, which crops: that cropping is exact is part of what is checked.
        texts.append(nn.functional.normalize(model.encode_text(tokens).float(), dim=-1).numpy())
    return {"image_encoder": images, "patch_encoder": patches, "text_encoder": texts}
