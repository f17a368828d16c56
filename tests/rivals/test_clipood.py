"""CLIPood: the margins, what learns, and the average over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from rivals.clipood import CLIPood, Margins
from rivals.fit import fit
from rivals.run import Run


def beta_density(place: float, beta: float) -> float:
    """Of Beta(β, β), from torch's own distribution."""
    return math.exp(
        torch.distributions.Beta(beta, beta).log_prob(torch.tensor(place, dtype=torch.float64))
    )


def test_margins_follow_the_texts_of_the_classes(make_run: Callable[..., Run]):
    system = CLIPood(margin=0.3).start(make_run())
    pixels = torch.randn(4, 3, 32, 32)
    labels = torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        loss = float(system({"pixels": pixels, "labels": labels, "texts": []}))
        model = system.model
        images = F.normalize(model.encode_image(pixels), dim=-1)
        scale = model.logit_scale.exp()
        texts = model.encode_text(
            system.tokenizer([f"a photo of a {name}." for name in ("blue", "green", "red")])
        )
        texts = F.normalize(texts, dim=-1)
    rows = []
    for image, label in zip(images, labels.tolist(), strict=True):
        others = [float(scale * (image @ text + 0.3 * (1 - texts[label] @ text))) for text in texts]
        rows.append(math.log(sum(math.exp(other - others[label]) for other in others)))
    assert loss == pytest.approx(sum(rows) / 4, abs=1e-3)


def test_image_tower_ends_as_the_weighted_mean_of_its_steps(make_run: Callable[..., Run]):
    run = make_run(steps=3, learning_rate=1e-2)
    method = CLIPood(beta=0.3)
    system = method.start(run)
    assert isinstance(system, Margins)
    seen = [[parameter.detach().clone() for parameter in system.learning()]]
    after = system.after_step

    def watch(step: int, steps: int) -> None:
        seen.append([parameter.detach().clone() for parameter in system.learning()])
        after(step, steps)

    system.after_step = watch  # type: ignore[method-assign]
    frozen = {
        name: value.clone() for name, value in system.state_dict().items() if "visual." not in name
    }
    fit(system, method.optimizer(system, run), run)
    weights = [beta_density((step + 0.5) / 4, 0.3) for step in range(4)]
    assert weights[0] > weights[1] < weights[3]
    for number, end in enumerate(system.learning()):
        mean = sum(weight * of[number] for weight, of in zip(weights, seen, strict=True)) / sum(
            weights
        )
        torch.testing.assert_close(end.detach(), mean, rtol=0, atol=1e-6)
    assert all(torch.equal(system.state_dict()[name], value) for name, value in frozen.items())
    weights_of_clip = system.clip()
    assert weights_of_clip is not None
    assert weights_of_clip.keys() == run.of({}).base.model.state_dict().keys()
