"""References that a release is checked against: torch's embeddings by open_clip's own code, with
adapters attached and not folded, and torch's score on validation data in the task's own metric.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from radapter_export.settings import OWN
from radapter_serve.adapter import Metadata
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_patches, normalised
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.data.runs import OtherImages
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import ClassificationSet, EvaluationSet
from radapter_serve.evaluation.metrics import fit_confidence
from radapter_serve.evaluation.models import candidates_in_torch, from_release
from radapter_serve.evaluation.run import evaluate_set, open_set, own_validation
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.release.agreement import Samples
from radapter_serve.release.release import Accuracy, Confidence
from radapter_serve.release.repository import PATCH_ENCODER

BATCHES = (1, 2, 7)  # odd sizes reveal constants in a Reshape
MAX_IMAGES = 2000  # of validation data; each is 0.05 points
Array = npt.NDArray[np.float32]

_WORDS = [
    *("a", "photo", "of", "red", "bicycle,", "leaning"),
    *("against", "the", "old", "wall", "near", "1887"),
]


class Inputs:
    """Seeded inputs at each batch size: images, tokens as the server sends them, and the same texts
    by open_clip's tokenizer, of full length.
    """

    def __init__(self, base: Base, tokenizer: Tokenizer, size: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.images = [
            random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8) for batch in BATCHES
        ]
        self.tokens = []
        self.full_tokens = []
        for number, batch in enumerate(BATCHES):
            # The first batch is one short text; each later one has one text that is too long, each
            # time in another row.
            lengths = [int(n) for n in random.integers(1, 40, batch)]
            if number:
                lengths[number] = 200
            texts = [" ".join(random.choice(_WORDS, length)) for length in lengths]
            self.tokens.append(tokenizer(texts))
            self.full_tokens.append(base.tokenizer(texts))


@torch.inference_mode()
def samples_at(
    base: Base,
    set_alpha: Callable[[float], object],
    inputs: Inputs,
    alpha: float,
    dense: str | None = None,
    *,
    mixed: bool = False,
) -> dict[str, Samples]:
    """Compute torch's embeddings of each graph's inputs by open_clip's own towers, with adapters
    attached; `mixed`, for graphs whose α is an input, alternates several α.
    """
    values = itertools.cycle((alpha, 0.0, 1.0, 0.25) if mixed else (alpha,))
    alphas: list[npt.NDArray[Any]] = [
        np.array([[next(values)] for _ in range(batch)], np.float32 if mixed else np.float64)
        for batch in BATCHES
    ]
    model: Any = base.model

    # Embed all inputs at each α.
    embeds: dict[float, list[dict[str, Array]]] = {}
    for number in {float(value) for batch in alphas for value in batch.ravel()}:
        set_alpha(number)
        embeds[number] = []
        for image, tokens in zip(inputs.images, inputs.full_tokens, strict=True):
            pixels = normalised(image, base.preprocess, "cpu")
            # towers.encode_text crops the tokens, and the check is to show that this changes
            # nothing; so call the model.
            texts = nn.functional.normalize(model.encode_text(tokens).float(), dim=-1)
            batch = {"image_encoder": encode_image(model, pixels), "text_encoder": texts}
            if dense is not None:
                batch[PATCH_ENCODER] = encode_patches(model, pixels, dense)
            embeds[number].append({graph: rows.numpy() for graph, rows in batch.items()})

    # Select for each row the embedding at its α.
    samples = {}
    for graph in embeds[number][0]:
        references = []
        for place, batch_alphas in enumerate(alphas):
            rows = [
                embeds[float(value)][place][graph][row]
                for row, value in enumerate(batch_alphas.ravel())
            ]
            references.append(np.stack(rows))
        batches = inputs.tokens if graph == "text_encoder" else inputs.images
        samples[graph] = Samples(batches, references, alphas if mixed else ())
    return samples


def measure(
    data: EvaluationSet,
    max_drop: float,
    base: Base,
    loaded: LoadedRelease,
    say: Callable[[str], None],
) -> tuple[Accuracy, Confidence | str | None]:
    """Evaluate a release, and its base with adapters attached; refuse a loss above `max_drop`
    points. Also returns calibrated scores, or a warning that says why there are none.
    """
    entry = data.entry
    facts = loaded.release
    [release] = from_release(loaded)
    # Keep the base on its device: adapters in the activation form would not move with it.
    [attached] = candidates_in_torch(
        "adapter",
        base,
        {},
        [facts.alpha],
        templates=facts.templates,
        crop=facts.crop,
        device=str(next(base.model.parameters()).device),
    )
    percents = []
    for model in (attached, release):
        [(row, answers)] = evaluate_set([model], data, say=say, keep=["scores"])
        percents.append(round(100 * row.metrics[row.metric], 3))
    by_torch, by_release = percents
    drop = round(by_torch - by_release, 3)
    if not drop <= max_drop:  # also for NaN
        raise RAdapterError(
            f"the encoders lose {drop:.2f} points of {entry.metric} on the {len(data)} images of"
            f" {entry.data} ({by_torch:.2f} with torch, {by_release:.2f} with the release), and"
            f" {max_drop:g} are allowed; nothing was written. Export with --precision fp32, or"
            " allow more with --max-drop"
        )
    accuracy = Accuracy(entry.data, len(data), entry.metric, by_torch, by_release, drop)

    # Calibrate scores if the data has classes, as `classify` has.
    if not isinstance(data, ClassificationSet):
        return accuracy, None
    if data.several:
        return accuracy, (
            f"{entry.data} has several labels per image, with which scores are not calibrated: the"
            " release has no calibrated scores"
        )
    try:
        return accuracy, fit_confidence(
            answers["scores"], data.labels, facts.logit_scale, facts.logit_bias, entry.data
        )
    except RAdapterError as error:
        return accuracy, str(error)


def open_validation(
    metadata: Metadata, data: str | None, dense: str | None, precision: str
) -> EvaluationSet | None:
    """Open the data for the evaluation of releases; None if it is not wanted or not there."""
    has_own = metadata.source.val_data or metadata.source.val_fraction
    if data == "none" or (data is None and (precision == "fp32" or not has_own)):
        return None
    suite = own_validation(metadata, None if data == OWN else data)
    [entry] = suite.entries
    if metadata.task == "segmentation":
        entry = dataclasses.replace(entry, dense=dense or PROPOSALS)
    try:
        return open_set(suite, entry, limit=MAX_IMAGES)
    except OtherImages:
        raise
    except RAdapterError:
        if data is None:
            return None
        raise
