"""Which indexes another release made than the newest that is served, and Triton's metric of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from radapter_serve.index.facts import MadeBy
from radapter_serve.index.index import outdated
from tests.helpers import fake_triton
from tests.helpers.indexes import said, say, write_facts
from tests.index.test_index import FakeRelease


def test_indexes_of_another_release_are_outdated(tmp_path: Path) -> None:
    release = FakeRelease().release
    for name, digest in (("fötos", release.digest), ("of another", "sha256:elsewhere")):
        write_facts(tmp_path / name, digest)
    assert outdated(tmp_path, release) == {"fötos": False, "of another": True}
    write_facts(tmp_path / ".fötos.building", release.digest)  # nobody can ask for it
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "index.json").write_text("{")
    assert outdated(tmp_path, release) == {"fötos": False, "of another": True}
    assert outdated(tmp_path / "missing", release) == {}


def test_a_release_that_takes_any_alpha_has_that_of_the_index(tmp_path: Path) -> None:
    release = replace(FakeRelease().release, dynamic_alpha=True, alpha=0.9)
    write_facts(tmp_path / "photos", release.at(0.5).digest)
    assert outdated(tmp_path, release) == {"photos": False}
    facts = said(tmp_path / "photos")
    for alpha in (0.6, 7.0):  # no release has the second
        facts["plan"]["release"]["alpha"] = alpha
        say(tmp_path / "photos", facts)
        assert outdated(tmp_path, release) == {"photos": True}
    assert not MadeBy.of(release.at(0.6)).is_of(replace(release, base_digest="sha256:0"))


class Metrics:
    """Triton's: the values of all metrics there are, by their labels."""

    def __init__(self, *, off: bool = False) -> None:
        self.values: dict[str, float] = {}
        self.families: list[dict[str, Any]] = []
        self._off = off

    def __call__(self, **given: Any) -> SimpleNamespace:
        if self._off:
            raise RuntimeError("metrics not enabled")
        self.families.append(given)
        return SimpleNamespace(Metric=self._metric)

    def _metric(self, labels: Mapping[str, str]) -> SimpleNamespace:
        assert list(labels) == ["index"]
        return SimpleNamespace(set=lambda value: self.values.update({labels["index"]: value}))

    GAUGE = "gauge"


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    found = Metrics()
    fake_triton.install(monkeypatch, MetricFamily=found, TritonModelException=RuntimeError)
    return found


def test_triton_is_told_again_and_again(metrics: Metrics) -> None:
    from radapter_serve.triton.index_metric import IndexMetric

    states: Iterator[dict[str, bool] | OSError] = iter(
        [{"a": True, "b": False}, OSError(), {"b": True, "c": False}, {"b": False}]
    )
    seen: list[dict[str, float]] = []
    done = threading.Event()

    def look() -> dict[str, bool]:
        seen.append(dict(metrics.values))
        now = next(states, None)
        if now is None:
            done.set()
        if isinstance(now, OSError):  # of a mount that is gone for a moment
            raise now
        return now or {"b": False}

    metric = IndexMetric(look, interval=0.001)
    assert done.wait(20)
    metric.close()
    # What is gone is no longer outdated.
    assert seen[:5] == [
        {},
        {"a": 1, "b": 0},
        {"a": 1, "b": 0},
        {"a": 0, "b": 1, "c": 0},
        {"a": 0, "b": 0, "c": 0},
    ]
    assert [family["name"] for family in metrics.families] == ["radapter_index_outdated"]
    assert not metric._thread.is_alive()


def test_a_triton_without_metrics_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_triton.install(
        monkeypatch, MetricFamily=Metrics(off=True), TritonModelException=RuntimeError
    )
    from radapter_serve.triton.index_metric import IndexMetric

    assert IndexMetric.start(dict) is None


@pytest.mark.parametrize(
    ("own", "policy", "expected"),
    [
        (1, {"specific": {"versions": [1, 2]}}, False),
        (2, {"specific": {"versions": ["1", "2"]}}, True),
        (2, {"latest": {"num_versions": 1}}, True),
        (2, None, True),
    ],
)
def test_the_newest_release_tells(
    own: int, policy: dict[str, Any] | None, expected: bool, metrics: Metrics
) -> None:
    from radapter_serve.triton.task_model import is_newest

    config = {} if policy is None else {"version_policy": policy}
    given = {"model_version": str(own), "model_config": json.dumps(config)}
    assert is_newest(given) is expected
