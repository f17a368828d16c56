"""From the body of a request to tensors, all of which are checked before a model sees any."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radapter_serve.gateway.errors import Refused, bad_request, escape
from radapter_serve.gateway.models import Model
from radapter_serve.release.tensors import NUMPY, Tensor

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

    Attributes:
        model: its name.
        version: of the model; empty for the newest.
        inputs: arrays by name; of type BYTES they hold texts, as str or in UTF-8, and images as
            bytes.
        outputs: names of those that are asked for; all if none.
        id: that the caller gave it, to be sent back; empty where it gave none.
        binary: the outputs that the caller wants in binary.
        timeout: seconds that the caller allows, or None.
        size: bytes that the inputs take, where they were read from a body.
    """

    model: str
    version: str
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...] = ()
    id: str = ""
    binary: frozenset[str] = frozenset()
    timeout: float | None = None
    size: int = 0

    @property
    def images(self) -> int:
        """How many images it holds; an example that stands empty is none."""
        arrays = (array for name, array in self.inputs.items() if name in IMAGES)
        return sum(1 for array in arrays for value in array.ravel() if value)


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
    """Bytes that it takes at most to read JSON, besides the text."""
    # A string is there as it was read, and as bytes if it is an image; and JSON that binary tensors
    # follow is copied twice. Where one character of a string needs four bytes, each has four, and
    # one more while it is read.
    is_plain = text.isascii() and b"\\" not in text
    values = min(_count(text, b",", MAX_JSON_VALUES), MAX_JSON_VALUES)
    lists = min(_count(text, b"[{", MAX_JSON_LISTS), MAX_JSON_LISTS)
    # What Python keeps for each.
    return (4 if is_plain else 9) * len(text) + 128 * values + 256 * lists


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
    inputs: dict[str, NDArray[Any]] = {}
    rest = memoryview(body)[end:]
    rows = set()
    for given in header.inputs:
        tensor = model.inputs.get(given.name)
        if tensor is None:
            raise bad_request(
                f"{model.name} has no input {escape(given.name)}; it has {', '.join(model.inputs)}"
            )
        if given.name in inputs:
            raise bad_request(f"the input {tensor.name} comes twice")
        _check_kind(given, tensor, model)
        rows.update(given.shape[:1] if model.max_batch_size else [])
        size = given.parameters.binary_data_size
        if (size is None) == (given.data is None):
            raise bad_request(
                f"the input {tensor.name} needs data or binary_data_size, and not both"
            )
        if size is None:
            inputs[tensor.name] = _from_json(tensor, given.shape, given.data or [])
        else:
            if size > len(rest):
                raise bad_request(
                    f"the input {tensor.name} has {size} bytes, {len(rest)} are left in the body"
                )
            inputs[tensor.name] = _from_binary(tensor, given.shape, rest[:size])
            rest = rest[size:]
    if len(rest):
        raise bad_request(f"{len(rest)} bytes follow the last input")
    if len(rows) > 1:
        raise bad_request(
            f"the inputs have {' and '.join(map(str, sorted(rows)))} rows; all need as many"
        )
    needed = {name for name, tensor in model.inputs.items() if not tensor.optional}
    if missing := sorted(needed - {given.name for given in header.inputs}):
        raise bad_request(f"the input {missing[0]} is missing")
    outputs, binary = _outputs(header, model, inputs)
    timeout = header.parameters.timeout
    seconds = None if timeout is None else timeout / 1e6
    size = sum(map(_size, inputs.values()))
    return Inference(model.name, version, inputs, outputs, header.id, binary, seconds, size)


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


def _from_binary(tensor: Tensor, shape: Sequence[int], data: memoryview) -> NDArray[Any]:
    """Values that came as bytes, each of them sound, as many as the shape says."""
    count = math.prod(shape)
    if tensor.datatype == "BYTES":
        return _objects(_split(tensor.name, data, count), shape)
    kind = np.dtype(NUMPY[tensor.datatype])
    if len(data) != count * kind.itemsize:
        needed = f"{list(shape)} of {tensor.datatype} are {count * kind.itemsize}"
        raise bad_request(f"the input {tensor.name} has {len(data)} bytes; {needed}")
    if kind.kind == "b" and max(data) > 1:
        raise bad_request(f"the input {tensor.name} holds a byte that is neither 0 nor 1")
    values = np.frombuffer(bytes(data), kind)  # a copy, for a view would keep the whole body
    _check_finite(tensor, values)
    return values.reshape(shape)


def _split(name: str, data: memoryview, count: int) -> list[Any]:
    """Texts, or the bytes of images, each after its length."""
    values: list[Any] = []
    offset = 0
    for number in range(1, count + 1):
        start = offset + 4
        length = struct.unpack_from("<I", data, offset)[0] if start <= len(data) else len(data)
        offset = start + length
        if offset > len(data):
            raise bad_request(f"value {number} of {count} of the input {name} goes beyond its end")
        value = bytes(data[start:offset])
        if name not in IMAGES:
            try:
                values.append(value.decode())
            except UnicodeDecodeError:
                raise bad_request(
                    f"value {number} of {count} of the input {name} is not UTF-8"
                ) from None
        else:
            values.append(value)
    if offset != len(data):
        raise bad_request(
            f"the input {name} has {len(data) - offset} bytes after its {count} values"
        )
    return values


def _check_finite(tensor: Tensor, values: NDArray[Any]) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise bad_request(f"the input {tensor.name} holds a value that is not a finite number")


def _size(array: NDArray[Any]) -> int:
    values = array.ravel().tolist() if array.dtype == object else []
    return array.nbytes + sum(map(sys.getsizeof, values))


def _objects(values: Sequence[Any], shape: Sequence[int]) -> NDArray[np.object_]:
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def _from_json(tensor: Tensor, shape: Sequence[int], data: list[Any]) -> NDArray[Any]:
    """Values that came in JSON, flat or nested as the shape is."""
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
        if tensor.name in IMAGES:
            data = [value.encode() for value in data]
        return _objects(data, shape)
    kind = np.dtype(NUMPY[tensor.datatype])
    by_kind: dict[str, set[type]] = {"f": {int, float}, "b": {bool}}
    wanted = by_kind.get(kind.kind, {int})
    if not kinds <= wanted:
        what = "true or false" if kind.kind == "b" else f"numbers of type {tensor.datatype}"
        raise bad_request(f"the data of the input {tensor.name} are not all {what}")
    try:
        if kind.kind == "f":
            # What is not finite is refused with all other such values.
            with np.errstate(over="ignore"):
                floats = np.array(data, np.float64).astype(kind)
            _check_finite(tensor, floats)
            return floats.reshape(shape)
        values = np.array(data, np.int64)
        if (values == values.astype(kind)).all():
            return values.astype(kind).reshape(shape)
    except OverflowError:
        pass
    raise bad_request(f"a number of the input {tensor.name} does not fit {tensor.datatype}")


def _outputs(
    header: _Header, model: Model, inputs: Mapping[str, NDArray[Any]]
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The outputs that are asked for, and those that are to come in binary."""
    default = header.parameters.binary_data_output
    names: list[str] = []
    binary = set()
    for output in header.outputs:
        if output.name not in model.outputs:
            raise bad_request(
                f"{model.name} has no output {escape(output.name)}; it has"
                f" {', '.join(model.outputs)}"
            )
        if output.name in names:
            raise bad_request(f"the output {output.name} is asked for twice")
        names.append(output.name)
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
        names = [name for name in model.outputs if name in in_json]
    for name in in_json & FILES:
        raise no_text(name)
    if "mask" in in_json:
        for image in inputs["image"].ravel():
            check_fits_json("mask", _pixels(image[:_HEADER]))
    return tuple(names), frozenset(binary)


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
