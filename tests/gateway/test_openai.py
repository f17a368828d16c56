"""OpenAI's API: by the clients that people use (openai, LangChain's and LlamaIndex's), and without
any.
"""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from radapter_client import Reply
from radapter_serve.gateway.access import new_key
from radapter_serve.gateway.upstream import Inference, Refused
from tests.gateway.test_gateway import heard
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import Served, config, serving, until
from tests.helpers.small_release import png

if TYPE_CHECKING:  # it takes long to load, so tests load it as they need it
    import openai

PNG = png(1, 9, 7)
IMAGE = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
OF_IMAGE = [len(PNG), PNG[0]]  # what the stand-in makes of it


def client_of(served: Served, **options: Any) -> openai.OpenAI:
    import openai

    url = f"{served.url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", **{"max_retries": 0, **options})


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
    with client_of(served) as client:
        # It asks for base64 by itself.
        found = client.embeddings.create(model="radapter", input=["abc", IMAGE, "ü"])
        assert [one.index for one in found.data] == [0, 1, 2]
        assert [one.embedding for one in found.data] == [[3, 97], OF_IMAGE, [2, 195]]
        assert found.model == "radapter-1"
        assert (found.usage.prompt_tokens, found.usage.total_tokens) == (2, 2)
        one = client.embeddings.create(model="radapter-1", input="abc", encoding_format="float")
        assert one.data[0].embedding == [3, 97]
        assert (one.object, one.data[0].object) == ("list", "embedding")
        assert served.upstream.asked[-1].version == "1"
        assert [model.id for model in client.models.list()] == ["radapter", "radapter-1"]
        model = client.models.retrieve("radapter-1")
        assert (model.id, model.object, model.owned_by) == ("radapter-1", "model", "radapter-serve")
        assert model.created == 1767225600  # 2026-01-01, as the stand-in's release says
        assert (model.model_extra or {})["embed_dim"] == 4


@pytest.mark.integration
def test_errors_become_the_exceptions_of_openai(served: Served) -> None:
    import openai

    with client_of(served) as client:
        with pytest.raises(openai.NotFoundError, match="there are radapter, radapter-1") as caught:
            client.embeddings.create(model="text-embedding-3-small", input="a")
        assert (caught.value.code, caught.value.param) == ("unknown_model", "model")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("radapter-7")
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            client.embeddings.create(model="radapter", input=[[1, 2], [3]])
        for status, kind in (
            (429, openai.RateLimitError),
            (503, openai.InternalServerError),
        ):
            served.upstream.error = Refused(status, "overloaded", "too much")
            with pytest.raises(kind):
                client.embeddings.create(model="radapter", input="a")


@pytest.mark.integration
def test_the_client_of_openai_with_a_key_asynchronously(tmp_path: Path) -> None:
    import openai

    key = new_key(tmp_path / "keys", "ann")

    async def embed(url: str) -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
            return (await client.embeddings.create(model="radapter", input="abc")).data[0].embedding

    with serving(api_keys=tmp_path / "keys") as served:
        assert asyncio.run(embed(served.url)) == [3, 97]
        with client_of(served) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.slow
@pytest.mark.integration
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
@pytest.mark.integration
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


def test_extras_of_a_request(served: Served) -> None:
    assert ask(served, input=["a", IMAGE, "b"], alpha=0.25, dimensions=4, user="ann")[0] == 200
    texts, images = served.upstream.asked[-2:]
    assert (texts.model, images.model) == ("embed_text", "embed_image")
    assert texts.inputs["text"].tolist() == [[b"a"], [b"b"]]
    assert images.inputs["image"].tolist() == [[PNG]]
    assert texts.inputs["alpha"].tolist() == [[0.25], [0.25]]
    assert texts.inputs["alpha"].dtype == np.float32
    _, answer = ask(served, input=[IMAGE], modality="text")
    assert answer["data"][0]["embedding"] == [len(IMAGE), ord("d")]
    assert refusal(served, input="a", dimensions=3) == (400, "invalid_argument", "dimensions")
    served.upstream.error = Refused(400, "invalid_argument", "alpha is 0.25, but this release ...")
    assert refusal(served, input="a", alpha=0.25) == (400, "invalid_argument", "alpha")


def test_order_is_kept_over_several_batches() -> None:
    with serving(max_inputs=200) as served:
        inputs = ["x" * (place + 1) if place % 3 else IMAGE for place in range(200)]
        status, found = ask(served, input=inputs)
        expected = [[place + 1, ord("x")] if place % 3 else OF_IMAGE for place in range(200)]
        assert status == 200 and [one["embedding"] for one in found["data"]] == expected
        rows = [(one.model, len(next(iter(one.inputs.values())))) for one in served.upstream.asked]
        texts = [("embed_text", count) for count in (64, 64, 5)]
        assert rows == [*texts, ("embed_image", 64), ("embed_image", 3)]
        assert refusal(served, input=["a"] * 201) == (400, "invalid_argument", "input")


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
    first = [("embed_text", ""), ("embed_image", "1")]
    assert calls == [*first, ("embed_text", ""), ("embed_image", "2")]


def test_a_release_that_is_new_is_found(served: Served) -> None:
    assert ask(served, input="a")[0] == 200
    configs = {name: config(name, release(1), release(2)) for name in served.upstream.configs}
    served.upstream.configs = configs
    served.upstream.older = {(name, "2"): one for name, one in configs.items()}
    assert ask(served, input="a", model="radapter-2")[1]["model"] == "radapter-2"
    names = [model["id"] for model in served.ask("/v1/models")[1]["data"]]
    assert names == ["radapter", "radapter-2", "radapter-1"]


def test_an_image_that_a_task_refuses_is_named_by_its_place(served: Served) -> None:
    served.upstream.error = Refused(400, "invalid_image", "image 2 of 2: the image is broken")
    error = ask(served, input=[IMAGE, IMAGE])[1]["error"]
    assert (error["param"], error["message"]) == ("input[1]", "input[1]: the image is broken")
    served.upstream.error = Refused(400, "image_too_large", "it has too many pixels")
    assert refusal(served, input=[IMAGE]) == (400, "image_too_large", "input[0]")


def test_numbers_that_json_cannot_hold(served: Served) -> None:
    served.upstream.configs["embed_text"] = config("embed_text", release(1) | {"embed_dim": 2**20})
    assert refusal(served, input=["a", "b"]) == (400, "invalid_argument", "encoding_format")
    assert ask(served, input=["a", "b"], encoding_format="base64")[0] == 200
    assert ask(served, input=["a"])[0] == 200


# The rules of the gateway hold here too


def test_limits_and_metrics() -> None:
    with (
        serving(max_concurrent=1, max_queue=0, timeout=0.3) as served,
        ThreadPoolExecutor(1) as pool,
    ):
        served.hold()
        first = pool.submit(ask, served, input="a")
        until(lambda: served.upstream.asked)
        assert refusal(served, input="b")[:2] == (429, "overloaded")
        assert first.result()[0] == 504
        served.let_go()
        assert ask(served, input="a")[0] == 200 and 0.1 < served.upstream.timeouts[-1] <= 0.3
        text = served.metrics()
        for code in ("ok", "overloaded", "timed_out"):
            assert f'requests_total{{code="{code}",task="embeddings"}} 1.0' in text
        assert "radapter_gateway_body_bytes 0.0" in text


def test_what_is_closed_is_refused_in_the_form_of_openai(served: Served) -> None:
    for method, path, status in (
        ("GET", "embeddings", 405),
        ("POST", "chat/completions", 404),
        ("POST", "models", 405),
    ):
        found, answer, _ = served.ask(f"/v1/{path}", b"{}", method)
        error = answer["error"]
        assert (found, error["code"]) == (status, "not_found")
        assert error["type"] == "invalid_request_error" and "/v1/embeddings" in error["message"]
    # The form is that of the path, whatever the host is called.
    head = b"GET /v1/none HTTP/1.1\r\nHost: a/v2/\r\nConnection: close\r\n\r\n"
    with served.connection(head) as it:
        answer = heard(it)
    assert answer.startswith(b"HTTP/1.1 403") and b'{"error":{"message":"without' in answer


def test_a_fault_of_the_gateway_tells_nothing(served: Served) -> None:
    served.upstream.error = RuntimeError("a bug at /home/x")
    assert refusal(served, input="a")[:2] == (500, "internal_error")
    served.upstream.error = None
    served.upstream.outputs = {"image_embeds": np.zeros((1, 2), np.float32)}
    assert refusal(served, input="a")[:2] == (503, "server_unavailable")
