"""Right requests of every task, in JSON and in binary, which the good client asks, and mutations of
them: of their structure, of their values, of their bytes and of HTTP.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from tests.helpers.small_release import png
from tests.hostile import images

KEY = "radapter-hostile-suite"
LABEL_SET = "colours"
INDEX = "photos"
TYPE = "Content-Type"
LENGTH = "Inference-Header-Content-Length"
_DATATYPES = {"i": "INT32", "f": "FP32", "u": "UINT8", "b": "BOOL"}

Headers = dict[str, "str | None"]


@dataclass
class Ask:
    """A request that still has its structure: `head` is the JSON of its body, `tail` the binary
    tensors behind it. A header of None is left out.
    """

    model: str
    head: Any
    tail: bytes = b""
    binary: bool = False
    headers: Headers = field(default_factory=dict)
    path: str | None = None

    @property
    def body(self) -> bytes:
        return json.dumps(self.head).encode() + self.tail

    def raw(self, body: bytes | None = None) -> bytes:
        """The whole message, with another body if one is given."""
        body = self.body if body is None else body
        length: Headers = {LENGTH: str(len(body) - len(self.tail))} if self.binary else {}
        path = self.path or f"/v2/models/{self.model}/infer"
        return message("POST", path, {**length, **self.headers}, body)


def message(method: str, path: str, headers: Headers, body: bytes = b"") -> bytes:
    """A request of HTTP/1.1 with a key."""
    usual: Headers = {
        "Host": "gateway",
        "Authorization": f"Bearer {KEY}",
        TYPE: "application/octet-stream" if LENGTH in headers else "application/json",
        "Content-Length": str(len(body)),
    }
    named = {**usual, **headers}
    lines = [f"{name}: {value}" for name, value in named.items() if value is not None]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("utf-8", "surrogateescape") + body


def ask(model: str, inputs: dict[str, Any], *, binary: bool = False) -> Ask:
    """A request for a task, with texts and images as lists and numbers as arrays."""
    batch = [] if model in ("segment", "retrieve") else [1]
    tensors = []
    tail = b""
    for name, value in inputs.items():
        is_list = isinstance(value, list)
        tensor: dict[str, Any] = {
            "name": name,
            "shape": [*batch, *([len(value)] if is_list else value.shape)],
            "datatype": "BYTES" if is_list else _DATATYPES[value.dtype.kind],
        }
        if binary:
            packed = pack(value)
            tensor["parameters"] = {"binary_data_size": len(packed)}
            tail += packed
        else:
            tensor["data"] = list(map(as_text, value)) if is_list else value.ravel().tolist()
        tensors.append(tensor)
    head: dict[str, Any] = {"id": "1", "inputs": tensors}
    if binary:
        head["parameters"] = {"binary_data_output": True}
    elif model == "retrieve":
        head["outputs"] = [{"name": "id"}, {"name": "score"}, {"name": "metadata"}]
    return Ask(model, head, tail, binary)


def pack(value: Any) -> bytes:
    """A tensor in the protocol's binary form."""
    if not isinstance(value, list):
        return bytes(value.tobytes())
    texts = [one.encode("utf-8", "surrogatepass") if isinstance(one, str) else one for one in value]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def as_text(value: str | bytes) -> str:
    """A text, or the bytes of an image as base64."""
    return value if isinstance(value, str) else base64.b64encode(value).decode()


def number(value: float, kind: Any = np.int32) -> Any:
    return np.array([value], kind)


def right(random: Random) -> Ask:
    """A right request of some task."""
    kind = random.choice(["PNG", "JPEG", "WEBP"])
    image = [png(random.randrange(8), random.randrange(8, 60), random.randrange(8, 60), kind)]
    labels = {"labels": [f"label {place}" for place in range(random.randrange(1, 5))]}
    choice: dict[str, Any] = random.choice([labels, {"label_set": [LABEL_SET]}])
    small = {"refine": number(2), "short_side": number(24)}
    masks = np.full((2, 20, 20), 255, np.uint8)
    masks[1, :10] = 0
    search = {"index": [INDEX], "top_k": number(2)}
    limits = {"min_score": number(-0.5, np.float32), "where": ["width > 10 AND NOT (height = 3)"]}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("embed_image", {"image": image}),
        ("embed_text", {"text": [random.choice(["a cat", "ein Fahrrad", "猫", "x" * 300])]}),
        ("classify", {"image": image, **choice, "top_k": number(1)}),
        ("classify", {"image": image, **labels, "templates": ["a photo of a {}.", "{}"]}),
        ("segment", {"image": image, **choice, "threshold": number(0.5, np.float32)}),
        ("segment", {"image": image, **choice, **small, "stride": number(8)}),
        ("segment", {"image": [png(1, 20, 20)], "labels": ["a", "b"], "proposals": masks}),
        ("retrieve", {"image": image, **search}),
        ("retrieve", {"text": ["a cat"], **search, **limits}),
    ]
    model, inputs = random.choice(requests)
    return ask(model, inputs, binary=random.random() < 0.5)


def good() -> dict[str, Ask]:
    """What the good client asks of each task, again and again."""
    image = [png(5, 40, 30)]
    return {
        "embed_image": ask("embed_image", {"image": image}),
        "embed_text": ask("embed_text", {"text": ["a striped thing"]}, binary=True),
        "classify": ask("classify", {"image": image, "labels": ["red", "green", "blue"]}),
        "segment": ask("segment", {"image": image, "label_set": [LABEL_SET]}, binary=True),
        "retrieve": ask("retrieve", {"text": ["a cat"], "index": [INDEX], "where": ["width > 10"]}),
    }


# Mutations

TEXTS = (
    *("", " ", "\0", "a\0b", "../../etc/passwd", "..\\..\\windows", "/etc/passwd", "%2e%2e%2f"),
    *("file:///etc/passwd", ".", "..", "~", "con", "a/b", "-rf", "$(id)", "`id`", "{}", "{}" * 5),
    *("{0.__class__}", "%s%n", "{{7*7}}", "'; DROP TABLE x; --", "1=1", "<script>", "\r\nX: y"),
    *("\u202e", "\ud800", "\ufeff", "\U0010ffff", "é", "猫" * 30, "a" * 1001, "b" * 10_001),
    *("," * 500, "nan", "null", "photos", "colours", "image_encoder", "[overloaded] x"),
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 64, 65, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**62),
    *(2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e38, 1e39, 1e308),
    *(float("inf"), float("-inf"), float("nan")),
)
WHERE = (
    *("width > 10 OR 1=1", "1/0", "width", "width > 'a'", "nothing = 1", "--", "/*", "\0"),
    *("path IN (SELECT path FROM photos)", "width > 10; DELETE FROM x", "(" * 1000, "width >"),
    *("NOT " * 500 + "width>1", " AND ".join(["width>1"] * 200), "path LIKE '" + "%a" * 400 + "'"),
    *("sleep(10)", "read_csv('/etc/passwd')", "path = '\ud800'", "width > " + "9" * 500),
    *("width BETWEEN 1 AND", "CAST(path AS INT) > 1", "x'00'", "1e999 > 1"),
)
_NAMES = (
    *("image", "text", "labels", "label_set", "templates", "top_k", "index", "where", "alpha"),
    *("threshold", "refine", "short_side", "stride", "proposals", "tokens", "nothing", "x"),
    *("label", "score", "mask", "thumbnail", "id", "image_embeds", "name", "shape", "data"),
    *("parameters", "binary_data_size", "binary_data_output", "binary_data", "classification"),
    *("shared_memory_region", "shared_memory_offset", "priority", "sequence_id", "timeout"),
    *("outputs", ""),
)
_SIZES = (0, -1, 1, 2, 65, 2**31, 2**32, 2**62, 2**63, -(2**63), 1.5, "1", None, True)
_HEADERS = (TYPE, "Content-Encoding", "Host", "Authorization", "Expect", LENGTH)
_VALUES = (
    *(None, "", "gzip", "identity, gzip", "text/html", "multipart/form-data; boundary=x"),
    *("0", "-1", "1", "9" * 20, "abc", "1.5", "0x10", "²", " 5 ", "a" * 5000),
)
_SNIPPETS = (b"\0", b"\xff", b'"', b"[", b"{", b",", b"-", b"1e9", b"\r\n", b"\xed\xa0\x80")


def hostile(random: Random) -> tuple[str, bytes, bool]:
    """Kind and bytes of a hostile request, and whether HTTP itself is broken."""
    request = right(random)
    way = random.randrange(100)
    if way < 40:
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            _change(request, random)
        return "mutated structure", request.raw(), False
    if way < 60:
        _exchange_value(request, random)
        return "hostile values", request.raw(), False
    if way < 80:
        return "mutated bytes of a body", request.raw(_damaged(request.body, random)), False
    noise = random.randbytes(random.choice([1, 10, 100, 1000, 20_000]))
    if way < 84:
        return "random bytes as a body", Ask(request.model, request.head).raw(noise), False
    if way < 86:
        request.tail = noise
        request.binary = True
        return "random bytes as tensors", request.raw(), False
    if way < 88:
        return "random bytes as HTTP", noise, True
    raw = request.raw()
    end = raw.index(b"\r\n\r\n") + 4 if random.random() < 0.7 else len(raw)
    return "mutated bytes of HTTP", _damaged(raw[:end], random) + raw[end:], True


def _damaged(data: bytes, random: Random) -> bytes:
    """Flip, take out, double or put in some bytes."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 20])):
        at = random.randrange(len(changed) + 1)
        way = random.randrange(6)
        if way < 2 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif way == 2:
            del changed[at : at + random.choice([1, 2, 10, 100])]
        elif way == 3:
            changed[at:at] = changed[at : at + random.choice([1, 10, 100])]
        elif way == 4:
            changed[at:at] = random.choice(_SNIPPETS)
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def _exchange_value(request: Ask, random: Random) -> None:
    """Exchange the values of one tensor for hostile ones, packed as they should be."""
    tensors = request.head["inputs"]
    place = random.randrange(len(tensors))
    tensor = tensors[place]
    count = max(1, len(tensor.get("data", [1])))
    pool: Any = NUMBERS
    if tensor["datatype"] == "BYTES":
        pool = WHERE if tensor["name"] == "where" else TEXTS
    values = [random.choice(pool) for _ in range(count)]
    if tensor["name"] == "image":
        values = [images.made(random.choice(list(images.small())))]
    if not request.binary:
        tensor["data"] = [as_text(one) if isinstance(one, bytes) else one for one in values]
        return
    sizes = [one["parameters"]["binary_data_size"] for one in tensors]
    start = sum(sizes[:place])
    packed = random.randbytes(sizes[place])
    if tensor["datatype"] == "BYTES":
        packed = pack(values)
        tensor["shape"] = [*tensor["shape"][:-1], len(values)]
        tensor["parameters"]["binary_data_size"] = len(packed)
    request.tail = request.tail[:start] + packed + request.tail[start + sizes[place] :]


def _change(request: Ask, random: Random) -> None:
    """Change the structure of a request, of which an earlier change may have left anything."""
    way = random.randrange(16)
    places = _places(request.head)
    if way == 0:
        request.headers[random.choice(_HEADERS)] = random.choice(_VALUES)
    elif way == 1:
        text = random.choice(["image_encoder", "text_encoder", "patch_encoder", *TEXTS])
        name = "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "replace")[:2000])
        versions = ("", "/versions/0", "/versions/-1", f"/versions/{2**63}", "/versions/1")
        model = random.choice([request.model, name])
        request.path = f"/v2/models/{model}{random.choice(versions)}/infer"
    elif way == 2 and len(request.tail) > 4:
        at = random.choice([0, random.randrange(len(request.tail) - 3)])
        length = struct.pack("<I", random.choice([0, 1, 5, 2**16, 2**31, 2**32 - 1]))
        request.tail = request.tail[:at] + length + request.tail[at + 4 :]
    elif not places:
        request.head = _odd(random)
    else:
        tree, key = random.choice(places)
        if way < 8:  # a field of a tensor, by a value of its kind
            dims = random.choice([0, 1, 2, 2, 3, 9, 100, 10_000])
            kinds = ["BYTES", "INT32", "FP16", "BOOL", "STRING", "bytes", ""]
            values = {
                "name": random.choice(_NAMES),
                "datatype": random.choice(kinds),
                "shape": [random.choice(_SIZES) for _ in range(dims)],
                "data": ["a"] * random.choice([0, 2, 3, 65, 300]),
                "binary_data_size": random.choice(_SIZES),
            }
            tree[key] = values.get(key, _odd(random))
        elif way < 10:
            tree[key] = _odd(random)
        elif way < 12:
            del tree[key]
        elif isinstance(tree, dict):
            tree[random.choice(_NAMES)] = _odd(random)
        else:
            tree.insert(key, random.choice([tree[key], _odd(random)]))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value in JSON, as its parent and its key."""
    places: list[tuple[Any, Any]] = []
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            places += [(tree, key), *_places(tree[key])]
    return places


def _odd(random: Random) -> Any:
    nested: Any = random.choice(NUMBERS)
    for _ in range(random.choice([2, 5, 300])):
        nested = [nested]
    outputs = [{"name": random.choice(_NAMES), "parameters": {"binary_data": True}}]
    odd: list[Any] = [None, True, False, {}, [], [[]], {"a": []}, nested, outputs]
    return random.choice([random.choice(TEXTS), random.choice(NUMBERS), random.choice(odd)])
