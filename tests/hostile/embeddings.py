"""Hostile requests for OpenAI's embeddings, made by hand."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.helpers.small_release import png
from tests.hostile import images
from tests.hostile.asks import message
from tests.hostile.case import CHECKED, REFUSED, Case

PATH = "/v1/embeddings"
MIB = 2**20


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """The list, always in the same order: the kind, and what makes it."""
    bodies: dict[str, tuple[Callable[[], bytes], str]] = {}
    for name, (given, promise) in _inputs().items():
        bodies[name] = partial(_body, given), promise
    for name, text in _json().items():
        bodies[name] = partial(bytes, text), REFUSED
    for name, fields in _fields().items():
        bodies[name] = partial(_body, "a", **fields), REFUSED
    bodies |= {
        "embeddings: 100,000 texts": (lambda: _body(["a"] * 100_000), REFUSED),
        "embeddings: 2,048 texts": (
            lambda: _body([f"text {number}" for number in range(2048)]),
            CHECKED,
        ),
        "embeddings: 3,000,000 tokens": (lambda: _body([1] * 3_000_000), REFUSED),
        "embeddings: 60 MiB of base64": (
            lambda: _body(f"data:image/png;base64,{'A' * 60 * MIB}"),
            REFUSED,
        ),
        "embeddings: 60 MiB of a data URL without an end": (
            lambda: _body("data:image/" + "a" * 60 * MIB),
            REFUSED,
        ),
    }
    for name, (body, promise) in bodies.items():
        yield _case(name, body, promise)
    for group, promise in ((images.BAD, REFUSED), (images.ODD, CHECKED)):
        for name in group:
            yield _case(f"embeddings, {name}", partial(_image, name), promise)


def _case(kind: str, body: Callable[[], bytes], promise: str) -> tuple[str, Callable[[], Case]]:
    return kind, lambda: Case(kind, (message("POST", PATH, {}, body()),), promise)


def _body(given: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "radapter", "input": given, **fields}).encode()


def _image(name: str) -> bytes:
    return _body(["a cat", _url(images.made(name)), _url(png())])


def _url(file: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(file).decode()}"


def _inputs() -> dict[str, tuple[Any, str]]:
    refused: dict[str, Any] = {
        "wrong types: null": None,
        "wrong types: numbers and texts": ["a", 1],
        "wrong types: objects": [{"type": "image_url", "image_url": {"url": _url(png())}}],
        "wrong types: lists of lists": [["a"], ["b"]],
        "wrong types: true": [True],
        "tokens": [[1, 2, 3]],
        "empty": [],
        "blank": ["a", " "],
        "lies: no image": _url(b"no image"),
        "lies: HTML": _url(b"<script>alert(1)</script>", "text/html"),
        "lies: SVG": _url(b"<svg/>", "image/svg+xml"),
        "lies: header of a PNG alone": _url(b"\x89PNG"),
        "lies: header of a WebP alone": _url(b"RIFF", "image/webp"),
        "lies: half an image": _url(png()[:60]),
        "broken base64: signs": "data:image/png;base64,@@@@",
        "broken base64: padding": _url(png()) + "===",
        "broken base64: twice": _url(base64.b64encode(png())),
        "broken base64: none": "data:image/png;base64,",
        "one bad among good": [*([_url(png())] * 70), _url(png()[:60])],
        "long text": "x" * 10_001,
    }
    addresses = (
        *(
            "http://127.0.0.1:8002/metrics",
            "http://169.254.169.254/latest/meta-data",
            "http://localhost",
            "http://[::1]",
        ),
        *(
            "https://example.org/x.png",
            "HTTP://0x7f000001/",
            "http://evil.example#@127.0.0.1/",
            "https://a\\@b",
        ),
    )
    refused |= {f"URLs: {address}": [address] for address in addresses}
    checked: dict[str, Any] = {
        "texts that look like more": [
            "file:///etc/passwd",
            "ftp://example.org",
            "{{7*7}}",
            "a\0b",
            "\u202e",
            "data: x",
        ],
        "lies: PNG as JPEG": _url(png(), "image/jpeg"),
    }
    named = {name: (given, REFUSED) for name, given in refused.items()}
    named |= {name: (given, CHECKED) for name, given in checked.items()}
    return {f"embeddings, {name}": given for name, given in named.items()}


def _json() -> dict[str, bytes]:
    texts = {
        "deep: 100,000 brackets": b'{"model": "radapter", "input": ' + b"[" * 100_000,
        "deep: 100,000 closed brackets": b'{"model": "radapter", "input": '
        + b"[" * 100_000
        + b"]" * 100_000
        + b"}",
        "deep: 150 levels": b'{"model": "radapter", "input": '
        + b"[" * 150
        + b'"a"'
        + b"]" * 150
        + b"}",
        "NaN": b'{"model": "radapter", "input": [NaN]}',
        "Infinity": b'{"model": "radapter", "input": "a", "alpha": Infinity}',
        "huge numbers": b'{"model": "radapter", "input": [' + b"9" * 100_000 + b"]}",
        "half a surrogate": b'{"model": "radapter", "input": "\\ud800"}',
        "invalid UTF-8": b'{"model": "radapter", "input": "\xff\xfe"}',
        "nothing": b"{}",
        "null": b"null",
        "two objects": b"{}{}",
    }
    return {f"embeddings, JSON: {name}": text for name, text in texts.items()}


def _fields() -> dict[str, dict[str, Any]]:
    fields: dict[str, dict[str, Any]] = {
        "no model": {"model": ""},
        "model of another": {"model": "text-embedding-3-large"},
        "model with a path": {"model": "radapter/../../etc/passwd"},
        "model that is long": {"model": "radapter-" + "9" * 5000},
        "model that is not served": {"model": "radapter-999999999999999999"},
        "model in other digits": {"model": "radapter-\u0661"},
        "model as a number": {"model": 1},
        "dimensions": {"dimensions": 1},
        "dimensions below nought": {"dimensions": -(2**63)},
        "dimensions beyond all": {"dimensions": 10**400},
        "encoding": {"encoding_format": "base32"},
        "alpha": {"alpha": 1.5},
        "alpha that the release lacks": {"alpha": 0.123},
        "alpha as NaN": {"alpha": float("nan")},
        "modality": {"modality": "audio"},
        "user": {"user": "x" * 10_000},
        "unknown fields": {"messages": [], "stream": True},
        "1,000 unknown fields": {f"field {number}": number for number in range(1000)},
    }
    return {f"embeddings, fields: {name}": given for name, given in fields.items()}
