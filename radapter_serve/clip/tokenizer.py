"""Export of open_clip's tokenizers: a `tokenizer.json`, and the spec for the server to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip.tokenizer as clip
import tokenizers

from radapter_serve.contract.facts import Clean, TokenizerFacts
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of, write_text

_CLEAN: dict[Any, Clean] = {
    clip._clean_lower: "lower",
    clip._clean_whitespace: "whitespace",
    clip._clean_canonicalize: "canonicalize",
}


def write_tokenizer(
    tokenizer: Any, path: str | Path, *, dynamic_length: bool = False
) -> TokenizerFacts:
    """Write open_clip's tokenizer in the format of `tokenizers`; returns the facts for a release.
    `dynamic_length` allows cropping texts (see `is_causal`).
    """
    path = Path(path)
    if isinstance(tokenizer, clip.SimpleTokenizer):
        text, spec = _clip(tokenizer)
    elif isinstance(tokenizer, clip.HFTokenizer):
        text, spec = _hugging_face(tokenizer)
    else:
        raise RAdapterError(
            f"cannot export a tokenizer of class {type(tokenizer).__name__}; allowed:"
            " SimpleTokenizer, HFTokenizer"
        )
    write_text(path, text)
    return TokenizerFacts(
        **spec,
        clean=_CLEAN[tokenizer.clean_fn],
        digest=digest_of(text.encode()),
        context_length=tokenizer.context_length,
        dynamic_length=dynamic_length,
    )


def _clip(tokenizer: clip.SimpleTokenizer) -> tuple[str, dict[str, Any]]:
    if tokenizer.reduction_fn is not None:
        raise RAdapterError(
            "cannot export a tokenizer with a reduction_mask: it shortens texts at random; leave"
            " it out"
        )
    special = [tokenizer.decoder[index] for index in tokenizer.all_special_ids]
    vocabulary = {
        token: index for token, index in tokenizer.encoder.items() if token not in special
    }
    # If two merges give one token, the encoder keeps the later index, and so does the file.
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>", unk_token=None
        )
    )
    core.add_special_tokens(special)
    # The server splits texts exactly, with its own code; normalizer and pre-tokenizer approximate
    # this for users who open the file with the library alone.
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    split = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start = tokenizer.sot_token_id
    end = tokenizer.eot_token_id
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}",
        special_tokens=[(special[0], start), (special[1], end)],
    )
    return core.to_str(), {"kind": "clip", "start": start, "end": end, "pad": 0}


def _hugging_face(tokenizer: clip.HFTokenizer) -> tuple[str, dict[str, Any]]:
    inner = tokenizer.tokenizer
    core: Any = getattr(inner, "backend_tokenizer", None)
    for problem, is_so in (
        (f"of mode {tokenizer.tokenizer_mode!r}", tokenizer.tokenizer_mode),
        ("without a fast form", core is None),
        ("that pads on the left", getattr(inner, "padding_side", "right") != "right"),
        ("without a padding token", inner.pad_token_id is None),
    ):
        if is_so:
            raise RAdapterError(f"cannot export a tokenizer {problem}")
    copy = json.loads(core.to_str())
    copy["truncation"] = copy["padding"] = None
    start = inner.bos_token_id if inner.bos_token_id is not None else inner.cls_token_id
    end = inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id
    spec = {
        "kind": "hf",
        "start": -1 if start is None else start,
        "end": -1 if end is None else end,
        "pad": inner.pad_token_id,
        "strip": inner.sep_token_id if tokenizer.strip_sep_token else None,
    }
    return json.dumps(copy, ensure_ascii=False), spec
