"""Releases of checkpoints and LoRAs that were tuned elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from radapter_export import export as export_function
from radapter_serve.clip.base import Base
from radapter_serve.release.integrity import verify
from radapter_serve.release.release import Release
from tests.export.conftest import GRAPHS, Exported, exported_once


@pytest.fixture(scope="session")
def tuned(tiny_base: Base) -> dict[str, Tensor]:
    """The weights of the tiny CLIP after some training."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.03 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tiny_base.model.state_dict().items()
    }


@pytest.fixture(scope="session")
def line(
    tuned: dict[str, Tensor], tiny_clip_dir: str, common: Path, tmp_path_factory: Any
) -> Exported:
    """The releases of a checkpoint at 0.5 and 1."""
    folder = tmp_path_factory.mktemp("line")
    torch.save({"epoch": 1, "state_dict": tuned}, folder / "tuned.pt")
    settings = {"checkpoint": str(folder / "tuned.pt"), "base": tiny_clip_dir, "dense": "naclip"}
    return exported_once(common, "line", (), [0.5, 1.0], **settings)


def test_a_checkpoint_becomes_releases_on_its_line(
    line: Exported, tuned: dict[str, Tensor], tiny_base: Base, tiny_clip_dir: str
) -> None:
    folder, releases = line
    base = tiny_base.model.state_dict()
    for number, alpha in enumerate((0.5, 1.0), 1):
        merged = releases[number - 1].merged
        for name, tensor in load_file(merged / "open_clip_model.safetensors").items():
            # as WiSE-FT computes it
            assert torch.equal(tensor, (1 - alpha) * base[name] + alpha * tuned[name])
        verify(folder / "repository", number)
    facts = Release.load(folder / "repository" / "classify" / "1")
    assert facts.made_of is not None
    assert {**facts.made_of, "digest": facts.made_of["digest"][:7]} == {
        "kind": "checkpoint",
        "name": "tuned.pt",
        "base": tiny_clip_dir,
        "digest": "sha256:",
    }
    assert facts.base_digest != facts.adapter_digest
    assert releases[0].release.digest != releases[1].release.digest
    assert sorted(graph.name for graph in releases[0].graphs) == sorted(GRAPHS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_lora_becomes_a_release_on_the_base_that_it_names(
    dynamic: Exported, common: Path, tmp_path: Path, quick: None
) -> None:
    import peft  # here: it takes seconds to load

    base = common / "any-form"
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
    done = export_function(
        lora=tmp_path / "lora",
        model_repository=tmp_path / "repository",
        merged=tmp_path / "merged",
        transformers=tmp_path / "transformers",
    )
    made_of = done.releases[0].release.made_of
    assert done.alpha == 1 and made_of is not None
    assert (made_of["kind"], made_of["base"]) == ("lora", f"local-dir:{base}")
    weights = load_file(tmp_path / "transformers" / "model.safetensors")
    torch.testing.assert_close(
        weights, dict(model.merge_and_unload().state_dict()), rtol=0, atol=1e-6
    )
