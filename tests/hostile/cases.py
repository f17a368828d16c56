"""Hostile requests by number: first a list made by hand (broken HTTP, bombs, closed doors, and
values that no mutation finds), then mutations of right requests without end.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from random import Random
from typing import Any

import numpy as np

from tests.helpers.small_release import png
from tests.hostile import asks, images
from tests.hostile.asks import BROKEN, CHECKED, INDEX, KEY, REFUSED, Case, ask, message, number

MIB = 2**20
INFER = "/v2/models/embed_text/infer"
CHUNKED = {"Content-Length": None, "Transfer-Encoding": "chunked"}
TEXT = ask("embed_text", {"text": ["a striped thing"]}, binary=True)
CLASSIFY = ask("classify", {"image": [png(5, 40, 30)], "labels": ["red", "green", "blue"]})
post = partial(message, "POST", INFER)


def case(seed: int, number: int) -> Case:
    """The hostile request of a number, always the same."""
    if number < len(by_hand()):
        return by_hand()[number]
    return asks.mutation(Random(f"{seed}/{number}"))


@cache
def by_hand() -> list[Case]:
    """All requests made by hand."""
    groups = (_http, _bodies, _doors, _values, _images, _embeddings, _slow, refused_bodies)
    return [case for group in groups for case in group()]


def _http() -> Iterator[Case]:
    host = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
    get = b"GET /v2 HTTP/1.1\r\n"
    whole = host + b"\r\n"
    right = TEXT.raw()

    # Lines and headers that are not HTTP/1.1, or too long
    raw: list[bytes] = [
        b"GET /v2\r\n\r\n",
        *(b"GET /v2 HTTP/%s\r\n" % version + whole for version in (b"0.9", b"3.0", b"2.0")),
        b"\x05\x01\x00",
        *(line + b" HTTP/1.1\r\n" + whole for line in (b"HACK /v2", b"get /v2", b"GET ")),
        *(b"GET /%s HTTP/1.1\r\n" % path + whole for path in (b" v2", b"v2\0", b"v2/\xff\xfe")),
        right.replace(b"\r\n", b"\n"),
        b"GET /v2 HTTP/1.1\rHost: x\r\r",
        *(get + line + b"\r\n\r\n" for line in (b"Host", b"Host : x", b"Host: \0")),
        *(get + line + b"\r\n" + whole for line in (b": x", b"X: x\r\n y", b"X: " + b"a" * 10**6)),
        b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\n" + whole,
        get + b"X: y\r\n" * 100_000 + whole,
        b"\r\n" * 100_000,
        b" " * 10**6,
        message("GET", "/v2/models/hacked", {"host": "a", "HOST": "b"}),
        *(message("GET", url, {}) for url in ("http://169.254.169.254/a", "//a.org/v2", "*", "x")),
        *(message("CONNECT", target, {}) for target in ("127.0.0.1:8001", "/v2")),
        *(message(method, "*", {}) for method in ("TRACE", "OPTIONS")),
    ]

    # Bodies of an unclear length, and a request in one
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\n" + whole
    for transfer in (": chunked", ": chunked, identity", ": xchunked", " : chunked"):
        name, chunks = transfer.split(": ")
        raw.append(post({f"Transfer-Encoding{name}": chunks, "Content-Length": "5"}, smuggled))
    raw.append(post({"content-length": "300"}, b"x"))
    lengths = ("-1", "+5", "1e3", "0x10", "5, 5", "9" * 23, str(2**64), "²", "", "5 5", "1000")
    raw += [post({"Content-Length": length}, TEXT.body) for length in (*lengths, "0", "1", None)]
    head = post(CHUNKED)
    sizes = (b"F" * 16, b"F" * 17, b"-1", b"xyz", b"", b" 5", b"5 ", b"0x5", b"5;" + b"a" * 10**5)
    raw += [head + size + b"\r\n{}{}\r\n0\r\n\r\n" for size in (*sizes, b"2")]
    raw += [head + b"2\r\n{}\r\n", head + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 50_000 + b"\r\n"]
    for name in ("websocket", "h2c", "TLS/1.0"):
        upgrade = {"Connection": "Upgrade", "Upgrade": name, "Sec-WebSocket-Key": "A" * 24}
        raw += [message("GET", "/v2/hacked", upgrade), post(upgrade, smuggled)]
    for data in raw:
        yield Case("HTTP", data, BROKEN)

    # More than one request, and chunks
    yield Case("HTTP: body longer than said", right + b"x" * 1000, BROKEN, 2)
    bad = post({}, b"{}")
    yield Case("HTTP: pipelining", bad * 50, answers=50)
    yield Case("HTTP: pipelining, then noise", bad * 3 + b"\0\1\r\n\r\n", BROKEN, 4)
    yield Case("chunks: of one byte", head + b"1\r\n{\r\n" * 20_000 + b"0\r\n\r\n")
    part = b"100000\r\n" + bytes(MIB) + b"\r\n"
    yield Case("chunks: 200 MiB without end", lambda: head + part * 200)
    named = b"100000;" + b"a" * MIB + b"\r\n" + bytes(MIB) + b"\r\n"
    yield Case("chunks: 70 MiB of extensions", lambda: head + named * 70, BROKEN)

    # Methods, keys and other headers
    for method in ("PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "GET"):
        yield Case("methods", message(method, INFER, {}))
    for secret in (None, "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é", "a" * 9000):
        yield Case("wrong keys", post({"Authorization": secret}, TEXT.body))
    yield Case("wrong keys", message("POST", f"{INFER}?key={KEY}", {"Authorization": None}))
    values = [
        *("", "identity, gzip", "text/html", "multipart/form-data; boundary=x", "200-maybe"),
        *("0", "-1", "1", "9" * 20, "abc", "1.5", "0x10", "²", " 5 ", "a" * 5000),
    ]
    for name in ("Content-Type", "Content-Encoding", "Host", "Expect", asks.LENGTH):
        for value in (None, *values):
            for request in (TEXT, CLASSIFY):
                yield Case("headers", request.raw(headers={name: value}), CHECKED)


def _bodies() -> Iterator[Case]:
    for name in ("gzip", "deflate", "br", "gzip, gzip"):
        yield Case("bodies: compressed", post({"Content-Encoding": name}, TEXT.body))
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    bomb = partial(gzip.compress, bytes(200 * MIB), mtime=0)
    large: list[Callable[[], bytes]] = [
        lambda: post({"Content-Encoding": "gzip"}, bomb()),
        lambda: post(form, b"x" * 5 * MIB),
        lambda: post({}, b"[" * 65 * MIB),
        lambda: post({}, b" " * 60 * MIB),
        lambda: post({}, b'{"id":"' + b"a" * 60 * MIB + b'"}'),
        lambda: asks.Ask("embed_text", TEXT.head, bytes(60 * MIB), binary=True).raw(),
    ]
    for make in large:
        yield Case("bodies: large", make)
    for text in (
        b"",
        b"[" * 100_000,
        b'{"inputs":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"inputs":[{"shape":[' + b"9" * 100_000 + b"]}]}",
        b"{" + b",".join(b'"%d":0' % place for place in range(300_000)) + b"}",
        b'{"inputs":[{"data":[' + b"0," * 2_000_000 + b"0]}]}",
        b"\xef\xbb\xbf" + CLASSIFY.body[:-1],
        CLASSIFY.body.decode().encode("utf-16"),
        json.dumps({"inputs": CLASSIFY.head["inputs"] * 1000}).encode(),
    ):
        yield Case("bodies: JSON", post({}, text))


def _doors() -> Iterator[Case]:
    closed = (
        "/v2/repository/index /v2/repository/models/classify/load /v2/models/classify/stats"
        " /v2/models/classify/versions/1/stats /v2/trace/setting /v2/models/classify/trace/setting"
        " /v2/systemsharedmemory/status /v2/cudasharedmemory/region/x/register /v2/logging /v2/.."
        " /v2/metrics /v2/models/classify/../../metrics /v2/models/classify/generate"
        " /v2/health /docs /v1/chat/completions /static/../../etc/passwd //"
    )
    for path in closed.split():
        yield Case("closed doors", message("GET", path, {}))
        yield Case("closed doors", message("POST", path, {}, b'{"key":"/radapter","offset":0}'))
    for model, name in (("image_encoder", "image"), ("text_encoder", "tokens")):
        yield Case("closed doors", ask(model, {name: np.zeros((16, 16, 3), np.uint8)}).raw())
        yield Case("closed doors", message("GET", f"/v2/models/{model}/config", {}))
    names = ["../classify", "classify%00", "CLASSIFY", "classify;x", "%ff%fe", "a" * 10_000, "猫"]
    for text in asks.TEXTS:
        escaped = (f"%{byte:02x}" for byte in text.encode("utf-8", "surrogatepass"))
        names.append("".join(escaped)[:3000])
    versions = (str(2**63), "1" * 500, "0", "-1", "01", "3", "1.0", "x", "%00", "..", "١")
    for name in (*names, *(f"embed_text/versions/{version}" for version in versions)):
        yield Case("names", message("POST", f"/v2/models/{name}/infer", {}, CLASSIFY.body))


def _values() -> Iterator[Case]:
    image: list[Any] = [png(1, 20, 20)]
    search: dict[str, Any] = {"text": ["a"], "index": [INDEX]}

    # Names and conditions
    for text in asks.TEXTS:
        if text not in (INDEX, asks.LABEL_SET):
            yield Case("values", ask("retrieve", {"text": ["a"], "index": [text]}).raw())
            yield Case("values", ask("segment", {"image": image, "label_set": [text]}).raw())
    for text in (*asks.WHERE, "a" * 2001, "a" * 10_000_000):
        promise = REFUSED if len(text) > 2000 else CHECKED
        yield Case("conditions", ask("retrieve", {**search, "where": [text]}).raw(), promise)

    # Requests whose answer would take very long
    many: list[Any] = [f"label {place}" for place in range(20_000)]
    options = {"short_side": number(160), "stride": number(16), "refine": number(100)}
    wide = {"image": [png(1, 500, 250)], **options}
    for count, inputs in ((20_000, {"image": image}), (4000, wide), (900, wide)):
        request = ask("segment", {**inputs, "labels": many[:count]}, binary=True)
        yield Case("much work", request.raw(), CHECKED)
    templates = {"image": image, "labels": many, "templates": ["{}", "a {}"]}
    yield Case("much work", ask("classify", templates).raw())
    yield Case("much work", ask("classify", {"image": image, "labels": ["x" * 1001]}).raw())
    yield Case("much work", ask("embed_text", {"text": ["x" * 10_001]}).raw())


def _images() -> Iterator[Case]:
    def embeddings(name: str) -> bytes:
        return _embed(["a", _url(images.file_of(name)), _url(png())])

    def request(name: str, model: str, more: Mapping[str, Any]) -> bytes:
        return ask(model, {"image": [images.file_of(name)], **more}, binary=True).raw()

    labels = {"labels": ["a"]}
    for name in (*images.BAD, *images.ODD):
        models = {"embed_image": {}, "segment": labels}
        if "bomb" not in name and "large" not in name:
            models |= {"classify": labels, "retrieve": {"index": [INDEX]}}
        makes = [partial(request, name, model, more) for model, more in models.items()]
        for make in (*makes, partial(embeddings, name)):
            promise = REFUSED if name in images.BAD else CHECKED
            yield Case(f"images: {name.partition(':')[0]}", make, promise)


def _url(file: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(file).decode()}"


def _embed(inputs: Any, **fields: Any) -> bytes:
    content = {"model": "radapter", "input": inputs, **fields}
    return message("POST", "/v1/embeddings", {}, json.dumps(content).encode())


def _embeddings() -> Iterator[Case]:
    image = _url(png())
    refused = [_url(b"<script>", "text/html"), _url(png()[:60]), _url(image.encode()), "x" * 10_001]
    for value in (*refused, [*([image] * 70), _url(png()[:60])], "http://127.0.0.1:8002/metrics"):
        yield Case("embeddings", _embed(value))
    odd = ["file:///etc/passwd", "{{7*7}}", "a\0b", "\u202e", "data: x"]
    for value in (odd, _url(png(), "image/jpeg"), [f"text {n}" for n in range(2048)]):
        yield Case("embeddings", _embed(value), CHECKED)
    yield Case("embeddings", _embed("a", dimensions=10**400))
    yield Case("embeddings", lambda: _embed(["a"] * 100_000))
    yield Case("embeddings", lambda: _embed([1] * 3_000_000))
    yield Case("embeddings", lambda: _embed(f"data:image/png;base64,{'A' * 60 * MIB}"))


def _slow() -> Iterator[Case]:
    right = TEXT.raw()
    end = right.index(b"\r\n\r\n") + 4
    parts = [part for byte in right for part in (bytes([byte]), 0.5)]
    yield Case("slow: headers a byte at a time", parts[:180], BROKEN)
    yield Case("slow: body a byte at a time", [right[:end], *parts[2 * end : 2 * end + 180]])
    yield Case("slow: half a body", right[:-10])


def refused_bodies() -> Iterator[Case]:
    """Requests that are refused by their heads, whose bodies the gateway throws away."""
    size = 60_000
    end = b"0\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (size, bytes(size))
    doors: tuple[tuple[str, Mapping[str, str | None]], ...] = (
        (INFER, {"Authorization": None}),
        ("/v2/repository/index", {}),
        (INFER, {"Content-Type": "text/html"}),
    )
    for path, headers in doors:
        head = message("POST", path, {**headers, "Content-Length": str(size)})
        chunked = message("POST", path, {**headers, **CHUNKED})
        whole = head + bytes(size)
        yield Case("refused body", whole + whole, answers=2)
        trickle: list[bytes | float] = [b" ", 0.05]
        yield Case("refused body", [head, *trickle * 90])
        continued = whole.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n", 1)
        for data in (whole, whole[:-9], head, continued, chunked, chunked + piece * 5 + end):
            yield Case("refused body", data)
        for data in (
            chunked + piece * 50 + end,
            whole.replace(b"60000", b"5"),
            chunked + b"xyz\r\n" + piece,
            chunked + b"5\r\n" + bytes(size) + b"\r\n" + end,
            chunked + b"1\r\n \r\n" * size + end,
            head + bytes(9),
        ):
            yield Case("refused body", data, BROKEN)
