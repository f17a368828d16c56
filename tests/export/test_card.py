"""Model cards: read by huggingface_hub, true to the release, and without a path of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from radapter_export.card import LIBRARIES, card_of
from radapter_serve.adapter import Metadata
from radapter_serve.release.release import Release

RELEASE = Release(
    version=3,
    alpha=0.5,
    architecture="ViT-B-32",
    base_digest="sha256:ab",
    adapter_digest="sha256:cd",
    preprocess={"size": 224},
    tokenizer={},
    embed_dim=512,
    logit_scale=100.0,
    templates=["a photo of a {}.", "art of {}", "{}", "one more {}"],
    agreement={"image_encoder": {"max_error": 1.2e-6}, "tolerance": 1e-4},
    tools={"torch": "2.13.0"},
    accuracy={
        "dataset": "imagefolder:/data/secret/photos",
        "n": 200,
        "metric": "acc1",
        "torch": 71.5,
        "release": 71.25,
        "drop": 0.25,
    },
    confidence={"ece_before": 0.2, "ece_after": 0.05},
)
METADATA = Metadata(
    architecture="ViT-B-32",
    pretrained="openai",
    base_digest="sha256:ab",
    recipe={"data": "csv:/home/me/secret/train.csv", "drop": 0.2, "learning_rate": 5e-4},
    classes=["cat", "dog"],
    held_out="sha256:ef",
)
CURVE = [
    {"alpha": 0.0, "score": 60, "behind": 11.5, "plus_minus": 4, "kept": 100, "photos": 60},
    {"alpha": 0.5, "score": 71.5, "behind": 0, "plus_minus": 0, "kept": 96.25, "photos": 71.5},
]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_card_is_read_by_the_hub_and_says_what_the_release_is(
    library: str, tmp_path: Path
) -> None:
    text = card_of(RELEASE, METADATA, CURVE, library)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    head: Any = ModelCard.load(tmp_path / "README.md").data
    assert (head.library_name, head.license) == (library, "mit")
    [result] = head.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "photos",
        "acc1",
        71.25,
    )
    body = ModelCard(text).text
    assert "α = 0.5" in body and "base is ViT-B-32 with the weights openai (`sha256:ab`)" in body
    assert "| α | kept of the base | photos |" in body
    assert "| **0.5** | 96.2 | 71.5 |" in body and "| 0 | 100.0 | 60.0 |" in body
    assert "| acc1, 200 images of photos | 71.25 % |" in body
    assert "| the same, calibrated | 0.050 |" in body and "| made with torch | 2.13.0 |" in body
    assert "| data | train.csv |" in body and "| classes | 2 |" in body
    assert "`image_encoder` from torch | 1.2e-06 |" in body and "and more" in body
    assert f"import {library}" in body.replace("from transformers", "import transformers")
    assert "secret" not in text


def test_what_is_not_known_is_left_out() -> None:
    bare = replace(
        RELEASE, accuracy=None, confidence=None, architecture="local-dir:/srv/secret/base"
    )
    text = card_of(bare, Metadata("local-dir:/srv/secret/base", "sha256:ab"), [], "open_clip")
    head: Any = ModelCard(text).data
    assert head.license is None and head.eval_results is None
    assert "The licence of the base holds for these weights too" in text
    assert "its base is base" not in text and "whose base is base (`sha256:ab`)" in text
    assert "How it was trained" not in text and "to keep" not in text and "secret" not in text


@pytest.mark.parametrize(
    ("made_of", "said"),
    [({"kind": "checkpoint"}, "a checkpoint of it"), ({"kind": "lora"}, "a LoRA of it")],
)
def test_what_was_tuned_elsewhere_is_named(made_of: dict[str, Any], said: str) -> None:
    text = card_of(replace(RELEASE, made_of=made_of), METADATA, [], "open_clip")
    assert said in text and "R-Adapter (" not in text


def test_every_merged_checkpoint_has_its_card(exported_tiny_clip: Path) -> None:
    folders = [path.parent for path in (exported_tiny_clip / "merged").rglob("release.json")]
    assert folders
    for folder in folders:
        facts = json.loads((folder / "release.json").read_text(encoding="utf-8"))
        assert (metadata_load(folder / "README.md") or {})["library_name"] == "open_clip"
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert f"α = {facts['alpha']:g}" in text and str(exported_tiny_clip) not in text
