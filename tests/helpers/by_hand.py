"""Training once more, from the paper's equations; only the recipe comes from `radapter_serve`."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.transforms import RandomResizedCrop

from radapter_serve.training import Recipe

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """An image, its label, and the texts of which one or several are drawn."""

    image: Image.Image
    label: int
    texts: Sequence[str]
    # All its labels, where there may be several, with the texts of each
    several: Mapping[int, Sequence[str]] = field(default_factory=dict)


class ClipWithAdapters:
    """An open_clip model with a linear map behind every attention and feed-forward: `X + α·γ·X·W`.

    Weights are by the name of the adapted layer, W transposed [d, d], or `up` [d, r] and `down`
    [r, d]; None puts zeros, which change nothing.
    """

    def __init__(self, name: str, weights: Mapping[str, Tensor] | None = None) -> None:
        model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.model = model.eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(name)
        self.alpha = 1.0
        self.keys: list[str] = []
        self.gates: dict[str, float] = {}
        start: Weights = {}
        for key, layer in self.model.named_modules():
            if key.endswith((".attn.out_proj", ".mlp.c_proj")):
                self.keys.append(key)
                start[key] = torch.zeros(layer.out_features, layer.out_features)
                adapted = self.model.get_submodule(key.removesuffix(".out_proj"))
                adapted.register_forward_hook(self._hook(key))
        self.weights = {
            k: v.clone().requires_grad_()
            for k, v in (start if weights is None else weights).items()
        }

    def _hook(self, key: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            x, *rest = output if isinstance(output, tuple) else (output,)
            if key in self.weights:
                added = x @ self.weights[key].T
            else:
                added = x @ self.weights[f"{key}.down"].T @ self.weights[f"{key}.up"].T
            changed = x + self.alpha * self.gates.get(key, 1.0) * added
            return (changed, *rest) if rest else changed

        return hook

    def images(self, pixels: Tensor) -> Tensor:
        """Unit length, [B, D]."""
        return F.normalize(self.model.encode_image(pixels), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit length, [B, D]."""
        return F.normalize(self.model.encode_text(self.tokenize(list(texts))), dim=-1)

    @contextmanager
    def at(self, alpha: float) -> Iterator[None]:
        """Within the block the adapters count α times."""
        self.alpha = alpha
        with torch.no_grad():
            yield
        self.alpha = 1.0


def mpm_nce_by_hand(
    f: Tensor, g: Tensor, y: Tensor, scale: float, delta: float, epsilon: float
) -> Tensor:
    """The loss of N images f and M texts g; y [N, M] says which belong together."""

    def one_way(logits: Tensor, y: Tensor) -> Tensor:
        positives = y.sum(1, keepdim=True)
        negatives = y.shape[1] - positives
        smoothing = epsilon * (negatives > 0)  # a row without negatives keeps all on its positives
        targets = y * (1 - smoothing) / positives + (1 - y) * smoothing / negatives.clamp(min=1)
        return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()

    y = y.float()
    logits = scale * (f @ g.T + delta * (1 - y))
    texts = [number for number in range(y.shape[1]) if y[:, number].any()]
    return (one_way(logits, y) + one_way(logits.T[texts], y.T[texts])) / 2


def pairwise_by_hand(
    f: Tensor, g: Tensor, y: Tensor, scale: float, bias: float, delta: float, epsilon: float
) -> Tensor:
    """SigLIP's loss of N images f and M texts g, with margin and smoothing; y as above."""
    y = y.float()
    logits = scale * (f @ g.T + delta * (1 - y)) + bias
    targets = y * (1 - epsilon) + (1 - y) * epsilon / (1 - y).sum(1, keepdim=True).clamp(min=1)
    each = targets * F.softplus(-logits) + (1 - targets) * F.softplus(logits)
    return each.sum() / len(f)


def words_without(classes: Sequence[str]) -> list[str]:
    """ImageNet's names but for those in which one of some names stands as words."""
    names = [re.compile(rf"(?<!\S){re.escape(name)}(?!\S)", re.IGNORECASE) for name in classes]
    every = dict.fromkeys(open_clip.IMAGENET_CLASSNAMES)
    return [word for word in every if not any(name.search(word) for name in names)]


def train_by_hand(
    recipe: Recipe,
    pairs: Sequence[Pair],
    start: Mapping[str, Tensor] | None = None,
    see: Callable[[int, Weights], None] = lambda step, average: None,
    prompts: Sequence[Sequence[str]] = (),
    words_of: Sequence[str] = (),
    words_drawn: int = 64,
) -> Weights:
    """The averaged adapters after all of a recipe's steps, in fp32 and in one process.

    `see` is called with each step, from 1, and the average after it; `prompts` of each class are
    for `negative_classes`, and the classes `words_of` for `preserve_words`, which draws some words.
    """
    assert recipe.steps is not None and recipe.momentum is not None
    clip = ClipWithAdapters(recipe.architecture, start)
    optimizer = torch.optim.AdamW(clip.weights.values(), lr=1.0, weight_decay=recipe.weight_decay)
    scale = clip.model.logit_scale.exp().item()
    bias = clip.model.logit_bias
    raw = {name: w.detach() * (not recipe.bias_correction) for name, w in clip.weights.items()}
    average: Weights = {}
    parts = _parts(recipe, pairs, clip)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = _rate(recipe, step)
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        p = recipe.drop
        for key, value in zip(
            clip.keys, torch.rand(len(clip.keys), generator=draw).tolist(), strict=True
        ):
            clip.gates[key] = 0.0 if value < p else 1 / (1 - p)
        optimizer.zero_grad(set_to_none=False)
        for _ in range(recipe.accumulate):
            pixels, y, texts, classes = next(parts)
            if recipe.positives == "single":
                y = torch.eye(len(pixels), dtype=torch.bool)
            others = _other_prompts(recipe, step, prompts, classes)
            y = torch.cat([y, torch.zeros(len(pixels), len(others), dtype=torch.bool)], dim=1)
            f = clip.images(pixels)
            g = clip.texts([*texts, *others.values()])
            if bias is None:
                loss = mpm_nce_by_hand(f, g, y, scale, recipe.delta, recipe.epsilon)
            else:
                loss = pairwise_by_hand(f, g, y, scale, bias.item(), recipe.delta, recipe.epsilon)
            with clip.at(0.0):
                base = clip.images(pixels)
            loss = loss + recipe.preserve * (1 - F.cosine_similarity(f, base, dim=1)).mean()
            if recipe.preserve_words:
                words = words_without(words_of)
                chosen = torch.randperm(len(words), generator=draw)[:words_drawn].tolist()
                drawn_words = [words[place] for place in chosen]
                with clip.at(0.0):
                    of_base = torch.softmax(scale * base @ clip.texts(drawn_words).T, dim=1)
                q = torch.softmax(scale * f @ clip.texts(drawn_words).T, dim=1)
                divergence = (of_base * (of_base.log() - q.log())).sum(dim=1).mean()
                loss = loss + recipe.preserve_words * divergence
            (loss / recipe.accumulate).backward()
        if recipe.grad_clip is not None:
            gradients = [weight.grad for weight in clip.weights.values() if weight.grad is not None]
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
            for gradient in gradients:
                gradient *= min(1.0, recipe.grad_clip / norm)
        optimizer.step()
        m = recipe.momentum
        raw = {
            name: m * raw[name] + (1 - m) * weight.detach() for name, weight in clip.weights.items()
        }
        corrected = 1 - m ** (step + 1) if recipe.bias_correction else 1.0
        average = {name: value / corrected for name, value in raw.items()}
        see(step + 1, average)
    return average


def assert_same(weights: Weights, expected: Weights) -> None:
    """Refuse adapters that differ by more than rounding.

    AdamW's first step is the sign of the gradient, however small that is. Rounding decides it where
    the gradient is next to nothing, and another processor rounds in another way. So a few weights
    may be far from what is expected, and all the others together are near.
    """
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        difference = weights[name] - value
        far = difference.abs() > 0.05 * value.abs().max()
        assert far.sum() <= max(2, value.numel() // 1000), name
        assert (difference * ~far).norm() <= 5e-3 * value.norm(), name


@dataclass(frozen=True)
class Step:
    """The input of the optimizer in one step, where AdamW does not yet hide how large it is."""

    rate: float
    weight_decay: float
    gradients: Sequence[Tensor]


@contextmanager
def steps_taken() -> Iterator[list[Step]]:
    """The steps of all optimizers within the block."""
    steps: list[Step] = []

    def see(optimizer: Optimizer, *arguments: Any) -> None:
        (group,) = optimizer.param_groups
        gradients = [parameter.grad.clone() for parameter in group["params"]]
        steps.append(Step(group["lr"], group["weight_decay"], gradients))

    handle = register_optimizer_step_pre_hook(see)
    try:
        yield steps
    finally:
        handle.remove()


def assert_same_steps(steps: Sequence[Step], expected: Sequence[Step]) -> None:
    """Refuse steps that differ by more than rounding, and what it does to the steps after it."""
    assert len(steps) == len(expected)
    for number, (step, reference) in enumerate(zip(steps, expected, strict=True)):
        assert math.isclose(step.rate, reference.rate, rel_tol=1e-6), number
        assert step.weight_decay == reference.weight_decay, number
        for gradient, value in zip(step.gradients, reference.gradients, strict=True):
            assert (gradient - value).norm() <= 2e-2 * value.norm(), number


def _rate(recipe: Recipe, step: int) -> float:
    assert recipe.steps is not None and recipe.warmup_steps is not None
    low = recipe.min_learning_rate
    high = recipe.learning_rate
    warm = recipe.warmup_steps
    if step < warm:
        return high * (step + 1) / warm
    gone = (step - warm) / (recipe.steps - warm)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * gone))


def _parts(
    recipe: Recipe, pairs: Sequence[Pair], clip: ClipWithAdapters
) -> Iterator[tuple[Tensor, Tensor, list[str], set[int]]]:
    """Pixels, which text belongs to which image, texts, and the images' classes of each batch."""
    size = recipe.batch_size // recipe.accumulate
    epoch = 0
    while True:
        order = torch.randperm(
            len(pairs), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        )
        for chunk in order.split(size):
            if len(chunk) < size:
                continue
            pixels = []
            texts = []
            of_text: list[int] = []
            of_image: list[set[int]] = []
            for index in chunk.tolist():
                pair = pairs[index]
                draw = random.Random(f"{recipe.seed}-{epoch}-{index}")
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(draw.getrandbits(63))
                    pixels.append(_augmented(pair.image, recipe, clip))
                label = pair.label
                if len(pair.several) > 1:
                    label = draw.choice(list(pair.several))
                texts += _drawn_texts(pair.several.get(label, pair.texts), recipe, draw)
                of_text += [label] * recipe.captions_per_image
                of_image.append({pair.label, *pair.several})
            y = torch.tensor([[text in image for text in of_text] for image in of_image])
            yield torch.stack(pixels), y, texts, set().union(*of_image)
        epoch += 1


def _other_prompts(
    recipe: Recipe, step: int, prompts: Sequence[Sequence[str]], classes: set[int]
) -> dict[int, str]:
    """Prompts of classes that a batch has not, by the draw that the seed gives to a step."""
    draw = random.Random(f"{recipe.seed}-{step}")
    absent = sorted(set(range(len(prompts))) - classes)
    chosen = draw.sample(absent, min(recipe.negative_classes, len(absent)))
    return {number: draw.choice(prompts[number]) for number in chosen}


def _augmented(image: Image.Image, recipe: Recipe, clip: ClipWithAdapters) -> Tensor:
    top, left, height, width = RandomResizedCrop.get_params(
        image, [recipe.crop_scale, 1.0], [3 / 4, 4 / 3]
    )
    visual: Any = clip.model.visual
    crop = image.crop((left, top, left + width, top + height)).resize(
        visual.image_size, Image.Resampling.BICUBIC
    )
    if recipe.flip and torch.rand(1).item() < 0.5:
        crop = ImageOps.mirror(crop)
    config = visual.preprocess_cfg
    values = (np.asarray(crop) / 255 - config["mean"]) / config["std"]
    return torch.from_numpy(values).float().permute(2, 0, 1)


def _drawn_texts(texts: Sequence[str], recipe: Recipe, draw: random.Random) -> list[str]:
    if recipe.task != "retrieval":
        return [draw.choice(texts)]
    shuffled = draw.sample(texts, len(texts))
    return [shuffled[number % len(texts)] for number in range(recipe.captions_per_image)]


def accuracy_by_hand(
    clip: ClipWithAdapters, alpha: float, pairs: Sequence[Pair], prompts: Sequence[Sequence[str]]
) -> float:
    """Zero-shot accuracy at α, per cent: a class is the mean of the embeddings of its prompts."""
    with clip.at(alpha):
        classes = torch.stack([F.normalize(clip.texts(texts).mean(0), dim=0) for texts in prompts])
        answers = (clip.images(_prepared(clip, pairs)) @ classes.T).argmax(1)
    return 100 * (answers == torch.tensor([pair.label for pair in pairs])).float().mean().item()


def recall_by_hand(
    clip: ClipWithAdapters, alpha: float, pairs: Sequence[Pair]
) -> tuple[float, float]:
    """Recall at 1 at α, per cent: of images looked for by their texts, and of texts by images."""
    owner = torch.tensor([number for number, pair in enumerate(pairs) for _ in pair.texts])
    with clip.at(alpha):
        scores = (
            clip.texts([text for pair in pairs for text in pair.texts])
            @ clip.images(_prepared(clip, pairs)).T
        )
    image = scores.argmax(1) == owner
    text = owner[scores.argmax(0)] == torch.arange(len(pairs))
    return 100 * image.float().mean().item(), 100 * text.float().mean().item()


def _prepared(clip: ClipWithAdapters, pairs: Sequence[Pair]) -> Tensor:
    return torch.stack([clip.transform(pair.image) for pair in pairs])
