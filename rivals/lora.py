"""LoRA: low-rank changes of the attention's queries, keys and values, by peft.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022; with the settings of
Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPRW 2024, who put it
into both towers of CLIP.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rivals.blocks import blocks_of
from rivals.method import Method, paper
from rivals.run import Run
from rivals.system import Loss, System, Tuned


class LowRank(Tuned):
    """`W + (a/√r)·B·A` for the weight [3d, d] of queries, keys and values, which share A.

    peft's layer for `nn.MultiheadAttention` adapts the output projection too, and counts its change
    twice (0.21.2; huggingface/peft#3774), so `target_parameters` names the parameter itself.
    """

    def __init__(self, run: Run, loss: Loss, rank: int, scale: int) -> None:
        from peft import LoraConfig, get_peft_model  # takes seconds to import

        super().__init__(run, loss)
        for tower in ("image", "text"):
            blocks_of(self.model, tower)  # refuses other towers
        config = LoraConfig(
            r=rank,
            lora_alpha=scale,
            use_rslora=True,  # a/√r, as in their code
            target_modules=[],
            target_parameters=["attn.in_proj_weight"],
        )
        # In a list, so that the model's modules are not registered a second time.
        self._peft = [get_peft_model(self.model, config)]

    def clip(self) -> dict[str, Tensor]:
        """Merge every change into the weights, which is exact."""
        weights: dict[str, Tensor] = copy.deepcopy(self._peft[0]).merge_and_unload().state_dict()
        return weights


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA in both towers, without dropout, which peft lacks for parameters; `scale` is a, called
    alpha in LoRA's paper.
    """

    settings: Mapping[str, Any] = paper(
        batch_size=32,
        epochs=16,
        learning_rate=2e-4,
        min_learning_rate=1e-6,
        weight_decay=0.01,
        warmup_steps=0,
        grad_clip=None,
        crop_scale=0.08,
        flip=True,
    )
    loss: Loss = "classes"
    rank: int = 2
    scale: int = 1

    def start(self, run: Run) -> System:
        return LowRank(run, self.loss, self.rank, self.scale)
