"""Adapters on the projections: a map of finished embeddings, which folds into the last layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from radapter_serve.adapter import (
    Adapter,
    Metadata,
    attach,
    attach_adapter,
    average_adapters,
    base_digest,
    find_sites,
    fold,
    load_adapter,
    save_adapter,
)
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image, encode_patches, encode_text
from radapter_serve.contract.embeddings import map_embeddings
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.models import from_adapter
from tests.helpers.small_models import FAMILIES, make_base, random_adapter

TEXTS = ["a cat", "many words " * 30, "", "a cat"]
# The projections of each family; those with none have no linear last layer.
TEXT_SITES = {
    **dict.fromkeys(FAMILIES, "text.text_projection"),
    **dict.fromkeys(
        ("vit", "vit-quickgelu", "vit-layer-scale", "vit-custom-blocks"), "text_projection"
    ),
    **dict.fromkeys(("clipa", "resnet"), "text_projection"),
    **dict.fromkeys(("roberta", "xlm-roberta", "bert", "mt5"), None),
    "nllb": "text.proj",
}
IMAGE_SITES = {
    **dict.fromkeys(FAMILIES, "visual.proj"),
    **dict.fromkeys(("mobileclip-b", "mobileclip2-l", "eva02", "pe-core"), "visual.trunk.head"),
    "vitamin": "visual.head.proj",
    **dict.fromkeys(("siglip", "siglip2", "siglip2-b-32", "mobileclip-s", "resnet"), None),
}


def mapped(embeds: Tensor, matrix: Tensor, alpha: float) -> Tensor:
    """The unit vectors of `v + α·v·A`, in float64, with A the transpose of the file's matrix."""
    rows = embeds.double()
    return nn.functional.normalize(rows + alpha * rows @ matrix.double().T, dim=1)


@given(
    width=st.integers(2, 24),
    inner=st.integers(1, 24),
    rank=st.none() | st.integers(1, 8),
    layer=st.sampled_from(("parameter", "linear", "biased")),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_a_folded_projection_maps_the_bases_unit_vectors(
    width: int, inner: int, rank: int | None, layer: str, alpha: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    rank = None if rank is None else min(rank, width - 1)
    key = "text_projection"
    state = {key: random(inner, width)}
    if layer != "parameter":
        state = {f"{key}.weight": random(width, inner)}
        if layer == "biased":
            state[f"{key}.bias"] = random(width)
    # A change that is at most half as long as what it changes, so that nothing cancels.
    tensors = {key: random(width, width)}
    if rank is not None:
        tensors = {f"{key}.up": random(width, rank), f"{key}.down": random(rank, width)}
    adapter = Adapter(tensors, Metadata("x", base_digest(state, [key]), rank=rank))
    shrink = 0.5 / float(torch.linalg.matrix_norm(adapter.matrix(key), ord=2))
    adapter.tensors[key if rank is None else f"{key}.up"].mul_(shrink)
    folded = fold(state, adapter, alpha)
    features = random(5, inner)

    def embed(state: dict[str, Tensor]) -> Tensor:
        state = {name: tensor.double() for name, tensor in state.items()}
        if layer == "parameter":
            rows = features.double() @ state[key]
        else:
            rows = nn.functional.linear(
                features.double(), state[f"{key}.weight"], state.get(f"{key}.bias")
            )
        # The rounding of float32's weights grows with the length that a short row is scaled by.
        assume(float(rows.norm(dim=1).min()) > 0.5)
        return nn.functional.normalize(rows, dim=1)

    expected = mapped(embed(state), adapter.matrix(key), alpha)
    torch.testing.assert_close(embed(folded), expected, rtol=0, atol=1e-6)
    change: Any = adapter.matrix(key).numpy()
    if rank is not None:
        change = (adapter.tensors[f"{key}.up"].numpy(), adapter.tensors[f"{key}.down"].numpy())
    rows = map_embeddings(embed(state).numpy(), change, alpha)
    assert rows.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(rows).double(), expected, rtol=0, atol=1e-6)


def embedded(base: Base) -> tuple[Tensor, Tensor]:
    """The unit vectors of four images and texts."""
    size = base.image_size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return encode_image(base.model, pixels), encode_text(base.model, base.tokenizer(TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_projections_or_is_refused_by_name(
    family: str, load: Callable[[str], Base]
) -> None:
    """Attached in either form and folded, an adapter maps the embeddings that the base makes."""
    base = load(family)
    text = TEXT_SITES[family]
    image = IMAGE_SITES[family]
    before = embedded(base)
    state = {key: value.clone() for key, value in base.model.state_dict().items()}
    for site, adapt, tower in (
        (text, "text-projection", "text"),
        (image, "image-projection", "image"),
    ):
        if site is None:
            match = f"the {tower} tower of .* has no linear last layer .*nothing was changed"
            with pytest.raises(RAdapterError, match=match):
                attach(base.model, adapt=adapt)  # type: ignore[arg-type]
    keys = [key for key in (image, text) if key is not None]
    if not keys:
        return
    assert [site.key for site in find_sites(base.model, adapt="projections", partial=True)] == keys
    rank = 3 if family == "vit-quickgelu" else None
    adapter = random_adapter(base.name, adapt="projections", partial=True, rank=rank)
    assert adapter.keys == sorted(keys)
    expected = [
        mapped(embeds, adapter.matrix(key), 0.7) if key else embeds.double()
        for key, embeds in zip((image, text), before, strict=True)
    ]

    for form in ("activation", "weight"):
        attached = attach_adapter(base.model, adapter, 0.7, form=form)  # type: ignore[arg-type]
        embeds = embedded(base)
        attached.remove()
        for ours, theirs in zip(embeds, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(dict(base.model.state_dict()), state, rtol=0, atol=0)
    base.model.load_state_dict(fold(state, adapter, 0.7))
    for ours, theirs in zip(embedded(base), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)


def test_a_linear_head_of_timm_and_a_text_projection_with_a_bias(tmp_path: Path) -> None:
    from tests.helpers.small_models import SIGLIP_TEXT, _timm

    image = _timm(
        "vit_small_patch16_siglip_32", pool="map", timm_proj="linear", timm_proj_bias=True
    )
    text = {**SIGLIP_TEXT, "width": 64}
    base = load_base(make_base("siglip", tmp_path, vision_cfg=image, text_cfg=text, embed_dim=48))
    adapter = random_adapter(base.name, adapt="projections")
    assert adapter.keys == ["text.text_projection", "visual.head.proj"]
    before = embedded(base)
    state = base.model.state_dict()
    assert "text.text_projection.bias" in state and "visual.head.proj.bias" in state
    base.model.load_state_dict(fold(state, adapter, 0.4))
    for key, ours, theirs in zip(reversed(adapter.keys), embedded(base), before, strict=True):
        expected = mapped(theirs, adapter.matrix(key), 0.4)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)


def test_an_mlp_head_is_refused(tmp_path: Path) -> None:
    from tests.helpers.small_models import _timm

    image = _timm("vit_small_patch16_siglip_32", pool="map", timm_proj="mlp")
    base = load_base(make_base("siglip", tmp_path, vision_cfg=image, embed_dim=48))
    with pytest.raises(RAdapterError, match=r"image tower .*no visual.proj or visual.head.proj"):
        attach(base.model, adapt="projections")
    adapters = attach(base.model, adapt="projections", partial=True)
    assert [site.key for site in adapters.sites] == ["text.text_projection"]
    assert "left out: the image tower" in adapters.summary(base.model)


def test_gradients_reach_a_projection_and_a_second_adapter_is_refused(
    load: Callable[[str], Base],
) -> None:
    base = load("vit")
    adapters = attach(base.model, adapt="projections")
    with pytest.raises(RAdapterError, match=r"visual\.proj has an adapter already"):
        attach(base.model, adapt="image-projection")
    size = base.image_size
    images = encode_image(base.model, torch.randn(4, 3, size, size))
    loss = (images * encode_text(base.model, base.tokenizer(TEXTS))).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-4 for p in adapters.parameters())
    trained = {id(p) for p in base.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapters.parameters()}


def test_patches_are_mapped_too(load: Callable[[str], Base]) -> None:
    base = load("vit")
    adapter = random_adapter(base.name, adapt="image-projection")
    size = base.image_size
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        before = encode_patches(base.model, pixels, "naclip").flatten(0, 2)
        attach_adapter(base.model, adapter, 0.6)
        after = encode_patches(base.model, pixels, "naclip").flatten(0, 2)
    expected = mapped(before, adapter.matrix("visual.proj"), 0.6)
    torch.testing.assert_close(after.double(), expected, rtol=0, atol=1e-6)


def test_files_and_averages_of_projections(load: Callable[[str], Base], tmp_path: Path) -> None:
    base = load("vit")
    first = random_adapter(base.name, adapt="projections")
    second = random_adapter(base.name, 0.2, adapt="projections", rank=4)
    save_adapter(first, tmp_path / "adapter.safetensors")
    assert load_adapter(tmp_path).digest == first.digest
    assert set(first.tensors) == {"visual.proj", "text_projection"}
    average = average_adapters([first, second], [0.25, 0.75])
    state = base.model.state_dict()
    folds = [fold(state, adapter, 0.5) for adapter in (first, second, average)]
    for key in ("visual.proj", "text_projection"):
        expected = 0.25 * folds[0][key] + 0.75 * folds[1][key]
        torch.testing.assert_close(folds[2][key], expected, rtol=1e-5, atol=1e-6)
    towers = random_adapter(base.name)
    with pytest.raises(RAdapterError, match=r"adapter 1 adapts .* and adapter 2 .*--adapt"):
        average_adapters([first, towers])
    for name in ("visual.proj", "visual.conv1.weight", "ln_final.bias"):  # all of both towers
        other = copy.deepcopy(state)
        other[name][0] += 1
        with pytest.raises(RAdapterError, match="belongs to another base"):
            fold(other, first, 0.5)
    other = copy.deepcopy(state)
    other["logit_scale"] += 1
    assert len(fold(other, first, 0.5)) == len(state)
    metadata = Metadata("x", base_digest(state, ["visual.proj"]))
    narrow = Adapter({"visual.proj": torch.zeros(8, 8)}, metadata)
    with pytest.raises(
        RAdapterError, match=r"'visual\.proj' is .*\(8, 8\), should be .*\(32, 32\)"
    ):
        fold(state, narrow, 0.5)


def test_evaluation_scales_a_projection(load: Callable[[str], Base], tmp_path: Path) -> None:
    base = load("vit")
    adapter = random_adapter(base.name, adapt="projections")
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    _, texts = embedded(base)
    for candidate, alpha in zip(from_adapter(tmp_path, [0.0, 0.4]), (0.0, 0.4), strict=True):
        expected = mapped(texts, adapter.matrix("text_projection"), alpha)
        embeds = torch.from_numpy(candidate.embed_texts(TEXTS)).double()
        torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)


def test_a_place_that_there_is_not_is_refused(load: Callable[[str], Base]) -> None:
    with pytest.raises(RAdapterError, match="adapt is 'projection'; allowed: towers, image-tower"):
        attach(load("vit").model, adapt="projection")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 4, 5, 40])
@pytest.mark.parametrize("rank", [None, 3])
def test_few_and_many_rows_are_mapped_alike(count: int, rank: int | None) -> None:
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((count, 16)).astype(np.float32)
    up, down = draw.standard_normal((2, 16, rank or 16)).astype(np.float32)
    change = up if rank is None else (up, down.T)
    f = up.astype(np.float64) if rank is None else up.astype(np.float64) @ down.T
    expected = rows + 0.7 * rows @ f.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(map_embeddings(rows, change, 0.7), expected, atol=1e-6)
