"""The merged checkpoint and the form of transformers, opened by these libraries as a user would."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file

from radapter_export.forms import base_form, write_processor
from radapter_serve.adapter import base_digest, fold, load_adapter, save_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.transformers import (
    Form,
    check_processor,
    form_of,
    open_processor,
    to_transformers,
)
from radapter_serve.errors import RAdapterError
from tests.conftest import export_into
from tests.export.conftest import Export, Exported
from tests.helpers.shared import shared
from tests.helpers.small_models import FAMILIES, make_base, random_adapter


def test_open_clip_loads_it_equal_to_the_bit(
    exported: Exported, tiny_base: Base, adapter_path: Path
) -> None:
    folder, releases = exported
    assert {path.name for path in (folder / "merged").iterdir()} == {"alpha-0.3", "alpha-0.8"}
    for release in releases:
        weights = {"open_clip_config.json", "open_clip_model.safetensors"}
        assert {path.name for path in (release.merged).iterdir()} == {
            *weights,
            "release.json",
            "README.md",
        }
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{release.merged}")
        expected = fold(tiny_base.model.state_dict(), load_adapter(adapter_path), release.alpha)
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
        _, _, expected_preprocess = open_clip.create_model_and_transforms(tiny_base.name)
        assert repr(preprocess) == repr(expected_preprocess)
        facts = json.loads((release.merged / "release.json").read_text(encoding="utf-8"))
        assert facts == release.facts
        assert load_base(f"local-dir:{release.merged}").config == tiny_base.config


TEXTS = ["a photo of a cat", "two dogs on a red sofa", "many words " * 60, ""]
#: upright, wide and square ones, whose margins transformers and open_clip crop alike
SIZES = ((40, 48), (52, 44), (32, 32), (96, 64))
FORM = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    *("release.json", "tokenizer.json", "tokenizer_config.json"),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def images() -> list[Image.Image]:
    random = np.random.default_rng(2)
    small = [Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in SIZES]
    pairs = zip(small, SIZES, strict=True)
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in pairs]


@torch.no_grad()
def by_open_clip(merged: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """open_clip's own embeddings of `images()` and TEXTS, and its scale of the cosines."""
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    model, _, transform = loaded
    tokens = open_clip.get_tokenizer(f"local-dir:{merged}")(TEXTS)
    pixels = torch.stack([transform(image) for image in images()])
    image = model.eval().encode_image(pixels, normalize=True).numpy()
    text = model.encode_text(tokens, normalize=True).numpy()
    return image, text, float(model.logit_scale.exp())


def unit(output: Any) -> np.ndarray:
    if hasattr(output, "pooler_output"):
        output = output.pooler_output
    values = output.detach().numpy() if isinstance(output, torch.Tensor) else np.asarray(output)
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True))


def export_forms(common: Path, folder: Path, base: str, alphas: Any) -> None:
    """Export a random adapter of a base, and the adapter, into a folder."""
    path = folder / "adapter.safetensors"
    save_adapter(random_adapter(base, rank=4, scale=0.3), path)
    export_into(folder, common, path, alphas, transformers=folder / "hf")


@pytest.fixture(scope="session")
def clip(common: Path, tiny_clip_dir: str) -> Path:
    """A base, a low-rank adapter of it, and all forms at two alphas. Not to be changed."""

    def make(folder: Path) -> None:
        (folder / "base").symlink_to(tiny_clip_dir.removeprefix("local-dir:"))
        export_forms(common, folder, f"local-dir:{folder / 'base'}", [0.3, 0.8])

    return shared(common, "forms", make)


@pytest.fixture(scope="session")
def siglip(common: Path) -> Path:
    """The same of a SigLIP whose texts have 64 tokens, as `transformers` takes for granted."""
    text = {**FAMILIES["siglip"].text, "context_length": 64}

    def make(folder: Path) -> None:
        export_forms(common, folder, make_base("siglip", folder / "base", text_cfg=text), [0.7])

    return shared(common, "siglip", make)


def check_transformers(
    folder: Path, expected: tuple[np.ndarray, np.ndarray, float], padding: Any = True
) -> None:
    assert {path.name for path in folder.iterdir()} == FORM
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.logit_scale.exp().item() == pytest.approx(expected[2], rel=1e-6)
    texts = processor(text=TEXTS, padding=padding, truncation=True, return_tensors="pt")
    np.testing.assert_allclose(unit(model.get_text_features(**texts)), expected[1], atol=1e-5)
    # transformers resizes by torchvision and open_clip by Pillow, which round a few pixels in
    # another way; an image of the model's size is exact.
    pixels = processor(images=images(), return_tensors="pt")
    embeds = unit(model.get_image_features(**pixels))
    np.testing.assert_allclose(embeds, expected[0], atol=5e-3)
    np.testing.assert_allclose(embeds[2], expected[0][2], atol=1e-5)


def test_transformers_gives_what_open_clip_gives(clip: Path) -> None:
    base = by_open_clip(clip / "base")
    expected = by_open_clip(clip / "merged" / "alpha-0.8")
    check_transformers(clip / "hf" / "alpha-0.8", expected)
    assert np.abs(base[0] - expected[0]).max() > 1e-2
    assert np.abs(base[1] - expected[1]).max() > 1e-2


@pytest.mark.slow
def test_transformers_gives_what_open_clip_gives_of_siglip(siglip: Path) -> None:
    check_transformers(siglip / "hf", by_open_clip(siglip / "merged"), padding="max_length")
    model = transformers.AutoModel.from_pretrained(siglip / "hf")
    state = load_base(f"local-dir:{siglip / 'merged'}").model.state_dict()
    assert model.logit_bias.item() == pytest.approx(state["logit_bias"].item())


@pytest.mark.slow
def test_sentence_transformers_opens_both(clip: Path, siglip: Path) -> None:
    library = pytest.importorskip(
        "sentence_transformers", reason="pip install -e '.[integrations]'"
    )
    # A SigLIP has to fill texts up.
    filled = {"processing_kwargs": {"text": {"padding": "max_length"}}}
    forms = {
        clip / "hf" / "alpha-0.3": (clip / "merged" / "alpha-0.3", {}),
        siglip / "hf": (siglip / "merged", filled),
    }
    for form, (merged, options) in forms.items():
        image, text, _ = by_open_clip(merged)
        model = library.SentenceTransformer(str(form), device="cpu")
        np.testing.assert_allclose(unit(model.encode(TEXTS, **options)), text, atol=1e-5)
        np.testing.assert_allclose(unit(model.encode([images()[2]])), image[2:3], atol=1e-5)


def test_a_release_that_takes_any_alpha_has_the_form_at_its_default(
    dynamic: Exported, common: Path, tiny_base: Base, adapter_path: Path
) -> None:
    """The adapter's own α is 0.5; the samples of such a release mix others."""
    [release] = dynamic[1]
    assert release.forms[0].agreement.max_error < 1e-5
    folded = fold(tiny_base.model.state_dict(), load_adapter(adapter_path), 0.5)
    form = form_of(tiny_base.name, tiny_base.model, tiny_base.tokenizer)
    expected = to_transformers(folded, form)
    weights = load_file(common / "any-form" / "model.safetensors")
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Fails where an export gets as far as a graph."""
    monkeypatch.setattr(
        "radapter_export.release.image_graph", lambda *_: pytest.fail("a graph was made")
    )


def test_a_family_without_the_form_is_refused_before_a_graph_is_made(
    export: Export, no_graph: None, tmp_path: Path
) -> None:
    name = make_base("coca", tmp_path / "base")
    save_adapter(random_adapter(name), tmp_path / "adapter.safetensors")
    with pytest.raises(RAdapterError, match="has no form in transformers: "):
        export(adapter=tmp_path, transformers=tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter.safetensors"}


VIT = FAMILIES["vit"]


@pytest.fixture
def no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare `base_form` the vocabulary, which takes long to write and to read."""
    for name in ("write_processor", "open_processor", "check_processor"):
        monkeypatch.setattr(f"radapter_export.forms.{name}", lambda *_: ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_cfg": {**VIT.text, "no_causal_mask": True}}, "its text embeddings"),
        (
            {"text_cfg": {**VIT.text, "proj_bias": True}, "custom_text": True},
            "text.text_projection.bias is a weight of only one",
        ),
        ({"vision_cfg": {**VIT.image, "pool_type": "avg"}}, "its image embeddings"),
    ],
)
def test_what_the_library_lacks_is_named(
    no_processor: None, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = load_base(make_base("vit", tmp_path, **changes))
    with pytest.raises(RAdapterError, match=message):
        base_form(base)


def test_a_text_tower_by_itself_and_another_epsilon_have_the_form(
    no_processor: None, tmp_path: Path
) -> None:
    """By `custom_text` only the names of the weights differ."""
    plain = load_base(make_base("vit", tmp_path / "whole"))
    custom = load_base(make_base("vit", tmp_path / "apart", custom_text=True))
    state = {name.removeprefix("text."): value for name, value in custom.model.state_dict().items()}
    plain.model.load_state_dict(state)
    weights, expected = (
        to_transformers(base.model.state_dict(), base_form(base)) for base in (custom, plain)
    )
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    image = {**VIT.image, "norm_kwargs": {"eps": 1e-3}}
    other = load_base(make_base("vit", tmp_path / "other", vision_cfg=image))
    assert base_form(other).config["vision_config"]["layer_norm_eps"] == 1e-3


@pytest.mark.slow
def test_a_form_that_differs_from_torch_leaves_nothing(
    clip: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(load_adapter(clip / "adapter.safetensors"), tmp_path / "adapter.safetensors")

    def with_gelu(base: Any) -> Form:
        form = base_form(base)
        text = {**form.config["text_config"], "hidden_act": "gelu"}
        return dataclasses.replace(form, config={**form.config, "text_config": text})

    monkeypatch.setattr("radapter_export.forms.base_form", with_gelu)
    loose = {"precision": "int8", "tolerance": 0.9}  # which is for graphs: the weights stay in fp32
    with pytest.raises(RAdapterError, match="text_encoder .* differs from torch .* please report"):
        export(adapter=tmp_path, transformers=tmp_path / "hf", **loose)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors"}


def test_another_resizing_or_tokenizer_is_refused(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_processor(tmp_path, tiny_base)
    right, tokenizer = open_processor(tmp_path)
    ours = (tiny_base.preprocess, tiny_base.tokenizer)
    check_processor(right, tokenizer, *ours)
    square = {"height": 32, "width": 32}
    for change in (
        {"resample": 2},
        {"size": square, "do_center_crop": False},
        {"image_mean": [0.5, 0.5, 0.5]},
    ):
        other = type(right).from_dict({**right.to_dict(), **change})
        with pytest.raises(RAdapterError, match="its processor in transformers"):
            check_processor(other, tokenizer, *ours)
    monkeypatch.setattr("radapter_serve.clip.transformers._TEXTS", ["“Quoted”"])
    with pytest.raises(RAdapterError, match="its tokenizer .* reads .* in another way"):
        check_processor(right, tokenizer, *ours)


def test_the_crop_is_one_pixel_off_for_the_sizes_that_the_page_names(
    tiny_base: Base, tmp_path: Path
) -> None:
    """torchvision rounds half a pixel to an even place, transformers cuts it off."""
    write_processor(tmp_path, tiny_base)
    processor, _ = open_processor(tmp_path)
    transform: Any = image_transform_v2(PreprocessCfg(**tiny_base.preprocess), is_train=False)
    side = tiny_base.image_size
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for more in range(12):
        image = Image.fromarray(noise).resize((side + more, side), Image.Resampling.BICUBIC)
        ours = transform(image).numpy()
        theirs = np.asarray(processor(images=[image], return_tensors="pt")["pixel_values"][0])
        differences = np.abs(ours - theirs).max(axis=(0, 1))
        if more % 4 == 3:
            assert differences.max() > 0.05
            np.testing.assert_allclose(theirs[..., 1:], ours[..., :-1], atol=0.02)
        else:
            assert differences.max() < 0.02


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"merged": "hf"}, "are one folder"),
        ({"merged": "hf/open"}, "or one is inside the other"),
        ({"transformers": "thesis"}, r"holds thesis\.tex.*--transformers"),
        ({"merged": "notes"}, r"holds README\.md.*--merged"),
        ({"transformers": "file"}, "is a file; give another folder with --transformers"),
    ],
)
def test_folders_that_would_be_lost_are_refused(
    export: Export, no_graph: None, tmp_path: Path, places: dict[str, str], message: str
) -> None:
    (tmp_path / "file").touch()
    for file in ("thesis/thesis.tex", "notes/README.md"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("years of work", encoding="utf-8")
    changes = {flag: tmp_path / place for flag, place in places.items()}
    with pytest.raises(RAdapterError, match=message):
        export(**{"transformers": tmp_path / "hf", **changes})
    assert {path.name for path in tmp_path.iterdir()} == {"file", "thesis", "notes"}


@pytest.mark.slow
def test_a_base_of_transformers_is_exported(clip: Path, common: Path, tmp_path: Path) -> None:
    folder = clip / "hf" / "alpha-0.3"
    export_forms(common, tmp_path, f"local-dir:{folder}", [1.0])
    check_transformers(tmp_path / "hf", by_open_clip(tmp_path / "merged"))
    # The very weights of the base, in either form, are what the adapter belongs to.
    merged = load_base(f"local-dir:{clip / 'merged' / 'alpha-0.3'}").model.state_dict()
    adapter = load_adapter(tmp_path)
    assert adapter.metadata.base_digest == base_digest(merged, adapter.keys)
