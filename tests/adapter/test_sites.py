"""Every family: where its adapters sit, that they train, and that they fold exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from radapter_serve.adapter import Metadata, attach, attach_adapter, base_digest, find_sites, fold
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.errors import RAdapterError
from radapter_serve.training import mpm_nce
from tests.helpers.small_models import FAMILIES, make_base

NATIVE = ("{}.resblocks.0.attn.out_proj", "{}.resblocks.0.mlp.c_proj")
TIMM = ["visual.trunk.blocks.0.attn.proj", "visual.trunk.blocks.0.mlp.fc2"]
BERT = [f"text.transformer.encoder.layer.0.{name}.dense" for name in ("attention.output", "output")]
IMAGE, CLIP, CUSTOM = (
    [name.format(tower) for name in NATIVE]
    for tower in ("visual.transformer", "transformer", "text.transformer")
)
MT5 = [
    f"text.transformer.block.0.layer.{name}"
    for name in ("0.SelfAttention.o", "1.DenseReluDense.wo")
]
M2M = [f"text.transformer.layers.0.{name}" for name in ("self_attn.out_proj", "fc2")]
SITES = {
    "vit": IMAGE + CLIP,
    "vit-quickgelu": IMAGE + CLIP,
    "vit-layer-scale": IMAGE + CLIP,
    "vit-custom-blocks": IMAGE + CLIP,
    "clipa": IMAGE + CLIP,
    "coca": IMAGE + CUSTOM,
    "siglip": TIMM + CUSTOM,
    "siglip2": TIMM + CUSTOM,
    "mobileclip-b": TIMM + CUSTOM,
    "eva02": TIMM + CUSTOM,
    "pe-core": TIMM + CUSTOM,
    "roberta": IMAGE + BERT,
    "xlm-roberta": IMAGE + BERT,
    "bert": IMAGE + BERT,
    "mt5": IMAGE + MT5,
    "nllb": IMAGE + M2M,
    "resnet": CLIP,
    "mobileclip-s": CUSTOM,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The small model of a family, each time anew."""
    names: dict[str, str] = {}

    def load(family: str) -> Base:
        if family not in names:
            names[family] = make_base(family, tmp_path_factory.mktemp(family))
        return load_base(names[family])

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_adapters_alone_and_they_fold_exactly(
    family: str, load: Callable[[str], Base]
) -> None:
    """Two steps of the paper's loss; then attached in either form and folded into the plain model
    are the same.
    """
    base = load(family)
    model = base.model
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    adapters = attach(model, partial=FAMILIES[family].partial)
    assert [site.key for site in adapters.sites] == SITES[family]
    pixels = torch.randn(
        4, 3, base.image_size, base.image_size, generator=torch.Generator().manual_seed(0)
    )
    tokens = base.tokenizer(["a cat", "many words " * 30, "", "a dog, in the snow"])
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.02)
    for _ in range(2):
        loss = mpm_nce(
            encode_image(model, pixels), encode_text(model, tokens), torch.arange(4), logit_scale=10
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metadata = Metadata(base.name, base_digest(before, SITES[family]))
    adapter = adapters.adapter(metadata)
    adapters.remove()
    assert all(tensor.abs().max() > 1e-3 for tensor in adapter.tensors.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    folded = copy.deepcopy(model)
    folded.load_state_dict(fold(before, adapter, 0.7))
    with torch.no_grad():
        # open_clip's own towers, without the cropping and merging of texts
        images = folded.encode_image(pixels)  # type: ignore[operator]
        texts = folded.encode_text(tokens)  # type: ignore[operator]
        expected = [nn.functional.normalize(embeds, dim=-1) for embeds in (images, texts)]
        assert (encode_text(model, tokens) - expected[1]).abs().max() > 1e-3
        for form in ("activation", "weight"):
            attached = attach_adapter(model, adapter, 0.7, form=form)  # type: ignore[arg-type]
            assert [site.key for site in attached.sites] == SITES[family]
            torch.testing.assert_close(encode_image(model, pixels), expected[0], rtol=0, atol=5e-6)
            torch.testing.assert_close(encode_text(model, tokens), expected[1], rtol=0, atol=5e-6)
            attached.remove()


@pytest.mark.parametrize(
    ("family", "tower"), [("resnet", "ModifiedResNet"), ("mobileclip-s", "TimmModel")]
)
def test_convolutional_towers_are_refused_or_left_out(
    family: str, tower: str, load: Callable[[str], Base], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(family).model
    with pytest.raises(
        RAdapterError, match=rf"image tower of .* \({tower}\) has no blocks .*--partial"
    ):
        attach(model)
    adapters = attach(model, partial=True)
    assert f"left out: the image tower of {type(model).__name__} ({tower})" in adapters.summary(
        model
    )
    adapters.remove()
    with pytest.raises(RAdapterError, match=r"image tower .*nothing was changed$"):
        find_sites(model, text=False, partial=True)


def test_norms_between_are_refused_or_left_out(load: Callable[[str], Base]) -> None:
    """A block of open_clip may have one behind attention; timm's post-norm blocks have one behind
    both layers.
    """
    import open_clip
    from timm.models.eva import EvaBlockPostNorm
    from timm.models.vision_transformer import ResPostBlock

    config = {
        "image_size": 32,
        "layers": 1,
        "width": 64,
        "patch_size": 16,
        "head_width": 32,
        "scale_attn": True,
    }
    normed = open_clip.CLIP(32, config, {"vocab_size": 8, "width": 32, "heads": 2, "layers": 1})
    with pytest.raises(
        RAdapterError, match=r"resblocks\.0\.ln_attn \(LayerNorm\) stands between .*--partial"
    ):
        attach(normed)
    assert [site.key for site in find_sites(normed, partial=True)] == [IMAGE[1], *CLIP]
    for block in (ResPostBlock(64, 2), EvaBlockPostNorm(64, 2)):
        model: Any = load("siglip").model
        model.visual.trunk.blocks[0] = block
        with pytest.raises(
            RAdapterError, match=r"blocks\.0\.norm1 \(LayerNorm\) stands between .*--partial"
        ):
            attach(model)
        adapters = attach(model, partial=True)
        assert [site.key for site in adapters.sites] == CUSTOM
        assert "norm1" in adapters.summary(model) and "and 1 more" in adapters.summary(model)


def test_an_adapter_of_layers_that_none_fits_is_refused(load: Callable[[str], Base]) -> None:
    base = load("vit")
    key = "visual.transformer.resblocks.0.mlp.c_fc"
    adapter = attach(base.model).adapter(Metadata("x", base_digest(base.model.state_dict(), [key])))
    adapter.tensors.clear()
    adapter.tensors[key] = torch.zeros(256, 256)
    with pytest.raises(RAdapterError, match=rf"damaged: adapters do not fit {key}"):
        attach_adapter(load("vit").model, adapter, 1.0)
