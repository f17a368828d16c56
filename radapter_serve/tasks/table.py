"""The wire form of the tasks: the tensors of each task, their conversion to typed requests, and of
answers to tensors.

Every request, in KServe's JSON or binary form, over gRPC or in Triton's processes, becomes a typed
request here. The configs of Triton's models, the metadata of the HTTP API and the tables of
docs/http-api.md follow from this table.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_client import Values
from radapter_client.tensors import DATATYPES
from radapter_serve.contract.embeddings import Point
from radapter_serve.contract.errors import Cancelled, invalid
from radapter_serve.contract.images import read_headers
from radapter_serve.contract.labels import check_prompts
from radapter_serve.encoders.labels import Examples, prompt_counts
from radapter_serve.encoders.loaded import Answered, LoadedRelease, TaskSteps
from radapter_serve.release.adapters import shortened
from radapter_serve.release.release import TASKS as NAMES
from radapter_serve.tasks.classify import ClassifyRequest, Ranking, classify
from radapter_serve.tasks.dense import SegmentOptions
from radapter_serve.tasks.embed import (
    OTHER_POINT,
    EmbedImagesRequest,
    EmbedTextsRequest,
    Labels,
    embed_images,
    embed_texts,
    look_up,
)
from radapter_serve.tasks.segment import LabelledMask, SegmentRequest, segment

if TYPE_CHECKING:
    from radapter_serve.tasks.retrieve import Retrieved, RetrieveRequest

R = TypeVar("R")
A = TypeVar("A")
Tensors = Mapping[str, NDArray[Any]]
Form = tuple[str, Sequence[int]]  # KServe's datatype and the shape of an input
Wants = Callable[[str], bool]  # whether a caller asks for an output

# Prompts that any request may encode for its label set, a batch; more take seconds
_FEW_PROMPTS = 256
# examples to encode for one request; consecutive rows with the same options count once
MAX_ENCODED = 256


# A task of one release: runs a request, with the steps to its answer.
Run = Callable[[R, Cancelled | None], TaskSteps[Answered[A]]]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model: KServe's datatype, and dims without the batch, -1 for any."""

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Task(Generic[R, A]):
    """A task: its tensors, and the conversion to typed requests and from answers."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    # True if tensors have a batch dimension first, of up to the release's max_batch_size rows.
    batched: bool
    # Makes a typed request from plain values by the names of the inputs, such as texts as `str`,
    # and from the wanted outputs; raises a `TaskError`.
    request: Callable[[dict[str, Any], Wants], R]
    # Makes the task of a release, given the other served releases and how many seconds it may wait:
    # `retrieve` searches indexes of all of them, which it opens.
    make: Callable[[LoadedRelease, Callable[[], Sequence[LoadedRelease]], float], Run[R, A]]
    # Makes the outputs from the answers to the requests of `read`: plain values, which become
    # tensors at a server's edge.
    write: Callable[[Sequence[A]], Values]

    def values(self, version: int, answered: Sequence[Answered[A]]) -> Values:
        """The outputs of a release's answers, with a receipt of each row: release, adapter, its
        digest, α.
        """
        outputs = dict(self.write([each.answer for each in answered]).plain)
        receipts = []
        for each in answered:
            adapter = each.place.adapter
            receipt = {
                "release": version,
                "adapter": None if adapter is None else adapter.name,
                "adapter_digest": None if adapter is None else shortened(adapter.digest),
                "alpha": round(each.place.alpha, 6),
            }
            if each.mapped is not None:
                receipt["mapped"] = round(each.mapped, 4)
            rows: Any = each.answer if self.batched else [each.answer]
            receipts += [json.dumps(receipt, ensure_ascii=False)] * len(rows)
        outputs[RECEIPT] = [[receipt] for receipt in receipts] if self.batched else receipts
        return Values(outputs)

    def check(self, name: str, inputs: Mapping[str, Form], max_rows: int) -> None:
        """Check names, datatypes, shapes and rows of the inputs; `forms` gives those of arrays."""
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

    def read(self, loaded: LoadedRelease, inputs: Tensors, wants: Wants) -> list[R]:
        """Make typed requests of checked tensors: several if rows have different options."""
        if not self.batched:
            return [self.request(_plain_values(inputs), wants)]

        # A row whose examples are all empty has the examples of the row before.
        if "examples" in inputs:
            examples = inputs["examples"].copy()
            for row in range(1, len(examples)):
                if not any(examples[row]):
                    examples[row] = examples[row - 1]
            inputs = {**inputs, "examples": examples}

        # Group the rows in runs that differ in their image or text only.
        varied = "text" if "text" in self.inputs else "image"
        items: Sequence[Any] = inputs[varied].ravel().tolist()
        items = read_headers(items) if varied == "image" else _texts(items)
        options = {name: array for name, array in inputs.items() if name != varied}
        starts = [0]
        for row in range(1, len(items)):
            first = starts[-1]
            if any(not np.array_equal(array[row], array[first]) for array in options.values()):
                starts.append(row)
        requests: list[R] = []
        for start, end in itertools.pairwise([*starts, len(items)]):
            values = _plain_values({name: array[start] for name, array in options.items()})
            requests.append(self.request({**values, varied: items[start:end]}, wants))

        classified = [request for request in requests if isinstance(request, ClassifyRequest)]
        if len(classified) > 1:
            _check_together(loaded, classified)
        return requests


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


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(_text, values))


# Inputs that are lists or arrays; all others are one value.
_LISTS = ("labels", "templates", "text", "id")
_NUMBERS = ("weight", "example_labels", "example_weight")
_ARRAYS = ("proposals", "proposal_scores")


def _plain_values(inputs: Tensors) -> dict[str, Any]:
    """The inputs of one typed request as plain values, as the client has them."""
    values: dict[str, Any] = {}
    for name, array in inputs.items():
        if name in _ARRAYS:
            values[name] = array
            continue
        items = array.ravel().tolist()
        if name in _LISTS:
            values[name] = _texts(items)
        elif name in _NUMBERS or name in ("image", "examples"):
            values[name] = items
        else:
            values[name] = _text(items[0]) if array.dtype == object else items[0]
    return values


def _take_labels(values: dict[str, Any]) -> Labels:
    """The labels of a request, taken from its values."""
    names = values.pop("labels", None)
    templates = values.pop("templates", None)
    return Labels(
        None if names is None else tuple(names),
        values.pop("label_set", None),
        None if templates is None else tuple(templates),
    )


def _take_point(values: dict[str, Any]) -> Point:
    """The point of a request, taken from its values."""
    return Point(values.pop("adapter", None) or "", values.pop("alpha", None))


# classify


def _classify_request(values: dict[str, Any], wants: Wants) -> ClassifyRequest:
    labels = _take_labels(values)
    images = values.pop("examples", None)
    places = values.pop("example_labels", None)
    weights = values.pop("example_weight", None)
    examples: Examples | None = None
    if not (images is places is weights is None):
        if images is None or places is None:
            raise invalid("examples and example_labels belong together, and example_weight to them")
        encoded = tuple(
            image.encode() if isinstance(image, str) else bytes(image) for image in images
        )
        shares = None if weights is None else tuple(weights)
        examples = Examples(encoded, tuple(places), shares)
    point = _take_point(values)
    return ClassifyRequest(values.pop("image"), labels, point=point, examples=examples, **values)


def embeds_label_set(loaded: LoadedRelease, requests: Sequence[Any]) -> bool:
    """True if requests need a label set whose prompts take the text encoder seconds: at an α or of
    an adapter that it was not exported for, neither stored nor cached, and more than a batch.
    """
    for request in requests:
        if not isinstance(request, (ClassifyRequest, SegmentRequest)):
            continue
        if request.labels.label_set is not None:
            asked = look_up(loaded, request.labels, loaded.place(request.point))
            is_known = asked.is_embedded or asked.stored is not None
            if not is_known and sum(prompt_counts(asked.lines, asked.templates)) > _FEW_PROMPTS:
                return True
    return False


def _check_together(loaded: LoadedRelease, requests: Sequence[ClassifyRequest]) -> None:
    """Refuse too many prompts or examples over all rows of a request."""
    lists: list[tuple[Sequence[str], Sequence[str]]] = []
    sets: list[tuple[Sequence[str], Sequence[str]]] = []
    shown = [request.examples for request in requests if request.examples is not None]
    encoded = sum(len(set(examples.images)) for examples in shown)
    for labels, point in {(request.labels, request.point) for request in requests}:
        asked = look_up(loaded, labels, loaded.place(point))
        if labels.label_set is None:
            lists.append((asked.lines, asked.templates))
            continue
        if not asked.is_embedded:
            sets.append(asked.counted)
        if asked.exported is not None and asked.exported.examples and not asked.is_exported:
            encoded += len(asked.exported.examples.images)
    check_prompts(lists)
    check_prompts([*lists, *sets], OTHER_POINT)
    if encoded > MAX_ENCODED:
        raise invalid(
            f"{encoded} examples to encode for the labels of all rows that differ in their options;"
            f" at most {MAX_ENCODED} are allowed in a request, so send fewer examples, or rows with"
            " the same options"
        )


def _write_rankings(answers: Sequence[list[Ranking]]) -> Values:
    """Pad rankings to the longest with empty labels of score 0."""
    rankings = [ranking for answer in answers for ranking in answer]
    width = max(1, *(len(ranking.labels) for ranking in rankings))
    scores = np.zeros((len(rankings), width), np.float32)
    for row, ranking in enumerate(rankings):
        scores[row, : len(ranking.labels)] = ranking.scores
    labels = [[*ranking.labels, *[""] * (width - len(ranking.labels))] for ranking in rankings]
    return Values({"label": labels, "score": scores})


# segment


def _segment_request(values: dict[str, Any], wants: Wants) -> SegmentRequest:
    image = values.pop("image")
    image = image[0] if isinstance(image, list) else image
    names = [field.name for field in fields(SegmentOptions) if field.name in values]
    options = SegmentOptions(**{name: values.pop(name) for name in names})
    return SegmentRequest(image, _take_labels(values), _take_point(values), options, **values)


def _write_mask(answers: Sequence[LabelledMask]) -> Values:
    [answer] = answers
    return Values({"mask": answer.mask, "label": list(answer.labels), "score": answer.scores})


# retrieve


def _retrieve_request(values: dict[str, Any], wants: Wants) -> RetrieveRequest:
    # Imported here and below: only processes of this task need the index's libraries.
    from radapter_serve.tasks.retrieve import Query, RetrieveRequest

    query = Query(
        tuple(values.pop("text", ())),
        read_headers(values.pop("image", ())),
        tuple(values.pop("id", ())),
        values.pop("weight", None),
    )
    point = _take_point(values)
    return RetrieveRequest(query=query, thumbnails=wants("thumbnail"), point=point, **values)


def _make_retrieve(
    loaded: LoadedRelease, others: Callable[[], Sequence[LoadedRelease]], seconds: float
) -> Run[RetrieveRequest, Retrieved]:
    from radapter_serve.index.index import Indexes
    from radapter_serve.tasks.retrieve import retrieve

    return partial(retrieve, Indexes(loaded, others, opening_seconds=seconds))


def _write_hits(answers: Sequence[Retrieved]) -> Values:
    [answer] = answers
    outputs: dict[str, Any] = {
        "id": [hit.id for hit in answer.hits],
        "score": np.array([hit.score for hit in answer.hits], np.float32),
        "metadata": [json.dumps(hit.metadata, ensure_ascii=False) for hit in answer.hits],
        "index_version": [answer.index_version],
    }
    if answer.thumbnails:
        outputs["thumbnail"] = [hit.thumbnail for hit in answer.hits]
    return Values(outputs)


def _plain(task: Callable[..., TaskSteps[A]]) -> Callable[..., Run[Any, A]]:
    """The `make` of a task that needs only its release."""

    def make(loaded: LoadedRelease, others: Any, seconds: float) -> Run[Any, A]:
        def run(request: Any, cancelled: Cancelled | None) -> TaskSteps[Answered[A]]:
            place = loaded.place(request.point)
            answer = yield from task(loaded, replace(request, point=place), cancelled)
            return Answered(answer, place)

        return run

    return make


_IMAGE = Tensor("image", "BYTES")
# The point of a request; α is the adapter's, if one is named.
_POINT = (_option("adapter", "BYTES"), _option("alpha", "FP32"))
RECEIPT = "receipt"
_RECEIPT = Tensor(RECEIPT, "BYTES")
_LABELS = (
    _option("labels", "BYTES", -1),
    _option("label_set", "BYTES"),
    _option("templates", "BYTES", -1),
)

TASKS: Mapping[str, Task[Any, Any]] = {
    "embed_image": Task(
        inputs=_tensors(_IMAGE, *_POINT),
        outputs=_tensors(Tensor("image_embeds", "FP32", (-1,)), _RECEIPT),
        batched=True,
        request=lambda values, wants: EmbedImagesRequest(values.pop("image"), _take_point(values)),
        make=_plain(embed_images),
        write=lambda answers: Values({"image_embeds": np.concatenate(answers)}),
    ),
    "embed_text": Task(
        inputs=_tensors(Tensor("text", "BYTES"), *_POINT),
        outputs=_tensors(Tensor("text_embeds", "FP32", (-1,)), _RECEIPT),
        batched=True,
        request=lambda values, wants: EmbedTextsRequest(
            tuple(values.pop("text")), _take_point(values)
        ),
        make=_plain(embed_texts),
        write=lambda answers: Values({"text_embeds": np.concatenate(answers)}),
    ),
    "retrieve": Task(
        inputs=_tensors(
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
            *_POINT,
        ),
        outputs=_tensors(
            Tensor("id", "BYTES", (-1,)),
            Tensor("score", "FP32", (-1,)),
            Tensor("metadata", "BYTES", (-1,)),
            Tensor("thumbnail", "BYTES", (-1,)),
            Tensor("index_version", "BYTES"),
            _RECEIPT,
        ),
        batched=False,
        request=_retrieve_request,
        make=_make_retrieve,
        write=_write_hits,
    ),
    "segment": Task(
        inputs=_tensors(
            _IMAGE,
            *_LABELS,
            _option("threshold", "FP32"),
            _option("short_side", "INT32"),
            _option("stride", "INT32"),
            _option("refine", "INT32"),
            _option("proposals", "UINT8", -1, -1, -1),
            _option("proposal_scores", "FP32", -1, -1),
            _option("proposal_weight", "FP32"),
            *_POINT,
        ),
        outputs=_tensors(
            Tensor("mask", "UINT16", (-1, -1)),
            Tensor("label", "BYTES", (-1,)),
            Tensor("score", "FP32", (-1,)),
            _RECEIPT,
        ),
        batched=False,
        request=_segment_request,
        make=_plain(segment),
        write=_write_mask,
    ),
    "classify": Task(
        inputs=_tensors(
            _IMAGE,
            *_LABELS,
            _option("top_k", "INT32"),
            *_POINT,
            _option("multi_label", "BOOL"),
            _option("threshold", "FP32"),
            _option("calibrated", "BOOL"),
            _option("unknown", "FP32"),
            _option("examples", "BYTES", -1),
            _option("example_labels", "INT32", -1),
            _option("example_weight", "FP32", -1),
        ),
        outputs=_tensors(Tensor("label", "BYTES", (-1,)), Tensor("score", "FP32", (-1,)), _RECEIPT),
        batched=True,
        request=_classify_request,
        make=_plain(classify),
        write=_write_rankings,
    ),
}
assert tuple(TASKS) == NAMES


def outputs_of(task: str, embed_dim: int) -> dict[str, Tensor]:
    """Outputs of a task, for a release with embeddings of width `embed_dim`."""
    return {
        name: replace(tensor, dims=(embed_dim,)) if name.endswith("_embeds") else tensor
        for name, tensor in TASKS[task].outputs.items()
    }


def _probes(image: bytes, text: bytes, **labels: NDArray[Any]) -> dict[str, Tensors]:
    """Requests for each task with an image and a text, alone or as the one row of a batch."""
    images = np.array([image], object)
    texts = np.array([text], object)
    return {
        "embed_image": {"image": images[None]},
        "embed_text": {"text": texts[None]},
        # No index has this name: the task refuses.
        "retrieve": {"index": np.array([b"/"], object), "text": np.array([b"a"], object)},
        "segment": {"image": images, **labels},
        "classify": {
            "image": images[None],
            **{name: values[None] for name, values in labels.items()},
        },
    }


# `PROBES` are the smallest requests that run a task's encoders, so that no caller waits for their
# first run. `MINIMAL_REQUESTS` are answered at once, usually with a refusal.
_file = io.BytesIO()
Image.new("RGB", (8, 8), "grey").save(_file, "PNG")
PROBES: Mapping[str, Tensors] = _probes(_file.getvalue(), b"a", labels=np.array([b"a"], object))
MINIMAL_REQUESTS: Mapping[str, Tensors] = _probes(b"-", b" ")
