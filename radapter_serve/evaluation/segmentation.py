"""Data sets of images whose pixels have classes: mIoU over a whole set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.labels import indistinguishable
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.data.masks import IGNORE, MaskedImage
from radapter_serve.data.proposals import ProposalFiles
from radapter_serve.encoders.loaded import ServerEncoder
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import (
    MOST_CONFUSED,
    Answers,
    EvaluationSet,
    as_seen,
    by_class,
    digest,
    first_names,
)
from radapter_serve.evaluation.metrics import (
    class_ious,
    confusion,
    pixel_sums,
    segmentation_intervals,
    segmentation_metrics,
    shares,
)
from radapter_serve.evaluation.models import Candidate, SegmentQuery
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.tasks.dense import SegmentOptions
from radapter_serve.tasks.segment import BINARY


@dataclass(frozen=True)
class MaskedItem:
    """An image file and the truth about its pixels."""

    number: int  # of the image in its set
    data: bytes
    truth: NDArray[np.int32]  # class of each pixel, or IGNORE, [H, W]
    # Where the model gets masks: those of a proposal network, or of the true segments, 0 to 255,
    # [N, H, W]; and the network's own probabilities of the labels, [N, C], where it has some.
    masks: NDArray[np.uint8] | None = None
    scores: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SegmentationSet(EvaluationSet):
    """Images with masks."""

    images: Sequence[MaskedImage]
    classes: list[str]  # in the order of the numbers in the masks, synonyms after commas
    templates: list[str] | None  # of prompts; None takes the model's own
    proposals: ProposalFiles | None = None  # of a network, in place of the true segments

    task = "zeroshot_segmentation"
    most = 4  # images and their masks in memory at once

    def __post_init__(self) -> None:
        names = first_names(self.classes)
        if self.entry.background not in (None, *names):
            raise RAdapterError(
                f"data set {self.entry.name!r}: background is {self.entry.background!r}, not one of"
                f" the classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )

    @property
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.classes, [image.name for image in self.images]

    def parts(self, image: MaskedImage) -> Iterator[bytes | NDArray[Any]]:
        yield image.data()
        yield image.mask()
        if self.proposals is not None:
            yield self.proposals.raw(image.name)
        elif self.entry.dense == PROPOSALS:
            for label, mask in image.segments():
                yield str(label).encode()
                yield mask

    @cached_property
    def background(self) -> int | None:
        """Number of the background class, which has no prompt."""
        if self.entry.background is None:
            return None
        return first_names(self.classes).index(self.entry.background)

    def query(self, model: Candidate) -> SegmentQuery:
        """How the set's images are segmented; sizes are written out for the row."""
        entry = self.entry
        dense = model.way(entry.dense)
        if dense == PROPOSALS:
            options = SegmentOptions(threshold=entry.threshold)
            if entry.proposal_weight is not None:
                options = replace(options, proposal_weight=entry.proposal_weight)
        else:
            options = SegmentOptions(entry.short_side, entry.stride, entry.refine, entry.threshold)
            short_side, stride = options.sizes(model.loaded.preprocess.size[0])
            options = replace(options, short_side=short_side, stride=stride)
        labels = [line for number, line in enumerate(self.classes) if number != self.background]
        templates = list(self.templates or model.loaded.release.templates)
        return SegmentQuery(labels, templates, dense, options)

    def fields(self, model: Candidate) -> dict[str, Any]:
        query = self.query(model)
        options = query.options
        crop = None
        if query.dense == PROPOSALS:
            crop = MaskCrop.from_dict(model.loaded.release.crop)
        scored = self.proposals is not None and self.proposals.scored
        return {
            "classes": len(self.classes),
            "classes_digest": digest(self.classes),
            "dense": query.dense,
            "size": model.loaded.preprocess.size[0],
            "short_side": options.short_side,
            "stride": options.stride,
            "refine": options.refine,
            "threshold": options.threshold,
            "background": self.entry.background,
            "crop": crop,
            "proposals": self.entry.proposals,
            "proposal_weight": options.proposal_weight if scored else None,
            "templates": tuple(query.templates),
        }

    def prepare(self, model: Candidate, number: int) -> MaskedItem:
        image = self.images[number]
        turns = model.loaded.preprocess.exif_orientation
        data = as_seen(image.data(), self.entry.exif_orientation, turns)
        truth = image.mask()
        if self.proposals is not None:
            masks, scores = self.proposals.read(image.name, (len(truth), truth.shape[1]))
            used = masks.max(axis=(1, 2), initial=0) > BINARY  # the others have no crop
            return MaskedItem(
                number, data, truth, masks[used], None if scores is None else scores[used]
            )
        if self.entry.dense != PROPOSALS:
            return MaskedItem(number, data, truth)
        segments = [
            mask for label, mask in image.segments() if label != self.background and mask.any()
        ]
        return MaskedItem(number, data, truth, np.array(segments, np.uint8) * np.uint8(255))

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        query = self.query(model)
        # The class of each index of an answer. Without a background class, an answer of no label is
        # wrong everywhere.
        count = len(self.classes)
        class_of = [number for number in range(count) if number != self.background]
        if query.dense == PROPOSALS or query.options.threshold is not None:
            class_of.append(count if self.background is None else self.background)
        classes = np.array(class_of, np.int64)

        total = np.zeros((count, count + 1), np.int64)
        sums = []  # of each image, from which the intervals are drawn
        for item in items:
            if item.masks is not None and not len(item.masks):
                labels = np.full(item.truth.shape, len(classes) - 1, np.int64)
            else:
                try:
                    mask = model.segment(item.data, query, item.masks, item.scores)
                except RAdapterError as error:
                    raise RAdapterError(f"{self.images[item.number].name}: {error}") from error
                labels = mask.astype(np.int64)
            known = item.truth != IGNORE
            counts = confusion(item.truth[known], classes[labels[known]], count)
            total += counts
            sums.append(np.stack(pixel_sums(counts)))
        return {"total": total[None], "sums": np.stack(sums)}

    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        total = answers["total"].sum(axis=0)
        right, true, answered = pixel_sums(total)
        alike: list[tuple[str, str]] = []
        if not isinstance(model.loaded.encoder, ServerEncoder):  # which embeds labels itself
            query = self.query(model)
            embeds = model.embed_classes(query.labels, query.templates)
            alike = indistinguishable(first_names(query.labels), embeds)
        return {
            "metrics": segmentation_metrics(total),
            "intervals": segmentation_intervals(answers["sums"].swapaxes(0, 1)),
            "per_class": by_class(
                self.classes,
                true,
                recall=shares(right, true),
                iou=class_ious(right, true, answered),
            ),
            "confusion": total.tolist() if len(self.classes) <= MOST_CONFUSED else None,
            "indistinguishable": alike or None,
        }
