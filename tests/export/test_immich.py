"""The layout of immich, loaded by the names and shapes of immich's own code
(machine-learning/immich_ml/models/clip of immich-app/immich).
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import tokenizers
import torch
from PIL import Image

from radapter_serve.adapter import save_adapter
from radapter_serve.errors import RAdapterError
from tests.conftest import export_into
from tests.helpers.small_models import make_base, random_adapter

TEXTS = ["A photo of a cat, on a sofa!", "", "many  words " * 60]


class Immich:
    """What immich's encoders do, one image and one text at a time."""

    def __init__(self, folder: Path) -> None:
        def fields(name: str) -> dict[str, Any]:
            content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            return content

        self.preprocess = fields("visual/preprocess_cfg.json")
        of_texts = fields("config.json")["text_cfg"]
        self.canonicalize = of_texts.get("tokenizer_kwargs", {}).get("clean") == "canonicalize"
        pad = fields("textual/tokenizer_config.json")["pad_token"]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
        length = of_texts.get("context_length", 77)
        self.tokenizer.enable_padding(
            length=length, pad_token=pad, pad_id=self.tokenizer.token_to_id(pad)
        )
        self.tokenizer.enable_truncation(max_length=length)
        self.visual, self.textual = (
            onnxruntime.InferenceSession(folder / name / "model.onnx")
            for name in ("visual", "textual")
        )

    def image(self, image: Image.Image) -> np.ndarray:
        size = self.preprocess["size"]
        side = size[0] if isinstance(size, list) else size
        assert image.size == (side, side)  # so that nothing is resized
        mean, std = (np.array(self.preprocess[name], np.float32) for name in ("mean", "std"))
        pixels = (np.asarray(image, np.float32) / 255 - mean) / std
        return np.asarray(self.visual.run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0])

    def text(self, text: str) -> np.ndarray:
        text = " ".join(text.split())
        if self.canonicalize:
            text = text.translate(str.maketrans("", "", string.punctuation)).lower()
        tokens = np.array([self.tokenizer.encode(text).ids], np.int32)
        return np.asarray(self.textual.run(None, {"text": tokens})[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "siglip"])
@torch.no_grad()
def test_immich_gets_what_open_clip_gives(family: str, common: Path, tmp_path: Path) -> None:
    adapter = random_adapter(make_base(family, tmp_path / "base"))
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    [release] = export_into(tmp_path, common, tmp_path, [0.7], immich=tmp_path / "immich")
    [form] = release.forms
    assert form.name == "immich" and form.agreement.max_error < 1e-5
    immich = Immich(tmp_path / "immich")
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{release.merged}")
    model, _, transform = loaded
    side = int(immich.preprocess["size"][0])
    noise = np.random.default_rng(3).integers(0, 256, (side, side, 3), np.uint8)
    image = Image.fromarray(noise)
    expected = model.eval().encode_image(transform(image)[None], normalize=True)[0]
    np.testing.assert_allclose(immich.image(image), expected, atol=1e-5)
    tokens = open_clip.get_tokenizer(f"local-dir:{release.merged}")(TEXTS)
    for text, row in zip(TEXTS, model.encode_text(tokens, normalize=True), strict=True):
        np.testing.assert_allclose(immich.text(text), row, atol=1e-5)


@pytest.mark.parametrize("family", ["mobileclip2-l", "clipa", "coca"])
def test_a_base_whose_texts_it_would_pad_otherwise_is_refused(
    family: str, common: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(make_base(family, tmp_path / "base"))
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    with pytest.raises(RAdapterError, match="no form for immich, .* leave --immich out"):
        export_into(tmp_path, common, tmp_path, [1.0], immich=tmp_path / "immich")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter.safetensors"}


def test_equal_and_nested_folders_are_refused(common: Path, tmp_path: Path) -> None:
    places = {"transformers": tmp_path / "hf", "immich": tmp_path / "hf" / "immich"}
    with pytest.raises(RAdapterError, match="--transformers .* and --immich .* are one folder"):
        export_into(tmp_path, common, tmp_path, [1.0], **places)
