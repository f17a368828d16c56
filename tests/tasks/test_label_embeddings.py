"""Embeddings of labels against a plain loop, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_serve.contract.embeddings import Cache, Point
from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.labels import MAX_EXAMPLES, Examples, LabelSet
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.tasks.embed import embed_labels
from tests.helpers.small_release import Local

SIMPLE = ["a photo of a {}."]


def embed(loaded: LoadedRelease, labels: list[str], templates: list[str] = SIMPLE, **how: Any):
    return complete(embed_labels(loaded, labels, templates, **how))


def with_cache(local: Local, max_size: int = 20_000) -> LoadedRelease:
    """The release with a cache of its own."""
    loaded = local.changed()
    loaded.label_cache = Cache(max_size)
    return loaded


def test_a_file_holds_a_label_set_with_no_more_examples_than_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    embeds = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    texts = ("Ölkäfer", "猫"), embeds, ("Ölkäfer, beetle", "猫"), ("a {}",)
    for count in (0, MAX_EXAMPLES, MAX_EXAMPLES + 1):
        examples = Examples((b"x",) * count, (1,) * count, (0.25,)) if count else None
        saved = LabelSet(*texts, examples)
        saved.save(path)
        if count > MAX_EXAMPLES:
            with pytest.raises(RAdapterError, match="has 129 examples; at most 128"):
                LabelSet.load(path)
            continue
        loaded = LabelSet.load(path)
        np.testing.assert_array_equal(loaded.embeds, embeds)
        for name in ("labels", "lines", "templates", "examples"):
            assert getattr(loaded, name) == getattr(saved, name)
        if examples:
            replace(saved, examples=replace(examples, weights=None)).save(path)
            chosen = LabelSet.load(path).examples
            assert chosen == replace(examples, weights=None)
            # A file of version 1.0.0 does not name the form of its examples.
            arrays = dict(np.load(path))
            del arrays["example_form"]
            np.savez(path, **arrays)
            first = LabelSet.load(path).examples
            assert first is not None and first.of_means
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_embeddings_are_the_mean_over_names_and_templates(local):
    templates = ["a photo of a {}.", "a drawing of one {}"]
    label_set = embed(local.loaded, ["cat, kitty", "a very long name of a dog"], templates)
    assert label_set.labels == ("cat", "a very long name of a dog")
    for names, row in zip(
        (["cat", "kitty"], ["a very long name of a dog"]), label_set.embeds, strict=True
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


def test_the_cache_is_bounded_and_the_answers_are_still_right(local):
    words = [f"thing {index}" for index in range(40)]
    templates = [f"{index} {{}}" for index in range(9)]
    small = with_cache(local, max_size=50)
    for count in (40, 7, 39, 1):
        for how in (SIMPLE, templates):
            label_set = embed(small, words[:count], how)
            expected = embed(local.loaded, words[:count], how)
            np.testing.assert_allclose(label_set.embeds, expected.embeds, atol=1e-6)
            sizes = [size for _, size in small.label_cache._entries.values()]
            assert sum(sizes) == small.label_cache._size <= 50
    # A list by itself may be longer.
    many = [f"{index}" for index in range(60)]
    assert embed(small, many) is embed(small, many)


class Key:
    """A key that does something at its second look-up, between a check of the cache and its use."""

    def __init__(self) -> None:
        self.lookups = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def __hash__(self) -> int:
        self.lookups += 1
        if self.lookups == 2:
            self.meanwhile()
        return 1


def test_threads_use_the_cache_one_after_the_other() -> None:
    with ThreadPoolExecutor(1) as pool:
        # An entry is not dropped while it is read.
        small = Cache(max_size=1)
        key = Key()
        small.put(key, "old")
        key.lookups = 0
        key.meanwhile = lambda: wait([pool.submit(small.put, "another", "new")], timeout=0.2)
        assert small.get(key) == "old"

        # An entry that two threads put counts once.
        large = Cache(20_000)
        both = Key()
        both.meanwhile = lambda: wait([pool.submit(large.put, both, "theirs")], timeout=0.2)
        large.put(both, "ours")
    assert (small.get(key), small.get("another")) == (None, "new")
    assert (large.get(both), large._size) == ("theirs", 1)


def test_embeddings_of_another_template_alpha_or_release_are_others(local):
    loaded = local.changed(dynamic_alpha=True)
    for release in (loaded, loaded.at(0.25)):
        elsewhere = {"place": loaded.place(Point(alpha=0.75))}
        for how in ({}, {"templates": ["a drawing of a {}."]}, elsewhere):
            local.calls.clear()
            embed(release, ["cat"], **how)
            assert len(local.calls) == 1
            embed(release, ["cat"], **how)
            assert len(local.calls) == 1


def test_what_was_embedded_until_a_caller_gave_up_is_kept(local):
    labels = [f"thing {n}, object {n}" for n in range(300)]  # ten batches
    for _ in range(2):  # as patient as four batches: none of the callers sees all of it
        local.calls.clear()
        with pytest.raises(TaskError, match="cancelled"):
            embed(local.loaded, labels, cancelled=lambda: len(local.calls) == 4)
    local.calls.clear()
    label_set = embed(local.loaded, labels)
    assert len(local.calls) <= 2
    fresh = embed(with_cache(local), labels)
    np.testing.assert_allclose(label_set.embeds, fresh.embeds, atol=1e-6)
