"""The suite itself: requests come again from their numbers, and the judge sees what is wrong."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from radapter_serve.contract.errors import TIMED_OUT
from tests.hostile.asks import good
from tests.hostile.campaign import run
from tests.hostile.case import BROKEN, CHECKED, REFUSED, Case
from tests.hostile.generate import by_hand, case
from tests.hostile.judge import trouble
from tests.hostile.wire import Answer, Outcome, exchange, parse

JSON = {"content-type": "application/json"}


REFUSAL = Answer(400, JSON, b'{"error": "[invalid_argument] no"}')
NO_REQUEST = Answer(
    400,
    {**JSON, "connection": "close"},
    b'{"error": "[invalid_argument] these bytes are no request of HTTP/1.1"}',
)
BARE = Answer(400, {"connection": "close"}, b"")


def refusal(text: str, status: int = 400) -> Outcome:
    return Outcome([Answer(status, JSON, json.dumps({"error": text}).encode())])


def test_a_number_is_always_the_same_request():
    numbers = range(len(by_hand()), len(by_hand()) + 300)
    first = [case(1, number) for number in numbers]
    assert first == [case(1, number) for number in numbers]
    assert len({one.raw for one in first}) > 250
    assert len({one.kind for one in first}) > 15
    assert first != [case(2, number) for number in numbers]


@pytest.mark.parametrize(
    ("promise", "outcome", "why"),
    [
        (REFUSED, refusal("[invalid_argument] the input text is missing"), None),
        (REFUSED, refusal("the input text is missing"), "without a code"),
        (REFUSED, refusal("[made_up] the input text is missing"), "without a code"),
        (REFUSED, refusal("[invalid_argument] /tmp/x/model.pbtxt"), "tells too much"),
        (REFUSED, refusal("[invalid_argument] line 3 of app.py"), "tells too much"),
        (REFUSED, refusal("[invalid_argument] " + "x" * 5000), "a refusal of"),
        (REFUSED, refusal("[internal_error] failed", 500), "status 500"),
        (REFUSED, refusal("[overloaded] wait", 429), "429"),
        (REFUSED, Outcome([Answer(400, JSON, b"<html>")]), "without JSON"),
        (REFUSED, Outcome(how="hung"), "hung"),
        (REFUSED, Outcome(how="closed"), "closed without an answer"),
        (BROKEN, Outcome(how="closed"), None),
        (BROKEN, Outcome(how="closed", rest=bytearray(b"HTTP/1.1 2")), "half an answer"),
        (CHECKED, Outcome([Answer(200, JSON, b'{"outputs":[]}')]), None),
        (REFUSED, Outcome([Answer(200, JSON, b'{"outputs":[]}')]), "as if it were right"),
        (
            CHECKED,
            Outcome([Answer(200, JSON, b'{"outputs":[{"name":"id","shape":[2],"data":["a"]}]}')]),
            "2 values",
        ),
        (
            CHECKED,
            Outcome([Answer(200, JSON, b'{"outputs":[{"name":"score","shape":[1],"data":[7]}]}')]),
            "a score",
        ),
        (
            CHECKED,
            Outcome([Answer(200, JSON, b'{"outputs":[{"name":"id","shape":')]),
            "cannot be read",
        ),
        (CHECKED, Outcome([Answer(400, JSON, b"{}")] * 2), "more than was asked for"),
        (BROKEN, Outcome([REFUSAL, NO_REQUEST]), None),
        (CHECKED, Outcome([REFUSAL, NO_REQUEST]), "more than was asked for"),
        (BROKEN, Outcome([REFUSAL, REFUSAL]), "more than was asked for"),
        (BROKEN, Outcome([REFUSAL, NO_REQUEST, NO_REQUEST]), "more than was asked for"),
        (BROKEN, Outcome([NO_REQUEST]), None),
        (BROKEN, Outcome([BARE]), "without JSON"),
        (CHECKED, Outcome([BARE]), "without JSON"),
    ],
)
def test_the_judge(promise: str, outcome: Outcome, why: str | None):
    found = trouble(Case("x", (), promise), outcome)
    assert found is None if why is None else found is not None and why in found


def test_a_caller_who_wants_it_sooner_may_hear_that_it_is_late():
    sooner = Case("x", (b'{"parameters": {"timeout": 1}}',))
    assert trouble(sooner, refusal(f"[{TIMED_OUT}] it took too long", 504)) is None
    assert trouble(Case("x", ()), refusal(f"[{TIMED_OUT}] it took too long", 504)) is not None


def test_answers_are_read_as_they_come():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    assert parse(head + b"ab", "GET", ended=False) is None
    found = parse(head + b"abcHTTP", "GET", ended=False)
    assert found is not None and (found[0].status, found[0].body, found[1]) == (
        200,
        b"abc",
        b"HTTP",
    )
    found = parse(head + b"HTTP", "HEAD", ended=False)
    assert found is not None and (found[0].body, found[1]) == (b"", b"HTTP")
    chunked = parse(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        "GET",
        ended=False,
    )
    assert chunked is not None and chunked[0].body == b"a"


def test_a_server_that_breaks_every_promise(tmp_path):
    """Answers 500 to all, so that every request of the campaign fails, is told by its number, and
    lies in a file.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    numbers = range(5000, 5020)
    with listener:
        report = run(listener.getsockname(), 1, numbers, failures=tmp_path)
        assert (
            exchange(listener.getsockname(), Case("x", (good()["embed_text"].raw(),)))
            .answers[0]
            .status
            == 500
        )
        listener.shutdown(socket.SHUT_RDWR)
    assert report.count == 20 and [failure.number for failure in report.failures] == list(numbers)
    files = sorted(tmp_path.iterdir())
    assert [file.name.split("-")[1] for file in files] == [str(number) for number in numbers]
    assert [file.read_bytes() for file in files] == [case(1, number).raw for number in numbers]


def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    assert exchange(address, Case("x", (b"GET / HTTP/1.1\r\n\r\n",))).how == "refused"
