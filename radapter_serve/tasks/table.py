"""The wire form of the tasks: the tensors of each, its requests from them, and its answers as them.

Whatever way a request comes, by KServe's JSON or binary form, by gRPC or in Triton's processes, its
tensors become a typed request here. The configs of Triton's models, the metadata of the HTTP API
and the tables of docs/http-api.md follow from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Cancelled, invalid
from radapter_serve.contract.labels import check_prompts
from radapter_serve.contract.names import known_as
from radapter_serve.contract.preprocess import read_headers
from radapter_serve.encoders.labels import DEFAULT_WEIGHT, Examples
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import Steps
from radapter_serve.release.release import TASKS as NAMES
from radapter_serve.release.tensors import DATATYPES, Tensor
from radapter_serve.tasks.classify import ClassifyRequest, Ranking, classify
from radapter_serve.tasks.embed import (
    EmbedImagesRequest,
    EmbedTextsRequest,
    embed_images,
    embed_texts,
)
from radapter_serve.tasks.labels import Labels
from radapter_serve.tasks.segment import LabelledMask, SegmentRequest, segment

if TYPE_CHECKING:
    from radapter_serve.tasks.retrieve import Retrieved, RetrieveRequest

R = TypeVar("R")
A = TypeVar("A")
Tensors = Mapping[str, NDArray[Any]]
Form = tuple[str, Sequence[int]]  # KServe's datatype and the shape of an input
Wants = Callable[[str], bool]  # whether a caller asks for an output

MAX_ENCODED = 256  # examples of a request, for each run of rows with the same options


# A task of one release: the steps to the answer of one request.
Run = Callable[[R, Cancelled | None], Steps[A]]


@dataclass(frozen=True)
class Task(Generic[R, A]):
    """One of the tasks.

    Attributes:
        inputs: by name.
        outputs: by name.
        batched: whether tensors have a batch dimension first, of up to the release's max_batch_size
            rows.
        read: typed requests to a release from the inputs of one request, several where its rows
            differ in more than their image or text; may raise a `TaskError`.
        make: the task of a release; of other releases that are served `retrieve` searches the
            indexes.
        write: output tensors of the answers to what `read` gave.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    batched: bool
    read: Callable[[LoadedRelease, Tensors, Wants], list[R]]
    make: Callable[[LoadedRelease, Callable[[], Sequence[LoadedRelease]]], Run[R, A]]
    write: Callable[[Sequence[A]], dict[str, NDArray[Any]]]

    def check(self, name: str, inputs: Mapping[str, Form], max_rows: int) -> None:
        """Refuse inputs that do not have the names, types and shapes of the task's.

        Args:
            name: of the task.
            inputs: form of each input of a request; `forms` has those of arrays.
            max_rows: of a request, where the task has rows.

        Raises:
            TaskError: of the first that is wrong.
        """
        batch = [-1] if self.batched else []
        rows: set[int] = set()
        for key, (datatype, full_shape) in inputs.items():
            tensor = self.inputs.get(key)
            if tensor is None:
                raise invalid(f"{name} has no input {key!a:.80}; it has {', '.join(self.inputs)}")
            if datatype != tensor.datatype:
                raise invalid(f"{key} is {datatype!a:.80}; {tensor.datatype} is taken")
            shape = full_shape[1:] if self.batched else full_shape
            fits = len(shape) == len(tensor.dims) and all(
                dim in (-1, size) for dim, size in zip(tensor.dims, shape, strict=True)
            )
            if not fits or 0 in full_shape or len(full_shape) < len(batch):
                raise invalid(
                    f"{key} has shape {list(full_shape)}; {[*batch, *tensor.dims]} is taken, where"
                    " -1 is any number from 1"
                )
            rows.update(full_shape[:1])
        for key, tensor in self.inputs.items():
            if not tensor.optional and key not in inputs:
                raise invalid(f"the input {key} is missing")
        if self.batched and len(rows) > 1:
            raise invalid(f"all inputs of a request have as many rows; these have {sorted(rows)}")
        if self.batched and max(rows, default=1) > max_rows:
            raise invalid(f"{max(rows)} rows in a request; at most {max_rows} are taken")


def forms(inputs: Tensors) -> dict[str, Form]:
    """The form of each array, as `Task.check` takes it."""
    return {
        name: (DATATYPES.get(array.dtype, str(array.dtype)), array.shape)
        for name, array in inputs.items()
    }


def _tensors(*tensors: Tensor) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in tensors}


def _option(name: str, datatype: str, *dims: int) -> Tensor:
    return Tensor(name, datatype, dims or (1,), optional=True)


def _text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"a text is not UTF-8 ({error})") from None


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_text(value) for value in np.ravel(values))


def _first(values: NDArray[Any]) -> Any:
    """The one value of an option: a text, a number or a truth value."""
    value = values.ravel()[0]
    return value.item() if isinstance(value, np.generic) else _text(value)


def _runs(inputs: Tensors, varied: str) -> list[tuple[slice, Tensors]]:
    """The rows of a request in runs that have all inputs in common but one.

    Args:
        inputs: with the batch first.
        varied: the input in which the rows of a run differ.

    Returns:
        The rows of each run, and its inputs without the batch.
    """
    options = {name: array for name, array in inputs.items() if name != varied}
    count = len(inputs[varied])
    starts = [0]
    for row in range(1, count):
        first = starts[-1]
        if any(not np.array_equal(array[row], array[first]) for array in options.values()):
            starts.append(row)
    ends = [*starts[1:], count]
    return [
        (slice(start, end), {name: array[start] for name, array in options.items()})
        for start, end in zip(starts, ends, strict=True)
    ]


def _labels(options: Tensors) -> Labels:
    names = options.get("labels")
    label_set = options.get("label_set")
    templates = options.get("templates")
    return Labels(
        None if names is None else _texts(names),
        None if label_set is None else _first(label_set),
        None if templates is None else _texts(templates),
    )


def _values(options: Tensors, *names: str) -> dict[str, Any]:
    """The values of those options that a request brings."""
    return {name: _first(options[name]) for name in names if name in options}


# embed_image and embed_text


def _read_images(loaded: LoadedRelease, inputs: Tensors, wants: Wants) -> list[EmbedImagesRequest]:
    files = read_headers(inputs["image"].ravel().tolist())
    return [
        EmbedImagesRequest(files[rows], **_values(options, "alpha"))
        for rows, options in _runs(inputs, "image")
    ]


def _read_texts(loaded: LoadedRelease, inputs: Tensors, wants: Wants) -> list[EmbedTextsRequest]:
    texts = _texts(inputs["text"])
    return [
        EmbedTextsRequest(texts[rows], **_values(options, "alpha"))
        for rows, options in _runs(inputs, "text")
    ]


# classify


def _read_classify(loaded: LoadedRelease, inputs: Tensors, wants: Wants) -> list[ClassifyRequest]:
    files = read_headers(inputs["image"].ravel().tolist())
    shown = inputs.get("examples")
    if shown is not None:
        # A row whose examples are all empty has those of the row before.
        shown = shown.copy()
        for row in range(1, len(shown)):
            if not any(shown[row]):
                shown[row] = shown[row - 1]
        inputs = {**inputs, "examples": shown}
    requests: list[ClassifyRequest] = []
    for rows, options in _runs(inputs, "image"):
        requests.append(
            ClassifyRequest(
                files[rows],
                _labels(options),
                examples=_examples(options),
                **_values(options, "top_k", "alpha", "multi_label", "threshold"),
                **_values(options, "calibrated", "unknown"),
            )
        )
    # What a request may ask for at most, all its rows together.
    own = loaded.release.templates
    lists = {request.labels for request in requests if request.labels.names is not None}
    check_prompts([(one.names or (), one.templates or own) for one in lists])
    encoded = sum(len(set(one.examples.images)) for one in requests if one.examples is not None)
    for name, alpha in {(one.labels.label_set, one.alpha) for one in requests}:
        known = None if name is None else known_as(name, loaded.label_sets)
        examples = None if known is None else loaded.label_sets[known].examples
        if examples is not None and alpha not in (None, loaded.exported_alpha):
            encoded += len(examples.images)
    if encoded > MAX_ENCODED:
        raise invalid(
            f"{encoded} examples to encode for the labels of all rows that differ in their options;"
            f" at most {MAX_ENCODED} are allowed in a request, so send fewer examples, or rows with"
            " the same options"
        )
    return requests


def _examples(options: Tensors) -> Examples | None:
    images = options.get("examples")
    places = options.get("example_labels")
    weights = options.get("example_weight")
    if images is None and places is None and weights is None:
        return None
    if images is None or places is None:
        raise invalid("examples and example_labels belong together, and example_weight to them")
    own = tuple(one.encode() if isinstance(one, str) else bytes(one) for one in images)
    return Examples(
        own,
        tuple(places.tolist()),
        (DEFAULT_WEIGHT,) if weights is None else tuple(weights.tolist()),
    )


def _write_rankings(answers: Sequence[list[Ranking]]) -> dict[str, NDArray[Any]]:
    """As wide as the image with most labels, and at least 1: others have empty labels of score 0
    at their end.
    """
    rankings = [ranking for answer in answers for ranking in answer]
    width = max(1, *(len(ranking.labels) for ranking in rankings))
    labels = np.full((len(rankings), width), b"", object)
    scores = np.zeros((len(rankings), width), np.float32)
    for row, ranking in enumerate(rankings):
        labels[row, : len(ranking.labels)] = [label.encode() for label in ranking.labels]
        scores[row, : len(ranking.labels)] = ranking.scores
    return {"label": labels, "score": scores}


# segment


def _read_segment(loaded: LoadedRelease, inputs: Tensors, wants: Wants) -> list[SegmentRequest]:
    names = "alpha", "threshold", "short_side", "stride", "refine", "proposal_weight"
    return [
        SegmentRequest(
            inputs["image"][0],
            _labels(inputs),
            proposals=inputs.get("proposals"),
            proposal_scores=inputs.get("proposal_scores"),
            **_values(inputs, *names),
        )
    ]


def _write_mask(answers: Sequence[LabelledMask]) -> dict[str, NDArray[Any]]:
    [answer] = answers
    return {"mask": answer.mask, "label": _bytes(answer.labels), "score": answer.scores}


# retrieve


def _read_retrieve(loaded: LoadedRelease, inputs: Tensors, wants: Wants) -> list[RetrieveRequest]:
    # Here and below: the index's libraries are for the processes of this task alone.
    from radapter_serve.tasks.retrieve import Query, RetrieveRequest

    weights = inputs.get("weight")
    query = Query(
        _texts(inputs.get("text", ())),
        read_headers(np.ravel(inputs.get("image", ())).tolist()),
        _texts(inputs.get("id", ())),
        None if weights is None else weights.tolist(),
    )
    names = "top_k", "where", "offset", "index_version", "min_score", "calibrated"
    values = _values(inputs, "index", *names)
    return [RetrieveRequest(query=query, thumbnails=wants("thumbnail"), **values)]


def _make_retrieve(
    loaded: LoadedRelease, others: Callable[[], Sequence[LoadedRelease]]
) -> Run[RetrieveRequest, Retrieved]:
    from radapter_serve.tasks.retrieve import Indexes, retrieve

    indexes = Indexes(loaded, others)
    return lambda request, cancelled: retrieve(indexes, request, cancelled)


def _write_hits(answers: Sequence[Retrieved]) -> dict[str, NDArray[Any]]:
    [answer] = answers
    outputs: dict[str, NDArray[Any]] = {
        "id": _bytes(hit.id for hit in answer.hits),
        "score": np.array([hit.score for hit in answer.hits], np.float32),
        "metadata": _bytes(hit.metadata for hit in answer.hits),
        "index_version": _bytes([answer.index_version]),
    }
    if answer.thumbnails:
        outputs["thumbnail"] = _bytes(hit.thumbnail for hit in answer.hits)
    return outputs


def _bytes(values: Any) -> NDArray[np.object_]:
    items = [value.encode() if isinstance(value, str) else value for value in values]
    array = np.empty(len(items), object)
    array[:] = items
    return array


def _plain(task: Callable[..., Steps[A]]) -> Callable[..., Run[Any, A]]:
    """The `make` of a task that needs the release alone."""

    def make(loaded: LoadedRelease, others: Any) -> Run[Any, A]:
        return lambda request, cancelled: task(loaded, request, cancelled)

    return make


_IMAGE = Tensor("image", "BYTES")
_ALPHA = _option("alpha", "FP32")
_LABELS = (
    _option("labels", "BYTES", -1),
    _option("label_set", "BYTES"),
    _option("templates", "BYTES", -1),
)

TASKS: Mapping[str, Task[Any, Any]] = {
    "embed_image": Task(
        _tensors(_IMAGE, _ALPHA),
        _tensors(Tensor("image_embeds", "FP32", (-1,))),
        True,
        _read_images,
        _plain(embed_images),
        lambda answers: {"image_embeds": np.concatenate(answers)},
    ),
    "embed_text": Task(
        _tensors(Tensor("text", "BYTES"), _ALPHA),
        _tensors(Tensor("text_embeds", "FP32", (-1,))),
        True,
        _read_texts,
        _plain(embed_texts),
        lambda answers: {"text_embeds": np.concatenate(answers)},
    ),
    "retrieve": Task(
        _tensors(
            _option("text", "BYTES", -1),
            _option("image", "BYTES", -1),
            _option("id", "BYTES", -1),
            _option("weight", "FP32", -1),
            Tensor("index", "BYTES"),
            _option("top_k", "INT32"),
            _option("where", "BYTES"),
            _option("offset", "INT32"),
            _option("index_version", "BYTES"),
            _option("min_score", "FP32"),
            _option("calibrated", "BOOL"),
        ),
        _tensors(
            Tensor("id", "BYTES", (-1,)),
            Tensor("score", "FP32", (-1,)),
            Tensor("metadata", "BYTES", (-1,)),
            Tensor("thumbnail", "BYTES", (-1,)),
            Tensor("index_version", "BYTES"),
        ),
        False,
        _read_retrieve,
        _make_retrieve,
        _write_hits,
    ),
    "segment": Task(
        _tensors(
            _IMAGE,
            *_LABELS,
            _option("threshold", "FP32"),
            _option("short_side", "INT32"),
            _option("stride", "INT32"),
            _option("refine", "INT32"),
            _option("proposals", "UINT8", -1, -1, -1),
            _option("proposal_scores", "FP32", -1, -1),
            _option("proposal_weight", "FP32"),
            _ALPHA,
        ),
        _tensors(
            Tensor("mask", "UINT16", (-1, -1)),
            Tensor("label", "BYTES", (-1,)),
            Tensor("score", "FP32", (-1,)),
        ),
        False,
        _read_segment,
        _plain(segment),
        _write_mask,
    ),
    "classify": Task(
        _tensors(
            _IMAGE,
            *_LABELS,
            _option("top_k", "INT32"),
            _ALPHA,
            _option("multi_label", "BOOL"),
            _option("threshold", "FP32"),
            _option("calibrated", "BOOL"),
            _option("unknown", "FP32"),
            _option("examples", "BYTES", -1),
            _option("example_labels", "INT32", -1),
            _option("example_weight", "FP32", -1),
        ),
        _tensors(Tensor("label", "BYTES", (-1,)), Tensor("score", "FP32", (-1,))),
        True,
        _read_classify,
        _plain(classify),
        _write_rankings,
    ),
}
assert tuple(TASKS) == NAMES


def outputs_of(task: str, embed_dim: int) -> dict[str, Tensor]:
    """The outputs of a task of a release, whose embeddings have a width."""
    return {
        name: replace(tensor, dims=(embed_dim,)) if name.endswith("_embeds") else tensor
        for name, tensor in TASKS[task].outputs.items()
    }
