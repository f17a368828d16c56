"""The loop that trains every rival, and the judge of all."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.optim import SGD

from radapter_serve.data.labelled import Labelled
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import evaluation_batches
from radapter_serve.evaluation.image_sets import EvaluationSet
from rivals.fit import fit, peak_memory
from rivals.flyp import Flyp
from rivals.judge import judge
from rivals.method import learned
from rivals.methods import METHODS
from rivals.run import Run
from rivals.system import Batch, System


class Two(System):
    """Learns two numbers, each with a slope of 1."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.base)
        self.one = nn.Parameter(torch.zeros(()))
        self.other = nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []

    def forward(self, batch: Batch) -> Tensor:
        assert (
            batch["pixels"].shape == (4 // 2, 3, 32, 32)
            and len(batch["labels"]) == len(batch["texts"]) == 2
        )
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
    found = fit(system, SGD(groups, lr=0.0), run)
    plan = run.recipe.resolved(None)
    total = sum(plan.learning_rate(step) for step in range(5))
    assert -system.one.item() == pytest.approx(total)
    assert -system.other.item() == pytest.approx(total / 2)
    assert system.seen == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert found.cost.parameters == 2
    assert found.cost.seconds > 0 and found.cost.memory > 1e8


def test_gradients_are_clipped(make_run: Callable[..., Run]):
    run = make_run(steps=1, learning_rate=0.1, grad_clip=0.5, accumulate=2)
    system = Two(run)
    fit(system, SGD(system.learning(), lr=0.0), run)
    # torch divides by a norm that is larger by 1e-6.
    assert -system.one.item() == pytest.approx(0.1 * 0.5 / 2**0.5, rel=1e-5)


def test_refuses_too_few_images_and_losses_that_are_not_finite(make_run: Callable[..., Run]):
    with pytest.raises(RAdapterError, match="batch_size is 32 but the data holds 24 images"):
        learned(METHODS["ft"], make_run(batch_size=32))
    run = make_run(accumulate=2)
    system = Two(run)
    system.one.data.fill_(torch.nan)
    with pytest.raises(RAdapterError, match="the loss is nan at step 0"):
        fit(system, SGD(system.learning(), lr=0.0), run)


def test_flyp_is_the_loss_of_clip(make_run: Callable[..., Run]):
    run = make_run()
    system = Flyp(run.base)
    pixels = torch.randn(3, 3, 32, 32)
    texts = ["a photo of a red.", "a photo of a blue.", "a photo of a red."]
    with torch.no_grad():
        images = system.model.encode_image(pixels, normalize=True)
        prompts = system.model.encode_text(run.base.tokenizer(texts), normalize=True)
        expected = ClipLoss()(images, prompts, system.model.logit_scale.exp())
        torch.testing.assert_close(system({"pixels": pixels, "texts": texts}), expected)


def test_judge_counts_what_the_system_finds(
    make_run: Callable[..., Run], sets: list[EvaluationSet]
):
    run = make_run()
    found = learned(METHODS["ft"], run)
    rows = judge(found, run, sets, [0.0, 1.0])
    assert [(row.dataset, row.alpha) for row in rows] == [("same", 0.0), ("same", 1.0)]
    data = run.data
    assert isinstance(data, Labelled)
    read = evaluation_batches(run.base, data.rows, lambda row: (data.image(row), data.label(row)))
    ((pixels, labels),) = list(read)
    for row in rows:
        found.at(row.alpha or 0.0)
        with torch.no_grad():
            scores = (
                found.system.embed_images(pixels)
                @ found.system.embed_classes(data.classes, ["{}"]).T
            )
        assert row.metrics["acc1"] == pytest.approx(
            (scores.argmax(dim=1) == labels).float().mean().item()
        )


def peak_of_a_program() -> int:
    return peak_memory()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts memory for each program")
def test_the_peak_memory_of_a_program_leaves_out_that_of_the_one_that_started_it() -> None:
    block = np.ones(2**31, np.uint8)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        peak = pool.submit(peak_of_a_program).result()
    assert peak < block.nbytes <= peak_memory()
