"""An index belongs to an image tower: what leaves the tower alone searches it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radapter_client import Client
from radapter_serve.adapter import Adapter
from radapter_serve.adapter.tuned import towers_of
from radapter_serve.clip.base import load_base
from radapter_serve.contract.errors import INDEX_MISMATCH, TaskError
from radapter_serve.encoders.loaded import load_release, served_release
from radapter_serve.errors import RAdapterError
from radapter_serve.index.build import add, build
from radapter_serve.index.index import current
from radapter_serve.release.agreement import Agreement
from radapter_serve.release.release import Dense, Quantization, Release, Tower
from radapter_serve.tasks.retrieve import Query, RetrieveRequest
from tests.helpers.projection import Searching, projecting
from tests.helpers.small_models import preprocess, release
from tests.helpers.small_release import photos_in, png
from tests.helpers.ways import in_process

TEXT_ONLY = Tower("sha256:1", None)  # the image tower of a release that changes only the text's


TUNED = Tower("sha256:1", "sha256:2")


@pytest.fixture
def photos(tmp_path: Path) -> str:
    return photos_in(tmp_path / "photos")


@pytest.mark.parametrize("way", ["url", "repository"])
def test_an_index_is_searched_however_its_release_was_reached(
    releases: Path, photos: str, tmp_path: Path, way: str
) -> None:
    out = tmp_path / "indexes" / "photos"
    with in_process(releases, tmp_path / "indexes") as server:
        by_url = served_release(server.url)
        by_folder = load_release(f"{releases}@2")
        assert by_url.release.architecture != by_folder.release.architecture
        build(photos, out, by_url if way == "url" else by_folder)
        with Client(server.url) as client:
            assert client.search(image=png(2), index="photos")[0].id == "2.png"
        Path(photos, "late.png").write_bytes(png(9))
        for loaded in (by_url, by_folder):
            assert add(out, loaded).count == 5


@pytest.mark.parametrize(
    "facts",
    [
        {"version": 7, "architecture": "local-dir:/elsewhere"},
        {"text_tower": Tower("sha256:other", None), "alpha": 0.9},
        {"alpha": 0.9, "dynamic_alpha": True},
    ],
)
def test_what_leaves_the_image_tower_alone_searches_the_index(
    photos: str, tmp_path: Path, facts: dict[str, Any]
) -> None:
    build(photos, tmp_path / "indexes" / "photos", projecting(image_tower=TEXT_ONLY))
    searching = Searching.of(projecting(tmp_path / "indexes", image_tower=TEXT_ONLY, **facts))
    hits = searching(RetrieveRequest("photos", Query(["1"]))).hits
    assert {hit.id for hit in hits} == {"0.png", "1.png", "2.png", "3.png"}


def test_an_index_of_an_unchanged_image_tower_is_one_of_the_base(
    photos: str, tmp_path: Path
) -> None:
    """A release that takes any α searches it at α 0, where its image tower is the base's."""
    out = tmp_path / "indexes" / "photos"
    build(photos, out, projecting(image_tower=TEXT_ONLY, alpha=0.5))
    assert current(out)[1].plan.release.alpha == 0
    tuned = projecting(tmp_path / "indexes", image_tower=TUNED, alpha=0.5, dynamic_alpha=True)
    hits = Searching.of(tuned)(RetrieveRequest("photos", Query(["1"]))).hits
    assert len(hits) == 4
    assert add(out, tuned).count == 4


@pytest.mark.parametrize(
    ("facts", "difference"),
    [
        ({"image_tower": Tower("sha256:9", "sha256:2")}, "another base"),
        ({"image_tower": Tower("sha256:1", "sha256:9")}, "another fine-tune"),
        ({"alpha": 0.9}, "another alpha"),
        ({"precision": "fp16"}, "another precision"),
        ({"preprocess": preprocess(4)}, "another preprocessing"),
    ],
)
def test_the_error_for_another_image_tower_says_what_to_embed_again(
    photos: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, Any],
    difference: str,
) -> None:
    out = tmp_path / "indexes" / "photos"
    build(photos, out, projecting())
    assert (current(out)[1].rate or 0) > 0
    other = projecting(tmp_path / "indexes", **facts)
    with pytest.raises(TaskError, match=f"{difference} .*4 images, about 1 second") as error:
        Searching.of(other)(RetrieveRequest("photos", Query(["1"])))
    assert error.value.code == INDEX_MISMATCH
    assert f"radapter-index build {photos} --out {out}" in capsys.readouterr().err
    with pytest.raises(RAdapterError, match=f"{difference} .*4 images.*radapter-index build"):
        add(out, other)


def measured(precision: str, distance: float) -> dict[str, Any]:
    """Facts of a release in a precision whose image encoder is so far from torch."""
    agreement = Agreement(0.0, 1 - distance)
    facts = release().computed_in(precision, None, {"image_encoder": agreement})
    return {"precision": precision, "agreement": facts.agreement}


@pytest.mark.parametrize(
    ("of_index", "of_release", "is_searched"),
    [
        (("fp32", 1e-9), ("bf16", 5e-5), True),
        (("bf16", 5e-5), ("fp32", 1e-9), True),
        (("fp32", 1e-9), ("bf16", 5e-4), False),
        (("int8", 5e-4), ("fp32", 1e-9), False),
    ],
)
def test_an_index_in_a_near_precision_is_searched_and_told_apart(
    photos: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    of_index: tuple[str, float],
    of_release: tuple[str, float],
    is_searched: bool,
) -> None:
    out = tmp_path / "indexes" / "photos"
    build(photos, out, projecting(**measured(*of_index)))
    made_by = current(out)[1].plan.release
    assert made_by.precision == of_index[0]
    assert made_by.image_distance == pytest.approx(of_index[1])
    other = projecting(tmp_path / "indexes", **measured(*of_release))
    searching = Searching.of(other)
    request = RetrieveRequest("photos", Query(["1"]))
    if not is_searched:
        with pytest.raises(TaskError, match="another precision"):
            searching(request)
        return
    for _ in range(2):
        assert len(searching(request).hits) == 4
    message = f"embedded in {of_index[0]}, and release 1 computes in {of_release[0]}"
    assert capsys.readouterr().err.count(message) == 1
    # Its images stay of one precision, and another tower's are not near.
    with pytest.raises(RAdapterError, match="another precision"):
        add(out, other)
    tower = projecting(
        tmp_path / "indexes", **measured(*of_release), image_tower=Tower("sha256:9", None)
    )
    with pytest.raises(TaskError, match="another base"):
        Searching.of(tower)(request)


def test_the_cost_follows_the_rate_of_the_build(photos: str, tmp_path: Path) -> None:
    build(photos, tmp_path / "index", projecting())
    facts = current(tmp_path / "index")[1]
    costs = [
        replace(facts, count=count, rate=rate).cost
        for count, rate in ((1_000_000, 50.0), (12_000, 40.0), (500, 10.0), (5, None))
    ]
    assert costs == [
        "1,000,000 images, about 6 hours",
        "12,000 images, about 5 minutes",
        "500 images, about 50 seconds",
        "5 images",
    ]


def test_an_index_of_an_older_version_says_what_to_run(photos: str, tmp_path: Path) -> None:
    out = tmp_path / "index"
    build(photos, out, projecting())
    path = out / current(out)[0] / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 6}))
    with pytest.raises(RAdapterError, match=f"format 6 .*radapter-index build {photos} --out"):
        current(out)


def test_the_digest_is_of_what_decides_the_embeddings_of_images() -> None:
    facts = release()
    int8: dict[str, Any] = {"quantization": Quantization("dynamic")}
    changes: list[tuple[dict[str, Any], bool]] = [
        ({"version": 9, "created": "now", "architecture": "x", "base_digest": "x"}, False),
        ({"dense": Dense("naclip", 2), "label_sets": {}}, False),
        ({"dynamic_alpha": True, "tokenizer": replace(facts.tokenizer, pad=5)}, False),
        ({"agreement": None}, False),
        ({"text_tower": Tower("sha256:4", "x")}, False),
        ({"alpha": 0.1}, True),
        ({"image_tower": Tower("x", "sha256:2")}, True),
        ({"image_tower": TEXT_ONLY}, True),
        ({"image_tower": TEXT_ONLY, "alpha": 0.1}, True),
        ({"preprocess": preprocess(33)}, True),
        ({"precision": "fp16"}, True),
        ({"embed_dim": 33}, True),
        (int8, True),
        ({**int8, "dynamic_alpha": True}, True),
        ({"quantization": Quantization("static", 9, 9, "a")}, True),
    ]
    digests = {facts.image_digest}
    for change, is_changed in changes:
        other = replace(facts, **change)
        assert Release.from_dict(json.loads(json.dumps(other.to_dict()))) == other
        assert (other.image_digest != facts.image_digest) == is_changed
        digests.add(other.image_digest)
    # The α of a tower that does not change is of no matter.
    assert len(digests) == 10


def test_a_release_of_version_1_0_0_counts_as_changed_in_both_towers() -> None:
    facts = release().to_dict()
    del facts["image_tower"], facts["text_tower"]
    old = Release.from_dict(facts)
    assert old.image_tower == old.text_tower == Tower("sha256:1", "sha256:2")
    for broken in ("text", [1], {"base": "x"}):
        with pytest.raises(RAdapterError, match=r"an export writes: release\.image_tower "):
            Release.from_dict({**facts, "image_tower": broken})


def test_towers_have_no_place_and_an_adapter_changes_its_own(
    tiny_clip_dir: str, random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    folder = Path(tiny_clip_dir.removeprefix("local-dir:"))
    model = load_base(tiny_clip_dir).model
    base = towers_of(model, {})
    assert base["image_tower"].change is None and base["image_tower"] != base["text_tower"]

    # The same base in another folder, and with another activation
    shutil.copytree(folder, tmp_path / "copy")
    assert towers_of(load_base(f"local-dir:{tmp_path / 'copy'}").model, {}) == base
    config = tmp_path / "copy" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    gelu = towers_of(load_base(f"local-dir:{tmp_path / 'copy'}").model, {})
    assert {gelu[name].base == base[name].base for name in base} == {False}

    # An adapter of one tower leaves the other as it is.
    adapter = random_adapter()
    image_only = {name: tensor for name, tensor in adapter.tensors.items() if "visual." in name}
    towers = towers_of(model, image_only)
    assert towers["text_tower"] == base["text_tower"]
    assert towers["image_tower"].base == base["image_tower"].base
    assert towers["image_tower"].change is not None
    with_more = towers_of(model, adapter.tensors)
    assert with_more["image_tower"] == towers["image_tower"]
    assert with_more["text_tower"].change is not None
