"""The demo's questions to its server, and pictures of the answers: green where they are right, red
where they are wrong.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from matplotlib.figure import Figure
from PIL import Image

from radapter_client import Client
from radapter_serve.contract.labels import (
    mean_embeddings,
    read_label_file,
    read_templates,
    split_label,
)
from radapter_serve.data.masks import load_masked
from radapter_serve.demo.data import FINE_TUNED, DemoData
from radapter_serve.demo.scenes import SHORT_SIDE, SceneData
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.in_process import answering
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints

LABEL_SET = "things"
QUESTIONS = 60  # drawings whose labels are compared with open_clip's
SHOWN = 18  # of them
SCENES = 5
CLOSE = 1e-3  # of scores


@contextlib.contextmanager
def served(repository: Path, indexes: Path) -> Iterator[str]:
    """Serve a release and its indexes by HTTP from this process; yields the URL."""
    config = ServerConfig(repository, Endpoints.on_free_ports(), indexes=indexes)
    settings = Settings(port=config.endpoints.http_port, indexes=config.indexes)
    with answering(config, settings):
        yield config.endpoints.http_url


def ask_labels(client: Client, merged: Path, data: DemoData, path: Path, seed: int) -> str:
    """Classify drawings of all styles by the release's label set, and draw some of them.

    Returns a line of what was right. Raises RAdapterError where open_clip's own pipeline, on the
    merged checkpoint, answers otherwise.
    """
    files = sorted(file for folder in data.test.values() for file in folder.rglob("*.png"))
    files = random.Random(seed).sample(files, QUESTIONS)
    answers = client.classify(files, label_set=LABEL_SET, top_k=1)

    # Compare with open_clip alone.
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{merged}")
    model.eval()
    lines = read_label_file(data.classes)
    with torch.no_grad():
        classes = mean_embeddings(
            lambda texts: model.encode_text(tokenizer(list(texts)), normalize=True).numpy(),
            lines,
            read_templates(data.templates),
        )
        pixels = torch.stack([preprocess(Image.open(file)) for file in files])  # type: ignore[operator]
        images = model.encode_image(pixels, normalize=True)
        scores = (model.logit_scale.exp() * images @ torch.from_numpy(classes).T).softmax(dim=1)
    names = [split_label(line)[0] for line in lines]
    error = 0.0
    same = 0
    for answer, row in zip(answers, scores, strict=True):
        same += answer.top == names[int(row.argmax())]
        error = max(error, abs(answer.scores[0] - float(row.max())))
    if same < len(files) or error > CLOSE:
        raise RAdapterError(
            f"served answers differ from open_clip's: {same} of {len(files)} labels equal, scores"
            f" within {error:.1e}"
        )

    right = sum(answer.top == f.parent.name for answer, f in zip(answers, files, strict=True))
    figure = Figure(figsize=(10, 6.3), dpi=110, layout="constrained")
    panels = figure.subplots(3, SHOWN // 3).flat
    for axes, file, answer in zip(panels, files[:SHOWN], answers[:SHOWN], strict=True):
        axes.imshow(np.asarray(Image.open(file).convert("RGB")))
        correct = answer.top == file.parent.name
        title = answer.top if correct else f"{answer.top}\n(is {file.parent.name})"
        axes.set_title(title, fontsize=8, color="green" if correct else "red")
        axes.axis("off")
    _save(figure, path, f"labels out of {len(names)}, zero-shot classification after fine-tuning")
    return (
        f"labels: {right} of {len(files)} drawings right, and all {same} labels equal to"
        " open_clip's own"
    )


def ask_search(
    client: Client, index: str, queries: Sequence[tuple[str, Callable[[str], bool]]], path: Path
) -> str:
    """Search an index, and draw the best hits of each query; a query is a text and whether the
    image of an ID is right. Returns a line of what was right.
    """
    figure = Figure(figsize=(9, 1.85 * len(queries) + 0.3), dpi=80, layout="constrained")
    rows = figure.subfigures(len(queries), 1, squeeze=False)[:, 0]
    count = 0
    for row, (text, is_right) in zip(rows, queries, strict=True):
        hits = client.search(text, index=index, top_k=6, thumbnails=True)
        row.suptitle(text, fontsize=9, x=0.01, ha="left")
        for axes, hit in zip(row.subplots(1, len(hits)), hits, strict=True):
            axes.imshow(np.asarray(Image.open(io.BytesIO(hit.thumbnail or b""))))
            axes.set_xlabel(f"{hit.score:.2f}", fontsize=7)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="green" if is_right(hit.id) else "red", linewidth=3)
        count += any(is_right(hit.id) for hit in hits)
    _save(figure, path, "the best six hits of each search, with their cosines")
    return f"searches: {count} of {len(queries)} have a right image among the first six"


def ask_masks(client: Client, data: SceneData, path: Path, seed: int) -> str:
    """Segment scenes by their true masks as proposals, and by dense patches, and draw them with
    what each drawing is mostly taken for. Returns a line of what was right.
    """
    masked = load_masked(f"masks:{data.test[FINE_TUNED]}", classes=data.classes)
    images = random.Random(seed).sample(list(masked.images), min(SCENES, len(masked.images)))
    figure = Figure(figsize=(9, 5.9), dpi=100, layout="constrained")
    panels = figure.subplots(3, len(images), squeeze=False)
    right = [0, 0]
    count = 0
    for column, masked_image in zip(panels.T, images, strict=True):
        image = Image.open(io.BytesIO(masked_image.data()))
        segments = masked_image.segments()
        masks = np.stack([mask for _, mask in segments])
        labels = [masked.classes[label] for label, _ in segments]
        count += len(labels)
        answers = (
            client.segment(image, masked.classes, proposals=masks, threshold=0.0),
            client.segment(image, labels, short_side=SHORT_SIDE),
        )
        column[0].imshow(np.asarray(image))
        for number, (axes, answer) in enumerate(zip(column[1:], answers, strict=True)):
            axes.imshow(np.asarray(answer.overlay(legend=False)))
            for label, mask in zip(labels, masks, strict=True):
                most = answer.labels[np.bincount(answer.mask[mask]).argmax()]
                correct = most == split_label(label)[0]
                right[number] += correct
                y, x = (place.mean() for place in np.nonzero(mask))
                box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0}
                color = "green" if correct else "red"
                axes.text(x, y, most, fontsize=6, color=color, ha="center", bbox=box)
    titles = (
        "the scenes",
        f"their masks as proposals, {len(masked.classes)} labels",
        "dense, the labels of the scene",
    )
    for axes in panels.flat:
        axes.axis("off")
    for axes, title in zip(panels[:, 0], titles, strict=True):
        axes.set_title(title, fontsize=8, loc="left")
    _save(figure, path, "each drawing by the label of most of its pixels")
    return (
        f"masks: of {count} drawings in scenes {right[0]} right by proposals and"
        f" {len(masked.classes)} labels, {right[1]} by dense patches and the scene's labels"
    )


def _save(figure: Figure, path: Path, what: str) -> None:
    figure.supxlabel(f"green: right, red: wrong; {what}", fontsize=8)
    figure.savefig(path)
