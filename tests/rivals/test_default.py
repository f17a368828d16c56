"""The default path on half of the classes of coloured images, by hand from the folded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from radapter_serve import Evaluation, Run, evaluate, train
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import load_base
from rivals import default
from rivals.others import Judged
from tests.rivals.conftest import collection_of


@pytest.mark.slow
def test_all_three_kinds_at_each_choice_and_no_run_twice(
    images: Path,
    tiny_clip_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = {"crop_scale": 0.9, "batch_size": 4, "epochs": 1}
    other = collection_of(images, ("elsewhere",), 4, fields)
    known = {"pacs": collection_of(images, ("own", "other"), 6, fields), "drawings": other}
    monkeypatch.setattr(default, "collection", lambda name, root: known[name])
    monkeypatch.setattr(default, "CANDIDATES", {"small": {}})
    adapters = []
    chosen: list[Evaluation] = []

    def trained(*arguments: Any, **fields: Any) -> Run:
        run = train(*arguments, **fields)
        adapters.append(load_adapter(run))
        return run

    def evaluated(*arguments: Any, **fields: Any) -> Evaluation:
        chosen.append(evaluate(*arguments, **fields))
        return chosen[-1]

    monkeypatch.setattr(default, "train", trained)
    monkeypatch.setattr(default, "evaluate", evaluated)
    out = tmp_path / "out"
    call = ["--set-name", "pacs", "--data-root", str(tmp_path), "--out", str(out), "--seeds", "0"]
    call += ["--base", tiny_clip_dir]
    assert default.main(call) == 0
    page = (out / "default.md").read_text(encoding="utf-8")
    for name in ("auto", "best", "0.5", "1"):
        assert f"| small | {name} |" in page
    lines = (out / "default.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(adapters) == len(chosen) == 2  # both halves
    assert [json.loads(line)["candidate"] for line in lines] == ["base"] * 2 + ["small"] * 2
    cell = json.loads(lines[2])
    choice = chosen[0].choice
    assert choice is not None
    assert cell["alphas"] == {"auto": choice.alpha, "best": choice.best, "0.5": 0.5, "1": 1.0}

    # Classify the other data by open_clip's own preprocessing and the folded weights.
    base = load_base(tiny_clip_dir)
    model: Any = base.model
    model.load_state_dict(fold(model.state_dict(), adapters[0], 1.0))
    pairs = [
        (path, number)
        for number, paths in enumerate(other.tests["elsewhere"].values())
        for path in paths
    ]
    transform: Any = open_clip.image_transform(base.preprocess["size"], is_train=False)
    pixels = torch.stack([transform(Image.open(path)) for path, _ in pairs])
    texts = base.tokenizer([f"a {name}" for name in other.classes])
    with torch.no_grad():
        scores = model.encode_image(pixels) @ model.encode_text(texts, normalize=True).T
    right = scores.argmax(dim=1).numpy() == np.array([number for _, number in pairs])
    rows = [Judged(*row) for row in cell["rows"]]
    (judged,) = [
        row for row in rows if (row.kind, row.style, row.alpha) == ("other data", "elsewhere", 1.0)
    ]
    assert judged.each.mean() == pytest.approx(right.mean())

    capsys.readouterr()
    assert default.main(call) == 0
    assert "seed 0" not in capsys.readouterr().err
