"""The parts of a step: the average, prompts of absent classes, attention's in-projection."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from radapter_serve.adapter import attach
from radapter_serve.clip.base import load_base
from radapter_serve.data.labelled import Labelled
from radapter_serve.training import Average
from radapter_serve.training.loop import other_prompts, share
from radapter_serve.training.setup import flatten_projections


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_average_is_its_closed_form(
    tiny_clip_dir: str, rank: int | None, corrected: bool
) -> None:
    adapters = attach(load_base(tiny_clip_dir).model, rank)
    name, parameter = next(iter(adapters.named_tensors().items()))
    m = 0.9
    steps = 7
    start = parameter.detach().clone()
    average = Average(adapters, m, bias_correction=corrected)
    values = []
    for step in range(steps):
        torch.manual_seed(step)
        values.append(torch.randn_like(parameter))
        with torch.no_grad():
            parameter.copy_(values[-1])
        average.update()
        # As from a checkpoint.
        resumed = Average(adapters, m, bias_correction=corrected)
        resumed.load(average.tensors, average.steps)
        average = resumed
    learned = sum((1 - m) * m ** (steps - 1 - t) * value for t, value in enumerate(values))
    expected = learned / (1 - m**steps) if corrected else m**steps * start + learned
    torch.testing.assert_close(average.tensors[name], expected, rtol=1e-5, atol=1e-6)
    kept = parameter.detach().clone()
    with average.applied():
        torch.testing.assert_close(parameter.detach(), average.tensors[name])
    assert torch.equal(parameter.detach(), kept)


def test_absent_classes_have_a_prompt_but_those_of_a_name_in_the_batch() -> None:
    classes = ["cat, tabby", "missile", "projectile", "missile, rocket", "dog"]
    data = Labelled([], classes, "image", "label", Path(), ["a {}", "the {}."])
    prompts = other_prompts(data, [2, -1], 9, random.Random(1))
    names = {0: "cat", 1: "missile", 3: "missile", 4: "dog"}
    assert prompts.keys() == names.keys()
    assert all(prompts[label] in (f"a {name}", f"the {name}.") for label, name in names.items())
    # One class and one template of them, drawn.
    drawn = [other_prompts(data, [2], 1, random.Random(seed)) for seed in range(30)]
    forms = {form.format(name) for form in ("a {}", "the {}.") for name in names.values()}
    assert {text for texts in drawn for text in texts.values()} == forms
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
