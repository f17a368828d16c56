"""Fold and export of every family: seconds, size, memory, and how far the graphs are from torch."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
import tyro
from common import RESULTS, Process, Report, say
from torch import nn

from radapter_export.graph import image_graph, text_graph
from radapter_serve.adapter import Metadata, attach, base_digest, fold
from radapter_serve.clip.base import Base
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.release.agreement import Samples, compare

NAMES = (
    "ViT-B-32",
    "ViT-B-16",
    "ViT-L-14",
    "coca_ViT-B-32",
    "ViT-B-16-SigLIP",
    "ViT-B-32-SigLIP2-256",
    "MobileCLIP-B",
    "EVA02-B-16",
    "PE-Core-B-16",
    "RN50",
    "MobileCLIP-S1",
)
CONVOLUTIONAL = ("RN50", "MobileCLIP-S1")  # of which only the text tower is adapted


def measure(name: str) -> list[str]:
    """In a process of its own: a row of the table for one architecture."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    model = open_clip.create_model(name).eval()
    context = config["text_cfg"]["context_length"]
    # The tokenizers of some are on a hub; tokens are random.
    base = Base(
        name,
        None,
        model,
        config,
        dict(model.visual.preprocess_cfg),
        SimpleNamespace(context_length=context),
    )
    state = dict(model.state_dict())
    adapters = attach(model, partial=name in CONVOLUTIONAL)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.01)
    adapter = adapters.adapter(
        Metadata(name, base_digest(state, [site.key for site in adapters.sites]))
    )
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (2, base.image_size, base.image_size, 3), dtype=np.uint8)
    tokens = random.integers(1, config["text_cfg"]["vocab_size"], (2, context), dtype=np.int32)
    mean, std = (torch.tensor(base.preprocess[key]) for key in ("mean", "std"))
    with torch.inference_mode():
        pixels = ((torch.from_numpy(image) / 255 - mean) / std).permute(0, 3, 1, 2)
        pairs = ((model.encode_image, pixels), (model.encode_text, torch.from_numpy(tokens)))
        references = [
            nn.functional.normalize(encode(values), dim=-1).numpy() for encode, values in pairs
        ]
    adapters.remove()
    start = time.perf_counter()
    folded = fold(state, adapter, 1.0)
    fold_seconds = time.perf_counter() - start
    cells = []
    size = 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for make, values, reference in zip(
            (image_graph, text_graph), (image, tokens), references, strict=True
        ):
            start = time.perf_counter()
            graph = make(base)
            size += graph.save(folded, Path(folder) / f"{graph.name}.onnx")
            cells.append(f"{time.perf_counter() - start:.1f}")
            encoder = EncoderGraph(Path(folder) / f"{graph.name}.onnx")
            worst = max(
                worst, compare(graph.name, encoder, Samples([values], [reference]), 1e-4).max_error
            )
    trained = sum(parameter.numel() for parameter in adapters.parameters())
    return [
        name,
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f}",
        f"{trained / 1e6:.1f}",
        str(len(adapters.sites)),
        f"{fold_seconds:.1f}",
        *cells,
        f"{size / 1e6:.0f}",
        f"{worst:.0e}",
    ]


def main(names: tuple[str, ...] = NAMES, out: Path = RESULTS) -> None:
    """Measure fold and export.

    Args:
        names: architectures of open_clip, with random weights.
        out: folder of the table.
    """
    report = Report(
        "architectures",
        "Fold and export of every family",
        "Random weights and a full-rank adapter; each architecture in a fresh process. Image and"
        " text: the export of a tower, from the model to an ONNX file with folded weights. Max"
        " error: of two images and two texts in ONNX Runtime, against open_clip with the adapters"
        " attached.",
        timed=False,
    )
    rows = []
    for name in names:
        os.sync()
        say(name)
        with Process() as process:
            rows.append([*process.call(measure, name), f"{process.peak() / 1e9:.1f}"])
        say(" | ".join(rows[-1]))
    columns = [
        "architecture",
        "M parameters",
        "M trained",
        "sites",
        "fold s",
        "image s",
        "text s",
        "MB",
        "max error",
    ]
    report.table("Seconds", [*columns, "peak GB"], rows)
    report.note(f"Of {' and '.join(CONVOLUTIONAL)} only the text tower is adapted (--partial).")
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
