"""The demo's questions to the running server, compared with open_clip's own pipeline, and pictures
of the answers.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from radapter_client import Client, Hit, Segmentation
from radapter_serve.clip.dense import encode_patches
from radapter_serve.contract.labels import (
    mean_embeddings,
    read_label_file,
    read_templates,
    split_label,
)
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.data import load_masked
from radapter_serve.demo.data import FINE_TUNED, DemoData
from radapter_serve.demo.scenes import CAPTIONS, SHORT_SIDE, SceneData
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import Release
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.segment_options import SegmentOptions

QUESTIONS = 60  # images, captions, scenes: as many of each as are compared
CLOSE = 1e-3  # of scores
Floats = NDArray[np.float32]


class Reference:
    """A merged checkpoint in open_clip alone.

    Args:
        merged: folder that open_clip loads.
    """

    def __init__(self, merged: Path) -> None:
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{merged}"
        )
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{merged}")
        self.scale = float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Unit-length embeddings, float32 [N, D]."""
        pixels = torch.stack([self.preprocess(image) for image in images])  # type: ignore[operator]
        return np.asarray(self.model.encode_image(pixels, normalize=True))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Floats:
        """Unit-length embeddings, float32 [N, D]."""
        return np.asarray(self.model.encode_text(self.tokenizer(list(texts)), normalize=True))

    def classes(self, names: Sequence[str], templates: Path) -> Floats:
        """Unit-length embeddings of classes, the mean over their prompts: float32 [C, D]."""
        return mean_embeddings(self.texts, names, read_templates(templates))

    @torch.no_grad()
    def patches(self, pixels: NDArray[np.uint8]) -> Floats:
        """NACLIP's embeddings of prepared images, uint8 [B, S, S, 3] to float32 [B, g, g, D]."""
        normalize = self.preprocess.transforms[-1]  # type: ignore[union-attr]
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return np.asarray(encode_patches(self.model, normalize(scaled), "naclip"))


def ask_classify(
    client: Client, merged: Path, data: DemoData, label_set: str, path: Path, seed: int
) -> str:
    """Classify drawings of all styles; a picture of some with their labels.

    Returns:
        What was compared, in a line.

    Raises:
        RAdapterError: a served answer differs from open_clip's.
    """
    files = sorted(file for folder in data.test.values() for file in folder.rglob("*.png"))
    files = random.Random(seed).sample(files, QUESTIONS)
    answers = client.classify(files, label_set=label_set, top_k=1)
    reference = Reference(merged)
    lines = read_label_file(data.classes)
    names = [split_label(line)[0] for line in lines]
    cosines = reference.images(_open(files)) @ reference.classes(lines, data.templates).T
    scores = _softmax(reference.scale * cosines)
    best = scores.argmax(axis=1)
    same = sum(answer.top == names[index] for answer, index in zip(answers, best, strict=True))
    error = max(
        abs(answer.scores[0] - score)
        for answer, score in zip(answers, scores.max(axis=1), strict=True)
    )
    _gallery(files[:18], [answer.top for answer in answers[:18]], path)
    return _agreed(f"{same} of {len(files)} labels equal", same == len(files), error)


def ask_search(
    client: Client, merged: Path, scenes: SceneData, index: str, path: Path, seed: int
) -> str:
    """Search an index of scenes by their captions; a picture of some with what was found.

    Returns, Raises: as `ask_classify`.
    """
    with (scenes.test[FINE_TUNED] / "captions.csv").open(encoding="utf-8", newline="") as file:
        captions = [
            (row["caption"], f"{scenes.test[FINE_TUNED].name}/{row['image']}")
            for row in csv.DictReader(file)
        ]
    captions = random.Random(seed).sample(captions[::CAPTIONS], QUESTIONS)  # those by class names
    found = [client.search(text, index=index, top_k=6, thumbnails=True) for text, _ in captions]
    with scenes.gallery.open(encoding="utf-8", newline="") as file:
        ids = [row["image"] for row in csv.DictReader(file)]
    reference = Reference(merged)
    embeds = reference.images(_open([scenes.gallery.parent / id for id in ids]))
    cosines = reference.texts([text for text, _ in captions]) @ embeds.T
    expected = np.sort(cosines, axis=1)[:, ::-1]
    place = {id: number for number, id in enumerate(ids)}
    same = 0
    error = 0.0
    for row, best, hits in zip(cosines, expected, found, strict=True):
        scores = np.array([hit.score for hit in hits])
        error = max(error, float(np.abs(scores - best[: len(hits)]).max()))
        same += bool(np.abs(scores - row[[place[hit.id] for hit in hits]]).max() < CLOSE)
    _contact_sheet(captions[:4], found[:4], path)
    return _agreed(f"{same} of {len(found)} searches equal", same == len(found), error)


def ask_segment(
    client: Client, merged: Path, data: DemoData, scenes: SceneData, path: Path, seed: int
) -> str:
    """Segment scenes by their true masks as proposals, and by dense patches; a picture of some.

    Returns, Raises: as `ask_classify`.
    """
    masked = load_masked(f"masks:{scenes.test[FINE_TUNED]}", classes=scenes.classes)
    images = random.Random(seed).sample(list(masked.images), QUESTIONS // 3)
    reference = Reference(merged)
    release = Release.from_dict(client.release().facts)
    preprocess = Preprocess.from_dict(release.preprocess)
    crop = MaskCrop.from_dict(release.crop)
    segment = DenseSegmenter(reference.patches, preprocess, release.max_batch_size)
    classes = reference.classes(masked.classes, data.templates)
    pictures = []
    pixels = 0
    same = 0
    error = 0.0
    for masked_image in images:
        image = Image.open(io.BytesIO(masked_image.data()))
        segments = masked_image.segments()
        masks = np.stack([mask for _, mask in segments])
        labels = [masked.classes[label] for label, _ in segments]
        proposed = client.segment(image, masked.classes, proposals=masks, threshold=0.0)
        dense = client.segment(image, labels, short_side=SHORT_SIDE)
        scores = _softmax(
            reference.scale * reference.images([crop(image, mask) for mask in masks]) @ classes.T
        )
        expected = np.full(masks.shape[1:], len(masked.classes))
        sure = np.zeros(masks.shape[1:])
        for mask, row in zip(masks, scores, strict=True):
            expected[mask] = row.argmax()
            sure[mask] = row.max()
        for label in np.unique(expected[masks.any(axis=0)]):
            error = max(error, abs(float(sure[expected == label].mean()) - proposed.scores[label]))
        here = segment(image, classes[[label for label, _ in segments]], SegmentOptions(SHORT_SIDE))
        same += int((proposed.mask == expected).sum() + (dense.mask == here.mask).sum())
        pixels += 2 * expected.size
        names = [split_label(label)[0] for label in labels]
        pictures.append((proposed, dense, dict(zip(names, masks, strict=True))))
    _segmented(pictures[:5], len(classes), path)
    return _agreed(
        f"{100 * same / pixels:.2f} % of {pixels:,} pixels equal", same > 0.999 * pixels, error
    )


def _agreed(what: str, fine: bool, error: float) -> str:
    if not fine or error > CLOSE:
        raise RAdapterError(
            f"served answers differ from open_clip's: {what}, scores within {error:.1e}"
        )
    return f"served and open_clip's own pipeline: {what}, scores within {error:.1e}"


def _open(files: Sequence[Path]) -> list[Image.Image]:
    return [Image.open(file) for file in files]


def _softmax(logits: Floats) -> Floats:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


def _gallery(files: Sequence[Path], labels: Sequence[str], path: Path) -> None:
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    for axes, file, label in zip(figure.subplots(3, 6).flat, files, labels, strict=True):
        axes.imshow(np.asarray(Image.open(file).convert("RGB")))
        right = label == file.parent.name
        title = label if right else f"{label}\n(is {file.parent.name})"
        axes.set_title(title, fontsize=8, color="green" if right else "red")
        axes.axis("off")
    figure.savefig(path)


def _contact_sheet(
    captions: Sequence[tuple[str, str]], found: Sequence[Sequence[Hit]], path: Path
) -> None:
    """A row a caption: the best scenes, the one that it belongs to framed, in whatever style it is
    drawn.
    """
    figure = Figure(figsize=(9, 1.85 * len(captions)), dpi=80, layout="constrained")
    rows = figure.subfigures(len(captions), 1, squeeze=False)
    for row, (caption, own), hits in zip(rows[:, 0], captions, found, strict=True):
        row.suptitle(caption, fontsize=9, x=0.01, ha="left")
        for axes, hit in zip(row.subplots(1, len(hits)), hits, strict=True):
            axes.imshow(np.asarray(Image.open(io.BytesIO(hit.thumbnail or b""))))
            axes.set_xlabel(f"{hit.score:.2f}", fontsize=7)
            axes.set(xticks=[], yticks=[])
            right = Path(hit.id).name == Path(own).name
            for spine in axes.spines.values():
                spine.set(color="green" if right else "lightgrey", linewidth=3 if right else 1)
    figure.savefig(path)


def _segmented(
    pictures: Sequence[tuple[Segmentation, Segmentation, dict[str, Any]]], count: int, path: Path
) -> None:
    """Scenes, and both answers with what each drawing is mostly taken for: green where right."""
    figure = Figure(figsize=(9, 5.6), dpi=100, layout="constrained")
    panels = figure.subplots(3, len(pictures))
    for column, (proposed, dense, segments) in zip(panels.T, pictures, strict=True):
        column[0].imshow(np.asarray(proposed.image))
        for axes, answer in zip(column[1:], (proposed, dense), strict=True):
            axes.imshow(np.asarray(answer.overlay(legend=False)))
            for name, mask in segments.items():
                most = answer.labels[np.bincount(answer.mask[mask]).argmax()]
                y, x = (place.mean() for place in np.nonzero(mask))
                color = "green" if most == name else "red"
                box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0}
                axes.text(x, y, most, fontsize=6, color=color, ha="center", bbox=box)
    for axes in panels.flat:
        axes.axis("off")
    titles = (
        "the scenes",
        f"their masks as proposals, {count} labels",
        "dense, the labels of the scene",
    )
    for axes, title in zip(panels[:, 0], titles, strict=True):
        axes.set_title(title, fontsize=8, loc="left")
    figure.savefig(path)
