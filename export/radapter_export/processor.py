"""The processor of a model in `transformers` form: how it resizes images, and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from open_clip.tokenizer import HFTokenizer, _clean_canonicalize, _clean_lower
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors

from radapter_serve.clip.base import Base
from radapter_serve.clip.from_transformers import SPECIAL
from radapter_serve.errors import RAdapterError

PROCESSOR = frozenset({"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"})
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# Python's, without the low line, which becomes a blank
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^`{|}~]"""
_LEVELS = (
    3  # of 255 that a pixel may differ: transformers resizes by torchvision, open_clip by Pillow
)
_TEXTS = ["a photo of a cat.", "Don't  KNOW: it's 12345 l'été ÉÈ 猫 😀!!", "", "many words " * 60]


def write_processor(folder: Path, base: Base) -> None:
    """Write how images and texts become the model's input.

    Args:
        folder: of the model.
        base: that has a form in `transformers`.
    """
    image = _image_processor(base)
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2), encoding="utf-8")
    core, config = (
        _of_hugging_face(base) if isinstance(base.tokenizer, HFTokenizer) else _of_clip(base)
    )
    core.save(str(folder / "tokenizer.json"))
    config |= {"model_max_length": int(base.tokenizer.context_length), "padding_side": "right"}  # type: ignore[attr-defined]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def check_processor(folder: Path, base: Base) -> None:
    """Compare the processor of a folder with open_clip, on images and texts.

    Raises:
        RAdapterError: they differ.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]
    transform: Any = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    levels = 255 * np.array(base.preprocess["std"]).reshape(3, 1, 1)
    for image in _images(base.image_size):
        found = np.asarray(processor(images=[image], return_tensors="pt")["pixel_values"][0])
        apart = np.abs((found - transform(image).numpy()) * levels).max()
        if not apart <= _LEVELS:
            raise RAdapterError(
                f"the processor of transformers differs by {apart:.1f} of 255 levels from"
                " open_clip's"
            )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = tokenizer(_TEXTS, padding="max_length", truncation=True, return_tensors="np")[
        "input_ids"
    ]
    for text, ours, theirs in zip(_TEXTS, base.tokenizer(_TEXTS).numpy(), found, strict=True):
        # CLIP reads nothing after the first end token, and each tokenizer pads with another token.
        length = len(ours) if isinstance(base.tokenizer, HFTokenizer) else int(ours.argmax()) + 1
        if ours[:length].tolist() != theirs[:length].tolist():
            raise RAdapterError(
                f"the tokenizer of transformers reads {text[:40]!r} in another way than open_clip's"
            )


def _images(size: int) -> list[Image.Image]:
    """Upright and wide ones, smooth, of one size and of twice that; margins are even, where all
    crop alike.
    """
    random = np.random.default_rng(0)
    small = [
        random.integers(0, 256, shape, np.uint8) for shape in ((8, 6, 3), (6, 8, 3), (6, 6, 3))
    ]
    sizes = [(size, size + 4), (2 * size + 8, 2 * size), (3 * size, 3 * size)]
    return [
        Image.fromarray(one).resize(to, Image.Resampling.BICUBIC)
        for one, to in zip(small, sizes, strict=True)
    ]


def _image_processor(base: Base) -> dict[str, Any]:
    preprocess = base.preprocess
    size = base.image_size
    square = {"height": size, "width": size}
    squash = preprocess["resize_mode"] == "squash"
    bilinear = preprocess["interpolation"] == "bilinear"
    crop = {"do_center_crop": not squash, **({} if squash else {"crop_size": square})}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": int(Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC),
        **crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(value) for value in preprocess["mean"]],
        "image_std": [float(value) for value in preprocess["std"]],
    }


def _of_clip(base: Base) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """CLIP's vocabulary as `CLIPTokenizer` has it; its texts are not mended by ftfy first."""
    tokenizer: Any = base.tokenizer
    start, end = SPECIAL.values()
    vocabulary = {SPECIAL.get(token, token): index for token, index in tokenizer.encoder.items()}
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary,
            list(tokenizer.bpe_ranks),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=end,
        )
    )
    core.add_special_tokens([start, end])
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.RobertaProcessing(
        (end, tokenizer.eot_token_id),
        (start, tokenizer.sot_token_id),
        trim_offsets=False,
        add_prefix_space=False,
    )
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return core, {"tokenizer_class": "CLIPTokenizer", **names}


def _of_hugging_face(base: Base) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer of Hugging Face's; what open_clip does to texts before it becomes part of it."""
    outer: Any = base.tokenizer
    inner = outer.tokenizer
    core = tokenizers.Tokenizer.from_str(inner.backend_tokenizer.to_str())
    core.no_padding()
    core.no_truncation()
    before: list[Any] = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if outer.clean_fn is _clean_canonicalize:
        before = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(_PUNCTUATION), ""),
            *before,
        ]
    if outer.clean_fn in (_clean_canonicalize, _clean_lower):
        before.append(normalizers.Lowercase())
    core.normalizer = normalizers.Sequence(
        [*before, *([core.normalizer] if core.normalizer else [])]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids"]}
    return core, config | {name: str(token) for name, token in inner.special_tokens_map.items()}
