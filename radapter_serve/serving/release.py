"""A release where it lies: facts, digest, and its graphs run as served, preprocessing and tokenizer included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.serving.dial import Dial, Encode, at, facts_at
from radapter_serve.serving.encoder import Encoder
from radapter_serve.serving.labels import embed_texts
from radapter_serve.serving.preprocess import Preprocess, decode_pixels
from radapter_serve.serving.runtimes import RUNTIMES
from radapter_serve.serving.tokenizer import Tokenizer

_DECIDING = (
    "base_digest",
    "adapter_digest",
    "alpha",
    "architecture",
    "preprocess",
    "tokenizer",
    "precision",
    "embed_dim",
)


def release_digest(facts: Mapping[str, Any]) -> str:
    """sha256 over what decides the embeddings: the same fold, exported again, has the same digest.

    So has a release whose α is an input, at the fold's α, but in int8: there its two summands are rounded apart.

    Args:
        facts: a release's `release.json`.

    Raises:
        RAdapterError: a fact that decides is missing.
    """
    missing = [name for name in _DECIDING if name not in facts]
    if missing:
        raise RAdapterError(f"the release does not say its {', '.join(missing)}; export it again with radapter-export")
    deciding = {name: facts[name] for name in _DECIDING}
    deciding["preprocess"] = {"exif_orientation": True, **facts["preprocess"]}  # which older releases do not say
    if facts.get("quantization"):  # of int8 alone
        deciding["quantization"] = facts["quantization"]
        if facts.get("dynamic_alpha"):
            deciding["dynamic_alpha"] = True
    text = json.dumps(deciding, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_release(folder: Path) -> dict[str, Any]:
    """A release's facts, `release.json` of the folder.

    Raises:
        RAdapterError: there is none, or it is no JSON.
    """
    path = folder / "release.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RAdapterError(f"could not read {path}: {error}") from error
    return facts


def find_release(repository: str | Path) -> Path:
    """The folder of a release in a model repository, that of its task `classify`.

    Args:
        repository: the model repository; `DIR@N` names release N, the newest otherwise.

    Raises:
        RAdapterError: no release there, or none of that number.
    """
    path, at, number = str(repository).rpartition("@")
    if not (at and number.isdecimal()):
        path, number = str(repository), ""
    found = [int(p.parent.name) for p in Path(path, "classify").glob("*/release.json") if p.parent.name.isdecimal()]
    if not found:
        raise RAdapterError(f"no release in the model repository {path}; make one with radapter-export")
    if number and int(number) not in found:
        raise RAdapterError(f"no release {number} in {path}; it holds {', '.join(map(str, sorted(found)))}")
    return Path(path, "classify", str(int(number) if number else max(found)))


class LocalRelease:
    """A release in a model repository, run in this process by the runtime that it was exported for.

    Args:
        repository: as of `find_release`.

    Raises:
        RAdapterError: no such release, or its runtime can't load it.

    Attributes:
        facts: its `release.json`, with the α that it embeds at.
        version: its number in the repository.
        preprocess: from an image to what `encode_images` takes.
    """

    def __init__(self, repository: str | Path) -> None:
        folder = find_release(repository)
        self.version = int(folder.name)
        self.facts = read_release(folder)
        self.preprocess = Preprocess.from_dict(self.facts["preprocess"])
        self._repository = folder.parent.parent
        self._tokenizer = Tokenizer.load(folder / "tokenizer.json", self.facts["tokenizer"])
        self._images, self._texts = self._encoder("image_encoder"), self._encoder("text_encoder")
        self._rows = int(self.facts["max_batch_size"])

    def dial(self, alpha: float) -> None:
        """Embed at this α from now on.

        Raises:
            RAdapterError: the release does not have it.
        """
        self.facts = facts_at(self.facts, alpha)

    def prepare(self, data: bytes) -> NDArray[np.uint8]:
        """From the bytes of an image file to uint8 [S, S, 3]. Thread-safe.

        Raises:
            TaskError: no image, broken, or too large.
        """
        return decode_pixels(data, self.preprocess)

    def encode_images(self, pixels: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Prepared images, uint8 [B, S, S, 3], to float32 [B, D] of unit length; any B."""
        return self._in_batches(self._images, pixels)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to float32 [N, D] of unit length."""
        return embed_texts(texts, self._tokenizer, self._texts, self._rows)

    @cached_property
    def patch_encoder(self) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]] | None:
        """Prepared images, uint8 [B, S, S, 3], to float32 [B, g, g, D]; None where the release has no such graph."""
        if not (self._repository / "patch_encoder" / str(self.version)).is_dir():
            return None
        encoder = self._encoder("patch_encoder")
        return lambda pixels: self._in_batches(encoder, pixels)

    def _encoder(self, name: str) -> Encode:
        runtime = self.facts.get("runtime", "onnxruntime")
        path = self._repository / name / str(self.version) / RUNTIMES[runtime].file
        encoder = Encoder(path, runtime, precision=self.facts["precision"])
        return lambda values: at(encoder, Dial(self.facts).one(None))(values)

    def _in_batches(
        self,
        encoder: Encode,
        pixels: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    ) -> NDArray[np.float32]:
        starts = range(0, len(pixels), self._rows)
        return np.concatenate([encoder(np.asarray(pixels[start : start + self._rows])) for start in starts])
