"""A base that comes as a folder of the library `transformers`: a `CLIPModel` with its processor and
tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from radapter_serve.clip.form import to_open_clip
from radapter_serve.clip.form_clip import form, open_clip_config
from radapter_serve.errors import RAdapterError, check_installed, short

#: what open_clip's tokenizer and that of `transformers` call the same tokens
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_TEXTS = ["a photo of a cat.", "Don't KNOW: it's 12345 l'été 猫 😀!!", ""]


def is_transformers(folder: Path) -> bool:
    """Whether a folder holds a model in this form, and none in open_clip's."""
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def read(folder: Path) -> tuple[nn.Module, dict[str, Any], SimpleTokenizer]:
    """Read a CLIP, and make it one of open_clip's.

    Args:
        folder: with `config.json`, weights, `preprocessor_config.json` (or `processor_config.json`)
            and a tokenizer.

    Returns:
        The model in fp32, with open_clip's `preprocess_cfg`; open_clip's `model_cfg`; its
        tokenizer.

    Raises:
        RAdapterError: it is no CLIP, or does what open_clip can't; says what.
    """
    check_installed("transformers", "huggingface")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        raise RAdapterError(f"its model_type is {short(kind)}; allowed: clip")
    with quiet():
        return _read(folder)


def _read(folder: Path) -> tuple[nn.Module, dict[str, Any], SimpleTokenizer]:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

    own: dict[str, Any] = {"local_files_only": True}
    config = open_clip_config(CLIPConfig.from_pretrained(folder, **own))
    loaded: Any = CLIPModel.from_pretrained(folder, output_loading_info=True, **own)
    theirs, found = loaded
    if missing := sorted(found["missing_keys"]):  # which the library would fill with random values
        raise RAdapterError(f"it has no weight {missing[0]}")
    model = open_clip.CLIP(**config)
    tokenizer = SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    _check_tokenizer(AutoTokenizer.from_pretrained(folder, **own), tokenizer, config)
    model.load_state_dict(to_open_clip(theirs.state_dict(), form(model, tokenizer).weights))
    processor: Any = AutoImageProcessor.from_pretrained(folder, **own)  # type: ignore[no-untyped-call]
    set_model_preprocess_cfg(model, _preprocess(processor.to_dict(), model.visual.image_size))
    return model, config, tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`transformers` logs, warns its own callers, and draws a bar for the weights that it loads."""
    from transformers.utils import logging as library

    logging: Any = library  # whose functions have no types
    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_tokenizer(theirs: Any, ours: SimpleTokenizer, config: dict[str, Any]) -> None:
    vocabulary = {SPECIAL.get(token, token): index for token, index in ours.encoder.items()}
    if theirs.get_vocab() != vocabulary or config["text_cfg"]["vocab_size"] != len(vocabulary):
        raise RAdapterError("its vocabulary is not CLIP's")
    found = theirs(_TEXTS, truncation=True, max_length=ours.context_length)["input_ids"]
    for row, expected in zip(found, ours(_TEXTS).tolist(), strict=True):
        if row != expected[: expected.index(ours.eot_token_id) + 1]:
            raise RAdapterError("its tokenizer reads texts in another way than CLIP's")


def _preprocess(theirs: dict[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` that does what an image processor does.

    Raises:
        RAdapterError: open_clip can't do it; says what.
    """
    side = image_size[0]
    square = {"height": side, "width": side}
    size, crop = (_plain(theirs.get(name)) for name in ("size", "crop_size"))
    cropped = bool(theirs.get("do_center_crop"))
    if size in ({"shortest_edge": side}, side) and cropped and crop in (square, side):
        mode = "shortest"
    elif size == square and (not cropped or crop in (square, side)):
        mode = "squash"
    else:
        raise RAdapterError(
            f"its images are resized to {size} and cropped to {crop if cropped else 'nothing'}"
        )
    if not all(theirs.get(name, True) for name in ("do_resize", "do_rescale", "do_normalize")):
        raise RAdapterError("its images are not resized, rescaled or normalised")
    if abs(theirs.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise RAdapterError(
            f"its pixels are multiplied by {theirs['rescale_factor']}; allowed: 1/255"
        )
    interpolation = _INTERPOLATIONS.get(int(theirs.get("resample", 3)))
    if interpolation is None:
        raise RAdapterError(
            f"its images are resized by Pillow's filter {theirs['resample']}; allowed: bilinear,"
            " bicubic"
        )
    return {
        "size": image_size,
        "mode": "RGB",
        "mean": list(theirs["image_mean"]),
        "std": list(theirs["image_std"]),
        "interpolation": interpolation,
        "resize_mode": mode,
        "fill_color": 0,
    }


def _plain(size: Any) -> Any:
    """A size of an image processor, without the fields that it leaves open."""
    if size is None or isinstance(size, int):
        return size
    return {name: value for name, value in dict(size).items() if value is not None}
