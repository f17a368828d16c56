"""From the body of a request to what Triton is sent: everything is checked here, before Triton sees
any of it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tritonclient.grpc import service_pb2
from tritonclient.utils import triton_to_np_dtype

from radapter_serve.gateway.errors import Refused, bad_request, escape
from radapter_serve.gateway.models import Model
from radapter_serve.release.tensors import Tensor

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_JSON_VALUES = 2**20
# Lists, objects and their fields in JSON, which cost many times what a number does. It is as much
# as a request with a million numbers has, in rows of 16.
MAX_JSON_LISTS = 2**16
MAX_TEXTS = 2**17
IMAGES = {"image", "examples"}  # of the inputs of type BYTES, those that are no text
FILES = {"thumbnail"}  # the same of the outputs
_HEADER = 2**16  # bytes of an image in which its size is looked for
_PIECE = 2**18  # bytes that are looked at at once

Name = Annotated[str, Field(max_length=64)]
Kind = TypeVar("Kind", bound=BaseModel)


class Strict(BaseModel):
    """JSON in which nothing is of another type than it should be, and nothing is unknown."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _InputParameters(Strict):
    binary_data_size: Annotated[int, Field(ge=0, lt=2**40)] | None = None


class _Input(Strict):
    name: Name
    shape: Annotated[list[Annotated[int, Field(gt=0, lt=2**31)]], Field(max_length=8)]
    datatype: Name
    parameters: _InputParameters = _InputParameters()
    data: list[Any] | None = None


class _OutputParameters(Strict):
    binary_data: bool | None = None


class _Output(Strict):
    name: Name
    parameters: _OutputParameters = _OutputParameters()


class _RequestParameters(Strict):
    binary_data_output: bool = False
    timeout: Annotated[int, Field(gt=0, lt=2**60)] | None = None  # microseconds


class _Header(Strict):
    id: Annotated[str, Field(max_length=128)] = ""
    parameters: _RequestParameters = _RequestParameters()
    inputs: Annotated[list[_Input], Field(max_length=64)]
    outputs: Annotated[list[_Output], Field(max_length=64)] = []


@dataclass(frozen=True)
class Inference:
    """A request that is right.

    Args:
        message: for Triton.
        id: that the caller gave it, to be sent back; empty where it gave none. Triton does not see
            it.
        binary: the outputs that the caller wants in binary.
        timeout: seconds that the caller allows, or None.
        images: how many images it holds; an example that stands empty is none.
    """

    message: service_pb2.ModelInferRequest
    id: str
    binary: frozenset[str]
    timeout: float | None
    images: int


def json_length(header_length: str | None, end: int) -> int:
    """How many bytes of a body are JSON.

    Args:
        header_length: the header that says so; None where all are.
        end: length of the body.

    Raises:
        Refused: the header is no such number.
    """
    if header_length is None:
        return end
    is_number = header_length.isascii() and header_length.isdigit()
    if not is_number or not 0 < int(header_length[:12]) <= end:
        raise bad_request(
            f"{HEADER_LENGTH} is {escape(header_length)}; allowed are 1 to {end}, the length of"
            " the body"
        )
    return int(header_length[:12])


def json_memory(text: bytes) -> int:
    """Bytes that it takes at most to read JSON and to pack what it says, besides the text."""
    # A string is there as it was read, as bytes, packed, and in the message. Where one character of
    # it needs four bytes, each has four, twice while it is read.
    is_plain = text.isascii() and b"\\" not in text
    values = min(_count(text, b",", MAX_JSON_VALUES), MAX_JSON_VALUES)
    # What Python keeps for each value, and for each text that is packed.
    objects = 128 * values + 256 * min(values, MAX_TEXTS)
    return (4 if is_plain else 9) * len(text) + objects


def read(body: bytes, header_length: str | None, model: Model, version: str = "") -> Inference:
    """Read and check the body of an inference.

    Args:
        body: JSON, which binary tensors may follow.
        header_length: the header that says how many bytes are JSON; None where all are.
        version: of the model; empty for the newest.

    Raises:
        Refused: the first thing that is wrong.
    """
    end = json_length(header_length, len(body))
    header = _header(body[:end])
    message = service_pb2.ModelInferRequest(model_name=model.name, model_version=version)
    rest = memoryview(body)[end:]
    rows = set()
    for given in header.inputs:
        tensor = model.inputs.get(given.name)
        if tensor is None:
            raise bad_request(
                f"{model.name} has no input {escape(given.name)}; it has {', '.join(model.inputs)}"
            )
        if any(given.name == other.name for other in message.inputs):
            raise bad_request(f"the input {tensor.name} comes twice")
        _check_kind(given, tensor, model)
        rows.update(given.shape[:1] if model.max_batch_size else [])
        size = given.parameters.binary_data_size
        if (size is None) == (given.data is None):
            raise bad_request(
                f"the input {tensor.name} needs data or binary_data_size, and not both"
            )
        if size is None:
            values = _from_json(tensor, given.shape, given.data or [])
        else:
            if size > len(rest):
                raise bad_request(
                    f"the input {tensor.name} has {size} bytes, {len(rest)} are left in the body"
                )
            values = bytes(rest[:size])
            rest = rest[size:]
        _check_values(tensor, given.shape, values, is_utf8=size is None)
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=given.shape)
        message.raw_input_contents.append(values)
    if len(rest):
        raise bad_request(f"{len(rest)} bytes follow the last input")
    if len(rows) > 1:
        raise bad_request(
            f"the inputs have {' and '.join(map(str, sorted(rows)))} rows; all need as many"
        )
    needed = {name for name, tensor in model.inputs.items() if not tensor.optional}
    if missing := sorted(needed - {given.name for given in header.inputs}):
        raise bad_request(f"the input {missing[0]} is missing")
    binary = _outputs(header, model, message)
    timeout = header.parameters.timeout
    pairs = zip(message.inputs, message.raw_input_contents, strict=True)
    images = sum(_count_filled(values) for one, values in pairs if one.name in IMAGES)
    seconds = None if timeout is None else timeout / 1e6
    return Inference(message, header.id, binary, seconds, images)


def check_fits_json(output: str, count: int) -> None:
    """Raise `Refused` where an output has more values than JSON may have."""
    if count > MAX_JSON_VALUES:
        raise bad_request(
            f"the output {output} has {count} values, too many for JSON; ask for it in binary"
        )


def no_text(output: str) -> Refused:
    """The refusal of files in JSON."""
    return bad_request(
        f"the output {output} is no text; ask for it in binary, or name the outputs that you want"
    )


def pack(values: Sequence[bytes]) -> bytes:
    """Values of type BYTES as Triton takes them."""
    return b"".join(chain.from_iterable((struct.pack("<I", len(value)), value) for value in values))


def _header(text: bytes) -> _Header:
    return from_json(_Header, text, "send tensors in binary")


def from_json(kind: type[Kind], text: bytes, instead: str) -> Kind:
    """Read JSON that a caller sent.

    Args:
        kind: what it must be.
        text: the JSON.
        instead: what a caller with too many values is to do.

    Raises:
        Refused: the first thing that is wrong, by its name.
    """
    # Before anything is made of it. A list or an object begins with a bracket, a field has a colon,
    # and all values of a list but the first follow a comma. Texts may have these characters too.
    if _count(text, b"[{:", MAX_JSON_LISTS) > MAX_JSON_LISTS:
        raise bad_request(f"the JSON has more than {MAX_JSON_LISTS} brackets and colons; {instead}")
    if _count(text, b",[{", MAX_JSON_VALUES) > MAX_JSON_VALUES:
        raise bad_request(f"the JSON has more than {MAX_JSON_VALUES} values; {instead}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = "the body" if not where else escape(where)
        raise bad_request(f"{what}: {first['msg']}", escape(where)[1:-1] or None) from None


def _count(text: bytes, characters: bytes, most: int) -> int:
    """How often a text has some characters; it is looked at no further than to find too many."""
    count = 0
    for start in range(0, len(text), _PIECE):
        for character in characters:
            count += text.count(character, start, start + _PIECE)
        if count > most:
            break
    return count


def _check_kind(given: _Input, tensor: Tensor, model: Model) -> None:
    """Datatype and shape, against what the model takes."""
    if given.datatype != tensor.datatype:
        raise bad_request(
            f"the input {tensor.name} is {escape(given.datatype)}; {tensor.datatype} is needed"
        )
    dims = given.shape[1:] if model.max_batch_size else given.shape
    fits = len(dims) == len(tensor.dims) and all(
        want in (-1, has) for want, has in zip(tensor.dims, dims, strict=True)
    )
    if not fits or (model.max_batch_size and not given.shape):
        batch = [-1] if model.max_batch_size else []
        raise bad_request(
            f"the input {tensor.name} has the shape {given.shape}; {[*batch, *tensor.dims]} is"
            " needed (-1: any)"
        )
    if model.max_batch_size and given.shape[0] > model.max_batch_size:
        raise bad_request(
            f"the input {tensor.name} has {given.shape[0]} rows; {model.name} takes"
            f" {model.max_batch_size}"
        )
    count = math.prod(given.shape)
    if tensor.datatype == "BYTES" and count > MAX_TEXTS:
        raise bad_request(
            f"the input {tensor.name} has {count} values; at most {MAX_TEXTS} are allowed"
        )


def _check_values(tensor: Tensor, shape: Sequence[int], values: bytes, *, is_utf8: bool) -> None:
    """As many values as the shape says, each of them sound; texts of JSON are UTF-8."""
    count = math.prod(shape)
    if tensor.datatype == "BYTES":
        _check_texts(tensor.name, values, count, is_utf8=is_utf8 or tensor.name in IMAGES)
        return
    kind = np.dtype(triton_to_np_dtype(tensor.datatype))
    if len(values) != count * kind.itemsize:
        needed = f"{list(shape)} of {tensor.datatype} are {count * kind.itemsize}"
        raise bad_request(f"the input {tensor.name} has {len(values)} bytes; {needed}")
    if kind.kind == "b" and max(values) > 1:
        raise bad_request(f"the input {tensor.name} holds a byte that is neither 0 nor 1")
    if kind.kind == "f" and not np.isfinite(np.frombuffer(values, kind)).all():
        raise bad_request(f"the input {tensor.name} holds a value that is not a finite number")


def _check_texts(name: str, values: bytes, count: int, *, is_utf8: bool) -> None:
    offset = 0
    end = len(values)
    for number in range(1, count + 1):
        start = offset + 4
        length = struct.unpack_from("<I", values, offset)[0] if start <= end else end
        offset = start + length
        if offset > end:
            raise bad_request(f"value {number} of {count} of the input {name} goes beyond its end")
        if not is_utf8:
            try:
                values[start:offset].decode()
            except UnicodeDecodeError:
                raise bad_request(
                    f"value {number} of {count} of the input {name} is not UTF-8"
                ) from None
    if offset != end:
        raise bad_request(f"the input {name} has {end - offset} bytes after its {count} values")


def _count_filled(values: bytes) -> int:
    """How many of the values of a tensor, which were checked, are not empty."""
    count = 0
    offset = 0
    while offset < len(values):
        (length,) = struct.unpack_from("<I", values, offset)
        count += length > 0
        offset += 4 + length
    return count


def _from_json(tensor: Tensor, shape: Sequence[int], data: list[Any]) -> bytes:
    """Values that came in JSON, flat or nested as the shape is, as the bytes that Triton takes."""
    for _ in shape[1:]:
        if not any(type(value) is list for value in data):
            break
        if not all(type(value) is list for value in data):
            raise bad_request(f"the data of the input {tensor.name} are nested unevenly")
        data = list(chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise bad_request(
            f"the input {tensor.name} has {len(data)} values; the shape {list(shape)} has"
            f" {math.prod(shape)}"
        )
    kinds = set(map(type, data))
    if tensor.datatype == "BYTES":
        if kinds != {str}:
            raise bad_request(f"the data of the input {tensor.name} are not all texts")
        return pack([value.encode() for value in data])
    kind = np.dtype(triton_to_np_dtype(tensor.datatype))
    by_kind: dict[str, set[type]] = {"f": {int, float}, "b": {bool}}
    wanted = by_kind.get(kind.kind, {int})
    if not kinds <= wanted:
        what = "true or false" if kind.kind == "b" else f"numbers of type {tensor.datatype}"
        raise bad_request(f"the data of the input {tensor.name} are not all {what}")
    try:
        if kind.kind == "f":
            # What is not finite is refused with all other such values.
            with np.errstate(over="ignore"):
                return np.array(data, np.float64).astype(kind).tobytes()
        values = np.array(data, np.int64)
        if (values == values.astype(kind)).all():
            return values.astype(kind).tobytes()
    except OverflowError:
        pass
    raise bad_request(f"a number of the input {tensor.name} does not fit {tensor.datatype}")


def _outputs(
    header: _Header, model: Model, message: service_pb2.ModelInferRequest
) -> frozenset[str]:
    """Asks for the outputs; gives those that are to come in binary."""
    default = header.parameters.binary_data_output
    binary = set()
    for output in header.outputs:
        if output.name not in model.outputs:
            raise bad_request(
                f"{model.name} has no output {escape(output.name)}; it has"
                f" {', '.join(model.outputs)}"
            )
        if any(output.name == other.name for other in message.outputs):
            raise bad_request(f"the output {output.name} is asked for twice")
        message.outputs.add(name=output.name)
        wish = output.parameters.binary_data
        if default if wish is None else wish:
            binary.add(output.name)
    if default and not header.outputs:
        binary.update(model.outputs)
    # What JSON can't hold is refused before any work; of a request that names no outputs, files
    # are left out.
    in_json = {output.name for output in header.outputs or model.outputs.values()} - binary
    if not header.outputs and in_json & FILES:
        in_json -= FILES
        for name in model.outputs:
            if name in in_json:
                message.outputs.add(name=name)
    for name in in_json & FILES:
        raise no_text(name)
    for tensor, values in zip(message.inputs, message.raw_input_contents, strict=True):
        if "mask" in in_json and tensor.name == "image":
            check_fits_json("mask", _pixels(values[4 : 4 + _HEADER]))
    return frozenset(binary)


def _pixels(head: bytes) -> int:
    """The pixels of an image, as many as its mask has, by the first bytes of the file or of its
    base64; 0 where these don't say it.
    """
    if not head.startswith((b"\xff\xd8", b"\x89PNG")):
        text = head.rpartition(b",")[2].translate(None, b" \t\r\n")
        with contextlib.suppress(ValueError):
            head = base64.b64decode(text[: len(text) // 4 * 4], validate=True)
    try:
        # No WebP: Pillow reads all of it, and makes room for its pixels.
        with Image.open(io.BytesIO(head), formats=("JPEG", "PNG")) as image:
            return image.width * image.height
    except Exception:  # Pillow raises anything; the task says what is wrong with the whole file
        return 0
