"""Each answer has a receipt; one of another adapter, α or release than was asked is refused."""

from __future__ import annotations

import asyncio
import json
import math
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radapter_client import (
    AsyncClient,
    Client,
    InvalidRequest,
    Receipt,
    Reply,
    Request,
    ServerError,
    Values,
)
from tests.helpers.stand_ins import Recorder

CALLS: dict[str, Callable[..., Any]] = {
    "classify": lambda client, **point: client.classify(b"image", ["a"], **point),
    "classify a list": lambda client, **point: client.classify([b"x"] * 5, ["a"], **point),
    "segment": lambda client, **point: client.segment(b"image", ["a"], **point),
    "search": lambda client, **point: client.search("a", index="i", **point),
    "embed_images": lambda client, **point: client.embed_images([b"image"] * 5, **point),
    "embed_texts": lambda client, **point: client.embed_texts(["a"] * 5, **point),
}
ANNA: dict[str, Any] = {"release": 1, "adapter": "anna", "alpha": 0.25}
BASE: dict[str, Any] = {"release": 1, "adapter": None, "alpha": 0.25}


class Signing(Recorder):
    """Answers with a receipt, and another one in the last row of the last batch."""

    def __init__(self, receipt: Any, last: Any = None, plain: bool = False) -> None:
        super().__init__()
        self.receipt = receipt
        self.last = receipt if last is None else last
        self.plain = plain

    def send(self, request: Request, timeout: float) -> Any:
        reply = super().send(request, timeout)
        if request.action != "infer" or self.receipt is None:
            return reply
        name = "text" if request.model == "embed_text" else "image"
        is_batch = request.model in ("classify", "embed_image", "embed_text")
        rows = len(request.inputs[name]) if is_batch else 1
        texts = [json.dumps(self.receipt)] * rows
        if rows == 1:  # the batch that is left, of five rows in batches of two
            texts = [json.dumps(self.last)]
        column = [[text] for text in texts] if is_batch else texts
        values = Values({**reply.outputs, "receipt": column})
        outputs = values if self.plain else dict(values)
        return Reply(reply.version, outputs)


def ask(call: str, receipt: Any, last: Any = None, **point: Any) -> Any:
    transport = Signing(receipt, last)
    with Client(transport=transport, release=1, batch_size=2) as client:
        return CALLS[call](client, **point)


@pytest.mark.parametrize("call", CALLS)
def test_an_adapter_and_its_alpha_are_sent_with_every_row(call: str) -> None:
    transport = Signing(ANNA)
    with Client(transport=transport, release=1, batch_size=2) as client:
        CALLS[call](client, adapter="anna", alpha=0.25)
        CALLS[call](client, adapter="anna")
    for request in transport.inferences:
        assert {*request.inputs["adapter"].ravel()} == {b"anna"}
    count = len(transport.inferences) // 2
    for request in transport.inferences[:count]:
        assert {*request.inputs["alpha"].ravel()} == {0.25}
    for request in transport.inferences[count:]:
        assert "alpha" not in request.inputs


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("point", "answered", "message"),
    [
        ({"adapter": "anna"}, {"adapter": "bob"}, "answered with adapter 'bob'.*'anna' was asked"),
        ({"adapter": "anna"}, {"adapter": None}, "answered with no adapter.*'anna' was asked"),
        ({}, {"adapter": "bob"}, "answered with adapter 'bob' at alpha 0.25, and no adapter was"),
        ({"alpha": 0.5}, {"adapter": None}, "at alpha 0.25, and no adapter at alpha 0.5 was"),
        ({"adapter": "anna", "alpha": 0.5}, {}, "at alpha 0.25, and adapter 'anna' at alpha 0.5"),
        ({"adapter": "anna", "alpha": 0.5}, {"alpha": math.nan}, "at alpha nan"),
        ({"adapter": "anna"}, {"release": 7}, "is of release 7, and release 1 answered"),
        ({"adapter": "anna"}, {"adapter": 3}, "answers, but not as Triton does"),
        ({"adapter": "anna"}, {"adapter": ""}, "answers, but not as Triton does"),
    ],
)
def test_an_answer_of_another_adapter_alpha_or_release_is_never_returned(
    call: str, point: dict[str, Any], answered: dict[str, Any], message: str
) -> None:
    good = {**(ANNA if "adapter" in point else BASE), "alpha": point.get("alpha", 0.25)}
    ask(call, good, **point)
    with pytest.raises(ServerError, match=message):
        ask(call, {**ANNA, **answered}, **point)
    with pytest.raises(ServerError, match=message):  # the last row alone is another one
        ask(call, good, {**ANNA, **answered}, **point)


@pytest.mark.parametrize("call", CALLS)
def test_a_server_without_receipts_is_older_and_answers_for_no_adapter(call: str) -> None:
    ask(call, None)
    with pytest.raises(ServerError, match="no receipt.*'anna'.*older than adapters"):
        ask(call, None, adapter="anna")


@pytest.mark.parametrize("call", ["classify a list", "embed_images", "embed_texts"])
def test_a_batch_has_a_receipt_for_each_row(call: str) -> None:
    class Short(Signing):
        def send(self, request: Request, timeout: float) -> Any:
            reply = super().send(request, timeout)
            outputs = {**reply.outputs, "receipt": reply.outputs["receipt"][:1]}
            return Reply(reply.version, outputs)

    client = Client(transport=Short(ANNA), release=1)
    with client, pytest.raises(ServerError, match="1 receipts for 5 rows"):
        CALLS[call](client, adapter="anna")


def test_another_release_than_was_asked_is_refused() -> None:
    class Newer(Recorder):
        def send(self, request: Request, timeout: float) -> Any:
            reply = super().send(request, timeout)
            return Reply(2, reply.outputs) if request.action == "infer" else reply

    client = Client(transport=Newer(), release=1)
    with client, pytest.raises(ServerError, match="release 2 answered, and release 1 was asked"):
        client.embed_texts("a")


@pytest.mark.parametrize("plain", [False, True])
def test_results_carry_their_receipt(plain: bool) -> None:
    expected = Receipt(1, "anna", 0.25)
    with Client(transport=Signing(ANNA, plain=plain), release=1) as client:
        assert client.classify(b"x", ["a"], adapter="anna").receipt == expected
        assert client.segment(b"x", ["a"], adapter="anna").receipt == expected
        assert client.search("a", index="i", adapter="anna").receipt == expected

    async def main() -> Any:
        async with AsyncClient(transport=Signing(ANNA), release=1) as client:
            return (await client.classify(b"x", ["a"], adapter="anna", alpha=0.25)).receipt

    assert asyncio.run(main()) == expected
    with Client(transport=Recorder(), release=1) as client:
        assert client.classify(b"x", ["a"]).receipt is None


def test_a_name_in_another_unicode_form_is_the_same_name() -> None:
    name = unicodedata.normalize("NFC", "jürgen")
    other = unicodedata.normalize("NFD", name)
    ask("embed_texts", {**ANNA, "adapter": name}, adapter=other)
    ask("embed_texts", {**ANNA, "adapter": other}, adapter=name)


def test_a_receipt_has_the_digest_of_the_adapter() -> None:
    receipt = {**ANNA, "adapter_digest": "0123456789ab"}
    with Client(transport=Signing(receipt), release=1) as client:
        answer = client.classify(b"x", ["a"], adapter="anna")
    assert answer.receipt == Receipt(1, "anna", 0.25, adapter_digest="0123456789ab")
    with pytest.raises(ServerError, match="answers, but not as Triton does"):
        ask("classify", {**ANNA, "adapter_digest": 3}, adapter="anna")


@pytest.mark.parametrize("call", ["embed_images", "embed_texts"])
def test_an_array_is_of_one_adapter(call: str) -> None:
    """An adapter that is replaced between two batches of a call leaves no mixed array."""
    before = {**ANNA, "adapter_digest": "0123456789ab"}
    after = {**ANNA, "adapter_digest": "ba9876543210"}
    with pytest.raises(ServerError, match="'anna' was replaced in the middle of the call"):
        ask(call, before, after, adapter="anna")


def test_an_empty_name_is_no_request_for_the_release_itself() -> None:
    for name in ("", 3):
        with pytest.raises(InvalidRequest, match="adapter"):
            ask("classify", ANNA, adapter=name)


def test_a_search_says_how_well_its_index_is_mapped() -> None:
    assert ask("search", {**BASE, "mapped": 0.875}).receipt.mapped == 0.875
    assert ask("search", BASE).receipt.mapped is None
    with pytest.raises(ServerError, match="answers, but not as Triton does"):
        ask("search", {**BASE, "mapped": "well"})


def test_an_older_server_without_receipts_is_searched() -> None:
    class Older(Recorder):
        def send(self, request: Request, timeout: float) -> Any:
            if "receipt" in request.outputs:
                raise InvalidRequest("retrieve has no output 'receipt'; it has id, score")
            return super().send(request, timeout)

    with Client(transport=Older(), release=1) as client:
        assert client.search("a", index="i")[0].id == "a.jpg"
        with pytest.raises(InvalidRequest, match="no output"):
            client.search("a", index="i", adapter="anna")


def test_numbers_of_six_digits_are_the_alpha_that_was_asked() -> None:
    third = float(np.float32(1 / 3))
    ask("classify", {**ANNA, "alpha": round(third, 6)}, adapter="anna", alpha=1 / 3)
