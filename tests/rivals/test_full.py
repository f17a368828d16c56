"""Full fine-tuning and what is made of it: the probe before, the line between the ends, the soup of
many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import normalised
from radapter_serve.contract.labels import class_probabilities
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import zero_shot_classifier
from radapter_serve.evaluation.image_sets import EvaluationSet
from rivals.full import Classifier, FullFineTuning, ProbeThenFineTuning
from rivals.judge import judge, systems_of
from rivals.method import learned
from rivals.methods import METHODS
from rivals.run import Run
from rivals.soup import Mixed, UniformSoup
from rivals.system import Cost, Learned

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


def test_head_starts_as_the_zero_shot_classifier(make_run: Callable[..., Run]):
    run = make_run()
    system = Classifier(run)
    base = load_base(run.recipe.architecture)
    model: Any = base.model
    classifier = zero_shot_classifier(
        model, base.tokenizer, ["blue", "green", "red"], ["a photo of a {}."]
    )
    with torch.no_grad():
        images = F.normalize(model.encode_image(PIXELS), dim=-1)
        expected = model.logit_scale.exp() * images @ classifier.T
        torch.testing.assert_close(system.logits(PIXELS), expected)
        loss = system({"pixels": PIXELS, "labels": LABELS})
        torch.testing.assert_close(
            loss, -expected.log_softmax(dim=1)[torch.arange(4), LABELS].mean()
        )


def test_classes_are_rows_of_the_head_with_their_bias(make_run: Callable[..., Run]):
    run = make_run()
    system = Classifier(run)
    with torch.no_grad():
        system.head.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
        scores = (
            system.embed_images(PIXELS) @ system.embed_classes(["red", "blue, azure"], ["a {}"]).T
        )
        torch.testing.assert_close(scores, system.logits(PIXELS)[:, [2, 0]])
        (own,) = systems_of(Learned(system, Cost()), run.base, [1.0])
        release = own.loaded.release
        found = class_probabilities(
            system.logits(PIXELS).numpy(), release.logit_scale, release.logit_bias
        )
        torch.testing.assert_close(torch.from_numpy(found), system.logits(PIXELS).softmax(dim=1))
    with pytest.raises(RAdapterError, match="has not learned the class 'pink'"):
        system.embed_classes(["red", "pink"], ["a {}"])


def test_classes_of_one_name_are_different_rows(
    make_run: Callable[..., Run], sets: list[EvaluationSet]
):
    """As ImageNet's two missiles: the judge takes each for itself, too."""
    run = make_run()
    system = Classifier(run)
    system.classes = ["missile", "red", "missile"]
    with torch.no_grad():
        system.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        rows = torch.cat([system.head.weight, system.head.bias[:, None]], dim=1)
        torch.testing.assert_close(
            system.embed_classes(["missile", "missile", "red"], []), rows[[0, 2, 1]]
        )
        same = dataclasses.replace(sets[0], classes=system.classes)  # type: ignore[call-arg]
        [row] = judge(Learned(system, Cost()), run, [same])
        (own,) = systems_of(Learned(system, Cost()), run.base, [1.0])
        pixels = np.stack([same.prepare(own, number) for number in range(len(same))])
        images = normalised(pixels, run.base.preprocess, "cpu")
        right = system.logits(images).argmax(dim=1).numpy() == same.labels  # type: ignore[attr-defined]
    assert 0 < right.mean() == row.metrics["acc1"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lp", ("head.",)),
        ("ft", ("head.", "model.visual.")),
        ("flyp", ("model.",)),
        ("mask-fill", ("head.", "model.visual.")),
    ],
)
def test_these_parts_learn_and_no_others(
    name: str, parts: tuple[str, ...], make_run: Callable[..., Run]
):
    found = learned(METHODS[name], make_run())
    assert all(key.startswith(parts) for key in found.end)
    assert all(any(key.startswith(part) for key in found.end) for part in parts)
    state = dict(found.system.named_parameters())
    counted = sum(state[key].numel() for key in state if key.startswith(parts))
    assert found.cost.parameters == counted


def test_line_is_an_interpolation(make_run: Callable[..., Run]):
    found = learned(FullFineTuning(alpha=0.5), make_run())
    system = found.at(0.25)
    for name, value in system.state_dict().items():
        if name in found.end:
            torch.testing.assert_close(value, 0.75 * found.start[name] + 0.25 * found.end[name])
    assert "head.bias" in found.end


@pytest.mark.slow
def test_lp_ft_starts_from_the_probe(make_run: Callable[..., Run]):
    run = make_run()
    method = ProbeThenFineTuning()
    standing = dataclasses.replace(method, settings={**method.settings, "learning_rate": 1e-12})
    probe = learned(method.probe, run)
    found = learned(standing, run)
    torch.testing.assert_close(
        found.end["head.weight"], probe.end["head.weight"], rtol=0, atol=1e-7
    )
    assert not torch.equal(probe.end["head.weight"], probe.start["head.weight"])
    assert found.cost.seconds > probe.cost.seconds > 0
    assert found.cost.parameters == learned(FullFineTuning(), run).cost.parameters


@pytest.mark.slow
def test_soup_is_the_mean_of_its_members(make_run: Callable[..., Run]):
    run = make_run()
    method = UniformSoup(members=3)
    found = learned(method, run)
    members = [learned(recipe, run).at(1.0).state_dict() for recipe in method.recipes()]
    for name, value in found.system.state_dict().items():
        torch.testing.assert_close(
            value, torch.stack([member[name] for member in members]).mean(dim=0)
        )
    assert len({str(recipe) for recipe in method.recipes()}) == 3
    assert method.recipes() == UniformSoup(members=5).recipes()[:3]
    assert found.cost.parameters == 3 * learned(FullFineTuning(), run).cost.parameters


def test_mixed_images_have_mixed_and_smoothed_labels(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    system = Mixed(make_run(), smoothing=0.3, mixup=0.5)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.8))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))
    with torch.no_grad():
        logs = system.logits(0.8 * PIXELS + 0.2 * PIXELS.flip(0)).log_softmax(dim=1)
        found = system({"pixels": PIXELS, "labels": LABELS})
    targets = 0.8 * torch.eye(3)[LABELS] + 0.2 * torch.eye(3)[LABELS.flip(0)]
    torch.testing.assert_close(found, -((0.7 * targets + 0.1) * logs).sum(dim=1).mean())
