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
EMBEDDINGS = "/v1/embeddings"


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
    random = Random(f"{seed}/{number}")
    kind, raw, is_http = asks.hostile(random)
    return Case(kind, raw, BROKEN if is_http else CHECKED, hang_up=0.3 if is_http else None)


def of_kind(kind: str) -> list[int]:
    """Numbers of the requests made by hand whose kind begins so."""
    return [place for place, case in enumerate(by_hand()) if case.kind.startswith(kind)]


@cache
def by_hand() -> list[Case]:
    """All requests made by hand."""
    groups = (_http, _chunks, _bodies, _doors, _values, _images, _embeddings)
    return [case for group in (*groups, _slow, _refused_bodies) for case in group()]


_HOST = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
_GET = b"GET /v2 HTTP/1.1\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n"


def _headed(lines: bytes) -> bytes:
    return f"POST {INFER} HTTP/1.1\r\n".encode() + lines + b"Content-Type: application/json\r\n\r\n"


def _http() -> Iterator[Case]:
    right = good()["embed_text"].raw()
    end = right.index(b"\r\n\r\n")
    five = b"Content-Length: 5\r\n"
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\n" + _HOST + b"\r\n"
    whole = _HOST + b"\r\n"
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
        *(_GET + line + b"\r\n\r\n" for line in (b"Host", b"Host : x", b"Host: \0")),
        *(_GET + line + b"\r\n" + whole for line in (b": x", b"X: x\r\n y", b"X: " + b"a" * 10**6)),
        b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\n" + whole,
        _GET + b"X: y\r\n" * 100_000 + whole,
        b"\r\n" * 100_000,
        b" " * 10**6,
        _headed(b"Content-Length: 1\r\n" + _HOST + b"Content-Length: 300\r\n"),
        _headed(five + _CHUNKED + _HOST) + smuggled,
        _headed(five + b"Transfer-Encoding: chunked, identity\r\n" + _HOST) + smuggled,
        _headed(five + b"Transfer-Encoding: xchunked\r\n" + _HOST) + smuggled,
        _headed(five + b"Transfer-Encoding : chunked\r\n" + _HOST) + smuggled,
        message("POST", INFER, {"Content-Length": "1000"}, b'{"inputs"'),
        message("GET", "/v2/models/hacked", {"Host": None}),
        message("GET", "/v2/models/hacked", {"host": "a", "HOST": "b"}),
    ]
    lengths = ("-1", "+5", "1e3", "0x10", "5, 5", "9" * 23, str(2**64), "\u00b2", "", "5 5")
    body = good()["embed_text"].body
    raw += [message("POST", INFER, {"Content-Length": length}, body) for length in lengths]
    targets = ("http://169.254.169.254/latest", "//example.org/v2", "*", "x")
    raw += [message("GET", target, {}) for target in targets]
    others = (("CONNECT", "127.0.0.1:8001"), ("CONNECT", "/v2"), ("TRACE", "/v2"), ("OPTIONS", "*"))
    raw += [message(method, target, {}) for method, target in others]
    for name in ("websocket", "h2c", "TLS/1.0"):
        upgrade: Headers = {"Connection": "Upgrade", "Upgrade": name, "Sec-WebSocket-Key": "A" * 24}
        raw.append(message("GET", "/v2/hacked", upgrade))
    for data in raw:
        yield Case("HTTP", data, BROKEN, hang_up=1.0)
    for method in ("PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "GET"):
        yield Case("HTTP: methods", message(method, INFER, {}))
    yield Case("HTTP: Expect", message("POST", INFER, {"Expect": "200-maybe"}, b"x"))
    yield Case("HTTP: body longer than said", right + b"x" * 1000, BROKEN, 2, 1.0)
    bad = message("POST", INFER, {}, b"{}")
    yield Case("HTTP: pipelining", bad * 50, answers=50)
    yield Case("HTTP: pipelining, then noise", bad * 3 + b"\0\1\r\n\r\n", BROKEN, 4, 1.0)


def _chunks() -> Iterator[Case]:
    head = _headed(_CHUNKED + _HOST)
    body = good()["embed_text"].body
    sizes = (b"F" * 16, b"F" * 17, b"-1", b"xyz", b"", b" 5", b"5 ", b"0x5", b"5;" + b"a" * 10**5)
    bad = [head + size + b"\r\n" + body + b"\r\n0\r\n\r\n" for size in (*sizes, b"2")]
    bad.append(head + b"2\r\n{}\r\n")
    bad.append(head + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 50_000 + b"\r\n")
    for data in bad:
        yield Case("chunks", data, BROKEN, hang_up=1.0)
    yield Case("chunks: of one byte", head + b"1\r\n{\r\n" * 20_000 + b"0\r\n\r\n")
    part = b"100000\r\n" + bytes(MIB) + b"\r\n"
    yield Case("chunks: 200 MiB without end", lambda: head + part * 200)
    named = b"100000;" + b"a" * MIB + b"\r\n" + bytes(MIB) + b"\r\n"
    yield Case("chunks: 70 MiB of extensions", lambda: head + named * 70, BROKEN)


def _bodies() -> Iterator[Case]:
    request = good()["embed_text"]
    body = request.body
    post = partial(message, "POST", INFER)
    for name in ("gzip", "deflate", "br", "gzip, gzip"):
        yield Case("compressed bodies", post({"Content-Encoding": name}, body))
    bomb = partial(gzip.compress, bytes(200 * MIB), mtime=0)
    yield Case("gzip bomb", lambda: post({"Content-Encoding": "gzip"}, bomb()))
    form = "application/x-www-form-urlencoded"
    for kind in ("text/plain", form, "multipart/form-data", "application/xml", "a" * 9000):
        yield Case("content types", post({TYPE: kind}, body))
    zeros = Ask("embed_text", request.head, bytes(60 * MIB), binary=True)
    large: list[Callable[[], bytes]] = [
        lambda: post({TYPE: form}, b"x" * 5 * MIB),
        lambda: post({}, b"[" * 65 * MIB),
        lambda: post({}, b" " * 60 * MIB),
        lambda: post({}, b'{"id":"' + b"a" * 60 * MIB + b'"}'),
        zeros.raw,
    ]
    for make in large:
        yield Case("large bodies", make)
    texts = [
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
        yield Case("JSON", post({}, text))
    yield Case("empty bodies", post({}))
    yield Case("empty bodies", post({"Content-Length": None}))


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
    for path in closed.split():
        yield Case("closed doors", message("GET", path, {}))
        yield Case("closed doors", message("POST", path, {}, b'{"key":"/radapter","offset":0}'))
    pixels = np.zeros((16, 16, 3), np.uint8)
    for model, name in (("image_encoder", "image"), ("text_encoder", "tokens")):
        yield Case("closed doors: encoders", ask(model, {name: pixels}).raw())
        for tail in ("", "/config", "/ready"):
            yield Case("closed doors: encoders", message("GET", f"/v2/models/{model}{tail}", {}))
    body = good()["embed_text"].body
    secrets = (None, "", "Bearer", "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é")
    for secret in (*secrets, "a" * 9000):
        yield Case("wrong keys", message("POST", INFER, {"Authorization": secret}, body))
        yield Case("wrong keys", message("GET", "/metrics", {"Authorization": secret}))
    yield Case("wrong keys", message("POST", f"{INFER}?key={KEY}", {"Authorization": None}, body))

    names = [
        "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "surrogatepass"))[:3000]
        for text in asks.TEXTS
    ]
    names += ["../classify", "classify%00", "CLASSIFY", "classify;x", "%ff%fe", "a" * 10_000, "猫"]
    for name in names:
        yield Case("names of models", message("POST", f"/v2/models/{name}/infer", {}, body))
    for version in (
        str(2**63),
        "1" * 500,
        *["0", "-1", "01", "3", "1.0", "x", "%00", "..", "+1", "١"],
    ):
        path = f"/v2/models/embed_text/versions/{version}"
        yield Case("versions", message("POST", f"{path}/infer", {}, body))
        yield Case("versions", message("GET", f"{path}/config", {}))


def _values() -> Iterator[Case]:
    image: list[Any] = [png(1, 20, 20)]
    search: dict[str, Any] = {"text": ["a"], "index": [INDEX]}
    segment: dict[str, Any] = {"image": image, "labels": ["a"]}
    alone: dict[str, Any] = {**segment, "multi_label": np.array([True])}
    masks = np.full((1, 20, 20), 255, np.uint8)

    # Numbers that are not finite, or out of range
    refused: list[tuple[str, dict[str, Any]]] = []
    for value in (np.nan, np.inf, -np.inf, -1.1, 3e38):
        for name in ("threshold", "proposal_weight"):
            refused.append(("segment", {**segment, name: number(value)}))
        refused.append(("classify", {**alone, "threshold": number(value)}))
        refused.append(("retrieve", {**search, "min_score": number(value)}))
    for size in (-1, 0, -(2**31), 2**31 - 1):
        for name in ("short_side", "stride"):
            refused.append(("segment", {**segment, name: number(size, np.int32)}))
        refused.append(("retrieve", {**search, "top_k": number(size, np.int32)}))
    refused.append(("classify", {**segment, "top_k": number(0, np.int32)}))
    for size in (-1, 2**31 - 1):
        refused.append(("segment", {**segment, "refine": number(size, np.int32)}))
        refused.append(("retrieve", {**search, "offset": number(size, np.int32)}))
    for weight in (number(np.nan), number(0), np.ones(2, np.float32)):
        refused.append(("retrieve", {**search, "weight": weight}))
    for kind in (np.int32, np.uint8):
        refused.append(("classify", {**segment, "multi_label": np.ones(1, kind)}))
    for wrong in (masks[:, :10], masks[:0], masks * 0, masks[:, :1, :1]):
        refused.append(("segment", {**segment, "proposals": wrong}))
    for scores in (np.zeros((2, 1)), np.full((1, 1), np.nan), -np.ones((1, 1))):
        scored = {"proposals": masks, "proposal_scores": scores.astype(np.float32)}
        refused.append(("segment", {**segment, **scored}))
    refused.append(("retrieve", {**search, "index_version": ["\x00" * 1000]}))
    refused.append(("retrieve", {**search, "id": ["' OR 1 = 1 --"]}))
    refused.append(("retrieve", {**search, "id": ["a"] * 17}))
    for text in asks.TEXTS:
        if text not in (INDEX, "colours"):
            refused.append(("retrieve", {"text": ["a"], "index": [text]}))
            refused.append(("classify", {"image": image, "label_set": [text]}))
            refused.append(("segment", {"image": image, "label_set": [text]}))
    for model, inputs in refused:
        for binary in (True, False):
            yield Case(f"values: {model}", ask(model, inputs, binary=binary).raw())
    for more in ({"calibrated": np.array([False])}, {"threshold": number(1)}):
        yield Case("values: classify", ask("classify", {**alone, **more}).raw(), CHECKED)

    # Conditions
    deep = ("(" * 900 + "width>1" + ")" * 900, "NOT " * 400 + "width>1", "-" * 1900 + "1 > 0")
    long = ("width > 1" + " OR width > 1" * 160, "CASE" * 400, "a" * 2001, "a" * 10_000_000)
    for text in (*asks.WHERE, *deep, *long):
        promise = REFUSED if len(text) > 2000 else CHECKED
        yield Case("conditions", ask("retrieve", {**search, "where": [text]}).raw(), promise)

    # Requests whose answer would take very long
    many: list[Any] = [f"label {place}" for place in range(20_000)]
    wide: list[Any] = [png(1, 500, 250)]
    numbers = {"short_side": 160, "stride": 16, "refine": 100}
    options = {name: number(value, np.int32) for name, value in numbers.items()}
    for inputs in (
        {"image": image, "labels": many},
        {"image": wide, "labels": many[:4000], **options},
        {"image": wide, "labels": many[:900], **options},
    ):
        yield Case("much work", ask("segment", inputs, binary=True).raw(), CHECKED)
    templates = {"image": image, "labels": many, "templates": ["{}", "a {}"]}
    yield Case("much work", ask("classify", templates).raw())
    yield Case("much work", ask("classify", {"image": image, "labels": ["x" * 1001]}).raw())
    yield Case("much work", ask("embed_text", {"text": ["x" * 10_001]}).raw())


def _images() -> Iterator[Case]:
    extra: dict[str, Any] = {"retrieve": {"index": [INDEX]}, "embed_image": {}}

    def request(name: str, model: str) -> bytes:
        inputs = {"image": [images.made(name)], **extra.get(model, {"labels": ["a"]})}
        return ask(model, inputs, binary=True).raw()

    def embeddings(name: str) -> bytes:
        return _embed(["a", _url(images.made(name)), _url(png())])

    for group, promise in ((images.BAD, REFUSED), (images.ODD, CHECKED)):
        for name in group:
            kind = f"images: {name.partition(':')[0]}"
            models = ["embed_image", "segment"]
            if "bomb" not in name and "large" not in name:
                models += ["classify", "retrieve"]
            for model in models:
                yield Case(kind, partial(request, name, model), promise)
            yield Case(kind, partial(embeddings, name), promise)


def _url(file: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(file).decode()}"


def _embed(inputs: Any, **fields: Any) -> bytes:
    content = {"model": "radapter", "input": inputs, **fields}
    return message("POST", EMBEDDINGS, {}, json.dumps(content).encode())


def _embeddings() -> Iterator[Case]:
    image = _url(png())
    inputs: list[Any] = [
        None,
        [],
        ["a", 1],
        ["a", " "],
        [["a"]],
        [[1, 2]],
        [True],
        [{"url": image}],
    ]
    inputs += [_url(b"no image"), _url(b"<script>", "text/html"), _url(b"<svg/>", "image/svg")]
    inputs += [_url(b"\x89PNG"), _url(b"RIFF", "image/webp"), _url(png()[:60]), image + "==="]
    inputs += ["data:image/png;base64,@@@@", "data:image/png;base64,", _url(image.encode())]
    inputs += [[*([image] * 70), _url(png()[:60])], "x" * 10_001]
    inputs += ["http://127.0.0.1:8002/metrics", "HTTP://0x7f000001/", "https://a\\@b"]
    for value in inputs:
        yield Case("embeddings: inputs", _embed(value))
    odd = ["file:///etc/passwd", "{{7*7}}", "a\0b", "\u202e", "data: x"]
    for value in (odd, _url(png(), "image/jpeg"), [f"text {place}" for place in range(2048)]):
        yield Case("embeddings: inputs", _embed(value), CHECKED)
    fields: list[dict[str, Any]] = [{"model": name} for name in ("radapter-999", "radapter-\u0661")]
    fields += [{"dimensions": 10**400}, {"alpha": 0.123}, {"messages": [], "stream": True}]
    for more in fields:
        yield Case("embeddings: fields", _embed("a", **more))
    large: list[Callable[[], bytes]] = [
        lambda: _embed(["a"] * 100_000),
        lambda: _embed([1] * 3_000_000),
        lambda: _embed(f"data:image/png;base64,{'A' * 60 * MIB}"),
        lambda: _embed("data:image/" + "a" * 60 * MIB),
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
    yield Case("slow: no body", [message("POST", INFER, {"Content-Length": str(MIB)}), 25.0])


def _refused_bodies() -> Iterator[Case]:
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
        whole = head + bytes(size)
        short = message("POST", path, {**headers, "Content-Length": "5"})
        transfer: Headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
        chunked = message("POST", path, {**headers, **transfer})
        kind = "refused body"
        yield Case(kind, whole)
        yield Case(kind, whole + whole, answers=2)
        yield Case(kind, chunked + piece * 5 + end)
        trickle: list[bytes | float] = [b" ", 0.05]
        yield Case(kind, [head, *trickle * 90])
        yield Case(kind, whole[: -size // 2])
        yield Case(kind, head)
        yield Case(kind, chunked)
        yield Case(kind, message("POST", path, {**sized, "Expect": "100-continue"}))
        for data in (
            chunked + piece * 50 + end,
            short + bytes(size),
            chunked + b"xyz\r\n" + piece,
            chunked + b"5\r\n" + bytes(size) + b"\r\n" + end,
            chunked + b"FFFF\r\n" + bytes(9),
            chunked + b"1\r\n \r\n" * size + end,
            head + bytes(9),
        ):
            yield Case(kind, data, BROKEN, hang_up=0.3)
