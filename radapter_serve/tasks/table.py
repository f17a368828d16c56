"""The five tasks: what each reads from a request, what it does, and what it answers.

Whoever serves the tasks, Triton's processes or an engine, goes through this table, so that the same
request has the same answer everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Cancelled, TaskError, invalid
from radapter_serve.contract.preprocess import ImageFile, read_header, read_headers
from radapter_serve.release.release import TASKS as NAMES
from radapter_serve.tasks.classify import Classes, Classify, ClassifyRequest
from radapter_serve.tasks.outcome import Outcome, isolated, run_good
from radapter_serve.tasks.probes import Tensors
from radapter_serve.tasks.query import Query
from radapter_serve.tasks.segment import LabelledMask, Segment, SegmentRequest
from radapter_serve.tasks.version import Version

if TYPE_CHECKING:
    from radapter_serve.tasks.retrieve import Retrieved, RetrieveRequest

R = TypeVar("R")
A = TypeVar("A")

Run = Callable[[Sequence[R]], Sequence[Outcome[A]]]

_SEGMENT_OPTIONS = ("threshold", "short_side", "stride", "refine", "proposal_weight")


class Inputs(Protocol):
    """What a request brings."""

    def get(self, name: str) -> Any:
        """An input as an array, with the batch first where the task has one; None where it was left
        out.
        """

    def wants(self, output: str) -> bool:
        """Whether the caller asks for an output."""

    @property
    def cancelled(self) -> Cancelled:
        """What tells whether the caller has given up; raises a `TaskError` where it took too
        long.
        """


@dataclass(frozen=True)
class Task(Generic[R, A]):
    """One of the tasks.

    Args:
        read: a request from its inputs; may raise a `TaskError`.
        make: the task of a release.
        outputs: the output tensors of an answer, by name.
        images: the encoded images of a request that are decoded with it.
    """

    read: Callable[[Inputs], R]
    make: Callable[[Version], Run[R, A]]
    outputs: Callable[[A], dict[str, NDArray[Any]]]
    images: Callable[[R], Iterable[bytes | ImageFile]] = lambda request: ()

    def answer(self, run: Run[R, A], requests: Sequence[Inputs]) -> list[Outcome[Tensors]]:
        """The outputs for each of some requests, or its error. Whatever is wrong with a request,
        its neighbours are answered as without it.

        Args:
            run: what `make` gave.
            requests: what they bring.
        """
        read = [Outcome.of(partial(self.read, request)) for request in requests]
        return run_good(read, partial(self.run, run))

    def run(self, run: Run[R, A], requests: Sequence[R]) -> list[Outcome[Tensors]]:
        """As `answer`, of requests that have been read."""
        return [one.then(self.outputs) for one in isolated(run, requests)]

    def is_large(self, request: R) -> bool:
        """Whether a request has a large image, which waits until others are decoded."""
        for image in self.images(request):
            with contextlib.suppress(TaskError):  # the task says what is wrong with it
                if read_header(image).is_large:
                    return True
        return False


def need(inputs: Inputs, name: str) -> Any:
    """An input that the task can't do without.

    Raises:
        TaskError: it was left out.
    """
    array = inputs.get(name)
    if array is None:
        raise invalid(f"the input {name} is missing")
    return array


def _flat(inputs: Inputs, name: str) -> Any:
    array = inputs.get(name)
    return None if array is None else array.ravel()


def _list(inputs: Inputs, name: str) -> list[Any]:
    array = inputs.get(name)
    return [] if array is None else array.ravel().tolist()


def _first(inputs: Inputs, name: str) -> Any:
    array = inputs.get(name)
    return None if array is None else array.ravel()[0]


def _read_texts(inputs: Inputs) -> tuple[Any, Any]:
    return need(inputs, "text").ravel(), inputs.get("alpha")


def _read_images(inputs: Inputs) -> tuple[list[ImageFile], Any, Cancelled]:
    return read_headers(need(inputs, "image").ravel()), inputs.get("alpha"), inputs.cancelled


def _embed_images(version: Version) -> Run[tuple[Any, Any, Any], NDArray[np.float32]]:
    return lambda requests: version.embed_images(*zip(*requests, strict=True))


def _embed_texts(version: Version) -> Run[tuple[Any, Any], NDArray[np.float32]]:
    return lambda requests: version.embed_texts(*zip(*requests, strict=True))


def _read_classify(inputs: Inputs) -> ClassifyRequest:
    return ClassifyRequest(
        images=read_headers(need(inputs, "image").ravel()),
        labels=inputs.get("labels"),
        label_set=_flat(inputs, "label_set"),
        templates=inputs.get("templates"),
        top_k=_flat(inputs, "top_k"),
        alpha=inputs.get("alpha"),
        multi_label=_flat(inputs, "multi_label"),
        threshold=_flat(inputs, "threshold"),
        calibrated=_flat(inputs, "calibrated"),
        unknown=_flat(inputs, "unknown"),
        examples=inputs.get("examples"),
        example_labels=inputs.get("example_labels"),
        example_weight=inputs.get("example_weight"),
        cancelled=inputs.cancelled,
    )


def _images_of(request: ClassifyRequest) -> set[Any]:
    shown = () if request.examples is None else np.ravel(np.array(request.examples, object))
    return {*request.images, *(image for image in shown if image)}


def _classify(version: Version) -> Run[ClassifyRequest, Classes]:
    return Classify(version.release, version.embed_images, version.embed_labels, version.label_sets)


def _read_segment(inputs: Inputs) -> SegmentRequest:
    given = {name: inputs.get(name) for name in _SEGMENT_OPTIONS}
    label_set = inputs.get("label_set")
    return SegmentRequest(
        image=read_header(need(inputs, "image")[0]),
        labels=inputs.get("labels"),
        label_set=None if label_set is None else label_set[0],
        templates=inputs.get("templates"),
        options={name: value[0].item() for name, value in given.items() if value is not None},
        proposals=inputs.get("proposals"),
        proposal_scores=inputs.get("proposal_scores"),
        alpha=inputs.get("alpha"),
        cancelled=inputs.cancelled,
    )


def _segment(version: Version) -> Run[SegmentRequest, LabelledMask]:
    patches = version.encode_patches if version.release.dense else None
    task = Segment(
        version.release, version.encode_images, patches, version.embed_labels, version.label_sets
    )
    return _each(task)


def _mask_outputs(found: LabelledMask) -> dict[str, NDArray[Any]]:
    return {"mask": found.mask, "label": np.array(found.labels, object), "score": found.scores}


def _read_retrieve(inputs: Inputs) -> RetrieveRequest:
    from radapter_serve.tasks.retrieve import RetrieveRequest  # see `_retrieve`

    return RetrieveRequest(
        need(inputs, "index").ravel()[0],
        Query(
            texts=_list(inputs, "text"),
            images=[file.data for file in read_headers(_list(inputs, "image"))],
            ids=_list(inputs, "id"),
            weights=_list(inputs, "weight") or None,
        ),
        top_k=_first(inputs, "top_k"),
        where=_first(inputs, "where"),
        thumbnails=inputs.wants("thumbnail"),
        offset=_first(inputs, "offset"),
        index_version=_first(inputs, "index_version"),
        min_score=_first(inputs, "min_score"),
        calibrated=bool(_first(inputs, "calibrated")),
        cancelled=inputs.cancelled,
    )


def _retrieve(version: Version) -> Run[RetrieveRequest, Retrieved]:
    # Here: the index's libraries are for the processes of this task alone.
    from radapter_serve.tasks.retrieve import Retrieve

    embedder = version.embedder()
    task = Retrieve(
        version.release,
        version.indexes,
        embedder.text,
        embedder.image,
        version.others,
        origin=version.origin,
    )
    return _each(task)


def _hits_outputs(found: Retrieved) -> dict[str, NDArray[Any]]:
    outputs = {
        "id": found.ids,
        "score": found.scores,
        "metadata": found.metadata,
        "index_version": np.array([found.index_version], object),
    }
    return outputs if found.thumbnails is None else {**outputs, "thumbnail": found.thumbnails}


def _each(task: Callable[[R], A]) -> Run[R, A]:
    """A task that takes one request at a time."""
    return lambda requests: [Outcome.of(partial(task, request)) for request in requests]


TASKS: Mapping[str, Task[Any, Any]] = {
    "embed_image": Task(
        _read_images,
        _embed_images,
        lambda embeds: {"image_embeds": embeds},
        lambda request: request[0],
    ),
    "embed_text": Task(_read_texts, _embed_texts, lambda embeds: {"text_embeds": embeds}),
    "retrieve": Task(_read_retrieve, _retrieve, _hits_outputs),
    "segment": Task(_read_segment, _segment, _mask_outputs, lambda request: [request.image]),
    "classify": Task(
        _read_classify,
        _classify,
        lambda found: {"label": found.labels, "score": found.scores},
        _images_of,
    ),
}
assert tuple(TASKS) == NAMES
