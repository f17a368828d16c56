"""Re-scaling and re-parametrization: adapters become plain CLIP weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from radapter_serve.adapter.file import Adapter, check_base
from radapter_serve.contract.errors import check_alpha
from radapter_serve.errors import RAdapterError


@torch.no_grad()
def fold(state_dict: Mapping[str, Tensor], adapter: Adapter, alpha: float) -> dict[str, Tensor]:
    """Fold an adapter into the weights of its base: `W + α·F·W`, `b + α·F·b` (Eq. 9, F = W_adp
    transposed).

    The fold is linear in α: fold(α) = (1−α)·base + α·fold(1) on the adapted layers.

    Args:
        state_dict: of the base, without adapters; not changed. Tensors that no adapter touches are
            shared.
        adapter: from `load_adapter` or `Adapters.adapter`.
        alpha: re-scaling in [0, 1].

    Returns:
        A state dict with the same keys, shapes and dtypes; computed in fp32 and cast once.

    Raises:
        RAdapterError: α is out of range, the adapter belongs to another base, or a folded value is
            not finite.
    """
    check_alpha(alpha)
    check_base(state_dict, adapter)
    folded = dict(state_dict)
    for key in adapter.keys:
        matrix = adapter.matrix(key).to(state_dict[f"{key}.weight"].device)
        for name in (f"{key}.weight", f"{key}.bias"):
            if name not in state_dict:
                continue
            base = state_dict[name].float()
            value = torch.add(base, matrix @ base, alpha=alpha).to(state_dict[name].dtype)
            if not torch.isfinite(value).all():
                raise RAdapterError(
                    f"folding gave values that are not finite in {name} at alpha {alpha}"
                )
            folded[name] = value
    return folded
