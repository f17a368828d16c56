"""Embeddings of labels against a plain loop, and what is kept of them."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.labels import (
    MAX_EXAMPLES,
    Examples,
    LabelCache,
    LabelSet,
)
from radapter_serve.encoders.loaded import LoadedRelease, complete
from radapter_serve.errors import RAdapterError
from radapter_serve.process import LABELS
from radapter_serve.tasks.embed import embed_labels
from tests.helpers.small_release import Local

SIMPLE = ["a photo of a {}."]


def embed(loaded: LoadedRelease, labels: list[str], templates: list[str] = SIMPLE, **how: Any):
    return complete(embed_labels(loaded, labels, templates, **how))


def with_store(
    local: Local, file: Path | None = None, release: str = "", max_labels: int = 20_000
) -> LoadedRelease:
    """The release with a store of its own."""
    loaded = local.changed()
    loaded.label_cache = LabelCache(release, file, max_labels=max_labels)
    return loaded


def test_label_set_round_trip(tmp_path):
    embeds = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    LabelSet(("Ölkäfer", "猫"), embeds, ("Ölkäfer, beetle", "猫"), ("a {}",)).save(
        tmp_path / "a.npz"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    loaded = LabelSet.load(tmp_path / "a.npz")
    assert loaded.labels == ("Ölkäfer", "猫")
    assert (loaded.lines, loaded.templates) == (("Ölkäfer, beetle", "猫"), ("a {}",))
    np.testing.assert_array_equal(loaded.embeds, embeds)


def test_a_file_of_too_many_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    embeds = np.eye(1, 4, dtype=np.float32)
    for count in (MAX_EXAMPLES, MAX_EXAMPLES + 1):
        examples = Examples((b"x",) * count, (0,) * count)
        LabelSet(("cat",), embeds, ("cat",), ("a {}",), examples).save(path)
        if count == MAX_EXAMPLES:
            assert LabelSet.load(path).examples == examples
    with pytest.raises(RAdapterError, match=r"a\.npz has 129 examples; at most 128 are allowed"):
        LabelSet.load(path)


def test_embeddings_are_the_mean_over_names_and_templates(local):
    templates = ["a photo of a {}.", "a drawing of one {}"]
    found = embed(local.loaded, ["cat, kitty", "a very long name of a dog"], templates)
    assert found.labels == ("cat", "a very long name of a dog")
    for names, row in zip(
        (["cat", "kitty"], ["a very long name of a dog"]), found.embeds, strict=True
    ):
        prompts = [template.replace("{}", name) for name in names for template in templates]
        mean = np.mean([local.loaded.embed_texts([prompt])[0] for prompt in prompts], axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_only_what_is_missing_is_computed_once_and_by_length(local):
    embed(local.loaded, ["cat", "dog"])
    local.calls.clear()
    embed(local.loaded, ["dog", "cat", "bird"])
    assert [shape[0] for shape in local.calls] == [1]
    embed(local.loaded, ["dog", "cat", "bird"])
    assert len(local.calls) == 1
    embed(local.loaded, ["cat"], ["another {}"])
    assert len(local.calls) == 2

    local.calls.clear()
    words = [f"{'long ' * (index % 7)}label {index}" for index in range(200)]
    embed(local.loaded, words)
    lengths = [shape[1] for shape in local.calls]
    assert [shape[0] for shape in local.calls] == [64, 64, 64, 8]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize("shared", [False, True])
def test_the_store_is_bounded_and_the_answers_are_still_right(local, tmp_path, shared):
    file = tmp_path / "labels.sqlite" if shared else None
    small = with_store(local, file, max_labels=5)
    words = [f"thing {index}" for index in range(40)]
    for count in (40, 7, 39):
        found = embed(small, words[:count])
        expected = embed(local.loaded, words[:count])
        np.testing.assert_allclose(found.embeds, expected.embeds, atol=1e-6)
    keys = [
        small.label_cache.key(
            (None, hashlib.sha256(repr(("a photo of a {}.",)).encode()).digest()), word
        )
        for word in words
    ]
    assert len(small.label_cache.embeddings(keys)) == 5


def test_what_one_process_embedded_the_others_need_not(local, tmp_path):
    file = tmp_path / "labels.sqlite"
    words = [f"thing {index}" for index in range(1200)]
    first = embed(with_store(local, file), words)
    local.calls.clear()
    again = embed(with_store(local, file), words[::-1])
    assert not local.calls
    np.testing.assert_array_equal(again.embeds, first.embeds[::-1])
    embed(with_store(local, file), [*words, "one more"])
    assert [rows for rows, _ in local.calls] == [1]


@pytest.mark.parametrize(
    ("release", "templates", "alpha"),
    [("another", SIMPLE, None), ("", ["a drawing of a {}."], None), ("", SIMPLE, 0.5)],
)
def test_embeddings_of_another_release_template_or_alpha_are_others(
    local, tmp_path, release, templates, alpha
):
    file = tmp_path / "labels.sqlite"
    embed(with_store(local, file), ["cat"])
    embed(with_store(local, file, release), ["cat"], templates, alpha=alpha)
    assert len(local.calls) == 2


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_a_store_that_can_not_be_used_costs_no_answer(local, tmp_path, capsys, content):
    file = tmp_path / "labels.sqlite"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    loaded = with_store(local, file)
    for words in (["cat"], ["cat", "dog"]):
        np.testing.assert_allclose(
            embed(loaded, words).embeds, embed(local.loaded, words).embeds, atol=1e-6
        )
    assert capsys.readouterr().err.count("embeddings of labels are not kept:") == 1


def test_processes_of_a_server_share_a_file(repository, tmp_path, monkeypatch):
    monkeypatch.setenv(LABELS, str(tmp_path / "labels.sqlite"))
    first, second, other = (Local(repository, version) for version in (2, 2, 1))
    for local in (first, second, other):
        embed(local.loaded, ["cat"])
    assert [len(local.calls) for local in (first, second, other)] == [1, 0, 1]
    at_another = second.loaded.turned(False)
    assert at_another.label_cache is not second.loaded.label_cache


def test_what_was_embedded_until_a_caller_gave_up_is_kept(local):
    # 47 batches
    labels = [f"thing {n}, object {n}" for n in range(1500)]
    tries = 0
    while tries < 5:
        tries += 1
        before = len(local.calls)
        try:
            # As patient as 20 batches: none of the callers sees all of it.
            found = embed(
                local.loaded,
                labels,
                SIMPLE,
                cancelled=lambda before=before: len(local.calls) - before > 20,
            )
            break
        except TaskError as error:
            assert error.code == "cancelled"
    assert tries == 3
    again = embed(local.loaded, labels[::-1])
    np.testing.assert_array_equal(found.embeds, again.embeds[::-1])
    fresh = embed(with_store(local), labels[:100])
    np.testing.assert_allclose(found.embeds[:100], fresh.embeds, atol=1e-6)


def test_the_lists_that_are_kept_are_bounded(local):
    small = with_store(local, max_labels=10)
    kept = small.label_cache._sets
    words = [f"thing {index}" for index in range(40)]
    for start in range(0, 36, 4):
        embed(small, words[start : start + 4])
    assert [len(found.labels) for found in kept.values()] == [4, 4]
    for start in range(4):  # few labels may have many templates
        embed(small, ["cat"], [f"{start + index} {{}}" for index in range(5)])
    assert [len(found.templates) for found in kept.values()] == [5]
    embed(small, words)  # a list by itself may be longer
    assert [len(found.labels) for found in kept.values()] == [40]


def test_threads_may_share_a_store(local, tmp_path):
    loaded = with_store(local, tmp_path / "labels.sqlite")
    lists = [[f"thing {number + index}" for index in range(20)] for number in range(0, 400, 10)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda words: embed(loaded, words), lists * 2))
    for words, one in zip(lists * 2, found, strict=True):
        expected = embed(local.loaded, words)
        np.testing.assert_allclose(one.embeds, expected.embeds, atol=1e-6)
