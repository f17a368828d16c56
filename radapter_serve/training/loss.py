"""MPM-NCE: a contrastive loss with several positives a row, a margin on the negatives, and smoothed
targets; its form with pairwise sigmoids, for bases with sigmoid scores; and penalties that
keep embeddings close to the base's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
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

    `ỹ_ij = (1−ε)·y_ij/|P(i)| + ε·(1−y_ij)/(T−|P(i)|)`, against log-softmax of `(f_i·g_j + δ_ij)/τ`
    over texts and over images; `δ_ij` is 0 for positives and δ for negatives. With one positive a
    row, δ = 0 and ε = 0 it is CLIP's loss. A text that is right for no image is a negative of all
    images, and is left out of the mean from texts to images.

    Args:
        image_embeds: f, float [..., B, D], unit length; the loss is a mean over what comes before.
        text_embeds: g, float [..., T, D], unit length.
        labels: integer [B], where T is B and pairs with the same label are positives of each
            other; or bool [..., B, T], whether text j is right for image i, with at least one right
            text in every row.
        logit_scale: 1/τ, frozen in the paper's training.
        delta: margin added to the similarity of negatives, in cosine.
        epsilon: smoothing in [0, 1): mass spread over the negatives; a row without negatives is not
            smoothed.

    Returns:
        A float32 scalar.
    """
    positive = labels if labels.dtype == torch.bool else labels[:, None] == labels[None, :]
    logits = logit_scale * (image_embeds.float() @ text_embeds.float().mT + delta * ~positive)
    to_texts = _cross_entropy(logits, positive, epsilon).mean(dim=-1)
    right = positive.any(dim=-2)  # texts that are right for an image
    to_images = _cross_entropy(logits.mT, positive.mT, epsilon) * right
    return (to_texts + to_images.sum(dim=-1) / right.sum(dim=-1)).mean() / 2


def pairwise_sigmoid(
    image_embeds: Tensor,
    text_embeds: Tensor,
    labels: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    delta: float = 0.05,
    epsilon: float = 0.0,
) -> Tensor:
    """The loss of SigLIP with several positives a row, the margin of MPM-NCE, and its smoothing.

    `L = −1/B Σ_ij y'_ij·log σ(z_ij) + (1−y'_ij)·log σ(−z_ij)` with `z_ij = (f_i·g_j + δ_ij)/τ + b`,
    where `y'_ij` is 1−ε for positives and ε/(T−|P(i)|) for negatives; `δ_ij` is 0 for positives
    and δ for negatives. With one positive a row, δ = 0 and ε = 0 it is SigLIP's loss.

    Args:
        image_embeds: f, float [..., B, D], unit length; the loss is a mean over what comes before.
        text_embeds: g, float [..., T, D], unit length.
        labels: as in `mpm_nce`.
        logit_scale: 1/τ of the base's scores, frozen.
        logit_bias: b of the base's scores, frozen.
        delta: margin, as in `mpm_nce`.
        epsilon: smoothing in [0, 1), as in the formula; also in a row without negatives.

    Returns:
        A float32 scalar.
    """
    positive = labels if labels.dtype == torch.bool else labels[:, None] == labels[None, :]
    cosines = image_embeds.float() @ text_embeds.float().mT + delta * ~positive
    negatives = (~positive).sum(dim=-1, keepdim=True)
    targets = torch.where(positive, 1 - epsilon, epsilon / negatives.clamp(min=1))
    total = F.binary_cross_entropy_with_logits(
        logit_scale * cosines + logit_bias, targets, reduction="sum"
    )
    return total / positive[..., 0].numel()


def _cross_entropy(logits: Tensor, positive: Tensor, epsilon: float) -> Tensor:
    """The cross-entropy of each row with the smoothed targets ỹ."""
    positives = positive.sum(dim=-1, keepdim=True)
    negatives = positive.shape[-1] - positives
    smoothing = torch.where(negatives > 0, epsilon, 0.0)
    of_positives = (1 - smoothing) / positives.clamp(min=1)
    targets = torch.where(positive, of_positives, smoothing / negatives.clamp(min=1))
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def positives_of(of_images: Tensor, of_texts: Tensor) -> Tensor:
    """Mark the right texts of each image, bool [..., B, T]: those whose label, integer [..., T], is
    among the image's labels, integer [..., B, K], padded with negative numbers.
    """
    return (of_images[..., None] == of_texts[..., None, None, :]).any(dim=-2)


def distance_to_base(image_embeds: Tensor, base_embeds: Tensor) -> Tensor:
    """Mean distance `1 − f·f₀` of images from their embeddings with the base, float [..., B, D]."""
    return (1 - (image_embeds.float() * base_embeds.float()).sum(dim=-1)).mean()


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Gather the batch of all processes, [B, ...] to [B·world, ...], with gradients for this
    process's part.

    Each process computes the loss of the whole batch, so its part gets its whole gradient. Data
    parallelism then averages over processes where the sum is needed: multiply the loss by the
    number of processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    parts[dist.get_rank()] = tensor
    return torch.cat(parts)


def divergence_from_base(
    image_embeds: Tensor,
    word_embeds: Tensor,
    base_images: Tensor,
    base_words: Tensor,
    logit_scale: float | Tensor,
) -> Tensor:
    """Mean over images of the Kullback-Leibler divergence of their probabilities of words from
    those of the base; images are float [..., N, D], words [..., W, D], of unit length.
    """
    base = F.log_softmax(logit_scale * base_images.float() @ base_words.float().mT, dim=-1)
    tuned = F.log_softmax(logit_scale * image_embeds.float() @ word_embeds.float().mT, dim=-1)
    return F.kl_div(tuned, base, reduction="none", log_target=True).sum(dim=-1).mean()
