"""Data sets of images whose pixels have classes: mIoU over a whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.probabilities import indistinguishable
from radapter_serve.data.masks import IGNORE, MaskedImage
from radapter_serve.data.proposals import ProposalFiles
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import PROPOSALS, Embedder, SegmentImage, SegmentQuery
from radapter_serve.evaluation.evaluation_set import (
    EvaluationSet,
    Known,
    as_seen,
    by_class,
    confused,
    contents,
    digest,
    first_names,
)
from radapter_serve.evaluation.intervals import segmentation_intervals
from radapter_serve.evaluation.metrics import (
    class_ious,
    confusion,
    pixel_sums,
    segmentation_metrics,
    shares,
)
from radapter_serve.evaluation.row import Measured, SetFacts, Setup
from radapter_serve.tasks.proposals import BINARY
from radapter_serve.tasks.segment_options import SegmentOptions


@dataclass(frozen=True)
class MaskedItem:
    """An image and the truth about its pixels.

    Attributes:
        number: of the image in its set.
        data: the bytes of its file.
        truth: class of each pixel, or IGNORE, int32 [H, W].
        masks: where masks are given to the model: those of a proposal network, or of the true
            segments, uint8 [N, H, W], 0 to 255.
        scores: the network's own probabilities of the labels, float32 [N, C], where it has some.
    """

    number: int
    data: bytes
    truth: NDArray[np.int32]
    masks: NDArray[np.uint8] | None = None
    scores: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SegmentationSet(EvaluationSet):
    """Images with masks.

    Attributes:
        classes: synonyms after commas; the numbers in the masks are places in this list.
        templates: prompt templates; None takes the model's own.
        proposals: of a network; None takes the true segments where masks are given to the model.
    """

    images: Sequence[MaskedImage]
    classes: list[str]
    templates: list[str] | None
    proposals: ProposalFiles | None = None

    task = "zeroshot_segmentation"
    most = 4  # images and their masks in memory at once

    def __post_init__(self) -> None:
        names = first_names(self.classes)
        if self.entry.background not in (None, *names):
            raise RAdapterError(
                f"data set {self.entry.name!r}: background is {self.entry.background!r}, not one of"
                f" the classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )

    @cached_property
    def facts(self) -> SetFacts:
        names = [image.name for image in self.images]
        return SetFacts(
            n=len(self.images),
            classes=len(self.classes),
            classes_digest=digest(self.classes),
            set_digest=digest(self.classes, names, self.contents),
        )

    @cached_property
    def contents(self) -> list[str]:
        """Digests of the images' files with their masks."""
        return contents(self.entry.name, [self._reader(image) for image in self.images])

    def _reader(self, image: MaskedImage) -> Callable[[], Iterator[bytes | NDArray[Any]]]:
        def read() -> Iterator[bytes | NDArray[Any]]:
            yield image.data()
            yield image.mask()
            if self.proposals is not None:
                yield self.proposals.raw(image.name)
            elif self.entry.dense == PROPOSALS:
                yield from (
                    part for label, mask in image.segments() for part in (str(label).encode(), mask)
                )

        return read

    @cached_property
    def background(self) -> int | None:
        """Number of the class that stands for everything else; it has no prompt."""
        return (
            None
            if self.entry.background is None
            else first_names(self.classes).index(self.entry.background)
        )

    def query(self, embedder: Embedder) -> SegmentQuery:
        """What the set's images are segmented by; sizes are written out, so that a row tells them.

        Raises:
            NoSuchWay: the models do not have the way that the suite asks for.
        """
        entry = self.entry
        dense = embedder.way(self.entry.dense)
        labels = [line for number, line in enumerate(self.classes) if number != self.background]
        if dense == PROPOSALS:
            options = SegmentOptions(threshold=entry.threshold)
            if entry.proposal_weight is not None:
                options = replace(options, proposal_weight=entry.proposal_weight)
        else:
            options = SegmentOptions(entry.short_side, entry.stride, entry.refine, entry.threshold)
            short_side, stride = options.sizes(embedder.size)
            options = replace(options, short_side=short_side, stride=stride)
        return SegmentQuery(labels, list(self.templates or embedder.templates), dense, options)

    def setup(self, embedder: Embedder) -> Setup:
        query = self.query(embedder)
        options = query.options
        scored = self.proposals is not None and self.proposals.scored
        return Setup(
            dense=query.dense,
            size=embedder.size,
            short_side=options.short_side,
            stride=options.stride,
            refine=options.refine,
            threshold=options.threshold,
            background=self.entry.background,
            crop=embedder.crop if query.dense == PROPOSALS else None,
            proposals=self.entry.proposals,
            proposal_weight=options.proposal_weight if scored else None,
            templates=tuple(query.templates),
        )

    def prepare(self, embedder: Embedder, number: int) -> MaskedItem:
        image = self.images[number]
        data = as_seen(image.data(), self.entry, embedder)
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

    def scorer(
        self, embedder: Embedder, known: Known, *, ask_nouns: bool = False
    ) -> SegmentationScorer:
        query = self.query(embedder)
        open_world = query.dense == PROPOSALS or query.options.threshold is not None
        segment = embedder.segmenter(query, known)
        names = first_names(query.labels)
        embeds = [
            known[key] for line in query.labels if (key := (tuple(query.templates), line)) in known
        ]
        alike = indistinguishable(names, np.stack(embeds)) if len(embeds) == len(names) else []
        return SegmentationScorer(self, segment, open_world, alike)


class SegmentationScorer:
    """Counts pixels of one model over a whole set.

    Args:
        data: the set.
        segment: of the model.
        open_world: whether a pixel may get no label.
        alike: pairs of labels that the model can't tell apart.
    """

    def __init__(
        self,
        data: SegmentationSet,
        segment: SegmentImage,
        open_world: bool,
        alike: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._data = data
        self._segment = segment
        self._alike = alike
        self.nearest: list[NDArray[np.int64]] = []  # nouns are asked of whole images alone
        count = len(data.classes)
        background = data.background
        # What an index of the answer means; the answer "none" is wrong everywhere where no class
        # stands for it.
        self._class_of = np.array(
            [number for number in range(count) if number != background], np.int64
        )
        if open_world:
            self._class_of = np.append(self._class_of, count if background is None else background)
        self._confusion = np.zeros((count, count + 1), np.int64)
        self._sums: list[
            NDArray[np.int64]
        ] = []  # of each image, from which the intervals are drawn

    def add(self, items: Sequence[MaskedItem]) -> None:
        for item in items:
            if item.masks is not None and not len(item.masks):
                found = np.full(item.truth.shape, len(self._class_of) - 1, np.int64)
            else:
                try:
                    found = self._segment(item.data, item.masks, item.scores).astype(np.int64)
                except RAdapterError as error:
                    raise RAdapterError(
                        f"{self._data.images[item.number].name}: {error}"
                    ) from error
            known = item.truth != IGNORE
            counts = confusion(
                item.truth[known], self._class_of[found[known]], len(self._data.classes)
            )
            self._confusion += counts
            self._sums.append(np.stack(pixel_sums(counts)))

    def measured(self) -> Measured:
        right, true, found = pixel_sums(self._confusion)
        ious = class_ious(right, true, found)
        return Measured(
            metrics=segmentation_metrics(self._confusion),
            intervals=segmentation_intervals(np.stack(self._sums, 1)),
            per_class=by_class(self._data.classes, true, shares(right, true), ious),
            confusion=confused(self._confusion),
            indistinguishable=list(self._alike) or None,
        )
