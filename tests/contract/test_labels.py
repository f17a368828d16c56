"""Labels: files, templates, names, limits, and probabilities against torch."""

from __future__ import annotations

import unicodedata
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.contract import labels as module
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.labels import (
    MAX_NAME_BYTES,
    best_class,
    indistinguishable,
    is_name,
    read_label_file,
    read_templates,
    spellings,
)
from radapter_serve.errors import RAdapterError


def test_label_file(tmp_path):
    path = tmp_path / "classes.txt"
    text = "\ufeff# animals\n\ncat, kitty ,cat\n  dog\r\nC# code\nÖlkäfer\n"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_label_file(path) == ["cat, kitty", "dog", "C# code", "Ölkäfer"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog\n# x\ncat, kitty\n", "line 4: the class 'cat' is already on line 1"),
        ("cat\n,,\n", "line 2.*names no class"),
        ("# nothing\n", "names no class"),
        ("Käfer".encode("latin-1"), "UTF-8"),
        (None, "No such file"),
    ],
)
def test_label_file_errors(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RAdapterError, match=message):
        read_label_file(path)


def test_templates(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("# t\na {}\nthe {}\n")
    for source, expected in (
        ("simple", ["a photo of a {}."]),
        ("a {} here", ["a {} here"]),
        (["x {}", "y {}"], ["x {}", "y {}"]),
        (path, ["a {}", "the {}"]),
    ):
        assert read_templates(source) == expected
    # Of the lists in the released code of ViLD and OVSeg, in alphabetical order
    for name, checksum in (("vild", 3243473227), ("ovseg", 3835008579)):
        lines = "\n".join(sorted(read_templates(name)))
        assert zlib.crc32(lines.encode()) == checksum
    path.write_text("a photo\n")
    for source, message in (
        (path, r"no \{\}"),
        ("openia", "built-in sets: openai, simple, vild, ovseg"),
        ([], "no template"),
    ):
        with pytest.raises(RAdapterError, match=message):
            read_templates(source)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog", "cat"], "label 3, 'cat', is the same as label 1, 'cat'"),
        (["cat, kitty", "Cat"], "label 2, 'Cat', is the same as label 1, 'cat'"),
        (["guinea pig", "guinea  pig "], "is the same as label 1, 'guinea pig'"),
        (["Caf\u00e9", "CAFE\u0301"], "is the same as label 1, 'Caf\u00e9'"),
        (["Stra\u00dfe", "STRASSE"], "is the same as label 1"),
        (["\uff23at", "cat"], "is the same as label 1"),
        (["cat, pet", "dog, Pet"], "label 2, 'dog', has the name 'Pet' in common .* 1, 'cat'"),
        (["cat, dog", "dog"], "label 2, 'dog', has the name 'dog' in common with label 1, 'cat'"),
        (["dog", "cat, dog"], "label 2, 'cat', has the name 'dog' in common with label 1, 'dog'"),
    ],
)
def test_labels_share_no_name(labels: list[str], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        module.check_names(labels)
    module.check_names(labels, distinct=False)


def test_names_of_one_label_and_names_that_differ_are_taken() -> None:
    module.check_names(["cat, Cat, kitty", "cats", "guinea pig", "guineapig", "caf\u00e9", "cafe"])


def test_prompts_are_counted_before_they_are_built():
    def check(*lists: tuple[int, int], length: int = 0) -> None:
        """Check lists of so many labels and templates each."""
        module.check_prompts(
            ([f"{number:05}".ljust(length, "x") for number in range(labels)], ["a {}."] * templates)
            for labels, templates in lists
        )

    check((10_000, 1), (10_000, 1))
    with pytest.raises(
        TaskError, match="^.invalid_argument. 9000000 prompts .* at most 20000 .*--l"
    ):
        check((3000, 3000))
    with pytest.raises(TaskError, match="20001 prompts"):
        check((10_000, 1), (10_000, 1), (1, 1))
    with pytest.raises(TaskError, match="17100000 characters in all prompts .* at most 10000000"):
        check((2_500, 8), length=850)


NAMES = ["photos", "Büro", "写真", "हिन्दी", "صور", "می\u200cخواهم", "🦊", "a.b-c_d", "_x", "1"]
NO_NAMES = [*[".", "..", ".x", "-x", "a/b", "/", "../a"], "", " a", "a ", "a\n", "a\0b", "a" * 201]


def test_names() -> None:
    for name in (*NAMES, "Ωμέγα 2", "👩‍🔬 photos", "é" * 100):
        assert is_name(name)
        short = [form for form in spellings(name) if len(form.encode()) <= MAX_NAME_BYTES]
        assert all(map(is_name, short)), name
    for name in (*NO_NAMES, "\u202etxt", "\ud800", "\u200d"):
        assert not is_name(name), name
    for kind in ("NFC", "NFD"):
        assert set(spellings(unicodedata.normalize(kind, "é"))) == {"\u00e9", "e\u0301"}
    assert spellings("a") == ["a"]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 50),
    st.floats(0.1, 200),
    st.none() | st.floats(-20, 20),
)
def test_the_best_label_is_the_first_of_equal_ones_with_its_probability(
    seed: int, labels: int, places: int, scale: float, bias: float | None
) -> None:
    # So coarse that many are equal.
    coarse = np.random.default_rng(seed).integers(-4, 5, (labels, places))
    cosines = (coarse / 4).astype(np.float32)
    logits = scale * torch.from_numpy(cosines).double()
    expected = logits.softmax(0) if bias is None else (logits + bias).sigmoid()
    first = [column.index(max(column)) for column in coarse.T.tolist()]
    best, probabilities = best_class(cosines.copy(), scale, bias)
    assert best.tolist() == first
    np.testing.assert_allclose(
        probabilities, expected.numpy()[first, range(places)], rtol=1e-4, atol=1e-6
    )


def test_labels_that_are_alike_are_named_once() -> None:
    embeds = np.array([[1, 0], [0, 1], [1, 0], [1, 0.005], [1, 0.1], [0, 1]], np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    assert indistinguishable(list("abcdef"), embeds) == [("a", "c"), ("a", "d"), ("b", "f")]
    assert indistinguishable(["a"], embeds[:1]) == indistinguishable([], embeds[:0]) == []
    # Across blocks.
    embeds = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    embeds[2999] = embeds[5]
    assert indistinguishable([str(n) for n in range(3000)], embeds) == [("5", "2999")]
