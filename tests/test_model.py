"""`Model`: every form of a model, asked in this process, against open_clip's own pipeline."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from radapter_client import InvalidRequest, ModelNotFound, list_images
from radapter_serve import Model, RAdapterError
from radapter_serve.adapter import load_adapter
from radapter_serve.cli.query import main as query
from radapter_serve.clip.base import split_name
from tests.conftest import export_into
from tests.helpers.small_release import png

LABELS = ["cat", "a dog in the SNOW", "猫"]


def by_open_clip(folder: Path, images: list[bytes], texts: list[str]) -> np.ndarray:
    """Cosines of images and texts, float32 [B, N], by open_clip alone."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.stack(
        [transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
    )
    with torch.inference_mode():
        embeds = model.encode_image(pixels, normalize=True)
        words = model.encode_text(tokenizer(texts), normalize=True)
    return (embeds @ words.T).numpy()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(number, 60, 50))
    (folder / "more" / "last.JPG").write_bytes(png(9, kind="JPEG"))
    (folder / "notes.txt").write_text("no image")
    return folder


def merged(exported: Path) -> Path:
    """The checkpoint of the newest of two releases."""
    return sorted((exported / "merged").iterdir())[-1]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("model_repository@2", {}),
        ("adapter.safetensors", {"alpha": 0.8}),
        ("", {"alpha": 0.8}),
        ("merged/{newest}", {}),
    ],
)
def test_every_form_answers_as_open_clip(
    exported_tiny_clip: Path, photos: Path, form: str, options: dict[str, Any]
) -> None:
    source = str(exported_tiny_clip / form.format(newest=merged(exported_tiny_clip).name))
    images = [path.read_bytes() for path in sorted(photos.glob("*.png"))]
    texts = [f"a photo of a {label}." for label in LABELS]
    expected = by_open_clip(merged(exported_tiny_clip), images, texts)
    with Model(source, **options) as model:
        cosines = model.embed_images(images) @ model.embed_texts(texts).T
        np.testing.assert_allclose(cosines, expected, atol=2e-6)
        release = model.release()
        assert release.alpha == pytest.approx(0.8)
        scores = np.exp(release.logit_scale * expected.astype(np.float64))
        scores /= scores.sum(axis=1, keepdims=True)
        answers = model.classify(images, LABELS, templates=["a photo of a {}."], top_k=3)
        for answer, row in zip(answers, scores, strict=True):
            assert answer.labels == [LABELS[index] for index in np.argsort(-row)]
            np.testing.assert_allclose(answer.scores, np.sort(row)[::-1], atol=1e-4)


def test_a_base_alone_and_its_patches(tiny_clip_dir: str, exported_tiny_clip: Path) -> None:
    with Model(tiny_clip_dir, dense="naclip") as model:
        texts = ["a cat", "a dog"]
        expected = by_open_clip(Path(tiny_clip_dir.removeprefix("local-dir:")), [png(0)], texts)
        cosines = model.embed_images([png(0)]) @ model.embed_texts(texts).T
        np.testing.assert_allclose(cosines, expected, atol=2e-6)
        assert model.segment(png(1, 40, 30), texts).mask.shape == (30, 40)
        assert (model.release().alpha, model.release().version) == (0.0, 1)
    with Model(tiny_clip_dir) as model, pytest.raises(ModelNotFound, match="patch_encoder"):
        model.segment(png(1), ["a", "b"])


@pytest.mark.slow  # for the masks alone, tests/evaluation/test_segmentation.py has it
def test_segmentation_in_torch_is_that_of_the_export(
    exported_tiny_clip: Path, common: Path, tmp_path: Path
) -> None:
    export_into(tmp_path, common, exported_tiny_clip, [0.5], dense="naclip")
    with (
        Model(tmp_path / "model_repository") as release,
        Model(tmp_path / "merged") as checkpoint,
    ):
        served, live = (model.segment(png(3, 60, 45), LABELS) for model in (release, checkpoint))
    assert served.labels == live.labels
    assert (served.mask == live.mask).mean() > 0.999
    np.testing.assert_allclose(served.scores, live.scores, atol=1e-3)


def test_a_runs_own_classes_are_a_label_set(
    exported_tiny_clip: Path, random_adapter: Any, tmp_path: Path
) -> None:
    from radapter_serve.adapter import save_adapter

    classes = ["cat", "dog", "cat", "Dog"]
    save_adapter(random_adapter(classes=classes), tmp_path / "adapter.safetensors")
    with Model(tmp_path) as model:
        assert set(model.classify(png(0), label_set="classes").labels) == {"cat", "dog", "Dog"}
        assert model.release().alpha == load_adapter(tmp_path).metadata.alpha


def test_the_images_of_a_folder(exported_tiny_clip: Path, photos: Path, capsys: Any) -> None:
    files = list_images(photos)
    assert [Path(path).name for path in files] == [*(f"{n}.png" for n in range(5)), "last.JPG"]
    with Model(exported_tiny_clip / "model_repository", batch_size=2) as model:
        answers = model.classify(files, ["cat", "dog"])
        assert [answer.labels for answer in answers] == [
            model.classify(path, ["cat", "dog"]).labels for path in files
        ]
    assert capsys.readouterr() == ("", "")  # nothing is printed that nobody asked for
    (photos / "empty").mkdir()
    for folder, message in (("empty", "no JPEG, PNG or WebP file in"), ("none", "no folder")):
        with pytest.raises(InvalidRequest, match=message):
            list_images(photos / folder)


def test_radapter_query_asks_a_model_without_a_server(
    exported_tiny_clip: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = str(exported_tiny_clip / "model_repository")
    asked = ["classify", str(photos), "--labels", "cat", "dog", "--release", "1", "--json"]
    assert query([*asked, "--model", models]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with Model(f"{models}@1") as model:
        expected = model.classify(list_images(photos), ["cat", "dog"])
    assert [line["labels"] for line in lines] == [answer.labels for answer in expected]
    assert {line["release"] for line in lines} == {1}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("{tmp}/none", {}, "there is no .*none; allowed: a model repository, a run"),
        ("model_repositry", {}, "there is no model_repositry; allowed: a model repository, a run"),
        ("{tmp}/notes.txt", {}, "notes.txt is not a model; allowed"),
        ("{tmp}/broken", {}, "broken"),
        ("ViT-Q", {}, "unknown model 'ViT-Q'"),
        ("ViT-B-32", {}, "no weights for ViT-B-32: pretrained is None; allowed"),
        ("{run}/model_repository@9", {}, "no release 9 in .*; it holds 1, 2"),
        ("{run}/model_repository", {"alpha": 0.5}, "alpha is 0.5, but .* is a model repository"),
        ("{run}/model_repository", {"device": "tpu"}, "device is 'tpu'; allowed: cpu, cuda"),
        ("{run}", {"alpha": 1.5}, "alpha"),
        ("{run}", {"base": "local-dir:/none"}, "none"),
        ("{base}", {"alpha": 0.5}, "alpha is 0.5, but .* has no adapter"),
        ("{base}", {"base": "ViT-B-32"}, "base is 'ViT-B-32', but .* is not a run"),
        ("{base}", {"dense": "best"}, "best"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(
    exported_tiny_clip: Path,
    tiny_clip_dir: str,
    tmp_path: Path,
    source: str,
    options: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "open_clip_config.json").write_text("{")
    places = {
        "tmp": tmp_path,
        "run": exported_tiny_clip,
        "base": tiny_clip_dir.removeprefix("local-dir:"),
    }
    with pytest.raises(RAdapterError, match=message) as error:
        Model(source.format(**places), **options)
    assert "\n" not in str(error.value)


def test_a_release_needs_neither_torch_nor_grpc(exported_tiny_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png(0))
    code = (
        "import sys; from radapter_serve import Model\n"
        "with Model(sys.argv[1]) as model:\n"
        "    print(model.classify(sys.argv[2], ['cat', 'dog']).top)\n"
        "heavy = {'torch', 'open_clip', 'transformers', 'matplotlib', 'pyarrow'}\n"
        "heavy |= {'grpc', 'google.protobuf', 'tritonclient'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(exported_tiny_clip / "model_repository")]
    done = subprocess.run(
        [*command, str(tmp_path / "one.png")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("cat", "dog") and not done.stderr


def test_weights_may_be_part_of_the_name() -> None:
    for base, pretrained, expected in (
        ("ViT-B-32:openai", None, ("ViT-B-32", "openai")),
        ("ViT-B-32", "openai", ("ViT-B-32", "openai")),
        ("local-dir:somewhere", None, ("local-dir:somewhere", None)),
    ):
        assert split_name(base, pretrained) == expected
    with pytest.raises(RAdapterError, match="are named twice: openai and laion2b"):
        split_name("ViT-B-32:openai", "laion2b")
