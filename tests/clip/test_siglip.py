"""Reading a SigLIP in the form of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from radapter_export.forms import TransformersForm, save_open_clip
from radapter_serve.clip.base import Base, load_base, split_name
from radapter_serve.clip.tokenizer import write_tokenizer
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.errors import RAdapterError
from tests.helpers.small_models import FAMILIES, _register, _tokenizer, make_base

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXTS = ["A cat, on a Sofa.", "two dogs", "", "ÉTÉ & l'été: 12345", "many words " * 60]


def pieces(folder: Path) -> None:
    """Write a tokenizer as MedSigLIP has it: the pieces of SentencePiece, with no other file."""
    lines = ["a photo of a cat on a sofa", "two dogs, many words", "été 12345", "don't know: it is"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_prefix=str(folder / "pieces"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "pieces.model").rename(folder / "spiece.model")
    (folder / "pieces.vocab").unlink()
    config = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def with_capitals(folder: Path) -> None:
    """Write a tokenizer that keeps capitals and punctuation, as SigLIP 2's does."""
    _tokenizer().save_pretrained(folder)


def write_siglip(folder: Path, write: Callable[[Path], None]) -> Any:
    """Write a small `SiglipModel` as the library does, with its processor; returns the model."""
    _register()
    folder.mkdir()
    write(folder)
    config = transformers.SiglipConfig(
        vision_config={**SIZES, "image_size": 32, "patch_size": 16},
        text_config={**SIZES, "vocab_size": 320, "max_position_embeddings": 64}
        | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1},
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.SiglipModel(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("siglip") / "medsiglip"
    return folder, write_siglip(folder, pieces)


@torch.no_grad()
def embeddings(base: Base, pixels: torch.Tensor, texts: list[str]) -> list[torch.Tensor]:
    model: Any = base.model
    tokenizer: Any = base.tokenizer
    images = model.encode_image(pixels, normalize=True)
    return [images, model.encode_text(tokenizer(texts), normalize=True)]


@torch.no_grad()
def test_it_gives_what_the_library_gives(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    folder, theirs = siglip
    base = load_base(f"local-dir:{folder}")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    inputs = processor(
        text=TEXTS, images=image, padding="max_length", truncation=True, return_tensors="pt"
    )
    output = theirs(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    images, texts = embeddings(base, inputs["pixel_values"], TEXTS)
    torch.testing.assert_close(images, output.image_embeds, atol=1e-3, rtol=0)
    torch.testing.assert_close(texts, output.text_embeds, atol=1e-5, rtol=0)
    model: Any = base.model
    logits = model.logit_scale.exp() * images @ texts.T + model.logit_bias
    torch.testing.assert_close(logits, output.logits_per_image, atol=2e-3, rtol=0)
    assert base.preprocess["resize_mode"] == "squash"
    assert base.preprocess["interpolation"] == "bicubic"

    # A merged checkpoint is this base to open_clip, and a server reads texts as it does.
    save_open_clip(tmp_path, base, base.model.state_dict())
    merged = load_base(f"local-dir:{tmp_path}")
    again = embeddings(merged, inputs["pixel_values"], TEXTS)
    torch.testing.assert_close(again, [images, texts], rtol=0, atol=0)
    spec = write_tokenizer(base.tokenizer, tmp_path / "served.json")
    served = Tokenizer.load(tmp_path / "served.json", spec)
    tokenizer: Any = base.tokenizer
    np.testing.assert_array_equal(served(TEXTS), tokenizer(TEXTS))


def test_texts_are_in_lower_case_if_the_tokenizer_keeps_capitals(tmp_path: Path) -> None:
    folder = tmp_path / "siglip2"
    write_siglip(folder, with_capitals)
    base = load_base(f"local-dir:{folder}")
    assert base.config["text_cfg"]["tokenizer_kwargs"] == {"clean": "lower"}
    tokenizer: Any = base.tokenizer
    small, capital, comma = tokenizer(["a cat", "A CAT", "a, cat"]).tolist()
    assert small == capital != comma


@pytest.mark.parametrize("family", ["siglip", "siglip2", "siglip2-b-32"])
def test_what_is_written_is_read_as_it_was(family: str, tmp_path: Path) -> None:
    text = {**FAMILIES[family].text, "context_length": 64}
    base = load_base(make_base(family, tmp_path / "base", text_cfg=text))
    (tmp_path / "hf").mkdir()
    TransformersForm(base).save(tmp_path / "hf", base.model.state_dict())
    again = load_base(f"local-dir:{tmp_path / 'hf'}")
    torch.testing.assert_close(
        dict(again.model.state_dict()), dict(base.model.state_dict()), rtol=0, atol=0
    )
    side = base.image_size
    pixels = torch.rand(2, 3, side, side) * 2 - 1
    ours, expected = (embeddings(model, pixels, TEXTS) for model in (again, base))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    names = ("interpolation", "resize_mode", "mean", "std")
    assert all(again.preprocess[name] == base.preprocess[name] for name in names)


def without_probe(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["vision_model.head.probe"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, value in fields.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_config(model_type="siglip2"),
            "it is a NaFlex model, .* allowed is a SigLIP 2 of one",
        ),
        (with_config(vision_config={"num_attention_heads": 4}), "timm has no SigLIP for images of"),
        (with_config(text_config={"hidden_act": "relu"}), "its text embeddings in transformers"),
        (without_probe, "it has no weight vision_model.head.probe"),
    ],
)
def test_a_model_that_differs_is_refused(
    siglip: tuple[Path, Any], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(siglip[0], tmp_path / "changed")
    change(folder)
    with pytest.raises(RAdapterError, match=message):
        load_base(f"local-dir:{folder}")


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP2-NaFlex:webli", "local-dir:{}"], ids=["name", "folder"]
)
def test_naflex_is_refused_by_name(name: str, tmp_path: Path) -> None:
    tower = {"timm_model_name": "naflexvit_base_patch16_siglip", "image_size": 384}
    config = {"model_cfg": {"embed_dim": 768, "vision_cfg": tower, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RAdapterError, match=r" is a NaFlex model, .* such as ViT-B-16-SigLIP2-256"):
        load_base(*split_name(name.format(tmp_path)))
