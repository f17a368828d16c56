"""What of a request is right, without a server: the parser between strangers and Triton."""

from __future__ import annotations

import json
import math
import re
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radapter_client import Request
from radapter_client._http import encode
from radapter_serve.gateway.errors import CODES, Refused
from radapter_serve.gateway.kserve import IMAGES, MAX_JSON_VALUES, Inference, Model, read
from radapter_serve.release.release import TASKS
from radapter_serve.release.tensors import NUMPY
from tests.helpers.fake_upstream import config

MODELS = {name: config(name) for name in TASKS}


def tensor(
    name: str, datatype: str, shape: Any, data: Any = None, size: Any = None, **more: Any
) -> dict[str, Any]:
    made = {"name": name, "datatype": datatype, "shape": shape, **more}
    if data is not None:
        made["data"] = data
    return made if size is None else {**made, "parameters": {"binary_data_size": size}}


TEXT = tensor("text", "BYTES", [1, 1], ["a cat"])
IMAGE = tensor("image", "BYTES", [1], ["eA=="])
LABELS = tensor("labels", "BYTES", [2], ["a", "b"])


def ask(model: str, *inputs: Any, rest: bytes | None = None, **more: Any) -> Inference:
    head = json.dumps({"inputs": inputs, **more}).encode()
    return read(head + (rest or b""), None if rest is None else str(len(head)), MODELS[model])


def values(inference: Inference) -> dict[str, tuple[str, Any]]:
    """Type and values of each input, nested as its shape is."""
    return {name: (str(one.dtype), one.tolist()) for name, one in inference.inputs.items()}


def test_a_request_in_json_becomes_arrays() -> None:
    found = ask(
        "classify",
        tensor("image", "BYTES", [2, 1], [["eA=="], ["eQ=="]]),
        tensor("labels", "BYTES", [2, 3], ["a", "ü", "", "a", "ü", "猫\0"]),
        tensor("top_k", "INT32", [2, 1], [5, -7]),
        tensor("alpha", "FP32", [2, 1], [[0.1], [1]]),
        id="one",
        outputs=[{"name": "label"}],
        parameters={"timeout": 2_500_000},
    )
    assert values(found) == {
        "image": ("object", [[b"eA=="], [b"eQ=="]]),
        "labels": ("object", [["a", "ü", ""], ["a", "ü", "猫\0"]]),
        "top_k": ("int32", [[5], [-7]]),
        "alpha": ("float32", [[float(np.float32(0.1))], [1]]),
    }
    assert (found.id, found.timeout, found.binary) == ("one", 2.5, frozenset())
    assert (found.model, found.version, found.outputs) == ("classify", "", ("label",))
    assert found.images == 2


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


def test_what_is_true_or_false() -> None:
    flag = partial(tensor, "multi_label", "BOOL", [1, 1])
    for asked in (
        ask("classify", *CLASSIFY, flag([True])),
        ask("classify", *CLASSIFY, flag([[True]])),
        ask("classify", *CLASSIFY, flag(size=1), rest=b"\1"),
    ):
        assert values(asked)["multi_label"] == ("bool", [[True]])
    for data in ([1], ["true"], [None], [1.0]):
        with pytest.raises(Refused, match="input multi_label are not all true or false"):
            ask("classify", *CLASSIFY, flag(data))
    with pytest.raises(Refused, match="multi_label holds a byte that is neither 0 nor 1"):
        ask("classify", *CLASSIFY, flag(size=1), rest=b"\2")
    with pytest.raises(Refused, match="top_k are not all numbers"):
        ask("classify", *CLASSIFY, tensor("top_k", "INT32", [1, 1], [True]))


def test_outputs_in_binary() -> None:
    everything: Any = {"parameters": {"binary_data_output": True}}
    assert ask("classify", *CLASSIFY, **everything).binary == {"label", "score"}
    one = [{"name": "score", "parameters": {"binary_data": True}}, {"name": "label"}]
    assert ask("classify", *CLASSIFY, outputs=one).binary == {"score"}
    other = [{"name": "score", "parameters": {"binary_data": False}}, {"name": "label"}]
    assert ask("classify", *CLASSIFY, outputs=other, **everything).binary == {"label"}


SEARCH = [tensor("text", "BYTES", [1], ["a cat"]), tensor("index", "BYTES", [1], ["photos"])]


def test_thumbnails_in_json_are_refused_before_the_search() -> None:
    named: list[dict[str, Any]] = [{"name": "id"}, {"name": "thumbnail"}]
    with pytest.raises(Refused, match="thumbnail is no text; ask for it in binary, or name"):
        ask("retrieve", *SEARCH, outputs=named)
    unnamed = ask("retrieve", *SEARCH)
    assert unnamed.outputs == ("id", "score", "metadata", "index_version")
    assert ask("retrieve", *SEARCH, outputs=named[:1]).binary == frozenset()
    named[1]["parameters"] = {"binary_data": True}
    assert ask("retrieve", *SEARCH, outputs=named).binary == {"thumbnail"}
    everything = ask("retrieve", *SEARCH, parameters={"binary_data_output": True})
    assert everything.binary == {"id", "score", "metadata", "thumbnail", "index_version"}


CLASSIFY = [
    tensor("image", "BYTES", [1, 1], ["eA=="]),
    tensor("labels", "BYTES", [1, 2], ["a", "b"]),
]


def segment(name: str, datatype: str, shape: Any, data: Any) -> tuple[str, list[Any]]:
    return "segment", [IMAGE, LABELS, tensor(name, datatype, shape, data)]


def text(**changes: Any) -> tuple[str, list[Any]]:
    return "embed_text", [{**TEXT, **changes}]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        # The table of the wire
        ("embed_text", []),
        ("segment", [LABELS]),
        ("embed_text", [TEXT, TEXT]),
        ("embed_text", [TEXT, tensor("alpha", "FP32", [2, 1], [0, 1])]),
        text(name="tokens"),
        text(datatype="INT32"),
        *(text(shape=shape) for shape in ([1], [1, 1, 1], [], [1, 2])),
        text(shape=[65, 1], data=["a"] * 65),
        # JSON
        ("embed_text", [1]),
        *(text(shape=[size, 1]) for size in (0, -1, 2**31, 2**80, 1.0, True)),
        *(text(shape=shape) for shape in ("11", [1] * 9)),
        *(text(data=data) for data in (["a", "b"], [], [1], [None], [{"a": 1}], [[["a"]]], "a")),
        text(name="t" * 65),
        text(more=1),
        text(parameters={"binary_data_size": 1}),
        text(parameters={"shared_memory_region": "x"}),
        ("embed_text", [tensor("text", "BYTES", [1, 1])]),
        ("embed_text", [tensor("text", "BYTES", [1, 1], size=5)]),
        # Numbers
        *(segment("threshold", "FP32", [1], [value]) for value in (10**400, 1e39, "0.5", True)),
        *(segment("refine", "INT32", [1], [value]) for value in (2**31, 2**70, 1.0, True)),
        segment("proposals", "UINT8", [1, 1, 1], [256]),
        segment("proposals", "UINT8", [1, 1, 2], [[[1], 2]]),
    ],
)
def test_inputs_that_are_refused(model: str, inputs: list[Any]) -> None:
    with pytest.raises(Refused) as caught:
        ask(model, *inputs)
    assert (caught.value.status, caught.value.code) == (400, "invalid_argument")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (text(name="tokens"), "embed_text has no input 'tokens'; it has text, alpha"),
        (text(datatype="INT32"), "text is 'INT32'; BYTES is taken"),
        (text(shape=[1, 2]), "text has shape [1, 2]; [-1, 1] is taken, where -1 is any number"),
        (text(data=["a", "b"]), "the input text has 2 values; the shape [1, 1] has 1"),
        (text(shape=[0, 1]), "'inputs.0.shape.0': Input should be greater than 0"),
        (segment("refine", "INT32", [1], [2**31]), "a number of the input refine does not fit"),
    ],
)
def test_a_refusal_names_the_input_and_what_is_allowed(
    request_: tuple[str, list[Any]], message: str
) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        ask(request_[0], *request_[1])


@pytest.mark.parametrize(
    "more",
    [
        {"outputs": [{"name": "mask"}]},
        {"outputs": [{"name": "text_embeds"}] * 2},
        {"outputs": [{"name": "text_embeds", "parameters": {"classification": 3}}]},
        {"outputs": [{"name": "x"}] * 65},
        {"parameters": {"sequence_id": 1}},
        {"parameters": {"timeout": 0}},
        {"parameters": {"binary_data_output": 1}},
        {"id": "x" * 129},
        {"more": {}},
    ],
)
def test_other_parts_that_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"^\[invalid_argument\] "):
        ask("embed_text", TEXT, **more)


@pytest.mark.parametrize(
    ("rows", "size", "rest", "message"),
    [
        (1, 5, b"\1\0\0\0", "has 5 bytes, 4 are left"),
        (1, 4, b"\0\0\0\0x", "1 bytes follow the last input"),
        (1, 5, b"\0\0\0\0x", "has 1 bytes after its 1 values"),
        *((1, len(rest), rest, "beyond its end") for rest in (b"\0\0\0", b"\1\0\0\0", b"\xff" * 4)),
        (2, 4, b"\0\0\0\0", "value 2 of 2 of the input text goes beyond its end"),
        (1, 5, b"\1\0\0\0\xff", "value 1 of 1 of the input text is not UTF-8"),
        (1, 7, b"\3\0\0\0\xed\xa0\x80", "is not UTF-8"),
        *((1, size, b"", "binary_data_size") for size in (-1, 2**62, 1.5)),
    ],
)
def test_texts_in_binary_that_are_refused(rows: int, size: Any, rest: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message):
        ask("embed_text", tensor("text", "BYTES", [rows, 1], size=size), rest=rest)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_in_binary_that_are_refused(value: float) -> None:
    threshold = partial(tensor, "threshold", "FP32", [1])
    with pytest.raises(Refused, match="threshold holds a value that is not a finite number"):
        ask("segment", IMAGE, LABELS, threshold(size=4), rest=struct.pack("<f", value))
    with pytest.raises(Refused, match=re.escape("threshold has 3 bytes; [1] of FP32 are 4")):
        ask("segment", IMAGE, LABELS, threshold(size=3), rest=b"abc")


def test_a_shape_that_promises_the_world_is_refused_before_memory_is_taken() -> None:
    huge = [2**31 - 1] * 3
    for one in (
        tensor("proposals", "UINT8", huge, [1]),
        tensor("proposals", "UINT8", huge, size=0),
    ):
        with pytest.raises(Refused, match=r"proposals has (1 values|0 bytes)"):
            ask("segment", IMAGE, LABELS, one, rest=b"" if "parameters" in one else None)
    with pytest.raises(Refused, match="at most 131072 are allowed"):
        ask("classify", CLASSIFY[0], tensor("labels", "BYTES", [1, 2**31 - 1], size=0), rest=b"")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"null",
        b"[]",
        b"{}",
        b'"\xff"',
        b'{"inputs": null}',
        b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["\xff"]}]}',
        (
            b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data":'
            b' ["\\ud800"]}]}'
        ),
        b'{"inputs": [{"name": "alpha", "datatype": "FP32", "shape": [1, 1], "data": [NaN]}]}',
        b"[" * 1_000_000,
        b'{"inputs":' * 100_000,
        b'{"inputs": [{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
    ],
)
def test_json_that_is_none(body: bytes) -> None:
    with pytest.raises(Refused, match=r"^\[invalid_argument\] .{10,300}$"):
        read(body, None, MODELS["embed_text"])


def test_json_with_too_many_values_is_refused_unread() -> None:
    body = b'{"inputs": [' + b"1," * MAX_JSON_VALUES + b"1]}"
    with pytest.raises(Refused, match="more than 1048576 values; send tensors in binary"):
        read(body, None, MODELS["embed_text"])


@pytest.mark.parametrize("length", ["", "-1", "0", "x", "1e3", "9" * 5000, "٣", "+5", " 5", "1_0"])
def test_header_lengths_that_are_refused(length: str) -> None:
    with pytest.raises(Refused, match="Inference-Header-Content-Length is"):
        read(json.dumps({"inputs": [TEXT]}).encode(), length, MODELS["embed_text"])


def checked(body: bytes, length: str | None, model: Model) -> None:
    """A body is either refused in one line with a known code, or its arrays fit the model."""
    try:
        found = read(body, length, model)
    except Refused as error:
        assert 400 <= error.status < 500 and error.code in CODES
        assert re.fullmatch(r"\[[a-z_]+\] .{1,500}", str(error)) and str(error).isprintable()
        return
    for name, array in found.inputs.items():
        spec = model.inputs[name]
        assert array.dtype == NUMPY[spec.datatype]
        assert array.size and array.ndim == len(spec.dims) + bool(model.max_batch_size)
        if spec.datatype == "BYTES":
            kind = bytes if name in IMAGES else str
            assert all(type(one) is kind for one in array.ravel())
    assert {name for name, spec in model.inputs.items() if not spec.optional} <= set(found.inputs)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
names = st.sampled_from(
    [*{name for model in MODELS.values() for name in model.inputs}, "tokens", ""]
)
inputs = st.fixed_dictionaries(
    {
        "name": names | json_values,
        "datatype": (
            st.sampled_from(["BYTES", "FP32", "INT32", "UINT8", "BOOL", "FP64", ""]) | json_values
        ),
        "shape": st.lists(st.integers(-2, 3) | st.integers(), max_size=4) | json_values,
    },
    optional={
        "data": st.lists(json_values, max_size=4) | json_values,
        "parameters": (
            st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-2, 20)})
            | json_values
        ),
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
    checked(text + rest, None if off is None else str(len(text) + off), MODELS[model])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.text(max_size=5) | st.integers().map(str) | st.none())
def test_any_bytes(body: bytes, length: str | None) -> None:
    checked(body, length, MODELS["classify"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_good_request_with_some_bytes_changed(data: st.DataObject) -> None:
    given = {"image": np.array([[b"image"]], object), "labels": np.array([[b"a", b"b"]], object)}
    body, headers = encode(
        Request("infer", "classify", inputs=given | {"alpha": np.ones((1, 1), np.float32)})
    )
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = (
        changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed
    )
    checked(bytes(cut), headers["Inference-Header-Content-Length"], MODELS["classify"])
