"""Every family from its adapter to a release, against open_clip itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from PIL import Image

from radapter_export.release import UNFITTED
from radapter_serve.adapter import fold, load_adapter, save_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.encoders.loaded import load_release
from tests.export.conftest import Export
from tests.helpers.small_models import FAMILIES, make_base, random_adapter

pytestmark = pytest.mark.slow

CROPPED = (
    *("vit", "vit-quickgelu", "vit-layer-scale", "vit-custom-blocks", "mobileclip-b", "eva02"),
    *("pe-core", "resnet", "vitamin"),
)
NOT_IN_TENSORRT = {"Attention", "ReduceL2", "SequenceAt", "SplitToSequence"}
TEXTS = ["a photo of a cat", "", "many words " * 60, "Sand, sea & sun"]


def base_with_adapter(family: str, folder: Path) -> str:
    name = make_base(family, folder / "base")
    adapter = random_adapter(name, partial=FAMILIES[family].partial)
    save_adapter(adapter, folder / "adapter.safetensors")
    return name


@pytest.mark.parametrize("family", FAMILIES)
def test_release_of_a_family_gives_what_open_clip_gives(
    family: str, export: Export, tmp_path: Path
) -> None:
    name = base_with_adapter(family, tmp_path)
    (release,) = export([0.7], adapter=tmp_path)
    assert (UNFITTED in release.warnings) == ("siglip" in family)

    # The merged checkpoint is the fold, to the bit.
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{release.merged}")
    model, _, transform = loaded
    weights = load_base(name).model.state_dict()
    folded = fold(weights, load_adapter(tmp_path), 0.7)
    assert folded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, folded[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, weights[key]) for key, value in folded.items())

    # The served graphs give what open_clip gives with it.
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    repository = tmp_path / "repository"
    local = load_release(repository)
    assert release.facts["tokenizer"]["dynamic_length"] == (family in CROPPED)
    with torch.no_grad():
        images = model.eval().encode_image(transform(image)[None], normalize=True)
        tokens = open_clip.get_tokenizer(f"local-dir:{release.merged}")(TEXTS)
        texts = model.encode_text(tokens, normalize=True)
    pixels = local.pixels((tmp_path / "image.png").read_bytes())
    np.testing.assert_allclose(local.embed_pixels([pixels]), images, atol=1e-5)
    np.testing.assert_allclose(local.embed_texts(TEXTS), texts, atol=1e-5)
    names: set[str] = set()
    for encoder in ("image_encoder", "text_encoder"):
        graph = onnx.load(repository / encoder / "1" / "model.onnx").graph
        assert not {node.op_type for node in graph.node} & NOT_IN_TENSORRT
        names |= {tensor.name for tensor in graph.initializer}
    unused = ("logit_", "text_decoder.", "num_batches_tracked")
    assert {key for key in weights if not any(part in key for part in unused)} <= names


@pytest.mark.parametrize("family", FAMILIES)
def test_release_of_a_family_that_takes_any_alpha(
    family: str, export: Export, tmp_path: Path
) -> None:
    base = load_base(base_with_adapter(family, tmp_path))
    export("dynamic", adapter=tmp_path)
    model: Any = base.model
    model.load_state_dict(fold(model.state_dict(), load_adapter(tmp_path), 0.7))
    tokenizer: Any = base.tokenizer
    with torch.no_grad():
        expected = model.encode_text(tokenizer(TEXTS), normalize=True)
    local = load_release(tmp_path / "repository").at(0.7)
    np.testing.assert_allclose(local.embed_texts(TEXTS), expected, atol=1e-5)
