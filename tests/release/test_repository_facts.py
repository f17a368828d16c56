"""The releases that a repository serves, and the facts of a release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import (
    Accuracy,
    Dense,
    Quantization,
    Release,
    release_parameters,
)
from radapter_serve.release.repository import (
    CONFIG,
    SERVED,
    Served,
    find_release,
    require_known,
)
from tests.helpers.small_models import release
from tests.helpers.small_release import CONFIDENCE


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three releases of which nobody has chosen one, and one without its facts."""
    for version in (1, 2, 10):
        folder = tmp_path / "classify" / str(version)
        folder.mkdir(parents=True)
        release(version).save(folder)
    (tmp_path / "classify" / "11").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, [10]),
        ("", [10]),
        ("version_policy { specific { versions: [2, 1, 11] } }", [1, 2]),
    ],
)
def test_the_newest_export_is_what_the_config_asks_for(
    repository: Path, policy: str | None, expected: list[int]
) -> None:
    if policy is not None:
        (repository / "classify" / CONFIG).write_text(policy)
    assert Served.load(repository) == Served(tuple(expected))


def test_what_is_served_is_saved_and_loaded(repository: Path) -> None:
    Served((1,), (2,)).next([10, 2]).save(repository)
    assert Served.load(repository) == Served((2, 10), (1,))
    assert Served.load(repository).back() == Served((1,), (2, 10))
    with pytest.raises(RAdapterError, match="no release was served before"):
        Served((1,)).back()
    (repository / SERVED).write_text(json.dumps({"releases": [10, 2, 2], "before": [7, 1]}))
    assert Served.load(repository) == Served((2, 10), (1,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"releases": [], "before": []}', "release none is served, and .* holds 1, 2, 10"),
        ('{"releases": [1, 7, 8], "before": []}', "release 7, 8 is served, and"),
        ("[", "could not read"),
        ('{"releases": ["x"], "before": []}', "could not read"),
    ],
)
def test_a_choice_that_can_not_be_served_is_refused(
    repository: Path, text: str, message: str
) -> None:
    (repository / SERVED).write_text(text)
    with pytest.raises(RAdapterError, match=message):
        Served.load(repository)


def test_a_release_is_found_by_its_number(repository: Path) -> None:
    assert find_release(repository) == repository / "classify" / "10"
    (repository / SERVED).write_text('{"releases": [1, 2], "before": [10]}')
    assert find_release(repository) == repository / "classify" / "2"
    (repository / SERVED).unlink()
    assert find_release(f"{repository}@2") == repository / "classify" / "2"
    link = repository / "team@home"
    link.symlink_to(repository)
    assert find_release(f"{link}@2") == link / "classify" / "2"
    assert require_known(repository, [10, 1, 10]) == [1, 10]
    with pytest.raises(RAdapterError, match="no release 3 in .*; it holds 1, 2, 10"):
        find_release(f"{repository}@3")
    with pytest.raises(RAdapterError, match="no release in the model repository"):
        require_known(repository / "classify", [])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    for facts in (
        release(3),
        release(
            4,
            quantization=Quantization("dynamic"),
            accuracy=Accuracy("photos", 9, "acc1", 70.0, 69.9, 0.1),
            logit_bias=-10.0,
        ),
        release(5, confidence=CONFIDENCE, dense=Dense("naclip", 7), crop=MaskCrop(fill=(1, 2, 3))),
    ):
        facts.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["release.json"]
        assert Release.load(tmp_path) == facts
        assert json.loads((tmp_path / "release.json").read_text("utf-8")) == facts.to_dict()
    # A fact that does not apply is left out of the file, but a bias that a model lacks is null.
    assert {"quantization", "accuracy"} & set(release().to_dict()) == set()
    assert release().to_dict()["logit_bias"] is None


def test_newer_releases_are_read_and_broken_ones_refused(tmp_path: Path) -> None:
    facts = release().to_dict()
    (tmp_path / "release.json").write_text(
        json.dumps({**facts, "colour": "blue"}), encoding="utf-8"
    )
    assert Release.load(tmp_path) == release()
    del facts["alpha"], facts["templates"]
    (tmp_path / "release.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(RAdapterError, match="does not say its alpha, templates; export it again"):
        Release.load(tmp_path)
    for broken in ("[1]", "{", '"text"'):
        (tmp_path / "release.json").write_text(broken, encoding="utf-8")
        with pytest.raises(RAdapterError, match=r"release\.json"):
            Release.load(tmp_path)


KNOWN = release().to_dict()


@pytest.mark.parametrize(
    ("fact", "broken", "why"),
    [
        ("crop", {}, "release.crop lacks padding, square, fill"),
        ("crop", {"padding": 0, "square": True, "fill": [1, 2]}, "release.crop.fill is [1, 2]"),
        ("dense", {"method": "naclip", "grid": "many"}, "release.dense.grid is 'many'"),
        ("dense", {}, "release.dense lacks method, grid"),
        ("confidence", {"scale": 1.0}, "release.confidence lacks bias, dataset"),
        ("accuracy", 7, "release.accuracy is 7"),
        ("adapters", {}, "release.adapters is {}"),
        ("adapters", [{"digest": "x"}], "release.adapters lacks weight"),
        ("adapters", [{"digest": "x", "weight": True}], "release.adapters.weight is True"),
        ("made_of", {"kind": "lora", "name": "x"}, "release.made_of lacks base, digest"),
        ("quantization", [5], "release.quantization is [5]"),
        ("quantization", {"images": 64}, "release.quantization lacks kind"),
        ("quantization", {"kind": "static", "images": "x"}, "release.quantization.images is 'x'"),
        ("label_sets", [5], "release.label_sets is [5]"),
        ("label_sets", {"x": 5}, "release.label_sets.x is 5"),
        ("label_sets", {"x": {"labels": 1}}, "release.label_sets.x lacks templates, digest"),
        ("version", "../../x", "release.version is '../../x'"),
        ("tools", {"torch": 2}, "release.tools.torch is 2"),
        ("alpha", None, "release.alpha is None"),
        ("preprocess", [5], "release.preprocess is [5]"),
        ("preprocess", {"size": 32}, "release.preprocess lacks mode, interpolation"),
        ("preprocess", {**KNOWN["preprocess"], "size": "x"}, "release.preprocess.size is 'x'"),
        ("preprocess", {**KNOWN["preprocess"], "mean": 0.5}, "release.preprocess.mean is 0.5"),
        ("tokenizer", {}, "release.tokenizer lacks kind, start, end, pad, clean, digest"),
        ("tokenizer", {**KNOWN["tokenizer"], "pad": None}, "release.tokenizer.pad is None"),
        ("tokenizer", {**KNOWN["tokenizer"], "strip": "x"}, "release.tokenizer.strip is 'x'"),
        (
            "preprocess",
            {**KNOWN["preprocess"], "resize_mode": "odd"},
            "release.preprocess.resize_mode is 'odd'; allowed are shortest, squash, longest",
        ),
        (
            "tokenizer",
            {**KNOWN["tokenizer"], "kind": "x"},
            "release.tokenizer.kind is 'x'; allowed are clip, hf",
        ),
        ("tokenizer", {**KNOWN["tokenizer"], "clean": [1]}, "release.tokenizer.clean is [1]"),
        ("agreement", 0, "release.agreement is 0"),
        ("agreement", {"tolerance": 1e-4}, "release.agreement lacks batches, min_cosine"),
        ("agreement", {**KNOWN["agreement"], "batches": [1.5]}, "release.agreement.batches is 1.5"),
        (
            "agreement",
            {**KNOWN["agreement"], "image_encoder": {"max_error": 0.1}},
            "release.agreement.image_encoder lacks min_cosine",
        ),
    ],
)
def test_facts_that_no_export_writes_are_refused(fact: str, broken: Any, why: str) -> None:
    with pytest.raises(RAdapterError, match="^the release has other facts .*; export it") as error:
        Release.from_dict(release().to_dict() | {fact: broken})
    assert f"than an export writes: {why}" in str(error.value)


LINES = Path(__file__).with_name("stored_releases.jsonl").read_text("utf-8").splitlines()
STORED = [json.loads(line) for line in LINES]


@pytest.mark.parametrize("case", STORED, ids=lambda case: str(case["release"]))
def test_what_earlier_exports_wrote_is_read_and_written_as_before(case: dict[str, Any]) -> None:
    """`read` is the parameter that software of 2026-12-03 wrote into configs for a release of
    version 1.0.0; its own releases it wrote as they were stored, with `in_bf16`, a fact that is
    not read any more.
    """
    stored = Release.from_dict(case["stored"])
    written = {**case.get("read", case["stored"])}
    written.pop("in_bf16", None)
    assert release_parameters([stored])["release"] == json.dumps(written)
    assert stored.image_digest == case["image_digest"]


def test_a_release_of_version_1_0_0_has_its_method_of_dense_embeddings(tmp_path: Path) -> None:
    facts = release().to_dict() | {"dense": {"way": "naclip", "grid": 7}}
    (tmp_path / "release.json").write_text(json.dumps(facts))
    assert Release.load(tmp_path).dense == Dense("naclip", 7)
