"""A few images of each class: labels by example against their formula, and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rivals import shots
from rivals.method import Run
from rivals.shots import LabelsByExample


def test_a_label_by_example_is_the_mean_of_its_text_and_its_images(
    make_run: Callable[..., Run], images: Path, tiny_clip_dir: str
) -> None:
    system = LabelsByExample().learn(make_run()).system
    classes = sorted(place.name for place in images.iterdir())
    with torch.inference_mode():
        embeds = system.embed_classes(classes, ["a photo of a {}."])

    model, _, transform = open_clip.create_model_and_transforms(tiny_clip_dir)
    tokenizer = open_clip.get_tokenizer(tiny_clip_dir)
    model.eval()
    for name, mixed in zip(classes, embeds, strict=True):
        files = [Image.open(path).convert("RGB") for path in sorted((images / name).iterdir())]
        with torch.inference_mode():
            pixels = torch.stack([transform(file) for file in files])
            shown = F.normalize(model.encode_image(pixels, normalize=True).mean(0), dim=0)
            texts = model.encode_text(tokenizer([f"a photo of a {name}."]), normalize=True)
        expected = F.normalize(shown + texts[0], dim=0)
        np.testing.assert_allclose(mixed.numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_the_page_has_a_figure_for_each_number_of_images(
    benchmark_file: Path, here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = ["--data", str(benchmark_file), "--out", str(out), "--shots", "1", "2", "--seeds", "0"]
    call += ["--only", "labels by example", "WiSE-FT", "full fine-tuning"]
    assert shots.main(call) == 0
    # Both places on the line of full fine-tuning are learned once for each number of images.
    assert sorted(here) == ["FullFineTuning"] * 2 + ["LabelsByExample"] * 2 + ["ZeroShot"]
    page = (out / "shots.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == page.strip()
    assert page.count("| 1 a class | 2 a class |") == 2
    assert page.count("| WiSE-FT |") == page.count("| labels by example |") == 2
    assert (out / "shots.png").stat().st_size > 10_000
