"""Fine-tuning of whole towers: probe, line, soup, Mask-Fill against torch, and CLIPood."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from radapter_serve.clip.towers import normalised
from radapter_serve.contract.labels import class_probabilities
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import EvaluationSet
from rivals.cells import judge, systems_of
from rivals.flyp import CLIPood, Margins
from rivals.full import (
    Classifier,
    FullFineTuning,
    Masked,
    MaskFill,
    Mixed,
    ProbeThenFineTuning,
    UniformSoup,
)
from rivals.method import Cost, Learned, Run, fit, learned
from rivals.tables import METHODS

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


def test_classes_are_rows_of_the_head_with_their_bias(make_run: Callable[..., Run]):
    run = make_run()
    system = Classifier(run)
    with torch.no_grad():
        system.head.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
        scores = (
            system.embed_images(PIXELS) @ system.embed_classes(["red", "blue, azure"], ["a {}"]).T
        )
        torch.testing.assert_close(scores, system.logits(PIXELS)[:, [2, 0]])
        (candidate,) = systems_of(Learned(system, Cost()), run.base, [1.0])
        with pytest.raises(RAdapterError, match="not a plain CLIP, so it can't segment"):
            candidate.dense_method(None)
        release = candidate.loaded.release
        probabilities = class_probabilities(
            system.logits(PIXELS).numpy(), release.logit_scale, release.logit_bias
        )
        torch.testing.assert_close(
            torch.from_numpy(probabilities), system.logits(PIXELS).softmax(dim=1)
        )
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
        (candidate,) = systems_of(Learned(system, Cost()), run.base, [1.0])
        pixels = np.stack([same.prepare(candidate, number) for number in range(len(same))])
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
    parameters = METHODS[name].start(make_run()).named_parameters()
    assert all(value.requires_grad == key.startswith(parts) for key, value in parameters)


@pytest.mark.slow
def test_lp_ft_starts_from_the_probe(make_run: Callable[..., Run]):
    run = make_run()
    method = ProbeThenFineTuning()
    standing = dataclasses.replace(method, settings={**method.settings, "learning_rate": 1e-12})
    probe = learned(method.probe, run)
    trained = learned(standing, run)
    torch.testing.assert_close(
        trained.end["head.weight"], probe.end["head.weight"], rtol=0, atol=1e-7
    )
    assert not torch.equal(probe.end["head.weight"], probe.start["head.weight"])
    assert trained.cost.seconds > probe.cost.seconds > 0
    assert trained.cost.parameters == learned(FullFineTuning(), run).cost.parameters


@pytest.mark.slow
def test_soup_is_the_mean_of_its_members(make_run: Callable[..., Run]):
    run = make_run()
    method = UniformSoup(members=3)
    trained = learned(method, run)
    members = [learned(recipe, run).at(1.0).state_dict() for recipe in method.recipes()]
    for name, value in trained.system.state_dict().items():
        torch.testing.assert_close(
            value, torch.stack([member[name] for member in members]).mean(dim=0)
        )
    assert len({str(recipe) for recipe in method.recipes()}) == 3
    assert method.recipes() == UniformSoup(members=5).recipes()[:3]
    assert trained.cost.parameters == 3 * learned(FullFineTuning(), run).cost.parameters


def test_mixed_images_have_mixed_and_smoothed_labels(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    system = Mixed(make_run(), smoothing=0.3, mixup=0.5)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.8))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))
    with torch.no_grad():
        logs = system.logits(0.8 * PIXELS + 0.2 * PIXELS.flip(0)).log_softmax(dim=1)
        loss = system({"pixels": PIXELS, "labels": LABELS})
    targets = 0.8 * torch.eye(3)[LABELS] + 0.2 * torch.eye(3)[LABELS.flip(0)]
    torch.testing.assert_close(loss, -((0.7 * targets + 0.1) * logs).sum(dim=1).mean())


@pytest.fixture
def system(make_run: Callable[..., Run]) -> Masked:
    started = MaskFill().start(make_run())
    assert isinstance(started, Masked)
    return started


def relevance_by_torch(system: Masked, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """By the maps that `nn.MultiheadAttention` computes on its slow way, which can give them."""
    maps: list[torch.Tensor] = []

    def softmax(scores: torch.Tensor, dim: int, real: Any = F.softmax) -> torch.Tensor:
        # Two heads; 2 x 2 patches and the class token.
        maps.append(real(scores, dim=dim).view(len(PIXELS), 2, 5, 5))
        return maps[-1].view(scores.shape)

    monkeypatch.setattr(F, "softmax", softmax)
    for block in system.model.visual.transformer.resblocks:

        def attention(q_x: Any, layer: Any = block.attn, **_: Any) -> Any:
            return layer(q_x, q_x, q_x, need_weights=True)[0]

        monkeypatch.setattr(block, "attention", attention)
    score = sum(system.logits(PIXELS)[row, label] for row, label in enumerate(LABELS))
    slopes = torch.autograd.grad(score, maps)  # type: ignore[arg-type]
    monkeypatch.undo()
    rows = []
    for image in range(len(PIXELS)):
        relevance = torch.eye(5)
        for weights, slope in zip(maps, slopes, strict=True):
            product = torch.relu(weights[image] * slope[image]).mean(dim=0)
            relevance = relevance + product @ relevance
        rows.append(relevance[0, 1:].reshape(2, 2))
    return torch.stack(rows).detach()


def test_relevance_is_that_of_torchs_attention(system: Masked, monkeypatch: pytest.MonkeyPatch):
    expected = relevance_by_torch(system, monkeypatch)
    torch.testing.assert_close(system.relevance(PIXELS, LABELS).detach(), expected)
    blocks = system.model.visual.transformer.resblocks  # the tower is as before
    assert all("forward" not in vars(block.attn) for block in blocks)
    patches = system.object_patches(PIXELS, LABELS)
    assert torch.equal(patches, expected > 0.3 * expected.amax(dim=(1, 2), keepdim=True))
    assert patches.any()


def test_masked_patches_are_those_of_another_image(system: Masked):
    patches = torch.zeros(4, 2, 2, dtype=torch.bool)
    patches[0, 1, 0] = patches[2, 0, 1] = True  # row, column; a patch is 16 pixels wide
    filled = system.filled(PIXELS, patches, torch.tensor([3, 0, 1, 2]))
    expected = PIXELS.clone()
    expected[0, :, 16:, :16] = PIXELS[3, :, 16:, :16]
    expected[2, :, :16, 16:] = PIXELS[1, :, :16, 16:]
    assert torch.equal(filled, expected)


def test_loss_adds_the_distance_to_pretrained_features(
    system: Masked, monkeypatch: pytest.MonkeyPatch
):
    with torch.no_grad():
        for parameter in system.model.visual.parameters():
            parameter.mul_(1.1)  # as if it had learned
    order = torch.tensor([1, 2, 3, 0])
    monkeypatch.setattr(torch, "randperm", lambda n, **_: order)
    masked = system.filled(PIXELS, system.object_patches(PIXELS, LABELS), order)
    with torch.no_grad():
        distance = (system.model.visual(masked) - system.teacher(masked)).square().mean()
        expected = F.cross_entropy(system.logits(PIXELS), LABELS) + 30 * distance
        torch.testing.assert_close(system({"pixels": PIXELS, "labels": LABELS}), expected)
    assert distance > 0


def test_margins_follow_the_texts_of_the_classes(make_run: Callable[..., Run]):
    system = CLIPood(margin=0.3).start(make_run())
    pixels = torch.randn(4, 3, 32, 32)
    labels = torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        loss = float(system({"pixels": pixels, "labels": labels, "texts": []}))
        images = system.model.encode_image(pixels, normalize=True)
        scale = system.model.logit_scale.exp()
        prompts = [f"a photo of a {name}." for name in ("blue", "green", "red")]
        texts = system.model.encode_text(system.tokenizer(prompts), normalize=True)
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
    weights = [scipy.stats.beta.pdf((step + 0.5) / 4, 0.3, 0.3) for step in range(4)]
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
