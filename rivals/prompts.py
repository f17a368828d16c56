"""Learned vectors instead of the first words of prompts: CoOp, CoCoOp and MaPLe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import causal_text_features, encode_text, text_tower
from radapter_serve.errors import RAdapterError
from rivals.adapters import blocks_of, width_of
from rivals.method import Method, Run, System, Tuned, paper

# CoOp. Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022: one context for all
# classes. For 16-shot ImageNet the authors' code uses 16 random vectors, or 4 that start as "a
# photo of a", with the class at the end.

# Settings that MaPLe shares; those not in the papers are defaults of the library of both codes.
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.002,
    "min_learning_rate": 0.0,
    "weight_decay": 5e-4,
    "grad_clip": None,
    "crop_scale": 0.08,
    "flip": True,
}


class Context(nn.Module):
    """Vectors that replace the tokens after a text's start token, initialised with the embeddings
    of words, or at random.
    """

    def __init__(self, base: Base, words: str | None, length: int) -> None:
        super().__init__()
        blocks_of(base.model, "text")  # raises for unsupported towers
        embedding = text_tower(base.model).token_embedding
        tokens = base.tokenizer([words or " ".join(["X"] * length)])[0]
        if int(tokens.argmax()) < 1 + length:  # the end token has the largest id
            raise RAdapterError(
                f"a context of {length} vectors needs as many tokens, and {words!r} has fewer"
            )
        if len(tokens) < length + 4:
            raise RAdapterError(
                f"texts of {len(tokens)} tokens have no room for a context of {length} and a class"
            )
        vectors = torch.empty(
            length, embedding.weight.shape[1], device=embedding.weight.device
        ).normal_(std=0.02)
        if words:
            vectors = embedding.weight[tokens[1 : 1 + length]].detach().clone()
        self.vectors = nn.Parameter(vectors)
        self.shift: Tensor | None = None  # added to the vectors of each text, [N, 1, d]
        embedding.register_forward_hook(self._put)

    def _put(self, module: nn.Module, args: Any, embeds: Tensor) -> Tensor:
        vectors = self.vectors if self.shift is None else self.vectors + self.shift
        return replaced(embeds, 1, vectors)


def replaced(x: Tensor, start: int, vectors: Tensor) -> Tensor:
    """Replace the vectors of sequences [N, L, d] from position `start` by vectors [n, d], or by
    those of each sequence, [N, n, d].
    """
    length = vectors.shape[-2]
    return torch.cat(
        [x[:, :start], vectors.to(x.dtype).expand(len(x), -1, -1), x[:, start + length :]], dim=1
    )


class Prompted(Tuned):
    """A CLIP whose prompts are a learned context, the class, and a full stop.

    The context has `length` vectors, which start as `words` of at least as many tokens, or at
    random. If the words have `{}` for the class, the text after it replaces the full stop.
    """

    def __init__(self, run: Run, words: str | None, length: int) -> None:
        template = words if words and "{}" in words else f"{words or ''}{{}}."
        before, _, behind = template.partition("{}")
        before = before.strip()
        super().__init__(run, template=f"{before or ' '.join(['X'] * length)} {{}}{behind}")
        self.context = Context(run.base, before or None, length)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed classes with the learned context; ignores the templates."""
        return super().embed_classes(classes, [self.template])


@dataclass(frozen=True)
class PromptLearning(Method):
    """Prompt learning with SGD, as in CoOp and MaPLe.

    Their code keeps the rate at 1e-5 for the first epoch; here it rises over a fifth of the run, at
    most 500 steps.
    """

    def optimizer(self, system: System, run: Run) -> Optimizer:
        recipe = run.recipe
        return SGD(
            system.learning(),
            lr=recipe.learning_rate,
            momentum=0.9,
            weight_decay=recipe.weight_decay,
        )


@dataclass(frozen=True)
class CoOp(PromptLearning):
    """Context optimization; the fields are those of `Prompted`."""

    settings: Mapping[str, Any] = paper(**SETTINGS, batch_size=32, epochs=50)
    length: int = 16
    words: str | None = None

    def start(self, run: Run) -> System:
        return Prompted(run, self.words, self.length)


# CoCoOp. Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022: a context
# that depends on the image.


class Conditional(Prompted):
    """A CLIP whose context is shifted for each image with a small network of its embedding.

    As a class has another embedding for each image, the embedding of a class is a unit vector here,
    and that of an image has its cosines with the classes that were embedded last, or else with the
    run's. Classes have their first names.
    """

    def __init__(self, run: Run, words: str, length: int) -> None:
        super().__init__(run, words, length)
        with torch.no_grad():
            wide = encode_text(self.model, self.prompts[:1]).shape[-1]
        narrow = max(1, wide // 16)
        width = self.context.vectors.shape[1]
        self.net = nn.Sequential(nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, width))
        self.register_buffer("classes", self.prompts, persistent=False)
        self.classes: Tensor
        self.used = False  # whether images were compared with these classes

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        tokens = self.tokens(classes).to(self.device)
        if self.used and not torch.equal(tokens, self.classes):
            raise RAdapterError("CoCoOp must know the classes before the images; leave it out")
        self.classes = tokens
        self.used = False
        return torch.eye(len(tokens), device=self.device)

    def embed_images(self, pixels: Tensor) -> Tensor:
        self.used = True
        return self._cosines(pixels)

    def scores(self, pixels: Tensor) -> Tensor:
        return self.scale * self._cosines(pixels)

    def _cosines(self, pixels: Tensor) -> Tensor:
        """Compare images with the classes, [B, C], about 4,000 texts at a time."""
        count = len(self.classes)
        length = int(self.classes.argmax(dim=1).max()) + 1  # the end token has the largest id
        parts = []
        for images in torch.split(super().embed_images(pixels), max(1, 4000 // count)):
            self.context.shift = self.net(images).repeat_interleave(count, 0)[:, None]
            tokens = self.classes[:, :length].repeat(len(images), 1)
            texts = F.normalize(causal_text_features(self.model, tokens).float(), dim=-1)
            parts.append(torch.einsum("bd,bcd->bc", images, texts.view(len(images), count, -1)))
        self.context.shift = None
        return torch.cat(parts)


@dataclass(frozen=True)
class CoCoOp(PromptLearning):
    """Conditional context optimization; the fields are those of `Prompted`."""

    settings: Mapping[str, Any] = paper(**SETTINGS, batch_size=1, epochs=10)
    length: int = 4
    words: str = "a photo of a"

    def start(self, run: Run) -> System:
        return Conditional(run, self.words, self.length)


# MaPLe. Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023: prompts in the first blocks
# of both towers; linear maps of the text prompts give the image prompts.


class Coupled(Prompted):
    """A CLIP with prompts in the first blocks of both towers.

    Block j < J has text prompts P_j after the start token, and image prompts `W_j·P_j + b_j` after
    the patches. They replace the outputs of the previous block's prompts; from block J on, these
    outputs are kept. P_0 starts as `words`, the others at random. J is `depth`, or the number of
    blocks of the shallower tower if that is less.
    """

    def __init__(self, run: Run, words: str, length: int, depth: int) -> None:
        super().__init__(run, words, length)
        text = blocks_of(run.base.model, "text")
        image = blocks_of(run.base.model, "image")
        depth = min(depth, len(text), len(image))
        width = width_of(text[0])
        self.deep = nn.ParameterList(
            torch.empty(length, width).normal_(std=0.02) for _ in range(depth - 1)
        )
        self.couple = nn.ModuleList(nn.Linear(width, width_of(image[0])) for _ in range(depth))
        self.model.visual.ln_pre.register_forward_pre_hook(self._append)
        for number in range(1, depth):
            text[number].register_forward_pre_hook(self._put(number, lambda x: 1, self.of_text))
            image[number].register_forward_pre_hook(
                self._put(number, lambda x: x.shape[1] - length, self.of_image)
            )

    def of_text(self, number: int) -> Tensor:
        """Return the text prompts of a block, [n, d]."""
        return self.deep[number - 1] if number else self.context.vectors

    def of_image(self, number: int) -> Tensor:
        """Compute the image prompts of a block, [n, d of the image tower]."""
        prompts: Tensor = self.couple[number](self.of_text(number))
        return prompts

    def _append(self, module: nn.Module, args: Any) -> Tensor:
        patches: Tensor = args[0]
        return torch.cat(
            [patches, self.of_image(0).to(patches.dtype).expand(len(patches), -1, -1)], dim=1
        )

    def _put(
        self, number: int, start: Callable[[Tensor], int], prompts: Callable[[int], Tensor]
    ) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            return (replaced(args[0], start(args[0]), prompts(number)), *args[1:])

        return hook


@dataclass(frozen=True)
class MaPLe(PromptLearning):
    """Multi-modal prompts, with the settings of the authors' code for new classes; for new data
    sets it has depth 3 and 2 epochs. The fields are those of `Coupled`.
    """

    settings: Mapping[str, Any] = paper(
        **{**SETTINGS, "learning_rate": 0.0035}, batch_size=4, epochs=5
    )
    length: int = 2
    depth: int = 9
    words: str = "a photo of a"

    def start(self, run: Run) -> System:
        return Coupled(run, self.words, self.length, self.depth)
