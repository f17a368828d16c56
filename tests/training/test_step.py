"""Attention's in-projection as one product of matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from radapter_serve.training.step import flatten_projections


class Products(TorchDispatchMode):
    """Counts batched products of matrices."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


def step(attention: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
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
    own = nn.MultiheadAttention(64, 4, batch_first=True).requires_grad_(False)
    flat = copy.deepcopy(own)
    flatten_projections(nn.Sequential(flat))
    x = torch.randn(3, 10, 64)
    expected, gradient, before = step(own, x, dtype)
    output, flat_gradient, after = step(flat, x, dtype)
    torch.testing.assert_close(output, expected, rtol=close, atol=close)
    torch.testing.assert_close(flat_gradient, gradient, rtol=close, atol=close)
    assert after < before
    # Cross-attention stays as it is.
    key = torch.randn(3, 7, 64)
    torch.testing.assert_close(flat(x, key, key)[0], own(x, key, key)[0], rtol=0, atol=0)
