"""MPM-NCE: contrast with several positives a row, a margin on the negatives, and smoothed
targets.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def mpm_nce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    labels: Tensor,
    *,
    logit_scale: float | Tensor = 100.0,
    delta: float = 0.05,
    epsilon: float = 0.0,
) -> Tensor:
    """Multi-Positive Margin NCE of the paper, averaged over the batch and the two directions.

    `ỹ_ij = (1−ε)·y_ij/|P(i)| + ε·(1−y_ij)/(B−|P(i)|)`, against log-softmax of `(f_i·g_j + δ_ij)/τ`
    over texts and over images; `δ_ij` is 0 for positives and δ for negatives. With one positive a
    row, δ = 0 and ε = 0 it is CLIP's loss.

    Args:
        image_embeds: f, float [B, D], unit length.
        text_embeds: g, float [B, D], unit length.
        labels: integer [B]; pairs with the same label are positives of each other.
        logit_scale: 1/τ, frozen in the paper's training.
        delta: margin added to the similarity of negatives, in cosine.
        epsilon: smoothing in [0, 1): mass spread over the negatives; a row without negatives keeps
            it.

    Returns:
        A float32 scalar.
    """
    positive = labels[:, None] == labels[None, :]
    positives = positive.sum(dim=1, keepdim=True)
    negatives = len(labels) - positives
    smoothing = torch.where(negatives > 0, epsilon, 0.0)
    targets = torch.where(positive, (1 - smoothing) / positives, smoothing / negatives.clamp(min=1))
    logits = logit_scale * (image_embeds.float() @ text_embeds.float().T + delta * ~positive)
    to_texts = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
    to_images = -(targets * logits.T.log_softmax(dim=1)).sum(dim=1)
    return (to_texts.mean() + to_images.mean()) / 2


def gather_with_grad(tensor: Tensor) -> Tensor:
    """The batch of all processes, [B, ...] to [B·world, ...], with gradients for this process's own
    part.

    Each process computes the loss of the whole batch, so its own part has its whole gradient
    already. Data parallelism
    then takes the mean over processes where the sum is meant: multiply the loss by their number.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    parts[dist.get_rank()] = tensor
    return torch.cat(parts)
