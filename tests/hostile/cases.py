"""Hostile requests by number: first a list made by hand (broken HTTP, bombs, closed doors, and
values that no mutation finds), then mutations of right requests without end.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from typing import Any

import numpy as np

from tests.helpers.small_release import png
from tests.hostile import asks, images
from tests.hostile.asks import INDEX, KEY, TYPE, Ask, Headers, ask, good, message, number

REFUSED = "refused"  # 4xx with a code
CHECKED = "refused, or answered right"  # broken values may still be valid
BROKEN = "refused, or closed"  # broken HTTP, which may have nobody to answer to
MIB = 2**20
INFER = "/v2/models/embed_text/infer"
post = partial(message, "POST", INFER)


@dataclass(frozen=True)
class Case:
    """One hostile request on a connection: bytes, or what makes them where they are many, or parts
    with seconds to wait in between; how many answers may come; and the seconds without one after
    which the caller ends its side.
    """

    kind: str
    data: bytes | Callable[[], bytes] | Sequence[bytes | float]
    promise: str = REFUSED
    answers: int = 1
    hang_up: float | None = None

    @property
    def parts(self) -> Sequence[bytes | float]:
        if isinstance(self.data, bytes):
            return [self.data]
        return [self.data()] if callable(self.data) else self.data


def case(seed: int, number: int) -> Case:
    """The hostile request of a number, always the same."""
    if number < len(by_hand()):
        return by_hand()[number]
    kind, raw, is_http = asks.hostile(Random(f"{seed}/{number}"))
    return Case(kind, raw, BROKEN if is_http else CHECKED, hang_up=0.3 if is_http else None)


@cache
def by_hand() -> list[Case]:
    """All requests made by hand."""
    groups = (_http, _bodies, _doors, _values, _images, _embeddings, _slow, refused_bodies)
    return [case for group in groups for case in group()]


def _http() -> Iterator[Case]:
    host = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
    get = b"GET /v2 HTTP/1.1\r\n"
    whole = host + b"\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n"

    def headed(lines: bytes) -> bytes:
        first = f"POST {INFER} HTTP/1.1\r\n".encode()
        return first + lines + b"Content-Type: application/json\r\n\r\n"

    right = good()["embed_text"].raw()
    end = right.index(b"\r\n\r\n")
    raw: list[bytes] = [
        b"GET /v2\r\n\r\n",
        b"GET /v2 HTTP/0.9\r\n\r\n",
        b"GET /v2 HTTP/3.0\r\n" + whole,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\x05\x01\x00",
        *(line + b" HTTP/1.1\r\n" + whole for line in (b"HACK /v2", b"get /v2", b"GET ")),
        *(b"GET /%s HTTP/1.1\r\n" % path + whole for path in (b" v2", b"v2\0", b"v2/\xff\xfe")),
        right[:end].replace(b"\r\n", b"\n") + b"\n\n" + right[end + 4 :],
        b"GET /v2 HTTP/1.1\rHost: x\r\r",
        *(get + line + b"\r\n\r\n" for line in (b"Host", b"Host : x", b"Host: \0")),
        *(get + line + b"\r\n" + whole for line in (b": x", b"X: x\r\n y", b"X: " + b"a" * 10**6)),
        b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\n" + whole,
        get + b"X: y\r\n" * 100_000 + whole,
        b"\r\n" * 100_000,
        b" " * 10**6,
        headed(b"Content-Length: 1\r\n" + host + b"Content-Length: 300\r\n"),
        post({"Content-Length": "1000"}, b'{"inputs"'),
        message("GET", "/v2/models/hacked", {"Host": None}),
        message("GET", "/v2/models/hacked", {"host": "a", "HOST": "b"}),
    ]
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\n" + whole
    for transfer in (b": chunked", b": chunked, identity", b": xchunked", b" : chunked"):
        lines = b"Content-Length: 5\r\nTransfer-Encoding" + transfer + b"\r\n" + host
        raw.append(headed(lines) + smuggled)
    body = good()["embed_text"].body
    lengths = ("-1", "+5", "1e3", "0x10", "5, 5", "9" * 23, str(2**64), "\u00b2", "", "5 5")
    raw += [post({"Content-Length": length}, body) for length in lengths]
    targets = ("http://169.254.169.254/latest", "//example.org/v2", "*", "x")
    others = (("CONNECT", "127.0.0.1:8001"), ("CONNECT", "/v2"), ("TRACE", "/v2"), ("OPTIONS", "*"))
    pairs = (*(("GET", target) for target in targets), *others)
    raw += [message(method, target, {}) for method, target in pairs]
    for name in ("websocket", "h2c", "TLS/1.0"):
        upgrade: Headers = {"Connection": "Upgrade", "Upgrade": name, "Sec-WebSocket-Key": "A" * 24}
        raw.append(message("GET", "/v2/hacked", upgrade))
    sizes = (b"F" * 16, b"F" * 17, b"-1", b"xyz", b"", b" 5", b"5 ", b"0x5", b"5;" + b"a" * 10**5)
    head = headed(chunked + host)
    raw += [head + size + b"\r\n" + body + b"\r\n0\r\n\r\n" for size in (*sizes, b"2")]
    raw += [head + b"2\r\n{}\r\n", head + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 50_000 + b"\r\n"]
    for data in raw:
        yield Case("HTTP", data, BROKEN, hang_up=1.0)
    for method in ("PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "GET"):
        yield Case("HTTP: methods", message(method, INFER, {}))
    yield Case("HTTP: Expect", post({"Expect": "200-maybe"}, b"x"))
    yield Case("HTTP: body longer than said", right + b"x" * 1000, BROKEN, 2, 1.0)
    bad = post({}, b"{}")
    yield Case("HTTP: pipelining", bad * 50, answers=50)
    yield Case("HTTP: pipelining, then noise", bad * 3 + b"\0\1\r\n\r\n", BROKEN, 4, 1.0)
    yield Case("chunks: of one byte", head + b"1\r\n{\r\n" * 20_000 + b"0\r\n\r\n")
    part = b"100000\r\n" + bytes(MIB) + b"\r\n"
    yield Case("chunks: 200 MiB without end", lambda: head + part * 200)
    named = b"100000;" + b"a" * MIB + b"\r\n" + bytes(MIB) + b"\r\n"
    yield Case("chunks: 70 MiB of extensions", lambda: head + named * 70, BROKEN)


def _bodies() -> Iterator[Case]:
    request = good()["embed_text"]
    body = request.body
    for name in ("gzip", "deflate", "br", "gzip, gzip"):
        yield Case("bodies: compressed", post({"Content-Encoding": name}, body))
    form = "application/x-www-form-urlencoded"
    zeros = Ask("embed_text", request.head, bytes(60 * MIB), binary=True)
    bomb = partial(gzip.compress, bytes(200 * MIB), mtime=0)
    large: list[Callable[[], bytes]] = [
        lambda: post({"Content-Encoding": "gzip"}, bomb()),
        lambda: post({TYPE: form}, b"x" * 5 * MIB),
        lambda: post({}, b"[" * 65 * MIB),
        lambda: post({}, b" " * 60 * MIB),
        lambda: post({}, b'{"id":"' + b"a" * 60 * MIB + b'"}'),
        zeros.raw,
    ]
    for make in large:
        yield Case("bodies: large", make)
    texts = [
        b"",
        b"[" * 100_000,
        b'{"inputs":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"inputs":[{"shape":[' + b"9" * 100_000 + b"]}]}",
        b"{" + b",".join(b'"%d":0' % place for place in range(300_000)) + b"}",
        b'{"inputs":[{"data":[' + b"0," * 2_000_000 + b"0]}]}",
        b"\xef\xbb\xbf" + body[:-1],
        body.decode().encode("utf-16"),
        json.dumps({"inputs": request.head["inputs"] * 1000}).encode(),
    ]
    for text in texts:
        yield Case("bodies: JSON", post({}, text))
    yield Case("bodies: no length", post({"Content-Length": None}))


def _doors() -> Iterator[Case]:
    closed = (
        "/v2/repository/index /v2/models/stats /v2/models/classify/stats /v2/logging"
        " /v2/models/classify/versions/1/stats /v2/trace/setting /v2/models/classify/trace/setting"
        " /v2/systemsharedmemory/status /v2/cudasharedmemory/status /v2/models /v2/models/ /v2/.."
        " /v2/systemsharedmemory/region/x/status /v2/metrics /v2/models/classify/../../metrics"
        " /v2/repository/models/classify/load /v2/repository/models/classify/unload /v2/ /v2/health"
        " /v2/systemsharedmemory/region/x/register /v2/cudasharedmemory/region/x/register"
        " /v2/models/classify/generate /v2/models/classify/generate_stream / /docs /openapi.json"
        " /v1/chat/completions /v1/models/../../v2 /.env /favicon.ico /static/../../etc/passwd //"
    )
    body = good()["embed_text"].body
    for path in closed.split():
        yield Case("closed doors", message("GET", path, {}))
        yield Case("closed doors", message("POST", path, {}, b'{"key":"/radapter","offset":0}'))
    pixels = np.zeros((16, 16, 3), np.uint8)
    for model, name in (("image_encoder", "image"), ("text_encoder", "tokens")):
        yield Case("closed doors: encoders", ask(model, {name: pixels}).raw())
        yield Case("closed doors: encoders", message("GET", f"/v2/models/{model}/config", {}))
    for secret in (None, "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é", "a" * 9000):
        yield Case("wrong keys", post({"Authorization": secret}, body))
    yield Case("wrong keys", message("POST", f"{INFER}?key={KEY}", {"Authorization": None}, body))
    names = [
        "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "surrogatepass"))[:3000]
        for text in asks.TEXTS
    ]
    names += ["../classify", "classify%00", "CLASSIFY", "classify;x", "%ff%fe", "a" * 10_000, "猫"]
    for name in names:
        yield Case("names", message("POST", f"/v2/models/{name}/infer", {}, body))
    for version in (
        str(2**63),
        "1" * 500,
        "0",
        "-1",
        "01",
        "3",
        "1.0",
        "x",
        "%00",
        "..",
        "+1",
        "١",
    ):
        path = f"/v2/models/embed_text/versions/{version}/infer"
        yield Case("versions", message("POST", path, {}, body))


def _values() -> Iterator[Case]:
    image: list[Any] = [png(1, 20, 20)]
    search: dict[str, Any] = {"text": ["a"], "index": [INDEX]}

    # Names and conditions
    for text in asks.TEXTS:
        if text not in (INDEX, "colours"):
            yield Case("values", ask("retrieve", {"text": ["a"], "index": [text]}).raw())
            yield Case("values", ask("segment", {"image": image, "label_set": [text]}).raw())
    deep = ("(" * 900 + "width>1" + ")" * 900, "NOT " * 400 + "width>1", "-" * 1900 + "1 > 0")
    long = ("width > 1" + " OR width > 1" * 160, "CASE" * 400, "a" * 2001, "a" * 10_000_000)
    for text in (*asks.WHERE, *deep, *long):
        promise = REFUSED if len(text) > 2000 else CHECKED
        yield Case("conditions", ask("retrieve", {**search, "where": [text]}).raw(), promise)

    # Requests whose answer would take very long
    many: list[Any] = [f"label {place}" for place in range(20_000)]
    wide: list[Any] = [png(1, 500, 250)]
    options = {"short_side": 160, "stride": 16, "refine": 100}
    fine = {name: number(value) for name, value in options.items()}
    for inputs in (
        {"image": image, "labels": many},
        {"image": wide, "labels": many[:4000], **fine},
        {"image": wide, "labels": many[:900], **fine},
    ):
        yield Case("much work", ask("segment", inputs, binary=True).raw(), CHECKED)
    templates = {"image": image, "labels": many, "templates": ["{}", "a {}"]}
    yield Case("much work", ask("classify", templates).raw())
    yield Case("much work", ask("classify", {"image": image, "labels": ["x" * 1001]}).raw())
    yield Case("much work", ask("embed_text", {"text": ["x" * 10_001]}).raw())


def _images() -> Iterator[Case]:
    extra: dict[str, Any] = {"retrieve": {"index": [INDEX]}, "embed_image": {}}

    def request(name: str, model: str) -> bytes:
        if model == "embeddings":
            return _embed(["a", _url(images.made(name)), _url(png())])
        inputs = {"image": [images.made(name)], **extra.get(model, {"labels": ["a"]})}
        return ask(model, inputs, binary=True).raw()

    for name in (*images.BAD, *images.ODD):
        models = ["embed_image", "segment", "embeddings"]
        if "bomb" not in name and "large" not in name:
            models += ["classify", "retrieve"]
        promise = REFUSED if name in images.BAD else CHECKED
        for model in models:
            kind = f"images: {name.partition(':')[0]}"
            yield Case(kind, partial(request, name, model), promise)


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
    for value in (odd, _url(png(), "image/jpeg"), [f"text {place}" for place in range(2048)]):
        yield Case("embeddings", _embed(value), CHECKED)
    yield Case("embeddings", _embed("a", dimensions=10**400))
    large: list[Callable[[], bytes]] = [
        lambda: _embed(["a"] * 100_000),
        lambda: _embed([1] * 3_000_000),
        lambda: _embed(f"data:image/png;base64,{'A' * 60 * MIB}"),
    ]
    for make in large:
        yield Case("embeddings: large", make)


def _slow() -> Iterator[Case]:
    right = good()["embed_text"].raw()
    end = right.index(b"\r\n\r\n") + 4
    head = [part for byte in right[:90] for part in (bytes([byte]), 0.5)]
    body = [part for byte in right[end : end + 90] for part in (bytes([byte]), 0.4)]
    yield Case("slow: headers a byte at a time", head, BROKEN)
    yield Case("slow: nothing at all", [25.0], BROKEN)
    yield Case("slow: half a line", [right[:10], 25.0], BROKEN)
    yield Case("slow: body a byte at a time", [right[:end], *body])
    yield Case("slow: half a body", [right[:-10], 25.0])
    yield Case("slow: no body", [post({"Content-Length": str(MIB)}), 25.0])


def refused_bodies() -> Iterator[Case]:
    """Requests that are refused by their heads, whose bodies the gateway throws away."""
    size = 60_000
    end = b"0\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (size, bytes(size))
    doors: tuple[tuple[str, Headers], ...] = (
        (INFER, {"Authorization": None}),
        ("/v2/repository/index", {}),
        (INFER, {TYPE: "text/html"}),
    )
    for path, headers in doors:
        sized: Headers = {**headers, "Content-Length": str(size)}
        head = message("POST", path, sized)
        short = message("POST", path, {**headers, "Content-Length": "5"})
        transfer: Headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
        chunked = message("POST", path, {**headers, **transfer})
        whole = head + bytes(size)
        trickle: list[bytes | float] = [b" ", 0.05]
        yield Case("refused body", whole + whole, answers=2)
        for data in (
            whole,
            chunked + piece * 5 + end,
            [head, *trickle * 90],
            whole[: -size // 2],
            head,
            chunked,
            message("POST", path, {**sized, "Expect": "100-continue"}),
        ):
            yield Case("refused body", data)
        for data in (
            chunked + piece * 50 + end,
            short + bytes(size),
            chunked + b"xyz\r\n" + piece,
            chunked + b"5\r\n" + bytes(size) + b"\r\n" + end,
            chunked + b"FFFF\r\n" + bytes(9),
            chunked + b"1\r\n \r\n" * size + end,
            head + bytes(9),
        ):
            yield Case("refused body", data, BROKEN, hang_up=0.3)
