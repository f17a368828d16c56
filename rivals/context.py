"""Context vectors in place of a prompt's words: what CoOp, CoCoOp and MaPLe learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import text_tower
from radapter_serve.errors import RAdapterError
from rivals.blocks import blocks_of
from rivals.method import Method
from rivals.run import Run
from rivals.system import System
from rivals.tuned import Tuned


class Context(nn.Module):
    """Vectors that take the place of a text's tokens after the start token.

    Args:
        base: whose token embedding it hooks into.
        words: whose embeddings the vectors start as; None draws them at random.
        length: how many there are.

    Raises:
        RAdapterError: the words have fewer tokens, or the model's texts have no room for them.
    """

    def __init__(self, base: Base, words: str | None, length: int) -> None:
        super().__init__()
        blocks_of(base.model, "text")  # refuses other towers
        embedding = text_tower(base.model).token_embedding
        tokens = base.tokenizer([words or " ".join(["X"] * length)])[0]
        if int(tokens.argmax()) < 1 + length:  # the end token has the highest number
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
        self.shift: Tensor | None = None  # [d], added to each vector
        embedding.register_forward_hook(self._put)

    def _put(self, module: nn.Module, args: Any, embeds: Tensor) -> Tensor:
        vectors = self.vectors if self.shift is None else self.vectors + self.shift
        return replaced(embeds, 1, vectors)


def replaced(x: Tensor, start: int, vectors: Tensor) -> Tensor:
    """Sequences [N, L, d] with vectors [n, d] in place of what stands from `start` on."""
    length = len(vectors)
    return torch.cat(
        [x[:, :start], vectors.to(x.dtype).expand(len(x), -1, -1), x[:, start + length :]], dim=1
    )


class Prompted(Tuned):
    """A CLIP whose prompts start with a learned context; the class and a full stop follow.

    Args:
        run: see `Tuned`.
        words: that the context starts as, and with `{}` for the class also what follows it, in
            place of a full stop. Without any before the class the context is drawn at random.
        length: vectors of the context.
    """

    def __init__(self, run: Run, words: str | None, length: int) -> None:
        before, _, behind = (words if words and "{}" in words else f"{words or ''}{{}}.").partition(
            "{}"
        )
        before = before.strip()
        super().__init__(run, template=f"{before or ' '.join(['X'] * length)} {{}}{behind}")
        self.context = Context(run.base, before or None, length)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """By the learned context, which is the one template."""
        return super().embed_classes(classes, [self.template])


@dataclass(frozen=True)
class PromptLearning(Method):
    """What learns contexts learns them by SGD, as CoOp's code does and MaPLe's that stands on it.

    Theirs holds the rate at 1e-5 for the first epoch; here it rises for a fifth of the run, and 500
    steps at most.
    """

    def optimizer(self, system: System, run: Run) -> Optimizer:
        recipe = run.recipe
        return SGD(
            system.learning(),
            lr=recipe.peak_rate,
            momentum=0.9,
            weight_decay=recipe.weight_decay,
        )


# Of all three, with the defaults of the library that their code stands on.
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.002,
    "min_learning_rate": 0.0,
    "weight_decay": 5e-4,
    "grad_clip": None,
    "crop_scale": 0.08,
    "flip": True,
}
