"""MaPLe: prompts in the first blocks of both towers; image prompts are maps of text prompts.

Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rivals.blocks import blocks_of, width_of
from rivals.coop import SETTINGS, Prompted, PromptLearning, replaced
from rivals.method import paper
from rivals.run import Run
from rivals.system import System


class Coupled(Prompted):
    """Block j < J has text prompts P_j after the start token, and image prompts `W_j·P_j + b_j`
    after the patches.

    They replace the outputs of the previous block's prompts; from block J on the outputs go on. P_0
    starts as `words`, the others at random. J is `depth`, or the blocks of the shallower tower if
    it has fewer.
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
    """Multi-modal prompts as the authors' code learns them for new classes; for new data sets it
    takes depth 3 and 2 epochs. Fields as of `Coupled`.
    """

    settings: Mapping[str, Any] = paper(
        **{**SETTINGS, "learning_rate": 0.0035}, batch_size=4, epochs=5
    )
    length: int = 2
    depth: int = 9
    words: str = "a photo of a"

    def start(self, run: Run) -> System:
        return Coupled(run, self.words, self.length, self.depth)
