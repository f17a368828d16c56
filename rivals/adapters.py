"""Small modules in the blocks of a frozen CLIP: AdaptFormer, RepAdapter, LoRA, CLIP-SVD."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Optimizer
from torchvision.ops import StochasticDepth

from radapter_serve.clip.towers import is_causal, text_tower
from radapter_serve.errors import RAdapterError
from rivals.method import Batch, Loss, Method, Run, System, Tuned, paper


def blocks_of(model: nn.Module, tower: str) -> list[Any]:
    """List the residual blocks of a tower, `image` or `text`; raises an error unless they are of
    open_clip's own class, and causal for texts.
    """
    holder = text_tower(model) if tower == "text" else getattr(model, "visual", None)
    blocks = list(getattr(getattr(holder, "transformer", None), "resblocks", []))
    known = bool(blocks) and all(type(block) is ResidualAttentionBlock for block in blocks)
    if not known or (tower == "text" and not is_causal(model)):
        raise RAdapterError(
            f"this rival needs open_clip's own transformers, such as those of ViT-B-16; the {tower}"
            f" tower of this {type(model).__name__} is a {type(holder).__name__} of another kind"
        )
    return blocks


def width_of(block: Any) -> int:
    """Return the width of a token between blocks."""
    return int(block.mlp.c_fc.in_features)


def drop_path(model: nn.Module, towers: Iterable[str], rate: float) -> list[nn.Module]:
    """Drop attention and feed-forward branches at random for each input (stochastic depth), with a
    probability that rises from 0 at the first block to `rate` at the last.

    Returns modules that drop while they are in training mode.
    """
    layers: list[nn.Module] = []
    for tower in towers if rate else ():
        blocks = blocks_of(model, tower)
        for number, block in enumerate(blocks):
            layer = StochasticDepth(rate * number / max(1, len(blocks) - 1), "row")
            for branch in (block.ls_1, block.ls_2):  # the last modules before each residual sum
                branch.register_forward_hook(lambda _, __, output, layer=layer: layer(output))
            layers.append(layer)
    return layers


# AdaptFormer. Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual
# Recognition, NeurIPS 2022. It cannot be folded.


class Parallel(nn.Module):
    """Adds `s·U·relu(D·x + a) + s·b` to a block's feed-forward branch, where x is the input of the
    branch's norm.
    """

    def __init__(self, block: Any, hidden: int, scale: float, dropout: float) -> None:
        super().__init__()
        width = width_of(block)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self._x: Tensor | None = None
        block.ln_2.register_forward_pre_hook(self._keep)
        block.ls_2.register_forward_hook(self._add)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the change of tokens [B, L, d]."""
        change: Tensor = self.up(self.dropout(self.down(x).relu()))
        return change * self.scale

    def _keep(self, module: nn.Module, args: Any) -> None:
        self._x = args[0]

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self._x is not None
        change: Tensor = self(self._x)
        self._x = None
        return output + change


class Paralleled(Tuned):
    """A CLIP with a `Parallel` in every block."""

    def __init__(self, run: Run, method: AdaptFormer) -> None:
        super().__init__(run, method.loss)
        # Add drop-path first, so that it drops the pretrained branch and not the adapter's change.
        self.extra.extend(drop_path(self.model, method.towers, method.drop_path))
        for tower in method.towers:
            for block in blocks_of(self.model, tower):
                self.extra.append(Parallel(block, method.hidden, method.scale, method.dropout))


@dataclass(frozen=True)
class AdaptFormer(Method):
    """AdaptFormer with the settings of its code, without the batch norm before the head, as CLIP
    has no head.

    The learning rate is for 512 images a step, and proportional to the batch size. `hidden` is the
    width of the bottleneck, `scale` is s; dropout (DO) is after the ReLU, drop-path (DP) in the
    pretrained layers.
    """

    settings: Mapping[str, Any] = paper(
        batch_size=512,
        epochs=100,
        learning_rate=0.2,
        min_learning_rate=0.0,
        weight_decay=0.0,
        grad_clip=None,
        crop_scale=0.08,
        flip=True,
    )
    loss: Loss = "classes"
    towers: tuple[str, ...] = ("image", "text")
    hidden: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    drop_path: float = 0.0

    def start(self, run: Run) -> System:
        return Paralleled(run, self)

    def optimizer(self, system: System, run: Run) -> Optimizer:
        recipe = run.recipe
        learning = [{"params": system.learning(), "share": recipe.batch_size / 512}]
        return SGD(
            learning, lr=recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay
        )


# RepAdapter. Luo et al., Towards Efficient Visual Adaption via Structural Re-parameterization,
# 2023. It is folded into the next layer.


class LinearBottleneck(nn.Module):
    """`h(x) = x + s·(U·(D·x + a) + b)`, with U in groups: each part of the output sees one part of
    the bottleneck.
    """

    def __init__(self, width: int, hidden: int, groups: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Conv1d(hidden, width, 1, groups=groups)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, *self.up.parameters()):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [B, L, d]."""
        change: Tensor = self.up(self.dropout(self.down(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.scale * change

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Fold h into the next linear layer, with weight [k, d] and bias [k]."""
        change = F.conv1d(self.down.weight, self.up.weight, groups=self.up.groups)  # U·D, [d, d]
        constant = self.up(self.down.bias[:, None])[:, 0]  # U·a + b
        return weight + self.scale * (weight @ change), bias + self.scale * (weight @ constant)


class Reparametrized(Tuned):
    """A CLIP with a `LinearBottleneck` after both norms of every block."""

    def __init__(self, run: Run, method: RepAdapter) -> None:
        super().__init__(run, method.loss)
        shape = (method.hidden, method.groups, method.scale, method.dropout)
        self.folds: list[tuple[str, LinearBottleneck]] = []  # with the name of the next layer
        for tower in method.towers:
            prefix = (
                "visual." if tower == "image" else "text." if hasattr(self.model, "text") else ""
            )
            for number, block in enumerate(blocks_of(self.model, tower)):
                for norm, name in ((block.ln_1, "attn.in_proj_"), (block.ln_2, "mlp.c_fc.")):
                    adapter = LinearBottleneck(width_of(block), *shape)
                    norm.register_forward_hook(
                        lambda _, __, output, adapter=adapter: adapter(output)
                    )
                    self.folds.append((f"{prefix}transformer.resblocks.{number}.{name}", adapter))
        self.extra.extend(adapter for _, adapter in self.folds)
        self.extra.extend(drop_path(self.model, method.towers, method.drop_path))

    @torch.no_grad()
    def clip(self) -> dict[str, Tensor]:
        """Fold every adapter exactly into the next layer."""
        weights = dict(self.model.state_dict())
        for layer, adapter in self.folds:
            names = [f"{layer}weight", f"{layer}bias"]
            weights.update(
                zip(names, adapter.folded(*(weights[name] for name in names)), strict=True)
            )
        return weights


@dataclass(frozen=True)
class RepAdapter(Method):
    """RepAdapter with the settings of its code, without MixUp and RandAugment.

    `scale` is s, which the code chooses from 0.1, 0.5, 1, 5 and 10 on validation data; dropout
    (DO) is in the bottleneck, drop-path (DP) in the pretrained layers.
    """

    settings: Mapping[str, Any] = paper(
        batch_size=64,
        epochs=100,
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        weight_decay=1e-4,
        grad_clip=None,
        crop_scale=0.08,
        flip=True,
    )
    loss: Loss = "classes"
    towers: tuple[str, ...] = ("image", "text")
    hidden: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1
    drop_path: float = 0.1

    def start(self, run: Run) -> System:
        return Reparametrized(run, self)


# LoRA. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022; with the settings
# of Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPRW 2024, who
# adapt both towers of CLIP.


class LowRank(Tuned):
    """`W + (a/√r)·B·A` for the weight [3d, d] of queries, keys and values, which share A.

    peft's layer for `nn.MultiheadAttention` also adapts the output projection, and counts its
    change twice (0.21.2; huggingface/peft#3774), so `target_parameters` names the parameter.
    """

    def __init__(self, run: Run, loss: Loss, rank: int, scale: int) -> None:
        from peft import LoraConfig, get_peft_model  # takes seconds to import

        super().__init__(run, loss)
        for tower in ("image", "text"):
            blocks_of(self.model, tower)  # raises for unsupported towers
        config = LoraConfig(
            r=rank,
            lora_alpha=scale,
            use_rslora=True,  # a/√r, as in the authors' code
            target_modules=[],
            target_parameters=["attn.in_proj_weight"],
        )
        # A list, so that torch does not register the model's modules twice.
        self._peft = [get_peft_model(self.model, config)]

    def clip(self) -> dict[str, Tensor]:
        """Merge every change exactly into the weights."""
        weights: dict[str, Tensor] = copy.deepcopy(self._peft[0]).merge_and_unload().state_dict()
        return weights


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA in both towers, without dropout, which peft does not support for parameters; `scale` is
    a, called alpha in LoRA's paper.
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


# CLIP-SVD. Koleilat, Rivaz and Xiao, Singular Value Few-shot Adaptation of Vision-Language Models,
# 2025: only the singular values of the matrices of both towers learn.


class Spectrum(nn.Module):
    """`W = U·diag(s)·Vᵀ`, whose s learn; a weight [3d, d] of queries, keys and values has three."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(
            torch.stack(weight.detach().chunk(parts)), full_matrices=False
        )
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.left: Tensor
        self.right: Tensor
        self.values = nn.Parameter(values)

    def forward(self, weight: Tensor) -> Tensor:
        """Compute the weight that replaces the base's."""
        with torch.autocast(weight.device.type, enabled=False):  # 16 bits would change the weight
            product = (self.left * self.values[:, None]) @ self.right
        return product.flatten(0, 1)


class SingularValues(Tuned):
    """A CLIP with a `Spectrum` instead of each matrix of its blocks."""

    def __init__(self, run: Run, loss: Loss) -> None:
        super().__init__(run, loss)
        self.names = list(self.model.state_dict())
        for tower in ("image", "text"):
            for block in blocks_of(self.model, tower):
                for layer, name, parts in (
                    (block.attn, "in_proj_weight", 3),
                    (block.attn.out_proj, "weight", 1),
                    (block.mlp.c_fc, "weight", 1),
                    (block.mlp.c_proj, "weight", 1),
                ):
                    spectrum = Spectrum(getattr(layer, name), parts)
                    parametrize.register_parametrization(layer, name, spectrum, unsafe=True)

    def forward(self, batch: Batch) -> Tensor:
        with parametrize.cached():  # attention reads its weight several times
            return super().forward(batch)

    @torch.no_grad()
    def clip(self) -> dict[str, Tensor]:
        """Multiply out every spectrum, which is exact and linear in the singular values."""
        weights = {}
        for name in self.names:
            layer, _, last = name.rpartition(".")
            weights[name] = getattr(self.model.get_submodule(layer), last).detach()
        return weights


@dataclass(frozen=True)
class CLIPSVD(Method):
    """CLIP-SVD in both towers; its code has a rate for each data set, and 1e-3 is our choice."""

    settings: Mapping[str, Any] = paper(
        batch_size=32,
        epochs=50,
        learning_rate=1e-3,
        min_learning_rate=1e-6,
        weight_decay=0.01,
        warmup_steps=0,
        grad_clip=None,
        crop_scale=0.08,
        flip=True,
    )
    loss: Loss = "classes"

    def start(self, run: Run) -> System:
        return SingularValues(run, self.loss)
