"""How many parameters learn in a ViT-B-16, beside what the paper's tables print; no weights are
needed for that.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from radapter_serve.data.labelled import Labelled
from rivals.adaptformer import AdaptFormer
from rivals.clip_svd import CLIPSVD
from rivals.clipood import CLIPood
from rivals.coop import CoCoOp, CoOp
from rivals.flyp import FineTuneLikePretrain
from rivals.full import FullFineTuning
from rivals.lora import LoRA
from rivals.maple import MaPLe
from rivals.method import Method
from rivals.repadapter import RepAdapter


@pytest.fixture
def run() -> Any:
    """A run whose base is a ViT-B-16 of shapes alone."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))
    model.logit_scale = nn.Parameter(torch.tensor(4.6))
    base = SimpleNamespace(model=model, tokenizer=open_clip.get_tokenizer("ViT-B-16"))
    return SimpleNamespace(base=base, data=Labelled([], ["cat", "dog"], "image", "label"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, count",
    [
        (FineTuneLikePretrain(), 149_620_737),  # Table 1: 149.6 M
        (FineTuneLikePretrain(text=False), 86_192_640),
        (CoOp(), 16 * 512),  # Table 2: < .01 M
        (
            CoCoOp(),
            4 * 512 + 512 * 32 + 32 + 32 * 512 + 512,
        ),  # Table 2: .03 M, which is the network alone: 33,312
        (RepAdapter(), 399_744),
        (RepAdapter(towers=("image",)), 24 * (768 * 8 + 8 + 768 * 8 // 2 + 768)),
        (RepAdapter(towers=("text",)), 24 * (512 * 8 + 8 + 512 * 8 // 2 + 512)),
        (RepAdapter(towers=("text",), hidden=14), 270_672),  # Table 2: .27 M
        (MaPLe(), 9 * 2 * 512 + 9 * (512 * 768 + 768)),  # 3.55 M, as MaPLe's own paper says
        (AdaptFormer(), 12 * (2 * 768 * 64 + 768 + 64) + 12 * (2 * 512 * 64 + 512 + 64)),
        (CLIPSVD(), 12 * 6 * (768 + 512)),  # all matrices of each block
        (LoRA(rank=4), 12 * 4 * (768 + 3 * 768) + 12 * 4 * (512 + 3 * 512)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else str(value),
)
def test_parameters_in_vit_b_16(method: Method, count: int, run: Any):
    assert sum(parameter.numel() for parameter in method.start(run).learning()) == count


def test_parameters_of_clipood(run: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "rivals.clipood.encode_texts", lambda model, tokens: torch.zeros(len(tokens), 512)
    )
    count = sum(parameter.numel() for parameter in CLIPood().start(run).learning())
    # Table 2 prints 86.7 M, which is the image tower and a head of 1,000 classes; CLIPood's code
    # learns no head
    assert (count, round((count + 1000 * 512) / 1e6, 1)) == (86_192_640, 86.7)


def test_parameters_of_full_fine_tuning(run: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "rivals.full.zero_shot_classifier",
        lambda model, _, classes, __: torch.zeros(len(classes), 512),
    )
    run.data.classes = [str(number) for number in range(1000)]
    count = sum(parameter.numel() for parameter in FullFineTuning().start(run).learning())
    assert round(count / 1e6, 1) == 86.7  # Table 1, the head of ImageNet's classes included
