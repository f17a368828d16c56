"""OpenAI's API: by the clients that people use (openai, LangChain's and LlamaIndex's), and without
any.
"""

from __future__ import annotations

import base64
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Reply
from radapter_serve.gateway import openai as gateway
from radapter_serve.gateway.upstream import Inference, Refused
from tests.gateway.test_gateway import heard
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import Served, config, serving, until
from tests.helpers.small_release import png

PNG = png(1, 9, 7)
IMAGE = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
OF_IMAGE = [len(PNG), PNG[0]]  # what the stand-in makes of it


def ask(served: Served, **body: Any) -> tuple[int, Any]:
    return served.ask("/v1/embeddings", {"model": "radapter", **body})[:2]


def refusal(served: Served, **body: Any) -> tuple[int, str, str | None]:
    """Status, code and param of a refusal, which is of OpenAI's form and one line."""
    status, answer = ask(served, **body)
    assert list(answer) == ["error"]
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) < 700
    kinds = {429: "rate_limit_error"} | dict.fromkeys((500, 503, 504), "server_error")
    assert error["type"] == kinds.get(status, "invalid_request_error")
    return status, error["code"], error["param"]


# Clients


@pytest.mark.integration
def test_the_client_of_openai(served: Served) -> None:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        # It asks for base64 by itself.
        answer = client.embeddings.create(model="radapter", input=["abc", IMAGE, "ü"])
        assert [row.index for row in answer.data] == [0, 1, 2]
        assert [row.embedding for row in answer.data] == [[3, 97], OF_IMAGE, [2, 195]]
        assert answer.model == "radapter-1"
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2)
        plain = client.embeddings.create(model="radapter-1", input="abc", encoding_format="float")
        assert plain.data[0].embedding == [3, 97]
        assert served.upstream.asked[-1].version == "1"
        assert [model.id for model in client.models.list()] == ["radapter", "radapter-1"]
        model = client.models.retrieve("radapter-1")
        assert (model.id, model.object, model.owned_by) == ("radapter-1", "model", "radapter-serve")
        assert model.created == 1767225600  # 2026-01-01, as the stand-in's release says
        assert (model.model_extra or {})["embed_dim"] == 4

        # Refusals become its exceptions.
        with pytest.raises(openai.NotFoundError, match="there are radapter, radapter-1") as caught:
            client.embeddings.create(model="text-embedding-3-small", input="a")
        assert (caught.value.code, caught.value.param) == ("unknown_model", "model")
        for status, kind in ((429, openai.RateLimitError), (503, openai.InternalServerError)):
            served.upstream.error = Refused(status, "overloaded", "too much")
            with pytest.raises(kind):
                client.embeddings.create(model="radapter", input="a")


@pytest.mark.slow
@pytest.mark.integration
def test_the_clients_of_langchain_and_llama_index(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_index.core
    import openai
    from langchain_openai import OpenAIEmbeddings
    from llama_index.embeddings.openai import OpenAIEmbedding

    url = f"{served.url}/v1"
    inputs = ["abc", IMAGE, "ü"]
    options: Any = {"model": "radapter", "base_url": url, "api_key": "none"}
    chain = OpenAIEmbeddings(check_embedding_ctx_length=False, chunk_size=2, **options)
    assert chain.embed_documents(inputs) == [[3, 97], OF_IMAGE, [2, 195]]
    llama = OpenAIEmbedding(
        model_name="radapter", api_base=url, api_key="none", embed_batch_size=2, max_retries=0
    )
    assert llama.get_text_embedding_batch(inputs) == [[3, 97], OF_IMAGE, [2, 195]]
    # By default LangChain sends tokens of another model. Its vocabulary comes with LlamaIndex.
    folder = Path(str(llama_index.core.__file__)).parent / "_static" / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        OpenAIEmbeddings(**options).embed_query("abc")


# Requests to Triton


def test_numbers_that_json_cannot_hold(served: Served) -> None:
    served.upstream.configs["embed_text"] = config("embed_text", release(1) | {"embed_dim": 2**20})
    assert refusal(served, input=["a", "b"]) == (400, "invalid_argument", "encoding_format")
    assert ask(served, input=["a", "b"], encoding_format="base64")[0] == 200


def test_a_release_without_a_width_is_none_of_ours(served: Served) -> None:
    served.upstream.configs["embed_text"] = config("embed_text", {"version": 1})
    assert refusal(served, input="a")[:2] == (503, "server_unavailable")
    assert not served.upstream.asked


def test_order_is_kept_over_several_batches(served: Served) -> None:
    inputs = ["x" * (place + 1) if place % 3 else IMAGE for place in range(200)]
    status, answer = ask(served, input=inputs)
    expected = [[place + 1, ord("x")] if place % 3 else OF_IMAGE for place in range(200)]
    assert (status, answer["object"]) == (200, "list")
    assert answer["data"] == [
        {"object": "embedding", "index": place, "embedding": embedding}
        for place, embedding in enumerate(expected)
    ]
    rows = [
        (request.model, len(next(iter(request.inputs.values()))))
        for request in served.upstream.asked
    ]
    texts = [("embed_text", count) for count in (64, 64, 5)]
    assert rows == [*texts, ("embed_image", 64), ("embed_image", 3)]


def test_one_release_makes_all_embeddings(served: Served) -> None:
    """The first batch says which; where another release takes over in between, all are made
    anew. A release that is new is found at once.
    """
    answer = served.upstream.infer
    calls = []

    async def switching(inference: Inference, timeout: float, entry: Any) -> Reply:
        calls.append((inference.model, inference.version))
        if len(calls) == 2:
            raise Refused(404, "unknown_model", "no version 1")
        reply = await answer(inference, timeout, entry)
        return replace(reply, version=1 if len(calls) == 1 else 2)

    served.upstream.infer = switching  # type: ignore[method-assign]
    served.upstream.older["embed_image", "2"] = served.upstream.configs["embed_image"]
    status, content = ask(served, input=["abc", IMAGE])
    assert status == 200 and content["model"] == "radapter-2"
    first = [("embed_text", ""), ("embed_image", "1")]
    assert calls == [*first, ("embed_text", ""), ("embed_image", "2")]

    served.upstream.infer = answer  # type: ignore[method-assign]
    configs = {name: config(name, release(1), release(2)) for name in served.upstream.configs}
    served.upstream.configs = configs
    served.upstream.older = {(name, "2"): config for name, config in configs.items()}
    assert ask(served, input="a", model="radapter-2")[1]["model"] == "radapter-2"
    models = served.ask("/v1/models")[1]["data"]
    assert [model["id"] for model in models] == ["radapter", "radapter-2", "radapter-1"]
    named = ("version", "alpha", "architecture", "precision", "runtime", "embed_dim")
    assert models[0] == {
        **{"id": "radapter", "object": "model", "owned_by": "radapter-serve"},
        **{"created": 1767225600, **{name: release(2)[name] for name in named}},
    }


def test_options_reach_both_tasks_and_refusals_name_the_field(served: Served) -> None:
    assert ask(served, input=["a", IMAGE, "b"], alpha=0.25, dimensions=4, user="ann")[0] == 200
    texts, images = served.upstream.asked[-2:]
    assert texts.inputs["text"].tolist() == [[b"a"], [b"b"]]
    assert images.inputs["image"].tolist() == [[PNG]]
    assert texts.inputs["alpha"].tolist() == [[0.25], [0.25]]
    assert texts.inputs["alpha"].dtype == np.float32
    assert refusal(served, input="a", dimensions=3) == (400, "invalid_argument", "dimensions")
    # Refusals of the tasks, and faults
    for inputs, code, message, param in (
        (["a"], "invalid_argument", "alpha is 0.25, but this release ...", "alpha"),
        ([IMAGE, IMAGE], "invalid_image", "image 2 of 2: the image is broken", "input[1]"),
        ([IMAGE], "image_too_large", "it has too many pixels", "input[0]"),
    ):
        served.upstream.error = Refused(400, code, message)
        assert refusal(served, input=inputs) == (400, code, param)
    served.upstream.error = RuntimeError("a bug at /home/x")
    assert refusal(served, input="a")[:2] == (500, "internal_error")
    served.upstream.error = None
    served.upstream.outputs = {"image_embeds": np.zeros((1, 2), np.float32)}
    assert refusal(served, input="a")[:2] == (503, "server_unavailable")


def test_a_text_with_its_image_is_their_weighted_sum(served: Served) -> None:
    """The stand-in embeds a text or an image as its length and its first byte."""
    text = np.array([3.0, 97])
    image = np.array(OF_IMAGE, np.float64)
    both = {"text": "abc", "image": IMAGE}
    inputs = ["ü", both, {**both, "weights": [0.25, -1]}, IMAGE, {**both, "weights": [0, 3]}]
    answer = ask(served, input=inputs)[1]
    rows = [row["embedding"] for row in answer["data"]]
    assert (rows[0], rows[3]) == ([2, 195], OF_IMAGE)
    for row, total in ((1, text + image), (2, text / 4 - image), (4, image)):
        np.testing.assert_allclose(rows[row], total / np.linalg.norm(total), rtol=1e-6)
    assert answer["usage"]["prompt_tokens"] == 4

    for wrong in (
        {"text": "abc"},
        {**both, "image": "https://example.org/a.png"},
        {**both, "image": "abc"},
        {**both, "text": " "},
        {**both, "weights": [1]},
        {**both, "weights": [1, "1"]},
        {**both, "weights": [0, 0]},
        {**both, "other\n": 1},
    ):
        assert refusal(served, input=["a", wrong])[::2] == (400, "input[1]")
    assert refusal(served, input=[both], modality="text")[0] == 400
    served.upstream.outputs = {
        f"{part}_embeds": np.array([[0.6, 0.8]], np.float32) for part in ("text", "image")
    }
    assert refusal(served, input=[{**both, "weights": [1, -1]}])[0] == 400


def test_base64_has_32_bits_a_number_or_16_on_request(served: Served) -> None:
    for dtype, kind in ((None, "<f4"), ("float32", "<f4"), ("float16", "<f2")):
        asked = {"embed_dtype": dtype} if dtype else {}
        [row] = ask(served, input="abc", encoding_format="base64", **asked)[1]["data"]
        assert np.frombuffer(base64.b64decode(row["embedding"]), kind).tolist() == [3, 97]
    for asked in ({"embed_dtype": "float16"}, {"embed_dtype": "int8"}):
        assert refusal(served, input="abc", **asked)[::2] == (400, "embed_dtype")


# The rules of the gateway hold here too


def test_limits_and_metrics() -> None:
    with (
        serving(max_concurrent=1, max_queue=0, timeout=1) as served,
        ThreadPoolExecutor(1) as pool,
    ):
        served.hold()
        first = pool.submit(ask, served, input="a")
        until(lambda: served.upstream.asked)
        assert refusal(served, input="b")[:2] == (429, "overloaded")
        assert first.result()[0] == 504
        served.let_go()
        assert ask(served, input="a")[0] == 200 and 0.5 < served.upstream.timeouts[-1] <= 1
        text = served.metrics()
        for code in ("ok", "overloaded", "timed_out"):
            assert f'requests_total{{code="{code}",task="embeddings"}} 1.0' in text
        assert "radapter_gateway_body_bytes 0.0" in text


def test_what_is_closed_is_refused_in_the_form_of_openai(served: Served) -> None:
    for method, path, status in (("GET", "embeddings", 405), ("POST", "chat/completions", 404)):
        code, answer, _ = served.ask(f"/v1/{path}", b"{}", method)
        error = answer["error"]
        assert (code, error["code"]) == (status, "not_found")
        assert error["type"] == "invalid_request_error" and "/v1/embeddings" in error["message"]
    # The form is that of the path, whatever the host is called.
    with served.connection(b"GET /v1/none HTTP/1.1\r\nHost: a/v2/\r\n\r\n") as it:
        answer = heard(it)
    assert answer.startswith(b"HTTP/1.1 403") and b'{"error":{"message":"without' in answer


# Bodies, without a server

JPEG, WEBP = (png(1, 9, 7, kind) for kind in ("JPEG", "WEBP"))
DATA = "data:image/png;base64,"
PIXEL = IMAGE.removeprefix(DATA)


def url(file: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(file).decode()}"


def read_inputs(inputs: Any, **more: Any) -> gateway.EmbeddingsRequest:
    return gateway.read(json.dumps({"model": "radapter", "input": inputs, **more}).encode())


def test_texts_and_images_find_their_places() -> None:
    inputs = ["a cat", url(PNG), "ü\0", url(JPEG, "image/JPEG"), url(WEBP, "image/webp")]
    request = read_inputs(inputs, alpha=1, user="ann")
    assert request.texts == {0: b"a cat", 2: b"\xc3\xbc\0"}
    assert request.images == {1: PNG, 3: JPEG, 4: WEBP}
    assert (request.body.model, request.body.alpha) == ("radapter", 1.0)
    assert request.tokens == 2 + 1  # "a cat" has five characters
    # A file counts, not what it is called.
    assert read_inputs(url(JPEG, "image/png")).images == {0: JPEG}
    assert read_inputs(["see http://a.example/b.png", "data: what we have"]).images == {}
    texts = [url(PNG), "https://x.example"]
    assert [*read_inputs(texts, modality="text").texts.values()] == list(map(str.encode, texts))
    with pytest.raises(Refused, match=r"input\[1\] is not an image"):
        read_inputs([url(PNG), "a cat"], modality="image")


INPUTS: list[tuple[str, str, list[Any]]] = [
    ("invalid_argument", "input", [None, [], {}, 7, [1, 2, 3], [[1, 2], [3]], ["a"] * 2049]),
    ("invalid_argument", "input[0]", [[[1.5]], [True], [{"image": "x"}], "", "x" * 10_001]),
    ("invalid_argument", "input[1]", [["a", 1], ["a", None], ["a", ["b"]], ["a", "\n\t "]]),
    ("invalid_argument", "input[0]", ["data:image/png;base64", f"data:image/png,{PIXEL}"]),
    ("invalid_argument", "input[0]", ["data:,hello", f"data:image/gif;base64,{PIXEL}"]),
    ("invalid_argument", "input[0]", ["data:image/" + "x" * 10**6, "https://a.example/b.png"]),
    ("invalid_image", "input[0]", [DATA, f"{DATA}!!!!", f"{DATA}{PIXEL[:-1]}", f"{DATA}üüüü"]),
    ("invalid_image", "input[0]", [f"{DATA}{PIXEL[:8]}\n{PIXEL[8:]}", url(b"GIF89a")]),
]


@pytest.mark.parametrize(("code", "param", "values"), INPUTS)
def test_inputs_that_are_refused(code: str, param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(Refused) as caught:
            read_inputs(value)
        assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
        assert len(caught.value.message) < 400 and caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("model", [3, None, "x" * 201]),
        ("dimensions", ["4", 4.5, True]),
        ("alpha", [1.01, -0.1, "0.5", math.nan, math.inf, True]),
        *(("encoding_format", ["hex"]), ("modality", ["audio"]), ("messages", [[]])),
        ("x" * 5000, [1]),
    ],
    ids=range(7),
)
def test_fields_that_are_refused(param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(Refused) as caught:
            read_inputs("a", **{param: value})
        assert caught.value.code == "invalid_argument"
        assert param[:60] == str(caught.value.param)
        assert len(json.dumps(gateway.refusal(caught.value))) < 500
