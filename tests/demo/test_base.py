"""The demo's base: a real CLIP for open_clip, that knows concepts it has never seen better than chance."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import train_demo_base as train_base
from radapter_serve.demo import data


def test_open_clip_loads_the_base_in_fp32() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{data.BASE}")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = json.loads((data.BASE / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config["model_cfg"] == train_base.MODEL and config["model_cfg"]["quick_gelu"] is False
    assert tuple(preprocess(Image.new("RGB", (96, 80))).shape) == (3, train_base.SIZE, train_base.SIZE)
    assert sum(path.stat().st_size for path in data.BASE.iterdir()) < 20e6


def test_zero_shot_on_held_out_concepts_is_far_above_chance() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{data.BASE}")
    tokenizer, classes = open_clip.get_tokenizer(f"local-dir:{data.BASE}"), data.class_names()
    held_out = [concept for concept in data.concepts() if concept.split == "test"][::3]
    for style in (data.FINE_TUNED, *data.SHIFTS):
        drawn = [(c, svg) for c in held_out if (svg := data.drawing(c, style)) is not None]
        paper = [Image.new("RGBA", (96, 96), "white") for _ in drawn]
        images = torch.stack(
            [
                preprocess(Image.alpha_composite(white, data.render(svg, 96)).convert("RGB"))
                for white, (_, svg) in zip(paper, drawn, strict=True)
            ]
        )
        with torch.no_grad():
            texts = F.normalize(model.encode_text(tokenizer([f"a drawing of {name}" for name in classes])), dim=-1)
            best = (model.eval().encode_image(images) @ texts.T).argmax(dim=1)
        truth = torch.tensor([classes.index(concept.class_name) for concept, _ in drawn])
        assert (best == truth).float().mean() > 5 / len(classes), style


def test_contrast_is_clips_loss_where_each_image_has_one_caption() -> None:
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(2, 8, 16), dim=-1)
    ours = train_base.contrast(images, texts, torch.eye(8, dtype=torch.bool), torch.tensor(20.0))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(images, texts, torch.tensor(20.0)))


def test_captions_use_only_the_vocabulary_that_is_trained() -> None:
    used, draw = set(train_base.vocabulary().tolist()), random.Random(0)
    for concept in [concept for concept in data.concepts() if concept.split in train_base.SEEN]:
        for style in ("color", "line", "icon"):
            text, whole_class = train_base.caption(concept, style, 0.5, draw)
            assert set(open_clip.tokenize([text])[0].tolist()) <= used, text
            assert not whole_class or text.endswith(f" of {concept.class_name}")


@pytest.mark.slow
def test_training_from_scratch_writes_a_model_that_open_clip_loads(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, steps=2, concepts=8, drawings=2, learning_rate=1e-3, class_share=0.3)
    vars(args).update(patch_dropout=0.5, average=0.9, bf16=False, threads=2, seed=0)
    trained: Any = train_base.train(args)
    model: Any = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), trained.encode_image(pixels), atol=1e-2, rtol=1e-2)
