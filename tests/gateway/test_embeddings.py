"""Checks of a body of `/v1/embeddings`, without a server."""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from radapter_serve.gateway import openai
from radapter_serve.gateway.kserve import MAX_JSON_VALUES
from radapter_serve.gateway.openai import EmbeddingsRequest, read, refusal
from radapter_serve.gateway.upstream import CODES, Refused
from tests.helpers.small_release import png

MOST = 8
PNG, JPEG, WEBP = (png(1, 9, 7, kind) for kind in ("PNG", "JPEG", "WEBP"))
PIXEL = base64.b64encode(PNG).decode()
DATA = "data:image/png;base64,"


def url(file: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(file).decode()}"


def ask(inputs: Any, **more: Any) -> EmbeddingsRequest:
    return read(json.dumps({"model": "radapter", "input": inputs, **more}).encode(), MOST)


def test_texts_and_images_find_their_places() -> None:
    inputs = ["a cat", url(PNG), "ü\0", url(JPEG, "image/JPEG"), url(WEBP, "image/webp")]
    request = ask(inputs, alpha=1, user="ann")
    assert request.texts == {0: b"a cat", 2: b"\xc3\xbc\0"}
    assert request.images == {1: PNG, 3: JPEG, 4: WEBP}
    assert (request.model, request.count, request.alpha) == ("radapter", 5, 1.0)
    assert request.tokens == 2 + 1  # "a cat" has five characters
    # A file counts, not what it is called.
    assert ask(url(JPEG, "image/png")).images == {0: JPEG}
    assert ask("see http://a.example/b.png").texts and ask("data: what we have, and have not").texts
    as_texts = [url(PNG), "https://x.example"]
    assert list(ask(as_texts, modality="text").texts.values()) == [one.encode() for one in as_texts]
    assert ask(url(PNG), modality="image").images
    with pytest.raises(Refused, match=r"input\[1\] is no image"):
        ask([url(PNG), "a cat"], modality="image")


INPUTS: list[tuple[str, str, list[Any]]] = [
    ("invalid_argument", "input", [None, [], {}, 7, [1, 2, 3], [[1, 2], [3]], ["a"] * 9]),
    ("invalid_argument", "input[0]", [[[1.5]], [True], [{"image": "x"}], "", "x" * 10_001]),
    ("invalid_argument", "input[1]", [["a", 1], ["a", None], ["a", ["b"]], ["a", "\n\t "]]),
    ("invalid_argument", "input[0]", ["data:image/png;base64", f"data:image/png,{PIXEL}"]),
    ("invalid_argument", "input[0]", ["data:,hello", f"data:image/gif;base64,{PIXEL}"]),
    ("invalid_argument", "input[0]", ["data:text/html;base64,PHN2Zz4=", f"DATA:;base64,{PIXEL}"]),
    ("invalid_argument", "input[0]", ["data:image/" + "x" * 10**6, "https://a.example/b.png"]),
    ("invalid_image", "input[0]", [DATA, f"{DATA}!!!!", f"{DATA}{PIXEL[:-1]}", f"{DATA}üüüü"]),
    ("invalid_image", "input[0]", [f"{DATA}{PIXEL[:8]}\n{PIXEL[8:]}", url(b"GIF89a")]),
]


@pytest.mark.parametrize(
    ("code", "param", "value"),
    [(code, param, value) for code, param, values in INPUTS for value in values],
)
def test_inputs_that_are_refused(code: str, param: str, value: Any) -> None:
    with pytest.raises(Refused) as caught:
        ask(value)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    assert len(caught.value.message) < 400 and caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("model", value) for value in (3, None, "x" * 201)),
        *(("dimensions", value) for value in ("4", 4.5, True)),
        *(("alpha", value) for value in (1.01, -0.1, "0.5", math.nan, math.inf, True)),
        *(("encoding_format", "hex"), ("modality", "audio"), ("messages", []), ("x" * 5000, 1)),
    ],
)
def test_fields_that_are_refused(param: str, value: Any) -> None:
    with pytest.raises(Refused) as caught:
        ask("a", **{param: value})
    assert caught.value.code == "invalid_argument"
    assert param[:60] == str(caught.value.param)[:60].removesuffix("...")
    assert len(json.dumps(refusal(caught.value))) < 500


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"{}", b'{"model": "radapter"}', b'{"input": "a"}'),
        *(
            b'{"model": "radapter", "input": %s}' % value
            for value in (
                b'"\\ud800"',
                b"[" * 100_000 + b"]" * 100_000,
                b"[" * 150 + b'"a"' + b"]" * 150,
                b"[" + b"1," * MAX_JSON_VALUES + b"1]",
                b"[" + b"9" * 100_000 + b"]",
            )
        ),
    ],
)
def test_json_that_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        read(body, MOST)
    message = caught.value.message
    assert caught.value.status == 400 and message.isprintable() and len(message) < 400


BASE64 = re.compile(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")  # RFC 4648, 4


@example(text="AA==AAAA", piece=4)  # an end in the middle, and at the end of a piece
@example(text="AAAA=", piece=4)  # Python's own decoder takes this padding
@example(text="AAAA=", piece=8)
@given(text=st.text("AB/+=\n!\u00fc", max_size=40), piece=st.sampled_from([4, 8, 64]))
def test_base64_in_pieces_is_as_in_one(text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai, "_PIECE", piece)
        patch.setattr(openai, "_MAGIC", (b"",))
        if BASE64.fullmatch(text):
            assert ask(DATA + text).images == {0: base64.b64decode(text)}
        else:
            with pytest.raises(Refused, match="broken base64"):
                ask(DATA + text)


strings = st.sampled_from(
    [url(PNG), url(PNG)[:40], "data:image/png;base64,AAAA", "http://x", "a", ""]
) | st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
optional = ("encoding_format", "dimensions", "user", "alpha", "modality", "other")
bodies = st.fixed_dictionaries(
    {"model": st.just("radapter") | values, "input": st.lists(strings, max_size=9) | values},
    optional=dict.fromkeys(optional, values),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(bodies | values, st.data())
def test_any_json_is_refused_in_words_or_sorted(body: Any, data: st.DataObject) -> None:
    text = bytearray(json.dumps(body).encode())
    if data.draw(st.booleans()):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        request = read(bytes(text), MOST)
    except Refused as error:
        assert error.status == 400 and error.code in CODES
        assert re.fullmatch(r".{1,500}", error.message) and error.message.isprintable()
        return
    places = sorted([*request.texts, *request.images])
    assert places == list(range(request.count)) and 1 <= request.count <= MOST
    assert all(one.strip() for one in request.texts.values())
