"""Releases of checkpoints that were tuned elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from radapter_serve.clip.base import Base
from radapter_serve.release.integrity import verify
from radapter_serve.release.release import Release
from tests.export.conftest import GRAPHS, Export


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
