"""Model cards: read by huggingface_hub, true to the release, and without a path of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from radapter_export.card import LIBRARIES, card_of
from radapter_serve.adapter import Metadata
from tests.helpers.small_models import release

RELEASE = release(
    3,
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
    base_digest="sha256:1",
    recipe={"data": "csv:/home/me/secret/train.csv", "drop": 0.2, "learning_rate": 5e-4},
    classes=["cat", "dog"],
    held_out="sha256:ef",
)
CURVE = [
    {"alpha": 0.0, "score": 60, "behind": 11.5, "plus_minus": 4, "kept": 100, "photos": 60},
    {"alpha": 0.5, "score": 71.5, "behind": 0, "plus_minus": 0, "kept": 96.25, "photos": 71.5},
]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_card_is_read_by_the_hub_and_says_what_the_release_is(library: str) -> None:
    card = ModelCard(card_of(RELEASE, METADATA, CURVE, library))
    head: Any = card.data
    assert (head.library_name, head.license) == (library, "mit")
    [result] = head.eval_results
    assert (result.dataset_name, result.metric_type) == ("photos", "acc1")
    assert result.metric_value == 71.25
    for words in (
        "base is ViT-B-32 with the weights openai (`sha256:1`)",
        "| α | kept of the base | photos |",
        "| 0 | 100.0 | 60.0 |",
        "| **0.5** | 96.2 | 71.5 |",
        "| acc1, 200 images of photos | 71.25 % |",
        "| the same, calibrated | 0.050 |",
        "| data | train.csv |",
        "`image_encoder` from torch | 1.2e-06 |",
        "and more",
    ):
        assert words in card.text
    assert f"import {library}" in card.text.replace("from transformers", "import transformers")
    assert "secret" not in card.content


def test_what_is_not_known_is_left_out() -> None:
    name = "local-dir:/srv/secret/base"
    bare = replace(RELEASE, accuracy=None, confidence=None, architecture=name)
    text = card_of(bare, Metadata(name, "sha256:1"), [], "open_clip")
    head: Any = ModelCard(text).data
    assert head.license is None and head.eval_results is None
    assert "The licence of the base holds" in text and "whose base is base (`sha256:1`)" in text
    assert "How it was trained" not in text and "to keep" not in text and "secret" not in text
    for kind, words in (("checkpoint", "a checkpoint of it"), ("lora", "a LoRA of it")):
        text = card_of(replace(RELEASE, made_of={"kind": kind}), METADATA, [], "open_clip")
        assert words in text and "R-Adapter (" not in text


def test_every_merged_checkpoint_has_its_card(exported_tiny_clip: Path) -> None:
    folders = [path.parent for path in (exported_tiny_clip / "merged").rglob("release.json")]
    assert folders
    for folder in folders:
        facts = json.loads((folder / "release.json").read_text(encoding="utf-8"))
        card = ModelCard.load(folder / "README.md")
        assert card.data.get("library_name") == "open_clip"
        assert f"α = {facts['alpha']:g}" in card.text
        assert str(exported_tiny_clip) not in card.content
