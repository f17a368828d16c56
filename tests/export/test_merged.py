"""The merged checkpoint is plain open_clip."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU

from radapter_export import write_merged
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import Release
from tests.export.conftest import Exported
from tests.helpers.small_models import release


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_open_clip_loads_it_equal_to_the_bit(
    exported: Exported, tiny_base: Base, adapter_path: Path
) -> None:
    folder, releases = exported
    assert names(folder / "merged") == {"alpha-0.3", "alpha-0.8"}
    for written in releases:
        weights = {"open_clip_config.json", "open_clip_model.safetensors"}
        assert names(written.merged) == {*weights, "release.json", "README.md"}
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{written.merged}")
        expected = fold(tiny_base.model.state_dict(), load_adapter(adapter_path), written.alpha)
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
        assert any(isinstance(module, QuickGELU) for module in model.modules())
        _, _, expected_preprocess = open_clip.create_model_and_transforms(tiny_base.name)
        assert repr(preprocess) == repr(expected_preprocess)
        facts = json.loads((written.merged / "release.json").read_text(encoding="utf-8"))
        assert facts == written.facts
        assert load_base(f"local-dir:{written.merged}").config == tiny_base.config


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_quick_gelu_is_always_written(tiny_base: Base, tmp_path: Path, quick_gelu: bool) -> None:
    base = Base(**{**vars(tiny_base), "config": {**tiny_base.config, "quick_gelu": quick_gelu}})
    write_merged(tmp_path / "merged", base, base.model.state_dict(), release(1))
    config = json.loads((tmp_path / "merged" / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config["model_cfg"]["quick_gelu"] is quick_gelu
    assert set(config["preprocess_cfg"]) >= {"mean", "std", "interpolation", "resize_mode"}


def test_a_folder_of_somebody_else_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(RAdapterError, match=r"thesis\.tex.*--merged"):
        write_merged(tmp_path, tiny_base, {}, release(1))
    with pytest.raises(RAdapterError, match="is a file"):
        write_merged(tmp_path / "thesis.tex", tiny_base, {}, release(1))
    (tmp_path / "thesis.tex").rename(tmp_path / "README.md")
    with pytest.raises(RAdapterError, match=r"README\.md.*--merged"):
        write_merged(tmp_path, tiny_base, {}, release(1))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "years of work"


def test_a_full_disk_leaves_the_earlier_one(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny_base.model.state_dict()
    write_merged(tmp_path / "merged", tiny_base, weights, release(1))

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("radapter_export.merged.save_file", full)
    with pytest.raises(RAdapterError, match="No space left on device.*radapter-export again"):
        write_merged(tmp_path / "merged", tiny_base, weights, release(2))
    assert names(tmp_path) == {"merged"}
    assert Release.load(tmp_path / "merged") == release(1)
