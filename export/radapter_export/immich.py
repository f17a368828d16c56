"""Merged weights in the layout of immich, which searches a photo library with texts: graphs,
tokenizer and configuration under the names by which its machine learning loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from radapter_export.forms import write_texts
from radapter_export.graph import pixels_graph, text_graph
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import is_causal, normalised
from radapter_serve.contract.errors import Encode
from radapter_serve.errors import RAdapterError

VISUAL = "visual"
TEXTUAL = "textual"


class ImmichForm:
    """Merged weights as immich loads them."""

    name = "immich"
    files = ("config.json", VISUAL, TEXTUAL)

    def __init__(self, base: Base) -> None:
        # immich pads to the context length by the tokenizer's own token; CLIP was trained with
        # zeros, but its causal tower reads nothing after the first end token.
        tokenizer: Any = base.tokenizer
        is_hugging_face = isinstance(tokenizer, HFTokenizer)
        if (is_hugging_face and tokenizer.strip_sep_token) or not (
            is_hugging_face or is_causal(base.model)
        ):
            raise RAdapterError(
                f"{base.name} has no form for immich, which would pad its texts with other tokens"
                " than it was trained with; leave --immich out"
            )
        self._base = base
        texts = text_graph(base)
        texts.model.graph.inputs[0].name = "text"
        self._graphs = {VISUAL: pixels_graph(base), TEXTUAL: texts}

    def save(self, folder: Path, state_dict: Mapping[str, Tensor]) -> int:
        """Write a model; returns the bytes of its graphs."""
        size = 0
        for name, graph in self._graphs.items():
            (folder / name).mkdir()
            size += graph.save(state_dict, folder / name / "model.onnx")
        write_texts(folder / TEXTUAL, self._base.tokenizer)
        for path, fields in (
            (folder / "config.json", self._base.config),
            (folder / VISUAL / "preprocess_cfg.json", self._base.preprocess),
        ):
            path.write_text(json.dumps(fields, indent=2), encoding="utf-8")
        return size

    def open(self, folder: Path) -> dict[str, Encode]:
        """Load the graphs as immich does; returns encoders of raw images and of tokens."""
        preprocess = self._base.preprocess

        def encode(session: Any, batch: NDArray[Any]) -> NDArray[Any]:
            inputs = {"text": batch}
            if batch.ndim == 4:  # images
                inputs = {"image": normalised(batch, preprocess, "cpu").numpy()}
            [embeds] = session.run(None, inputs)
            return np.asarray(embeds)

        encoders: dict[str, Encode] = {}
        for name, encoder in ((VISUAL, "image_encoder"), (TEXTUAL, "text_encoder")):
            path = folder / name / "model.onnx"
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            encoders[encoder] = partial(encode, session)
        return encoders
