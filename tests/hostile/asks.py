"""Right requests of every task, in JSON and in binary, which the good client asks, and mutations of
them: of their structure, of their values, of their bytes and of HTTP.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from radapter_serve.tasks.table import TASKS
from tests.helpers.small_release import png
from tests.hostile import images

KEY = "radapter-hostile-suite"
LABEL_SET = "colours"
INDEX = "photos"
LENGTH = "Inference-Header-Content-Length"

# Promises
REFUSED = "refused"  # 4xx with a code
CHECKED = "refused, or answered right"  # broken values may still be valid
BROKEN = "refused, or closed"  # broken HTTP, which may have nobody to answer to


@dataclass(frozen=True)
class Case:
    """One hostile request on a connection: bytes, or what makes them where they are many, or parts
    with seconds to wait in between; and how many answers may come.
    """

    kind: str
    data: bytes | Callable[[], bytes] | Sequence[bytes | float]
    promise: str = REFUSED
    answers: int = 1

    @property
    def parts(self) -> Sequence[bytes | float]:
        if isinstance(self.data, bytes):
            return [self.data]
        return [self.data()] if callable(self.data) else self.data


@dataclass
class Ask:
    """A request that still has its structure: `head` is the JSON of its body, `tail` the binary
    tensors behind it.
    """

    model: str
    head: Any
    tail: bytes = b""
    binary: bool = False

    @property
    def body(self) -> bytes:
        return json.dumps(self.head).encode() + self.tail

    def raw(self, body: bytes | None = None, headers: Mapping[str, str | None] = {}) -> bytes:
        """The whole message, with another body or other headers if they are given."""
        body = self.body if body is None else body
        length = {LENGTH: str(len(body) - len(self.tail))} if self.binary else {}
        return message("POST", f"/v2/models/{self.model}/infer", {**length, **headers}, body)


def message(method: str, path: str, headers: Mapping[str, str | None], body: bytes = b"") -> bytes:
    """A request of HTTP/1.1 with a key; a header of None is left out."""
    usual = {
        "Host": "gateway",
        "Authorization": f"Bearer {KEY}",
        "Content-Type": f"application/{'octet-stream' if LENGTH in headers else 'json'}",
        "Content-Length": str(len(body)),
    }
    named = {**usual, **headers}
    lines = [f"{name}: {value}" for name, value in named.items() if value is not None]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("utf-8", "surrogateescape") + body


def ask(model: str, inputs: dict[str, Any], *, binary: bool = False) -> Ask:
    """A request for a task, with texts and images as lists and numbers as arrays."""
    batch = [] if model in ("segment", "retrieve") else [1]
    kinds = {"i": "INT32", "f": "FP32", "u": "UINT8"}
    tensors = []
    tail = b""
    for name, value in inputs.items():
        is_list = isinstance(value, list)
        tensor: dict[str, Any] = {
            "name": name,
            "shape": [*batch, *([len(value)] if is_list else value.shape)],
            "datatype": "BYTES" if is_list else kinds[value.dtype.kind],
        }
        if binary:
            packed = pack(value)
            tensor["parameters"] = {"binary_data_size": len(packed)}
            tail += packed
        elif is_list:  # images as base64
            tensor["data"] = [
                item if isinstance(item, str) else base64.b64encode(item).decode() for item in value
            ]
        else:
            tensor["data"] = value.ravel().tolist()
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
    texts = [
        item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item for item in value
    ]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def number(value: float, kind: Any = np.int32) -> Any:
    return np.array([value], kind)


def right(random: Random) -> list[tuple[str, dict[str, Any]]]:
    """Each task with right inputs, in several ways."""
    kind = random.choice(["PNG", "JPEG", "WEBP"])
    image = [png(random.randrange(8), random.randrange(8, 60), random.randrange(8, 60), kind)]
    labels = {"labels": [f"label {place}" for place in range(random.randrange(1, 5))]}
    choice: dict[str, Any] = random.choice([labels, {"label_set": [LABEL_SET]}])
    small = {"refine": number(2), "short_side": number(24)}
    masks = np.full((2, 20, 20), 255, np.uint8)
    masks[1, :10] = 0
    search = {"index": [INDEX], "top_k": number(2)}
    limits = {"min_score": number(-0.5, np.float32), "where": ["width > 10 AND NOT (height = 3)"]}
    return [
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


def good() -> list[Ask]:
    """The good client's requests, one of each task, which it sends again and again."""
    image = [png(5, 40, 30)]
    return [
        ask("embed_image", {"image": image}),
        ask("embed_text", {"text": ["a striped thing"]}, binary=True),
        ask("classify", {"image": image, "labels": ["red", "green", "blue"]}),
        ask("segment", {"image": image, "label_set": [LABEL_SET]}, binary=True),
        ask("retrieve", {"text": ["a cat"], "index": [INDEX], "where": ["width > 10"]}),
    ]


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
    *("NOT " * 400 + "width>1", " OR ".join(["width>1"] * 180), "path LIKE '" + "%a" * 400 + "'"),
    *("(" * 900 + "width>1" + ")" * 900, "-" * 1900 + "1 > 0", "CASE" * 400),
    *("sleep(10)", "read_csv('/etc/passwd')", "path = '\ud800'", "width > " + "9" * 500),
    *("width BETWEEN 1 AND", "CAST(path AS INT) > 1", "x'00'", "1e999 > 1"),
)
_NAMES = (
    *sorted({name for task in TASKS.values() for name in (*task.inputs, *task.outputs)}),
    *("tokens", "nothing", "", "name", "shape", "data", "parameters", "outputs", "classification"),
    *("binary_data", "binary_data_size", "binary_data_output", "shared_memory_region", "timeout"),
    *("shared_memory_offset", "priority", "sequence_id"),
)
_SIZES = (0, -1, 1, 2, 65, 2**31, 2**32, 2**62, 2**63, -(2**63), 1.5, "1", None, True)
_SNIPPETS = (b"\0", b"\xff", b'"', b"[", b"{", b",", b"-", b"1e9", b"\r\n", b"\xed\xa0\x80")


def mutation(random: Random) -> Case:
    """A right request, changed until it is hostile."""
    model, inputs = random.choice(right(random))
    request = ask(model, inputs, binary=random.random() < 0.5)
    way = random.randrange(100)
    if way < 40:
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            _change(request, random)
        return Case("mutated structure", request.raw(), CHECKED)
    if way < 60:
        name = random.choice(list(inputs))
        return Case("hostile values", _exchanged(request, inputs, name, random).raw(), CHECKED)
    if way < 80:
        return Case("mutated bytes of a body", request.raw(_damaged(request.body, random)), CHECKED)
    noise = random.randbytes(random.choice([1, 10, 100, 1000, 20_000]))
    if way < 86:
        return Case("random bytes as a body", request.raw(noise), CHECKED)
    if way < 88:
        return Case("random bytes as HTTP", noise, BROKEN)
    raw = request.raw()
    end = raw.index(b"\r\n\r\n") + 4 if random.random() < 0.7 else len(raw)
    return Case("mutated bytes of HTTP", _damaged(raw[:end], random) + raw[end:], BROKEN)


def _damaged(data: bytes, random: Random) -> bytes:
    """Exchange, take out, double or put in some bytes."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 20])):
        start = random.randrange(len(changed) + 1)
        end = start + random.choice([0, 1, 1, 1, 2, 10, 100, len(data)])
        new = [b"", random.randbytes(1), random.choice(_SNIPPETS), 2 * changed[start:end][:100]]
        changed[start:end] = random.choice(new)
    return bytes(changed)


def _exchanged(request: Ask, inputs: dict[str, Any], name: str, random: Random) -> Ask:
    """The request with hostile values of one input, packed as they should be."""
    value = inputs[name]
    if name == "image":
        value = [images.file_of(random.choice(images.SMALL))]
    elif isinstance(value, list):
        value = [random.choice(WHERE if name == "where" else TEXTS) for _ in value]
    else:
        value = np.frombuffer(random.randbytes(value.nbytes), value.dtype).reshape(value.shape)
    changed = ask(request.model, {**inputs, name: value}, binary=request.binary)
    for tensor in changed.head["inputs"]:
        if tensor["name"] == name and tensor["datatype"] != "BYTES" and not request.binary:
            tensor["data"] = [random.choice(NUMBERS) for _ in tensor["data"]]
    return changed


def _change(request: Ask, random: Random) -> None:
    """Change the structure of a request, of which an earlier change may have left anything."""
    dims = random.choice([0, 1, 2, 2, 3, 9, 100, 10_000])
    kinds = ["BYTES", "INT32", "FP16", "BOOL", "STRING", "bytes", ""]
    values = {
        "name": random.choice(_NAMES),
        "datatype": random.choice(kinds),
        "shape": [random.choice(_SIZES) for _ in range(dims)],
        "data": ["a"] * random.choice([0, 2, 3, 65, 300]),
        "binary_data_size": random.choice(_SIZES),
    }
    tree, key = random.choice(_places([request.head]))
    way = random.randrange(12)
    if way < 7:
        tree[key] = random.choice([values.get(key, _odd(random)), _odd(random)])
    elif way < 9:
        del tree[key]
    elif isinstance(tree, dict):
        tree[random.choice(_NAMES)] = _odd(random)
    else:
        tree.insert(key, random.choice([tree[key], _odd(random)]))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value in JSON, as its parent and its key."""
    keys: Any = tree if isinstance(tree, dict) else ()
    if isinstance(tree, list):
        keys = range(len(tree))
    return [place for key in keys for place in ((tree, key), *_places(tree[key]))]


def _odd(random: Random) -> Any:
    nested: Any = random.choice(NUMBERS)
    for _ in range(random.choice([2, 5, 300])):
        nested = [nested]
    outputs = [{"name": random.choice(_NAMES), "parameters": {"binary_data": True}}]
    odd: list[Any] = [None, True, False, {}, [], [[]], {"a": []}, nested, outputs]
    return random.choice([random.choice(TEXTS), random.choice(NUMBERS), random.choice(odd)])
