"""Places of adapters, attaching, dropping, scaling and folding, against formulas written out."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from radapter_serve.adapter import (
    Adapter,
    Metadata,
    attach,
    attach_adapter,
    base_digest,
    find_sites,
    fold,
    load_adapter,
    save_adapter,
)
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.errors import RAdapterError
from radapter_serve.training import mpm_nce
from tests.helpers.small_models import FAMILIES

Make = Callable[..., Adapter]  # of the model
TEXTS = ["a cat", "!? a !longer text about dogs and !x", "", "a cat"]
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
VITS = ("vit", "vit-quickgelu", "vit-layer-scale", "vit-custom-blocks", "clipa")
SITES = {
    **dict.fromkeys(VITS, IMAGE + CLIP),
    "coca": IMAGE + CUSTOM,
    **dict.fromkeys(
        ("siglip", "siglip2", "siglip2-b-32", "mobileclip-b", "mobileclip2-l", "eva02", "pe-core"),
        TIMM + CUSTOM,
    ),
    "vitamin": [*TIMM[:1], "visual.trunk.blocks.0.mlp.w2", *CUSTOM],
    **dict.fromkeys(("roberta", "xlm-roberta", "bert"), IMAGE + BERT),
    "mt5": IMAGE + MT5,
    "nllb": IMAGE + M2M,
    "resnet": CLIP,
    "mobileclip-s": CUSTOM,
}


@pytest.fixture(scope="module")
def model(tiny_clip_dir: str) -> nn.Module:
    return load_base(tiny_clip_dir).model


def test_vit_b_32_has_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
        adapters = attach(model)
    assert sum(p.numel() for p in adapters.parameters()) == 20_447_232  # 20.45 M, Table 1
    assert "20,447,232 parameters, 13.52 %" in adapters.summary(model)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("form", ["activation", "weight"])
@torch.no_grad()
def test_no_effect_at_the_start_and_none_left_behind(
    model: nn.Module, tiny_clip_dir: str, rank: int | None, form: Any
) -> None:
    torch.manual_seed(1)
    pixels = torch.randn(4, 3, 32, 32)
    tokens = open_clip.get_tokenizer(tiny_clip_dir)(TEXTS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = encode_image(model, pixels), encode_text(model, tokens)
    adapters = attach(model, rank, form=form)
    with pytest.raises(RAdapterError, match="has an adapter already"):
        attach(model)
    attached = encode_image(model, pixels), encode_text(model, tokens)
    adapters.remove()
    torch.testing.assert_close(attached, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.37, 1.0])
def test_fold_is_linear_in_alpha(model: nn.Module, random_adapter: Make, alpha: float) -> None:
    base = model.state_dict()
    adapter = random_adapter()
    whole = fold(base, adapter, 1.0)
    mixed = fold(base, adapter, alpha)
    for name, value in base.items():
        if name.rpartition(".")[0] not in adapter.keys:
            assert mixed[name] is value
            continue
        expected = (1 - alpha) * value.double() + alpha * whole[name].double()
        torch.testing.assert_close(mixed[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_fold_computes_in_fp32_and_casts_once(model: nn.Module, random_adapter: Make) -> None:
    half = copy.deepcopy(model).half().state_dict()
    wide = {name: value.float() for name, value in half.items()}
    tensors = random_adapter().tensors
    adapter = Adapter(tensors, Metadata("tiny", base_digest(wide, tensors)))
    expected = fold(wide, adapter, 0.5)
    for name, value in fold(half, adapter, 0.5).items():
        assert value.dtype == half[name].dtype
        assert torch.equal(value, expected[name].to(value.dtype))


def test_fold_refuses_values_that_are_not_finite_and_other_alphas(
    model: nn.Module, random_adapter: Make
) -> None:
    adapter = random_adapter()
    for alpha in (-0.1, 1.5, float("nan"), float("inf")):
        with pytest.raises(RAdapterError, match="alpha is .*allowed"):
            fold(model.state_dict(), adapter, alpha)
    adapter.tensors[adapter.keys[0]][0] = 3e38  # finite, but not its product
    layer = r"transformer\.resblocks\.0\.attn\.out_proj\.weight"
    with pytest.raises(RAdapterError, match=f"not finite in {layer}"):
        fold(model.state_dict(), adapter, 1.0)


def test_adapter_of_another_base_names_both_digests(model: nn.Module, random_adapter: Make) -> None:
    adapter = random_adapter()
    other: Any = copy.deepcopy(model)
    with torch.no_grad():
        other.visual.transformer.resblocks[0].mlp.c_proj.bias[0] += 1e-3
    digests = (base_digest(other.state_dict(), adapter.keys), adapter.metadata.base_digest)
    for action in (
        lambda: fold(other.state_dict(), adapter, 0.5),
        lambda: attach_adapter(other, adapter, 0.5),
    ):
        with pytest.raises(RAdapterError, match="another base") as error:
            action()
        assert all(digest in str(error.value) for digest in digests)
    assert not list(find_sites(other)[0].output._forward_hooks)


def test_attach_refuses_before_it_changes_anything(tiny_clip_dir: str) -> None:
    normed: Any = load_base(tiny_clip_dir).model
    for arguments in ({"rank": 0}, {"rank": 64}, {"drop": 1.0}, {"drop": -0.1}):
        with pytest.raises(RAdapterError, match="allowed"):
            attach(normed, **arguments)
    normed.transformer.resblocks[1].ln_attn = nn.LayerNorm(64)
    with pytest.raises(RAdapterError, match=r"resblocks\.1\.ln_attn .*lies between .*--partial"):
        attach(normed)
    assert all(p.requires_grad for p in normed.parameters())
    assert not any(module._forward_hooks for module in normed.modules())


@pytest.mark.parametrize("rank", [None, 2])
def test_file_round_trip_and_a_full_disk(
    random_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    adapter = random_adapter(rank=rank)

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RAdapterError, match="No space left"):
        patch.setattr("radapter_serve.adapter.file.save_file", full)
        save_adapter(adapter, tmp_path / "adapter.safetensors")
    assert list(tmp_path.iterdir()) == []
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    for path in (tmp_path, tmp_path / "adapter.safetensors"):
        loaded = load_adapter(path)
        assert loaded.metadata == adapter.metadata and loaded.digest == adapter.digest
        torch.testing.assert_close(loaded.tensors, adapter.tensors, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_adapters_alone_and_they_fold_exactly(
    family: str, load: Callable[[str], Base]
) -> None:
    """After two steps of the loss, adapters in either form and the fold compute the same."""
    rank = 3 if family == "vit-quickgelu" else None
    base = load(family)
    model = base.model
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    adapters = attach(model, rank, partial=FAMILIES[family].partial)
    assert [site.key for site in adapters.sites] == SITES[family]
    pixels = torch.randn(
        4, 3, base.image_size, base.image_size, generator=torch.Generator().manual_seed(0)
    )
    tokens = base.tokenizer(["a cat", "many words " * 30, "", "a cat"])  # equal ones are merged
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.02)
    for _ in range(2):
        loss = mpm_nce(
            encode_image(model, pixels), encode_text(model, tokens), torch.arange(4), logit_scale=10
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metadata = Metadata(base.name, base_digest(before, SITES[family]), rank=rank)
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
    family: str, tower: str, load: Callable[[str], Base]
) -> None:
    model = load(family).model
    no_blocks = rf"image tower of .* \({tower}\) has no blocks"
    with pytest.raises(RAdapterError, match=f"{no_blocks} .*--partial"):
        attach(model)
    adapters = attach(model, partial=True)
    assert re.search(f"left out: the {no_blocks}", adapters.summary(model))
    adapters.remove()
    with pytest.raises(RAdapterError, match=r"image tower .*nothing was changed$"):
        find_sites(model, adapt="image-tower", partial=True)


def test_norms_between_are_refused_or_left_out(load: Callable[[str], Base]) -> None:
    """timm's post-norm blocks have one behind both layers."""
    from timm.models.eva import EvaBlockPostNorm
    from timm.models.vision_transformer import ResPostBlock

    for block in (ResPostBlock(64, 2), EvaBlockPostNorm(64, 2)):
        model: Any = load("siglip").model
        model.visual.trunk.blocks[0] = block
        between = r"blocks\.0\.norm1 \(LayerNorm\) lies between"
        with pytest.raises(RAdapterError, match=f"{between} .*--partial"):
            attach(model)
        adapters = attach(model, partial=True)
        assert [site.key for site in adapters.sites] == CUSTOM
        assert re.search(f"{between} .* and 1 more", adapters.summary(model))


def test_an_adapter_of_layers_that_none_fits_is_refused(load: Callable[[str], Base]) -> None:
    base = load("vit")
    key = "visual.transformer.resblocks.0.mlp.c_fc"
    adapter = attach(base.model).adapter(Metadata("x", base_digest(base.model.state_dict(), [key])))
    adapter.tensors.clear()
    adapter.tensors[key] = torch.zeros(256, 256)
    with pytest.raises(RAdapterError, match=rf"damaged: adapters do not fit {key}"):
        attach_adapter(load("vit").model, adapter, 1.0)
