"""MPM-NCE against a loop over the formula, against cross-entropy, at extremes, and over two
processes.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from radapter_serve.adapter import attach
from radapter_serve.clip.base import load_base
from radapter_serve.training import gather_with_grad, mpm_nce, pairwise_sigmoid
from radapter_serve.training.loss import distance_to_base, positives_of
from radapter_serve.training.step import at_base


def by_the_formula(
    f: Tensor, g: Tensor, labels: list[int], scale: float, delta: float, epsilon: float
) -> float:
    """The paper's sum, element by element in double precision, over B and the two directions."""
    f = f.double()
    g = g.double()
    size = len(labels)
    total = 0.0
    for i in range(size):
        positives = [j for j in range(size) if labels[j] == labels[i]]
        eps = epsilon if len(positives) < size else 0.0
        for a, b in ((f, g), (g, f)):
            logits = [
                scale * (float(a[i] @ b[j]) + (0.0 if j in positives else delta))
                for j in range(size)
            ]
            log_sum = torch.logsumexp(torch.tensor(logits, dtype=torch.float64), 0).item()
            for j in range(size):
                target = (
                    (1 - eps) / len(positives) if j in positives else eps / (size - len(positives))
                )
                total -= target * (logits[j] - log_sum)
    return total / size / 2


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=8),
    scale=st.floats(1, 100),
    delta=st.floats(0, 0.2),
    epsilon=st.floats(0, 0.3),
    seed=st.integers(0, 99),
)
def test_equals_the_formula(
    labels: list[int], scale: float, delta: float, epsilon: float, seed: int
) -> None:
    torch.manual_seed(seed)
    f, g = (F.normalize(torch.randn(len(labels), 5), dim=-1) for _ in range(2))
    found = mpm_nce(f, g, torch.tensor(labels), logit_scale=scale, delta=delta, epsilon=epsilon)
    assert found.item() == pytest.approx(
        by_the_formula(f, g, labels, scale, delta, epsilon), rel=1e-4, abs=1e-4
    )


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=2, max_size=7),
    scale=st.floats(1, 100),
    delta=st.floats(0, 0.2),
    epsilon=st.floats(0, 0.3),
    others=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_several_labels_an_image_equal_the_formula(
    labels: list[set[int]], scale: float, delta: float, epsilon: float, others: int, seed: int
) -> None:
    """A text is right for every image that has its label; each direction sums over its own rows.

    Other texts are right for none, and have no row.
    """
    torch.manual_seed(seed)
    size = len(labels)
    of_texts = [sorted(of)[seed % len(of)] for of in labels] + [99] * others
    f = F.normalize(torch.randn(size, 5), dim=-1)
    g = F.normalize(torch.randn(size + others, 5), dim=-1)
    right = [[of_text in of for of_text in of_texts] for of in labels]
    total = 0.0
    for i in range(size):
        for a, b, own in (
            (f[i], g, right[i]),
            (g[i], f, [row[i] for row in right]),
        ):
            eps = epsilon if not all(own) else 0.0
            logits = [
                scale * (float(a.double() @ b[j].double()) + (0.0 if own[j] else delta))
                for j in range(len(own))
            ]
            log_sum = torch.logsumexp(torch.tensor(logits, dtype=torch.float64), 0).item()
            for j in range(len(own)):
                target = (1 - eps) / sum(own) if own[j] else eps / (len(own) - sum(own))
                total -= target * (logits[j] - log_sum)
    widest = max(map(len, labels))
    of_images = torch.tensor([[*of, *[-1] * (widest - len(of))] for of in map(sorted, labels)])
    mask = positives_of(of_images, torch.tensor(of_texts))
    assert mask.tolist() == right
    found = mpm_nce(f, g, mask, logit_scale=scale, delta=delta, epsilon=epsilon)
    assert found.item() == pytest.approx(total / size / 2, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("others", [0, 3])  # texts that are right for no image
@pytest.mark.parametrize(("delta", "epsilon"), [(0.0, 0.0), (0.07, 0.0), (0.05, 0.1)])
def test_the_pairwise_sigmoid_equals_its_formula(
    several: bool, others: int, delta: float, epsilon: float
) -> None:
    torch.manual_seed(1)
    f, g = (F.normalize(torch.randn(size, 6), dim=-1) for size in (9, 9 + others))
    labels = torch.tensor([0, 1, 0, 2, 1, 3, 0, 4, 5]) if several else torch.arange(9)
    of_texts = torch.cat([labels, torch.full((others,), 99)])
    scale = 7.5
    bias = -3.25
    total = 0.0
    for i in range(9):
        wrong = sum(int(labels[i] != of_text) for of_text in of_texts)
        for j in range(len(of_texts)):
            right = bool(labels[i] == of_texts[j])
            cosine = float(f[i].double() @ g[j].double())
            z = scale * (cosine + (0.0 if right else delta)) + bias
            target = 1 - epsilon if right else epsilon / wrong
            log_p = -math.log1p(math.exp(-z))
            log_q = -math.log1p(math.exp(z))
            total -= target * log_p + (1 - target) * log_q
    keywords = {"logit_scale": scale, "logit_bias": bias, "delta": delta, "epsilon": epsilon}
    found = pairwise_sigmoid(f, g, labels[:, None] == of_texts, **keywords)
    assert found.item() == pytest.approx(total / 9, rel=1e-5)
    if not others:
        assert pairwise_sigmoid(f, g, labels, **keywords).item() == found.item()


def test_the_pairwise_sigmoid_is_siglips_loss_with_one_positive_a_row() -> None:
    torch.manual_seed(0)
    f, g = (F.normalize(torch.randn(16, 8), dim=-1).requires_grad_() for _ in range(2))
    expected = SigLipLoss()(f, g, torch.tensor(50.0), torch.tensor(-10.0))
    found = pairwise_sigmoid(
        f, g, torch.arange(16), logit_scale=50.0, logit_bias=-10.0, delta=0.0, epsilon=0.0
    )
    torch.testing.assert_close(found, expected)
    own, other = (torch.autograd.grad(loss, f, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(own, other)


def test_is_clips_loss_with_one_positive_a_row() -> None:
    torch.manual_seed(0)
    f, g = (F.normalize(torch.randn(16, 8), dim=-1) for _ in range(2))
    target = torch.arange(16)
    scale = torch.tensor(50.0)
    expected = ClipLoss()(f, g, scale)
    found = mpm_nce(f, g, target, logit_scale=50.0, delta=0.0, epsilon=0.0)
    torch.testing.assert_close(found, expected)
    own = mpm_nce(f, g, target)  # CLIP's scale, the paper's margin, and no smoothing
    assert own.item() == pytest.approx(
        by_the_formula(f, g, target.tolist(), 100.0, 0.05, 0.0), rel=1e-4
    )


def test_smoothing_is_torchs_own_up_to_the_share_of_the_true_class() -> None:
    torch.manual_seed(0)
    f, g = (F.normalize(torch.randn(16, 8), dim=-1) for _ in range(2))
    target = torch.arange(16)
    epsilon = 0.15
    smoothing = epsilon * 16 / 15  # torch spreads over all classes, the paper over the others
    logits = 20 * f @ g.T
    expected = (
        sum(F.cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.T)) / 2
    )
    torch.testing.assert_close(
        mpm_nce(f, g, target, logit_scale=20.0, delta=0.0, epsilon=epsilon), expected
    )


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_stable_at_huge_logits(scale: float) -> None:
    torch.manual_seed(0)
    f, g = (F.normalize(torch.randn(8, 4), dim=-1).requires_grad_() for _ in range(2))
    loss = mpm_nce(f, g, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), logit_scale=scale, epsilon=0.02)
    loss.backward()
    assert (
        loss.isfinite()
        and f.grad is not None
        and f.grad.isfinite().all()
        and g.grad.isfinite().all()  # type: ignore[union-attr]
    )


def test_one_class_for_the_whole_batch() -> None:
    f = F.normalize(torch.randn(4, 4), dim=-1)
    assert mpm_nce(f, f, torch.zeros(4, dtype=torch.long), epsilon=0.1).isfinite()


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    weight = data["weight"].clone().requires_grad_()
    mine = slice(rank * 3, rank * 3 + 3)
    f, g = (F.normalize(data[name][mine] @ weight, dim=-1) for name in ("x", "y"))
    loss = mpm_nce(
        gather_with_grad(f),
        gather_with_grad(g),
        gather_with_grad(data["labels"][mine]),
        epsilon=0.02,
    )
    (loss * 2).backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    torch.save(
        {"loss": loss.detach(), "grad": weight.grad / 2}, f"{folder}/{rank}.pt"
    )  # the mean, as DDP takes it
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {"x": torch.randn(6, 5), "y": torch.randn(6, 5), "weight": torch.randn(5, 4)}
    labels = torch.tensor([0, 1, 2, 0, 1, 1])  # positives across the processes
    torch.save({**data, "labels": labels}, tmp_path / "data.pt")
    mp.start_processes(_process, (str(tmp_path),), nprocs=2, start_method="spawn")  # type: ignore[attr-defined]
    weight = data["weight"].clone().requires_grad_()
    f, g = (F.normalize(data[name] @ weight, dim=-1) for name in ("x", "y"))
    loss = mpm_nce(f, g, labels, epsilon=0.02)
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach())
        assert weight.grad is not None
        assert (found["grad"] - weight.grad).norm() < 1e-4 * weight.grad.norm()


def test_after_a_look_at_the_base_the_adapters_count_in_full(tiny_clip_dir: str) -> None:
    adapters = attach(load_base(tiny_clip_dir).model)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's precision
    accelerator = Accelerator(cpu=True)
    with at_base(adapters, accelerator):
        assert adapters.alpha == 0.0 and not torch.is_grad_enabled()
    assert adapters.alpha == 1.0
    with pytest.raises(KeyboardInterrupt), at_base(adapters, accelerator):
        raise KeyboardInterrupt
    assert adapters.alpha == 1.0


@given(seed=st.integers(0, 99), length=st.floats(1e-3, 1e3))
def test_distance_to_the_base_is_of_angles_alone(seed: int, length: float) -> None:
    generator = np.random.default_rng(seed)
    f, base = generator.normal(size=(2, 4, 6))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(f, base, strict=True)]
    images, wanted = (
        F.normalize(torch.tensor(length * values), dim=1).float() for values in (f, base)
    )
    found = distance_to_base(images, wanted).item()
    assert found == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert distance_to_base(wanted, wanted).item() == pytest.approx(0.0, abs=1e-6)
