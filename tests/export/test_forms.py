"""What an export writes for other libraries, opened by them as a user would, against open_clip."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from radapter_export import ExportSettings, export_release
from radapter_export.transformers_form import base_form, write_processor
from radapter_serve.adapter import base_digest, fold, load_adapter, save_adapter
from radapter_serve.cli.export import main
from radapter_serve.clip.base import load_base
from radapter_serve.clip.transformers import Form, check_processor, to_transformers
from radapter_serve.errors import RAdapterError
from radapter_serve.training import train
from tests.helpers.graphs import quick_exports
from tests.helpers.short_run import short_run
from tests.helpers.small_models import FAMILIES, make_base, random_adapter

TEXTS = ["a photo of a cat", "two dogs on a red sofa", "many words " * 60, ""]
#: upright, wide and square ones, whose margins transformers and open_clip crop alike
SIZES = ((40, 48), (52, 44), (32, 32), (96, 64))
TRANSFORMERS = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    *("release.json", "tokenizer.json", "tokenizer_config.json"),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def images() -> list[Image.Image]:
    random = np.random.default_rng(2)
    small = [Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in SIZES]
    return [
        image.resize(size, Image.Resampling.BICUBIC)
        for image, size in zip(small, SIZES, strict=True)
    ]


@torch.no_grad()
def by_open_clip(merged: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """open_clip's own embeddings of `images()` and TEXTS with a merged checkpoint, and its scale of
    the cosines.
    """
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    tokens = open_clip.get_tokenizer(f"local-dir:{merged}")(TEXTS)
    pixels = torch.stack([transform(image) for image in images()])  # type: ignore[operator]
    encode: Any = model.eval()
    found = encode.encode_image(pixels, normalize=True), encode.encode_text(tokens, normalize=True)
    return found[0].numpy(), found[1].numpy(), float(encode.logit_scale.exp())


def unit(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def features(output: Any) -> np.ndarray:
    return unit(
        (output if isinstance(output, torch.Tensor) else output.pooler_output).detach().numpy()
    )


@pytest.fixture(scope="module")
def made(common: Path, tiny_clip_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a low-rank adapter of it, and all forms at two alphas. Not to be changed."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "base").symlink_to(tiny_clip_dir.removeprefix("local-dir:"))
    export(common, folder, f"local-dir:{folder / 'base'}", [0.3, 0.8], rank=4)
    return folder


@pytest.fixture(scope="module")
def siglip(common: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a SigLIP whose texts have 64 tokens, as the pipeline of `transformers` takes for
    granted.
    """
    folder = tmp_path_factory.mktemp("siglip")
    text = {**FAMILIES["siglip"].text, "context_length": 64}
    export(common, folder, make_base("siglip", folder / "base", text_cfg=text), [0.7], rank=4)
    return folder


def export(
    common: Path, folder: Path, base: str, alphas: Any, *, rank: int | None = None, **settings: Any
) -> None:
    save_adapter(
        random_adapter(base, rank=rank, scale=0.3 if rank else 0.1), folder / "adapter.safetensors"
    )
    with quick_exports(common):
        export_release(
            folder / "adapter.safetensors",
            alphas,
            ExportSettings(
                **{
                    "model_repository": folder / "repository",
                    "merged": folder / "merged",
                    "transformers": folder / "hf",
                    **settings,
                }
            ),
        )


@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_transformers_gives_what_open_clip_gives(made: Path, alpha: float) -> None:
    folder = made / "hf" / f"alpha-{alpha}"
    assert {path.name for path in folder.iterdir()} == TRANSFORMERS
    expected = by_open_clip(made / "merged" / f"alpha-{alpha}")
    check_transformers(folder, expected, padding=True)
    base = by_open_clip(made / "base")
    assert np.abs(base[0] - expected[0]).max() > 1e-2 and np.abs(base[1] - expected[1]).max() > 1e-2


@pytest.mark.slow
def test_transformers_gives_what_open_clip_gives_of_siglip(siglip: Path) -> None:
    assert {path.name for path in (siglip / "hf").iterdir()} == TRANSFORMERS
    check_transformers(siglip / "hf", by_open_clip(siglip / "merged"), padding="max_length")


def check_transformers(
    folder: Path, expected: tuple[np.ndarray, np.ndarray, float], padding: Any
) -> None:
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    texts = processor(text=TEXTS, padding=padding, truncation=True, return_tensors="pt")
    np.testing.assert_allclose(features(model.get_text_features(**texts)), expected[1], atol=1e-5)
    pixels = processor(images=images(), return_tensors="pt")
    # transformers resizes by torchvision and open_clip by Pillow, which round a few pixels in
    # another way
    np.testing.assert_allclose(features(model.get_image_features(**pixels)), expected[0], atol=5e-3)
    exact = [image for image in images() if image.size == (32, 32)]
    np.testing.assert_allclose(
        features(model.get_image_features(**processor(images=exact, return_tensors="pt"))),
        expected[0][2:3],
        atol=1e-5,
    )


def test_the_pipeline_scores_as_clip_does(made: Path) -> None:
    image, text, scale = by_open_clip(made / "merged" / "alpha-0.8")
    classify = transformers.pipeline(
        "zero-shot-image-classification", model=str(made / "hf" / "alpha-0.8")
    )
    found = classify(images()[2], candidate_labels=TEXTS[:2], hypothesis_template="{}")
    logits = scale * image[2] @ text[:2].T
    expected = dict(zip(TEXTS, np.exp(logits) / np.exp(logits).sum(), strict=False))
    assert {one["label"]: one["score"] for one in found} == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_pipeline_scores_as_siglip_does(siglip: Path) -> None:
    image, text, scale = by_open_clip(siglip / "merged")
    bias = load_base(f"local-dir:{siglip / 'merged'}").model.state_dict()["logit_bias"].item()
    classify = transformers.pipeline("zero-shot-image-classification", model=str(siglip / "hf"))
    found = classify(images()[2], candidate_labels=TEXTS[:2], hypothesis_template="{}")
    expected = dict(
        zip(TEXTS, 1 / (1 + np.exp(-(scale * image[2] @ text[:2].T + bias))), strict=False)
    )
    assert {one["label"]: one["score"] for one in found} == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_sentence_transformers_opens_it(made: Path) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="pip install -e '.[integrations]'"
    )

    image, text, _ = by_open_clip(made / "merged" / "alpha-0.3")
    model = sentence_transformers.SentenceTransformer(str(made / "hf" / "alpha-0.3"), device="cpu")
    np.testing.assert_allclose(unit(model.encode(TEXTS)), text, atol=1e-5)
    np.testing.assert_allclose(unit(model.encode([images()[2]])), image[2:3], atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_opens_siglip_once_it_fills_texts_up(siglip: Path) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="pip install -e '.[integrations]'"
    )

    model = sentence_transformers.SentenceTransformer(str(siglip / "hf"), device="cpu")
    found = model.encode(TEXTS, processing_kwargs={"text": {"padding": "max_length"}})
    np.testing.assert_allclose(unit(found), by_open_clip(siglip / "merged")[1], atol=1e-5)


def test_a_release_that_takes_any_alpha_has_the_form_of_its_own(
    tiny_clip_dir: str, common: Path, tmp_path: Path
) -> None:
    """The adapter's own α is 0.5; the samples of such a release mix others."""
    adapter = random_adapter(tiny_clip_dir, scale=0.05)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    with quick_exports(common):
        (release,) = export_release(tmp_path, "dynamic", settings_in(tmp_path))
    (form,) = release.forms
    assert form.name == "transformers" and form.agreement.max_error < 1e-5
    base = load_base(tiny_clip_dir)
    expected = to_transformers(fold(base.model.state_dict(), adapter, 0.5), base_form(base).weights)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - {"vit", "vit-quickgelu", "siglip", "siglip2"})
)
def test_other_families_are_refused_before_a_graph_is_made(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make_base(family, tmp_path / "base")
    save_adapter(
        random_adapter(name, partial=FAMILIES[family].partial), tmp_path / "adapter.safetensors"
    )
    monkeypatch.setattr(
        "radapter_export.release.image_graph", lambda *_: pytest.fail("a graph was made")
    )
    with pytest.raises(RAdapterError, match="has no form in transformers: "):
        export_release(tmp_path, [0.5], settings_in(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter.safetensors"}


def settings_in(folder: Path, **changes: Any) -> ExportSettings:
    fields = {
        "model_repository": folder / "repository",
        "merged": folder / "merged",
        "transformers": folder / "hf",
    }
    return ExportSettings(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocess": {"resize_mode": "longest"}}, "its processor"),
        ({"text_cfg": {**FAMILIES["vit"].text, "no_causal_mask": True}}, "its text embeddings"),
        (
            {"text_cfg": {**FAMILIES["vit"].text, "proj_bias": True}, "custom_text": True},
            "text.text_projection.bias is a weight of one",
        ),
        ({"vision_cfg": {**FAMILIES["vit"].image, "pool_type": "avg"}}, "its image embeddings"),
        ({"vision_cfg": {**FAMILIES["vit"].image, "norm_kwargs": {"eps": 1e-3}}}, ""),
    ],
)
def test_what_the_library_lacks_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    preprocess = changes.pop("preprocess", {})
    base = load_base(make_base("vit", tmp_path, **changes))
    base.preprocess.update(preprocess)
    if message:
        with pytest.raises(RAdapterError, match=message):
            base_form(base)
    else:
        assert base_form(base).config["vision_config"]["layer_norm_eps"] == 1e-3


def test_a_text_tower_of_its_own_has_the_same_form(tmp_path: Path) -> None:
    """open_clip keeps the text tower apart where `custom_text` says so; only the names of its
    weights differ.
    """
    one, two = (
        load_base(make_base("vit", tmp_path / str(own), custom_text=own)) for own in (False, True)
    )
    state = {name.removeprefix("text."): value for name, value in two.model.state_dict().items()}
    one.model.load_state_dict(state)
    found, expected = (
        to_transformers(base.model.state_dict(), base_form(base).weights) for base in (two, one)
    )
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )


@pytest.mark.slow
def test_what_differs_from_torch_leaves_nothing(
    made: Path, common: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(load_adapter(made / "adapter.safetensors"), tmp_path / "adapter.safetensors")
    other = {"hidden_act": "gelu"}
    cases: list[tuple[str, Any, str]] = [  # what goes wrong, and what is said
        (
            "radapter_export.release.base_form",
            lambda base: with_text(base_form(base), **other),
            "text, differs from torch",
        ),
        (
            "radapter_serve.clip.transformers._TEXTS",
            ["“Quoted”"],
            "reads .* in another way than open_clip's",
        ),
        ("radapter_export.transformers_form.save_file", full_disk, "no space left on the disk"),
    ]
    loose = {"precision": "int8", "tolerance": 0.9}  # which is for graphs: the weights stay in fp32
    for target, value, message in cases:
        with monkeypatch.context() as patch, quick_exports(common):
            patch.setattr(target, value)
            with pytest.raises(RAdapterError, match=message):
                export_release(tmp_path, [0.5], settings_in(tmp_path, **loose))
        assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors"}


def with_text(form: Form, **changes: Any) -> Form:
    config = {**form.config, "text_config": {**form.config["text_config"], **changes}}
    return dataclasses.replace(form, config=config)


def full_disk(tensors: object, path: Path, metadata: object) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_another_way_to_resize_is_seen(tmp_path: Path) -> None:
    base = load_base(make_base("vit", tmp_path / "base"))
    write_processor(tmp_path, base)
    check_processor(tmp_path, base.preprocess, base.tokenizer)
    path = tmp_path / "preprocessor_config.json"
    right = json.loads(path.read_text(encoding="utf-8"))
    square = {"height": 32, "width": 32}
    for change in (
        {"resample": 2},
        {"size": square, "do_center_crop": False},
        {"image_mean": [0.5, 0.5, 0.5]},
    ):
        path.write_text(json.dumps({**right, **change}), encoding="utf-8")
        with pytest.raises(RAdapterError, match="its processor in transformers"):
            check_processor(tmp_path, base.preprocess, base.tokenizer)


def test_arguments_that_can_not_be_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(random_adapter(f"local-dir:{made / 'base'}"), tmp_path / "adapter.safetensors")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "thesis.tex").write_text("years of work", encoding="utf-8")
    monkeypatch.setattr(
        "radapter_export.release.image_graph", lambda *_: pytest.fail("a graph was made")
    )
    for changes, message in (
        (
            {"merged": tmp_path / "hf"},
            "--transformers .*hf is the folder of --merged, or inside it",
        ),
        (
            {"merged": tmp_path / "hf" / "open"},
            "--merged .*open is inside the folder of --transformers",
        ),
        ({"transformers": tmp_path / "lora"}, r"lora holds thesis\.tex.*--transformers"),
        (
            {"transformers": tmp_path / "adapter.safetensors"},
            "is a file; give another folder with --transformers",
        ),
    ):
        with pytest.raises(RAdapterError, match=message):
            export_release(tmp_path, [0.5], settings_in(tmp_path, **changes))
    monkeypatch.setattr("radapter_serve.errors.find_spec", lambda name: None)
    with pytest.raises(RAdapterError, match=r"transformers is not installed; .*\[huggingface\]"):
        export_release(tmp_path, [0.5], settings_in(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors", "lora"}


@pytest.mark.slow
def test_the_command_shows_the_forms(
    made: Path,
    common: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    with quick_exports(common):
        adapter = ["--adapter", str(made / "adapter.safetensors")]
        assert main(["--alpha", "0.5", *adapter, "--transformers", "hf"]) == 0
        out, err = capfd.readouterr()
        assert err == "" and "Transformers: hf\n" in out
        assert main(["--alpha", "0.2", *adapter, "--transformers", "hf"]) == 0  # which is replaced
    assert (
        json.loads((tmp_path / "hf" / "release.json").read_text(encoding="utf-8"))["alpha"] == 0.2
    )
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "hf", "model_repository"}


@pytest.mark.slow
def test_a_base_of_transformers_is_trained_and_exported(
    made: Path, common: Path, tmp_path: Path
) -> None:
    folder = made / "hf" / "alpha-0.3"
    for color in ("red", "blue"):
        (tmp_path / "photos" / color).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (40, 40 + number), color).save(
                tmp_path / "photos" / color / f"{number}.png"
            )
    data = f"imagefolder:{tmp_path / 'photos'}"
    run = train(short_run(f"local-dir:{folder}", tmp_path, data=data, val_data=data, rank=2)).folder
    with quick_exports(common):
        (release,) = export_release(run, [1.0], settings_in(tmp_path))
    assert release.release.architecture == f"local-dir:{folder}"
    check_transformers(tmp_path / "hf", by_open_clip(tmp_path / "merged"), padding=True)
    # The very weights of the base, in either form, are what the adapter belongs to.
    assert load_adapter(run).metadata.base_digest == base_digest(
        load_base(f"local-dir:{made / 'merged' / 'alpha-0.3'}").model.state_dict(),
        load_adapter(run).keys,
    )
    theirs = transformers.CLIPModel.from_pretrained(folder).state_dict()
    assert not torch.equal(load_file(tmp_path / "hf" / "model.safetensors")[LAYER], theirs[LAYER])


LAYER = "text_model.encoder.layers.0.mlp.fc2.weight"
