"""Every method learns, is kept and judged, and has as many parameters as the papers print."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.optim import SGD

from radapter_serve.data.labelled import Labelled
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import EvaluationSet
from rivals.adapters import CLIPSVD, AdaptFormer, LoRA, RepAdapter
from rivals.cells import judge
from rivals.flyp import FineTuneLikePretrain, Flyp
from rivals.full import UniformSoup
from rivals.method import Batch, Method, Run, System, fit, learned
from rivals.prompts import CoOp, MaPLe
from rivals.tables import METHODS


def small(name: str) -> Method:
    """A method with no more parts than it needs."""
    method = METHODS[name]
    return dataclasses.replace(method, members=2) if isinstance(method, UniformSoup) else method


ALWAYS = ("zero-shot", "ft", "r-adapter")  # the others take half a minute together


@pytest.mark.parametrize(
    "name",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_learns_is_kept_and_judged(
    name: str,
    make_run: Callable[..., Run],
    sets: list[EvaluationSet],
    monkeypatch: pytest.MonkeyPatch,
):
    method = small(name)
    run = make_run()
    first = learned(method, run)
    monkeypatch.setattr(type(method), "learn", None)  # a second time it is read
    again = learned(method, run)
    assert again.cost == first.cost
    assert first.end.keys() == again.end.keys()
    assert bool(first.end) == (name != "zero-shot")
    alphas = [1.0] if method.alpha is None else [0.0, method.alpha]
    rows = [judge(outcome, run.of(method.settings), sets, alphas) for outcome in (first, again)]
    assert [row.metrics for row in rows[0]] == [row.metrics for row in rows[1]]
    assert rows[0][0].n == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wise-ft", "wise-flyp", "r-adapter"])
def test_a_line_goes_from_zero_shot_to_what_was_learned(name: str, make_run: Callable[..., Run]):
    run = make_run()
    pixels = torch.randn(5, 3, 32, 32)
    classes = run.data.classes  # type: ignore[union-attr]

    @torch.no_grad()
    def scores(system: System) -> Tensor:
        cosines = (
            system.embed_images(pixels) @ system.embed_classes(classes, ["a photo of a {}."]).T
        )
        return cosines / cosines.norm()

    expected = scores(learned(METHODS["zero-shot"], run).system)
    outcome = learned(METHODS[name], run)
    torch.testing.assert_close(scores(outcome.at(0.0)), expected)
    state = outcome.at(0.25).state_dict()
    assert outcome.end
    for key, end in outcome.end.items():
        torch.testing.assert_close(state[key], 0.75 * outcome.start[key] + 0.25 * end)


@pytest.fixture
def run() -> Any:
    """A run whose base is a ViT-B-16 of shapes alone."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
    model.logit_scale = nn.Parameter(torch.tensor(4.6))
    base = SimpleNamespace(model=model, tokenizer=open_clip.get_tokenizer("ViT-B-16"))
    data = Labelled([], ["cat", "dog"], "image", "label")
    return SimpleNamespace(base=base, data=data, recipe=SimpleNamespace(seed=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, count",
    [
        (FineTuneLikePretrain(), 149_620_737),  # Table 1: 149.6 M
        (CoOp(), 16 * 512),  # Table 2: < .01 M
        (RepAdapter(), 399_744),
        (RepAdapter(towers=("text",), hidden=14), 270_672),  # Table 2: .27 M
        (MaPLe(), 9 * 2 * 512 + 9 * (512 * 768 + 768)),  # 3.55 M, as MaPLe's own paper says
        (AdaptFormer(), 12 * (2 * 768 * 64 + 768 + 64) + 12 * (2 * 512 * 64 + 512 + 64)),
        (CLIPSVD(), 12 * 6 * (768 + 512)),  # all matrices of each block
        (LoRA(rank=4), 12 * 4 * (768 + 3 * 768) + 12 * 4 * (512 + 3 * 512)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else str(value),
)
def test_parameters_in_vit_b_16(method: Method, count: int, run: Any):
    assert sum(parameter.numel() for parameter in method.start(run).learning()) == count


class Two(System):
    """Learns two numbers, each with a slope of 1."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.base)
        self.one = nn.Parameter(torch.zeros(()))
        self.other = nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []

    def forward(self, batch: Batch) -> Tensor:
        assert batch["pixels"].shape == (4 // 2, 3, 32, 32)
        assert len(batch["labels"]) == len(batch["texts"]) == 2
        return self.one + self.other

    def after_step(self, step: int, steps: int) -> None:
        self.seen.append(step / steps)


def test_rates_follow_the_schedule_and_the_share(make_run: Callable[..., Run]):
    run = make_run(steps=5, warmup_steps=2, learning_rate=0.1, grad_clip=None, accumulate=2)
    system = Two(run)
    groups: list[dict[str, Any]] = [
        {"params": [system.one]},
        {"params": [system.other], "share": 0.5},
    ]
    outcome = fit(system, SGD(groups, lr=0.0), run)
    plan = run.recipe.resolved(None)
    total = sum(plan.learning_rate(step) for step in range(5))
    assert -system.one.item() == pytest.approx(total)
    assert -system.other.item() == pytest.approx(total / 2)
    assert system.seen == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert outcome.cost.parameters == 2
    assert outcome.cost.seconds > 0 and outcome.cost.memory > 1e8

    # Gradients are clipped; torch divides by a norm that is larger by 1e-6.
    run = make_run(steps=1, learning_rate=0.1, grad_clip=0.5, accumulate=2)
    system = Two(run)
    fit(system, SGD(system.learning(), lr=0.0), run)
    assert -system.one.item() == pytest.approx(0.1 * 0.5 / 2**0.5, rel=1e-5)


def test_refuses_too_few_images_and_losses_that_are_not_finite(make_run: Callable[..., Run]):
    with pytest.raises(RAdapterError, match="batch_size is 32 but the data holds 24 images"):
        learned(METHODS["ft"], make_run(batch_size=32))
    run = make_run(accumulate=2)
    system = Two(run)
    system.one.data.fill_(torch.nan)
    with pytest.raises(RAdapterError, match="the loss is nan at step 0"):
        fit(system, SGD(system.learning(), lr=0.0), run)


def test_contrast_is_the_loss_of_clip(make_run: Callable[..., Run]):
    """With all classes, the prompt of the class that the batch lacks is one more for images."""
    texts = ["a photo of a red.", "a photo of a blue.", "a photo of a red."]
    pixels = torch.randn(3, 3, 32, 32)
    batch: Any = {"pixels": pixels, "texts": texts, "labels": torch.tensor([2, 0, 2])}
    base = make_run().base
    model: Any = base.model
    pairs = torch.arange(3)
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        tokens = base.tokenizer([*texts, "a photo of a green."])
        prompts = model.encode_text(tokens, normalize=True)
        scale = model.logit_scale.exp()
        plain = ClipLoss()(images, prompts[:3], scale)
        of_images = F.cross_entropy(scale * images @ prompts.T, pairs)
        more = (of_images + F.cross_entropy(scale * prompts[:3] @ images.T, pairs)) / 2
        adapters = AdaptFormer(loss="infonce", dropout=0.0)  # which start as the base
        for system, expected in (
            (Flyp(make_run()), plain),
            (adapters.start(make_run()), plain),
            (Flyp(make_run(negative_classes=1000)), more),
        ):
            torch.testing.assert_close(system(batch), expected)


def test_judge_counts_what_the_system_finds(
    make_run: Callable[..., Run], sets: list[EvaluationSet]
):
    run = make_run()
    outcome = learned(METHODS["ft"], run)
    rows = judge(outcome, run, sets, [0.0, 1.0])
    assert [(row.dataset, row.alpha) for row in rows] == [("same", 0.0), ("same", 1.0)]
    data = run.data
    assert isinstance(data, Labelled)
    transform: Any = image_transform_v2(PreprocessCfg(**run.base.preprocess), is_train=False)
    pixels = torch.stack([transform(data.image(row)) for row in data.rows])
    labels = torch.tensor([data.labels_of(row)[0] for row in data.rows])
    for row in rows:
        outcome.at(row.alpha or 0.0)
        with torch.no_grad():
            scores = (
                outcome.system.embed_images(pixels)
                @ outcome.system.embed_classes(data.classes, ["{}"]).T
            )
        assert row.metrics["acc1"] == pytest.approx(
            (scores.argmax(dim=1) == labels).float().mean().item()
        )
