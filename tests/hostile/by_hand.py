"""Hostile requests made by hand: broken HTTP, bombs, doors that must be closed, and values that no
mutation finds.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tests.helpers.small_release import png
from tests.hostile import embeddings, images
from tests.hostile.asks import INDEX, KEY, TYPE, Ask, ask, good, message
from tests.hostile.case import BROKEN, CHECKED, REFUSED, Case
from tests.hostile.mutate import TEXTS, WHERE

Made = tuple[str, Callable[[], Case]]  # the kind, and what makes it, for some are large
MIB = 2**20
INFER = "/v2/models/embed_text/infer"


def all_cases() -> list[Made]:
    """The list, always in the same order."""
    groups = (
        _http,
        _chunks,
        _slow,
        _bodies,
        _json,
        _closed,
        _names,
        _shapes,
        _tensors,
        _conditions,
        _images,
        _work,
    )
    own = (made for group in groups for made in group())
    return [*own, *embeddings.cases(), *_refused_bodies()]


def _one(kind: str, *parts: bytes | float, promise: str = REFUSED, **options: Any) -> Made:
    return kind, lambda: Case(kind, parts, promise, **options)


def _later(kind: str, make: Callable[[], bytes], promise: str = REFUSED) -> Made:
    return kind, lambda: Case(kind, (make(),), promise)


def _text() -> Ask:
    return good()["embed_text"]


# HTTP itself


def _http() -> Iterator[Made]:
    key = f"Authorization: Bearer {KEY}\r\n".encode()
    right = _text().raw()
    end = right.index(b"\r\n\r\n")
    host = b"Host: x\r\n" + key
    lines: dict[str, bytes] = {
        "no version": b"GET /v2\r\n\r\n",
        "version 0.9": b"GET /v2 HTTP/0.9\r\n\r\n",
        "version 3": b"GET /v2 HTTP/3.0\r\n" + host + b"\r\n",
        "version 9.9": b"GET /v2 HTTP/9.9\r\n" + host + b"\r\n",
        "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "SOCKS": b"\x05\x01\x00",
        "unknown method": b"HACK /v2 HTTP/1.1\r\n" + host + b"\r\n",
        "lower case": b"get /v2 HTTP/1.1\r\n" + host + b"\r\n",
        "no target": b"GET  HTTP/1.1\r\n" + host + b"\r\n",
        "spaces": b"GET / v2 HTTP/1.1\r\n" + host + b"\r\n",
        "NUL in the target": b"GET /v2\0 HTTP/1.1\r\n" + host + b"\r\n",
        "high bytes in the target": b"GET /v2/\xff\xfe HTTP/1.1\r\n" + host + b"\r\n",
        "lines end in LF": right[:end].replace(b"\r\n", b"\n") + b"\n\n" + right[end + 4 :],
        "lines end in CR": b"GET /v2 HTTP/1.1\rHost: x\r\r",
        "header without colon": b"GET /v2 HTTP/1.1\r\nHost\r\n" + key + b"\r\n",
        "header without name": b"GET /v2 HTTP/1.1\r\n: x\r\n" + key + b"\r\n",
        "folded header": b"GET /v2 HTTP/1.1\r\nHost: x\r\n y\r\n" + key + b"\r\n",
        "space before the colon": b"GET /v2 HTTP/1.1\r\nHost : x\r\n" + key + b"\r\n",
        "NUL in a header": b"GET /v2 HTTP/1.1\r\nHost: \0\r\n" + key + b"\r\n",
        "huge line": b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\n" + host + b"\r\n",
        "huge header": b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 10**6 + b"\r\n" + host + b"\r\n",
        "many headers": b"GET /v2 HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + host + b"\r\n",
        "empty lines": b"\r\n" * 100_000,
        "spaces alone": b" " * 10**6,
    }
    for name, raw in lines.items():
        yield _one(f"HTTP: {name}", raw, promise=BROKEN, hang_up=1.0)
    lengths = (
        "-1",
        "+5",
        "1e3",
        "0x10",
        "5, 5",
        "5,6",
        "99999999999999999999999",
        "18446744073709551616",
        "\u00b2",
        "",
        "5 5",
    )
    for length in lengths:
        raw = message("POST", INFER, {"Content-Length": length}, _text().body)
        yield _one("HTTP: Content-Length", raw, promise=BROKEN, hang_up=1.0)
    twice = b"Content-Length: 1\r\n" + host
    yield _one(
        "HTTP: two lengths",
        _headed(twice + b"Content-Length: 300\r\n"),
        promise=BROKEN,
        hang_up=1.0,
    )
    chunked = b"Transfer-Encoding: chunked\r\n"
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n" + key + b"\r\n"
    yield _one(
        "HTTP: smuggling",
        _headed(b"Content-Length: 5\r\n" + chunked + host) + smuggled,
        promise=BROKEN,
    )
    for odd in (
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
    ):
        raw = _headed(b"Content-Length: 5\r\n" + odd + host) + smuggled
        yield _one("HTTP: smuggling", raw, promise=BROKEN, hang_up=1.0)
    said = message("POST", INFER, {"Content-Length": "1000"}, b'{"inputs"')
    yield _one("HTTP: body shorter than said, then closed", said, promise=BROKEN, hang_up=0.2)
    yield _one(
        "HTTP: body longer than said",
        _text().raw() + b"x" * 1000,
        promise=BROKEN,
        answers=2,
        hang_up=1.0,
    )
    yield _one("HTTP: no Host", message("GET", "/v2/models/hacked", {"Host": None}), promise=BROKEN)
    yield _one(
        "HTTP: two hosts",
        message("GET", "/v2/models/hacked", {"host": "a", "HOST": "b"}),
        promise=BROKEN,
    )
    for target in (
        "http://127.0.0.1:8000/v2/repository/index",
        "http://169.254.169.254/latest",
        "//example.org/v2",
        "*",
        "x",
    ):
        yield _one(
            "HTTP: absolute targets", message("GET", target, {}), promise=BROKEN, hang_up=1.0
        )
    for method, target in (
        ("CONNECT", "127.0.0.1:8001"),
        ("CONNECT", "/v2"),
        ("TRACE", "/v2"),
        ("OPTIONS", "*"),
    ):
        yield _one(f"HTTP: {method}", message(method, target, {}), promise=BROKEN, hang_up=1.0)
    for method in ("PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "GET"):
        yield _one("HTTP: methods", message(method, INFER, {}))
    upgrade: dict[str, str | None] = {
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    for name in ("websocket", "h2c", "TLS/1.0"):
        asked = {
            **upgrade,
            "Upgrade": name,
            "Sec-WebSocket-Version": "13",
            "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA",
        }
        yield _one(
            "HTTP: upgrades", message("GET", "/v2/hacked", asked), promise=BROKEN, hang_up=1.0
        )
    yield _one("HTTP: Expect", message("POST", INFER, {"Expect": "200-maybe"}, b"x"))
    bad = message("POST", INFER, {}, b"{}")
    yield _one("HTTP: pipelining", bad * 50, answers=50)
    yield _one(
        "HTTP: pipelining, then noise",
        bad * 3 + b"\0\1\2\r\n\r\n",
        answers=4,
        promise=BROKEN,
        hang_up=1.0,
    )


def _headed(lines: bytes) -> bytes:
    return f"POST {INFER} HTTP/1.1\r\n".encode() + lines + b"Content-Type: application/json\r\n\r\n"


def _chunks() -> Iterator[Made]:
    body = _text().body
    host = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
    head = _headed(b"Transfer-Encoding: chunked\r\n" + host)
    for size in (
        b"FFFFFFFFFFFFFFFF",
        b"FFFFFFFFFFFFFFFFF",
        b"-1",
        b"xyz",
        b"",
        b" 5",
        b"5 ",
        b"0x5",
        b"5;" + b"a" * 10**5,
    ):
        yield _one(
            "chunks: bad sizes",
            head + size + b"\r\n" + body + b"\r\n0\r\n\r\n",
            promise=BROKEN,
            hang_up=1.0,
        )
    ones = b"".join(b"1\r\n%c\r\n" % byte for byte in b"{" * 20_000)
    yield _one("chunks: of one byte", head + ones + b"0\r\n\r\n")
    yield _one(
        "chunks: longer than said",
        head + b"2\r\n" + body + b"\r\n0\r\n\r\n",
        promise=BROKEN,
        hang_up=1.0,
    )
    yield _one("chunks: no end", head + b"2\r\n{}\r\n", promise=BROKEN, hang_up=0.5)
    yield _one(
        "chunks: huge trailer",
        head + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        promise=BROKEN,
        hang_up=1.0,
    )
    yield _later(
        "chunk bomb: 200 MiB without end",
        lambda: head + (b"100000\r\n" + bytes(MIB) + b"\r\n") * 200,
    )
    yield _later(
        "chunk bomb: 200 MiB of headers' kind",
        lambda: head + (b"100000;" + b"a" * MIB + b"\r\n" + bytes(MIB) + b"\r\n") * 70,
        BROKEN,
    )


def _slow() -> Iterator[Made]:
    right = _text().raw()
    end = right.index(b"\r\n\r\n") + 4
    drops: list[bytes | float] = [piece for byte in right[:90] for piece in (bytes([byte]), 0.5)]
    yield _one("slow: headers a byte at a time", *drops, promise=BROKEN)
    yield _one("slow: nothing at all", 25.0, promise=BROKEN)
    yield _one("slow: half a line", right[:10], 25.0, promise=BROKEN)
    trickle: list[bytes | float] = [
        piece for byte in right[end : end + 90] for piece in (bytes([byte]), 0.4)
    ]
    yield _one("slow: body a byte at a time", right[:end], *trickle)
    yield _one("slow: half a body", right[:-10], 25.0)
    more = message("POST", INFER, {"Content-Length": str(MIB)}, b"")
    yield _one("slow: body that never comes", more, 25.0)


def _refused_bodies() -> Iterator[Made]:
    """Requests that are refused by their heads, and bodies that the gateway throws away."""
    size = 60_000
    chunked: dict[str, str | None] = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    none = b"0\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (size, bytes(size))
    doors: tuple[tuple[str, dict[str, str | None]], ...] = (
        (INFER, {"Authorization": None}),
        ("/v2/repository/index", {}),
        (INFER, {TYPE: "text/html"}),
    )
    for path, headers in doors:

        def head(
            more: dict[str, str | None],
            path: str = path,
            headers: dict[str, str | None] = headers,
        ) -> bytes:
            return message("POST", path, {**headers, **more})

        said = head({"Content-Length": str(size)})
        whole = said + bytes(size)
        trickle: list[bytes | float] = [part for _ in range(90) for part in (b" ", 0.05)]
        yield _one("refused body, whole", whole)
        yield _one("refused body, two on one connection", whole + whole, answers=2)
        yield _one("refused body, in chunks", head(chunked) + piece * 5 + none)
        yield _one("refused body, a byte at a time", said, *trickle)
        yield _one("refused body, half of it", whole[: -size // 2])
        yield _one("refused body, never comes", said)
        yield _one("refused body, never comes in chunks", head(chunked))
        yield _one(
            "refused body, who asks whether to send it",
            head({"Content-Length": str(size), "Expect": "100-continue"}),
        )
        for kind, data in (
            ("too long", head(chunked) + piece * 50 + none),
            ("longer than said", head({"Content-Length": "5"}) + bytes(size)),
            ("chunks of bad sizes", head(chunked) + b"xyz\r\n" + piece),
            ("chunks longer than said", head(chunked) + b"5\r\n" + bytes(size) + b"\r\n" + none),
            ("chunks shorter than said", head(chunked) + b"FFFF\r\n" + bytes(9)),
            ("chunks of one byte", head(chunked) + b"1\r\n \r\n" * size + none),
            ("gone in the middle", said + bytes(9)),
        ):
            yield _one(f"refused body, {kind}", data, promise=BROKEN, hang_up=0.3)


def _bodies() -> Iterator[Made]:
    body = _text().body
    for name, packed in (
        ("gzip", gzip.compress(body, mtime=0)),
        ("deflate", zlib.compress(body)),
        ("br", body),
        ("gzip, gzip", body),
    ):
        yield _one("compressed bodies", message("POST", INFER, {"Content-Encoding": name}, packed))
    bomb = partial(gzip.compress, bytes(200 * MIB), mtime=0)
    yield _later(
        "gzip bomb: 200 MiB in 200 kB",
        lambda: message("POST", INFER, {"Content-Encoding": "gzip"}, bomb()),
    )
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/xml",
        "a" * 9000,
    ):
        yield _one("content types", message("POST", INFER, {TYPE: kind}, body))
    form = {TYPE: "application/x-www-form-urlencoded"}
    yield _later("5 MiB as a form", lambda: message("POST", INFER, dict(form), b"x" * 5 * MIB))
    yield _later("65 MiB of body", lambda: message("POST", INFER, {}, b"[" * 65 * MIB))
    yield _later("60 MiB of spaces", lambda: message("POST", INFER, {}, b" " * 60 * MIB))
    yield _later(
        "60 MiB of one text",
        lambda: message("POST", INFER, {}, b'{"id":"' + b"a" * 60 * MIB + b'"}'),
    )
    yield _later(
        "60 MiB of zeros as tensors",
        lambda: Ask("embed_text", _text().head, bytes(60 * MIB), True).raw(),
    )
    yield _one("empty bodies", message("POST", INFER, {}))
    yield _one("empty bodies", message("POST", INFER, {"Content-Length": None}))


def _json() -> Iterator[Made]:
    texts: dict[str, bytes] = {
        "deep: 100,000 brackets": b"[" * 100_000,
        "deep: 100,000 closed brackets": b"[" * 100_000 + b"]" * 100_000,
        "deep: 100,000 braces": b'{"inputs":' * 100_000 + b"1" + b"}" * 100_000,
        "deep: data of 10,000 levels": _with_data(b"[" * 10_000 + b"1" + b"]" * 10_000),
        "deep: data of 150 levels": _with_data(b"[" * 150 + b'"a"' + b"]" * 150),
        "huge numbers": _with_data(b"[" + b"9" * 100_000 + b"]"),
        "huge exponents": _with_data(b"[1e999999999]"),
        "NaN": _with_data(b"[NaN]"),
        "Infinity": _with_data(b"[-Infinity]"),
        "duplicate keys": (
            b'{"inputs":[],"inputs":' + json.dumps(_text().head["inputs"]).encode() + b"}"
        ),
        "a million keys": b"{" + b",".join(b'"%d":0' % number for number in range(300_000)) + b"}",
        "two million values": _with_data(b"[" + b"0," * 2_000_000 + b"0]"),
        "a byte order mark": b"\xef\xbb\xbf" + ask("embed_text", {"text": ["a"]}).body[:-1],
        "UTF-16": ask("embed_text", {"text": ["a"]}).body.decode().encode("utf-16"),
        "invalid UTF-8": _with_data(b'["\xff\xfe\xc0\x80"]'),
        "half a surrogate": _with_data(b'["\\ud800"]'),
        "comments": b"/* x */" + ask("embed_text", {"text": ["a"]}).body,
        "single quotes": b"{'inputs': []}",
        "a number": b"1",
        "null": b"null",
        "a text": b'"inputs"',
        "an array": b"[]",
        "two objects": b"{}{}",
        "no inputs": b'{"inputs":[]}',
        "1,000 inputs": json.dumps({"inputs": _text().head["inputs"] * 1000}).encode(),
        "long keys": b'{"' + b"k" * 100_000 + b'":1}',
    }
    for name, text in texts.items():
        yield _one(f"JSON: {name}", message("POST", INFER, {}, text))


def _with_data(data: bytes) -> bytes:
    return b'{"inputs":[{"name":"text","shape":[1,1],"datatype":"BYTES","data":' + data + b"}]}"


# Doors, names


def _closed() -> Iterator[Made]:
    gets = (
        *(
            "repository/index",
            "models/stats",
            "models/classify/stats",
            "models/classify/versions/1/stats",
            "logging",
        ),
        *(
            "trace/setting",
            "models/classify/trace/setting",
            "systemsharedmemory/status",
            "cudasharedmemory/status",
        ),
        *(
            "systemsharedmemory/region/x/status",
            "models",
            "models/",
            "health",
            "metrics",
            "..",
            "models/classify/../../metrics",
        ),
    )
    posts = (
        *(
            "repository/index",
            "repository/models/classify/load",
            "repository/models/classify/unload",
            "logging",
        ),
        *(
            "trace/setting",
            "systemsharedmemory/region/x/register",
            "systemsharedmemory/unregister",
            "models/classify/load",
        ),
        *(
            "cudasharedmemory/region/x/register",
            "models/classify/generate",
            "models/classify/generate_stream",
        ),
    )
    for path in gets:
        yield _one("doors that are closed: Triton's own", message("GET", f"/v2/{path}", {}))
    for path in posts:
        yield _one(
            "doors that are closed: Triton's own",
            message("POST", f"/v2/{path}", {}, b'{"key":"/radapter","offset":0}'),
        )
    for path in (
        "/",
        "/docs",
        "/openapi.json",
        "/v1/embeddings",
        "/v1/chat/completions",
        "/v1/models/../../v2",
        "/.env",
        "/favicon.ico",
        "/admin",
        "/static/../../etc/passwd",
        "//",
        "/v2/",
        "/metrics/",
    ):
        yield _one("doors that are closed: others", message("GET", path, {}))
    tokens = {"image_encoder": "image", "text_encoder": "tokens", "patch_encoder": "image"}
    for model, name in tokens.items():
        for tail in ("/infer", "", "/config", "/ready", "/stats"):
            values = ask(model, {name: np.zeros((16, 16, 3), np.uint8)})
            raw = (
                values.raw()
                if tail == "/infer"
                else message("GET", f"/v2/models/{model}{tail}", {})
            )
            yield _one("doors that are closed: encoders", raw)
    wrong: list[dict[str, str | None]] = [{"Authorization": None}]
    wrong += [
        {"Authorization": text}
        for text in (
            "",
            "Bearer",
            "Bearer x",
            f"Basic {KEY}",
            f"Bearer {KEY}x",
            "Bearer \u00e9",
            "a" * 9000,
        )
    ]
    for headers in wrong:
        yield _one("keys that are none", message("POST", INFER, headers, _text().body))
        yield _one("keys that are none", message("GET", "/metrics", headers))
    yield _one(
        "keys that are none",
        message("POST", f"{INFER}?key={KEY}", {"Authorization": None}, _text().body),
    )


def _names() -> Iterator[Made]:
    for text in TEXTS:
        name = "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "surrogatepass"))[:3000]
        yield _one("names of models", message("POST", f"/v2/models/{name}/infer", {}, _text().body))
    for name in (
        "../classify",
        "..%2fclassify",
        "classify%00",
        "CLASSIFY",
        "classify.",
        "classify;x",
        "%ff%fe",
        "a" * 10_000,
        "\u732b",
    ):
        yield _one("names of models", message("POST", f"/v2/models/{name}/infer", {}, _text().body))
    for version in (
        "0",
        "-1",
        "01",
        "3",
        "99",
        str(2**31),
        str(2**63),
        str(2**64),
        "1" * 500,
        "1.0",
        "x",
        "%00",
        "..",
        "+1",
        " 1",
        "\u0661",
    ):
        path = f"/v2/models/embed_text/versions/{version.replace(' ', '%20')}"
        yield _one(
            "versions",
            message("POST", f"{path}/infer", {}, ask("embed_text", {"text": ["a"]}).body),
        )
        yield _one("versions", message("GET", f"{path}/config", {}))
    odd = [text for text in TEXTS if text not in (INDEX, "colours")]
    for text in odd:
        values: list[Any] = [text]
        yield _later("names of indexes", ask("retrieve", {"text": ["a"], "index": values}).raw)
        yield _later(
            "names of label sets", ask("classify", {"image": [png()], "label_set": values}).raw
        )
        yield _later(
            "names of label sets",
            ask("segment", {"image": [png()], "label_set": values}, binary=True).raw,
        )


# Tensors


def _shapes() -> Iterator[Made]:
    shapes: list[Any] = [
        *(
            [2**62, 2**62],
            [2**32, 2**32],
            [2**63, 1],
            [2**31, 2**31, 2**31],
            [-1, -1],
            [0, 0],
            [0],
            [],
            [[1]],
            [1] * 10_000,
        ),
        *(
            [2**30, 2**34],
            [65, 1],
            [1, 0],
            [1, 1, 0],
            [1, -1],
            ["1", 1],
            [1.5, 1],
            [None],
            [True, True],
            {},
            "1",
            None,
        ),
    ]
    for model, right in good().items():
        for shape in shapes:
            broken = right.copy()
            broken.head["inputs"][0]["shape"] = shape
            yield _later("shape bombs", broken.raw)
        for binary in (True, False):
            huge = ask(
                model, {"image" if model == "segment" else "text": ["a"]}, binary=binary, rows=True
            )
            huge.head["inputs"][0]["shape"] = [2**16, 2**15]
            yield _later("shape bombs", huge.raw)


def _tensors() -> Iterator[Made]:
    for model, right in good().items():
        needed = (
            1
            if model in ("embed_image", "embed_text")
            else 2
            if model == "retrieve"
            else len(right.head["inputs"])
        )
        for chosen in range(needed):
            missing = ask(model, {})
            missing.head["inputs"] = [
                one for number, one in enumerate(right.head["inputs"]) if number != chosen
            ]
            if not right.binary:
                yield _later(f"missing tensors: {model}", missing.raw)
        yield _later(f"missing tensors: {model}", ask(model, {}).raw)
        for datatype in (
            "INT32",
            "FP32",
            "BOOL",
            "FP64",
            "UINT8",
            "BF16",
            "JSON",
            "bytes",
            "",
            7,
            None,
        ):
            wrong = right.copy()
            wrong.head["inputs"][0]["datatype"] = datatype
            yield _later(f"wrong types: {model}", wrong.raw)
        odd: list[Any] = [1, "a", [1], [None], [["a"]] * 3, [{}], [True], ["a", 1], [[]], {}]
        for data in odd:
            wrong = ask(
                model, {"image" if "image" in right.head["inputs"][0]["name"] else "text": ["a"]}
            )
            wrong.head["inputs"][0]["data"] = data
            yield _later(f"wrong types: {model}", wrong.raw)
        for tail in (
            b"",
            b"\0",
            struct.pack("<I", 2**32 - 1),
            struct.pack("<I", 2**31) + b"a",
            struct.pack("<II", 0, 0),
            b"\xff" * 9,
        ):
            name = right.head["inputs"][0]["name"]
            broken = ask(model, {name: ["a"]}, binary=True)
            broken.tail = tail
            broken.head["inputs"][0]["parameters"]["binary_data_size"] = len(tail)
            yield _later("texts that are longer than they say", broken.raw)
        for parameters in (
            {"shared_memory_region": "x", "shared_memory_byte_size": 8},
            {"x": 1},
            {"binary_data_size": 0},
        ):
            broken = right.copy()
            broken.head["inputs"][0] = {**broken.head["inputs"][0], "parameters": parameters}
            yield _later("shared memory and other parameters", broken.raw)
        for name in ("nothing", "", "../x", "alpha", "image_encoder"):
            broken = right.copy()
            broken.head["outputs"] = [{"name": name}]
            yield _later("outputs that do not exist", broken.raw)
    yield from _numbers()


def _numbers() -> Iterator[Made]:
    image: list[Any] = [png(1, 20, 20)]
    nan = np.array([np.nan], np.float32)
    inf = np.array([np.inf], np.float32)
    for binary in (True, False):
        for value in (
            nan,
            inf,
            -inf,
            np.array([-1], np.float32),
            np.array([1.01], np.float32),
            np.array([3e38], np.float32),
        ):
            for name in ("threshold", "proposal_weight"):
                inputs = {"image": image, "labels": ["a"], name: value}
                yield _later(
                    "NaN, Infinity and other numbers", ask("segment", inputs, binary=binary).raw
                )
    for size in (-1, 0, -(2**31), 2**31 - 1):
        number = np.array([size], np.int32)
        for name in ("short_side", "stride", "refine"):
            if name != "refine" or size:
                inputs = {"image": image, "labels": ["a"], name: number}
                yield _later("numbers out of range", ask("segment", inputs, binary=True).raw)
        if size < 1:
            yield _later(
                "numbers out of range",
                ask("classify", {"image": image, "labels": ["a"], "top_k": number}).raw,
            )
        yield _later(
            "numbers out of range",
            ask("retrieve", {"text": ["a"], "index": [INDEX], "top_k": number}).raw,
        )
    search: dict[str, Any] = {"text": ["a"], "index": [INDEX]}
    for value in (nan, inf, -inf, np.array([-1.1], np.float32), np.array([3e38], np.float32)):
        for binary in (True, False):
            inputs = {**search, "min_score": value}
            yield _later("numbers out of range", ask("retrieve", inputs, binary=binary).raw)
    for wrong_search in (
        {"weight": nan},
        {"weight": np.zeros(1, np.float32)},
        {"weight": np.ones(2, np.float32)},
        {"offset": np.array([-1], np.int32)},
        {"offset": np.array([2**31 - 1], np.int32)},
        {"index_version": ["\x00" * 1000]},
        {"id": ["' OR 1 = 1 --"]},
        {"id": ["a"] * 17},
    ):
        yield _later("searches that fit nothing", ask("retrieve", {**search, **wrong_search}).raw)
    for value in (nan, inf, -inf, np.array([-0.1], np.float32), np.array([1.1], np.float32)):
        for binary in (True, False):
            inputs = {
                "image": image,
                "labels": ["a"],
                "multi_label": np.array([True]),
                "threshold": value,
            }
            yield _later("labels that stand alone", ask("classify", inputs, binary=binary).raw)
    for kind in (np.int32, np.uint8, np.float32):
        inputs = {"image": image, "labels": ["a"], "multi_label": np.ones(1, kind)}
        yield _later("labels that stand alone", ask("classify", inputs, binary=True).raw)
    alone = {
        "image": image,
        "labels": ["a", "b"],
        "multi_label": np.array([True]),
        "calibrated": np.array([False]),
    }
    yield _later("labels that stand alone", ask("classify", alone, binary=True).raw, CHECKED)
    none = {
        "image": image,
        "labels": ["a", "b"],
        "multi_label": np.array([True]),
        "threshold": np.array([1], np.float32),
    }
    yield _later("labels that stand alone", ask("classify", none).raw, CHECKED)
    masks = np.full((1, 20, 20), 255, np.uint8)
    for wrong in (masks[:, :10], masks[:0], masks * 0, np.full((1, 1, 1), 1, np.uint8)):
        inputs = {"image": image, "labels": ["a"], "proposals": wrong}
        yield _later("proposals that fit nothing", ask("segment", inputs, binary=True).raw)
    for scores in (
        np.zeros((2, 1), np.float32),
        np.full((1, 1), np.nan, np.float32),
        -np.ones((1, 1), np.float32),
    ):
        inputs = {"image": image, "labels": ["a"], "proposals": masks, "proposal_scores": scores}
        yield _later("proposals that fit nothing", ask("segment", inputs, binary=True).raw)


def _conditions() -> Iterator[Made]:
    deep = (
        "(" * 900 + "width>1" + ")" * 900,
        "NOT " * 400 + "width>1",
        "-" * 1900 + "1 > 0",
        "(" * 1900,
        "x IN (" * 300,
    )
    for text in (
        *WHERE,
        *deep,
        "width > 1" + " OR width > 1" * 160,
        "CASE" * 400,
        "a" * 2001,
        "a" * 10_000_000,
    ):
        values: list[Any] = [text]
        promise = REFUSED if len(text) > 2000 else CHECKED
        yield _later(
            "conditions",
            ask("retrieve", {"text": ["a"], "index": [INDEX], "where": values}).raw,
            promise,
        )


def _images() -> Iterator[Made]:
    for group, promise in ((images.BAD, REFUSED), (images.ODD, CHECKED)):
        for name in group:
            models = (
                ("embed_image", "segment")
                if "bomb" in name or "large" in name
                else ("embed_image", "classify", "segment", "retrieve")
            )
            for model in models:
                yield _later(name.partition(":")[0], partial(_image, name, model), promise)


def _image(name: str, model: str) -> bytes:
    file: list[Any] = [images.made(name)]
    extra: dict[str, Any] = {
        "classify": {"labels": ["a"]},
        "segment": {"labels": ["a"]},
        "retrieve": {"index": [INDEX]},
    }
    return ask(model, {"image": file, **extra.get(model, {})}, binary=True).raw()


def _work() -> Iterator[Made]:
    """Requests whose answer would take very long."""
    many: list[Any] = [f"label {number}" for number in range(20_000)]
    image: list[Any] = [png(1, 60, 60)]
    wide: list[Any] = [png(1, 500, 250)]
    options = {"short_side": 160, "stride": 16, "refine": 100}
    numbers = {name: np.array([value], np.int32) for name, value in options.items()}
    heavy: dict[str, dict[str, Any]] = {
        "20,000 labels": {"image": image, "labels": many},
        "20,000 labels, 100 steps": {"image": wide, "labels": many[:4000], **numbers},
        "900 labels, 500 windows, 100 steps": {"image": wide, "labels": many[:900], **numbers},
    }
    for name, inputs in heavy.items():
        yield _later(f"much work: {name}", ask("segment", inputs, binary=True).raw, CHECKED)
    square: list[Any] = ["a"] * 2
    yield _later(
        "much work: labels x templates",
        ask("classify", {"image": image, "labels": many, "templates": ["{}", "a {}"]}).raw,
    )
    yield _later(
        "much work: long labels",
        ask("classify", {"image": image, "labels": ["x" * 1001, *square]}).raw,
    )
    yield _later("much work: long text", ask("embed_text", {"text": ["x" * 10_001]}).raw)
    yield _later("much work: 65 rows", _rows)


def _rows() -> bytes:
    asked = ask("embed_text", {"text": ["a"]})
    asked.head["inputs"][0] |= {"shape": [65, 1], "data": ["a"] * 65}
    return asked.raw()
