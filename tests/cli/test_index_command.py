"""radapter-index as a user runs it, with a tiny release."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from radapter_serve.cli.index import main
from radapter_serve.index.index import Index
from radapter_serve.release.facts import release_digest
from radapter_serve.runtimes.local_release import LocalRelease


@pytest.fixture
def place(exported_tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with photos and a model repository."""
    (tmp_path / "photos").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "model_repository").symlink_to(exported_tiny_clip / "model_repository")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_build_add_info_verify(place: Path, exported_tiny_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "photos", "--out", "indexes/photos"]) == 0
    said = capsys.readouterr().out
    assert "5 images (5 embedded)" in said and 'radapter-query search "a red bicycle" --index photos' in said
    assert main(["verify", "indexes/photos"]) == 0
    assert "agree" in capsys.readouterr().out
    assert main(["info", "indexes/photos"]) == 0
    said = capsys.readouterr().out
    assert "alpha 0.8" in said and "path, width, height, digest" in said and "exact" in said

    shutil.copy("photos/0.png", "photos/copy.png")
    Path("photos/1.png").unlink()
    assert main(["verify", "indexes/photos"]) == 1
    said = capsys.readouterr().out
    assert "file gone: 1" in said and "not in the index: 1" in said and "--prune" in said
    assert main(["add", "--out", "indexes/photos", "--prune"]) == 0
    assert "5 images (0 embedded, 4 there before, 1 removed, 1 with the same bytes" in capsys.readouterr().out
    assert main(["verify", "indexes/photos"]) == 0

    # open_clip's own embedding of the merged checkpoint finds the very image
    merged = sorted(exported_tiny_clip.glob("merged/**/open_clip_config.json"))[-1].parent
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    with torch.no_grad(), Image.open("photos/3.png") as image:
        embed = model.eval().encode_image(transform(image)[None], normalize=True)[0].numpy()  # type: ignore[operator]
    (hit,) = Index("indexes/photos").search(embed, 1)
    assert hit.id == "3.png" and hit.score == pytest.approx(1, abs=1e-4)


def test_errors_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "photos" / "bad.png").write_bytes(b"no image")
    Path("empty").mkdir()
    for arguments, match in (
        (["build", "photos", "--out", "i"], "--on-broken skip"),
        (["build", "empty", "--out", "i"], "holds no image"),
        (["build", "nowhere", "--out", "i"], "is no folder"),
        (["build", "csv:nowhere.csv", "--out", "i"], "nowhere.csv"),
        (["build", "photos", "--out", "empty"], "is no index"),
        (["build", "photos", "--out", "i", "--thumbnails", "-1"], "0 (none) to 1024"),
        (["build", "photos", "--out", "i", "--model-repository", "nowhere"], "radapter-export"),
        (["build", "photos", "--out", "i", "--model-repository", "model_repository@9"], "it holds 1, 2"),
        (["build", "photos", "--out", "i", "--url", "grpc://127.0.0.1:9"], "127.0.0.1:9"),
        (["add", "--out", "i"], "radapter-index build"),
        (["info", "i"], "no index at i"),
        (["verify", "i"], "no index at i"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert match in error and "Traceback" not in error, (arguments, error)
        assert not Path("i").exists() and not list(place.glob(".i*"))
    assert main(["build", "photos", "--out", "i", "--on-broken", "skip"]) == 0
    assert "1 images can't be read, see i/broken.txt" in capsys.readouterr().out
    assert main(["add", "--out", "i", "--on-broken", "skip", "--model-repository", "model_repository@1"]) == 2
    assert "another release" in capsys.readouterr().err


def test_the_digest_is_of_what_decides_the_embeddings(place: Path) -> None:
    facts = LocalRelease("model_repository").facts
    again = {**facts, "version": 9, "created": "now", "tools": {}, "max_batch_size": 1, "label_sets": {}}
    assert release_digest(json.loads(json.dumps(again))) == release_digest(facts)
    for name, value in (("alpha", 0.1), ("adapter_digest", "x"), ("precision", "fp16"), ("tokenizer", {})):
        assert release_digest({**facts, name: value}) != release_digest(facts)
    first, second = (release_digest(LocalRelease(f"model_repository@{number}").facts) for number in (1, 2))
    assert first != second


def test_an_index_is_made_without_torch(place: Path) -> None:
    code = (
        "import sys; from radapter_serve.cli.index import main; status = main(['build', 'photos', '--out', 'i']); "
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'open_clip')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_build_at_an_alpha(place: Path, dial_tiny_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dial = ["--model-repository", str(dial_tiny_clip)]
    assert main(["build", "photos", "--out", "indexes/photos", *dial, "--alpha", "0.8"]) == 0
    assert main(["add", "--out", "indexes/photos", *dial]) == 0
    assert main(["verify", "indexes/photos"]) == 0
    assert "the index, at alpha 0.8, and the files agree" in capsys.readouterr().out
    # It is the index that the release with this alpha folded in makes.
    assert main(["add", "--out", "indexes/photos"]) == 0
    capsys.readouterr()
    assert main(["build", "photos", "--out", "indexes/other", "--alpha", "0.5"]) == 2
    assert "exported at alpha 0.8; radapter-export --alpha dynamic" in capsys.readouterr().err
    assert not Path("indexes/other").exists()
