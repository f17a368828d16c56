"""Dense embeddings against their formulas, and models that have none."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from radapter_serve.clip.towers import METHODS, encode_patches
from radapter_serve.errors import RAdapterError

VISION = {"image_size": 48, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "quick gelu": ({}, True),
    "gelu": ({}, False),
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


@torch.no_grad()
def reference(model: Any, pixels: Tensor, way: str, quick_gelu: bool) -> Tensor:
    """[B, 3, 3, D]: the last block and what follows, by the formulas, in double precision."""
    inputs: list[Tensor] = []
    last = model.visual.transformer.resblocks[-1]
    hook = last.register_forward_pre_hook(lambda _, values: inputs.append(values[0].double()))
    model.encode_image(pixels)
    hook.remove()
    [x] = inputs
    w = {name: value.double() for name, value in model.visual.state_dict().items()}
    block = f"transformer.resblocks.{len(model.visual.transformer.resblocks) - 1}"
    width = 64
    depth = 16

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str, kind: str = ".") -> Tensor:
        weight, bias = (w[f"{block}.{name}{kind}{part}"] for part in ("weight", "bias"))
        return torch.einsum("bld,ed->ble", x, weight) + bias

    whole = linear(norm(x, f"{block}.ln_1"), "attn.in_proj", "_")
    heads = []
    for start in range(0, width, depth):
        k, v = (whole[..., part + start : part + start + depth] for part in (width, 2 * width))
        attention = torch.eye(10, dtype=torch.float64).expand(len(x), -1, -1)
        if way == "naclip":
            scores = torch.einsum("bid,bjd->bij", k, k) / math.sqrt(depth)
            for i in range(9):
                for j in range(9):
                    squared = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
                    scores[:, 1 + i, 1 + j] += math.exp(-squared / (2 * 5.0**2))
            attention = scores.softmax(-1)
        heads.append(torch.einsum("bij,bjd->bid", attention, v))
    identity = torch.ones(width)
    attended = linear(torch.cat(heads, -1), "attn.out_proj") * w.get(
        f"{block}.ls_1.gamma", identity
    )
    if way == "naclip":
        x = attended
    else:
        x = x + attended
        hidden = linear(norm(x, f"{block}.ln_2"), "mlp.c_fc")
        gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = hidden / (1 + torch.exp(-1.702 * hidden)) if quick_gelu else gelu
        x = x + linear(hidden, "mlp.c_proj") * w.get(f"{block}.ls_2.gamma", identity)
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
    expected = reference(model, pixels, way, quick_gelu)
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0)


def test_the_model_stays_as_it_is(pixels: Tensor) -> None:
    model = clip()
    structure = repr(model)
    before = model.encode_image(pixels)
    encode_patches(model, pixels, "naclip").sum().backward()
    assert repr(model) == structure
    assert "forward" not in vars(model.visual.transformer.resblocks[-1].attn)
    assert torch.equal(model.encode_image(pixels), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attentional_pool": True}, "pools with attention"),
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
