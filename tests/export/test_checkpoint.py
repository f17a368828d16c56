"""Releases of checkpoints and LoRAs that were tuned elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from radapter_export import ExportedRelease, ExportSettings, export, export_release
from radapter_serve.cli.export import main
from radapter_serve.clip.base import Base
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import verify
from radapter_serve.release.release import Release
from tests.helpers.graphs import quick_exports


@pytest.fixture(scope="session")
def tuned(tiny_base: Base) -> dict[str, Tensor]:
    """The weights of the tiny CLIP after some training."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.03 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tiny_base.model.state_dict().items()
    }


@pytest.fixture
def checkpoint(tuned: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "tuned.pt"
    torch.save({"epoch": 1, "state_dict": tuned}, path)
    return path


def _settings(folder: Path, **changes: Any) -> ExportSettings:
    usual = {"model_repository": folder / "repository", "merged": folder / "merged"}
    return ExportSettings(**(usual | changes))


def _by_open_clip(folder: Path, images: list[Image.Image], texts: list[str]) -> list[Any]:
    """The embeddings of open_clip's own pipeline."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in images])  # type: ignore[operator]
        return [
            model.eval().encode_image(pixels, normalize=True).numpy(),
            model.encode_text(tokens, normalize=True).numpy(),
        ]


@pytest.fixture(scope="module")
def line(
    tuned: dict[str, Tensor],
    tiny_clip_dir: str,
    labels_path: Path,
    common: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[ExportedRelease]]:
    """A folder with `repository`, `merged` and `transformers`, and the releases of a checkpoint at
    0.5 and 1. Not to be changed.
    """
    folder = tmp_path_factory.mktemp("line")
    checkpoint = folder / "tuned.pt"
    torch.save({"epoch": 1, "state_dict": tuned}, checkpoint)
    settings = _settings(
        folder,
        checkpoint=str(checkpoint),
        base=tiny_clip_dir,
        dense="naclip",
        label_sets={"animals": labels_path},
        transformers=folder / "transformers",
    )
    with quick_exports(common):
        return folder, export_release((), [0.5, 1.0], settings)


def test_a_checkpoint_becomes_releases_on_its_line(
    line: tuple[Path, list[ExportedRelease]],
    tuned: dict[str, Tensor],
    tiny_base: Base,
    tiny_clip_dir: str,
    tmp_path: Path,
) -> None:
    folder, (half, whole) = line
    base = tiny_base.model.state_dict()
    for release, alpha in ((half, 0.5), (whole, 1.0)):
        merged = load_file(release.merged / "open_clip_model.safetensors")
        for name, tensor in merged.items():  # as WiSE-FT computes it
            assert torch.equal(tensor, (1 - alpha) * base[name] + alpha * tuned[name])
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8), "RGB"
    )
    image.save(tmp_path / "photo.png")
    for number, release in enumerate((half, whole), 1):
        served = load_release(folder / "repository", number)
        prepared = served.pixels((tmp_path / "photo.png").read_bytes())
        found = [served.embed_pixels([prepared]), served.embed_texts(["a cat", "two dogs"])]
        expected = _by_open_clip(release.merged, [image], ["a cat", "two dogs"])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        verify(folder / "repository", number)
    facts = Release.load(folder / "repository" / "classify" / "1")
    assert facts.made_of is not None
    assert facts.made_of["digest"].startswith("sha256:")
    assert {**facts.made_of, "digest": ""} == {
        "kind": "checkpoint",
        "name": "tuned.pt",
        "base": tiny_clip_dir,
        "digest": "",
    }
    assert facts.base_digest != facts.adapter_digest
    assert whole.release.digest != half.release.digest
    assert {graph.name for graph in half.graphs} == {
        "image_encoder",
        "patch_encoder",
        "text_encoder",
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_lora_becomes_a_release_on_the_base_that_it_names(
    line: tuple[Path, list[ExportedRelease]], tmp_path: Path, quick: None
) -> None:
    import peft  # here: it takes seconds to load

    base = line[0] / "transformers" / "alpha-1"
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.CLIPModel.from_pretrained(base),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(tmp_path / "lora"))
    done = export(
        lora=tmp_path / "lora",
        model_repository=tmp_path / "repository",
        merged=tmp_path / "merged",
        transformers=tmp_path / "transformers",
    )
    assert done.alpha == 1
    made_of = done.releases[0].release.made_of
    assert made_of is not None
    assert (made_of["kind"], made_of["name"]) == ("lora", "lora")
    assert made_of["base"] == f"local-dir:{base}"
    expected = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "transformers" / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_a_folder_is_exported_as_it_is_in_int8_and_judged(
    tuned: dict[str, Tensor],
    tiny_clip_dir: str,
    labels_path: Path,
    photos: Path,
    tmp_path: Path,
    quick: None,
) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), folder)
    save_file(tuned, folder / "open_clip_model.safetensors")
    settings = _settings(
        tmp_path,
        checkpoint=str(folder),
        precision="int8",
        calibration=str(photos),
        validation=f"imagefolder:{photos}",
        max_drop=100.0,
        label_sets={"animals": labels_path},
    )
    (release,) = export_release((), None, settings)
    assert release.alpha == 1
    assert release.accuracy is not None
    assert release.accuracy.n == 30
    assert release.release.quantization is not None
    assert release.release.made_of is not None
    assert release.release.made_of["base"] is None
    merged = load_file(release.merged / "open_clip_model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in tuned.items())


BASE = ("--base", "ViT-B-32:openai")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [*BASE, "--alpha", "dynamic"],
            "--alpha dynamic is for adapters: a checkpoint or a LoRA has",
        ),
        (["--alpha", "auto"], "--alpha auto is for runs"),
        (["--adapter", "runs/x"], "--adapter and --checkpoint don't go together"),
        ([*BASE, "--weights", "1"], "--weights is for several adapters; leave it out"),
        (
            [*BASE, "--validation", "own"],
            "--validation own is for runs; with --checkpoint name some",
        ),
    ],
)
def test_what_a_checkpoint_has_not_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", str(checkpoint), *args]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.pt"}


def test_a_release_is_not_written_where_a_weight_is_no_number(
    checkpoint: Path, tuned: dict[str, Tensor], tiny_clip_dir: str, tmp_path: Path
) -> None:
    bad = {**tuned, "visual.proj": torch.full_like(tuned["visual.proj"], float("nan"))}
    torch.save(bad, checkpoint)
    settings = _settings(tmp_path, checkpoint=str(checkpoint), base=tiny_clip_dir)
    with pytest.raises(RAdapterError, match=r"tuned.pt is damaged: its weight visual.proj"):
        export_release((), [0.5], settings)
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.pt"}
