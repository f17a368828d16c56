"""Torch-free tokens against open_clip's own, on everything that Unicode offers."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from radapter_serve.clip.tokenizer import write_tokenizer
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.errors import RAdapterError

PIECES = [
    'a photo of a cat', "IT'S", "DON'T", "I'LL", "'s", "'ſ", 'we’ve', '<end_of_text>',
    '<START_OF_TEXT>', '<|endoftext|>', '&amp;lt;', '&lt;b&gt;', '&#39;', '&nbsp;', 'café', 'café',
    'schÃ¶n', 'â€œquotedâ€\x9d', 'ﬁne', 'ＦＵＬＬ', '東京タワー', '한국어', 'שלום', 'مرحبا', 'नमस्ते',
    '👩\u200d👩\u200d👧', '🇩🇪', '❤️', '½', 'x²', 'Ⅷ', '١٢٣', '2024', '3.14', '\u200b', '\ufeff',
    '\x00', '\x1b[31m', '\xa0', '\u3000', '\r\n', '\t', '_', '__', '#!?', '...', 'İstanbul', 'ß',
    'ẞ', '🧪', '𐍈', '\ud7ff', '\ue000', 'ééééé', 'supercalifragilisticexpialidocious',
    'aaaaaaaaaaaaaaaaaaaaaaaa', '!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!', '- -', 'C++',
]  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def served(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    spec = write_tokenizer(reference, path)
    return Tokenizer.load(path, spec)


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=120)
    | st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join)
    | st.lists(st.sampled_from(PIECES)).map("".join)
)
@example("")
@example("   \n")
@example("word " * 500)
@example("x" * 5000)
@example("<end_of_text><end_of_text> <start_of_text>")
def test_tokens_are_those_of_open_clip(reference, served, text):
    np.testing.assert_array_equal(served([text]), reference([text]).numpy())


def test_every_word_of_the_vocabulary(reference, served):
    words = [token.replace("</w>", "") for token in reference.encoder if token.isascii()][::29]
    np.testing.assert_array_equal(served(words), reference(words).numpy())


def test_dynamic_length_is_a_crop(reference, tmp_path):
    spec = write_tokenizer(reference, tmp_path / "tokenizer.json", dynamic_length=True)
    served = Tokenizer.load(tmp_path / "tokenizer.json", spec)
    texts = ["a cat", "a photo of a small dog", "!"]
    tokens = served(texts)
    full = reference(texts).numpy()
    assert tokens.dtype == np.int32 and tokens.shape == (3, 8)
    np.testing.assert_array_equal(tokens, full[:, :8])
    assert not full[:, 8:].any()
    assert served(["dog " * 100]).shape == (1, 77)


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_other_settings_of_the_tokenizer(clean, tmp_path):
    special = {"additional_special_tokens": ["<mask>"]}
    reference = SimpleTokenizer(context_length=11, clean=clean, **special)
    served = Tokenizer.load(tmp_path / "t.json", write_tokenizer(reference, tmp_path / "t.json"))
    texts = [*PIECES, "A <mask> Photo, of_a CAT &amp; it's many words longer than the context"]
    np.testing.assert_array_equal(served(texts), reference(texts).numpy())


@pytest.mark.parametrize("strip", [False, True])
def test_a_hugging_face_tokenizer_is_taken_over_with_its_file(tmp_path, strip):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "##s", "cat", "of"]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    fast.save_pretrained(tmp_path / "hf")
    how = {"clean": "canonicalize", "strip_sep_token": strip}
    reference = HFTokenizer(str(tmp_path / "hf"), context_length=8, **how)
    texts = ["a photo", "A PHOTO, of   cats!", "a " * 30, "", "&amp; unknown"]
    expected = reference(texts).numpy()
    spec = write_tokenizer(reference, tmp_path / "t.json")
    assert spec.kind == "hf"
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "t.json", spec)(texts), expected)
    reference.tokenizer.pad_token = None
    with pytest.raises(RAdapterError, match="padding token"):
        write_tokenizer(reference, tmp_path / "none.json")


def test_a_random_reduction_is_refused(tmp_path):
    with pytest.raises(RAdapterError, match="reduction_mask"):
        write_tokenizer(SimpleTokenizer(reduction_mask="simple"), tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_refused_in_a_line_that_names_it(reference, tmp_path):
    path = tmp_path / "tokenizer.json"
    spec = write_tokenizer(reference, path)
    for content in (b"", b'{"version": "1.0", "mo', bytes(range(256)), None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(RAdapterError, match="could not read the tokenizer") as why:
            Tokenizer.load(path, spec)
        assert str(path) in str(why.value) and "\n" not in str(why.value)
