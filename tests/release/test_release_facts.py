"""The facts of a release by name: the same JSON out and in, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import Release
from tests.helpers.small_models import release


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    for one in (
        release(3),
        release(4, quantization={"kind": "dynamic"}, accuracy={"drop": 0.1}, logit_bias=-10.0),
    ):
        one.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["release.json"]
        assert Release.load(tmp_path) == one
        assert json.loads((tmp_path / "release.json").read_text(encoding="utf-8")) == one.to_dict()
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
