"""The bases of docs/models.md: seconds of an image, of a text and of a training step."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import tyro
from common import RESULTS, Process, Report, clocked, say

from radapter_serve.adapter import attach
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.training.loss import distance_to_base, mpm_nce, pairwise_sigmoid
from radapter_serve.training.setup import flatten_projections

NAMES = (
    *("ViT-B-32", "ViT-B-32-256", "ViT-B-16", "ViT-B-32-SigLIP2-256", "ViT-B-16-SigLIP2-256"),
    *("ViT-B-16-SigLIP", "PE-Core-B-16", "MobileCLIP-B"),
)
WORDS = 10  # of a text
WHAT = """open_clip's models with random weights, in torch. An image and a text are one of a batch
of 8 in fp32, without decoding; each text has {words} tokens, padded where the model asks for it. A
step is one of `small` without its data and its words: 32 images with their texts, adapters of full
rank in both towers, forward, the loss with what keeps the base, backward and AdamW, in bf16; the
median of {repeats}."""


def measure_model(name: str, repeats: int) -> tuple[float, float, float]:
    """Milliseconds of an image and of a text, and seconds of a step."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(name, pretrained_hf=False).eval()
    side = model.visual.image_size
    sides = side if isinstance(side, tuple) else (side, side)
    pixels = torch.randn(32, 3, *sides)
    tokens = torch.zeros(32, model.context_length, dtype=torch.long)
    tokens[:, :WORDS] = torch.randint(1, 1000, (32, WORDS))
    tokens[:, WORDS - 1] = model.vocab_size - 1  # the end of a text in CLIP
    with torch.inference_mode():
        image = statistics.median(
            clocked(lambda: encode_image(model, pixels[:8]))() for _ in range(3)
        )
        text = statistics.median(
            clocked(lambda: encode_text(model, tokens[:8]))() for _ in range(3)
        )

    flatten_projections(model)  # as training does
    adapters = attach(model, None, drop=0.0)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-5)
    bias = getattr(model, "logit_bias", None)
    steps = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            images = encode_image(model, pixels)
            texts = encode_text(model, tokens)
            scale = model.logit_scale.exp()
            right = torch.eye(32, dtype=torch.bool)
            if bias is None:
                loss = mpm_nce(images, texts, right, logit_scale=scale)
            else:
                loss = pairwise_sigmoid(images, texts, right, logit_scale=scale, logit_bias=bias)
            adapters.alpha = 0.0
            with torch.no_grad():
                base = encode_image(model, pixels)
            adapters.alpha = 1.0
            loss = loss + 10 * distance_to_base(images, base)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - start)
    return 125 * image, 125 * text, statistics.median(steps[1:])


def main(names: tuple[str, ...] = NAMES, repeats: int = 3, out: Path = RESULTS) -> None:
    """Measure the bases.

    Args:
        names: architectures of open_clip.
        repeats: steps of each, after one that does not count.
        out: folder of the table.
    """
    what = WHAT.format(words=WORDS, repeats=repeats)
    report = Report("models", "The time of an image, a text and a step", what, timed=False)
    rows = []
    for name in names:
        say(name)
        with Process() as process:
            image, text, step = process.call(measure_model, name, repeats)
            peak = process.peak()
        rows.append([name, f"{image:.0f}", f"{text:.0f}", f"{step:.1f}", f"{peak / 1e9:.1f}"])
        report.table("Bases", ["base", "ms an image", "ms a text", "s a step", "peak GB"], rows)
        report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
