"""The parts of a step: losses against formulas, prompts of absent classes, the in-projection."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from radapter_serve.data.labelled import Labelled
from radapter_serve.training import mpm_nce, pairwise_sigmoid
from radapter_serve.training.loop import other_prompts, share
from radapter_serve.training.loss import positives_of
from radapter_serve.training.setup import flatten_projections
from tests.helpers.by_hand import mpm_nce_by_hand


def units(*sizes: int, width: int = 8, seed: int = 0) -> list[Tensor]:
    """Rows of unit length, some for each size."""
    torch.manual_seed(seed)
    return [F.normalize(torch.randn(size, width), dim=-1) for size in sizes]


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=2, max_size=7),
    scale=st.floats(1, 100),
    delta=st.floats(0, 0.2),
    epsilon=st.floats(0, 0.3),
    others=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_equals_the_formula(
    labels: list[set[int]], scale: float, delta: float, epsilon: float, others: int, seed: int
) -> None:
    """A text is right for every image that has its label."""
    size = len(labels)
    f, g = units(size, size + others, width=5, seed=seed)
    of_texts = [sorted(of)[seed % len(of)] for of in labels] + [99] * others
    right = [[of_text in of for of_text in of_texts] for of in labels]
    widest = max(map(len, labels))
    padded = [[*sorted(of), *[-1] * (widest - len(of))] for of in labels]
    positive = positives_of(torch.tensor(padded), torch.tensor(of_texts))
    assert positive.tolist() == right
    numbers = {"delta": delta, "epsilon": epsilon}
    loss = mpm_nce(f, g, positive, logit_scale=scale, **numbers).item()
    expected = mpm_nce_by_hand(f.double(), g.double(), torch.tensor(right), scale, delta, epsilon)
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    if not others and widest == 1:  # one label an image may be given by itself
        plain = mpm_nce(f, g, torch.tensor(of_texts), logit_scale=scale, **numbers)
        assert plain.item() == loss


def test_with_one_positive_a_row_they_are_the_losses_of_clip_and_siglip() -> None:
    f, g = (rows.requires_grad_() for rows in units(16, 16))
    target = torch.arange(16)
    plain = {"logit_scale": 50.0, "delta": 0.0, "epsilon": 0.0}
    scale = torch.tensor(50.0)
    pairs = [
        (mpm_nce(f, g, target, **plain), ClipLoss()(f, g, scale)),
        (
            pairwise_sigmoid(f, g, target, logit_bias=-10.0, **plain),
            SigLipLoss()(f, g, scale, torch.tensor(-10.0)),
        ),
    ]
    for loss, expected in pairs:
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(each, f, retain_graph=True) for each in (loss, expected)]
        torch.testing.assert_close(*gradients)
    # By default it has CLIP's scale, the paper's margin, and no smoothing.
    expected = mpm_nce_by_hand(f, g, torch.eye(16), 100.0, 0.05, 0.0)
    assert mpm_nce(f, g, target).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_stable_at_huge_logits_and_with_one_class(scale: float) -> None:
    f, g = (rows.requires_grad_() for rows in units(8, 8))
    for labels in ([0, 0, 1, 1, 2, 2, 3, 3], [0] * 8):
        loss = mpm_nce(f, g, torch.tensor(labels), logit_scale=scale, epsilon=0.02)
        gradients = torch.autograd.grad(loss, (f, g))
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_absent_classes_have_a_prompt_but_those_of_a_name_in_the_batch() -> None:
    classes = ["cat, tabby", "missile", "projectile", "missile, rocket", "dog"]
    data = Labelled([], classes, "image", "label", Path(), ["a {}", "the {}."])
    prompts = other_prompts(data, [2, -1], 9, random.Random(1))
    names = {0: "cat", 1: "missile", 3: "missile", 4: "dog"}
    assert prompts.keys() == names.keys()
    assert all(prompts[label] in (f"a {name}", f"the {name}.") for label, name in names.items())
    assert other_prompts(data, range(5), 9, random.Random(1)) == {}
    # "missile, rocket" would be right for an image of "missile".
    assert other_prompts(data, [1], 9, random.Random(1)).keys() == {0, 2, 4}


@given(count=st.integers(0, 9), processes=st.integers(1, 4))
def test_shares_are_equally_long_and_the_texts_in_their_order(count: int, processes: int) -> None:
    texts = [f"text {number}" for number in range(count)]
    parts = [share(texts, process, processes) for process in range(processes)]
    assert len({len(part) for part in parts}) == 1
    together = [text for part in parts for text in part]
    assert together[:count] == texts
    assert set(together[count:]) <= set(texts[:1]) and len(together) - count < processes


class Products(TorchDispatchMode):
    """Counts batched products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


def attend(attention: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """The output and the input's gradient of a step, and its batched products."""
    x = x.clone().requires_grad_(True)
    with Products() as products, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output, _ = attention(x, x, x, need_weights=False)
        output.float().square().sum().backward()
    assert x.grad is not None
    return output.detach().float(), x.grad, products.count


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_flat_projection_is_torch_s_own(dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True).requires_grad_(False)
    flat = copy.deepcopy(attention)
    flatten_projections(nn.Sequential(flat))
    x = torch.randn(3, 10, 64)
    expected, gradient, before = attend(attention, x, dtype)
    output, flat_gradient, after = attend(flat, x, dtype)
    torch.testing.assert_close(output, expected, rtol=close, atol=close)
    torch.testing.assert_close(flat_gradient, gradient, rtol=close, atol=close)
    assert after < before
    # Cross-attention stays as it is.
    key = torch.randn(3, 7, 64)
    torch.testing.assert_close(flat(x, key, key)[0], attention(x, key, key)[0], rtol=0, atol=0)
