"""Checks of a request, without a server: the parser between strangers and Triton."""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any

import numpy as np
import pytest

from radapter_client import Request
from radapter_client._http import encode
from radapter_serve.gateway import kserve
from radapter_serve.gateway.kserve import MAX_JSON_VALUES
from radapter_serve.gateway.upstream import Inference, Refused, ServedModel
from radapter_serve.release.release import TASKS
from tests.helpers.fake_upstream import config

MODELS = {name: config(name) for name in TASKS}


def read(body: bytes, length: str | None, model: ServedModel, version: str = "") -> Inference:
    return kserve.read(body, kserve.json_length(length, len(body)), model, version)


def tensor(
    name: str, datatype: str, shape: Any, data: Any = None, size: Any = None, **more: Any
) -> dict[str, Any]:
    described = {"name": name, "datatype": datatype, "shape": shape, **more}
    if data is not None:
        described["data"] = data
    if size is not None:
        described["parameters"] = {"binary_data_size": size}
    return described


TEXT = tensor("text", "BYTES", [1, 1], ["a cat"])
NO_DATA = tensor("text", "BYTES", [1, 1])
IMAGE = tensor("image", "BYTES", [1], ["eA=="])
LABELS = tensor("labels", "BYTES", [2], ["a", "b"])
CLASSIFY = [
    tensor("image", "BYTES", [1, 1], ["eA=="]),
    tensor("labels", "BYTES", [1, 2], ["a", "b"]),
]
SEARCH = [tensor("text", "BYTES", [1], ["a cat"]), tensor("index", "BYTES", [1], ["photos"])]
HUGE = [2**31 - 1] * 3
BINARY: dict[str, Any] = {"parameters": {"binary_data_output": True}}


def ask(model: str, inputs: list[Any], rest: bytes | None = None, **more: Any) -> Inference:
    head = json.dumps({"inputs": inputs, **more}).encode()
    return read(head + (rest or b""), None if rest is None else str(len(head)), MODELS[model])


def values(inference: Inference) -> dict[str, tuple[str, Any]]:
    """Type and values of each input, nested as its shape is."""
    return {name: (str(array.dtype), array.tolist()) for name, array in inference.inputs.items()}


# Right requests


def test_a_request_in_json_becomes_arrays() -> None:
    inference = ask(
        "classify",
        [
            tensor("image", "BYTES", [2, 1], [["eA=="], ["eQ=="]]),
            tensor("labels", "BYTES", [2, 3], ["a", "ü", "", "a", "ü", "猫\0"]),
            tensor("top_k", "INT32", [2, 1], [5, -7]),
            tensor("alpha", "FP32", [2, 1], [[0.1], [1]]),
            tensor("multi_label", "BOOL", [2, 1], [True, False]),
        ],
        id="one",
        outputs=[{"name": "label"}],
        parameters={"timeout": 2_500_000},
    )
    assert values(inference) == {
        "image": ("object", [[b"eA=="], [b"eQ=="]]),
        "labels": ("object", [["a", "ü", ""], ["a", "ü", "猫\0"]]),
        "top_k": ("int32", [[5], [-7]]),
        "alpha": ("float32", [[float(np.float32(0.1))], [1]]),
        "multi_label": ("bool", [[True], [False]]),
    }
    assert (inference.id, inference.timeout, inference.binary) == ("one", 2.5, frozenset())
    assert (inference.model, inference.version, inference.outputs) == ("classify", "", ("label",))
    assert inference.images == 2


def test_a_request_of_the_client_passes_as_it_is() -> None:
    masks = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    inputs = {
        "image": np.array([b"\xff\0"], object),
        "labels": np.array([b"a", "ü".encode()], object),
        "proposals": masks,
        "proposal_scores": np.eye(2, dtype=np.float32),
    }
    body, headers = encode(Request("infer", "segment", inputs=inputs, outputs=("mask",)))
    inference = read(body, headers["Inference-Header-Content-Length"], MODELS["segment"], "7")
    assert (inference.version, inference.outputs, set(inference.binary)) == (
        "7",
        ("mask",),
        {"mask"},
    )
    assert values(inference) == {
        "image": ("object", [b"\xff\0"]),
        "labels": ("object", ["a", "ü"]),
        "proposals": ("uint8", masks.tolist()),
        "proposal_scores": ("float32", [[1, 0], [0, 1]]),
    }


def test_outputs_in_json_and_in_binary() -> None:
    assert ask("classify", CLASSIFY, **BINARY).binary == {"label", "score", "receipt"}
    outputs: list[dict[str, Any]] = [{"name": "score"}, {"name": "label"}]
    for wish, more, binary in ((True, {}, {"score"}), (False, BINARY, {"label"})):
        outputs[0]["parameters"] = {"binary_data": wish}
        assert ask("classify", CLASSIFY, outputs=outputs, **more).binary == binary
    # Files are for binary answers alone.
    in_json = ("id", "score", "metadata", "index_version", "receipt")
    assert ask("retrieve", SEARCH).outputs == in_json
    with pytest.raises(Refused, match="thumbnail is not a text; ask for it in binary, or name"):
        ask("retrieve", SEARCH, outputs=[{"name": "id"}, {"name": "thumbnail"}])
    outputs = [{"name": "thumbnail", "parameters": {"binary_data": True}}]
    assert ask("retrieve", SEARCH, outputs=outputs).binary == {"thumbnail"}
    assert "thumbnail" in ask("retrieve", SEARCH, **BINARY).binary


# Wrong ones


def text(**changes: Any) -> dict[str, Any]:
    return {"model": "embed_text", "inputs": [{**TEXT, **changes}]}


def texts(rest: bytes, rows: int = 1, size: Any = None) -> dict[str, Any]:
    described = tensor("text", "BYTES", [rows, 1], size=len(rest) if size is None else size)
    return {"model": "embed_text", "inputs": [described], "rest": rest}


def segment(
    name: str, datatype: str, shape: Any, data: Any = None, size: Any = None, **more: Any
) -> dict[str, Any]:
    inputs = [IMAGE, LABELS, tensor(name, datatype, shape, data, size)]
    return {"model": "segment", "inputs": inputs, **more}


def classify(name: str, datatype: str, shape: Any, data: Any = None, **more: Any) -> dict[str, Any]:
    inputs = [CLASSIFY[0], tensor(name, datatype, shape, data, more.pop("size", None))]
    return {"model": "classify", "inputs": inputs, **more}


REFUSED: dict[str, list[dict[str, Any]]] = {
    # The table of the wire
    "the input text is missing": [text() | {"inputs": []}],
    r"the input '\ntext' comes twice": [text() | {"inputs": [{**TEXT, "name": "\ntext"}] * 2}],
    r"embed_text has no input 'tok\nens'; it has text, adapter, alpha": [text(name="tok\nens")],
    r"text is 'INT\n32'; BYTES is taken": [text(datatype="INT\n32")],
    "text has shape [1, 2]; [-1, 1] is taken, where -1 is any number": [text(shape=[1, 2])],
    "at most 64 are taken": [text(shape=[65, 1], data=["a"] * 65)],
    # JSON
    "inputs.0.shape.0: Input should be greater than 0": [text(shape=[0, 1])],
    "shape": [text(shape=shape) for shape in ([2**31, 1], [1.0, 1], [True, 1], "11", [1] * 9)],
    "inputs.0": [text() | {"inputs": [1]}, text(name="t" * 65), text(data="a"), text(**{"m\n": 1})],
    "the input text has 2 values; the shape [1, 1] has 1": [text(data=["a", "b"])],
    "has 0 values": [text(data=[])],
    "are not all texts": [text(data=data) for data in ([1], [None], [{"a": 1}])],
    "not both": [text(parameters={"binary_data_size": 1}), text() | {"inputs": [NO_DATA]}],
    "shared_memory_region": [text(parameters={"shared_memory_region": "x"})],
    # Numbers
    "the input threshold": [
        segment("threshold", "FP32", [1], [value]) for value in (10**400, 1e39, "0.5", True)
    ],
    "the input refine": [
        segment("refine", "INT32", [1], [value]) for value in (2**31, 2**70, 1.0, True)
    ],
    "true or false": [
        classify("multi_label", "BOOL", [1, 1], [value]) for value in (1, "true", None)
    ],
    "does not fit UINT8": [segment("proposals", "UINT8", [1, 1, 1], [256])],
    "nested unevenly": [segment("proposals", "UINT8", [1, 1, 2], [[[1], 2]])],
    # Other parts
    r"no output 'ma\nsk'": [text() | {"outputs": [{"name": "ma\nsk"}]}],
    "asked for twice": [text() | {"outputs": [{"name": "text_embeds"}] * 2}],
    "outputs": [text() | {"outputs": [{"name": "x", "parameters": {"classification": 3}}]}],
    "parameters": [text() | {"parameters": {name: 0}} for name in ("sequence_id", "timeout")],
    "[invalid_argument] ": [text() | {"id": "x" * 129}, text() | {"more": {}}],
    # Binary
    "has 5 bytes, 4 are left": [texts(b"\1\0\0\0", size=5)],
    "1 bytes follow the last input": [texts(b"\0\0\0\0x", size=4)],
    "1 bytes follow the 1 values": [texts(b"\0\0\0\0x")],
    "beyond the end": [texts(rest) for rest in (b"\0\0\0", b"\1\0\0\0", b"\xff" * 4)],
    "the input text: value 2 of 2 goes beyond the end": [texts(b"\0\0\0\0", rows=2)],
    "not UTF-8": [texts(b"\1\0\0\0\xff"), texts(b"\3\0\0\0\xed\xa0\x80")],
    "binary_data_size": [texts(b"", size=size) for size in (-1, 2**62, 1.5)],
    "not a finite number": [
        segment("threshold", "FP32", [1], size=4, rest=struct.pack("<f", value))
        for value in (math.nan, math.inf)
    ],
    "has 3 bytes; [1] of FP32 are 4": [segment("threshold", "FP32", [1], size=3, rest=b"abc")],
    "neither 0 nor 1": [classify("multi_label", "BOOL", [1, 1], size=1, rest=b"\2")],
    # Shapes that promise the world, before memory is taken
    "has 1 values": [segment("proposals", "UINT8", HUGE, [1])],
    "proposals has 0 bytes": [segment("proposals", "UINT8", HUGE, size=0, rest=b"")],
    "at most 131072": [classify("labels", "BYTES", [1, 2**31 - 1], size=0, rest=b"")],
}


@pytest.mark.parametrize("message", REFUSED)
def test_requests_that_are_refused(message: str) -> None:
    for request in REFUSED[message]:
        with pytest.raises(Refused, match=re.escape(message)) as caught:
            ask(**request)
        assert (caught.value.status, caught.value.code) == (400, "invalid_argument")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        *(b"nonsense", b"null", b"{}", b'"\xff"', b'{"inputs":' * 100_000),
        *(
            json.dumps({"inputs": [TEXT]}).encode().replace(b'"a cat"', value)
            for value in (b'"\xff"', b'"\\ud800"', b"NaN", b"[" * 100_000 + b"]" * 100_000)
        ),
        b'{"inputs": [' + b"1," * MAX_JSON_VALUES + b"1]}",
    ],
    ids=range(10),
)
def test_json_that_is_refused(body: bytes) -> None:
    with pytest.raises(Refused, match=r"^\[invalid_argument\] .{10,300}$"):
        read(body, None, MODELS["embed_text"])


def test_header_lengths_that_are_taken() -> None:
    assert [kserve.json_length(length, 5) for length in ("1", "5", "005", None)] == [1, 5, 5, 5]


@pytest.mark.parametrize(
    "length", ["", "-1", "0", "0000000000055", "1e3", "9" * 5000, "٣", "+5", " 5", "1_0"]
)
def test_header_lengths_that_are_refused(length: str) -> None:
    with pytest.raises(Refused, match="Inference-Header-Content-Length is '[ -~]*;"):
        read(json.dumps({"inputs": [TEXT]}).encode(), length, MODELS["embed_text"])
