"""Loading a checkpoint from a file: with the activation that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from radapter_serve.clip.base import load_base
from radapter_serve.errors import RAdapterError
from tests.helpers.small_models import IMAGE, TEXT


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small model that open_clip knows in both activations: NAME and NAME-quickgelu."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    config = {"embed_dim": 32, "vision_cfg": IMAGE, "text_cfg": {**TEXT, "vocab_size": 49408}}
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "tiny-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    return "tiny"


def embeds(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(torch.ones(1, 3, 32, 32).cumsum(2))  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("name", "beside", "quick"),
    [
        ("weights.pt", None, False),
        ("vit-openai.pt", None, True),
        ("tiny.openai/weights.pt", None, True),
        ("weights.pt", {"quick_gelu": True}, True),
        ("vit-openai.pt", {}, False),
    ],
)
def test_a_local_checkpoint_gets_the_activation_that_it_tells(
    architectures: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    beside: dict[str, bool] | None,
    quick: bool,
) -> None:
    torch.manual_seed(0)
    made = open_clip.create_model("tiny-quickgelu" if quick else "tiny").eval()
    path = tmp_path / "weights" / name
    path.parent.mkdir(parents=True)
    torch.save(made.state_dict(), path)
    if beside is not None:
        (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": beside}))
    base = load_base(architectures, str(path))
    assert base.config["quick_gelu"] is quick
    torch.testing.assert_close(embeds(base.model), embeds(made))
    told = capsys.readouterr().err
    assert ("name the architecture tiny-quickgelu" in told) == (name == "weights.pt" and beside is None)


def test_quickgelu_for_a_checkpoint_without_is_refused(architectures: str, tmp_path: Path) -> None:
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "weights.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(RAdapterError, match="trained with GELU.*name the architecture tiny$"):
        load_base("tiny-quickgelu", str(tmp_path / "weights.pt"))
    assert load_base("tiny", str(tmp_path / "weights.pt")).config["quick_gelu"] is False
