"""What goes with an adapter into its releases: classes, the chosen α, the turning of photos; and
what is warned of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import radapter_serve
from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.cli.export import main
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, save_choice
from tests.export.conftest import Export


@pytest.fixture
def run(adapter_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a run whose adapter has other metadata."""

    def make(**changes: Any) -> Path:
        adapter = load_adapter(adapter_path)
        (tmp_path / "run").mkdir(exist_ok=True)
        metadata = dataclasses.replace(adapter.metadata, **changes)
        save_adapter(Adapter(adapter.tensors, metadata), tmp_path / "run" / "adapter.safetensors")
        return tmp_path / "run"

    return make


def test_the_runs_classes_are_a_label_set(
    run: Callable[..., Path], export: Export, tmp_path: Path
) -> None:
    def classes(version: int) -> LabelSet:
        folder = tmp_path / "repository" / "classify" / str(version) / "label_sets"
        return LabelSet.load(folder / "classes.npz")

    [release] = export(adapter=run(classes=["dog", "cat, kitty", "dog", "zebra", "cat, tom"]))
    assert classes(1).labels == ("dog", "cat", "zebra")
    assert classes(1).lines == ("dog", "cat, kitty", "zebra")
    assert release.facts["label_sets"]["classes"]["labels"] == 3
    assert release.warnings == []
    (tmp_path / "own.txt").write_text("zebra\nhorse\n", encoding="utf-8")
    [release] = export(adapter=run(classes=["dog"]), label_sets={"animals": tmp_path / "own.txt"})
    assert set(release.facts["label_sets"]) == {"animals", "classes"}
    export(adapter=run(classes=["dog"]), label_sets={"classes": tmp_path / "own.txt"})
    assert classes(3).labels == ("zebra", "horse")
    [release] = export(adapter=run())
    assert release.facts["label_sets"] == {}


def test_labels_that_cannot_be_told_apart_are_named(
    run: Callable[..., Path],
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The tokenizer makes all letters small."""
    folder = run(classes=["Crane", "dog", "crane"])
    monkeypatch.chdir(tmp_path)
    assert main(["--adapter", str(folder), "--alpha", "0.5", "0.6"]) == 0
    err = capfd.readouterr().err
    assert err.startswith("note: label set classes") and err.count("\n") == 1
    assert "'Crane' and 'crane'" in err and "dog" not in err


def test_an_export_says_which_alpha_it_takes(
    run: Callable[..., Path], quick: None, tmp_path: Path
) -> None:
    folder = run()

    def export(alpha: Any = None, adapter: Any = folder) -> Any:
        done = radapter_serve.export(
            adapter, alpha, model_repository=tmp_path / "repository", merged=tmp_path / "merged"
        )
        return [release.alpha for release in done.releases], done.choice, done.notes

    # Without a choice it is the run's own.
    alphas, choice, (note,) = export()
    assert (alphas, choice) == ([0.5], None)
    assert note.startswith(f"alpha 0.5 is the run's own: no alpha was chosen for {folder}; ")
    assert export(None, [folder, folder]) == ([0.5], None, ("alpha 0.5 is the average's own",))
    assert export("dynamic")[0] == [0.5]

    # With one it is followed where no number is given.
    chosen = Choice(0.3, 0.7, 0.5, "rule", [], {}, load_adapter(folder).digest)
    save_choice(chosen, folder)
    note = "radapter-eval --alpha auto chose alpha 0.3; the best on the validation data is 0.7"
    followed = ([0.3], chosen, (f"{note} (--alpha best)",))
    assert export() == export("auto") == export("dynamic") == followed
    alphas, choice, (note,) = export("best")
    assert (alphas, choice) == ([0.7], chosen)
    assert note.startswith("alpha 0.7 is the best on the validation data; ")
    assert export(["auto", 0.4, "best"])[:2] == ([0.3, 0.4, 0.7], chosen)
    assert export(0.4) == ([0.4], None, ())
    save_choice(dataclasses.replace(chosen, best=0.3), folder)
    assert export()[2][0].endswith("which is also the best on the validation data")

    # A choice for another adapter does not count.
    save_choice(dataclasses.replace(chosen, adapter_digest="of another adapter"), folder)
    alphas, choice, (note,) = export()
    assert (alphas, choice) == ([0.5], None) and "for another adapter" in note
    for alpha in ("auto", "best"):
        with pytest.raises(RAdapterError, match="was chosen for another adapter"):
            export(alpha)
        with pytest.raises(RAdapterError, match=f"--alpha {alpha} was chosen for one adapter"):
            export(alpha, [folder, folder])


@pytest.mark.parametrize(
    ("recipe", "setting", "expected"),
    [({}, True, True), ({}, False, False), ({"exif_orientation": False}, True, False)],
)
def test_photos_are_turned_as_in_training_unless_said_otherwise(
    run: Callable[..., Path], export: Export, recipe: Any, setting: bool, expected: bool
) -> None:
    [release] = export(adapter=run(recipe=recipe), exif_orientation=setting)
    assert release.facts["preprocess"]["exif_orientation"] is expected


def test_files_can_be_read_by_whom_the_umask_says(
    run: Callable[..., Path], export: Export, tmp_path: Path
) -> None:
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    [release] = export(adapter=run())
    folders = (tmp_path / "run", release.merged, tmp_path / "repository")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {mode}
    assert (release.merged / "open_clip_model.safetensors") in files
