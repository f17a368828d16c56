"""Dense embeddings against a computation of their own from the state dict, and with adapters in
every form.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from radapter_serve.adapter import Adapter, Metadata, attach, attach_adapter, base_digest, fold
from radapter_serve.clip.towers import METHODS, encode_patches
from radapter_serve.errors import RAdapterError

VISION = {"image_size": 48, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "quick gelu": ({}, True),
    "gelu": ({}, False),
    "no ln_pre": ({"no_ln_pre": True}, True),
    "layer scale": ({"ls_init_value": 0.3}, True),
    "ln after the pool": ({"final_ln_after_pool": True, "pool_type": "avg"}, False),
    "one block": ({"layers": 1}, True),
}


def clip(quick_gelu: bool = True, **vision: Any) -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config: Any = {"vision_cfg": {**VISION, **vision}, "text_cfg": TEXT}
        model = open_clip.CLIP(embed_dim=24, quick_gelu=quick_gelu, **config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def reference(
    state: dict[str, Tensor], pixels: Tensor, way: str, quick_gelu: bool = True
) -> Tensor:
    """[B, 3, 3, D] by the formulas, in double precision, with nothing of open_clip's modules."""
    w = {
        name.removeprefix("visual."): value.double()
        for name, value in state.items()
        if name.startswith("visual.")
    }
    width = 64
    depth = 16

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in w:
            return x
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def feed(x: Tensor, block: str) -> Tensor:
        hidden = (
            torch.einsum("bld,hd->blh", x, w[f"{block}.mlp.c_fc.weight"])
            + w[f"{block}.mlp.c_fc.bias"]
        )
        gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = hidden / (1 + torch.exp(-1.702 * hidden)) if quick_gelu else gelu
        x = (
            torch.einsum("blh,dh->bld", hidden, w[f"{block}.mlp.c_proj.weight"])
            + w[f"{block}.mlp.c_proj.bias"]
        )
        return x * w.get(f"{block}.ls_2.gamma", torch.ones(width))

    def attend(x: Tensor, block: str, kind: str) -> Tensor:
        whole = (
            torch.einsum("bld,ed->ble", x, w[f"{block}.attn.in_proj_weight"])
            + w[f"{block}.attn.in_proj_bias"]
        )
        heads = []
        for start in range(0, width, depth):
            q, k, v = (
                whole[..., part + start : part + start + depth] for part in (0, width, 2 * width)
            )

            def compare(a: Tensor, b: Tensor) -> Tensor:
                return torch.einsum("bid,bjd->bij", a, b) / math.sqrt(depth)

            if kind == "plain":
                attention = compare(q, k).softmax(-1)
            elif kind == "maskclip":
                attention = torch.eye(x.shape[1], dtype=torch.float64).expand(len(x), -1, -1)
            else:
                scores = compare(k, k)
                for i in range(9):
                    for j in range(9):
                        squared = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
                        scores[:, 1 + i, 1 + j] += math.exp(-squared / (2 * 5.0**2))
                attention = scores.softmax(-1)
            heads.append(torch.einsum("bij,bjd->bid", attention, v))
        x = torch.cat(heads, -1)
        x = (
            torch.einsum("bld,ed->ble", x, w[f"{block}.attn.out_proj.weight"])
            + w[f"{block}.attn.out_proj.bias"]
        )
        return x * w.get(f"{block}.ls_1.gamma", torch.ones(width))

    patches = pixels.double().unfold(2, 16, 16).unfold(3, 16, 16)  # [B, 3, 3, 3, 16, 16]
    x = torch.einsum("bcrsij,dcij->brsd", patches, w["conv1.weight"]).flatten(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    layers = sum(name.endswith("ln_1.weight") for name in w)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        kind = "plain" if layer < layers - 1 else way
        attended = attend(norm(x, f"{block}.ln_1"), block, kind)
        if kind == "naclip":
            x = attended
        else:
            x = x + attended
            x = x + feed(norm(x, f"{block}.ln_2"), block)
    x = norm(x, "ln_post")[:, 1:] @ w["proj"]
    return (x / x.norm(dim=-1, keepdim=True)).unflatten(1, (3, 3)).float()


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_its_formula(kind: str, way: str, pixels: Tensor) -> None:
    vision, quick_gelu = KINDS[kind]
    model = clip(quick_gelu, **vision)
    with torch.no_grad():
        embeds = encode_patches(model, pixels, way)
    assert embeds.shape == (2, 3, 3, 24)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(
        embeds, reference(model.state_dict(), pixels, way, quick_gelu), atol=1e-5, rtol=0
    )


def test_the_model_stays_as_it_is(pixels: Tensor) -> None:
    model = clip()
    structure = repr(model)
    before = model.encode_image(pixels)
    encode_patches(model, pixels, "naclip").sum().backward()
    assert repr(model) == structure
    assert "forward" not in vars(model.visual.transformer.resblocks[-1].attn)
    assert torch.equal(model.encode_image(pixels), before)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    model = clip()
    adapters = attach(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in adapters.named_tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    digest = base_digest(model.state_dict(), [site.key for site in adapters.sites])
    return adapters.adapter(Metadata(architecture="tiny", base_digest=digest))


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("form", ["activation", "weight"])
def test_attached_adapters_count_as_folded_ones_at_every_alpha(
    way: str, form: Any, adapter: Adapter, pixels: Tensor
) -> None:
    state = clip().state_dict()
    attached = clip()
    adapters = attach_adapter(attached, adapter, 0.0, form=form)
    for alpha in (0.0, 0.4, 1.0):
        adapters.alpha = alpha
        folded = fold(state, adapter, alpha)
        with torch.no_grad():
            embeds = encode_patches(attached, pixels, way)
        torch.testing.assert_close(embeds, reference(folded, pixels, way), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attentional_pool": True}, "pools by attention"),
        ({"block_type": "custom"}, "its last block is a CustomResidualAttentionBlock"),
        ({"image_size": [48, 32]}, r"no square \(3 x 2\)"),
        ({"layers": [1, 1, 1, 1], "width": 32}, "its image tower is a ModifiedResNet"),
    ],
)
def test_a_model_that_cannot_be_edited_is_refused(
    change: dict[str, Any], message: str, pixels: Tensor
) -> None:
    with pytest.raises(RAdapterError, match=f"gives no dense embeddings: .*{message}.*ViT-B-16"):
        encode_patches(clip(**change), pixels, "naclip")


def test_other_things_that_cannot_be_done_are_said(pixels: Tensor) -> None:
    with pytest.raises(RAdapterError, match="dense is 'clip'; allowed: none, maskclip, naclip"):
        encode_patches(clip(), pixels, "clip")
    with pytest.raises(RAdapterError, match=r"pixels are \(2, 3, 32, 32\); this .* 3, 48, 48\]"):
        encode_patches(clip(), pixels[..., :32, :32], "naclip")
    with pytest.raises(RAdapterError, match="image tower is a NoneType"):
        encode_patches(nn.Linear(1, 1), pixels, "naclip")
    dropping = clip(patch_dropout=0.5)
    assert encode_patches(dropping, pixels, "naclip").shape == (2, 3, 3, 24)
    with pytest.raises(RAdapterError, match=r"call model.eval\(\)"):
        encode_patches(dropping.train(), pixels, "naclip")
