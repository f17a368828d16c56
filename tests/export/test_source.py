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
from radapter_export import ExportedRelease, ExportSettings, export_release
from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.cli.export import main
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, save_choice

Export = Callable[..., ExportedRelease]


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


@pytest.fixture
def export(quick: None, tmp_path: Path) -> Export:
    def call(adapter: Path, alphas: Any = (0.5,), **changes: Any) -> ExportedRelease:
        settings = ExportSettings(
            model_repository=tmp_path / "repository", merged=tmp_path / "merged", **changes
        )
        (release,) = export_release(adapter, alphas, settings)
        return release

    return call


def label_set(tmp_path: Path, release: ExportedRelease, name: str) -> LabelSet:
    return LabelSet.load(
        tmp_path / "repository" / "classify" / str(release.version) / "label_sets" / f"{name}.npz"
    )


def test_the_runs_classes_are_a_label_set(
    run: Callable[..., Path], export: Export, tmp_path: Path
) -> None:
    release = export(run(classes=["dog", "cat, kitty", "dog", "zebra", "cat, tom"]))
    found = label_set(tmp_path, release, "classes")
    assert found.labels == ("dog", "cat", "zebra")
    assert found.lines == ("dog", "cat, kitty", "zebra")
    assert release.facts["label_sets"]["classes"]["labels"] == 3
    assert release.warnings == []
    (tmp_path / "own.txt").write_text("zebra\nhorse\n", encoding="utf-8")
    given = {"animals": tmp_path / "own.txt"}
    assert set(export(run(classes=["dog"]), label_sets=given).facts["label_sets"]) == {
        "animals",
        "classes",
    }
    mine = export(run(classes=["dog"]), label_sets={"classes": tmp_path / "own.txt"})
    assert label_set(tmp_path, mine, "classes").labels == ("zebra", "horse")
    assert export(run()).facts["label_sets"] == {}


def test_labels_that_cannot_be_told_apart_are_named(
    run: Callable[..., Path], export: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer makes all letters small."""
    release = export(run(classes=["Crane", "dog", "crane"]))
    (warning,) = release.warnings
    assert (
        "label set classes" in warning and "'Crane' and 'crane'" in warning and "dog" not in warning
    )
    arguments = ["--adapter", str(tmp_path / "run"), "--alpha", "0.5", "0.6"]
    assert (
        main(
            [*arguments, "--model-repository", str(tmp_path / "a"), "--merged", str(tmp_path / "b")]
        )
        == 0
    )
    err = capfd.readouterr().err
    assert err.startswith("note: label set classes") and err.count("\n") == 1


@pytest.mark.parametrize("unsaid", ["dynamic", None])
def test_the_chosen_alpha_is_taken_by_default(
    run: Callable[..., Path], export: Export, unsaid: str | None
) -> None:
    folder = run()
    own = load_adapter(folder)
    assert export(folder, unsaid).alpha == own.metadata.alpha == 0.5
    choice = Choice(0.3, 0.7, 0.5, "rule", [], {}, own.digest)
    save_choice(choice, folder)
    assert export(folder, unsaid).alpha == 0.3
    save_choice(dataclasses.replace(choice, adapter_digest="of another adapter"), folder)
    assert export(folder, unsaid).alpha == 0.5


def test_an_export_says_which_alpha_it_takes(
    run: Callable[..., Path], quick: None, tmp_path: Path
) -> None:
    folder = run()
    places: Any = {"model_repository": tmp_path / "repository", "merged": tmp_path / "merged"}

    def made(alpha: Any = None, adapter: Any = folder) -> tuple[list[float], Any, tuple[str, ...]]:
        done = radapter_serve.export(adapter, alpha, **places)
        return [release.alpha for release in done.releases], done.choice, done.notes

    eval_auto = f"radapter-eval --adapter {folder} --alpha auto"
    none = f"alpha 0.5 is the run's own: no alpha was chosen for {folder}; choose one: {eval_auto}"
    assert made() == ([0.5], None, (none,))
    choice = Choice(0.3, 0.7, 0.5, "rule", [], {}, load_adapter(folder).digest)
    save_choice(choice, folder)
    best = "radapter-eval --alpha auto chose alpha 0.3; the best on the validation data is 0.7"
    assert made() == made("auto") == ([0.3], choice, (f"{best} (--alpha best)",))
    other = "alpha 0.7 is the best on the validation data; radapter-eval --alpha auto chose alpha"
    assert made("best") == ([0.7], choice, (f"{other} 0.3",))
    assert made(["auto", 0.4, "best"])[:2] == ([0.3, 0.4, 0.7], choice)
    assert made(0.4) == ([0.4], None, ())
    assert made(None, [folder, folder]) == ([0.5], None, ("alpha 0.5 is the average's own",))
    assert made("dynamic") == ([0.3], choice, (f"{best} (--alpha best)",))
    save_choice(dataclasses.replace(choice, best=0.3), folder)
    assert made()[2] == (
        "radapter-eval --alpha auto chose alpha 0.3, which is also the best on the validation data",
    )
    save_choice(dataclasses.replace(choice, adapter_digest="of another adapter"), folder)
    alphas, found, (note,) = made()
    assert (alphas, found) == ([0.5], None)
    assert note.startswith("alpha 0.5 is the run's own: ") and "for another adapter" in note
    for alpha in ("auto", "best"):
        with pytest.raises(RAdapterError, match="was chosen for another adapter"):
            made(alpha)
        with pytest.raises(RAdapterError, match=f"--alpha {alpha} was chosen for one adapter"):
            made(alpha, [folder, folder])


def test_photos_are_turned_as_in_training_unless_said_otherwise(
    run: Callable[..., Path], export: Export
) -> None:
    for recipe, given, expected in (
        ({}, True, True),
        ({}, False, False),
        ({"exif_orientation": False}, True, False),
    ):
        release = export(run(recipe=recipe), exif_orientation=given)
        assert release.facts["preprocess"]["exif_orientation"] is expected


def test_files_can_be_read_by_whom_the_umask_says(
    run: Callable[..., Path], export: Export, tmp_path: Path
) -> None:
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    release = export(run())
    files = [
        path
        for path in (tmp_path / "run", release.merged, tmp_path / "repository")
        for path in path.rglob("*")
    ]
    assert {path.stat().st_mode for path in files if path.is_file()} == {mode}
    assert (release.merged / "open_clip_model.safetensors") in files
