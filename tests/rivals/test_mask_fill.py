"""Mask-Fill against torch's own attention and the paper's definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rivals.full import Classifier
from rivals.mask_fill import Masked, MaskFill
from rivals.run import Run

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture
def system(make_run: Callable[..., Run]) -> Masked:
    started = MaskFill().start(make_run())
    assert isinstance(started, Masked)
    return started


def relevance_by_torch(system: Masked, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """By the maps that `nn.MultiheadAttention` itself computes on its slow way, which can give
    them.
    """
    maps: list[torch.Tensor] = []

    def softmax(scores: torch.Tensor, dim: int, real: Any = F.softmax) -> torch.Tensor:
        maps.append(
            real(scores, dim=dim).view(len(PIXELS), 2, 5, 5)
        )  # two heads; 2 x 2 patches and the class token
        return maps[-1].view(scores.shape)

    monkeypatch.setattr(F, "softmax", softmax)
    for block in system.model.visual.transformer.resblocks:

        def attention(
            q_x: Any,
            k_x: Any = None,
            v_x: Any = None,
            attn_mask: Any = None,
            layer: Any = block.attn,
        ) -> Any:
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
    with torch.no_grad():  # the tower is as before
        torch.testing.assert_close(system.logits(PIXELS), Classifier.logits(system, PIXELS))
    assert all(
        "forward" not in vars(block.attn) for block in system.model.visual.transformer.resblocks
    )
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
