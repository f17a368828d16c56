"""Releases of checkpoints and LoRAs that were tuned elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from radapter_export import export as export_function
from radapter_serve.clip.base import Base
from radapter_serve.files import digest_of
from radapter_serve.release.integrity import verify
from radapter_serve.release.release import MadeOf, Release
from tests.export.conftest import GRAPHS, Export, Exported


def test_a_checkpoint_becomes_releases_on_its_line(
    export: Export, tiny_base: Base, tiny_clip_dir: str, tmp_path: Path
) -> None:
    base = tiny_base.model.state_dict()
    torch.manual_seed(1)
    tuned = {name: tensor + 0.03 * torch.randn_like(tensor) for name, tensor in base.items()}
    torch.save({"epoch": 1, "state_dict": tuned}, tmp_path / "tuned.pt")
    settings = {"checkpoint": str(tmp_path / "tuned.pt"), "base": tiny_clip_dir}
    releases = export([0.5, 1.0], adapter=(), dense="naclip", **settings)
    for number, alpha in enumerate((0.5, 1.0), 1):
        merged = releases[number - 1].merged
        for name, tensor in load_file(merged / "open_clip_model.safetensors").items():
            # as WiSE-FT computes it
            assert torch.equal(tensor, (1 - alpha) * base[name] + alpha * tuned[name])
        verify(tmp_path / "repository", number)
    facts = Release.load(tmp_path / "repository" / "classify" / "1")
    digest = digest_of(tmp_path / "tuned.pt")
    assert facts.made_of == MadeOf("checkpoint", "tuned.pt", tiny_clip_dir, digest)
    assert facts.base_digest != facts.adapter_digest
    assert releases[0].release.image_digest != releases[1].release.image_digest
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
    assert (made_of.kind, made_of.base) == ("lora", f"local-dir:{base}")
    weights = load_file(tmp_path / "transformers" / "model.safetensors")
    torch.testing.assert_close(
        weights, dict(model.merge_and_unload().state_dict()), rtol=0, atol=1e-6
    )
