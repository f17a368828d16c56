"""`export`, the function: what it returns, what it refuses, and that it prints nothing unasked."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

import pytest

import radapter_serve
from radapter_serve.errors import RAdapterError
from tests.export.conftest import CLASSES


class _Run(PathLike[str]):
    """What `train` gives is a path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __fspath__(self) -> str:
        return str(self._folder)


def test_export_returns_what_it_wrote_and_prints_nothing(
    adapter_path: Path, tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(CLASSES))
    done = radapter_serve.export(
        _Run(adapter_path.parent),
        [0.3, 0.8],
        model_repository=tmp_path / "repository",
        merged=str(tmp_path / "merged"),
        label_sets={"animals": str(labels)},
    )
    assert capfd.readouterr() == ("", "")
    assert (done.version, done.alpha, len(done.releases)) == (2, 0.8, 2)
    assert set(done.agreement) == {"image_encoder", "text_encoder"}
    assert all(0 < one.max_error < 1e-4 for one in done.agreement.values())
    assert done.merged == tmp_path / "merged"
    assert done.releases[0].merged == done.merged / "alpha-0.3"
    assert (done.model_repository / "classify" / "2" / "label_sets" / "animals.npz").is_file()
    assert (done.transformers, done.choice) == (None, None)
    assert "\n" not in repr(done) and len(repr(done)) < 300
    assert done.made_of == (str(adapter_path.parent),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.merged = tmp_path  # type: ignore[misc]


@pytest.mark.parametrize(
    ("alpha", "settings", "message"),
    [
        (0.5, {"sharpness": 3}, "there is no setting 'sharpness'; allowed are checkpoint, lora"),
        (0.5, {"precision": "fp8"}, "precision is 'fp8': Input should be 'fp32', 'fp16'"),
        (0.5, {"max_batch_size": 0}, "max_batch_size is 0; allowed: 1 or more"),
        (0.5, {"format": "savedmodel"}, "format is 'savedmodel'; allowed: onnx, tensorrt"),
        ([0.5, "0.5"], {}, "an alpha is given twice: 0.5 0.5"),
        ("auto", {}, "no alpha was chosen"),
    ],
)
def test_what_will_not_do_is_refused(
    adapter_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alpha: Any,
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RAdapterError, match=message):
        radapter_serve.export(adapter_path, alpha, **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_runs_has_nothing_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RAdapterError, match="no run with an adapter in"):
        radapter_serve.export()
    with pytest.raises(RAdapterError, match="no adapter file at"):
        radapter_serve.export("none", 0.5)
