"""KServe v2 over HTTP: reads request bodies into checked tensors, and writes replies as bodies."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radapter_client import Reply
from radapter_client.tensors import DATATYPES, NUMPY, pack, unpack
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import read_header
from radapter_serve.gateway.upstream import IMAGES, Inference, Refused, ServedModel, bad_request
from radapter_serve.index.facts import DEFAULT_TOP_K, MAX_TOP_K
from radapter_serve.tasks.classify import DEFAULT_TOP_K as DEFAULT_LABELS
from radapter_serve.tasks.table import RECEIPT, TASKS

RECEIPT_HEADER = "Radapter-Receipt"
HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_JSON_VALUES = 2**20
# Lists, objects and fields take many times the memory of a number. A million numbers in rows of 16
# have this many lists.
MAX_JSON_LISTS = 2**16
MAX_TEXTS = 2**17  # of an input
FILES = {"thumbnail"}  # outputs of type BYTES that hold files
# Bytes of an answer in memory: of a row's receipt, a label of a label set, and an image of an index
# with its metadata and its thumbnail. An operator's labels and metadata may have more.
_RECEIPT_BYTES = 2**10
_LABEL_BYTES = 128
_SCORE_BYTES = 8 + 4  # with a reference to the label
_HIT_BYTES = 2**10
_THUMBNAIL_BYTES = 2**13
_PIECE = 2**18  # bytes of JSON that are searched at once
_DUMPED = 2**12  # values that are written at once
_dumps = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

Name = Annotated[str, Field(max_length=64)]
Body = TypeVar("Body", bound=BaseModel)


# JSON of callers


class Strict(BaseModel):
    """JSON without unknown fields and without type conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class InputParameters(Strict):
    binary_data_size: Annotated[int, Field(ge=0, lt=2**40)] | None = None


class Input(Strict):
    name: Name
    shape: Annotated[list[Annotated[int, Field(gt=0, lt=2**31)]], Field(max_length=8)]
    datatype: Name
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(Strict):
    binary_data: bool | None = None


class Output(Strict):
    name: Name
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Strict):
    binary_data_output: bool = False
    timeout: Annotated[int, Field(gt=0, lt=2**60)] | None = None  # microseconds


class Header(Strict):
    id: Annotated[str, Field(max_length=128)] = ""
    model_name: Name | None = None  # that of the path again, as KServe's own client sends it
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[Input], Field(max_length=64)]
    outputs: Annotated[list[Output], Field(max_length=64)] = []


def from_json(kind: type[Body], text: bytes, advice: str) -> Body:
    """Parse a caller's JSON, or raise `Refused`; `advice` is for JSON with too many values."""
    # Bound the memory before parsing: lists and objects begin with a bracket, a field has a colon,
    # and each value of a list but the first follows a comma. These characters count in texts, too.
    if _count(text, b"[{:", MAX_JSON_LISTS) > MAX_JSON_LISTS:
        raise bad_request(f"the JSON has more than {MAX_JSON_LISTS} brackets and colons; {advice}")
    if _count(text, b",[{", MAX_JSON_VALUES) > MAX_JSON_VALUES:
        raise bad_request(f"the JSON has more than {MAX_JSON_VALUES} values; {advice}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        param = ascii(field)[1:-1][:60] or None
        raise bad_request(f"{param or 'the body'}: {first['msg']}", param) from None


def json_length(header_length: str | None, size: int) -> int:
    """Bytes of a body that are JSON: the value of the header `HEADER_LENGTH`, else all `size`."""
    if header_length is None:
        return size
    is_number = header_length.isascii() and header_length.isdigit() and len(header_length) <= 12
    length = int(header_length) if is_number else 0
    if not 0 < length <= size:
        raise bad_request(
            f"{HEADER_LENGTH} is {header_length!a:.80}; allowed are 1 to {size}, the length of"
            " the body"
        )
    return length


def json_memory(text: bytes) -> int:
    """Upper bound of the bytes that parsing JSON takes, without the text itself."""
    # A string exists as parsed and, for an image, as bytes; JSON in front of binary tensors is
    # copied twice. If a string has one character of four bytes, each of its characters takes four,
    # and one more during parsing.
    is_plain = text.isascii() and b"\\" not in text
    values = min(_count(text, b",", MAX_JSON_VALUES), MAX_JSON_VALUES)
    lists = min(_count(text, b"[{", MAX_JSON_LISTS), MAX_JSON_LISTS)
    return (4 if is_plain else 9) * len(text) + 128 * values + 256 * lists


def _count(text: bytes, characters: bytes, limit: int) -> int:
    """Count occurrences of `characters`, up to a few more than `limit`."""
    count = 0
    for start in range(0, len(text), _PIECE):
        for character in characters:
            count += text.count(character, start, start + _PIECE)
        if count > limit:
            break
    return count


# Requests


def count_texts(text: bytes) -> int:
    """Number of texts and images that a body has according to its JSON."""
    header = from_json(Header, text, "send tensors in binary")
    return sum(math.prod(tensor.shape) for tensor in header.inputs if tensor.datatype == "BYTES")


def read(body: bytes, end: int, model: ServedModel, version: str = "") -> Inference:
    """Parse and check the body of an inference: JSON up to `end`, then binary tensors."""
    header = from_json(Header, body[:end], "send tensors in binary")
    if header.model_name not in (None, model.name):
        raise bad_request(
            f"model_name is {header.model_name!a:.80}, and the path names {model.name}"
        )

    # Names, types and shapes, before any value is read
    declared = {tensor.name: (tensor.datatype, tensor.shape) for tensor in header.inputs}
    if len(declared) < len(header.inputs):
        names = [tensor.name for tensor in header.inputs]
        twice = next(name for name in names if names.count(name) > 1)
        raise bad_request(f"the input {twice!a:.80} comes twice")
    try:
        TASKS[model.name].check(model.name, declared, model.max_batch_size)
    except TaskError as error:
        raise bad_request(error.message) from None

    # Values
    inputs: dict[str, NDArray[Any]] = {}
    rest = memoryview(body)[end:]
    for tensor in header.inputs:
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise bad_request(
                f"the input {tensor.name} needs data or binary_data_size, and not both"
            )
        if tensor.datatype == "BYTES" and math.prod(tensor.shape) > MAX_TEXTS:
            raise bad_request(
                f"the input {tensor.name} has {math.prod(tensor.shape)} values; at most"
                f" {MAX_TEXTS} are allowed"
            )
        if size is None:
            inputs[tensor.name] = _from_json(tensor)
        else:
            if size > len(rest):
                raise bad_request(
                    f"the input {tensor.name} has {size} bytes, {len(rest)} are left in the body"
                )
            inputs[tensor.name] = _from_binary(tensor, rest[:size])
            rest = rest[size:]
    if len(rest):
        raise bad_request(f"{len(rest)} bytes follow the last input")

    outputs, binary = _outputs(header, model)
    timeout = header.parameters.timeout
    seconds = None if timeout is None else timeout / 1e6
    return Inference(
        model.name,
        version,
        inputs,
        outputs,
        header.id,
        binary,
        seconds,
        size=memory_of(inputs),
        answer_size=_answer_size(model, inputs, outputs),
    )


def memory_of(tensors: Mapping[str, NDArray[Any]]) -> int:
    """Bytes of tensors, with their texts and files."""
    objects = (array for array in tensors.values() if array.dtype == object)
    texts = sum(sys.getsizeof(value) for array in objects for value in array.ravel())
    return texts + sum(array.nbytes for array in tensors.values())


def _answer_size(
    model: ServedModel, inputs: Mapping[str, NDArray[Any]], outputs: tuple[str, ...]
) -> int:
    """Most bytes of the answer to these inputs, before anybody works on it."""
    rows = len(next(iter(inputs.values()))) if TASKS[model.name].batched else 1
    size = _RECEIPT_BYTES * rows
    if model.name == "retrieve":
        top_k = int(inputs["top_k"][0]) if "top_k" in inputs else DEFAULT_TOP_K
        hit = _HIT_BYTES
        if not outputs or FILES & set(outputs):
            hit += _THUMBNAIL_BYTES
        return size + hit * max(0, min(top_k, MAX_TOP_K))
    if model.name.startswith("embed_"):
        return size + sum(4 * rows * max(0, *tensor.dims) for tensor in model.outputs.values())
    if model.name == "segment":
        with contextlib.suppress(TaskError):  # the task refuses this image
            file = read_header(inputs["image"][0])
            size += 2 * file.width * file.height
    # All labels with their scores, or the best of each row
    if "labels" in inputs:
        count = inputs["labels"].shape[-1]
        sizes = list(map(sys.getsizeof, inputs["labels"].ravel()))
        largest = max(sizes)
        all_labels = sum(sizes)
    else:
        sets = [facts.get("label_sets", {}) for facts in model.releases.values()]
        count = max((each["labels"] for named in sets for each in named.values()), default=0)
        largest = _LABEL_BYTES
        all_labels = rows * count * largest
    all_labels += rows * count * _SCORE_BYTES
    if model.name == "segment" or inputs.get("multi_label", np.zeros(1)).any():
        return size + all_labels
    top_k = int(inputs.get("top_k", np.array(DEFAULT_LABELS)).max())
    return size + min(all_labels, rows * max(0, top_k) * (largest + _SCORE_BYTES))


def _from_binary(tensor: Input, data: memoryview) -> NDArray[Any]:
    name = tensor.name
    if tensor.datatype == "BYTES":
        # Texts, or the bytes of images
        try:
            values = unpack(data, "BYTES", tensor.shape)
            if name not in IMAGES:
                texts = [value.decode() for value in values.ravel()]
                values = np.array(texts, object).reshape(tensor.shape)
        except UnicodeDecodeError:
            raise bad_request(f"the input {name} has a text that is not UTF-8") from None
        except ValueError as error:
            raise bad_request(f"the input {name}: {error}") from None
        return values

    kind = np.dtype(NUMPY[tensor.datatype])
    size = math.prod(tensor.shape) * kind.itemsize
    if len(data) != size:
        raise bad_request(
            f"the input {name} has {len(data)} bytes; {tensor.shape} of {tensor.datatype} are"
            f" {size}"
        )
    if kind.kind == "b" and max(data) > 1:
        raise bad_request(f"the input {name} holds a byte that is neither 0 nor 1")
    numbers = np.frombuffer(bytes(data), kind)  # a copy: a view would keep the whole body
    _check_finite(name, numbers)
    return numbers.reshape(tensor.shape)


def _from_json(tensor: Input) -> NDArray[Any]:
    """Read the data of a tensor, flat or nested according to its shape."""
    name = tensor.name
    shape = tensor.shape
    data = tensor.data or []
    for _ in shape[1:]:
        if not any(type(value) is list for value in data):
            break
        if not all(type(value) is list for value in data):
            raise bad_request(f"the data of the input {name} are nested unevenly")
        data = list(chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise bad_request(
            f"the input {name} has {len(data)} values; the shape {shape} has {math.prod(shape)}"
        )
    kinds = set(map(type, data))
    if tensor.datatype == "BYTES":
        if kinds != {str}:
            raise bad_request(f"the data of the input {name} are not all texts")
        items = list(map(str.encode, data)) if name in IMAGES else data
        return np.array(items, object).reshape(shape)

    # Numbers and booleans: convert to 64 bits first, to check that they fit
    kind = np.dtype(NUMPY[tensor.datatype])
    is_float = kind.kind == "f"
    allowed: dict[str, set[type]] = {"f": {int, float}, "b": {bool}}
    if not kinds <= allowed.get(kind.kind, {int}):
        what = "true or false" if kind.kind == "b" else f"numbers of type {tensor.datatype}"
        raise bad_request(f"the data of the input {name} are not all {what}")
    does_not_fit = f"a number of the input {name} does not fit {tensor.datatype}"
    try:
        wide = np.array(data, np.float64 if is_float else np.int64)
    except OverflowError:
        raise bad_request(does_not_fit) from None
    with np.errstate(over="ignore"):
        values = wide.astype(kind)
    _check_finite(name, values)
    if not is_float and (values != wide).any():
        raise bad_request(does_not_fit)
    return values.reshape(shape)


def _check_finite(name: str, values: NDArray[Any]) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise bad_request(f"the input {name} holds a value that is not a finite number")


def _outputs(header: Header, model: ServedModel) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of the requested outputs, and of the ones in binary; refuses files in JSON."""
    default = header.parameters.binary_data_output
    names: list[str] = []
    binary = set()
    for output in header.outputs:
        if output.name not in model.outputs:
            raise bad_request(
                f"{model.name} has no output {output.name!a:.80}; it has {', '.join(model.outputs)}"
            )
        if output.name in names:
            raise bad_request(f"the output {output.name} is asked for twice")
        names.append(output.name)
        wish = output.parameters.binary_data
        if default if wish is None else wish:
            binary.add(output.name)
    if default and not header.outputs:
        binary.update(model.outputs)
    in_json = set(names or model.outputs) - binary
    if in_json & FILES:
        if names:
            raise _no_text(next(iter(in_json & FILES)))
        # A request that names no outputs gets all but files.
        in_json -= FILES
        names = [name for name in model.outputs if name in in_json]
    return tuple(names), frozenset(binary)


def _no_text(output: str) -> Refused:
    """The error for an output of type BYTES that JSON cannot hold."""
    return bad_request(
        f"the output {output} is not a text; ask for it in binary, or name the outputs that you"
        " want"
    )


# Replies


def receipt_of(reply: Reply) -> str:
    """The receipt of an answer in ASCII, for a header; empty if it has none, or several."""
    rows = reply.outputs.get(RECEIPT)
    texts = set() if rows is None else set(rows.ravel().tolist())
    if len(texts) != 1:
        return ""
    [text] = texts
    return json.dumps(json.loads(text))


def write(reply: Reply, request: Inference) -> tuple[list[bytes | memoryview], dict[str, str]]:
    """The body, in parts, and headers of an answer; raises `Refused` for an output that JSON cannot
    hold.
    """
    described: list[str] = []
    parts: list[bytes | memoryview] = []
    for name, array in reply.outputs.items():
        datatype = DATATYPES[array.dtype]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if name in request.binary:
            parts.append(_bytes_of(array))
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            if array.size > MAX_JSON_VALUES:
                raise bad_request(
                    f"the output {name} has {array.size} values, too many for JSON; ask for it in"
                    " binary"
                )
            values = array.ravel().tolist()
            if datatype == "BYTES":
                try:
                    values = [value.decode() for value in values]
                except UnicodeDecodeError:
                    raise _no_text(name) from None
            # `dumps` holds all other threads up, so it gets some values at a time.
            pieces = [
                _dumps(values[start : start + _DUMPED])[1:-1]
                for start in range(0, len(values), _DUMPED)
            ]
            described.append(f'{_dumps(output)[:-1]},"data":[{",".join(pieces)}]}}')
            continue
        described.append(_dumps(output))
    head: dict[str, Any] = {"id": request.id} if request.id else {}
    head |= {"model_name": request.model, "model_version": str(reply.version)}
    headers = {"Content-Type": "application/json"}
    if receipt := receipt_of(reply):
        head["parameters"] = {RECEIPT: receipt}
        headers[RECEIPT_HEADER] = receipt
    text = f'{_dumps(head)[:-1]},"outputs":[{",".join(described)}]}}'.encode()
    if request.binary:
        headers |= {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return [text, *parts], headers


def _bytes_of(array: NDArray[Any]) -> bytes | memoryview:
    """A tensor in binary: numbers are those of the array itself, not a copy."""
    if array.dtype == object:
        return pack(array)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
