"""OpenAI's way in, by the clients that people use: openai, LangChain's and LlamaIndex's, in front
of a stand-in.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import urllib3

from radapter_client import Reply
from radapter_serve.gateway.errors import Refused
from radapter_serve.gateway.keys import new_key
from radapter_serve.gateway.kserve import Inference
from tests.gateway.test_gateway import heard, talking, until
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import Served, config, serving
from tests.helpers.small_release import png

if TYPE_CHECKING:  # it takes long to load, so tests load it as they need it
    import openai

pytest.importorskip("openai", reason="pip install -e '.[integrations]'")
pytestmark = pytest.mark.integration
PNG = png(1, 9, 7)
IMAGE = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
OF_IMAGE = [len(PNG), PNG[0]]  # what the stand-in makes of it


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def client_of(served: Served, **options: Any) -> openai.OpenAI:
    import openai

    return openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", **{"max_retries": 0, **options}
    )


def ask(served: Served, **body: Any) -> tuple[int, Any]:
    """Status and JSON of an answer, without any client."""
    answer = urllib3.request(
        "POST", f"{served.url}/v1/embeddings", json={"model": "radapter", **body}, timeout=20
    )
    return answer.status, json.loads(answer.data)


def refusal(served: Served, **body: Any) -> tuple[int, str, str | None, str]:
    """Status, code, param and message of a refusal, which is of OpenAI's form and one line."""
    status, answer = ask(served, **body)
    assert list(answer) == ["error"] and set(answer["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }, answer
    error = answer["error"]
    assert (
        "\n" not in error["message"]
        and len(error["message"]) < 700
        and not error["message"].startswith("[")
    )
    kinds = {429: "rate_limit_error"} | dict.fromkeys((500, 503, 504), "server_error")
    assert error["type"] == kinds.get(status, "invalid_request_error")
    return status, error["code"], error["param"], error["message"]


# Clients


def test_the_client_of_openai(served: Served) -> None:
    with client_of(served) as client:
        found = client.embeddings.create(
            model="radapter", input=["abc", IMAGE, "ü"]
        )  # asks for base64 by itself
        assert [one.index for one in found.data] == [0, 1, 2]
        assert [one.embedding for one in found.data] == [[3, 97], OF_IMAGE, [2, 195]]
        assert found.model == "radapter-1" and (
            found.usage.prompt_tokens,
            found.usage.total_tokens,
        ) == (2, 2)
        one = client.embeddings.create(model="radapter-1", input="abc", encoding_format="float")
        assert (
            one.data[0].embedding == [3, 97]
            and one.object == "list"
            and one.data[0].object == "embedding"
        )
        assert served.upstream.asked[-1].version == "1"
        assert [model.id for model in client.models.list()] == ["radapter", "radapter-1"]
        model = client.models.retrieve("radapter-1")
        assert (model.id, model.object, model.owned_by) == ("radapter-1", "model", "radapter-serve")
        assert model.created == 1767225600  # 2026-01-01, as the stand-in's release says
        assert (model.model_extra or {})["embed_dim"] == 4


def test_errors_become_the_exceptions_of_openai(served: Served) -> None:
    import openai

    with client_of(served) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            client.embeddings.create(model="text-embedding-3-small", input="a")
        assert caught.value.code == "unknown_model" and caught.value.param == "model"
        assert "there are radapter, radapter-1" in str(caught.value)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("radapter-7")
        with pytest.raises(
            openai.BadRequestError, match="dimensions is 3; embeddings of this release have 4"
        ):
            client.embeddings.create(model="radapter", input="a", dimensions=3)
        client.embeddings.create(model="radapter", input="a", dimensions=4, user="ann")
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            client.embeddings.create(model="radapter", input=[[1, 2], [3]])
        with pytest.raises(openai.BadRequestError, match=r"input\[1\] is empty"):
            client.embeddings.create(model="radapter", input=["a", " "])
        served.upstream.error = Refused(429, "overloaded", "too much")
        with pytest.raises(openai.RateLimitError):
            client.embeddings.create(model="radapter", input="a")
        served.upstream.error = Refused(503, "restarting", "a moment")
        with pytest.raises(openai.InternalServerError):
            client.embeddings.create(model="radapter", input="a")


def test_the_client_of_openai_with_a_key_asynchronously(tmp_path: Path) -> None:
    import asyncio

    import openai

    key = new_key(tmp_path / "keys", "ann")

    async def both(url: str) -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
            return (await client.embeddings.create(model="radapter", input="abc")).data[0].embedding

    with serving(api_keys=tmp_path / "keys") as served:
        assert asyncio.run(both(served.url)) == [3, 97]
        with client_of(served) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "unauthorized"


def test_extras_of_a_request(served: Served) -> None:
    with client_of(served) as client:
        client.embeddings.create(
            model="radapter", input=["a", IMAGE, "b"], extra_body={"alpha": 0.25}
        )
        texts, images = served.upstream.asked[-2:]
        assert (texts.model, images.model) == ("embed_text", "embed_image")
        assert texts.inputs["text"].tolist() == [[b"a"], [b"b"]]
        assert images.inputs["image"].tolist() == [[PNG]]
        assert texts.inputs["alpha"].tolist() == [[0.25], [0.25]]
        assert texts.inputs["alpha"].dtype == np.float32
        served.upstream.error = Refused(
            400, "invalid_argument", "alpha is 0.25, but this release was exported at 0.5"
        )
        assert refusal(served, input="a", alpha=0.25)[:3] == (400, "invalid_argument", "alpha")
        served.upstream.error = None
        found = client.embeddings.create(
            model="radapter", input=[IMAGE], extra_body={"modality": "text"}
        )
        assert found.data[0].embedding == [len(IMAGE), ord("d")]


@pytest.mark.slow
def test_the_client_of_langchain(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai
    from langchain_openai import OpenAIEmbeddings

    options: Any = {"model": "radapter", "base_url": f"{served.url}/v1", "api_key": "none"}
    embeddings = OpenAIEmbeddings(check_embedding_ctx_length=False, chunk_size=2, **options)
    assert embeddings.embed_documents(["abc", IMAGE, "ü"]) == [[3, 97], OF_IMAGE, [2, 195]]
    assert embeddings.embed_query("abc") == [3, 97]
    # By default it sends tokens of another model. Its vocabulary comes with LlamaIndex.
    import llama_index.core

    folder = Path(str(llama_index.core.__file__)).parent / "_static" / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        OpenAIEmbeddings(**options).embed_query("abc")


@pytest.mark.slow
def test_the_client_of_llama_index(served: Served) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    embeddings = OpenAIEmbedding(
        model_name="radapter",
        api_base=f"{served.url}/v1",
        api_key="none",
        embed_batch_size=2,
        max_retries=0,
    )
    assert embeddings.get_text_embedding_batch(["abc", IMAGE, "ü"]) == [[3, 97], OF_IMAGE, [2, 195]]
    assert embeddings.get_query_embedding("abc") == [3, 97]


# What is asked of Triton


def test_order_is_kept_over_several_batches() -> None:
    with serving(max_inputs=200) as served:
        inputs = ["x" * (place + 1) if place % 3 else IMAGE for place in range(200)]
        status, found = ask(served, input=inputs)
        assert status == 200
        expected = [[place + 1, ord("x")] if place % 3 else OF_IMAGE for place in range(200)]
        assert [one["embedding"] for one in found["data"]] == expected
        rows = [(one.model, len(next(iter(one.inputs.values())))) for one in served.upstream.asked]
        assert rows == [
            ("embed_text", 64),
            ("embed_text", 64),
            ("embed_text", 5),
            ("embed_image", 64),
            ("embed_image", 3),
        ]
        assert refusal(served, input=["a"] * 201)[:3] == (400, "invalid_argument", "input")


def test_one_release_makes_all_embeddings(served: Served) -> None:
    """The first batch says which; where another release takes over in between, all are made
    anew.
    """
    answer = served.upstream.infer
    calls = []

    async def switching(asked: Inference, timeout: float, entry: Any = None) -> Reply:
        calls.append((asked.model, asked.version))
        if len(calls) == 2:
            raise Refused(404, "unknown_model", "no version 1")
        made = await answer(asked, timeout, entry)
        return replace(made, version=1 if len(calls) == 1 else 2)

    served.upstream.infer = switching  # type: ignore[method-assign]
    served.upstream.older["embed_image", "2"] = served.upstream.configs["embed_image"]
    status, found = ask(served, input=["abc", IMAGE])
    assert status == 200 and found["model"] == "radapter-2"
    assert calls == [
        ("embed_text", ""),
        ("embed_image", "1"),
        ("embed_text", ""),
        ("embed_image", "2"),
    ]


def test_a_release_that_is_new_is_found(served: Served) -> None:
    assert ask(served, input="a")[0] == 200
    configs = {name: config(name, release(1), release(2)) for name in served.upstream.configs}
    served.upstream.configs = configs
    served.upstream.older = {(name, "2"): one for name, one in configs.items()}
    assert ask(served, input="a", model="radapter-2")[1]["model"] == "radapter-2"
    with client_of(served) as client:
        assert [model.id for model in client.models.list()] == [
            "radapter",
            "radapter-2",
            "radapter-1",
        ]


def test_an_image_that_a_task_refuses_is_named_by_its_place(served: Served) -> None:
    served.upstream.error = Refused(400, "invalid_image", "image 2 of 2: the image is broken")
    assert refusal(served, input=[IMAGE, IMAGE]) == (
        400,
        "invalid_image",
        "input[1]",
        "input[1]: the image is broken",
    )
    served.upstream.error = Refused(400, "image_too_large", "it has too many pixels")
    assert refusal(served, input=[IMAGE])[2:] == ("input[0]", "input[0]: it has too many pixels")


def test_numbers_that_json_cannot_hold(served: Served) -> None:
    served.upstream.configs["embed_text"] = config("embed_text", release(1) | {"embed_dim": 2**20})
    assert refusal(served, input=["a", "b"])[1:3] == ("invalid_argument", "encoding_format")
    assert (
        ask(served, input=["a", "b"], encoding_format="base64")[0]
        == ask(served, input=["a"])[0]
        == 200
    )


# The rules of the gateway hold here too


def test_bodies_keys_places_and_metrics(tmp_path: Path) -> None:
    with (
        serving(max_body=0.01, max_concurrent=1, max_queue=0, timeout=1) as served,
        ThreadPoolExecutor(1) as pool,
    ):
        assert refusal(served, input="x" * 11_000)[:2] == (413, "too_large")
        served.hold()
        first = pool.submit(ask, served, input=["abc", IMAGE])
        until(lambda: bool(served.upstream.asked))
        assert refusal(served, input="b")[:2] == (429, "overloaded")
        served.let_go()
        assert first.result()[0] == 200
        served.hold()
        assert refusal(served, input="a")[:2] == (504, "timed_out")
        served.let_go()
        assert ask(served, input="a")[0] == 200 and 0.5 < served.upstream.timeouts[-1] <= 1
        text = urllib3.request("GET", f"{served.url}/metrics").data.decode()
        assert 'radapter_gateway_requests_total{code="ok",task="embeddings"} 2.0' in text
        assert 'radapter_gateway_requests_total{code="overloaded",task="embeddings"} 1.0' in text
        assert "radapter_gateway_body_bytes 0.0" in text


def test_a_caller_that_leaves_cancels_its_request(served: Served) -> None:
    served.hold()
    body = json.dumps({"model": "radapter", "input": "abc"}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    with talking(served, head + body):
        until(lambda: bool(served.upstream.asked))
    until(lambda: served.upstream.cancelled == 1)
    assert threading.active_count() < 50


def test_what_is_closed_is_refused_in_the_form_of_openai(served: Served) -> None:
    for method, path, status in (
        ("GET", "embeddings", 405),
        ("POST", "chat/completions", 404),
        ("POST", "models", 405),
    ):
        answer = urllib3.request(method, f"{served.url}/v1/{path}", body=b"{}")
        error = json.loads(answer.data)["error"]
        assert (answer.status, error["code"], error["type"]) == (
            status,
            "not_found",
            "invalid_request_error",
        )
        assert "/v1/embeddings" in error["message"]


@pytest.mark.parametrize("host", [b"[", b"a/v1/", b"x:y:z", b"\xff"])
def test_the_form_of_errors_is_that_of_the_path_whatever_the_host_is_called(
    served: Served, host: bytes
) -> None:
    for path, form in (
        (b"/v1/none", b'{"error":{"message":"without'),
        (b"/v2/none", b'{"error":"[unauthorized] '),
    ):
        with talking(
            served, b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (path, host)
        ) as it:
            answer = heard(it)
        assert answer.startswith(b"HTTP/1.1 403") and form in answer


def test_a_fault_of_the_gateway_tells_nothing(served: Served) -> None:
    served.upstream.error = RuntimeError("a bug at /home/x")
    assert refusal(served, input="a")[:2] == (500, "internal_error")
    served.upstream.error = None
    served.upstream.outputs = {"image_embeds": np.zeros((1, 2), np.float32)}
    assert refusal(served, input="a")[:2] == (503, "server_unavailable")
