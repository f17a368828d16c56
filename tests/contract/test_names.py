"""Names of any script, and nothing that means something in a path or cannot be seen."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.contract.names import MAX_BYTES, is_name, spellings


@pytest.mark.parametrize(
    "name",
    [
        "photos",
        "Büro",
        "写真",
        "हिन्दी",
        "صور",
        "می‌خواهم",
        "Ωμέγα 2",
        "🦊",
        "👩‍🔬 photos",
        "a.b-c_d",
        "_x",
        "1",
        "é" * 100,
    ],
)
def test_names(name: str) -> None:
    assert is_name(name)
    assert all(is_name(one) for one in spellings(name) if len(one.encode()) <= MAX_BYTES)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".x",
        "-x",
        "a/b",
        "/",
        "../a",
        " a",
        "a ",
        "a\n",
        "a\0b",
        "\u202etxt",
        "\ud800",
        "\u200d",
        "a" * 201,
    ],
)
def test_no_names(name: str) -> None:
    assert not is_name(name)


@given(st.text(max_size=60))
def test_a_name_stays_in_its_folder(text: str) -> None:
    if is_name(text):
        assert text not in (".", "..") and not {"/", "\0", "\n"} & set(text) and text.encode()


def test_both_ways_to_write_a_letter_are_found() -> None:
    for form in ("NFC", "NFD"):
        assert set(spellings(unicodedata.normalize(form, "é"))) == {"\u00e9", "e\u0301"}
    assert spellings("a") == ["a"]
