"""Checks of a request, without a server: the parser between strangers and Triton."""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radapter_client import Request
from radapter_client._http import encode
from radapter_serve.gateway.kserve import MAX_JSON_VALUES, read
from radapter_serve.gateway.upstream import CODES, IMAGES, Inference, Model, Refused
from radapter_serve.release.release import TASKS
from radapter_serve.tasks.table import NUMPY
from tests.helpers.fake_upstream import config

MODELS = {name: config(name) for name in TASKS}


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
IMAGE = tensor("image", "BYTES", [1], ["eA=="])
LABELS = tensor("labels", "BYTES", [2], ["a", "b"])
CLASSIFY = [
    tensor("image", "BYTES", [1, 1], ["eA=="]),
    tensor("labels", "BYTES", [1, 2], ["a", "b"]),
]
SEARCH = [tensor("text", "BYTES", [1], ["a cat"]), tensor("index", "BYTES", [1], ["photos"])]
BINARY: dict[str, Any] = {"parameters": {"binary_data_output": True}}


def ask(model: str, *inputs: Any, rest: bytes | None = None, **more: Any) -> Inference:
    head = json.dumps({"inputs": inputs, **more}).encode()
    return read(head + (rest or b""), None if rest is None else str(len(head)), MODELS[model])


def values(inference: Inference) -> dict[str, tuple[str, Any]]:
    """Type and values of each input, nested as its shape is."""
    return {name: (str(one.dtype), one.tolist()) for name, one in inference.inputs.items()}


# Right requests


def test_a_request_in_json_becomes_arrays() -> None:
    inference = ask(
        "classify",
        tensor("image", "BYTES", [2, 1], [["eA=="], ["eQ=="]]),
        tensor("labels", "BYTES", [2, 3], ["a", "ü", "", "a", "ü", "猫\0"]),
        tensor("top_k", "INT32", [2, 1], [5, -7]),
        tensor("alpha", "FP32", [2, 1], [[0.1], [1]]),
        tensor("multi_label", "BOOL", [2, 1], [True, False]),
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
    found = read(body, headers["Inference-Header-Content-Length"], MODELS["segment"], "7")
    assert (found.version, found.outputs, set(found.binary)) == ("7", ("mask",), {"mask"})
    assert values(found) == {
        "image": ("object", [b"\xff\0"]),
        "labels": ("object", ["a", "ü"]),
        "proposals": ("uint8", masks.tolist()),
        "proposal_scores": ("float32", [[1, 0], [0, 1]]),
    }


def test_outputs_in_json_and_in_binary() -> None:
    assert ask("classify", *CLASSIFY, **BINARY).binary == {"label", "score"}
    outputs: list[dict[str, Any]] = [{"name": "score"}, {"name": "label"}]
    for wish, more, binary in ((True, {}, {"score"}), (False, BINARY, {"label"})):
        outputs[0]["parameters"] = {"binary_data": wish}
        assert ask("classify", *CLASSIFY, outputs=outputs, **more).binary == binary
    # Files are for binary answers alone.
    assert ask("retrieve", *SEARCH).outputs == ("id", "score", "metadata", "index_version")
    with pytest.raises(Refused, match="thumbnail is no text; ask for it in binary, or name"):
        ask("retrieve", *SEARCH, outputs=[{"name": "id"}, {"name": "thumbnail"}])
    outputs = [{"name": "thumbnail", "parameters": {"binary_data": True}}]
    assert ask("retrieve", *SEARCH, outputs=outputs).binary == {"thumbnail"}
    assert "thumbnail" in ask("retrieve", *SEARCH, **BINARY).binary


# Wrong ones


def segment(name: str, datatype: str, shape: Any, data: Any) -> tuple[str, list[Any], str]:
    return "segment", [IMAGE, LABELS, tensor(name, datatype, shape, data)], ""


def text(message: str = "", **changes: Any) -> tuple[str, list[Any], str]:
    return "embed_text", [{**TEXT, **changes}], message


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        # The table of the wire
        ("embed_text", [], "the input text is missing"),
        ("embed_text", [TEXT, TEXT], "the input 'text' comes twice"),
        text("embed_text has no input 'tokens'; it has text, alpha", name="tokens"),
        text("text is 'INT32'; BYTES is taken", datatype="INT32"),
        text("text has shape [1, 2]; [-1, 1] is taken, where -1 is any number", shape=[1, 2]),
        text(shape=[65, 1], data=["a"] * 65),
        # JSON
        ("embed_text", [1], ""),
        text("inputs.0.shape.0: Input should be greater than 0", shape=[0, 1]),
        *(text(shape=shape) for shape in ([-1, 1], [2**31, 1], [1.0, 1], [True, 1], "11", [1] * 9)),
        text("the input text has 2 values; the shape [1, 1] has 1", data=["a", "b"]),
        *(text(data=data) for data in ([], [1], [None], [{"a": 1}], [[["a"]]], "a")),
        *(text(**more) for more in ({"name": "t" * 65}, {"more": 1})),
        text(parameters={"binary_data_size": 1}),
        text(parameters={"shared_memory_region": "x"}),
        ("embed_text", [tensor("text", "BYTES", [1, 1])], "needs data or binary_data_size"),
        ("embed_text", [tensor("text", "BYTES", [1, 1], size=5)], "has 5 bytes, 0 are left"),
        # Numbers
        *(segment("threshold", "FP32", [1], [value]) for value in (10**400, 1e39, "0.5", True)),
        *(segment("refine", "INT32", [1], [value]) for value in (2**31, 2**70, 1.0, True)),
        *(
            ("classify", [*CLASSIFY, tensor("multi_label", "BOOL", [1, 1], [value])], "true or")
            for value in (1, "true", None)
        ),
        segment("proposals", "UINT8", [1, 1, 1], [256]),
        segment("proposals", "UINT8", [1, 1, 2], [[[1], 2]]),
    ],
)
def test_inputs_that_are_refused(model: str, inputs: list[Any], message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message) or None) as caught:
        ask(model, *inputs)
    assert (caught.value.status, caught.value.code) == (400, "invalid_argument")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"outputs": [{"name": "mask"}]},
        {"outputs": [{"name": "text_embeds"}] * 2},
        {"outputs": [{"name": "text_embeds", "parameters": {"classification": 3}}]},
        {"outputs": [{"name": "x"}] * 65},
        *({"parameters": {"sequence_id": 1}}, {"parameters": {"timeout": 0}}),
        *({"id": "x" * 129}, {"more": {}}),
    ],
)
def test_other_parts_that_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"^\[invalid_argument\] "):
        ask("embed_text", TEXT, **more)


def number(name: str, datatype: str, rest: bytes, message: str) -> tuple[Any, ...]:
    """A binary number in a request for `segment`, or a truth value in one for `classify`."""
    if datatype == "BOOL":
        return "classify", [*CLASSIFY, tensor(name, "BOOL", [1, 1], size=len(rest))], rest, message
    return "segment", [IMAGE, LABELS, tensor(name, datatype, [1], size=len(rest))], rest, message


def texts(rows: int, size: Any, rest: bytes, message: str) -> tuple[Any, ...]:
    return "embed_text", [tensor("text", "BYTES", [rows, 1], size=size)], rest, message


HUGE = [2**31 - 1] * 3


@pytest.mark.parametrize(
    ("model", "inputs", "rest", "message"),
    [
        texts(1, 5, b"\1\0\0\0", "has 5 bytes, 4 are left"),
        texts(1, 4, b"\0\0\0\0x", "1 bytes follow the last input"),
        texts(1, 5, b"\0\0\0\0x", "has 1 bytes after its 1 values"),
        *(
            texts(1, len(rest), rest, "beyond its end")
            for rest in (b"\0\0\0", b"\1\0\0\0", b"\xff" * 4)
        ),
        texts(2, 4, b"\0\0\0\0", "value 2 of 2 of the input text goes beyond its end"),
        *(
            texts(1, len(rest), rest, "not UTF-8")
            for rest in (b"\1\0\0\0\xff", b"\3\0\0\0\xed\xa0\x80")
        ),
        *(texts(1, size, b"", "binary_data_size") for size in (-1, 2**62, 1.5)),
        number("threshold", "FP32", struct.pack("<f", math.nan), "is not a finite number"),
        number("threshold", "FP32", struct.pack("<f", math.inf), "is not a finite number"),
        number("threshold", "FP32", b"abc", "threshold has 3 bytes; [1] of FP32 are 4"),
        number("multi_label", "BOOL", b"\2", "holds a byte that is neither 0 nor 1"),
        # Shapes that promise the world, before memory is taken
        ("segment", [IMAGE, LABELS, tensor("proposals", "UINT8", HUGE, [1])], None, "has 1 values"),
        (
            "segment",
            [IMAGE, LABELS, tensor("proposals", "UINT8", HUGE, size=0)],
            b"",
            "has 0 bytes",
        ),
        (
            *("classify", [CLASSIFY[0], tensor("labels", "BYTES", [1, 2**31 - 1], size=0)], b""),
            "at most 131072 are allowed",
        ),
    ],
)
def test_tensors_that_are_refused(
    model: str, inputs: list[Any], rest: bytes | None, message: str
) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        ask(model, *inputs, rest=rest)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"nonsense", b"null", b"[]", b"{}", b'"\xff"', b'{"inputs": null}'),
        *(
            b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [%s]}]}'
            % value
            for value in (b'"\xff"', b'"\\ud800"', b"NaN", b"[" * 100_000 + b"]" * 100_000)
        ),
        b"[" * 1_000_000,
        b'{"inputs":' * 100_000,
        b'{"inputs": [' + b"1," * MAX_JSON_VALUES + b"1]}",
    ],
)
def test_json_that_is_refused(body: bytes) -> None:
    with pytest.raises(Refused, match=r"^\[invalid_argument\] .{10,300}$"):
        read(body, None, MODELS["embed_text"])


@pytest.mark.parametrize("length", ["", "-1", "0", "x", "1e3", "9" * 5000, "٣", "+5", " 5", "1_0"])
def test_header_lengths_that_are_refused(length: str) -> None:
    with pytest.raises(Refused, match="Inference-Header-Content-Length is"):
        read(json.dumps({"inputs": [TEXT]}).encode(), length, MODELS["embed_text"])


# Any bytes


def check(body: bytes, length: str | None, model: Model) -> None:
    """A body is either refused in one line with a known code, or its arrays fit the model."""
    try:
        inference = read(body, length, model)
    except Refused as error:
        assert 400 <= error.status < 500 and error.code in CODES
        assert re.fullmatch(r"\[[a-z_]+\] .{1,500}", str(error)) and str(error).isprintable()
        return
    for name, array in inference.inputs.items():
        spec = model.inputs[name]
        assert array.dtype == NUMPY[spec.datatype]
        assert array.size and array.ndim == len(spec.dims) + bool(model.max_batch_size)
        if spec.datatype == "BYTES":
            kind = bytes if name in IMAGES else str
            assert all(type(one) is kind for one in array.ravel())


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
names = sorted({name for model in MODELS.values() for name in model.inputs})
datatypes = st.sampled_from(["BYTES", "FP32", "INT32", "UINT8", "BOOL", "FP64", ""])
sizes = st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-2, 20)})
inputs = st.fixed_dictionaries(
    {
        "name": st.sampled_from([*names, "tokens", ""]) | json_values,
        "datatype": datatypes | json_values,
        "shape": st.lists(st.integers(-2, 3) | st.integers(), max_size=4) | json_values,
    },
    optional={
        "data": st.lists(json_values, max_size=4) | json_values,
        "parameters": sizes | json_values,
    },
)
headers = st.fixed_dictionaries(
    {"inputs": st.lists(inputs, max_size=4) | json_values},
    optional={"outputs": json_values, "parameters": json_values, "id": json_values},
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from(TASKS),
    headers | json_values,
    st.binary(max_size=40),
    st.integers(-1, 1) | st.none(),
)
def test_any_json_and_any_tensors(model: str, header: Any, rest: bytes, off: int | None) -> None:
    text = json.dumps(header).encode()
    check(text + rest, None if off is None else str(len(text) + off), MODELS[model])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_good_request_with_some_bytes_changed(data: st.DataObject) -> None:
    inputs = {"image": np.array([[b"image"]], object), "labels": np.array([[b"a", b"b"]], object)}
    inputs["alpha"] = np.ones((1, 1), np.float32)
    body, headers = encode(Request("infer", "classify", inputs=inputs))
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(changed)) | st.just(len(changed)))
    check(bytes(changed[:end]), headers["Inference-Header-Content-Length"], MODELS["classify"])
