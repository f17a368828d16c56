"""Drawings of a batch on paper, and what training does to them: turned, warped, recoloured, looked
at in part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 48
PATCH = 8
MEAN = (0.75, 0.75, 0.75)
STD = (0.35, 0.35, 0.35)


def augment(drawings: Tensor, black: Tensor, one_way: Tensor) -> Tensor:
    """Premultiplied RGBA, uint8 [B, S, S, 4], to pixels [B, 3, S, S]: turned, warped, thinned,
    outlined, recoloured.
    """
    x = drawings.permute(0, 3, 1, 2).float() / 255
    count = len(x)
    size = x.shape[-1]

    def some(share: float) -> Tensor:
        return torch.rand(count) < share

    angle = torch.randn(count) * 0.12
    scale = torch.empty(count).uniform_(0.8, 1.25)
    flip = torch.where(some(0.5) & ~one_way, -1.0, 1.0)
    move = (torch.rand(2, count) - 0.5) * 0.25
    stretch = torch.empty(count).uniform_(0.88, 1.14)
    across = torch.stack(
        [scale * stretch * angle.cos() * flip, -scale * angle.sin(), move[0]], dim=1
    )
    down = torch.stack([scale * angle.sin() * flip, scale / stretch * angle.cos(), move[1]], dim=1)
    grid = F.affine_grid(
        torch.stack([across, down], dim=1), [count, 4, size, size], align_corners=False
    )
    warp = torch.randn(count, 2, 5, 5) * (
        0.07 * torch.rand(count, 1, 1, 1) * some(0.3)[:, None, None, None]
    )
    grid = grid + F.interpolate(
        warp, size=(size, size), mode="bicubic", align_corners=False
    ).permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, align_corners=False)

    alpha = x[:, 3:].clone()
    thicker, thinner, outlined = (some(share) & black for share in (0.12, 0.08, 0.08))
    alpha[thicker] = F.max_pool2d(alpha[thicker], 3, 1, 1)
    alpha[thinner] = 0.5 * (alpha[thinner] - F.max_pool2d(-alpha[thinner], 3, 1, 1))
    alpha[outlined] = F.max_pool2d(alpha[outlined], 3, 1, 1) + F.max_pool2d(
        -alpha[outlined], 3, 1, 1
    )

    paper = torch.ones(count, 3)
    ink = torch.zeros(count, 3)
    coloured_paper = some(0.35)
    coloured_ink = some(0.35)
    inverted = some(0.2)
    paper[coloured_paper] = 0.55 + 0.45 * torch.rand(int(coloured_paper.sum()), 3)
    ink[coloured_ink] = (
        0.6 * torch.rand(int(coloured_ink.sum()), 3) * torch.rand(int(coloured_ink.sum()), 1)
    )
    swap = (inverted & black)[:, None]
    paper, ink = torch.where(swap, ink, paper), torch.where(swap, paper, ink)
    mix = torch.eye(3) + 0.15 * torch.randn(count, 3, 3) * some(0.6)[:, None, None]
    grey = some(0.2).float()[:, None, None]
    colours = torch.einsum("bij,bjhw->bihw", mix * (1 - grey) + grey / 3, x[:, :3])
    drawn = torch.where(black[:, None, None, None], ink[:, :, None, None] * alpha, colours)
    y = (
        drawn
        + paper[:, :, None, None] * (1 - torch.where(black[:, None, None, None], alpha, x[:, 3:]))
    ).clamp(0, 1)

    for share, mode in ((0.08, "nearest"), (0.05, "bilinear")):  # pixel art, and out of focus
        coarse = some(share)
        small = F.interpolate(y[coarse], size=(16, 20, 24)[int(torch.randint(3, ()))], mode="area")
        y[coarse] = F.interpolate(small, size=size, mode=mode)
    return (y - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def on_paper(drawings: Tensor) -> Tensor:
    """Premultiplied RGBA, uint8 [B, S, S, 4], on white paper, to pixels [B, 3, S, S]."""
    x = drawings.permute(0, 3, 1, 2).float() / 255
    return (x[:, :3] + 1 - x[:, 3:] - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]


def inked(pixels: Tensor, keep: int) -> Tensor:
    """Which patches of images [B, 3, S, S] to look at, [B, keep]: drawn at random, those with ink
    more often.
    """
    grey = pixels.mean(1, keepdim=True)
    spread = (
        (F.avg_pool2d(grey**2, PATCH) - F.avg_pool2d(grey, PATCH) ** 2)
        .clamp(min=0)
        .sqrt()
        .flatten(1)
    )
    noise = -torch.log(-torch.log(torch.rand_like(spread).clamp(1e-6, 1 - 1e-6)))  # Gumbel
    return ((spread + 0.3).log() + noise).topk(keep, dim=1).indices
