"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch

from radapter_serve.adapter import attach
from radapter_serve.clip.base import load_base
from radapter_serve.training import Average


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("corrected", [False, True])
def test_closed_form(tiny_clip_dir: str, rank: int | None, corrected: bool) -> None:
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
    learned = sum((1 - m) * m ** (steps - 1 - t) * value for t, value in enumerate(values))
    expected = learned / (1 - m**steps) if corrected else m**steps * start + learned
    torch.testing.assert_close(average.tensors[name], expected, rtol=1e-5, atol=1e-6)
    kept = parameter.detach().clone()
    with average.applied():
        torch.testing.assert_close(parameter.detach(), average.tensors[name])
    assert torch.equal(parameter.detach(), kept)


def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tiny_clip_dir: str) -> None:
    adapters = attach(load_base(tiny_clip_dir).model, 2)
    name, parameter = next(iter(adapters.named_tensors().items()))
    average = Average(adapters, 0.9, bias_correction=True)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            parameter.fill_(value)
        again = Average(adapters, 0.9, bias_correction=True)
        again.load(average.tensors, average.steps)
        average = again
        average.update()
    # By hand: each value weighs 0.9 times the one after it.
    expected = (0.81 * 1 + 0.9 * 2 + 4) / (0.81 + 0.9 + 1)
    assert average.steps == 3
    torch.testing.assert_close(average.tensors[name], torch.full_like(parameter, expected))
