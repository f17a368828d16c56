"""Classes, label sets with examples and the chosen α go with an adapter into its releases."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import radapter_serve
from radapter_client import InvalidRequest
from radapter_export import ExportSettings
from radapter_export.source import Source, read_label_set, read_source
from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, save_choice
from radapter_serve.files import digest_of
from radapter_serve.model import Model
from tests.export.conftest import Export
from tests.helpers.small_release import png


@pytest.fixture
def run(random_adapter: Callable[..., Adapter], tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a run whose adapter has some metadata."""

    def make(**metadata: Any) -> Path:
        (tmp_path / "run").mkdir(exist_ok=True)
        save_adapter(random_adapter(**metadata), tmp_path / "run" / "adapter.safetensors")
        return tmp_path / "run"

    return make


def test_the_runs_classes_are_a_label_set(run: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("zebra\nhorse\n", encoding="utf-8")

    def label_sets(names: list[str] | None, **paths: Path) -> dict[str, list[str]]:
        source = read_source([run(classes=names)], None, ExportSettings(label_sets=paths))
        return {name: file.labels for name, file in source.label_sets.items()}

    twice = ["dog", "cat, kitty", "dog", "zebra", "cat, tom"]
    assert label_sets(twice) == {"classes": ["dog", "cat, kitty", "zebra"]}
    expected = {"classes": ["dog"], "animals": ["zebra", "horse"]}
    assert label_sets(["dog"], animals=file) == expected
    assert label_sets(["dog"], classes=file) == {"classes": ["zebra", "horse"]}
    assert label_sets(None) == {}
    # Data may have classes that share a name; a label set that a person writes may not.
    assert label_sets(["Crane", "crane", "bird, crane"])["classes"][1:] == ["crane", "bird, crane"]
    file.write_text("# birds\nCrane\ncrane\n", encoding="utf-8")
    with pytest.raises(RAdapterError, match=r"own\.txt: label 2, 'crane', is the .* 1, 'Crane'"):
        label_sets(None, birds=file)


def test_an_export_says_which_alpha_it_takes(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run()

    def export_source(source: Source, *_: Any) -> list[Any]:
        return [SimpleNamespace(alpha=alpha, warnings=[]) for alpha in source.alphas]

    monkeypatch.setattr("radapter_export.release.export_source", export_source)

    def export(alpha: Any = None, adapter: Any = folder) -> Any:
        done = radapter_serve.export(adapter, alpha)
        return [release.alpha for release in done.releases], done.choice, done.notes

    # Without a choice it is the run's own.
    alphas, choice, (note,) = export()
    assert (alphas, choice) == ([0.5], None)
    assert note.startswith(f"alpha 0.5 is the run's own: no alpha was chosen for {folder}; ")
    assert export(None, [folder, folder]) == ([0.5], None, ("alpha 0.5 is the average's own",))
    assert export("dynamic")[0] == [0.5]
    with pytest.raises(RAdapterError, match="alpha is empty; give one number"):
        read_source([folder], [], ExportSettings())

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
        with pytest.raises(RAdapterError, match=f"--alpha {alpha} is chosen for one run"):
            export(alpha, [folder, folder])


LABELS = ["cat\\, tabby,kitty", "dog", "guinea pig", "horse", "old wall"]
CAT, DOG, *_, WALL = LABELS
SHOWN = {CAT: ["cat.png"], DOG: ["dog.png"], WALL: ["walls/1.png", "walls/2.png", "dog.png"]}


@pytest.fixture
def label_file(tmp_path: Path) -> Path:
    """Three labels by text and images, of which the last is by images alone, and two by text."""
    folder = tmp_path / "shown"
    (folder / "walls").mkdir(parents=True)
    for seed, name in enumerate(sorted({*SHOWN[CAT], *SHOWN[WALL]})):
        (folder / name).write_bytes(png(seed, 50, 40))
    entries = [
        {"label": CAT, "images": "cat.png"},
        {"label": DOG, "images": ["dog.png"], "weight": 0.25},
        "guinea pig",
        {"label": "horse"},
        {"label": WALL, "images": ["walls", "dog.png"], "weight": 1},
    ]
    path = folder / "animals.yaml"
    path.write_text(json.dumps(entries), encoding="utf-8")  # which is YAML
    return path


@pytest.mark.parametrize("alphas", [[0.7], "dynamic"])
def test_a_release_has_labels_by_example(
    export: Export, label_file: Path, tmp_path: Path, alphas: Any
) -> None:
    """They are scored as in a request, which tests/tasks/test_classify.py computes by hand."""
    (exported,) = export(alphas, label_sets={"animals": label_file})
    facts = exported.release.label_sets["animals"]
    assert (facts.labels, facts.examples) == (5, 5)
    repository = tmp_path / "repository"
    path = repository / "classify" / "1" / "label_sets" / "animals.npz"
    assert facts.digest == digest_of(path)
    is_dynamic = alphas == "dynamic"
    assert (LabelSet.load(path).examples is not None) == is_dynamic
    images: dict[str, Any] = {
        label: [label_file.parent / name for name in names] for label, names in SHOWN.items()
    }
    options: dict[str, Any] = {"examples": images, "example_weight": {CAT: 0.5, DOG: 0.25, WALL: 1}}
    with Model(repository) as model:
        for alpha in (None, 0.2) if is_dynamic else (None,):
            answer = model.classify(png(9), label_set="animals", alpha=alpha)
            expected = model.classify(png(9), LABELS, alpha=alpha, **options)
            assert answer.labels == expected.labels
            np.testing.assert_allclose(answer.scores, expected.scores, rtol=1e-4)


def test_a_label_set_whose_images_move_nothing_says_so(export: Export, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(png(0))
    (tmp_path / "dog.png").write_bytes(png(1))
    cat = {"label": "cat", "images": "cat.png"}
    dog = {"label": "dog", "images": "dog.png"}
    for name, entries in (("one", [cat, "dog"]), ("two", [cat, dog])):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(entries), encoding="utf-8")
    assert read_label_set(tmp_path / "one.yaml", dynamic_alpha=False).weights is None
    files = {name: tmp_path / f"{name}.yaml" for name in ("one", "two")}
    (exported,) = export([0.7], label_sets=files)
    [warning] = [line for line in exported.warnings if "move no label" in line]
    assert warning.startswith("label set one: its images move no label")


def test_validation_fits_scores_to_labels_by_text_alone(
    export: Export, many_photos: Path, label_file: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"validation": f"imagefolder:{many_photos}", "max_drop": 100}
    (plain,) = export([0.7], **how)
    (exported,) = export([0.7], label_sets={"animals": label_file}, **how)
    confidence = exported.release.confidence
    assert confidence is not None and confidence == plain.release.confidence
    facts = (confidence.dataset, confidence.n, confidence.classes)
    assert facts == (how["validation"], 100, 5)
    image = sorted(many_photos.rglob("*.png"))[0]
    with Model(tmp_path / "repository") as model:
        with pytest.raises(InvalidRequest, match="not calibrated for labels by example"):
            model.classify(image, label_set="animals", calibrated=True)
        assert model.classify(image, LABELS, calibrated=True).labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a list of labels; each entry is a label, or has label, images and weight"),
        ("[cat, {label: dog, image: a.png}]", "entry 2: 'image' is 'a.png': Extra inputs"),
        ("[no]", "entry 1: 'label' is False: .*labels such as no and 2024 need quotes"),
        ("[{label: cat, images: 3}]", "entry 1: 'images' is 3: "),
        ("[{label: cat, images: a.png, weight: .nan}]", "'weight' is nan: "),
        ("[{label: cat, weight: 1}]", "entry 1: weight is for images, and there are none"),
        ("[{label: cat, images: broken.png}]", r"broken.png: the image is broken or truncated"),
        ("[{label: cat, images: text.png}]", r"text.png: 3 bytes are not an image"),
    ],
)
def test_files_of_another_form_are_refused_in_a_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "broken.png").write_bytes(png(0, 60, 60)[:200])
    (tmp_path / "text.png").write_bytes(b"txt")
    path = tmp_path / "labels.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RAdapterError, match=message) as error:
        read_label_set(path, dynamic_alpha=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dynamic", "most"), [(False, "MAX_SHOWN"), (True, "MAX_EXAMPLES")])
def test_the_number_of_images_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamic: bool, most: str
) -> None:
    monkeypatch.setattr(f"radapter_export.source.{most}", 3)
    (tmp_path / "a.png").write_bytes(png(0, 4, 4))
    path = tmp_path / "labels.yaml"
    path.write_text(json.dumps([{"label": "cat", "images": ["a.png"] * 3}]))
    assert len(read_label_set(path, dynamic_alpha=dynamic).images) == 3
    path.write_text(json.dumps([{"label": "cat", "images": ["a.png"] * 4}]))
    with pytest.raises(RAdapterError, match="has 4 images; at most 3 are allowed"):
        read_label_set(path, dynamic_alpha=dynamic)
