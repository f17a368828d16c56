"""Our regularizers in other methods: `preserve` and `preserve_words` of R-Adapter's recipe."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.training.loop import WORDS, vocabulary
from radapter_serve.training.loss import distance_to_base, divergence_from_base
from rivals.full import Classifier, FullFineTuning
from rivals.method import Learned, Method, Run, System, fit, labelled_images
from rivals.radapter import ZeroShot


class ImageTower(Classifier):
    """Learns with a head, and is judged by the base's text tower, so that it can name any class."""

    factor = System.factor
    embed_images = System.embed_images
    embed_classes = System.embed_classes

    def clip(self) -> dict[str, Tensor]:
        """Return the weights without the head."""
        weights: dict[str, Tensor] = self.model.state_dict()
        return weights


@dataclass(frozen=True)
class ImageTowerFineTuning(FullFineTuning):
    """FT or WiSE-FT without its head after training."""

    def classifier(self, run: Run) -> Classifier:
        return ImageTower(run)


@dataclass(frozen=True)
class Preserving(Method):
    """Another method, with our two regularizers added to its loss, weighted as in the recipe
    `small`; the texts of words learn if the method's text tower does.
    """

    method: Method = field(default_factory=ZeroShot)
    preserve: float = 10.0
    preserve_words: float = 3.0

    def start(self, run: Run) -> System:
        return self.method.start(run)

    def optimizer(self, system: System, run: Run) -> Optimizer:
        return self.method.optimizer(system, run)

    def learn(self, run: Run) -> Learned:
        base = copy.deepcopy(run.base.model).eval().requires_grad_(False)
        known = vocabulary(tuple(labelled_images(run).classes))
        system = self.start(run)
        base.to("cuda" if torch.cuda.is_available() else "cpu")
        embeds: list[Tensor] = []

        def keep(module: Any, args: Any, output: Tensor) -> None:
            embeds.append(output)

        def add(module: Any, args: Any, loss: Tensor) -> Tensor:
            # Take the embeddings that the method's own loss has computed, and compare them.
            images = torch.nn.functional.normalize(embeds.pop().float(), dim=-1)
            embeds.clear()
            places = torch.randperm(len(known))[:WORDS].tolist()
            tokens = system.tokenizer([known[place] for place in places]).to(system.device)
            with torch.no_grad():
                base_images = encode_image(base, args[0]["pixels"])
                base_words = encode_text(base, tokens)
            words = encode_text(system.model, tokens)
            divergence = divergence_from_base(images, words, base_images, base_words, system.scale)
            distance = distance_to_base(images, base_images)
            return loss + self.preserve * distance + self.preserve_words * divergence

        hooks = [system.model.visual.register_forward_hook(keep), system.register_forward_hook(add)]
        result = fit(system, self.optimizer(system, run), run)
        for hook in hooks:
            hook.remove()
        return result


def preserving(method: Method) -> Preserving:
    """Add our regularizers to a method."""
    return Preserving(method.settings, method.alpha, method)
