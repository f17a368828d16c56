"""Label files, templates, limits, and the mean over a label's prompts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from radapter_serve.contract import labels as module
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.labels import read_label_file, read_templates
from radapter_serve.errors import RAdapterError

SIMPLE = ["a photo of a {}."]


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "classes.txt"
    path.write_bytes(text.encode(encoding))
    return path


def test_label_file(tmp_path):
    path = write(tmp_path, "\ufeff# animals\n\ncat, kitty ,cat\n  dog\r\nC# code\nÖlkäfer\n")
    assert read_label_file(path) == ["cat, kitty", "dog", "C# code", "Ölkäfer"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog\n# x\ncat, kitty\n", "line 4: the class 'cat' is already on line 1"),
        ("cat\n,,\n", "line 2.*names no class"),
        ("# nothing\n", "names no class"),
        ("", "names no class"),
    ],
)
def test_label_file_errors(tmp_path, text, message):
    with pytest.raises(RAdapterError, match=message):
        read_label_file(write(tmp_path, text))


def test_label_file_that_is_no_text_or_missing(tmp_path):
    with pytest.raises(RAdapterError, match="UTF-8"):
        read_label_file(write(tmp_path, "Käfer", "latin-1"))
    with pytest.raises(RAdapterError, match="No such file"):
        read_label_file(tmp_path / "none.txt")


def test_templates(tmp_path):
    assert read_templates("simple") == SIMPLE
    assert read_templates("a {} here") == ["a {} here"]
    assert read_templates(["x {}", "y {}"]) == ["x {}", "y {}"]
    assert read_templates(write(tmp_path, "# t\na {}\nthe {}\n")) == ["a {}", "the {}"]
    with pytest.raises(RAdapterError, match=r"no \{\}"):
        read_templates(write(tmp_path, "a photo\n"))
    with pytest.raises(RAdapterError, match="built-in sets: simple, vild, ovseg"):
        read_templates("openia")
    with pytest.raises(RAdapterError, match="no template"):
        read_templates([])


def test_the_mean_is_over_names_and_templates_and_each_text_is_embedded_once():
    axes = {"a cat": 0, "the cat": 1, "a kitty": 2, "the kitty": 1, "a dog": 2, "the dog": 2}

    def embed(texts: list[str]) -> np.ndarray:
        assert texts == list(axes)
        return np.eye(3, dtype=np.float32)[[axes[text] for text in texts]]

    found = module.mean_embeddings(embed, ["cat, kitty", "dog", "cat, cat"], ["a {}", "the {}"])
    expected = np.array([[6**-0.5, 2 * 6**-0.5, 6**-0.5], [0, 0, 1], [0.5**0.5, 0.5**0.5, 0]])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([(3000, 3000)], "^.invalid_argument. 9000000 prompts .* at most 20000 .*--label-set"),
        ([(10_000, 1), (10_000, 1), (1, 1)], "20001 prompts"),
        ([(2_500, 8)], "17100000 characters in all prompts .* at most 10000000"),
        ([(10_000, 1), (10_000, 1)], None),
    ],
)
def test_prompts_are_counted_before_they_are_built(lists, message):
    pairs = [
        ([f"{n:05}" + "x" * 845 * (templates == 8) for n in range(labels)], ["a {}."] * templates)
        for labels, templates in lists
    ]
    if message is None:
        module.check_prompts(pairs)
        return
    with pytest.raises(TaskError, match=message):
        module.check_prompts(pairs)
