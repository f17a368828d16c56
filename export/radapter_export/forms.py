"""Merged weights as folders for other libraries: open_clip loads one as `local-dir:PATH`, and
`transformers` opens the other, a model with processor and tokenizer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer, _clean_canonicalize, _clean_lower
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from torch import Tensor

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import normalised
from radapter_serve.clip.transformers import (
    SPECIAL,
    Form,
    check_outputs,
    check_processor,
    features,
    form_of,
    open_processor,
    quiet,
    to_transformers,
)
from radapter_serve.contract.errors import Encode
from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.files import disk_errors, staged, staged_folder
from radapter_serve.release.release import FILE, Release
from radapter_serve.sources import CARD

# Files of open_clip's folder
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
OPEN_CLIP_FILES = (
    *(OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
# Files of the folder of transformers, and its patterns for texts
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PROCESSOR = "preprocessor_config.json"
FORM_FILES = (CONFIG, WEIGHTS, PROCESSOR, "tokenizer.json", "tokenizer_config.json")
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# Python's string.punctuation without the underscore, which becomes a space
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^`{|}~]"""
WRITER = "radapter-export"
DISK_ADVICE = "nothing half-written was left; make room for it, and run radapter-export again"


def write_merged(
    folder: str | Path,
    base: Base,
    state_dict: Mapping[str, Tensor],
    release: Release | None = None,
) -> None:
    """Write one merged checkpoint atomically.

    Args:
        folder: target; an earlier merged checkpoint is replaced.
        base: source of configuration and preprocessing.
        state_dict: the folded weights, with exactly the base's keys.
        release: facts for `release.json`; None leaves the file out.

    Raises:
        RAdapterError: the folder holds other files, or the disk is full.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder, "--merged", OPEN_CLIP_FILES)
    with (
        disk_errors(folder, DISK_ADVICE, (SafetensorError,)),
        staged_folder(folder, WRITER) as target,
    ):
        save_open_clip(target, base, state_dict)
        if release is not None:
            release.save(target)


def save_open_clip(folder: Path, base: Base, state_dict: Mapping[str, Tensor]) -> None:
    """Write weights, configuration and tokenizer as open_clip reads them."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in state_dict.items()}
    with staged(folder / OPEN_CLIP_WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    config = {"model_cfg": base.config, "preprocess_cfg": base.preprocess}
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    # open_clip looks for a tokenizer of Hugging Face in the folder.
    if isinstance(base.tokenizer, HFTokenizer):
        base.tokenizer.tokenizer.save_pretrained(folder, legacy_format=False)


def check_replaceable(folder: Path, flag: str, files: Collection[str]) -> None:
    """Refuse to replace a path that holds other files than an export's: `files`, release.json and a
    card, in the folder or in subfolders alpha-A. `flag` names the path in the message.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RAdapterError(f"{folder} is a file; give another folder with {flag}")

    def is_export(names: set[str]) -> bool:
        # A README.md without a release.json is the user's.
        return names <= {*files, FILE, *([CARD] if FILE in names else [])}

    inside = {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        children = {child.name for child in path.iterdir()} if path.is_dir() else set()
        is_alpha = path.name.startswith("alpha-") and children and is_export(children)
        if not is_alpha and not is_export({path.name} | (inside & {FILE})):
            raise RAdapterError(
                f"{folder} holds {path.name}, which no export wrote; it would be replaced: give"
                f" another folder with {flag}, or move that away"
            )


def base_form(base: Base) -> Form:
    """Find the form of a base in transformers; refuses a base that it computes differently."""
    check_installed("transformers", "huggingface")
    form = form_of(base.name, base.model, base.tokenizer)
    state_dict = base.model.state_dict()
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            write_processor(Path(folder), base)
            check_processor(*open_processor(Path(folder)), base.preprocess, base.tokenizer)
            config_class, model_class = form.classes
            model = model_class(config_class(**form.config))
            model.load_state_dict(to_transformers(state_dict, form))
            check_outputs(model.eval(), base.model, base.tokenizer)
    except Exception as error:  # the library raises many kinds of errors on unsupported models
        raise RAdapterError(f"{base.name} has no form in transformers: {reason(error)}") from error
    return form


class TransformersForm:
    """Merged weights as `transformers` opens them."""

    name = "transformers"
    files = FORM_FILES

    def __init__(self, base: Base) -> None:
        self._base = base
        self._form = base_form(base)

    def save(self, folder: Path, state_dict: Mapping[str, Tensor]) -> int:
        """Write a model with processor and tokenizer; returns the bytes of its weights."""
        with quiet():
            with staged(folder / WEIGHTS) as path:
                tensors = to_transformers(state_dict, self._form)
                save_file(tensors, path, metadata={"format": "pt"})
            config_class, model_class = self._form.classes
            config = config_class(**self._form.config, architectures=[model_class.__name__])
            config.save_pretrained(folder)
            write_processor(folder, self._base)
        return (folder / WEIGHTS).stat().st_size

    def open(self, folder: Path) -> dict[str, Encode]:
        """Load the model as a user would; returns its encoders of raw images and of tokens."""
        with quiet():
            model = self._form.classes[1].from_pretrained(folder, local_files_only=True).eval()

        @torch.inference_mode()
        def encode(batch: NDArray[Any]) -> NDArray[np.float32]:
            if batch.ndim == 4:  # images
                pixels = normalised(batch, self._base.preprocess, "cpu")
                output = model.get_image_features(pixels)
            else:
                output = model.get_text_features(torch.from_numpy(batch).long())
            embeds = torch.nn.functional.normalize(features(output).float(), dim=-1)
            return np.asarray(embeds.numpy())

        return dict.fromkeys(("image_encoder", "text_encoder"), encode)


def write_processor(folder: Path, base: Base) -> None:
    """Write the processor of images, and the tokenizer."""
    preprocess = base.preprocess
    side = base.image_size
    square = {"height": side, "width": side}
    is_squashed = preprocess["resize_mode"] == "squash"
    is_bilinear = preprocess["interpolation"] == "bilinear"
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if is_squashed else {"shortest_edge": side},
        "resample": int(Image.Resampling.BILINEAR if is_bilinear else Image.Resampling.BICUBIC),
        "do_center_crop": not is_squashed,
        **({} if is_squashed else {"crop_size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(value) for value in preprocess["mean"]],
        "image_std": [float(value) for value in preprocess["std"]],
    }
    (folder / PROCESSOR).write_text(json.dumps(image, indent=2), encoding="utf-8")
    write_texts(folder, base.tokenizer)


def write_texts(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer."""
    is_hugging_face = isinstance(tokenizer, HFTokenizer)
    core, config = _hugging_face(tokenizer) if is_hugging_face else _clip(tokenizer)
    core.save(str(folder / "tokenizer.json"))
    config |= {"model_max_length": int(tokenizer.context_length), "padding_side": "right"}
    text = json.dumps(config, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _clip(tokenizer: Any) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Convert CLIP's vocabulary for `CLIPTokenizer`, which does not clean texts with ftfy."""
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


def _hugging_face(tokenizer: Any) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Copy a Hugging Face tokenizer, with open_clip's cleaning of texts as its normalizer."""
    inner = tokenizer.tokenizer
    core = tokenizers.Tokenizer.from_str(inner.backend_tokenizer.to_str())
    core.no_padding()
    core.no_truncation()
    before: list[Any] = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if tokenizer.clean_fn is _clean_canonicalize:
        before = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(_PUNCTUATION), ""),
            *before,
        ]
    if tokenizer.clean_fn in (_clean_canonicalize, _clean_lower):
        before.append(normalizers.Lowercase())
    core.normalizer = normalizers.Sequence(
        [*before, *([core.normalizer] if core.normalizer else [])]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids"]}
    return core, config | {name: str(token) for name, token in inner.special_tokens_map.items()}
