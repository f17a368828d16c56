"""The demo's base: a real CLIP for open_clip, that knows drawings by hands it has never seen better
than chance.
"""

from __future__ import annotations

import open_clip
import pytest
import torch
from PIL import Image

from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.demo import data


def test_open_clip_loads_the_base_in_fp32() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{data.BASE}")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tuple(preprocess(Image.new("RGB", (96, 80))).shape) == (3, 48, 48)
    assert sum(path.stat().st_size for path in data.BASE.iterdir()) < 20e6


@pytest.mark.slow
def test_zero_shot_is_far_above_chance(some: data.DemoData) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{data.BASE}")
    names = [split_label(line)[0] for line in read_label_file(data.CLASSES)]
    files = [file for folder in some.test.values() for file in folder.rglob("*.png")]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{data.BASE}")
    tokens = tokenizer([f"a drawing of {name}" for name in names])
    with torch.no_grad():
        texts: torch.Tensor = model.encode_text(tokens, normalize=True)
        images = torch.stack([preprocess(Image.open(file)) for file in files])
        best = (model.eval().encode_image(images) @ texts.T).argmax(dim=1)
    right = [names[index] == file.parent.name for index, file in zip(best, files, strict=True)]
    assert len(files) > 100 and sum(right) / len(right) > 5 / len(names)
