"""Suites and the data sets that they name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from radapter_serve.clip.towers import templates_of
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.data.rows import READERS
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.evaluation.rows import Results, table
from radapter_serve.evaluation.run import evaluate_suite, open_set
from radapter_serve.evaluation.suite import Entry, Suite, load_suite
from tests.evaluation.conftest import CLASSES, picture

ROOT = Path(__file__).parents[2]
SUITES = ROOT / "recipes" / "suites"
DATA = ROOT.parent / "shared" / "data"
# A model for images of 4 x 2 pixels
SMALL = SimpleNamespace(loaded=SimpleNamespace(preprocess=Preprocess((2, 4), resize_mode="squash")))


def suite_of(text: str, folder: Path) -> Suite:
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    return load_suite(folder / "s.yaml", folder)


def opened(suite: Suite, entry: Entry) -> Any:
    return open_set(suite, entry)


def folders(root: Path, names: list[str], size: tuple[int, int] = (8, 6)) -> None:
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", size, (index, 0, 0)).save(root / name / "1.png")


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_ready_suites(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # which has no recipes
    suite = load_suite(name, "data")
    assert suite.name == name
    assert any(entry.shift == "id" for entry in suite.of_split("test"))
    for entry in suite.entries:
        assert entry.data.partition(":")[0] in (*READERS, "masks", "coco")
        if entry.task == "segmentation" and entry.classes:
            names = yaml.safe_load((SUITES / entry.classes).read_text(encoding="utf-8"))
            assert list(names) == sorted(names)


@pytest.mark.skipif(not DATA.is_dir(), reason="the photos of ../shared/data are not here")
@pytest.mark.parametrize("name", ["pacs", "flickr8k", "coco200"])
def test_ready_suites_on_their_data(
    name: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first templates alone are used."""
    place = "radapter_serve.evaluation.run.templates_of"
    monkeypatch.setattr(place, lambda source: templates_of(source)[:1])
    suite = load_suite(SUITES / f"{name}.yaml", DATA)
    models = from_adapter(run_folder, [0.5])
    rows = evaluate_suite(models, suite, Results(tmp_path), limit=3)
    models[0].close()
    assert [row.dataset for row in rows] == [entry.name for entry in suite.of_split("test")]
    assert all(row.n == 3 for row in rows)
    if name == "flickr8k":
        assert rows[0].captions == 15
    if name == "coco200":
        assert {row.classes for row in rows} == {129, 77}


def test_base_and_novel_classes_have_a_harmonic_mean(
    world: Path, run_folder: Path, tmp_path: Path
) -> None:
    sets = [
        f"{{name: {n}, data: 'imagefolder:plain', class_split: {n}}}" for n in ("base", "novel")
    ]
    suite = suite_of(f"sets: [{', '.join(sets)}]", tmp_path)
    suite = dataclasses.replace(suite, data_root=world)
    base, novel = (opened(suite, entry) for entry in suite.entries)
    assert (base.classes, novel.classes) == (["cat", "dog", "guitar"], ["horse", "house", "tree"])
    assert base.labels.tolist() == novel.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    models = from_adapter(run_folder, [0.0, 1.0])
    rows = evaluate_suite(models, suite, Results(tmp_path / "out"))
    models[0].close()
    columns = table(rows, "", suite.pairs()).columns
    (cells,) = [list(of.cells) for of in columns if str(of.header).startswith("H")]
    for alpha, cell in zip((0.0, 1.0), cells, strict=True):
        a, b = (row.metrics["acc1"] for row in rows if row.alpha == alpha)
        assert cell == (f"{200 * a * b / (a + b):.2f}" if a and b else "0.00")


def test_karpathys_splits(world: Path, tmp_path: Path) -> None:
    def image(name: str, split: str, count: int) -> dict[str, object]:
        sentences = [{"raw": f"{name} {number}"} for number in range(count)]
        return {"filepath": "images", "filename": name, "split": split, "sentences": sentences}

    images = [image("0.jpg", "test", 6), image("1.jpg", "train", 5), image("2.jpg", "test", 2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}), encoding="utf-8")
    (tmp_path / "images").symlink_to(world / "images")
    fields = "task: retrieval, data: 'karpathy:dataset.json@test', images: ., max_captions: 5"
    suite = suite_of(f"sets: [{{name: a, {fields}}}]", tmp_path)
    data = opened(suite, suite.entries[0])
    assert data.captions == [f"0.jpg {number}" for number in range(5)] + ["2.jpg 0", "2.jpg 1"]
    assert data.image_of.tolist() == [0] * 5 + [1] * 2
    assert [image.data() for image in data.images] == [
        (world / "images" / f"{n}.jpg").read_bytes() for n in (0, 2)
    ]


def test_imagenet_and_its_shifts_with_clips_names(tmp_path: Path) -> None:
    suite = load_suite(SUITES / "imagenet.yaml", tmp_path)
    by_name = {entry.name: entry for entry in suite.entries}
    folders(tmp_path / "imagenet-r", ["n01443537", "n01484850", "n07753592"])
    folders(tmp_path / "imagenetv2-matched-frequency-format-val", ["0", "1", "10", "2"])
    folders(tmp_path / "objectnet-1.0" / "images", ["air_freshener", "alarm_clock", "banana"])
    rendition = opened(suite, by_name["imagenet-r"])
    assert rendition.classes == ["goldfish", "great white shark", "banana"]
    assert rendition.labels.tolist() == [0, 1, 2]
    assert rendition.templates is not None and len(rendition.templates) == 80
    numbered = opened(suite, by_name["imagenet-v2"])
    assert numbered.classes == ["tench", "goldfish", "brambling", "great white shark"]
    objects = opened(suite, by_name["objectnet"])
    assert len(objects.images) == 2  # air fresheners are no class of ImageNet
    pixels = objects.prepare(SMALL, 0)
    assert pixels[0, 0].tolist() == [1, 0, 0]  # without the border


def test_a_broken_image_is_named(run_folder: Path, tmp_path: Path) -> None:
    folders(tmp_path / "data", ["cat", "dog"])
    (tmp_path / "data" / "dog" / "1.png").write_bytes(b"no image")
    suite = suite_of("sets: [{name: two, data: 'imagefolder:data'}]", tmp_path)
    models = from_adapter(run_folder, [0.5])
    with pytest.raises(RAdapterError, match=r"data set 'two', .*dog/1\.png: .*not an image"):
        evaluate_suite(models, suite, Results(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


MASKED = "sets: [{name: a, data: x, task: segmentation"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets: []", "must have `sets`"),
        ("sets: [{name: a}]", "set 1 has no data"),
        ("sets: [{name: a, data: x, colour: red}]", "unknown fields colour; allowed: data, task"),
        ("sets: [{name: a, data: x, shift: far}]", "'a', is invalid: shift is 'far'; it should be"),
        ("sets: [{name: a, data: x, task: retrieval, metric: acc1}]", "metric is 'acc1'; allowed"),
        ("sets: [{name: a, data: x}, {name: a, data: y}]", "names 'a' twice"),
        ("sets: [{name: a, data: x, task: retrieval, class_split: base}]", "set 1 has class_split"),
        ("sets: [{name: a, data: x, border: -1}]", "border is -1"),
        (f"{MASKED}, dense: other}}]", "dense is 'other'; allowed: maskclip, naclip, proposals"),
        (f"{MASKED}, threshold: 2}}]", "threshold is 2.0; allowed: 0 to 1"),
        (f"{MASKED}, background: cow}}]", "background is 'cow', which needs a threshold"),
        (f"{MASKED}, dense: naclip, proposals: found}}]", "which needs dense: proposals"),
        (f"{MASKED}, proposal_weight: 0.5}}]", "which needs proposals with scores"),
        ("sets: [{name: a, data: x, templates: [1, 2]}]", "templates is [1, 2]; allowed: openai"),
        ("sets: {", "could not read the suite"),
    ],
)
def test_invalid_suites_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RAdapterError) as error:
        suite_of(text, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SUITE_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(["name", "data", *(field.name for field in dataclasses.fields(Entry))])
ANY_SET = st.dictionaries(FIELDS, SUITE_VALUES, max_size=4).map(
    lambda values: {"name": "a", "data": "x", **values}
)
ANY_SUITE = st.fixed_dictionaries(
    {"sets": st.lists(ANY_SET, max_size=2) | SUITE_VALUES, "name": SUITE_VALUES}
)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=60)
    | st.text(alphabet="sets: name-data[]{}'&*!?|>%@`#\n\t0129.e+~", max_size=60).map(str.encode)
    | (ANY_SUITE | SUITE_VALUES).map(
        lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "ignore")
    )
)
@example(b"[" * 1100)
@example(b"sets: &a [*a]")
@example(b"sets: [{name: a, data: x, templates: &t [*t]}]")
@example(b"9" * 5000)
@example(b"2001-99-99")
@example(b"sets: [{name: a, data: x, 1: 2, ? [3] : 4}]")
@example(b"sets: [{name: a, data: x, ? 1 : 2, b: 3}]")
@example(b'sets: [{name: "\\ud800", data: x}]')
@example("sets: [{name: b\u00fcro, data: x}]".encode("latin-1"))
def test_whatever_a_suite_holds_is_a_suite_or_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.yaml").write_bytes(content)
    try:
        suite = load_suite(tmp_path / "s.yaml")
    except RAdapterError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 1500
    else:
        assert suite.entries and all(entry.border >= 0 for entry in suite.entries)


def test_a_class_without_an_image_stays_a_choice(
    world: Path, run_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "plain", tmp_path / "few")
    shutil.rmtree(tmp_path / "few" / "dog")
    lines = [f"{path},{path.parent.name}" for path in sorted((tmp_path / "few").rglob("*.png"))]
    (tmp_path / "few.csv").write_text("\n".join(["image,label", *lines]), encoding="utf-8")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    shutil.copytree(tmp_path / "few", tmp_path / "empty")
    (tmp_path / "empty" / "dog").mkdir()  # which says by itself that there is such a class
    sets = (
        "{name: a, data: 'csv:few.csv', classes: names.txt}",
        "{name: b, data: 'imagefolder:few', classes: names.txt}",
        "{name: c, data: 'imagefolder:empty'}",
    )
    suite = suite_of(f"sets: [{', '.join(sets)}]", tmp_path)
    models = from_adapter(run_folder, [0.5])
    rows = evaluate_suite(models, suite, Results(tmp_path / "out"))
    models[0].close()
    for row in rows:
        assert (row.n, row.classes) == (20, 6)
        assert row.per_class is not None
        counts = {of.name: (of.n, of.recall is None) for of in row.per_class}
        assert counts == {name: (0, True) if name == "dog" else (4, False) for name in CLASSES}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("data: 'imagefolder:none'", "data set 'a': no folder"),
        ("data: 'imagefolder:plain', classes: none.yaml", "could not read the classes"),
        ("data: 'imagefolder:plain', classes: other.yaml", "knows none of its classes: cat, dog"),
        ("data: 'imagefolder:plain', classes: list.yaml", "must map"),
        ("data: 'imagefolder:plain', templates: 'no place'", "cannot read no place"),
        ("data: 'imagefolder:plain', templates: []", "no template"),
        ("data: 'imagefolder:plain', border: 30", "leaves nothing of 50 x 41 pixels"),
        ("data: 'csv:blank.csv', task: retrieval", "row 2 of"),
    ],
)
def test_data_that_can_not_be_used(world: Path, tmp_path: Path, fields: str, message: str) -> None:
    (tmp_path / "plain").symlink_to(world / "plain")
    (tmp_path / "other.yaml").write_text("x: y", encoding="utf-8")
    (tmp_path / "list.yaml").write_text("[a, b]", encoding="utf-8")
    (tmp_path / "blank.csv").write_text("image,caption\na.png,text\na.png,\n", encoding="utf-8")
    suite = suite_of(f"sets: [{{name: a, {fields}}}]", tmp_path)
    with pytest.raises(RAdapterError) as error:
        open_set(suite, suite.entries[0]).prepare(SMALL, 0)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_the_digest_tells_images_and_draws_apart_and_a_large_limit_takes_all(
    world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "plain", tmp_path / "plain")
    suite = dataclasses.replace(load_suite(world / "suite.yaml", world), data_root=tmp_path)
    plain = suite.entries[0]
    full_set = open_set(suite, plain, limit=1000)
    draws = [open_set(suite, plain, limit=5, seed=seed) for seed in (0, 0, 1)]
    assert ([len(draw) for draw in draws], len(full_set)) == ([5, 5, 5], 24)
    digests = [data.set_digest for data in (full_set, *draws)]
    assert digests[1] == digests[2] and len(set(digests)) == 3
    assert open_set(suite, plain).set_digest == digests[0]
    picture(np.random.default_rng(1)).save(tmp_path / "plain" / "cat" / "0.png")
    assert open_set(suite, plain).set_digest not in digests
