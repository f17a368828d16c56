"""Names of any script, and nothing that means something in a path or cannot be seen."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.contract.labels import MAX_NAME_BYTES, is_name, spellings

NAMES = ["photos", "Büro", "写真", "हिन्दी", "صور", "می\u200cخواهم", "🦊", "a.b-c_d", "_x", "1"]


@pytest.mark.parametrize("name", [*NAMES, "Ωμέγα 2", "👩‍🔬 photos", "é" * 100])
def test_names(name: str) -> None:
    assert is_name(name)
    assert all(is_name(one) for one in spellings(name) if len(one.encode()) <= MAX_NAME_BYTES)


NO_NAMES = [*[".", "..", ".x", "-x", "a/b", "/", "../a"], "", " a", "a ", "a\n", "a\0b", "a" * 201]


@pytest.mark.parametrize("name", [*NO_NAMES, "\u202etxt", "\ud800", "\u200d"])
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
