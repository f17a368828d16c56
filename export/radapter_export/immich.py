"""Merged weights in the layout of immich, which searches a photo library with texts: graphs,
tokenizer and configuration under the names by which its machine learning loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from radapter_export.forms import write_texts
from radapter_export.graph import Graph, pixels_graph, text_graph
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import is_causal, normalised
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Agreement, Samples, Tolerance, compare

IMMICH = "immich"
VISUAL = "visual"
TEXTUAL = "textual"
IMMICH_FILES = ("config.json", VISUAL, TEXTUAL)


def immich_graphs(base: Base) -> dict[str, Graph]:
    """Export the graphs, by their folders: `image` float32 [B, 3, S, S], normalised, and `text`
    int32 [B, L], both to embeddings; refuses a base whose texts immich would pad otherwise.
    """
    # immich pads to the context length by the tokenizer's own token; CLIP was trained with zeros,
    # but its causal tower reads nothing after the first end token.
    tokenizer: Any = base.tokenizer
    is_hugging_face = isinstance(tokenizer, HFTokenizer)
    if (is_hugging_face and tokenizer.strip_sep_token) or not (
        is_hugging_face or is_causal(base.model)
    ):
        raise RAdapterError(
            f"{base.name} has no form for immich, which would pad its texts with other tokens than"
            " it was trained with; leave --immich out"
        )
    texts = text_graph(base)
    texts.model.graph.inputs[0].name = "text"
    return {VISUAL: pixels_graph(base), TEXTUAL: texts}


def save_immich(
    folder: Path, base: Base, graphs: Mapping[str, Graph], state_dict: Mapping[str, Tensor]
) -> int:
    """Write a model; returns the bytes of its graphs."""
    size = 0
    for name, graph in graphs.items():
        (folder / name).mkdir()
        size += graph.save(state_dict, folder / name / "model.onnx")
    write_texts(folder / TEXTUAL, base.tokenizer)
    for path, fields in (
        (folder / "config.json", base.config),
        (folder / VISUAL / "preprocess_cfg.json", base.preprocess),
    ):
        path.write_text(json.dumps(fields, indent=2), encoding="utf-8")
    return size


def check_immich(
    folder: Path, base: Base, samples: Mapping[str, Samples], bounds: Tolerance
) -> Agreement:
    """Load the graphs as immich does, and compare them with torch's embeddings at their α."""
    agreements = []
    for name, encoder in ((VISUAL, "image_encoder"), (TEXTUAL, "text_encoder")):
        path = folder / name / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def encode(batch: NDArray[Any], session: Any = session) -> NDArray[np.float32]:
            inputs = {"text": batch}
            if batch.ndim == 4:  # images
                inputs = {"image": normalised(batch, base.preprocess, "cpu").numpy()}
            [embeds] = session.run(None, inputs)
            return np.asarray(embeds)

        part = compare(f"{name} of immich", encode, samples[encoder], bounds, is_fixed=True)
        agreements.append(part)
    return Agreement.worst(*agreements)
